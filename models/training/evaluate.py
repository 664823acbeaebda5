"""Figures of the int8 model on the test part (groups never trained or calibrated on), and how it differs from float.

evaluate.py --index INDEX.csv --float DIR/float.npz --model model.tflite --out evaluation.json
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import data
from convert import load_float
from metrics import auc, calibration_error
from preprocess import model_input

MERGED = {"navoneel": "navoneel+br35h", "br35h": "navoneel+br35h"}  # they share groups
THRESHOLD = 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    test = [s for s in data.load(args.index) if s.part == "test"] + data.phantoms(200, seed=3, part="test")
    images = np.stack([model_input(s.image, s.roi) for s in test])
    int8, cam, milliseconds = run_int8(args.model, images)
    net = load_float(args.float)
    float32 = np.array([net((i[None].astype(np.float32) - 127.0) / 128.0, training=False)[0].numpy().item() for i in images])

    label = np.array([s.label for s in test])
    source = np.array([MERGED.get(s.source, s.source) for s in test])
    sequence = np.array([s.file.rsplit("_", 1)[-1].removesuffix(".png") for s in test])
    group = np.array([s.group for s in test])
    sources = [figures(str(s), label, int8, group, source == s) for s in sorted(set(source))]
    sources += [
        figures(f"lgg, {q} only", label, int8, group, (source == "lgg") & (sequence == q)) for q in ("FLAIR", "T1pre", "T1post")
    ]
    real = source != "phantom"
    sources.append(figures("all but phantom", label, int8, group, real))
    logit = cam.mean((1, 2))
    inner = (int8 > 0.02) & (int8 < 0.98)
    result = {
        "threshold": THRESHOLD,
        "sources": sources,
        "auc_float": {
            r["source"]: rounded(auc(label[source == r["source"]], float32[source == r["source"]])) for r in sources[:6]
        },
        "agreement_percent": round(100.0 * float(np.mean((int8 >= THRESHOLD) == (float32 >= THRESHOLD))), 1),
        "difference_mean": rounded(float(np.abs(int8 - float32).mean())),
        "difference_max": rounded(float(np.abs(int8 - float32).max())),
        "cam_logit_gap_mean": rounded(float(np.abs(logit - np.log(int8 / (1 - int8 + 1e-9) + 1e-9))[inner].mean())),
        "calibration_error": rounded(calibration_error(label[real], int8[real])),
        "milliseconds_one_thread": round(milliseconds, 1),
        "test_images": int(real.sum()),
        "test_groups": len(set(group[real])),
        "model_bytes": args.model.stat().st_size,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    with open(Path(__file__).parent / "runs.jsonl", "a") as log:
        log.write(json.dumps({"evaluation": result}) + "\n")
    for row in sources:
        print(row)
    print({k: v for k, v in result.items() if k != "sources"})


def run_int8(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(probability [n], cam [n, 7, 7] in logit units, median ms an image on one thread) for uint8 images [n, 224, 224, 3]."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    target = interpreter.get_input_details()[0]["index"]
    outputs = interpreter.get_output_details()
    read, times = [[], []], []
    for image in images:
        interpreter.set_tensor(target, image[None])
        begun = time.perf_counter()
        interpreter.invoke()
        times.append(time.perf_counter() - begun)
        for kept, detail in zip(read, outputs, strict=True):
            scale, zero = detail["quantization"]
            kept.append((interpreter.get_tensor(detail["index"]).astype(np.float64) - zero) * scale)
    return np.array(read[0]).reshape(-1), np.array(read[1]).reshape(-1, 7, 7), 1000.0 * float(np.median(times))


def figures(name: str, label: np.ndarray, score: np.ndarray, group: np.ndarray, chosen: np.ndarray) -> dict:
    """The figures of one source; None where a class is missing. The AUC's 90 % interval resamples whole groups (ten at least)."""
    y, p, g = label[chosen], score[chosen], group[chosen]
    hit = (p >= THRESHOLD) == (y == 1)
    members = [np.flatnonzero(g == one) for one in sorted(set(g))]
    rng, drawn = np.random.default_rng(1), []
    for _ in range(300):
        pick = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(auc(y[pick], p[pick]))
    drawn = [a for a in drawn if a is not None]
    return {
        "source": name,
        "no": int((y == 0).sum()),
        "yes": int((y == 1).sum()),
        "groups": len(members),
        "auc": rounded(auc(y, p)),
        "auc_90": [rounded(float(q)) for q in np.quantile(drawn, [0.05, 0.95])] if drawn and len(members) >= 10 else None,
        "accuracy": rounded(float(hit.mean())),
        "sensitivity": rounded(float(hit[y == 1].mean())) if (y == 1).any() else None,
        "specificity": rounded(float(hit[y == 0].mean())) if (y == 0).any() else None,
        "ece": rounded(calibration_error(y, p)),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    main()
