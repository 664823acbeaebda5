"""A training's weights -> full-int8 TFLite file with uint8 input and outputs, and a check of what came out. `exact.py` is next.

    convert.py --data DIR --run RUN-SEED.npz --evaluation evaluation.json [--small] --out model.tflite

Two engines must load the file, LiteRT 2.1.4 and TensorFlow Lite 1.15 (2019), so only the operators and versions in
ALLOWED may appear, and the layout is fixed: see `check`. The ranges of all tensors are set here, not by the converter:

- batch norm is folded into the convolutions; weights are int8 by channel (the converter's rule);
- ReLU6 outputs are 0 to 6; the linear ones leave out the outermost 0.02 % of what was seen, which shortens the step by a third;
- what is added has the step and the zero point of the sum, so an addition of a residual loses nothing (and `exact.py` needs it).
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

import flatfile
from evaluate import EXITS
from network import BLOCKS, Heads
from preprocess import SIZE, to_float
from train import restore

# Operator -> highest version that TensorFlow Lite 1.15 has in int8.
ALLOWED = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "FULLY_CONNECTED": 4,
    "LOGISTIC": 2,
    "QUANTIZE": 1,
    "RESHAPE": 1,
}
# The map is drawn in full colour at 16 (imaging::heatmap): a cell's log-odds of 4. Below 0 it is empty: most cells of any picture
# are, and what they "speak against" is only a lesion in that place.
MAP_GAIN = 4.0
OUTPUTS = ("logit", "map")
CALIBRATION_IMAGES = 200
KEPT = 0.9999


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, help="evaluation.json with the calibration; without it, none")
    parser.add_argument("--small", action="store_true", help="the exit after block 10, with a map of 14x14")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with np.load(args.run) as saved:
        (net, heads), held = restore(dict(saved)), saved["ids"]
    seed = args.run.stem.rsplit("-", 1)[1]
    scale = json.loads(args.evaluation.read_text())["platt"][seed][[*EXITS][args.small]] if args.evaluation else [1.0, 0.0]
    plain = np.load(args.data / "plain-u8.npy", mmap_mode="r")
    usable = np.setdiff1d(np.arange(len(plain)), held)
    chosen = np.random.default_rng(7).choice(usable, CALIBRATION_IMAGES, replace=False)
    network = Deployed(net, heads, scale, args.small)
    network.calibrate(plain[np.sort(chosen)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(quantize(network))
    for line in check(args.out):
        print(line)


class Deployed(tf.Module):
    """The model as shipped: image [1, 224, 224, 3] -> probability [1, 1] and map [1, 7, 7, 1] (`small`: [1, 14, 14, 1]), with its ranges."""

    def __init__(self, net: keras.Model, heads: Heads, scale: list[float], small: bool):
        super().__init__()
        self.small, self.blocks = small, BLOCKS[:5] if small else BLOCKS
        score, cells, parts = (heads.score14, heads.map14, 4) if small else (heads.score, heads.map7, 1)
        weights = folded(net) | {
            "early": (heads.early.kernel, heads.early.bias),
            # Of the small one's 14x14 cells four means of 7x7 are taken, and of those, in here, the mean: see `exact.py`.
            "score": (scale[0] * np.tile(score.kernel, (parts, 1)) / parts, scale[0] * score.bias + scale[1]),
            "map": (MAP_GAIN * cells.kernel, MAP_GAIN * cells.bias),
        }
        self.weights = {name: (tf.constant(kernel), tf.constant(bias)) for name, (kernel, bias) in weights.items()}
        self.shifts: dict[str, list[np.ndarray]] | None = None
        self.ranges: dict[str, tuple[float, float]] = {}
        self.seen: dict[str, list[np.ndarray]] | None = None

    def __call__(self, image) -> list:
        """[probability, map] for float images [n, 224, 224, 3]."""
        x = self.conv("_conv_stem", self.ranged("image", image), 2, relu=True)
        channels, block = 32, 0
        for repeats, _, first_stride, expansion, out in self.blocks:
            for repeat in range(repeats):
                stride, name, y = (first_stride if repeat == 0 else 1), f"_blocks.{block}.", x
                if expansion != 1:
                    y = self.conv(name + "_expand_conv", y, 1, relu=True)
                y = self.conv(name + "_depthwise_conv", y, stride, relu=True)
                y = self.conv(name + "_project_conv", y, 1, relu=False)
                x = self.ranged(name + "sum", x + y) if stride == 1 and channels == out else y
                channels, block = out, block + 1
        x = self.conv("early" if self.small else "_conv_head", x, 1, relu=True)
        # Not a mean: TensorFlow Lite 1.15 on 32-bit ARM gives int8 MEAN one step too much in every channel.
        kernel, bias = self.weights["score"]
        pooled = tf.reshape(self.ranged("pool", tf.nn.avg_pool2d(x, 7, 7, "VALID")), (-1, len(kernel)))
        logit = self.ranged("logit", tf.matmul(pooled, kernel) + bias)
        kernel, bias = self.weights["map"]
        return [tf.sigmoid(logit), self.ranged("map", tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "VALID") + bias))]

    def conv(self, name: str, x, stride: int, relu: bool):
        kernel, bias = self.weights[name]

        def apply(kernel):
            if "depthwise" in name:
                return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME")
            return tf.nn.conv2d(x, kernel, stride, "SAME")

        y = apply(kernel)
        if self.shifts is not None:
            self.shifts.setdefault(name, []).append(tf.reduce_mean(apply(on_grid(kernel)) - y, (0, 1, 2)).numpy())
        return self.ranged(name, tf.nn.relu6(y + bias) if relu else y + bias)

    def ranged(self, name: str, x):
        """`x`, noted while calibrating, with its range's steps afterwards."""
        if self.seen is not None:
            # Of the many values inside every fifth is enough; of the outputs none is left out.
            self.seen.setdefault(name, []).append(x.numpy().ravel()[:: 1 if name in OUTPUTS else 5].copy())
        elif name in self.ranges:
            x = tf.quantization.fake_quant_with_min_max_args(x, *self.ranges[name], num_bits=8)
        return x

    def calibrate(self, pictures: np.ndarray) -> None:
        """Set the ranges from uint8 pictures [n, 224, 224, 3]."""
        # Bias correction (Nagel et al. 2019): what rounding the weights adds to a channel on average is taken off its bias.
        self.shifts = {}
        for start in range(0, len(pictures), 16):
            self(tf.constant(to_float(pictures[start : start + 16])))
        shifts, self.shifts = self.shifts, None
        for name, found in shifts.items():
            kernel, bias = self.weights[name]
            self.weights[name] = (on_grid(kernel), bias - np.mean(found, 0))
        self.seen = {}
        for start in range(0, len(pictures), 8):
            self(tf.constant(to_float(pictures[start : start + 8])))
        seen, self.seen = {name: np.concatenate(parts) for name, parts in self.seen.items()}, None
        for name, values in seen.items():
            if name == "image":
                low, high = -127 / 128, 1.0
            elif name in OUTPUTS:
                low, high = float(values.min()), float(values.max())
            elif name.endswith(("_project_conv", "sum")):
                low, high = (float(q) for q in np.quantile(values, [1 - KEPT, KEPT]))
            else:
                low, high = 0.0, min(6.0, float(np.quantile(values, KEPT)))
            step = (max(high, 1e-3) - min(low, 0.0)) / 255
            zero = round(-min(low, 0.0) / step)  # zero is a value of its own
            self.ranges[name] = (-zero * step, (255 - zero) * step)
        # A mean has the steps of what it is taken of, or the converter puts a rescaling in between, which `exact.py` refuses.
        self.ranges["pool"] = self.ranges["early" if self.small else "_conv_head"]
        first = 0
        for repeats, *_ in self.blocks:
            stage = [f"_blocks.{block}.{part}" for block in range(first, first + repeats) for part in ("_project_conv", "sum")]
            if repeats > 1:
                joined = [name for name in stage if name in self.ranges]
                step = max(max(-self.ranges[name][0], self.ranges[name][1]) for name in joined) / 127.5
                self.ranges |= dict.fromkeys(joined, (-128 * step, 127 * step))
            first += repeats


def folded(net: keras.Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Convolution -> (kernel, bias) with its batch norm inside: k * g / sqrt(v + eps), b - m * g / sqrt(v + eps)."""
    after = {layer.input.name: layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)}
    found = {}
    for layer in net.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            norm = after[layer.output.name]
            gain = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
            by_channel = gain[:, None] if isinstance(layer, keras.layers.DepthwiseConv2D) else gain
            found[layer.name] = (layer.kernel.numpy() * by_channel, norm.beta.numpy() - norm.moving_mean.numpy() * gain)
    return found


def on_grid(kernel) -> np.ndarray:
    """A kernel on the converter's int8 grid: 127 steps to the largest weight of an output channel.

    Depthwise kernels [k, k, channels, 1] are rounded so that each channel's sum is kept to half a step: what they see is smooth,
    so an error of the sum does more harm than the errors of the weights.
    """
    kernel = np.asarray(kernel)
    depthwise = kernel.shape[-1] == 1
    step = np.maximum(np.abs(kernel).max((0, 1, 3) if depthwise else (0, 1, 2)), 1e-8) / 127
    if not depthwise:
        return (np.rint(kernel / step) * step).astype(np.float32)
    exact = (kernel[..., 0] / step).reshape(-1, len(step))
    rounded = np.rint(exact)
    for channel, missing in enumerate(np.rint((exact - rounded).sum(0)).astype(int)):
        left, up = (exact - rounded)[:, channel], np.sign(missing)
        free = np.abs(rounded[:, channel] + up) <= 127
        best = np.argsort(np.where(free, -up * left, np.inf))[: abs(missing)]
        rounded[best, channel] += up
    return (rounded.reshape(kernel.shape[:3]) * step)[..., None].astype(np.float32)


def quantize(network: Deployed) -> bytes:
    """The TFLite file; batch fixed at 1."""
    concrete = tf.function(network.__call__).get_concrete_function(tf.TensorSpec((1, SIZE, SIZE, 3), tf.float32, name="image"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], network)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    # Asked for, but not looked at: every range is in the graph.
    converter.representative_dataset = lambda: iter([[np.zeros((1, SIZE, SIZE, 3), np.float32)]])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.uint8
    flat = flatbuffer_utils.read_model_from_bytearray(bytearray(converter.convert()))
    graph = flat.subgraphs[0]
    for tensor, name in zip([*graph.inputs, *graph.outputs], ["image", "probability", "map"], strict=True):
        graph.tensors[tensor].name = name
    return flatfile.pack(flat)


def check(path: Path) -> list[str]:
    """Raise where the file is not what the daemon's engines take; else describe it, a line a tensor and operator."""
    flat = flatbuffer_utils.read_model(str(path))
    graph = flat.subgraphs[0]
    lines = []
    for name, version, count in flatfile.operators(flat):
        lines.append(f"operator {name} version {version}: {count}")
        if version > ALLOWED.get(name, 0):
            raise SystemExit(f"{path}: operator {name} version {version} is not in TensorFlow Lite 1.15")
    expected = {"image": [[1, SIZE, SIZE, 3]], "probability": [[1, 1]], "map": [[1, 7, 7, 1], [1, 14, 14, 1]]}
    for role, indices in (("input", graph.inputs), ("output", graph.outputs)):
        for position, index in enumerate(indices):
            tensor = graph.tensors[index]
            name, shape = tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name, [int(n) for n in tensor.shape]
            scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
            lines.append(f"{role} {position}: {name} uint8 {shape}, scale {scale:.8g}, zero point {zero}")
            if tensor.type != schema.TensorType.UINT8 or shape not in expected[name]:
                raise SystemExit(f"{path}: {name} is not uint8 {expected[name]}")
            wanted = {"image": (1 / 128, 127), "probability": (1 / 256, 0)}.get(name, (scale, zero))
            if abs(scale - wanted[0]) > 1e-7 or zero != wanted[1]:
                raise SystemExit(f"{path}: {name} has scale {scale}, zero point {zero}; expected {wanted}")
    if [len(graph.inputs), len(graph.outputs)] != [1, 2]:
        raise SystemExit(f"{path}: one input and two outputs expected")
    return lines


if __name__ == "__main__":
    main()
