#!/usr/bin/env bash
# Packs a release: optimised binaries, documents, example configurations, checksums.
#
#   scripts/release.sh                 build and pack into target/package/
#   scripts/release.sh check BINARY    only check that BINARY may be released
#
# A binary built with the feature `failpoints` can be made to stop anywhere by whoever reaches its health listener.
# It must never leave a development machine, so such a binary is refused, whoever built it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# Text that is in hsm-node only when the feature is on: the route of the health listener.
failpoint_marker=/failpoints

# Fails, naming the reason, when a binary must not be released. Two witnesses that do not depend on each other:
# what the binary says about itself, and what is in it.
check_binary() {
  local binary=$1 said
  [ -x "$binary" ] || die "$binary: no such program"
  if said=$("$binary" --version --verbose 2>/dev/null || "$binary" --version); then
    if grep -qi failpoints <<<"$said"; then
      die "$binary: refused: it says it was built with the feature failpoints"
    fi
  else
    die "$binary: refused: it does not answer --version"
  fi
  if grep -aqF "$failpoint_marker" "$binary"; then
    die "$binary: refused: it contains '$failpoint_marker', so it was built with the feature failpoints"
  fi
}

if [ "${1:-}" = check ]; then
  [ $# -eq 2 ] || die "usage: scripts/release.sh check BINARY"
  check_binary "$2"
  echo "$2: no failpoints"
  exit 0
fi
[ $# -eq 0 ] || die "usage: scripts/release.sh [check BINARY]"

version=$(sed -n '/^\[workspace\.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)
[ -n "$version" ] || die "no version in [workspace.package] of Cargo.toml"
name="hsm-service-$version-$(uname -m)-linux"
built=$(target_dir)/release
out=$(target_dir)/package

cargo build --locked --release -p hsm-node -p admin-cli --bins
check_binary "$built/hsm-node"
check_binary "$built/hsmctl"

rm -rf "${out:?}/$name"
mkdir -p "$out/$name/bin"
install -m 0755 "$built/hsm-node" "$built/hsmctl" "$out/$name/bin/"
# The same program under the names that users of version 1 know.
ln -s hsmctl "$out/$name/bin/hsm-admin"
ln -s hsmctl "$out/$name/bin/create-kek"
# Manual pages and completions, under each name.
man=$out/$name/share/man/man1
mkdir -p "$out/$name/share/completions"
for called in hsmctl hsm-admin create-kek; do
  "$out/$name/bin/$called" man --dir "$man"
  for shell in bash zsh fish; do
    "$out/$name/bin/$called" completions "$shell" >"$out/$name/share/completions/$called.$shell"
  done
done
cp LICENSE README.md CHANGELOG.md "$out/$name/"
cp -r docs config-examples "$out/$name/"
# What sets a machine up that has nothing but this.
mkdir "$out/$name/scripts"
install -m 0755 scripts/init-hsm.sh scripts/setup.sh "$out/$name/scripts/"
install -m 0644 scripts/lib.sh "$out/$name/scripts/"

# The same commit gives the same archive: order, owner and times are fixed.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
tar -C "$out" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$epoch" -cf - "$name" | gzip -n -9 >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz"
