"""Fills fuzz/corpus/ with generated seeds: the golden files of the tests, and drawn pictures for the crop.

    python3 fuzz/seed.py && cargo +nightly fuzz run decode -- -max_total_time=600

On stable Rust: `RUSTC_BOOTSTRAP=1 cargo fuzz run ...`. Targets: decode, dicom, crop.
"""

import pathlib
import shutil

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden"


def folder(name):
    path = HERE / "corpus" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def crop(width, height, colour, spot):
    """What fuzz_targets/crop.rs reads: eight bytes of parameters, then levels."""
    head = bytes([width, colour, 45, 2, 2, 0, 2, 16])
    levels = bytearray()
    for y in range(height):
        for x in range(width):
            u, v = (x - width * spot) / (width * 0.3 + 1), (y - height * 0.5) / (height * 0.4 + 1)
            level = 160 if u * u + v * v < 1 else (x * 7 + y * 3) % 30
            levels += bytes([level, level // 2, 255 - level] if colour % 2 else [level])
    return head + bytes(levels)


for file in sorted((GOLDEN / "decode" / "files").iterdir()):
    shutil.copy(file, folder("decode"))
for file in sorted((GOLDEN / "dicom" / "files").iterdir()):
    shutil.copy(file, folder("decode"))
    shutil.copy(file, folder("dicom"))
for file in sorted((HERE / "regressions").glob("*/*")):
    shutil.copy(file, folder(file.parent.name))
for i, (width, height) in enumerate([(1, 1), (16, 16), (17, 40), (64, 48), (200, 20), (3, 200), (33, 33)]):
    for colour in (0, 1):
        for spot in (0.0, 0.5, 0.9):
            (folder("crop") / f"{i}-{colour}-{int(spot * 10)}").write_bytes(crop(width, height, colour, spot))
