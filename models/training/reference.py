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
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from preprocess import brain_roi, read_bgr

FILTERS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


# What Keras' preprocess_input takes from the first, second and third channel in its caffe mode.
CAFFE = np.array([103.939, 116.779, 123.68], np.float32)


def region(bgr: np.ndarray, manifest: dict) -> tuple[int, int, int, int]:
    """(x, y, width, height) by the manifest's crop."""
    crop = manifest.get("preprocess", {}).get("crop", {})
    if crop.get("method", "brain-contour") == "none":
        return 0, 0, bgr.shape[1], bgr.shape[0]
    return brain_roi(bgr, crop.get("threshold", 45), crop.get("erode", 2), crop.get("dilate", 2), crop.get("margin", 0))


def levels(bgr: np.ndarray, roi: tuple[int, int, int, int], manifest: dict) -> np.ndarray:
    """uint8 [height, width, channels] as the manifest's input wants it: cut out, resized, channels in its order."""
    size, resize = manifest["input"], manifest.get("preprocess", {}).get("resize", {})
    if resize.get("keep_aspect", False):
        raise SystemExit("preprocess.resize.keep_aspect: true is not supported here; expected false")
    x, y, width, height = roi
    crop = bgr[y : y + height, x : x + width]
    pixels = cv2.resize(crop, (size["width"], size["height"]), interpolation=FILTERS[resize.get("filter", "cubic")])
    order = size.get("color_order", "rgb")
    if order == "gray":
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)[:, :, None]
    return pixels[:, :, ::-1] if order == "rgb" else pixels


def normalized(pixels: np.ndarray, manifest: dict) -> np.ndarray:
    """float32 of the same shape, from levels 0-255 by the manifest's formula."""
    rule = manifest.get("preprocess", {}).get("normalize", {})
    real, channels = pixels.astype(np.float32), pixels.shape[-1]
    match rule.get("mode", "none"):
        case "none":
            return real
        case "zero-one":
            return real / np.float32(255.0)
        case "minus-one-one":
            return real / np.float32(127.5) - np.float32(1.0)
        case "caffe":
            return real - (CAFFE if channels == 3 else CAFFE[1])
        case "mean-std":
            mean, std = (np.array(rule[key][:channels], np.float32) for key in ("mean", "std"))
            return (real - mean) / std
    raise SystemExit(f"preprocess.normalize.mode: {rule['mode']} is not known; see models/README.md")


def label_scores(values: np.ndarray, output: dict) -> np.ndarray:
    """float64, a probability for each label of the manifest, from the score tensor's real numbers."""
    values, logits = values.astype(np.float64).ravel(), output["activation"] == "logit"
    if len(values) == 1:
        score = 1.0 / (1.0 + np.exp(-values[0])) if logits else np.clip(values[0], 0.0, 1.0)
        return np.array([1.0 - score, score])
    if logits:
        powers = np.exp(values - values.max())
        return powers / powers.sum()
    return np.clip(values, 0.0, 1.0)


def positive_probability(values: np.ndarray, output: dict) -> float:
    """Sum of the positive labels' probabilities, at most 1, from the score tensor's real numbers."""
    scores = label_scores(values, output)
    return float(min(1.0, sum(scores[output["labels"].index(label)] for label in output["positive"])))


class Bundle:
    """A model bundle (models/README.md), run as the daemon runs it. `resolver` chooses other kernels of the runtime."""

    def __init__(self, folder: Path, resolver: OpResolverType = OpResolverType.AUTO):
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        model = str(folder / self.manifest["file"])
        self.interpreter = Interpreter(model, num_threads=1, experimental_op_resolver_type=resolver)
        self.interpreter.allocate_tensors()
        self.input = self.interpreter.get_input_details()[0]
        self.outputs = self.interpreter.get_output_details()

    def roi(self, bgr: np.ndarray) -> tuple[int, int, int, int]:
        """(x, y, width, height) by the manifest's crop."""
        return region(bgr, self.manifest)

    def tensor(self, bgr: np.ndarray, roi: tuple[int, int, int, int]) -> np.ndarray:
        """[1, height, width, channels] as the model takes it."""
        return self.quantized(levels(bgr, roi, self.manifest))

    def quantized(self, pixels: np.ndarray) -> np.ndarray:
        """The tensor of `levels`; an integer one is round(real / scale) + zero point, halves away from zero."""
        real = normalized(pixels, self.manifest)
        if self.input["dtype"] == np.float32:
            return real[None]
        scale, zero = self.input["quantization"]
        steps = real / np.float32(scale)
        steps = np.trunc(steps + np.copysign(np.float32(0.5), steps)) + zero
        limits = np.iinfo(self.input["dtype"])
        return np.clip(steps, limits.min, limits.max).astype(self.input["dtype"])[None]

    def infer(self, tensor: np.ndarray) -> tuple[float, np.ndarray | None]:
        """(probability of the positive labels, heat map as real numbers [height, width] if there is one)."""
        self.interpreter.set_tensor(self.input["index"], tensor)
        self.interpreter.invoke()
        output = self.manifest["output"]
        heatmap = self.real(output["heatmap"]["index"]).squeeze() if "heatmap" in output else None
        return positive_probability(self.real(output.get("index", 0)), output), heatmap

    def real(self, position: int) -> np.ndarray:
        """Output tensor `position` in real numbers: (q - zero point) * scale, or the floats themselves."""
        detail = self.outputs[position]
        values = self.interpreter.get_tensor(detail["index"]).astype(np.float64)
        scale, zero = detail["quantization"]
        return values if detail["dtype"] == np.float32 else (values - zero) * scale

    def classify(self, path: str) -> dict:
        """The JSON line of one file, as a dict."""
        bgr = read_bgr(path)
        roi = self.roi(bgr)
        probability, _ = self.infer(self.tensor(bgr, roi))
        threshold = self.manifest.get("decision", {}).get("threshold", 0.5)
        decision = "positive" if probability >= threshold else "negative"
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
