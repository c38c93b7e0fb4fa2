#!/usr/bin/env bash
# A cluster to play with: `dev.sh up` starts it (again, with its data, if it was there before) and says what to try,
# `dev.sh down` stops it and keeps its data, `dev.sh clean` stops it and removes everything.
#
# HSM_DEV_DIR is its folder (.dev), HSM_DEV_NODES how many nodes a new one gets (3), HSM_DEV_PORT its base port (8443).
# One that is there already is brought back as it is, where they are not set.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

dir=${HSM_DEV_DIR:-.dev}
bin=$(cd "$(bin_dir)" 2>/dev/null && pwd) || bin=""

need_hsmctl() {
  [ -n "$bin" ] || die "no folder $(bin_dir): run 'make build' first"
  [ -x "$bin/hsmctl" ] || die "hsmctl is not in $bin: run 'make build' first"
}

what_to_try() {
  local ports port
  # As the cluster is, whatever it was made with.
  ports=$("$bin/hsmctl" dev status --dir "$dir" -o json |
    sed -n 's|.*"api": *"https://127\.0\.0\.1:\([0-9]*\)".*|\1|p')
  port=${ports%%$'\n'*}
  cat <<EOF

$(grep -c . <<<"$ports") nodes run. Their API listens on 127.0.0.1, ports ${ports//$'\n'/, };
health and metrics one port above each, logs in $dir/node1/log and so on.

In a shell, from this folder:

  . $dir/env
  export PATH="$bin:\$PATH"

  hsmctl cluster status                                        # who leads, what is applied
  hsmctl cluster members
  hsmctl list-kek

  export HSMCTL_PROFILE=trading-1                              # act as an application
  printf 'hello' | hsmctl encrypt --context exchange-key -o json
  unset HSMCTL_PROFILE                                         # the administrator again

  hsmctl rotate exchange-key
  hsmctl rotation-status

  curl --cacert $dir/pki/ca.crt --cert $dir/pki/clients/trading-1.crt --key $dir/pki/clients/trading-1.key \\
    https://127.0.0.1:$port/encrypt -d '{"context":"exchange-key","plaintext":"aGVsbG8="}'
  curl 'http://127.0.0.1:$((port + 1))/readyz?verbose'

  hsmctl dev kill --dir $dir --node 1                          # and watch another node take over
  hsmctl dev start --dir $dir --node 1

Stop it with: make dev-down   (its data stays; 'make dev' brings it back, 'scripts/dev.sh clean' removes it)
EOF
}

# Succeeds for a folder that dev up made: it says so in playground.json, and one that could not be made yet holds nothing
# but a lock. Nothing else is ever removed.
is_playground() {
  [ -f "$dir/playground.json" ] ||
    [ -z "$(find "$dir" -mindepth 1 -maxdepth 1 ! -name lock ! -name .playground.json.partial)" ]
}

# start_time PID: field 22 of /proc/PID/stat, nothing if no such process lives. The program's name before it may hold
# anything.
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  # shellcheck disable=SC2086
  set -- ${stat##*) }
  [ "$1" = Z ] || printf '%s\n' "${20:-}"
}

# Kills the nodes of the folder without hsmctl, when what was built is gone. A pid file holds pid, start time and boot: a pid
# that came again is somebody else's.
kill_nodes() {
  local file pid started boot
  for file in "$dir"/node*/pid; do
    [ -f "$file" ] || continue
    read -r pid started boot <"$file" || continue
    [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] || continue
    [ "$(start_time "$pid")" = "$started" ] || continue
    kill -KILL "$pid" 2>/dev/null || true
    for _ in $(seq 1 100); do
      [ "$(start_time "$pid")" = "$started" ] || break
      sleep 0.1
    done
  done
}

case "${1:-}" in
  up)
    need_hsmctl
    options=()
    [ -z "${HSM_DEV_NODES:-}" ] || options+=(--nodes "$HSM_DEV_NODES")
    [ -z "${HSM_DEV_PORT:-}" ] || options+=(--base-port "$HSM_DEV_PORT")
    "$bin/hsmctl" dev up --dir "$dir" "${options[@]}"
    what_to_try
    ;;
  down)
    need_hsmctl
    [ -d "$dir" ] || die "nothing to stop: no folder $dir"
    "$bin/hsmctl" dev down --dir "$dir"
    ;;
  clean)
    if [ -d "$dir" ]; then
      is_playground || die "$dir is no playground (no playground.json): not removed"
      if [ ! -f "$dir/playground.json" ]; then
        : # Nothing was ever started in it.
      elif [ -x "$bin/hsmctl" ]; then
        "$bin/hsmctl" dev down --dir "$dir"
      else
        kill_nodes
      fi
      rm -rf "$dir"
    fi
    ;;
  *) die "usage: scripts/dev.sh up | down | clean" ;;
esac
