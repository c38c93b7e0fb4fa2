#!/usr/bin/env bash
# Asks a playground of its own for whatever docs/openapi.json describes, and for what it does not allow, as an application,
# as the administrator, and without a certificate where none is needed. Fails if a node answers 5xx other than a 503, or something that the document does not have.
#
# It takes three minutes at most, besides the time to install schemathesis from PyPI, which it does once. Every run asks for
# other things: it is no part of `make test`.
#
#   SEED=N scripts/fuzz-api.sh           the run that began with 'seed N' again
#   HSM_FUZZ_SECONDS=90 …                shorter or longer
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# One that the document is known to work with.
schemathesis='schemathesis==4.32.5'
nodes=3
seed=${SEED:-$((RANDOM * 32768 + RANDOM))}
whole_limit=${HSM_FUZZ_SECONDS:-180}
# No single call of hsmctl may hang the run.
call_limit=60
document=$PWD/docs/openapi.json
checks=not_a_server_error,status_code_conformance,content_type_conformance
checks+=,response_headers_conformance,response_schema_conformance

bin=$(cd "$(bin_dir)" 2>/dev/null && pwd) || die "no folder $(bin_dir): run 'make build' first"
for program in hsmctl hsm-node; do
  [ -x "$bin/$program" ] || die "$program is not in $bin: run 'make build' first"
done
case $whole_limit in
  '' | *[!0-9]*) die "HSM_FUZZ_SECONDS=$whole_limit: write a number of seconds, 90 or more" ;;
esac
[ "$whole_limit" -ge 90 ] || die "HSM_FUZZ_SECONDS=$whole_limit: a playground and four runs take 90 or more"
have curl || die "curl is missing: run 'make setup' first"

# Leaves the folder of schemathesis in `venv`.
install_schemathesis() {
  venv=$(target_dir)/schemathesis
  if [ -x "$venv/bin/st" ] && [ "$(cat "$venv/installed" 2>/dev/null)" = "$schemathesis" ]; then
    return 0
  fi
  if ! python3 -c 'import ensurepip, venv' >/dev/null 2>&1; then
    have apt-get || die "python3 with the modules venv and ensurepip is missing: install it, then start again"
    echo "installing Debian packages: python3-venv"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv
  fi
  echo "installing $schemathesis into $venv"
  rm -rf "$venv"
  mkdir -p "${venv%/*}"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "$schemathesis"
  printf '%s\n' "$schemathesis" >"$venv/installed"
}
install_schemathesis
venv=$(cd "$venv" && pwd)

scratch=$(mktemp -d "${TMPDIR:-/tmp}/hsm-fuzz.XXXXXX")
dir=$scratch/playground
done_all=no
began=$SECONDS
# The run that is under way: in the background, where a signal to this script need not wait for it.
asking=""

hsmctl() { timeout --kill-after=5 "$call_limit" "$bin/hsmctl" "$@"; }

clean_up() {
  local status=$? node
  trap - EXIT INT TERM
  if [ -n "$asking" ]; then
    kill "$asking" 2>/dev/null || true
    wait "$asking" 2>/dev/null || true
  fi
  if [ -d "$dir" ]; then
    if [ "$done_all" != yes ]; then
      for node in $(seq 1 "$nodes"); do
        [ -f "$dir/node$node/log" ] || continue
        printf -- '--- errors and last lines of node %s\n' "$node" >&2
        { grep -E 'panicked|"level":"ERROR"' "$dir/node$node/log" || true; } | tail -n 20 >&2
        tail -n 5 "$dir/node$node/log" >&2
      done
    fi
    hsmctl dev down --dir "$dir" >/dev/null 2>&1 || printf 'fuzz-api: dev down failed\n' >&2
  fi
  rm -rf "$scratch"
  if [ "$done_all" != yes ]; then
    printf 'fuzz-api: FAILED; the same again: SEED=%s make fuzz-api\n' "$seed" >&2
    [ "$status" -ne 0 ] || status=1
  fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wrong() {
  printf 'fuzz-api: %s\n' "$*" >&2
  exit 1
}

endpoint() { printf 'https://127.0.0.1:%d\n' $((base + 10 * ($1 - 1))); }
health_endpoint() { printf 'http://127.0.0.1:%d\n' $((base + 10 * ($1 - 1) + 1)); }

# ciphertext_of PATH BODY: what node 1 seals for the application.
ciphertext_of() {
  local answer pki=$dir/pki
  answer=$(curl --silent --show-error --max-time 10 --cacert "$pki/ca.crt" --cert "$pki/clients/trading-1.crt" \
    --key "$pki/clients/trading-1.key" "$(endpoint 1)$1" -d "$2") || wrong "$1 was not answered"
  answer=$(json_member ciphertext <<<"$answer")
  [ -n "$answer" ] || wrong "$1 answered no ciphertext"
  printf '%s\n' "$answer"
}

# What there is, so that not every request is about nothing. A 503 is an answer: of a slot that does not serve, a queue
# that is full, a leader that moves.
configure() {
  local data key
  data=$(ciphertext_of /encrypt '{"context":"exchange-key","plaintext":"aGVsbG8="}')
  key=$(ciphertext_of /datakey '{"context":"exchange-key"}')
  cat >"$scratch/schemathesis.toml" <<TOML
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]

[dictionaries.contexts]
values = ["exchange-key", "order-key", "2fa"]

[dictionaries.versions]
values = [1, 2, 3]

[dictionaries.slots]
values = ["exchange", "2fa"]

[dictionaries.ciphertexts]
values = ["$data", "$key"]

[dictionaries.indexes]
values = ["1.0", "1.1"]

[parameters]
"header.X-HSM-Min-Index" = { dictionary = "indexes", probability = 0.8 }
"path.context" = { dictionary = "contexts", probability = 0.7 }
"path.version" = { dictionary = "versions", probability = 0.7 }
"path.slot" = { dictionary = "slots", probability = 0.7 }
"query.context" = { dictionary = "contexts", probability = 0.7 }
"body.context" = { dictionary = "contexts", probability = 0.7 }
"body.ciphertext" = { dictionary = "ciphertexts", probability = 0.7 }
"body.batch[*].context" = { dictionary = "contexts", probability = 0.7 }
"body.batch[*].ciphertext" = { dictionary = "ciphertexts", probability = 0.7 }
TOML
}

# ask WHO URL SECONDS OPTION...: one run of schemathesis, against one listener of one node.
ask() {
  local who=$1 url=$2 seconds=$3 status=0
  shift 3
  printf '==> %s, asking %s, for %s s\n' "$who" "$url" "$seconds"
  # From the scratch folder: hypothesis keeps a database where it runs.
  (
    cd "$scratch"
    exec timeout --kill-after=5 $((seconds + 10)) "$venv/bin/st" --config-file schemathesis.toml --no-color run "$document" \
      --url "$url" --checks "$checks" --seed "$seed" --max-time "$seconds" --workers 2 --request-timeout 30 \
      --generation-database none --warnings off "$@"
  ) &
  asking=$!
  wait "$asking" || status=$?
  asking=""
  case $status in
    0) ;;
    124 | 137) wrong "schemathesis did not end in time" ;;
    *) wrong "$who: schemathesis found something (exit status $status)" ;;
  esac
}

# fuzz CLIENT NODE SECONDS [OPTION...]: asks NODE's API with the certificate of CLIENT. What changes the membership is left
# out, and so is what another listener answers: --url goes before the servers that a path has of its own.
fuzz() {
  local client=$1 node=$2 seconds=$3
  shift 3
  ask "as $client" "$(endpoint "$node")" "$seconds" --tls-verify "$dir/pki/ca.crt" \
    --request-cert "$dir/pki/clients/$client.crt" --request-cert-key "$dir/pki/clients/$client.key" \
    --exclude-operation-id cluster_init --exclude-operation-id join \
    --exclude-operation-id livez --exclude-operation-id readyz "$@"
}

# probe NODE SECONDS: asks NODE's health listener, without a certificate, for what it alone answers.
probe() {
  ask "without a certificate" "$(health_endpoint "$1")" "$2" --include-operation-id livez --include-operation-id readyz
}

all_ready() {
  [ "$(hsmctl dev status --dir "$dir" -o json | grep -cE '"ready": *true')" -eq "$nodes" ]
}

base=$(free_base_port "$nodes")
printf 'seed %s: a playground of %s nodes, on ports from %s\n' "$seed" "$nodes" "$base"
hsmctl dev up --dir "$dir" --nodes "$nodes" --base-port "$base" >"$scratch/up.log" 2>&1 || {
  cat "$scratch/up.log" >&2
  wrong "the playground did not come up"
}

configure
# The administrator last: he may change what the application may do. Each run may take 10 s more than it is told.
probing=10
rest=$((whole_limit - (SECONDS - began) - 50 - probing))
probe 1 "$probing"
fuzz trading-1 1 $((rest / 4))
fuzz trading-1 3 $((rest / 4)) --include-tag data
fuzz admin 2 $((rest - rest / 4 * 2))

for node in $(seq 1 "$nodes"); do
  ! grep -q panicked "$dir/node$node/log" || wrong "node $node has panicked"
done
deadline=$((SECONDS + 10))
until all_ready; do
  [ "$SECONDS" -lt "$deadline" ] || wrong "not every node is ready after it"
  sleep 0.2
done
done_all=yes
printf 'no answer that should not be (%d s)\n' $((SECONDS - began))
