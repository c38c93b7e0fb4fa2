#!/usr/bin/env bash
# Builds hsm-node of the last release from this repository's history, once, and prints where it is. For the tests of clusters
# of two releases (`make rolling`); takes as long as a build from nothing.
#
#   HSM_PREVIOUS_NODE=$(scripts/previous.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# The release of the newest fixture (cluster-tests/fixtures/README.md). Both change with a release.
release=2.0.0-dev.1
commit=7ca36ca4303eb38c8cbeb6c52b8c1e3c616c805f

mkdir -p "$(target_dir)/previous"
folder=$(cd "$(target_dir)/previous" && pwd)
node=$folder/$release/hsm-node
if [ ! -x "$node" ]; then
  have git || die "git is not installed, and the last release ($release) is built from its history"
  git cat-file -e "$commit^{commit}" 2>/dev/null ||
    die "commit ${commit:0:7}, release $release, is not in this folder's history: in a shallow clone say 'git fetch --unshallow'; \
without a clone build that release elsewhere, and name its hsm-node in HSM_PREVIOUS_NODE"
  work=$folder/$release.work
  rm -rf "$work"
  mkdir -p "$work/source" "$folder/$release"
  trap 'rm -rf "$work"' EXIT
  git archive "$commit" | tar -x -C "$work/source"
  printf 'building hsm-node %s (%s) into %s\n' "$release" "${commit:0:7}" "$node" >&2
  # From nothing, and without what this project's build was told.
  (
    cd "$work/source"
    unset RUSTFLAGS CARGO_BUILD_TARGET
    CARGO_TARGET_DIR="$work/target" "${CARGO:-cargo}" build --locked -p hsm-node --bin hsm-node >&2
  )
  # Whole or not at all.
  mv "$work/target/debug/hsm-node" "$node"
fi
printf '%s\n' "$node"
