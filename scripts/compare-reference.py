#!/usr/bin/env python3
"""Compares `scansentry classify` with the Python reference (OpenCV + LiteRT) on real images and prints the agreement.

    compare-reference.py DATA_FOLDER [COUNT]

DATA_FOLDER holds mri/index.csv; COUNT images (default 300; 0 for all) are taken from all over it. Files that either side
refuses are counted, not compared. Exit 1 when fewer than 99 % of the decisions agree.
"""

import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "models/braintumor"
STRIDE = 1009  # visits every file once, in a mixed order


def lines(command: list[str]) -> dict[str, dict]:
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    return {line["file"]: line for line in map(json.loads, output.splitlines())}


def main() -> int:
    data = pathlib.Path(sys.argv[1])
    index = data / "mri/index.csv"
    if not index.exists():
        print(f"skipped: no {index}")
        return 0
    files = [str(data / "mri" / row["file"]) for row in csv.DictReader(index.open())]
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    mixed = [files[i * STRIDE % len(files)] for i in range(len(files))]
    chosen = mixed[: count or None]

    venv = ROOT / ".deps/reference-venv"
    python = venv / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    requirements = ROOT / "models/training/requirements-reference.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        listing.write("\n".join(chosen))
        listing.flush()
        reference = lines(
            [str(python), str(ROOT / "models/training/reference.py"), "--bundle", str(BUNDLE), "--list", listing.name]
        )
    binary = os.environ.get("SCANSENTRY", str(ROOT / "target/release/scansentry"))
    ours = {}
    for start in range(0, len(chosen), 500):
        part = chosen[start : start + 500]
        ours |= lines([binary, "classify", "--bundle", str(BUNDLE), *part])

    compared = agreed = rectangles = misfits = 0
    largest, differing = 0.0, []
    for file in chosen:
        a, b = reference.get(file), ours[file]
        if a is None or a.get("probability") is None or b["probability"] is None:
            continue
        compared += 1
        rectangles += a["roi"] == b["roi"]
        misfits += b["misfit"] is not None
        gap = abs(a["probability"] - b["probability"])
        largest = max(largest, gap)
        # The quality rule may call a picture indeterminate; what is compared is the model's own decision.
        same = (a["probability"] >= 0.5) == (b["probability"] >= b["threshold"])
        agreed += same
        if not same:
            differing.append(f"{pathlib.Path(file).suffix} {a['probability']:.3f} {b['probability']:.3f} {a['roi']} {b['roi']}")
    share = agreed / compared
    print(f"{len(chosen)} files, {compared} compared: decisions agree on {agreed} ({share:.2%}), rectangles on {rectangles}")
    print(f"largest difference of a probability {largest:.3f}; {misfits} called indeterminate by the quality rule")
    for line in differing:
        print("  differs:", line)
    return 0 if share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
