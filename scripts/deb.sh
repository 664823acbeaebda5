#!/bin/sh
# Packages a binary that is built: scripts/deb.sh TRIPLE [VERSION] makes target/debian/scansentry_VERSION_ARCH.deb.
#
# The binary lies in target/TRIPLE/dist/, as `make cross-*` leaves it. Man pages and completions come from the same
# source tree, notices from cargo's own records. Nothing is stripped or run here, so any host packages for any target.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

fail() {
    echo "deb: $*" >&2
    exit 1
}

triple=${1:?deb: a target triple is expected, such as aarch64-unknown-linux-gnu}
version=${2:-}
profile=dist
binary=target/$triple/$profile/scansentry
[ -x "$binary" ] || fail "$binary: is not there; build it with make cross-${triple%%-*}"
command -v cargo-deb >/dev/null || cargo install --locked cargo-deb

variant=
features=
stage=target/package
rm -rf "$stage"
mkdir -p "$stage/lib" "$stage/doc" "$stage/man1" "$stage/man5"
case $triple in
    armv7-*)
        features="--no-default-features --features tflite,demo"
        ;;
    *)
        scripts/fetch-litert.sh "$triple"
        install -m 644 ".deps/litert-2.1.4/$triple/libLiteRt.so" "$stage/lib/"
        variant="--variant litert"
        ;;
esac

# What the ELF files want of the C library against what the package says it depends on.
glibc=$(sed -n 's/^depends = .*libc6 (>= \([0-9.]*\)).*/\1/p' Cargo.toml)
for elf in "$binary" "$stage"/lib/*; do
    [ -e "$elf" ] || continue
    needs=$(readelf --version-info "$elf" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -uV | tail -n 1)
    [ "$(printf '%s\n' "$needs" "$glibc" | sort -V | tail -n 1)" = "$glibc" ] ||
        fail "$elf: needs glibc $needs, the package says $glibc; build in an older environment or raise depends in Cargo.toml"
    echo "deb: $elf needs glibc $needs"
done
if readelf -d "$binary" | grep -E 'R(UN)?PATH' | grep -v '\[\$ORIGIN/../lib/scansentry\]'; then
    fail "$binary: names a directory of this machine; build it with SCANSENTRY_PACKAGE=1"
fi

# For this machine, whose engine the program that writes the manuals is linked with.
scripts/fetch-litert.sh
cargo run --quiet --example manuals -- "$stage"
for page in "$stage"/*.[15]; do
    gzip -9n "$page"
    mv "$page.gz" "$stage/man${page##*.}/"
done
# shellcheck disable=SC2086  # options
scripts/third-party.py "$triple" $features >"$stage/doc/THIRD-PARTY"
gzip -9n "$stage/doc/THIRD-PARTY"
gzip -9nc config/scansentry.toml >"$stage/doc/scansentry.toml.gz"
cp systemd/README.md "$stage/doc/systemd.md"
cp docs/rollout.md docs/fleet.md docs/degraded.md docs/threat-model.md "$stage/doc/"
gzip -9n "$stage"/doc/*.md
gzip -9nc CHANGELOG.md >"$stage/doc/changelog.gz"

# shellcheck disable=SC2086
env -u CARGO_BUILD_TARGET cargo deb --quiet --no-build --no-strip --target "$triple" --profile "$profile" $variant --output "${DEB_OUTPUT:-target/debian/}" \
    ${version:+--deb-version "$version"}
