"""The bundle: model, manifest, golden phantoms, the report of agreement, MODEL_CARD.md; and putting it in place as a whole."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import OpResolverType

from common import Refused, first_line, say

import metrics
import phantom
import reference
from images import Pictures
from tflite import File, Graph

# Below this share of equal decisions the int8 model is not the one that went in.
AGREEMENT = 0.97
# file -> (seed, lesion, fixed values of phantom.RANGES)
GOLDEN = {
    "phantom-lesion.png": (11, True, {"size": 224, "stripped": 1.0}),
    "phantom-lesion-ring.png": (12, True, {"size": 200, "stripped": 1.0, "lesion_core": 0.0}),
    "phantom-plain.png": (13, False, {"size": 224, "stripped": 1.0, "ventricle": 0.0}),
    "phantom-plain-bright-ventricles.png": (14, False, {"size": 200, "stripped": 1.0, "ventricle": 1.0}),
}
# Pictures, besides the golden ones, on which two sets of kernels are compared.
COMPARED = 12


def probabilities(graph: Graph, pictures: Pictures, manifest: dict) -> np.ndarray:
    """What the model gives before conversion: the positive labels' probability for each picture."""
    index, output = manifest["output"]["index"], manifest["output"]
    scores = (graph.call(tf.constant(reference.normalized(levels, manifest)[None]))[index] for levels in pictures.levels)
    return np.array([reference.positive_probability(score.numpy(), output) for score in scores])


def calibration(levels: list[np.ndarray], manifest: dict) -> list[np.ndarray]:
    """float32 pictures for the quantizer. The first has a black and a white pixel, so that the input's range is all of 0-255."""
    first = levels[0].copy()
    first[0, 0], first[0, 1] = 0, 255
    return [reference.normalized(picture, manifest) for picture in [first, *levels[1:]]]


def write(
    folder: Path, model: Path, kind: str, file: File, manifest: dict, pictures: Pictures | None, original: np.ndarray | None
) -> None:
    """All files of the bundle, in `folder`; what was found is said."""
    (folder / "golden").mkdir()
    (folder / "model.tflite").write_bytes(file.data)
    manifest["sha256"] = hashlib.sha256(file.data).hexdigest()
    (folder / "manifest.toml").write_text(toml(manifest))
    try:
        bundle = reference.Bundle(folder)
        other = reference.Bundle(folder, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    except (RuntimeError, ValueError) as error:
        hint = "give the original model" if original is None else "try --keep-float"
        raise Refused(f"engine: LiteRT does not load the {form(file)} model ({first_line(error)}); {hint}") from error

    seen, golden = [], []
    for name, (seed, lesion, fixed) in GOLDEN.items():
        path = folder / "golden" / name
        cv2.imwrite(str(path), phantom.draw(np.random.default_rng(seed), lesion, **fixed))
        bgr = reference.read_bgr(path)
        seen.append(reference.levels(bgr, bundle.roi(bgr), manifest))
        golden.append({"file": f"golden/{name}", "probability": probability(bundle, seen[-1])})
    if pictures is not None:
        seen += pictures.levels[:COMPARED]
    spread = max(abs(probability(bundle, levels) - probability(other, levels)) for levels in seen)
    manifest["golden"] = {"tolerance": tolerance(file, manifest, spread), "image": golden}
    (folder / "manifest.toml").write_text(toml(manifest))

    report = {
        "source": {"kind": kind, "file": model.resolve().name},
        "model": {"element": form(file), "bytes": len(file.data), "sha256": manifest["sha256"]},
        "operators": [{"name": name, "version": version, "count": count} for name, version, count in file.operators if count],
        "newer_than_tensorflow_lite_1_15": file.newer_than_1_15(),
        "wrong_on_tensorflow_lite_1_15": file.wide_pools(),
        "float_operators": file.float_operators() if integer(file) else [],
        "kernel_spread": round(spread, 6),
        "golden": [round(image["probability"], 6) for image in golden],
    }
    if pictures is not None:
        report["images"] = figures(pictures, manifest, bundle, original)
    (folder / "agreement.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = agreement_lines(report)
    (folder / "MODEL_CARD.md").write_text(card(model, file, manifest, report, lines))

    say("result", f"{report['model']['element']}, {size(file)}")
    say("operators", operators(file))
    if report["float_operators"]:
        say("", f"in float, because they have no integer form: {', '.join(report['float_operators'])}")
    say("engines", engines(file))
    for line in lines:
        say("agreement", line)
    say("golden", f"{', '.join(f'{p:.3f}' for p in report['golden'])}; tolerance {manifest['golden']['tolerance']}")
    for line in warnings(report):
        say("WARN", line)


def probability(bundle: reference.Bundle, levels: np.ndarray) -> float:
    return bundle.infer(bundle.quantized(levels))[0]


def integer(file: File) -> bool:
    return any(end.element != "float32" for end in file.ends)


def form(file: File) -> str:
    """What goes in and comes out: `uint8`, or `uint8 in, float32 out`."""
    given = sorted({end.element for end in file.outputs})
    return file.input.element if given == [file.input.element] else f"{file.input.element} in, {' and '.join(given)} out"


def size(file: File) -> str:
    return f"{len(file.data) / 1e6:.1f} MB" if len(file.data) >= 1e6 else f"{len(file.data) / 1e3:.1f} kB"


def operators(file: File) -> str:
    return ", ".join(f"{name} {count}" for name, _, count in sorted(file.operators) if count)


def engines(file: File) -> str:
    newer, wide = file.newer_than_1_15(), file.wide_pools()
    reasons = [f"does not have {', '.join(newer)}"] if newer else []
    reasons += [f"gives wrong numbers for {', '.join(wide)}"] if wide else []
    if reasons:
        return f"LiteRT only (64-bit boards and PCs); TensorFlow Lite 1.15, for armhf, {' and '.join(reasons)}"
    rounding = integer(file) and any(name == "MEAN" for name, _, _ in file.operators)
    return "LiteRT and TensorFlow Lite 1.15" + ("; on 32-bit ARM the latter's integer MEAN is one step off" if rounding else "")


def tolerance(file: File, manifest: dict, spread: float) -> float:
    """What other processors' kernels may differ by: twice what two sets of kernels differ by here, and some steps of the output."""
    output = manifest["output"]
    end = file.outputs[output["index"]]
    steps = 0.002 if end.element == "float32" and not integer(file) else 0.02
    step = end.scale / 4.0 if output["activation"] == "logit" else end.scale  # the sigmoid's slope is at most 1/4
    return min(0.5, math.ceil(1000.0 * max(steps, 4.0 * step, 2.0 * spread)) / 1000.0)


def figures(pictures: Pictures, manifest: dict, bundle: reference.Bundle, original: np.ndarray | None) -> dict:
    """Probabilities over the folder, as figures only: nothing that would tell one picture from another."""
    threshold = manifest["decision"]["threshold"]
    mine = np.array([probability(bundle, levels) for levels in pictures.levels])
    known = pictures.known()

    def quality(scores: np.ndarray) -> dict:
        spread = {"lowest": float(scores.min()), "mean": float(scores.mean()), "highest": float(scores.max())}
        if known is not None:
            spread |= {"auc": metrics.auc(known, scores), "accuracy": float(np.mean((scores >= threshold) == known))}
        return {key: round(value, 4) for key, value in spread.items()}

    result = {
        "count": len(mine),
        "positive": None if known is None else int(known.sum()),
        "threshold": threshold,
        "bundle": quality(mine),
    }
    if original is not None:
        gap = np.abs(mine - original)
        result |= {
            "source": quality(original),
            "decisions_equal": round(float(np.mean((mine >= threshold) == (original >= threshold))), 4),
            "difference_mean": round(float(gap.mean()), 5),
            "difference_max": round(float(gap.max()), 5),
        }
    return result


def agreement_lines(report: dict) -> list[str]:
    """The figures in words."""
    found = report.get("images")
    if found is None:
        return ["not measured: no --images"]
    lines = []
    if "source" in found:
        lines.append(
            f"decisions equal on {found['decisions_equal']:.1%} of {found['count']} images; probabilities differ by "
            f"{found['difference_mean']:.4f} on average, {found['difference_max']:.4f} at most"
        )
    else:
        lines.append("nothing to compare with: the file was wrapped as it is")
    for key, name in (("source", "source"), ("bundle", "bundle")):
        if key in found:
            row = found[key]
            known = f"; AUC {row['auc']:.3f}, accuracy {row['accuracy']:.3f}" if "auc" in row else ""
            lines.append(f"{name}: probabilities {row['lowest']:.3f} to {row['highest']:.3f}, mean {row['mean']:.3f}{known}")
    return lines


def warnings(report: dict) -> list[str]:
    """What a person should look at before using the bundle."""
    found, lines = report.get("images"), []
    if found is None:
        return lines
    if found.get("decisions_equal", 1.0) < AGREEMENT:
        lines.append(
            f"decisions: only {found['decisions_equal']:.1%} are as before; quantization hurts this model, calibrate "
            "on more and more varied images, or --keep-float"
        )
    row = found.get("source", found["bundle"])
    if row["highest"] - row["lowest"] < 0.05:
        lines.append("probabilities: nearly the same for every image; check --normalize, --color-order and --crop")
    if row.get("auc", 1.0) < 0.6:
        lines.append(f"AUC: {row['auc']:.2f}, not better than guessing; check --labels, --positive, --normalize and --crop")
    if report["kernel_spread"] > 0.1:
        lines.append(f"kernels: two sets of them differ by {report['kernel_spread']:.2f}; small errors grow in this model")
    return lines


def card(model: Path, file: File, manifest: dict, report: dict, lines: list[str]) -> str:
    """MODEL_CARD.md, with what the converter knows."""
    prepare, given = manifest["preprocess"], manifest["output"]
    crop, resize, normalize = prepare["crop"]["method"], prepare["resize"]["filter"], prepare["normalize"]["mode"]
    digest = hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else "of no single file"
    names = {
        "name": manifest["name"],
        "version": manifest["version"],
        "source": f"`{model.resolve().name}`, {report['source']['kind']}",
        "source_sha256": digest,
        "form": form(file),
        "size": size(file),
        "sha256": manifest["sha256"],
        "input": f"{manifest['input']['width']}x{manifest['input']['height']}, {manifest['input']['color_order']}",
        "preprocessing": f"crop {crop}, resize {resize}, normalize {normalize}",
        "labels": ", ".join(given["labels"]),
        "positive": ", ".join(given["positive"]),
        "threshold": str(manifest["decision"]["threshold"]),
        "engines": engines(file),
        "operators": operators(file),
        "agreement": "\n".join(f"- {line}" for line in lines),
    }
    return Path(__file__).with_name("model_card.md").read_text().format(**names)


def toml(table: dict) -> str:
    """A manifest as TOML: its values are numbers, strings, lists of them, tables, and one list of tables."""

    def simple(value: object) -> bool:
        return not isinstance(value, dict) and not (isinstance(value, list) and value and isinstance(value[0], dict))

    def lines(table: dict, path: str) -> list[str]:
        found = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items() if simple(value)]
        for key, value in table.items():
            if isinstance(value, dict):
                inner = lines(value, f"{path}{key}.")
                direct = any(simple(v) for v in value.values())
                found += ["", f"[{path}{key}]", *inner] if direct else inner
            elif not simple(value):
                for item in value:
                    found += ["", f"[[{path}{key}]]", *lines(item, "")]
        return found

    return "\n".join(lines(table, "")) + "\n"


def put_in_place(made: Path, out: Path) -> None:
    """`made` becomes `out`, whole; what was there is gone after that, not before."""
    if not out.exists():
        made.rename(out)
        return
    aside = made.with_name(made.name + ".old")
    try:
        out.rename(aside)
        made.rename(out)
    except BaseException:  # an interrupt, too
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside)
