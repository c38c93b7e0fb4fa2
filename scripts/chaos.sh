#!/usr/bin/env bash
# Builds what chaos needs and runs it. hsm-node is built with failpoints: some faults, and every seeded bug, are behind them. Both are
# told which commit they are built from: `--record` writes it down.
#
#   scripts/chaos.sh run --seed 7 --minutes 5
#   scripts/chaos.sh selftest --bug skip_sync_data
#   scripts/chaos.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

HSM_BUILD_COMMIT=$(built_commit)
export HSM_BUILD_COMMIT
cargo build --locked --quiet -p hsm-node -p admin-cli -p chaos --bins --features hsm-node/failpoints
exec "$(target_dir)/debug/chaos" "$@"
