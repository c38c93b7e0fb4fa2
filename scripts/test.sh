#!/usr/bin/env bash
# Everything that CI runs, in order, each step with its wall time; stops at the first step that fails and names it.
#
#   scripts/test.sh               all steps
#   scripts/test.sh fmt clippy    only these
#
# The last line is 'N passed, N failed, N skipped', below nextest's own summary.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# What `make verify` runs is the part that builds no binaries; see Makefile.
all_steps=(setup scripts fmt clippy deny doc build release-guard demo nextest)

# A run from scratch gains nothing from incremental compilation and pays for it in time and disk.
if [ -n "${CI:-}" ]; then
  export CARGO_INCREMENTAL=0
fi

nextest_log=""
finished=()

step_setup() { scripts/setup.sh; }

step_scripts() {
  local script
  for script in scripts/*.sh .ci/run; do
    bash -n "$script"
  done
}

step_fmt() { cargo fmt --all --check; }

step_clippy() { cargo clippy --locked --workspace --all-targets --features failpoints -- -D warnings; }

# Advisories are left to `make advisories`: they need a copy of the advisory database.
step_deny() { cargo deny --locked check bans licenses sources; }

step_doc() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --features failpoints; }

# The process tests start these binaries; nextest by itself would not build those of other packages.
step_build() { cargo build --locked --workspace --bins --features failpoints; }

# The binaries just built contain failpoints: packaging has to refuse them.
step_release-guard() {
  local said
  if said=$(scripts/release.sh check "$(target_dir)/debug/hsm-node" 2>&1); then
    echo "scripts/release.sh accepted a binary built with the feature failpoints" >&2
    return 1
  fi
  printf '%s\n' "$said"
  grep -q failpoints <<<"$said"
}

step_demo() { scripts/demo.sh; }

step_nextest() {
  cargo nextest run --locked --workspace --features failpoints --profile ci --no-tests=fail 2>&1 | tee "$nextest_log"
}

# Prints 'N passed, N failed, N skipped' from nextest's summary in file $1; fails when there is none.
closing_line() {
  local summary passed failed skipped
  summary=$(sed 's/\x1b\[[0-9;]*m//g' "$1" | grep -E '^[[:space:]]*Summary \[' | tail -n 1)
  [ -n "$summary" ] || return 1
  passed=$(count_of "$summary" 'passed')
  # A test that ran into its time limit or could not be started has failed, whatever nextest calls it.
  failed=$(($(count_of "$summary" 'failed') + $(count_of "$summary" 'timed out') + $(count_of "$summary" 'exec failed')))
  skipped=$(count_of "$summary" 'skipped')
  printf '%s\n%s passed, %s failed, %s skipped\n' "$summary" "$passed" "$failed" "$skipped"
}

count_of() {
  grep -oE "[0-9]+ $2" <<<"$1" | head -n 1 | grep -oE '^[0-9]+' || echo 0
}

summarise() {
  local line
  echo
  echo "wall time by step:"
  for line in "${finished[@]}"; do
    printf '  %s\n' "$line"
  done
  printf '  %-14s %5d s\n' total "$SECONDS"
}

run_step() {
  local name=$1 begun=$SECONDS status
  declare -F "step_$name" >/dev/null || die "unknown step '$name': one of ${all_steps[*]}"
  printf '\n==> %s\n' "$name"
  # A subshell of its own, not a condition: inside a condition bash ignores `set -e`.
  (
    set -e
    "step_$name"
  ) </dev/null
  status=$?
  finished+=("$(printf '%-14s %5d s' "$name" $((SECONDS - begun)))")
  printf '<== %s: %d s\n' "$name" $((SECONDS - begun))
  if [ "$status" -ne 0 ]; then
    summarise
    printf '\nFAILED in step %s (exit status %d)\n' "$name" "$status"
    if [ "$name" = nextest ]; then
      closing_line "$nextest_log"
    fi
    exit "$status"
  fi
}

nextest_log=$(mktemp) || exit 1
trap 'rm -f "$nextest_log"' EXIT

steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=("${all_steps[@]}")
for name in "${steps[@]}"; do
  run_step "$name"
done
summarise
case " ${steps[*]} " in
  *" nextest "*)
    echo
    closing_line "$nextest_log" || die "nextest printed no summary"
    ;;
esac
