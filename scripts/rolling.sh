#!/usr/bin/env bash
# Upgrades all nodes of clusters of three and of five voters one by one, and back, behind HAProxy (TLS passed through, and
# ended) and nginx (passed through), under load and under changes. Prints what was sent, and how much of it failed; fails if
# any of it did; before that the same while two of five nodes leave for good. Takes some twenty minutes;
# cluster-tests/tests/cluster/rolling.rs says what is counted. First of all come clusters of two releases (mixed.rs), in one of
# which leaders of both are killed; for them the last release is built once.
#
#   scripts/rolling.sh                   from this build to this build; two releases: from the last one
#   scripts/rolling.sh /path/hsm-node    both from an earlier release, and the first without nginx
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# run [NAME=VALUE] TEST
run() {
  env "${@:1:$#-1}" "${CARGO:-cargo}" test --locked --quiet -p cluster-tests --test cluster -- --ignored --exact --nocapture "${@: -1}"
}
mixed=mixed::nodes_of_two_releases_serve_together_until_the_last_one_is_upgraded
died=mixed::leaders_of_two_releases_die_and_others_change_things_in_time
removed=rolling::no_request_fails_while_two_of_five_voters_are_removed
rolled=rolling::no_request_fails_while_three_and_five_voters_are_upgraded_and_back

if [ -n "${1:-}" ]; then
  [ -x "$1" ] || die "$1: no such program"
  previous=$(realpath "$1")
  run HSM_PREVIOUS_NODE="$previous" "$mixed"
  run HSM_PREVIOUS_NODE="$previous" "$died"
  run HSM_PREVIOUS_NODE="$previous" "$rolled"
  exit
fi
# Where the last release cannot be built the rest is run all the same.
if previous=$(scripts/previous.sh); then
  run HSM_PREVIOUS_NODE="$previous" "$mixed"
  run HSM_PREVIOUS_NODE="$previous" "$died"
fi
run HSM_PREVIOUS_NODE="" "$removed"
run HSM_PREVIOUS_NODE="" "$rolled"
[ -n "$previous" ] || die "NOT TESTED: a cluster of two releases, see above"
