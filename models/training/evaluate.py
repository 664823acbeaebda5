"""The figures of all trainings of a recipe, and of the int8 files made of them.

    evaluate.py --data DIR --runs DIR --out evaluation.json [--int8|--int8-small RUN-SEED=model.tflite]...

Every picture is judged by a model that never saw its group: the folds give "trained on this source, new patients", the
`without-...` runs "a source never trained on". Probabilities are calibrated (Platt 1999) by the other folds' answers; for
`without-...` by all folds' answers of the sources that were trained on. Intervals resample whole groups.
"""

import argparse
import collections
import json
import os
import re
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np

import data
from metrics import auc, calibration_error

EXITS = {"score": 0, "score of the smaller network": 1}
KAGGLE = "navoneel+br35h"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--int8", action="append", default=[], metavar="RUN-SEED=FILE")
    parser.add_argument("--int8-small", action="append", default=[], metavar="RUN-SEED=FILE")
    args = parser.parse_args()
    samples = [data.Sample(**entry) for entry in json.loads((args.data / "samples.json").read_text())]
    runs = {path.stem: dict(np.load(path)) for path in sorted(args.runs.glob("*.npz"))}
    seeds = sorted({name.rsplit("-", 1)[1] for name in runs})
    result = {"exits": {}, "platt": {}, "int8": []}
    for exit_name, column in EXITS.items():
        result["exits"][exit_name] = [row for seed in seeds for row in of_seed(samples, runs, seed, column)]
    for seed in seeds:
        folds = [run for name, run in runs.items() if re.fullmatch(rf"cv\d-{seed}", name)]
        result["platt"][seed] = {exit_name: [round(x, 4) for x in fitted(folds, column, samples)] for exit_name, column in EXITS.items()}
    for exit_name, specs in zip(EXITS, (args.int8, args.int8_small), strict=True):
        result["int8"] += [of_int8(exit_name, spec, args.data, samples, runs, result["platt"]) for spec in specs]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for exit_name, rows in result["exits"].items():
        print(exit_name)
        for row in rows:
            print("  ", row)
    print(result["platt"], result["int8"])


def of_seed(samples: list[data.Sample], runs: dict, seed: str, column: int) -> list[dict]:
    """The table of one seed: each family by cross-validation, then each family that was left out."""
    label, group = np.array([s.label for s in samples]), np.array([s.group for s in samples])
    family, name = np.array([s.family for s in samples]), np.array([Path(s.file).stem for s in samples])
    logit = np.full(len(samples), np.nan)
    folds = [run for key, run in runs.items() if re.fullmatch(rf"cv\d-{seed}", key)]
    for run in folds:
        slope, offset = fitted([r for r in folds if r is not run] or [run], column, samples)
        logit[run["ids"]] = slope * run["logits"][:, column] + offset
    seen = ~np.isnan(logit)
    rows = []

    def add(title: str, chosen: np.ndarray, values=logit) -> None:
        if chosen.any():
            rows.append({"seed": seed, "on": title} | figures(label[chosen], values[chosen], group[chosen]))

    # One vote per group and label: the mean of its pictures' logits.
    kaggle = np.flatnonzero(seen & (family == KAGGLE))
    votes = sorted({(group[i], label[i]) for i in kaggle})
    if votes:
        voted = np.array([logit[kaggle[(group[kaggle] == g) & (label[kaggle] == y)]].mean() for g, y in votes])
        rows.append({"seed": seed, "on": f"{KAGGLE}, one vote a group"} | figures(np.array([y for _, y in votes]), voted, np.array([g for g, _ in votes])))
    for one in sorted(set(family[seen])):
        add(str(one), seen & (family == one))
    edge = near_edge(name, label, family == "btp")
    add("btp, within two slices of the tumour's edge", seen & edge)
    for sequence in ("FLAIR", "T1pre", "T1post"):
        add(f"lgg, {sequence} only", seen & (family == "lgg") & np.array([n.endswith(sequence) for n in name]))
    if folds:
        slope, offset = fitted(folds, column, samples)
        values = slope * np.concatenate([r["volumes"][:, column] for r in folds]) + offset
        rows.append({"seed": seed, "on": "healthy volumes, held back"} | figures(np.zeros(len(values), int), values, np.array(["v"] * len(values))))
    for key, run in runs.items():
        if key.startswith("without-") and key.endswith(f"-{seed}"):
            left_out = key.removeprefix("without-").rsplit("-", 1)[0]
            slope, offset = fitted(folds, column, samples, family != left_out)
            values = np.full(len(samples), np.nan)
            values[run["ids"]] = slope * run["logits"][:, column] + offset
            add(f"{left_out}, trained without it", ~np.isnan(values), values)
    return rows


def near_edge(name: np.ndarray, label: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Slices (`P01_Post_07`) within two of one with the other label, in the same series."""
    place = {}
    for i in np.flatnonzero(chosen):
        series, number = name[i].rsplit("_", 1)
        place.setdefault(series, {})[int(number)] = i
    near = np.zeros(len(name), bool)
    for slices in place.values():
        for number, i in slices.items():
            near[i] = any(label[slices[k]] != label[i] for k in range(number - 2, number + 3) if k in slices)
    return near


def fitted(folds: list[dict], column: int, samples: list[data.Sample], usable: np.ndarray | None = None) -> tuple[float, float]:
    """:func:`platt` by what the folds say of the samples they held back, or of those that are `usable` (bool [samples]); (1, 0) of none."""
    ids = np.concatenate([np.zeros(0, int), *(run["ids"] for run in folds)])
    logits = np.concatenate([np.zeros(0), *(run["logits"][:, column] for run in folds)])
    keep = np.ones(len(ids), bool) if usable is None else usable[ids]
    return platt(logits[keep], ids[keep], samples) if keep.any() else (1.0, 0.0)


def platt(logits: np.ndarray, ids: np.ndarray, samples: list[data.Sample]) -> tuple[float, float]:
    """Slope and offset of sigmoid(slope * logit + offset), by weighted maximum likelihood (Platt 1999), Newton's method.

    Yes and no weigh the same, and within each every group of a source. A weak prior (slope 1, offset 0) holds where little decides.
    """
    keys = [(samples[i].source, samples[i].label, samples[i].group) for i in ids]
    size = collections.Counter(keys)
    share = np.array([1 / size[key] for key in keys])
    y = np.array([samples[i].label for i in ids], float)
    for value in (0, 1):
        share[y == value] *= 0.5 / share[y == value].sum()
    x, prior = np.column_stack([logits, np.ones_like(logits)]).astype(np.float64), np.array([1.0, 0.0])

    def loss(theta):
        z = x @ theta
        return np.sum(share * (np.logaddexp(0.0, z) - y * z)) + 0.002 * np.sum((theta - prior) ** 2)

    theta = prior
    for _ in range(50):
        p = 0.5 * (1.0 + np.tanh(0.5 * (x @ theta)))
        gradient = x.T @ (share * (p - y)) + 0.004 * (theta - prior)
        hessian = (x * (share * p * (1.0 - p))[:, None]).T @ x + 0.004 * np.eye(2)
        move = np.linalg.solve(hessian, gradient)
        while loss(theta - move) > loss(theta) and np.abs(move).max() > 1e-9:
            move = move / 2.0  # Newton overshoots where the logits are large
        theta = theta - move
    return float(theta[0]), float(theta[1])


def figures(label: np.ndarray, logit: np.ndarray, group: np.ndarray) -> dict:
    """At 0.5; None where a class is missing. 90 % intervals by resampling whole groups (five at least)."""
    probability, members = 0.5 * (1 + np.tanh(0.5 * logit)), [np.flatnonzero(group == one) for one in sorted(set(group))]

    def measure(pick: np.ndarray) -> dict[str, float | None]:
        y, hit = label[pick], (logit[pick] >= 0) == (label[pick] == 1)
        return {
            "auc": auc(y, logit[pick]),
            "accuracy": float(hit.mean()),
            "sensitivity": float(hit[y == 1].mean()) if (y == 1).any() else None,
            "specificity": float(hit[y == 0].mean()) if (y == 0).any() else None,
        }

    rng, drawn = np.random.default_rng(1), []
    for _ in range(200 if len(members) >= 5 else 0):
        drawn.append(measure(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])))
    result = {"no": int((label == 0).sum()), "yes": int((label == 1).sum()), "groups": len(members)}
    for key, value in measure(np.arange(len(label))).items():
        result[key] = rounded(value)
        values = [d[key] for d in drawn if d[key] is not None]
        result[f"{key}_90"] = [rounded(float(q)) for q in np.quantile(values, [0.05, 0.95])] if value is not None and values else None
    return result | {"ece": rounded(calibration_error(label, probability))}


def of_int8(exit_name: str, spec: str, folder: Path, samples: list[data.Sample], runs: dict, calibrations: dict) -> dict:
    """How an int8 file (`cv0-1=model.tflite`) answers on what its training held back (`all`: on every picture), against float."""
    from ai_edge_litert.interpreter import Interpreter

    name, path = spec.split("=", 1)
    scale, column = calibrations[name.rsplit("-", 1)[1]][exit_name], EXITS[exit_name]
    run, plain = runs[name], np.load(folder / "plain-u8.npy", mmap_mode="r")
    if len(run["ids"]):
        ids, logit = run["ids"], run["logits"][:, column]
    else:
        from network import split  # TensorFlow is slow to load, and only this needs it
        from train import logits, restore

        ids = np.array([i for i, s in enumerate(samples) if s.fold >= 0])
        net, heads = restore(run)
        logit = logits(split(net)[1], heads, np.load(folder / "plain.npy", mmap_mode="r")[ids])[:, column]
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    target, out = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]
    answers, times = [], []
    for i in ids:
        interpreter.set_tensor(target, plain[i][None])
        begun = time.perf_counter()
        interpreter.invoke()
        times.append(time.perf_counter() - begun)
        answers.append(float(interpreter.get_tensor(out["index"]).ravel()[0]) * out["quantization"][0])
    real, answers = 0.5 * (1 + np.tanh(0.5 * (scale[0] * logit + scale[1]))), np.array(answers)
    label, family = np.array([samples[i].label for i in ids]), np.array([samples[i].family for i in ids])
    both = [f for f in sorted(set(family)) if len(set(label[family == f])) == 2]
    return {
        "exit": exit_name,
        "run": name,
        "images": len(ids),
        "decisions_equal": rounded(float(np.mean((answers >= 0.5) == (real >= 0.5)))),
        "difference_mean": rounded(float(np.abs(answers - real).mean())),
        "difference_max": rounded(float(np.abs(answers - real).max())),
        "auc_float": {f: rounded(auc(label[family == f], real[family == f])) for f in both},
        "auc_int8": {f: rounded(auc(label[family == f], answers[family == f])) for f in both},
        "milliseconds_one_thread": round(1000 * float(np.median(times)), 1),
        "bytes": Path(path).stat().st_size,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main()
