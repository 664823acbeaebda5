#!/bin/sh
# Installs or fetches what building, testing and running the demo need; quick when all of it is there.
#
#   scripts/setup.sh                         all of it, for this machine
#   scripts/setup.sh --packages NAME...      only these Debian packages
#
# On Debian and its kin, missing packages are installed with apt-get (through sudo when not root). Elsewhere it says
# what is missing and goes on.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

only_packages=
if [ "${1:-}" = --packages ]; then
    shift
    only_packages=$*
fi

# A C compiler for the bundled SQLite; pip for LiteRT's wheel; the broker and its clients, and a DICOM sender and receiver, another clock and a FUSE file
# system, for the tests.
packages="gcc libc6-dev python3 python3-pip python3-venv mosquitto mosquitto-clients openssl dcmtk faketime bindfs"
packages=${only_packages:-$packages}

say() { echo "setup: $*" >&2; }

command -v cargo >/dev/null || {
    say "cargo is not installed; install a Rust toolchain (rustup), 1.92 or newer"
    exit 1
}

if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    missing=
    for package in $packages; do
        status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        say "installing$missing"
        sudo=
        if [ "$(id -u)" != 0 ]; then
            command -v sudo >/dev/null || {
                say "not root and no sudo; install$missing by hand"
                exit 1
            }
            sudo=sudo
        fi
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq
        # shellcheck disable=SC2086  # a list of names
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    fi
elif [ -n "$only_packages" ]; then
    say "this is not Debian: the packages $only_packages are taken to be there"
else
    for command in cc python3 mosquitto mosquitto_sub openssl; do
        command -v "$command" >/dev/null || PATH=$PATH:/usr/sbin command -v "$command" >/dev/null ||
            say "$command is missing; install it by hand"
    done
fi

[ -n "$only_packages" ] || exec "$here/fetch-litert.sh"
