#!/usr/bin/env bash
# Upgrades all nodes of clusters of three and of five voters one by one, and back, behind HAProxy (TLS passed through, and
# ended) and nginx (passed through), under load and under changes. Prints what was sent, and how much of it failed; fails if
# any of it did. Takes about a quarter of an hour; cluster-tests/tests/cluster/rolling.rs says what is counted.
#
#   scripts/rolling.sh                   from this build to this build
#   scripts/rolling.sh /path/hsm-node    from an earlier release to this build
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

if [ -n "${1:-}" ]; then
  [ -x "$1" ] || die "$1: no such program"
  HSM_PREVIOUS_NODE=$(realpath "$1")
  export HSM_PREVIOUS_NODE
fi
exec "${CARGO:-cargo}" test --locked --quiet -p cluster-tests --test cluster -- --ignored --exact --nocapture \
  rolling::no_request_fails_while_three_and_five_voters_are_upgraded_and_back
