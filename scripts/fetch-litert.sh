#!/bin/sh
# Puts libLiteRt.so into .deps/litert-2.1.4/TARGET/, for each TARGET given (default: this machine).
#
#   scripts/fetch-litert.sh [x86_64-unknown-linux-gnu] [aarch64-unknown-linux-gnu]
#
# The library is a member of the Python wheel ai-edge-litert 2.1.4, fetched with pip. The hashes of wheel and library
# are pinned below; nothing is put in place before both match. When the library is there and its hash is right,
# nothing is downloaded. The version is tied to the crate litert-sys (Cargo.toml): change both or neither.
set -eu

version=2.1.4
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
deps=$root/.deps/litert-$version

fail() {
    echo "fetch-litert: $*" >&2
    exit 1
}

matches() { # FILE SHA256
    [ -f "$1" ] && [ "$(sha256sum <"$1")" = "$2  -" ]
}

fetch() {
    target=$1
    case $target in
        x86_64-unknown-linux-gnu)
            platform=manylinux_2_27_x86_64
            wheel_sha=c280d21f1111feb3219283417c1fb5f5a4bbf9e16a214fd96d6220fbc62dec95
            lib_sha=c590f1124053ce6d2ceaef6d1174af15f8103a76872059414d18ff2e9cfaf681
            ;;
        aarch64-unknown-linux-gnu)
            platform=manylinux_2_27_aarch64
            wheel_sha=25aafb358229d9c87772b8448488ff373bbc42de0c9e1e62ed22202bdf6007af
            lib_sha=332b30e12a0708279c44e883639ac4caa435f18f6333fc4f35f8293a90ea9819
            ;;
        *)
            fail "$target: there is no libLiteRt.so for this target; expected x86_64-unknown-linux-gnu or aarch64-unknown-linux-gnu"
            ;;
    esac

    dir=$deps/$target
    if matches "$dir/libLiteRt.so" "$lib_sha"; then
        return
    fi

    command -v python3 >/dev/null || fail "python3 is not installed; run scripts/setup.sh"
    python3 -m pip --version >/dev/null 2>&1 || fail "pip is not installed; run scripts/setup.sh, or install python3-pip"

    mkdir -p "$deps"
    work=$(mktemp -d "$deps/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT INT TERM
    echo "fetch-litert: getting LiteRT $version for $target" >&2
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform "$platform" --dest "$work" "ai-edge-litert==$version" >"$work/pip.log" 2>&1 ||
        fail "pip could not get ai-edge-litert $version for $platform: $(grep -v '^ *$' "$work/pip.log" | tail -n 1)"
    set -- "$work"/*.whl
    matches "$1" "$wheel_sha" || fail "$(basename "$1"): its sha256 is not $wheel_sha; not used"

    # The wheel has no licence text of its own, only the statement in its METADATA (Apache 2.0): keep that.
    mkdir "$work/out"
    python3 - "$1" "$work/out" "$version" <<'PY' || fail "the wheel does not unpack"
import sys, zipfile
wheel, out, version = sys.argv[1:]
with zipfile.ZipFile(wheel) as z:
    for member, name in [
        ("ai_edge_litert/libLiteRt.so", "libLiteRt.so"),
        (f"ai_edge_litert-{version}.dist-info/METADATA", "METADATA"),
    ]:
        with open(f"{out}/{name}", "wb") as f:
            f.write(z.read(member))
PY
    matches "$work/out/libLiteRt.so" "$lib_sha" || fail "libLiteRt.so: its sha256 is not $lib_sha; not used"
    chmod 755 "$work/out" "$work/out/libLiteRt.so"
    sync -f "$work/out" 2>/dev/null || true
    rm -rf "$dir"
    mv -T "$work/out" "$dir"
    rm -rf "$work"
    trap - EXIT INT TERM
}

if [ $# -eq 0 ]; then
    set -- "$(uname -m)-unknown-linux-gnu"
fi
for t in "$@"; do
    fetch "$t"
done
