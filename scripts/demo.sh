#!/usr/bin/env bash
# The main job, end to end, on a cluster of three real nodes on this machine: encrypt, rotate, lose the leader, go on.
# One line a step. Exits 0 only if every answer was right, and leaves nothing behind.
#
# It uses hsmctl and the shell's own tools only. Build first (`make demo` does), or name other binaries with HSM_BIN_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

nodes=3
context=exchange-key
text='the main job, end to end'
# No single call may hang the demonstration.
call_limit=60
# Once built, in seconds; what takes longer is not what is promised.
whole_limit=60

bin=$(cd "$(bin_dir)" 2>/dev/null && pwd) || die "no folder $(bin_dir): run 'make build' first"
for program in hsmctl hsm-node; do
  [ -x "$bin/$program" ] || die "$program is not in $bin: run 'make build' first"
done

scratch=$(mktemp -d "${TMPDIR:-/tmp}/hsm-demo.XXXXXX")
dir=$scratch/playground
done_all=no

hsmctl() { timeout --kill-after=5 "$call_limit" "$bin/hsmctl" "$@"; }

clean_up() {
  local status=$? node
  trap - EXIT INT TERM
  if [ -d "$dir" ]; then
    if [ "$done_all" != yes ]; then
      for node in $(seq 1 "$nodes"); do
        [ -f "$dir/node$node/log" ] || continue
        printf -- '--- last lines of node %s\n' "$node" >&2
        tail -n 15 "$dir/node$node/log" >&2
      done
    fi
    hsmctl dev down --dir "$dir" >/dev/null 2>&1 || printf 'demo: dev down failed\n' >&2
  fi
  rm -rf "$scratch"
  if [ "$done_all" != yes ]; then
    printf 'demo: FAILED in step %s\n' "$step_number" >&2
    [ "$status" -ne 0 ] || status=1
  fi
  exit "$status"
}
step_number=0
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() {
  step_number=$((step_number + 1))
  printf '%2d  [%2d s] %s\n' "$step_number" "$SECONDS" "$*"
}

wrong() {
  printf 'demo: %s\n' "$*" >&2
  exit 1
}

endpoint() { printf 'https://127.0.0.1:%d\n' $((base + 10 * ($1 - 1))); }

# encrypt_on NODE: prints the whole JSON answer.
encrypt_on() {
  printf '%s' "$text" | HSMCTL_PROFILE=trading-1 hsmctl encrypt --context "$context" --endpoint "$(endpoint "$1")" -o json
}

# must_decrypt NODE CIPHERTEXT WHAT: the plaintext that comes back has to be the one that went in.
must_decrypt() {
  local answer got
  answer=$(printf '%s' "$2" | HSMCTL_PROFILE=trading-1 hsmctl decrypt --context "$context" --endpoint "$(endpoint "$1")" -o json) ||
    wrong "node $1 did not decrypt $3"
  got=$(json_member plaintext <<<"$answer" | base64 -d)
  [ "$got" = "$text" ] || wrong "node $1 decrypted $3 to something else"
}

# must_be_version ANSWER VERSION
must_be_version() {
  local got
  got=$(json_member key_version <<<"$1")
  [ "$got" = "$2" ] || wrong "encrypted under version '$got' where $2 was expected"
}

# encrypts_under NODE VERSION: leaves the answer in `answer`. A follower hears of a new version a moment after it is
# active, and encrypts under the one before until then; anything else is wrong.
encrypts_under() {
  local got
  answer=$(encrypt_on "$1") || wrong "node $1 did not encrypt"
  got=$(json_member key_version <<<"$answer")
  case "$got" in
    "$2") return 0 ;;
    $(($2 - 1))) return 1 ;;
    *) wrong "node $1 encrypted under version '$got' where $2 was expected" ;;
  esac
}

ciphertext_of() {
  local got
  got=$(json_member ciphertext <<<"$1")
  [ -n "$got" ] || wrong "an answer without a ciphertext: $1"
  printf '%s\n' "$got"
}

# leader_seen_by NODE: the number of the node that NODE takes for the leader; nothing when it knows none.
leader_seen_by() {
  { hsmctl cluster status --endpoint "$(endpoint "$1")" -o json 2>/dev/null || true; } |
    json_object leader | json_member node_id | grep -oE '[0-9]+$' || true
}

# wait_until SECONDS WHAT COMMAND...: a condition with a deadline.
wait_until() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || wrong "gave up waiting: $what"
    sleep 0.2
  done
}

has_new_leader() {
  leader=$(leader_seen_by "$survivor")
  [ -n "$leader" ] && [ "$leader" != "$killed" ]
}

is_ready() {
  [ "$(hsmctl cluster status --endpoint "$(endpoint "$1")" -o json 2>/dev/null | json_member ready || true)" = true ]
}

base=$(free_base_port "$nodes")

step "start a cluster of $nodes nodes, each with its own SoftHSM tokens, on ports from $base"
hsmctl dev up --dir "$dir" --nodes "$nodes" --base-port "$base" >"$scratch/up.log" 2>&1 || {
  cat "$scratch/up.log" >&2
  wrong "the cluster did not come up"
}
set -a
# shellcheck source=/dev/null
. "$dir/env"
set +a

step "encrypt on node 1"
answer=$(encrypt_on 1)
version=$(json_member key_version <<<"$answer")
old=$(ciphertext_of "$answer")
printf '            key version %s, ciphertext %s...\n' "$version" "${old:0:40}"

step "decrypt on node 3, from its own token"
must_decrypt 3 "$old" "what node 1 encrypted"

step "rotate $context: every node imports and proves the new key before it is used"
hsmctl rotate "$context" --endpoint "$(endpoint 2)" >/dev/null || wrong "rotate failed"
version=$((version + 1))

for node in $(seq 1 "$nodes"); do
  step "node $node: decrypt the old ciphertext, encrypt under version $version, decrypt that on every node"
  must_decrypt "$node" "$old" "the ciphertext of version $((version - 1))"
  wait_until 5 "node $node does not encrypt under version $version" encrypts_under "$node" "$version"
  new=$(ciphertext_of "$answer")
  for other in $(seq 1 "$nodes"); do
    must_decrypt "$other" "$new" "what node $node encrypted under version $version"
  done
done

killed=$(leader_seen_by 1)
[ -n "$killed" ] || wrong "node 1 knows no leader"
survivor=$((killed % nodes + 1))
other=$((survivor % nodes + 1))

step "kill -9 of node $killed, the leader"
hsmctl dev kill --dir "$dir" --node "$killed" --signal KILL >/dev/null || wrong "the leader could not be killed"

step "encrypt on node $survivor and decrypt on node $other, at once: neither needs a leader"
answer=$(encrypt_on "$survivor")
must_be_version "$answer" "$version"
must_decrypt "$other" "$(ciphertext_of "$answer")" "what node $survivor encrypted without a leader"
must_decrypt "$survivor" "$old" "the oldest ciphertext"

leader=""
wait_until 15 "no new leader among the survivors" has_new_leader
step "node $leader leads now; rotate again under it"
hsmctl rotate "$context" --endpoint "$(endpoint "$survivor")" >/dev/null || wrong "rotate under the new leader failed"
version=$((version + 1))
wait_until 5 "node $other does not encrypt under version $version" encrypts_under "$other" "$version"
newest=$(ciphertext_of "$answer")
must_decrypt "$survivor" "$newest" "the ciphertext of version $version"

step "restart node $killed; it imports the key it missed before it serves"
hsmctl dev start --dir "$dir" --node "$killed" >/dev/null || wrong "node $killed did not start"
wait_until 30 "node $killed did not become ready" is_ready "$killed"

step "decrypt on node $killed: the ciphertexts of all three versions"
must_decrypt "$killed" "$old" "the oldest ciphertext"
must_decrypt "$killed" "$new" "the ciphertext of version $((version - 1))"
must_decrypt "$killed" "$newest" "the ciphertext of version $version, made while it was down"

step "stop the cluster and remove its folder"
hsmctl dev down --dir "$dir" >/dev/null || wrong "dev down failed"
rm -rf "$dir"
[ "$SECONDS" -le "$whole_limit" ] || wrong "every answer was right, but it took $SECONDS s and may take $whole_limit"
done_all=yes
printf 'every answer was right (%d s)\n' "$SECONDS"
