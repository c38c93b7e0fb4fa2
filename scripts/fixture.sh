#!/usr/bin/env bash
# Keeps what this release writes, for the tests of all later ones: a stopped node with its data, its tokens and their PINs,
# and what it said of them. All of it is made here and for tests only; nothing in it is anybody's secret.
#
#   scripts/fixture.sh NAME       writes cluster-tests/fixtures/NAME/{playground.tar.gz,expected.json}
#
# Run it once for each release, from a build without local changes, and never again for the same name: a fixture that is
# made anew shows nothing. cluster-tests/tests/cluster/previous_release.rs opens all of them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# Its addresses stand in its state. Of the blocks of ports (cluster-tests/src/ports.rs) it is one that no other test is given.
port=31000
profile=""

name=${1:-}
[[ $name =~ ^[a-z0-9][a-z0-9.-]*$ ]] || die "usage: scripts/fixture.sh NAME, such as the release's"
kept=cluster-tests/fixtures/$name
[ ! -e "$kept" ] || die "$kept is there already: what an older release wrote is not made anew"
for at in 0 1 2; do
  port_is_free $((port + at)) || die "port $((port + at)) is taken: stop what listens there"
done
bin=$(cd "$(bin_dir)" 2>/dev/null && pwd) || die "no folder $(bin_dir): run 'make build' first"
hsmctl=$bin/hsmctl
[ -x "$hsmctl" ] || die "hsmctl is not in $bin: run 'make build' first"

folder=$(mktemp -d "${TMPDIR:-/tmp}/hsm-fixture.XXXXXX")
root=$folder/playground
trap '"$hsmctl" dev down --now --dir "$root" >/dev/null 2>&1; rm -rf "$folder"' EXIT

# ask ARGS…: hsmctl against the node, as $profile or the administrator.
ask() {
  HSMCTL_PROFILE=${profile:-admin} "$hsmctl" --no-input "$@" -o json
}

"$hsmctl" dev up --dir "$root" --nodes 1 --base-port "$port" --prepare-only >/dev/null
# A short log, so that there is a snapshot with entries after it; and a destruction that comes to its end.
config=$root/node1/config.yaml
sed -i -e 's/^  coordination:.*/&\n  raft: {snapshot_every: 20, keep_logs: 10}/' \
  -e 's/^logging:.*/keys: {destroy: {min_wait_seconds: 1}}\n&/' "$config"
grep -q 'snapshot_every: 20' "$config" && grep -q 'min_wait_seconds: 1' "$config" || die "the playground's configuration has changed"
"$hsmctl" dev up --dir "$root" >/dev/null
# shellcheck disable=SC1091
. "$root/env"

sealed=$folder/sealed
# seal PROFILE CONTEXT PLAINTEXT [AAD]: encrypts, and notes what came of it.
seal() {
  local aad=()
  if [ -n "${4:-}" ]; then
    printf '%s' "$4" >"$folder/aad"
    aad=(--aad-file "$folder/aad")
  fi
  [ ! -s "$sealed" ] || printf ',\n' >>"$sealed"
  printf '{"profile": "%s", "context": "%s", "plaintext": "%s", "aad": "%s", "sealed": ' "$1" "$2" "$3" "${4:-}" >>"$sealed"
  printf '%s' "$3" | profile=$1 ask encrypt --context "$2" "${aad[@]}" >>"$sealed"
  printf '}' >>"$sealed"
}

# until_state CONTEXT/vN STATE
until_state() {
  local _
  for _ in $(seq 1 300); do
    [ "$(ask key show "$1" | json_member state)" != "$2" ] || return 0
    sleep 0.1
  done
  die "$1 does not become $2: $(ask key show "$1")"
}

# Version 1 is destroyed, 2 waits for its destruction, 3 is disabled, 4 only decrypts, 5 is active.
for version in 1 2 3 4 5; do
  seal trading-1 exchange-key "exchange $version"
  [ "$version" = 5 ] || ask rotate exchange-key >/dev/null
done
seal trading-1 exchange-key "with associated data" "invoice 7"
seal 2fa-1 2fa "private 1"
ask rotate 2fa >/dev/null
seal 2fa-1 2fa "private 2"
ask key destroy exchange-key/v1 --wait 1s --override --confirm exchange-key/v1 >/dev/null
ask key destroy exchange-key/v2 --wait 8760h --override --confirm exchange-key/v2 >/dev/null
ask key disable exchange-key/v3 >/dev/null
ask revoke --cn trading-2 --reason "kept in the fixture" >/dev/null
until_state exchange-key/v1 destroyed
# Entries after the last snapshot, and one snapshot at least.
for _ in $(seq 1 12); do
  ask revoke --cn nobody-at-all --reason "an entry" >/dev/null
  ask unrevoke --cn nobody-at-all >/dev/null 2>&1
done

expected=$folder/expected.json
{
  printf '{"format": 1, "root": "%s", "base_port": %s,\n"sealed": [\n' "$root" "$port"
  cat "$sealed"
  printf '\n],\n"status": %s,\n' "$(ask cluster status)"
  printf '"keks": %s,\n' "$(ask list-kek)"
  printf '"acl": %s,\n' "$(ask acl get)"
  printf '"revocations": %s\n}\n' "$(ask revocations)"
} >"$expected"
"$hsmctl" dev down --dir "$root" >/dev/null
rm -f "$root/node1/log" "$root/node1/pid"
[ -n "$(find "$root/node1/data" -name '*snap*')" ] || die "no snapshot was made: $(ls -R "$root/node1/data")"

mkdir -p "$kept"
cp "$expected" "$kept/expected.json"
tar -C "$folder" --owner=0 --group=0 --numeric-owner --sort=name -cf - playground | gzip -9n >"$kept/playground.tar.gz"
du -b "$kept"/*
