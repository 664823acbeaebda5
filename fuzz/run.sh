#!/usr/bin/env bash
# Fuzzes decode, dicom and crop, each for SECONDS (default 600), from a generated seed corpus.
#
#   fuzz/run.sh [SECONDS] [TARGET...]
#
# Needs a nightly toolchain (for the sanitizer) and cargo-fuzz: rustup toolchain install nightly; cargo install cargo-fuzz
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(decode dicom crop)

cargo +nightly fuzz --version >/dev/null 2>&1 || {
    echo "fuzz: needs a nightly toolchain and cargo-fuzz; run: rustup toolchain install nightly; cargo install cargo-fuzz" >&2
    exit 1
}
python3 fuzz/seed.py
for target in "${targets[@]}"; do
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -rss_limit_mb=400 -timeout=20
done
