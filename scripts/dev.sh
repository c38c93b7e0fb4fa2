#!/usr/bin/env bash
# A cluster to play with: `dev.sh up` starts it (again, with its data, if it was there before) and says what to try,
# `dev.sh down` stops it and keeps its data, `dev.sh clean` stops it and removes everything.
#
# HSM_DEV_DIR is its folder (.dev), HSM_DEV_NODES how many nodes a new one gets (3), HSM_DEV_PORT its base port (8443).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

dir=${HSM_DEV_DIR:-.dev}
nodes=${HSM_DEV_NODES:-3}
port=${HSM_DEV_PORT:-8443}

bin=$(cd "$(bin_dir)" 2>/dev/null && pwd) || die "no folder $(bin_dir): run 'make build' first"
[ -x "$bin/hsmctl" ] || die "hsmctl is not in $bin: run 'make build' first"

what_to_try() {
  cat <<EOF

$nodes nodes run. Their API listens on 127.0.0.1, ports $port, $((port + 10)), $((port + 20)) and so on;
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

case "${1:-}" in
  up)
    "$bin/hsmctl" dev up --dir "$dir" --nodes "$nodes" --base-port "$port"
    what_to_try
    ;;
  down)
    [ -d "$dir" ] || die "nothing to stop: no folder $dir"
    "$bin/hsmctl" dev down --dir "$dir"
    ;;
  clean)
    if [ -d "$dir" ]; then
      # Only a folder that dev up made is ever removed.
      if [ ! -f "$dir/env" ] || [ ! -d "$dir/pki" ]; then
        die "$dir does not look like a playground (no env, no pki): not removed"
      fi
      "$bin/hsmctl" dev down --dir "$dir"
      rm -rf "$dir"
    fi
    ;;
  *) die "usage: scripts/dev.sh up | down | clean" ;;
esac
