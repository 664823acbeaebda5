"""Reading a model file: Keras (`.h5`, `.keras`; Keras 2 and 3), a SavedModel folder, or a `.tflite` file.

What a file is, its content says, not its name. No code out of a file is run: Lambda layers and custom classes are refused
before Keras sees the file, and so are TensorFlow functions in a Keras 2 graph that are not plain arithmetic. (A SavedModel
is a TensorFlow graph: one from a stranger is a program from a stranger.)
"""

import dataclasses
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import keras
import tensorflow as tf

from common import Refused, first_line

KINDS = "give a Keras .h5 or .keras file, a SavedModel folder or a .tflite file"
# Layers of Keras 2 that stand for a TensorFlow function; only tf_keras knows them.
FUNCTION_LAYERS = {"TFOpLambda", "SlicingOpLambda"}
# The TensorFlow functions that such a layer may stand for: arithmetic on tensors, no files, no Python.
FUNCTION_MODULES = {"math", "nn", "image", "linalg", "__operators__"}
FUNCTIONS = set(
    "cast clip_by_value concat expand_dims identity pad reshape reverse shape slice split squeeze stack transpose".split()
)
MODELS = {"Functional", "Model", "Sequential"}


@dataclasses.dataclass
class Source:
    """A model file that was read."""

    kind: str
    """For people, such as `Keras file, read by Keras 3.15.1`."""
    tflite: bytes | None = None
    """The file, if it is a TFLite model already; the rest is for the others."""
    call: Callable | None = None
    """float32 [1, height, width, channels] -> a list of tensors."""
    holder: object = None
    """Keeps the variables alive."""
    shape: tuple[int | None, int | None, int | None] = (None, None, None)
    """Height, width, channels of the input; None where the model takes any."""
    layers: list[tuple[str, dict]] = dataclasses.field(default_factory=list)
    """Class name and configuration of each Keras layer, nested ones too."""


def load(path: Path) -> Source:
    """The model in the file or folder `path`."""
    if path.is_dir():
        if not (path / "saved_model.pb").is_file():
            raise Refused(f"model: {path}: a folder without saved_model.pb; {KINDS}")
        return saved_model(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise Refused(f"model: {path}: cannot be read ({error.strerror}); {KINDS}") from error
    if head[4:] == b"TFL3":
        return Source("TFLite file", tflite=path.read_bytes())
    if head == b"\x89HDF\r\n\x1a\n":
        return keras_file(path, "h5", config_of_h5(path))
    if head.startswith(b"PK"):
        return keras_file(path, "keras", config_of_zip(path))
    raise Refused(f"model: {path}: not a model file of a known kind; {KINDS}")


def config_of_h5(path: Path) -> dict:
    """The layers' description in an HDF5 file."""
    try:
        with h5py.File(path) as file:
            config = file.attrs.get("model_config")
    except OSError as error:
        raise Refused(f"model: {path}: is damaged ({first_line(error)}); copy it again") from error
    if config is None:
        raise Refused(f"model: {path}: holds weights only, no layers; save the whole model with model.save()")
    return json.loads(config)


def config_of_zip(path: Path) -> dict:
    """The layers' description in a `.keras` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a member's checksum is wrong")
            return json.loads(archive.read("config.json"))
    except KeyError as error:
        raise Refused(f"model: {path}: a zip file without config.json; {KINDS}") from error
    except zipfile.BadZipFile as error:
        raise Refused(f"model: {path}: is damaged ({first_line(error)}); copy it again") from error


def entries(config: object) -> Iterator[dict]:
    """Every serialized object in a configuration, at any depth."""
    if isinstance(config, dict):
        if isinstance(config.get("class_name"), str):
            yield config
        for value in config.values():
            yield from entries(value)
    elif isinstance(config, list):
        for value in config:
            yield from entries(value)


def layer_entries(config: dict) -> Iterator[dict]:
    """The model itself, its layers and the layers that are wrapped in others."""
    yield config
    inner = config.get("config")
    if isinstance(inner, dict):
        wrapped = inner.get("layer")
        for layer in [*inner.get("layers", []), *([wrapped] if isinstance(wrapped, dict) else [])]:
            yield from layer_entries(layer)
    elif isinstance(inner, list):  # Sequential before Keras 2.2.3
        for layer in inner:
            yield from layer_entries(layer)


def check_layers(path: Path, config: dict) -> list[tuple[str, dict]]:
    """Refuses what would run code from the file or needs code that is not in it; class name and configuration of each layer."""
    import tf_keras

    hint = "save a model of Keras' own layers, without the preprocessing if that is it"
    if any(entry["class_name"] == "Lambda" for entry in entries(config)):
        raise Refused(f"model: {path}: has a Lambda layer, which is code in the file and is not run; {hint}")
    layers = []
    for entry in layer_entries(config):
        name, inner = entry.get("class_name", ""), entry.get("config")
        operation = str(entry.get("module")).startswith(("keras.ops", "keras.src.ops"))
        known = hasattr(keras.layers, name) or hasattr(tf_keras.layers, name) or name in MODELS | FUNCTION_LAYERS or operation
        if not known:
            raise Refused(f"model: {path}: has the custom layer or model {name}, whose code is not in the file; {hint}")
        inner = inner if isinstance(inner, dict) else {}
        if name == "TFOpLambda":
            function = str(inner.get("function")).removeprefix("compat.v1.")
            if function not in FUNCTIONS and function.split(".")[0] not in FUNCTION_MODULES:
                raise Refused(f"model: {path}: calls the TensorFlow function {function}, which is not run; {hint}")
        layers.append((name, inner))
    return layers


def keras_file(path: Path, suffix: str, config: dict) -> Source:
    """A Keras model; Keras 3 reads it, or Keras 2 where that cannot."""
    import tf_keras

    layers = check_layers(path, config)
    readers = [(f"Keras {keras.__version__}", keras.models), (f"Keras {tf_keras.__version__} (tf_keras)", tf_keras.models)]
    if any(name in FUNCTION_LAYERS for name, _ in layers):
        readers.reverse()
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / f"model.{suffix}"  # Keras goes by the name
        named.symlink_to(path.resolve())
        for reader, models in readers:
            try:
                model = models.load_model(str(named), compile=False, safe_mode=True)
                break
            except Exception as error:  # noqa: BLE001 (whatever a strange file makes Keras raise)
                errors.append(f"{reader}: {first_line(error)}")
        else:
            raise Refused(f"model: {path}: cannot be loaded ({'; '.join(errors)}); save it again with model.save()")
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) != 1:
        raise Refused(f"model: {path}: has {len(inputs)} inputs; only models with one image input can be used")
    kind = f"Keras {'HDF5 ' if suffix == 'h5' else ''}file, read by {reader}"
    if whole_precision(model):
        kind += ", its half precision made whole"
    return Source(
        kind,
        call=lambda image: tf.nest.flatten(model(image, training=False)),
        holder=model,
        shape=image_shape(path, inputs[0].shape),
        layers=layers,
    )


def whole_precision(model: object) -> bool:
    """Lets layers that were trained in mixed precision work with float32, as their weights are; True if there were any."""
    mixed = [layer for layer in model._flatten_layers() if str(layer.dtype_policy.name).startswith("mixed_")]
    for layer in mixed:
        if isinstance(layer, keras.Layer):
            layer.dtype_policy = "float32"
        else:
            layer._set_dtype_policy("float32")
    return bool(mixed)


def saved_model(path: Path) -> Source:
    """A SavedModel by its serving signature."""
    try:
        model = tf.saved_model.load(str(path))
    except Exception as error:  # noqa: BLE001 (whatever a strange folder makes TensorFlow raise)
        raise Refused(f"model: {path}: cannot be loaded ({first_line(error)}); export it again") from error
    names = list(model.signatures)
    if "serving_default" not in names:
        raise Refused(f"model: {path}: has the signatures {names}, no serving_default; export it with model.export()")
    signature = model.signatures["serving_default"]
    inputs = signature.structured_input_signature[1]
    if len(inputs) != 1:
        raise Refused(f"model: {path}: has {len(inputs)} inputs; only models with one image input can be used")
    [(name, spec)] = inputs.items()
    if spec.dtype != tf.float32:
        raise Refused(f"model: {path}: takes {spec.dtype.name}; only float32 images can be used")
    shape = spec.shape if spec.shape.rank is not None else [None] * 4

    def call(image: tf.Tensor) -> list[tf.Tensor]:
        return tf.nest.flatten(signature(**{name: image}))

    return Source("SavedModel", call=call, holder=model, shape=image_shape(path, shape))


def image_shape(path: Path, shape: object) -> tuple[int | None, int | None, int | None]:
    """Height, width and channels out of the shape of an input."""
    extents = list(shape)
    if len(extents) != 4 or extents[3] not in (1, 3, None) or extents[0] not in (1, None):
        raise Refused(f"model: {path}: takes {extents}; expected one image [batch, height, width, 1 or 3 channels]")
    return tuple(extents[1:])
