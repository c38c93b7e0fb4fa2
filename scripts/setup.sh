#!/usr/bin/env bash
# Installs what the project needs besides Rust, and only what is missing.
#
#   scripts/setup.sh            all of it
#   scripts/setup.sh runtime    only what a machine needs that runs a node built elsewhere; no Rust
#   scripts/setup.sh packages   Debian packages: enough to build and to run a cluster (make demo, make dev)
#   scripts/setup.sh tools      cargo-nextest and cargo-deny: needed by make test and make verify
#
# With nothing missing it needs neither root nor a network.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# softhsm2: the default token. opensc: pkcs11-tool, with which tests look at tokens from outside.
# strace: injects kills into system calls and counts fdatasync. haproxy, nginx with two modules: run the examples for them
# before real nodes. libfaketime: gives one node another wall clock. prometheus: promtool, which tests the alerts.
# iproute2: gives the nodes of a chaos run a network of their own.
packages=(softhsm2 opensc strace haproxy nginx libnginx-mod-http-js libnginx-mod-stream libfaketime prometheus iproute2)
# What a node needs beside itself.
runtime=(softhsm2)

# Versions known to build with the toolchain of Cargo.toml's rust-version; any version that is there already is kept.
nextest_version=0.9.143
deny_version=0.20.2

installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
  local missing=() package
  if ! have dpkg-query; then
    for tool in softhsm2-util pkcs11-tool strace haproxy nginx promtool cc curl; do
      have "$tool" || missing+=("$tool")
    done
    [ ${#missing[@]} -eq 0 ] || die "not a Debian system, and these commands are missing: ${missing[*]}; install them, then start again"
    return 0
  fi
  for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
  done
  # The cryptography below rustls is C: it needs a compiler, whoever packaged it.
  have cc || missing+=(build-essential)
  # What the README shows without hsmctl.
  have curl || missing+=(curl)
  apt_install "${missing[@]}"
}

install_runtime() {
  local missing=() package
  if ! have dpkg-query; then
    have softhsm2-util || die "not a Debian system, and SoftHSM 2 is missing: install it, then start again"
    return 0
  fi
  for package in "${runtime[@]}"; do
    installed "$package" || missing+=("$package")
  done
  apt_install "${missing[@]}"
}

# Starts no service of theirs, and leaves those of nginx and Prometheus disabled: tests run their own nginx and only promtool,
# and Debian's would take the ports 80 and 9090.
apt_install() {
  [ $# -gt 0 ] || return 0
  echo "installing Debian packages: $*"
  as_root apt-get update -q
  # shellcheck disable=SC2016 # It is root's shell that expands it.
  as_root env DEBIAN_FRONTEND=noninteractive sh -euc '
    # What Debian asks before it starts a service; there may be one already.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
      trap "rm -f $policy" EXIT
      # A shell that a signal ends takes no EXIT trap; left behind, the file would keep every service from starting.
      trap "exit 130" HUP INT TERM
      printf "#!/bin/sh\nexit 101\n" >"$policy"
      chmod 755 "$policy"
    fi
    apt-get install -q -y --no-install-recommends "$@"
    for package; do
      case $package in
        nginx | prometheus) update-rc.d "$package" disable ;;
      esac
    done
  ' sh "$@"
}

install_tools() {
  # Asked with --version: a stale shim or a binary of another system counts as absent.
  cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest --version "$nextest_version"
  cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny --version "$deny_version"
}

if [ "${1:-all}" != runtime ]; then
  have cargo || die "cargo is not on the PATH: install Rust first (the version is rust-version in Cargo.toml)"
fi

case "${1:-all}" in
  runtime) install_runtime ;;
  packages) install_packages ;;
  tools) install_tools ;;
  all)
    install_packages
    install_tools
    ;;
  *) die "unknown argument '$1': one of runtime, packages, tools, all" ;;
esac
