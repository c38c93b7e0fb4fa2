#!/usr/bin/env bash
# Everything that CI runs, in order, each step with its wall time; stops at the first step that fails and names it.
#
#   scripts/test.sh               all steps
#   scripts/test.sh fmt clippy    only these
#   scripts/test.sh chaos         what CI runs after them
#
# The last line is 'N passed, N failed, N skipped', below nextest's own summary.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# What `make verify` runs is the part that builds no binaries; see Makefile.
# Those that mostly wait go on while others compile, which give way to them and leave the binaries alone that they run.
first=(setup scripts alerts fmt deny shipped)
that_wait=(demo dev)
meanwhile=(clippy doc)
last=(build release-guard nextest)
all_steps=("${first[@]}" "${that_wait[@]}" "${meanwhile[@]}" "${last[@]}")

# A run from scratch gains nothing from incremental compilation, and from lines in backtraces only once something has
# failed; it pays for both in time and disk. Nor does it gain what the optimiser's second pass over each dependency costs,
# which `lto = false` means.
if [ -n "${CI:-}" ]; then
  export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=none CARGO_PROFILE_DEV_LTO=off
fi

# All scenarios and the usual seeds, of these binaries, as many as are meant, whatever somebody has left in his shell.
unset HSM_SCENARIOS HSM_BIN_DIR HSM_NODE_BIN HSM_LEADER_KILLS HSM_OVERLOAD_SECS CONSENSUS_KILLS
unset HSM_SIM_SEED HSM_SIM_SEEDS HSM_SIM_FIRST HSM_MEMBERSHIP_SEED HSM_PREVIOUS_NODE
unset HSM_DAMAGE_ROUNDS HSM_SPACE_ROTATIONS HSM_REAL_ROTATIONS HSM_DISK_FLAT_SECS
unset HSM_TOKEN_DAMAGE_ROUNDS HSM_TOKEN_OBJECT_ROUNDS

nextest_log=""
# Each step that has ended with its wall time, a line each, in the order of their ends.
finished=""
gives_way=""

step_setup() { scripts/setup.sh; }

step_scripts() {
  local script
  for script in scripts/*.sh .ci/run; do
    bash -n "$script"
  done
}

# Every alert fires when it has to and says what it has to. That nodes export what they ask for is a test of theirs.
step_alerts() {
  cd config-examples/prometheus
  promtool check config prometheus.yaml
  promtool test rules ./*.test.yaml
}

step_fmt() { cargo fmt --all --check; }

step_clippy() { cargo clippy --locked --workspace --all-targets --features failpoints -- -D warnings; }

# Advisories are left to `make advisories`: they need a copy of the advisory database.
step_deny() { cargo deny --locked check bans licenses sources; }

# It needs our crates checked, as `clippy` has just done it: by the same driver, as `cargo clippy` calls it, and with the
# features that tests add, cargo finds that done. Otherwise it does it again.
step_doc() {
  RUSTC_WORKSPACE_WRAPPER=$(rustc --print sysroot)/bin/clippy-driver
  export RUSTC_WORKSPACE_WRAPPER CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__ RUSTDOCFLAGS="-D warnings"
  cargo doc --locked --workspace --no-deps --features failpoints,hsm-core/test-support,raft-store/simulation
}

# What is shipped has no failpoints: it is built first, has to compile without a warning too, and is what the
# demonstration and the README's tour run. Of the whole workspace, because with fewer members dependencies would have fewer
# features, and be built twice. What only tests need is built with them.
step_shipped() {
  local built said
  said=$(cargo build --locked --workspace --bin hsm-node --bin hsmctl --color never 2>&1) || die "$said"
  printf '%s\n' "$said"
  ! grep -q '^warning' <<<"$said" || die "what is shipped does not compile without a warning"
  built=$(target_dir)/debug
  scripts/release.sh check "$built/hsm-node"
  scripts/release.sh check "$built/hsmctl"
}

# The process tests start these binaries; nextest by itself would not build those of other packages. With the tests in one
# go, because features that only tests ask for would have all of our crates built a second time.
step_build() { cargo build --locked --workspace --bins --tests --features failpoints; }

# Of the binaries just built hsm-node contains failpoints: packaging has to refuse it. That it does not refuse everything is
# seen above.
step_release-guard() {
  local built said
  built=$(target_dir)/debug
  if said=$(scripts/release.sh check "$built/hsm-node" 2>&1); then
    echo "scripts/release.sh accepted a binary built with the feature failpoints" >&2
    return 1
  fi
  printf '%s\n' "$said"
  grep -q failpoints <<<"$said"
}

# Prints the processes that name folder $1 in their arguments, as nodes do with that of their configuration.
processes_in() {
  local file
  for file in /proc/[0-9]*/cmdline; do
    case $(tr '\0' ' ' 2>/dev/null <"$file") in
      *"$1"*) printf '%s\n' "${file%/cmdline}" ;;
    esac
  done
}

# It says that it cleans up after itself.
# The demonstration ends well only if every answer was right: with an hsmctl that decrypts to something else it fails.
# Neither time it leaves anything behind.
step_demo() {
  local folder bin left
  folder=$(mktemp -d "${TMPDIR:-/tmp}/hsm-demo-step.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  bin=$(cd "$(bin_dir)" && pwd)
  mkdir "$folder/good" "$folder/bad" "$folder/lying"
  TMPDIR=$folder/good scripts/demo.sh
  ln -s "$bin/hsm-node" "$folder/lying/hsm-node"
  cat >"$folder/lying/hsmctl" <<EOF
#!/bin/sh
[ "\$1" = decrypt ] || exec '$bin/hsmctl' "\$@"
'$bin/hsmctl' "\$@" >/dev/null && echo '{"plaintext": "c29tZXRoaW5nIGVsc2U="}'
EOF
  chmod 755 "$folder/lying/hsmctl"
  if TMPDIR=$folder/bad HSM_BIN_DIR=$folder/lying scripts/demo.sh >"$folder/said" 2>&1; then
    die "scripts/demo.sh has not noticed a wrong plaintext"
  fi
  grep -q 'to something else' "$folder/said" || die "scripts/demo.sh has failed otherwise: $(tail -n 3 "$folder/said")"
  echo "with wrong plaintexts: $(grep 'to something else' "$folder/said")"
  left=$(find "$folder/good" "$folder/bad" -mindepth 1)
  [ -z "$left" ] || die "scripts/demo.sh has left $left"
  left=$(processes_in "$folder")
  [ -z "$left" ] || die "scripts/demo.sh has left processes: $left"
}

# Prints the commands of the README's tour as they stand there, but for the cluster's folder, the ports and the binaries:
# those of this run. readme_tour BIN FOLDER PORT
readme_tour() {
  awk '/^## / { tour = ($0 == "## Five minutes with a cluster") } /^```/ { code = !code; next } tour && code' README.md |
    sed -e '/^make dev$/d' -e "s|\$PWD/target/debug|$1|" -e "s|\.dev/|$2/|g" -e "s|--dir \.dev |--dir $2 |" \
      -e "s|\b8443\b|$3|g" -e "s|\b8453\b|$(($3 + 10))|g" -e "s|\b8454\b|$(($3 + 11))|g" -e "s|\b8463\b|$(($3 + 20))|g"
}

# must_say COUNT TEXT FILE: so often, in as many lines.
must_say() {
  local count
  count=$(grep -cF -- "$2" "$3" || true)
  [ "$count" -eq "$1" ] || die "the README's tour says $2 in $count lines, not in $1"
}

# `make dev` without its build, and the README's tour.
step_dev() {
  local folder bin tour said
  folder=$(mktemp -d "${TMPDIR:-/tmp}/hsm-dev.XXXXXX")
  export HSM_DEV_DIR=$folder/dev HSM_DEV_PORT
  HSM_DEV_PORT=$(free_base_port 3)
  # Stops the nodes however this step ends. Expanded now: by then `folder` is gone.
  # shellcheck disable=SC2064
  trap "scripts/dev.sh clean >/dev/null 2>&1 && rm -rf '$folder'" EXIT
  scripts/dev.sh up
  bin=$(cd "$(bin_dir)" && pwd)
  tour=$folder/tour said=$folder/said
  readme_tour "$bin" "$HSM_DEV_DIR" "$HSM_DEV_PORT" >"$tour"
  ! grep -nE '(^|[[:space:]])\.dev\b|\b84[0-9]{2}\b' "$tour" || die "the README's tour has another folder or port than readme_tour knows"
  bash -euo pipefail "$tour" >"$said" || {
    cat "$said" "$tour"
    die "the README's tour failed"
  }
  cat "$said"
  grep -qx hello "$said" || die "what hsmctl encrypted on node 1 did not come out on node 3"
  # By curl: what was encrypted, on node 3, on node 2 after the rotation, and there with node 1 dead.
  must_say 3 '"plaintext":"aGVsbG8="' "$said"
  must_say 2 '"ciphertext":"' "$said"
  must_say 2 '"code":"access_denied"' "$said"
  "$bin/hsmctl" dev status --dir "$HSM_DEV_DIR"
  scripts/dev.sh clean
  [ ! -e "$HSM_DEV_DIR" ] || die "$HSM_DEV_DIR is still there after 'scripts/dev.sh clean'"
  [ -z "$(processes_in "$HSM_DEV_DIR")" ] || die "nodes still run after 'scripts/dev.sh clean'"
}

step_nextest() {
  # Seen in a namespace of its own, which leaves nothing behind: where it is permitted, the test of a full disk has to run.
  if unshare --mount mount -t tmpfs hsm-test /mnt 2>/dev/null; then
    export HSM_NEED_TMPFS=1
  fi
  cargo nextest run --locked --workspace --features failpoints --profile ci --no-tests=fail 2>&1 | tee "$nextest_log"
}

# What a short composed run tries: each kind once, nodes, lines, disks, clocks and tokens, what operators do, and a death at a
# line. `make chaos` has all of them, which takes twice as long. A test of chaos looks at what the seed makes of them.
chaos_faults=kill-leader,kill-all,pause,leader-in-minority,one-way,bridge,delay,loss,disk-full,slow-fsync,failing-fsync,lost-writes,torn-tail,clock-step,token-deleted,token-older,token-errors,join-remove,failpoint,transfer
# With this one the leader is stopped for longer than an election takes; all lose power at once, and one in the middle of a write;
# leaders die at a line of a join, of a removal that replaces keys too, and of a rotation.
chaos_seed=9721008
# Both together, in seconds, with all that follows a signal, and the selftest of these. What that does not take is left to the run;
# the last of it to heal and to judge what it has carried out, if it has to be told to stop.
chaos_limit=720 chaos_selftest_limit=540 chaos_judges=150

# Not one of all_steps: CI runs it after them, so that their last line comes when it always did. The oracles have to find every
# seeded bug and nothing without it; then a cluster is broken in many ways at once. In namespaces where that is permitted.
# On a machine that is too slow for all of it the run is told to stop. It passes if what it has carried out was judged to, and every
# kind had had its effect by then; it says how many, and .ci/run says it once more. A selftest that is not through shows nothing.
step_chaos() {
  local chaos begun left said had_effect planned status=0
  chaos=$(target_dir)/debug/chaos
  # With everything else that step `build` builds: alone it would have other features, and all would be built again.
  step_build
  begun=$SECONDS
  timeout --kill-after=30 $((chaos_selftest_limit - 30)) "$chaos" selftest
  left=$((chaos_limit - (SECONDS - begun))) said=$scratch/chaos
  # It alone is told: what its steps have started ends with them.
  timeout --foreground --preserve-status --kill-after="$chaos_judges" $((left - chaos_judges)) \
    "$chaos" run --seed "$chaos_seed" --minutes 1 --faults "$chaos_faults" | tee "$said" || status=$?
  if [ "$status" -eq 143 ] && grep -q '^verdict: pass' "$said"; then
    # A line for each kind that was begun: `pause: 1 of 1 had their effect`.
    had_effect=$(grep -cE '^[a-z-]+: [1-9][0-9]* of [0-9]+ had their effect' "$said" || true)
    planned=$(tr , '\n' <<<"$chaos_faults" | wc -l)
    echo "told to stop after $((left - chaos_judges)) s: this machine is slow; what was carried out until then is in order"
    echo "chaos: $had_effect of $planned kinds of faults"
    [ "$had_effect" -eq "$planned" ] || die "the others have not come, or had no effect: nothing is known of those"
    return 0
  fi
  return "$status"
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
  echo
  echo "wall time by step:"
  sed 's/^/  /' "$finished"
  printf '  %-14s %5d s\n' total "$SECONDS"
}

run_step() {
  local name=$1 begun=$SECONDS status
  declare -F "step_$name" >/dev/null || die "unknown step '$name': one of ${all_steps[*]} chaos"
  printf '\n==> %s\n' "$name"
  # A subshell of its own, not a condition: inside a condition bash ignores `set -e`.
  (
    set -e
    [ -z "$gives_way" ] || renice -n 19 -p "$BASHPID" >/dev/null
    "step_$name"
  ) </dev/null
  status=$?
  printf '%-14s %5d s\n' "$name" $((SECONDS - begun)) >>"$finished"
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

run_steps() {
  local name
  for name in "$@"; do
    run_step "$name"
  done
}

# What runs beside the steps; its output is shown once it has ended.
beside=""

# Whoever ends before waits too: what runs beside cleans up after itself.
wait_beside() {
  local process=$beside
  [ -n "$process" ] || return 0
  beside=""
  wait "$process"
}

run_all() {
  local status
  run_steps "${first[@]}"
  (
    trap - EXIT
    run_steps "${that_wait[@]}"
  ) >"$scratch/beside" 2>&1 &
  beside=$!
  gives_way=yes
  run_steps "${meanwhile[@]}"
  gives_way=""
  wait_beside
  status=$?
  cat "$scratch/beside"
  [ "$status" -eq 0 ] || exit "$status"
  run_steps "${last[@]}"
}

scratch=$(mktemp -d) || exit 1
trap 'wait_beside; rm -rf "$scratch"' EXIT
nextest_log=$scratch/nextest finished=$scratch/finished
: >"$finished"

steps=("$@")
if [ ${#steps[@]} -gt 0 ]; then
  run_steps "${steps[@]}"
else
  steps=("${all_steps[@]}")
  run_all
fi
summarise
case " ${steps[*]} " in
  *" nextest "*)
    echo
    closing_line "$nextest_log" || die "nextest printed no summary"
    ;;
esac
