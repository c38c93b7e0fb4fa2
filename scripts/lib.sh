# Helpers shared by the scripts of this folder. Sourced, never run: it defines functions and changes nothing.
# shellcheck shell=bash

# Where cargo puts what it builds; CARGO_TARGET_DIR is respected, relative paths are taken from the top of the project.
target_dir() {
  printf '%s\n' "${CARGO_TARGET_DIR:-target}"
}

# The folder of the binaries that the playground runs. HSM_BIN_DIR names another build, a release for example.
bin_dir() {
  printf '%s\n' "${HSM_BIN_DIR:-$(target_dir)/debug}"
}

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

have() {
  command -v "$1" >/dev/null 2>&1
}

# Runs a command as root: directly where we are root, else through sudo, else it says what is missing.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif have sudo; then
    sudo "$@"
  else
    die "root is needed for '$*', and sudo is not installed: run it as root, then start again"
  fi
}

# Succeeds when nothing on this machine listens on 127.0.0.1:$1.
port_is_free() {
  ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Prints a base port such that the three ports of each of $1 nodes (base + 10 (i - 1), + 1, + 2) are free.
# It stays below 32768, where the kernel takes the ports of outgoing connections from.
free_base_port() {
  local nodes=$1 try base node offset
  for try in $(seq 1 50); do
    base=$((20000 + (RANDOM % 1200) * 10))
    for node in $(seq 0 $((nodes - 1))); do
      for offset in 0 1 2; do
        port_is_free $((base + 10 * node + offset)) || continue 3
      done
    done
    printf '%s\n' "$base"
    return 0
  done
  die "no free range of ports after $try tries: is something listening on all of 20000 to 32000?"
}

# Prints the value of the last member named $1 in the JSON on standard input: a string without its quotes, or a number
# or word. Enough for our own answers, whose strings never hold a quote; not a JSON parser.
json_member() {
  tr -d '\n' | sed -n 's/.*"'"$1"'"[[:space:]]*:[[:space:]]*"\{0,1\}\([^",}]*\).*/\1/p' | sed 's/[[:space:]]*$//'
}

# Prints the object that is the member named $1 in the JSON on standard input; nothing when it is null or absent.
json_object() {
  tr -d '\n' | sed -n 's/.*"'"$1"'"[[:space:]]*:[[:space:]]*\({[^{}]*}\).*/\1/p'
}

# Prints the commit that is built here, with -dirty behind it if anything but what recorded runs write was changed or is new; nothing
# outside a repository.
built_commit() {
  local head changed
  head=$(git rev-parse --short=7 HEAD 2>/dev/null) || return 0
  changed=$(git status --porcelain -- ':(top)' ':(top,exclude)docs/chaos-record.json' ':(top,exclude)docs/reliability.md') || return 0
  printf '%s\n' "$head${changed:+-dirty}"
}
