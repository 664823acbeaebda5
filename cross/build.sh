#!/bin/sh
# Builds what goes into a package for one target, on a Debian x86-64 machine, with Debian's cross compilers.
#
#   cross/build.sh aarch64-unknown-linux-gnu | armv7-unknown-linux-gnueabihf | x86_64-unknown-linux-gnu
#
# The result lies in target/TRIPLE/stage, laid out as in a package: bin/scansentry, lib/scansentry/libLiteRt.so. It names no
# directory of this machine. The last line says what it needs of the board's C library, and fails when that is more than
# cross/README.md promises.
set -eu

cd "$(dirname -- "$0")/.."
target=${1:?which target? for example aarch64-unknown-linux-gnu}

say() { echo "cross: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# The newest C library that a result may need.
glibc_limit=2.34
# Which engine, which tools.
case $target in
    x86_64-unknown-linux-gnu)
        engine=litert prefix='' packages=''
        ;;
    aarch64-unknown-linux-gnu)
        engine=litert prefix=aarch64-linux-gnu- packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        ;;
    armv7-unknown-linux-gnueabihf)
        engine=tflite prefix=arm-linux-gnueabihf-
        packages="g++ g++-arm-linux-gnueabihf libclang-dev make"
        ;;
    *)
        fail "$target: not a target of this project; expected aarch64-unknown-linux-gnu, armv7-unknown-linux-gnueabihf or x86_64-unknown-linux-gnu"
        ;;
esac

# The build scripts run here, so this machine's compiler is needed too.
# shellcheck disable=SC2086  # a list of names
scripts/setup.sh --packages gcc libc6-dev binutils python3 python3-pip $packages
[ $engine = tflite ] || scripts/fetch-litert.sh "$target"
if command -v rustup >/dev/null; then
    rustup target list --installed | grep -qx "$target" || {
        say "adding the Rust target $target"
        rustup target add "$target" >/dev/null 2>&1 || fail "rustup cannot add $target; is its server reachable?"
    }
fi

SCANSENTRY_PACKAGE=1 ${CARGO:-cargo} build --locked --profile dist --target "$target" --no-default-features --features "$engine,demo"

stage=target/$target/stage
rm -rf "$stage"
mkdir -p "$stage/bin"
cp "target/$target/dist/scansentry" "$stage/bin/"
if [ $engine = litert ]; then
    mkdir -p "$stage/lib/scansentry"
    cp ".deps/litert-2.1.4/$target/libLiteRt.so" "$stage/lib/scansentry/"
fi

# The newest version of the C library that any symbol asks for.
glibc=$(find "$stage" -type f -exec "${prefix}objdump" -T {} + | sed -n 's/.*(*GLIBC_\([0-9.]*\))* .*/\1/p' | sort -V | tail -n 1)
size=$(stat -c %s "$stage/bin/scansentry")
say "$stage: $engine, $((size / 1000)) kB, needs glibc $glibc"
[ "$(printf '%s\n' "$glibc" "$glibc_limit" | sort -V | tail -n 1)" = "$glibc_limit" ] ||
    fail "glibc $glibc: more than the promised $glibc_limit; see cross/README.md"
