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
all_steps=(setup scripts fmt clippy deny doc build release-guard demo dev nextest)

# A run from scratch gains nothing from incremental compilation, and from lines in backtraces only once something has
# failed; it pays for both in time and disk.
if [ -n "${CI:-}" ]; then
  export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=none
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

# What is shipped has other features than what is tested, and has to compile too.
step_clippy() {
  cargo clippy --locked --workspace --all-targets --features failpoints -- -D warnings
  cargo clippy --locked -p hsm-node -p admin-cli --bins -- -D warnings
}

# Advisories are left to `make advisories`: they need a copy of the advisory database.
step_deny() { cargo deny --locked check bans licenses sources; }

step_doc() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --features failpoints; }

# The process tests start these binaries; nextest by itself would not build those of other packages. With the tests in one
# go, because features that only tests ask for would have all of our crates built a second time.
step_build() { cargo build --locked --workspace --bins --tests --features failpoints; }

# Of the binaries just built hsm-node contains failpoints: packaging has to refuse it. hsmctl never does: a guard that
# refuses everything would guard nothing.
step_release-guard() {
  local built said
  built=$(target_dir)/debug
  if said=$(scripts/release.sh check "$built/hsm-node" 2>&1); then
    echo "scripts/release.sh accepted a binary built with the feature failpoints" >&2
    return 1
  fi
  printf '%s\n' "$said"
  grep -q failpoints <<<"$said"
  scripts/release.sh check "$built/hsmctl"
}

step_demo() { scripts/demo.sh; }

# `make dev` without its build, and the first commands of the README.
step_dev() {
  local folder bin sealed opened
  folder=$(mktemp -d "${TMPDIR:-/tmp}/hsm-dev.XXXXXX")
  export HSM_DEV_DIR=$folder/dev HSM_DEV_PORT
  HSM_DEV_PORT=$(free_base_port 3)
  # Stops the nodes however this step ends. Expanded now: by then `folder` is gone.
  # shellcheck disable=SC2064
  trap "scripts/dev.sh clean >/dev/null 2>&1 && rm -rf '$folder'" EXIT
  scripts/dev.sh up
  bin=$(cd "$(bin_dir)" && pwd)
  PATH=$bin:$PATH
  set -a
  # shellcheck source=/dev/null
  . "$HSM_DEV_DIR/env"
  set +a
  hsmctl cluster status
  hsmctl cluster members
  hsmctl list-kek
  sealed=$(printf 'hello' |
    HSMCTL_PROFILE=trading-1 hsmctl encrypt --context exchange-key --endpoint "https://127.0.0.1:$HSM_DEV_PORT")
  opened=$(printf '%s' "$sealed" |
    HSMCTL_PROFILE=trading-1 hsmctl decrypt --context exchange-key --endpoint "https://127.0.0.1:$((HSM_DEV_PORT + 20))")
  [ "$opened" = hello ] || die "node 3 decrypted to '$opened'"
  hsmctl rotate exchange-key
  hsmctl rotation-status
  hsmctl dev kill --node 1
  hsmctl dev start --node 1
  hsmctl dev status
  scripts/dev.sh clean
  [ ! -e "$HSM_DEV_DIR" ] || die "$HSM_DEV_DIR is still there after 'scripts/dev.sh clean'"
}

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
