"""Float weights -> full-int8 `model.tflite` with uint8 input and outputs, and a check of what came out.

    convert.py --index INDEX.csv --float DIR/float.npz --out model.tflite

Two engines must load the file, LiteRT 2.1.4 and TensorFlow Lite 1.15 (2019), so only the operators and versions in
ALLOWED may appear, and the layout is fixed: see `check`.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

import data
import flatfile
from network import backbone, deployed
from preprocess import SIZE, model_input

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
CALIBRATION_IMAGES = 300


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = load_float(args.float)
    train = data.with_weights([s for s in data.load(args.index) if s.part == "train"] + data.phantoms(40, seed=1, part="train"))
    chosen = data.epoch(train, CALIBRATION_IMAGES, np.random.default_rng(7))
    images = [model_input(train[i].image, train[i].roi) for i in chosen]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(quantize(model, images))
    for line in check(args.out):
        print(line)


def load_float(path: Path):
    """The deployed Keras model with the weights of a float.npz (see train.save)."""
    with np.load(path) as saved:
        net = backbone()
        net.set_weights([saved[f"w{i:03d}"] for i in range(len(net.get_weights()))])
        return deployed(net, saved["head_weight"], float(saved["head_bias"]))


def quantize(model, images: list[np.ndarray]) -> bytes:
    """Post-training quantization, ranges from `images` (uint8 [224, 224, 3] RGB); batch fixed at 1."""
    first = images[0].copy()
    first[0, 0], first[0, 1] = 0, 255  # both ends are seen, so that the input's scale is 1/128 exactly

    def representative():
        for image in [first, *images[1:]]:
            yield [((image.astype(np.float32) - 127.0) / 128.0)[None]]

    function = tf.function(lambda image: model(image, training=False))
    concrete = function.get_concrete_function(tf.TensorSpec((1, SIZE, SIZE, 3), tf.float32, name="image"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.uint8
    flat = flatbuffer_utils.read_model_from_bytearray(bytearray(converter.convert()))
    graph = flat.subgraphs[0]
    for tensor, name in zip([*graph.inputs, *graph.outputs], ["image", "probability", "cam"], strict=True):
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
    expected = {"image": [1, SIZE, SIZE, 3], "probability": [1, 1], "cam": [1, 7, 7, 1]}
    for role, indices in (("input", graph.inputs), ("output", graph.outputs)):
        for position, index in enumerate(indices):
            tensor = graph.tensors[index]
            name, shape = tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name, [int(n) for n in tensor.shape]
            scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
            lines.append(f"{role} {position}: {name} uint8 {shape}, scale {scale:.8g}, zero point {zero}")
            if tensor.type != schema.TensorType.UINT8 or shape != expected[name]:
                raise SystemExit(f"{path}: {name} is not uint8 {expected[name]}")
            wanted = {"image": (1 / 128, 127), "probability": (1 / 256, 0)}.get(name, (scale, zero))
            if abs(scale - wanted[0]) > 1e-7 or zero != wanted[1]:
                raise SystemExit(f"{path}: {name} has scale {scale}, zero point {zero}; expected {wanted}")
    if [len(graph.inputs), len(graph.outputs)] != [1, 2]:
        raise SystemExit(f"{path}: one input and two outputs expected")
    return lines


if __name__ == "__main__":
    main()
