"""Decoding of JPEG, crop, resize and quantize beside OpenCV in Python, one thread each, on the same pictures.

    python benches/compare_opencv.py [--data DIR] [--every N] [--rounds N]

Needs the packages of tests/golden/requirements.txt and cargo. The pictures are every N-th of ../shared/data/mri
(or DIR with an index.csv), or, without them, the golden ones. Passes of both sides alternate, so that a disturbance
hits both; the figure is each stage's least time over the rounds. A ratio below 1 means ScanSentry is faster.
`--flags` are further features for cargo, e.g. `--flags=--no-default-features`.
"""

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/golden"))
import reference  # noqa: E402

STAGES = ("decode", "crop", "resize", "quantize")


def bench_binary(flags):
    command = ["cargo", "bench", "--bench", "imaging", "--no-run", "--message-format=json", *flags]
    out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    for line in out.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "imaging":
            return message["executable"]
    sys.exit("cargo built no bench binary")


def pictures(data, every):
    index = data / "index.csv"
    if index.exists():
        with index.open(newline="") as table:
            return [data / row["file"] for row in list(csv.DictReader(table))[::every]]
    return sorted((ROOT / "tests/golden/crop/files").glob("*.png"))


def python_pass(images, jpegs):
    """The application's steps; quantization as a NumPy user would write it."""
    spent = dict.fromkeys(STAGES, 0)
    start = time.perf_counter_ns()
    for data in jpegs:
        cv2.imdecode(data, cv2.IMREAD_COLOR)
    spent["decode"] = time.perf_counter_ns() - start
    means = np.array([103.939, 116.779, 123.68], np.float32)
    for img in images:
        start = time.perf_counter_ns()
        try:
            x, y, w, h, _ = reference.crop_rect(img)
        except reference.Refused:
            continue
        cropped = time.perf_counter_ns()
        resized = cv2.resize(img[y : y + h, x : x + w], dsize=(224, 224), interpolation=cv2.INTER_CUBIC)
        sized = time.perf_counter_ns()
        tensor = resized[:, :, ::-1].astype(np.float32) - means
        tensor = np.clip(np.round(tensor / np.float32(1.0078)) + 118, 0, 255).astype(np.uint8)
        spent["crop"] += cropped - start
        spent["resize"] += sized - cropped
        spent["quantize"] += time.perf_counter_ns() - sized
    return spent


def after_decoding(spent):
    return sum(spent[stage] for stage in STAGES[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "../shared/data/mri")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flags", action="append", default=[])
    args = parser.parse_args()
    cv2.setNumThreads(1)
    binary = bench_binary(args.flags)
    with tempfile.TemporaryDirectory() as folder:
        images, jpegs, colored = [], [], 0
        os.mkdir(f"{folder}/jpeg")
        for i, path in enumerate(pictures(args.data, args.every)):
            img = cv2.imread(str(path))
            grey = (img == img[:, :, :1]).all()
            colored += not grey
            # ScanSentry keeps a grey file at one channel; OpenCV's imread always makes three.
            cv2.imwrite(f"{folder}/{i:05}.png", np.ascontiguousarray(img[:, :, 0]) if grey else img)
            images.append(img)
            if path.suffix.lower() in (".jpg", ".jpeg"):
                data = path.read_bytes()
                pathlib.Path(f"{folder}/jpeg/{i:05}.jpg").write_bytes(data)
                jpegs.append(np.frombuffer(data, np.uint8))
        rust = subprocess.Popen(
            [binary, "--bench"],
            env={**os.environ, "SCANSENTRY_SIDE_BY_SIDE": folder},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert int(rust.stdout.readline().split()[0]) == len(images)
        best = {"python": dict.fromkeys(STAGES, 1 << 62), "rust": dict.fromkeys(STAGES, 1 << 62)}
        ratios = []
        for _ in range(args.rounds):
            ours = python_pass(images, jpegs)
            rust.stdin.write("\n")
            rust.stdin.flush()
            theirs = dict(zip(STAGES, map(int, rust.stdout.readline().split())))
            ratios.append(after_decoding(theirs) / after_decoding(ours))
            for side, spent in (("python", ours), ("rust", theirs)):
                for stage in STAGES:
                    best[side][stage] = min(best[side][stage], spent[stage])
        rust.stdin.close()
        rust.wait()
    print(f"OpenCV {cv2.__version__}, {len(images)} pictures ({colored} in colour), {len(jpegs)} JPEG files, {args.rounds} rounds; microseconds each")
    print(f"{'stage':24} {'OpenCV':>9} {'ScanSentry':>11} {'ratio':>6}")

    def line(name, count, of):
        python, rust = (of(best[side]) / max(count, 1) / 1000 for side in ("python", "rust"))
        print(f"{name:24} {python:9.1f} {rust:11.1f} {rust / max(python, 1e-9):6.2f}")

    line("decode (JPEG)", len(jpegs), lambda spent: spent["decode"])
    for stage in STAGES[1:]:
        line(stage, len(images), lambda spent: spent[stage])
    line("crop + resize", len(images), lambda spent: spent["crop"] + spent["resize"])
    line("crop + resize + quantize", len(images), after_decoding)
    print(f"median ratio of whole rounds, crop + resize + quantize: {sorted(ratios)[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
