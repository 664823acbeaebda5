"""What a model file says about how it wants to be used, and why it is taken to say so."""

import re
from pathlib import Path

from common import Refused

import images
from source import Source
from tflite import End, File, Graph

# A layer's name in Keras' own networks, the network, and what its preprocess_input does; the first one found counts.
NETWORKS = [
    ("block1_conv1", "VGG", "caffe"),
    ("conv2_block1_preact_bn", "ResNet V2", "minus-one-one"),
    ("conv2_block1_concat", "DenseNet", "mean-std:123.675,116.28,103.53:58.395,57.12,57.375"),
    ("conv2_block1_out", "ResNet", "caffe"),
    ("block_1_expand", "MobileNetV2", "minus-one-one"),
    ("conv_dw_1", "MobileNet", "minus-one-one"),
    ("mixed0", "Inception", "minus-one-one"),
    ("block2_sepconv1", "Xception", "minus-one-one"),
]
# Lowest and highest real value of a quantized input, and the formula that gives them. Not every calibration saw a white pixel.
RANGES = [((0.0, 1.0), "zero-one"), ((-1.0, 1.0), "minus-one-one"), ((0.0, 255.0), "none"), ((-123.68, 151.061), "caffe")]


def size(source: Source, given: tuple[int, int] | None) -> tuple[int, int, str]:
    """Height, width and why, of a model that is not TFLite yet."""
    height, width, _ = source.shape
    if height and width:
        if given and given != (height, width):
            raise Refused(f"size: {given[1]}x{given[0]} is not what the model takes; leave --size out, it takes {width}x{height}")
        return height, width, "the model's input"
    if given:
        return *given, "--size; the model takes any"
    for name, config in source.layers:
        if name == "Resizing":
            return int(config["height"]), int(config["width"]), "the model's Resizing layer; its input takes any size"
    raise Refused("size: the model takes pictures of any size; give the one it was trained with, --size WIDTHxHEIGHT")


def normalize(source: Source, model: Graph | File) -> tuple[str, str]:
    """Normalisation in the option's notation, and why."""
    names = {name for name, _ in source.layers}
    inside = sorted(names & {"Rescaling", "Normalization"})
    if inside:
        return "none", f"the model has a {inside[0]} layer"
    arithmetic = model.arithmetic_first()
    if arithmetic:
        return "none", f"the model itself begins with {arithmetic}"
    if model.input.element != "float32":
        low, high = (real(model.input, level) for level in ((0, 255) if model.input.element == "uint8" else (-128, 127)))
        for (first, last), mode in RANGES:
            if abs(low - first) < 0.02 * (last - first) and abs(high - last) < 0.15 * (last - first):
                return mode, f"the input's quantization covers {low:.4g} to {high:.4g}"
    layers = {config.get("name") for _, config in source.layers}
    for layer, network, mode in NETWORKS:
        if layer in layers:
            return (
                mode,
                f"a layer {layer} as in Keras' {network}, whose preprocess_input does this; if training did another, say so",
            )
    raise Refused(
        "normalize: the file does not say what the training did to the pixels; give --normalize zero-one (a division by 255), "
        "minus-one-one, caffe, none or mean-std:M:S"
    )


def real(end: End, level: int) -> float:
    return (level - end.zero_point) * end.scale


def outputs(model: Graph | File) -> tuple[int, int, int | None]:
    """Which output has the scores, how many they are, and which output is a class activation map."""

    def is_scores(shape: list[int]) -> bool:
        return len(shape) >= 1 and shape[-1] >= 1 and all(n == 1 for n in shape[:-1])

    def is_map(shape: list[int]) -> bool:
        spread = (len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)) and shape[0] == 1 and shape[1] * shape[2] > 1
        return spread and not is_scores(shape)

    shapes = [[abs(n) if i == 0 else n for i, n in enumerate(end.shape)] for end in model.outputs]
    maps = [i for i, shape in enumerate(shapes) if is_map(shape)]
    scores = [i for i, shape in enumerate(shapes) if is_scores(shape)]
    if len(scores) != 1 or len(maps) > 1 or len(scores) + len(maps) != len(shapes):
        raise Refused(
            f"outputs: {shapes}; expected one with scores [1, N] and at most one with an activation map [1, height, width, 1]"
        )
    return scores[0], shapes[scores[0]][-1], maps[0] if maps else None


def activation(model: Graph | File, index: int, count: int, given: str | None) -> tuple[str, str]:
    """`sigmoid`, `softmax` or `logit`, and why."""
    found = model.activation(index)
    chosen, why = (given, "--activation") if given else (found, "the model's last operator")
    if chosen is None:
        raise Refused("activation: the model's end does not say what its scores are; give --activation sigmoid, softmax or logit")
    if chosen == "softmax" and count == 1:
        raise Refused("activation: softmax over 1 score is always 1; train with sigmoid, or with two labels")
    if chosen == "logit":
        why += " has none; the daemon applies the sigmoid" if count == 1 else " has none; the daemon applies the softmax"
    return chosen, why


def labels(
    count: int, given: list[str] | None, positive: list[str] | None, folder: Path | None
) -> tuple[list[str], list[str], str]:
    """Labels, the positive ones, and why."""
    wanted = 2 if count == 1 else count
    kinds = f"{count} score{'s' if count > 1 else ''}"
    why = "--labels"
    if not given:
        found = images.subfolders(folder) if folder else []
        if count == 1:
            given, why = ["no_tumor", "tumor"], "one score; --labels gives other names, the second is the score's"
        elif len(found) == count:
            given, why = (
                [re.sub(r"[^A-Za-z0-9._+-]+", "_", name) for name in found],
                "the folders of the images in the order of Keras' loaders",
            )
        else:
            raise Refused(f"labels: none for {kinds}; give --labels with {count} names in the order of the training")
    if len(given) != wanted or len(set(given)) != wanted:
        raise Refused(f"labels: {','.join(given)} for {kinds}; give {wanted} different names in the order of the training")
    if not positive:
        if wanted == 2 and count == 1:
            positive = given[1:]
        else:
            negative = [label for label in given if images.is_negative(label)]
            if len(negative) != 1:
                raise Refused(f"positive: which of {','.join(given)} are positive is not clear; give --positive NAME,...")
            positive, why = [label for label in given if label not in negative], f"{why}; all but {negative[0]} are positive"
    strange = [label for label in positive if label not in given]
    if strange:
        raise Refused(f"positive: {strange[0]} is none of the labels {','.join(given)}; check the spelling")
    return given, positive, why
