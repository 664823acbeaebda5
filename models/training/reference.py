"""Classify files the way the Rust daemon must, with OpenCV and LiteRT only (requirements-reference.txt).

    reference.py --bundle DIR FILE...
    reference.py --bundle DIR --list FILE_WITH_PATHS

One JSON line a file on stdout: {"file","probability","decision","roi":{"x","y","width","height"}}; where a file cannot
be read, "error" instead, and exit 1 at the end.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from preprocess import brain_roi, read_bgr

FILTERS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


class Bundle:
    """A model bundle of the kind that models/braintumor is: uint8 RGB input, sigmoid probability, linear heat map."""

    def __init__(self, folder: Path):
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.interpreter = Interpreter(str(folder / self.manifest["file"]), num_threads=1)
        self.interpreter.allocate_tensors()
        self.outputs = self.interpreter.get_output_details()

    def roi(self, bgr: np.ndarray) -> tuple[int, int, int, int]:
        """(x, y, width, height) by the manifest's crop."""
        crop = self.manifest["preprocess"]["crop"]
        if crop["method"] == "none":
            return 0, 0, bgr.shape[1], bgr.shape[0]
        return brain_roi(bgr, crop["threshold"], crop["erode"], crop["dilate"], crop["margin"])

    def tensor(self, bgr: np.ndarray, roi: tuple[int, int, int, int]) -> np.ndarray:
        """uint8 [1, height, width, 3] as the model takes it: real = (pixel - mean) / std, q = round(real / scale) + zero."""
        size, prep = self.manifest["input"], self.manifest["preprocess"]
        x, y, width, height = roi
        crop = bgr[y : y + height, x : x + width]
        pixels = cv2.resize(crop, (size["width"], size["height"]), interpolation=FILTERS[prep["resize"]["filter"]])
        if size["color_order"] == "rgb":
            pixels = pixels[:, :, ::-1]
        norm = prep["normalize"]
        if norm["mode"] != "mean-std":
            raise SystemExit(f"preprocess.normalize.mode: {norm['mode']} is not supported here; expected mean-std")
        real = (pixels.astype(np.float64) - norm["mean"]) / norm["std"]
        scale, zero = self.interpreter.get_input_details()[0]["quantization"]
        return np.clip(np.rint(real / scale) + zero, 0, 255).astype(np.uint8)[None]

    def infer(self, tensor: np.ndarray) -> tuple[float, np.ndarray]:
        """(probability of the positive label, heat map as real numbers [7, 7])."""
        self.interpreter.set_tensor(self.interpreter.get_input_details()[0]["index"], tensor)
        self.interpreter.invoke()
        output = self.manifest["output"]
        return float(self.real(output["index"]).ravel()[0]), self.real(output["heatmap"]["index"]).squeeze()

    def real(self, position: int) -> np.ndarray:
        """Output tensor `position` in real numbers: (q - zero point) * scale."""
        detail = self.outputs[position]
        scale, zero = detail["quantization"]
        return (self.interpreter.get_tensor(detail["index"]).astype(np.float64) - zero) * scale

    def classify(self, path: str) -> dict:
        """The JSON line of one file, as a dict."""
        bgr = read_bgr(path)
        roi = self.roi(bgr)
        probability, _ = self.infer(self.tensor(bgr, roi))
        decision = "positive" if probability >= self.manifest["decision"]["threshold"] else "negative"
        box = dict(zip(("x", "y", "width", "height"), roi, strict=True))
        return {"file": path, "probability": probability, "decision": decision, "roi": box}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--list", type=Path, help="a text file, one path a line")
    parser.add_argument("files", nargs="*")
    args = parser.parse_args()
    files = args.files + (args.list.read_text().splitlines() if args.list else [])
    bundle, failed = Bundle(args.bundle), False
    for path in filter(None, files):
        try:
            line = bundle.classify(path)
        except ValueError as error:
            line, failed = {"file": path, "error": str(error)}, True
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
