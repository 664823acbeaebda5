"""Put a bundle together: manifest.toml, the golden phantoms with what the int8 model says of them, MODEL_CARD.md.

    bundle.py --model model.tflite --evaluation evaluation.json [--small] --out models/braintumor [--version V]

The model card's text is model_card.md, of the small network model_card_small.md; {placeholders} are filled from the evaluation.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np

import phantom
from evaluate import EXITS
from reference import Bundle

# file -> (seed, lesion, fixed values of phantom.RANGES); seeds were picked by hand so that the model is sure of them.
GOLDEN = {
    "phantom-lesion.png": (11, True, {"size": 224, "stripped": 1.0, "noise": 3.0}),
    "phantom-lesion-ring.png": (12, True, {"size": 200, "stripped": 1.0, "noise": 2.0, "lesion_core": 0.0}),
    "phantom-plain.png": (13, False, {"size": 224, "stripped": 1.0, "noise": 3.0, "ventricle": 0.0}),
    "phantom-plain-bright-ventricles.png": (14, False, {"size": 200, "stripped": 1.0, "noise": 2.0, "ventricle": 1.0}),
}
TEMPLATE = Path(__file__).with_name("manifest.template.toml")
# The network after all blocks, and the one after block 10: what the manifest says of them, and their card.
KINDS = {
    False: {"name": "braintumor", "version": "0.2.1", "network": "EfficientNet-Lite0", "cells": "7x7", "card": "model_card.md"},
    True: {
        "name": "braintumor-small", "version": "0.1.0", "network": "Blocks 0-10 of EfficientNet-Lite0", "cells": "14x14",
        "card": "model_card_small.md",
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, help="evaluation.json; without it no model card is written")
    parser.add_argument("--small", action="store_true", help="MODEL is the exit after block 10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", help="default: that of the shipped bundle of this kind")
    args = parser.parse_args()
    golden = args.out / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.model, args.out / "model.tflite")
    digest = hashlib.sha256(args.model.read_bytes()).hexdigest()
    kind, manifest = KINDS[args.small], TEMPLATE.read_text()
    version = args.version or kind["version"]
    for key, value in {"NAME": kind["name"], "NETWORK": kind["network"], "CELLS": kind["cells"], "VERSION": version, "SHA256": digest}.items():
        manifest = manifest.replace(f"@{key}@", value)
    (args.out / "manifest.toml").write_text(manifest)

    bundle = Bundle(args.out)
    for name, (seed, lesion, fixed) in GOLDEN.items():
        cv2.imwrite(str(golden / name), phantom.draw(np.random.default_rng(seed), lesion, **fixed))
        line = bundle.classify(str(golden / name))
        print(f"{name}: {line['probability']:.4f} {line['decision']}")
        manifest += f'\n[[golden.image]]\nfile = "golden/{name}"\nprobability = {line["probability"]:.8g}\n'
    (args.out / "manifest.toml").write_text(manifest)
    if args.evaluation:
        card = Path(__file__).with_name(kind["card"]).read_text()
        figures = json.loads(args.evaluation.read_text())
        for key, text in card_tables(figures, [*EXITS][args.small]).items():
            card = card.replace("{" + key + "}", text)
        (args.out / "MODEL_CARD.md").write_text(card.replace("{version}", version).replace("{sha256}", digest))


def card_tables(figures: dict, exit_name: str) -> dict[str, str]:
    """The placeholders of a model card: name -> Markdown. int8 and size are of the exit with that name."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def cell(row: dict, key: str) -> str:
        spread = row[f"{key}_90"]
        return number(row[key]) + (f" ({spread[0]:.2f}-{spread[1]:.2f})" if spread and row[key] is not None else "")

    def table(rows: list[dict]) -> str:
        head = "| on | no / yes | groups | AUC | accuracy | sensitivity | specificity | ECE |\n|---|---|---|---|---|---|---|---|\n"
        lines = [
            f"| {r['on']} | {r['no']} / {r['yes']} | {r['groups']} | {cell(r, 'auc')} | {cell(r, 'accuracy')} "
            f"| {cell(r, 'sensitivity')} | {cell(r, 'specificity')} | {number(r['ece'])} |"
            for r in rows
            if r["seed"] == seed
        ]
        return head + "\n".join(lines)

    def by_seed(rows: list[dict]) -> str:
        """Each seed by itself: `1 / 2 / 3`."""
        seeds, keys = sorted({r["seed"] for r in rows}), ("auc", "accuracy", "sensitivity", "specificity", "ece")
        lines = ["| on | AUC | accuracy | sensitivity | specificity | ECE |\n|---|---|---|---|---|---|"]
        for on in dict.fromkeys(r["on"] for r in rows):
            same = {r["seed"]: r for r in rows if r["on"] == on}
            values = ([same[seed][key] for seed in seeds if seed in same] for key in keys)
            cells = (number(None) if not any(v is not None for v in row) else " / ".join(map(number, row)) for row in values)
            lines.append(" | ".join([f"| {on}", *cells]) + " |")
        return "\n".join(lines)

    exits = figures["exits"]
    int8 = [entry for entry in figures["int8"] if entry["exit"] == exit_name]
    held = next(entry for entry in int8 if entry["run"].startswith("cv"))
    shipped = next(entry for entry in int8 if entry["run"].startswith("all"))
    seed = shipped["run"].rsplit("-", 1)[1]
    families = ", ".join(f"{f} {held['auc_float'][f]:.3f} / {held['auc_int8'][f]:.3f}" for f in held["auc_float"])
    return {
        "folds": table([r for r in exits["score"] if "without" not in r["on"]]),
        "left_out": table([r for r in exits["score"] if "without" in r["on"]]),
        "seeds": by_seed(exits["score"]),
        "smaller": table(exits["score of the smaller network"]),
        "int8": f"on {held['images']} pictures of a fold that its training never saw, float and int8 decide alike on "
        f"{100 * held['decisions_equal']:.1f} %, probabilities differ by {held['difference_mean']:.3f} on average and by up to "
        f"{held['difference_max']:.2f}, AUC float / int8: {families}. The shipped file, on all {shipped['images']} pictures: "
        f"{100 * shipped['decisions_equal']:.1f} %, {shipped['difference_mean']:.3f}, {shipped['difference_max']:.2f}",
        "milliseconds_one_thread": str(shipped["milliseconds_one_thread"]),
        "model_bytes": str(shipped["bytes"]),
    }


if __name__ == "__main__":
    main()
