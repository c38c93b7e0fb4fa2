#!/usr/bin/env bash
# Sets a machine up for a node: the packages, and an initialised token for each label, through hsmctl. PINs are random,
# each in a file that only this user can read; none is ever an argument, in the environment, or printed. Run it as the
# user that the node runs as. Run again, it makes what is missing and leaves the rest alone.
#
#   scripts/init-hsm.sh [--pins DIR] [--module FILE] [--dry-run] LABEL...
#
#   --pins DIR      where the PINs' files are [HSM_PIN_DIR, else /etc/hsm-service/pins]
#   --module FILE   the PKCS#11 module [HSM_PKCS11_LIB, else SoftHSM's on Debian]; another than SoftHSM's has to be
#                   installed already
#   --dry-run       say what would be done; packages are not installed either
#
# hsmctl is taken from HSM_BIN_DIR, from what was built here, from the release this lies in, or from the PATH. Where
# SoftHSM keeps tokens is said by SOFTHSM2_CONF, as for the node.
set -euo pipefail
# What the caller names is where the caller is.
started_in=$PWD
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

softhsm=/usr/lib/softhsm/libsofthsm2.so
pins=${HSM_PIN_DIR:-/etc/hsm-service/pins}
module=${HSM_PKCS11_LIB:-$softhsm}
dry_run=no
labels=()

usage() { die "usage: scripts/init-hsm.sh [--pins DIR] [--module FILE] [--dry-run] LABEL..."; }

while [ $# -gt 0 ]; do
  case "$1" in
    --pins | --module)
      [ $# -ge 2 ] && [ -n "$2" ] || usage
      if [ "$1" = --pins ]; then pins=$2; else module=$2; fi
      shift 2
      ;;
    --dry-run)
      dry_run=yes
      shift
      ;;
    -*) usage ;;
    *)
      # It becomes a file's name, and hsmctl's argument.
      [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$ ]] ||
        die "label '$1': use 1 to 32 letters, digits and . _ -, beginning with a letter or digit"
      labels+=("$1")
      shift
      ;;
  esac
done
[ ${#labels[@]} -gt 0 ] || usage
[[ $pins == /* ]] || pins=$started_in/$pins
[[ $module == /* ]] || module=$started_in/$module

find_hsmctl() {
  local built
  built=$(bin_dir)/hsmctl
  if [ -x "$built" ]; then
    printf '%s\n' "$built"
  elif [ -x bin/hsmctl ]; then
    printf '%s\n' bin/hsmctl
  elif have hsmctl; then
    command -v hsmctl
  else
    die "hsmctl is neither in $(bin_dir) nor on the PATH: run 'make build' first, or set HSM_BIN_DIR"
  fi
}

# Makes the folder if need be; one that others can look into, or somebody else owns, is refused.
private_folder() {
  local mode
  if [ ! -d "$1" ]; then
    (umask 077 && mkdir -p "$1") || die "$1: cannot be made; name another folder with --pins"
  fi
  [ -O "$1" ] || die "$1 belongs to somebody else, who could change what is in it; name a folder of your own with --pins"
  mode=$(stat -c %a "$1")
  [[ $mode == *00 ]] || die "$1 has mode $mode, so others can get at the PINs; chmod 700 $1"
}

hsmctl=$(find_hsmctl)
if [ "$dry_run" = no ] && [ "$module" = "$softhsm" ]; then
  scripts/setup.sh runtime
fi
[ -f "$module" ] || die "PKCS#11 module $module: no such file; install it, or name another with --module"
[ "$dry_run" = yes ] || private_folder "$pins"

summary=()
for label in "${labels[@]}"; do
  pin=$pins/$label.pin
  options=(--label "$label" --module "$module" --pin-file "$pin" --so-pin-file "$pins/$label.so-pin")
  [ "$dry_run" = no ] || options+=(--dry-run)
  if said=$("$hsmctl" --no-input slot init "${options[@]}" 2>&1); then
    [ "$dry_run" = no ] || printf '%s\n' "$said"
    summary+=("$(printf '%-32s  made            %s' "$label" "$pin")")
  elif grep -q 'is initialised already' <<<"$said"; then
    [ -f "$pin" ] ||
      die "token $label is there already, and $pin is not: its PIN is somewhere else; put it there, or leave this label out"
    summary+=("$(printf '%-32s  was there       %s' "$label" "$pin")")
  else
    die "token $label: $said"
  fi
done

[ "$dry_run" = no ] || exit 0
printf '\n%-32s  %-14s  %s\n' TOKEN NOW PIN
printf '%s\n' "${summary[@]}"
cat <<END

Beside each PIN lies the security officer's (.so-pin), which a node never needs: keep it elsewhere, on paper for instance.
A node finds a PIN by a line of its configuration, hsm.slots.<name>:

  {label: ${labels[0]}, pin_file: $pins/${labels[0]}.pin, contexts: [...]}
END
