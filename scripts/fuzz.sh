#!/usr/bin/env bash
# Lets libFuzzer look for bytes for which the property of a parser does not hold: docs/testing.md says what these are.
# Runs every target of fuzz/corpus for a while, one after the other, and fails if one was broken.
#
#   scripts/fuzz.sh                     every target
#   scripts/fuzz.sh config envelope     only these
#   FUZZ_SECONDS=600 …                  each for longer than 60 s
#
# What it learns stays in target/fuzz/learned, and is where the next run begins. What breaks a parser is kept in
# target/fuzz/crashes; put it into fuzz/corpus/TARGET/crash-…, so that `make test` looks at it every time.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

seconds=${FUZZ_SECONDS:-60}
case $seconds in
  '' | 0 | *[!0-9]*) die "FUZZ_SECONDS=$seconds: write a number of seconds" ;;
esac
have cargo || die "cargo is not on the PATH: install Rust first (the version is rust-version in Cargo.toml)"
if ! have c++; then
  have apt-get || die "a C++ compiler is missing: install it, then start again"
  echo "installing Debian packages: g++"
  as_root apt-get update -q
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends g++
fi

targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(ls fuzz/corpus)
for target in "${targets[@]}"; do
  [ -d "fuzz/corpus/$target" ] || die "there is no target '$target': $(cd fuzz/corpus && echo *)"
done

work=$(target_dir)/fuzz
mkdir -p "$work"
work=$(cd "$work" && pwd)

# What cargo-fuzz passes for `--sanitizer none`: the stable compiler takes it. Without `--cfg fuzzing`, which changes what
# some libraries do: what is fuzzed is what runs. Not for build scripts and macros, hence the --target.
flags=(
  -Cpasses=sancov-module
  -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares
)
host=$(rustc -vV | sed -n 's/^host: //p')
# The versions of the project; cargo adds libFuzzer to them.
cp Cargo.lock fuzz/libfuzzer/Cargo.lock
RUSTFLAGS="${flags[*]}" CARGO_TARGET_DIR="$work/build" cargo build --quiet --release --target "$host" \
  --manifest-path fuzz/libfuzzer/Cargo.toml
fuzzer=$work/build/$host/release/hsm-libfuzzer

# A length that is believed asks for gigabytes: then there are none, and that is found.
ulimit -v $((2 * 1024 * 1024))
broken=()
for target in "${targets[@]}"; do
  learned=$work/learned/$target
  crashes=$work/crashes/$target
  mkdir -p "$learned" "$crashes"
  printf '==> %s: %s s\n' "$target" "$seconds"
  if ! FUZZ_TARGET=$target "$fuzzer" -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=1024 \
    -verbosity=0 -print_final_stats=1 -artifact_prefix="$crashes/" "$learned" "fuzz/corpus/$target" \
    >"$work/$target.log" 2>&1; then
    tail -n 40 "$work/$target.log"
    broken+=("$target")
  fi
  sed -n 's/^stat::number_of_executed_units: */    inputs: /p' "$work/$target.log"
done

[ ${#broken[@]} -gt 0 ] || exit 0
echo
for target in "${broken[@]}"; do
  for file in "$work/crashes/$target"/*; do
    [ -e "$file" ] || continue
    printf 'broken: %s; the same again: FUZZ_TARGET=%s %s %s\n' "$target" "$target" "$fuzzer" "$file"
  done
done
die "${#broken[@]} of ${#targets[@]} targets were broken: ${broken[*]}"
