"""Model files of all kinds, made here, through the converter and then through the real program (`make test-convert`).

Every bundle is checked by `scansentry check --offline`, and `scansentry classify` must give the probabilities that the source
model gives in Keras, fed by the original application's own steps. SCANSENTRY names the program, default target/debug/scansentry.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent.parent / "training")]
import assemble
import conclude
import convert
import cv2
import keras
import numpy as np
import phantom
import tensorflow as tf
import tf_keras
import tflite
from preprocess import brain_roi
from reference import Bundle

PROGRAM = os.environ.get("SCANSENTRY", str(HERE.parents[2] / "target/debug/scansentry"))
LABELS4 = ["glioma", "meningioma", "notumor", "pituitary"]
TINT = np.array([0.7, 0.85, 1.0])  # so that the order of the channels shows
PICTURES = [((bgr * TINT).astype(np.uint8), lesion) for bgr, lesion in phantom.pool(24, seed=5)]  # (BGR, 0 or 1)
logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
tf.config.threading.set_intra_op_parallelism_threads(2)


def setUpModule() -> None:  # noqa: N802 (unittest's name)
    global ROOT, IMAGES, IMAGES4
    ROOT = Path(tempfile.mkdtemp(prefix="scansentry-convert-"))
    unittest.addModuleCleanup(subprocess.run, ["rm", "-rf", str(ROOT)], check=True)
    IMAGES, IMAGES4 = ROOT / "images", ROOT / "images4"
    for i, (bgr, lesion) in enumerate(PICTURES):
        for folder, name in ((IMAGES, ["no", "yes"][lesion]), (IMAGES4, LABELS4[i % 4])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"{i}.png"), bgr)
    (IMAGES / "no" / "notes.png").write_text("no image at all")


def seen(bgr: np.ndarray, width: int, height: int) -> np.ndarray:
    """The original application's crop and resize: BGR uint8 [height, width, 3]."""
    x, y, w, h = brain_roi(bgr)
    return cv2.resize(bgr[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_CUBIC)


def rgb(width: int, height: int) -> np.ndarray:
    """All pictures, float32 [n, height, width, 3] in RGB, levels 0-255."""
    return np.stack([seen(bgr, width, height)[:, :, ::-1] for bgr, _ in PICTURES]).astype(np.float32)


def spread(model, inputs: np.ndarray, k=keras):
    """Gives the last Dense layer such weights that its scores differ between pictures: along the features' widest directions."""
    dense = model.layers[-1]
    features = np.concatenate([k.Model(model.inputs, dense.input)(part[None]).numpy() for part in inputs]).astype(np.float32)
    centre = features.mean(axis=0)
    directions = np.linalg.svd(features - centre, full_matrices=False)[2][: max(dense.units, 2)]
    weights = directions[: dense.units].T
    logits = (features - centre) @ weights
    weights = weights * (1.5 / logits.std(axis=0))
    dense.set_weights([weights, -(centre @ weights)])
    return model


def sequential(k=keras, size: int = 96, units: int = 1, activation: str | None = "sigmoid", scale: float = 1.0 / 255.0):
    """A small model with a Rescaling layer (unless `scale` is 0) and the layers that most have."""
    layers = k.layers
    first = [layers.Rescaling(scale)] if scale else []
    model = k.Sequential(
        [
            k.Input((size, size, 3)),
            *first,
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(4),
            layers.SeparableConv2D(12, 3, activation="relu"),
            layers.AveragePooling2D(4),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(units, activation=activation),
        ]
    )
    return spread(model, rgb(size, size) / (1.0 if scale else 255.0), k)


def predicted(model, inputs: np.ndarray) -> np.ndarray:
    """What the model gives for each picture, one at a time; [n, scores]."""
    return np.concatenate([np.asarray(tf.nest.flatten(model(part[None], training=False))[0]) for part in inputs])


def run(model: Path, out: Path, *options: str, images: Path | None = None, code: int = 0, process: bool = False):
    """What the converter prints, as `stdout` and `stderr`; run in this process, which has TensorFlow loaded, or in its own."""
    folder = [] if images is None else ["--images", str(images)]
    command = [str(HERE.parent / "convert.py"), "--model", str(model), "--out", str(out), *folder, *options]
    if process:
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    else:
        stdout, stderr = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", command),
            mock.patch.object(convert, "silence"),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            try:
                exit_code = convert.main()
            except SystemExit as error:
                exit_code = error.code
        found = subprocess.CompletedProcess(command, exit_code, stdout.getvalue(), stderr.getvalue())
    assert found.returncode == code, f"exit {found.returncode}: {found.stdout}{found.stderr}"
    return found


class Converted(unittest.TestCase):
    """A model goes in, the program gives the same answers."""

    def setUp(self) -> None:  # noqa: N802 (unittest's name)
        keras.utils.set_random_seed(1)

    def bundle(
        self,
        model: Path,
        expected: np.ndarray,
        *options: str,
        images: Path | None = None,
        within: float = 0.1,
        process: bool = False,
    ) -> tuple[str, dict]:
        """Converts, and holds the program's probabilities against `expected` (one a picture) and against Python's of the bundle.

        The converter's lines and its report.
        """
        out = ROOT / "bundles" / self.id().rsplit(".", 1)[-1] / model.stem
        said = run(model, out, *options, images=images or IMAGES, process=process).stdout
        environment = os.environ | {
            "SCANSENTRY__MODEL__BUNDLE": str(out),
            "SCANSENTRY__WATCH__FOLDER": str(IMAGES),
            "SCANSENTRY__STATE__DIR": str(ROOT / "state"),
            "SCANSENTRY_CONFIG": os.devnull,
        }
        checked = subprocess.run([PROGRAM, "check", "--offline"], env=environment, capture_output=True, text=True, check=False)
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)

        files = [str(IMAGES / ["no", "yes"][lesion] / f"{i}.png") for i, (_, lesion) in enumerate(PICTURES)]
        lines = subprocess.run(
            [PROGRAM, "classify", "--bundle", str(out), *files], capture_output=True, text=True, check=True
        ).stdout
        ours = np.array([json.loads(line)["probability"] for line in lines.splitlines()])
        self.assertGreater(ours.max() - ours.min(), 0.3, "the pictures must make a difference")
        reference = Bundle(out)
        python = np.array([reference.classify(file)["probability"] for file in files])
        self.assertLess(np.abs(ours - python).max(), max(0.0101, reference.manifest["golden"]["tolerance"]))
        self.assertLess(np.abs(ours - expected).max(), within)

        self.assertEqual(
            sorted(p.name for p in out.iterdir()), ["MODEL_CARD.md", "agreement.json", "golden", "manifest.toml", "model.tflite"]
        )
        self.assertEqual([p.name for p in out.parent.iterdir() if p.name.startswith(".")], [], "nothing half-made is left")
        self.assertEqual(out.stat().st_mode & 0o777, 0o755)
        report = json.loads((out / "agreement.json").read_text())
        if images is None:
            self.assertIn("skipped:     no/notes.png: no JPEG, PNG, BMP or TIFF", said)
            self.assertEqual((report["images"]["count"], report["images"]["positive"]), (24, 12))
        self.assertNotIn(".png", (out / "agreement.json").read_text(), "no names of the user's files")
        return said, report

    def test_sequential_keras_3(self) -> None:
        model, path = sequential(), ROOT / "sequential.keras"
        model.save(path)
        said, report = self.bundle(path, predicted(model, rgb(96, 96))[:, 0])
        self.assertIn("normalize:   none (the model has a Rescaling layer)", said)
        self.assertIn("engines:     LiteRT and TensorFlow Lite 1.15", said)
        self.assertGreaterEqual(report["images"]["decisions_equal"], 0.9)
        self.assertIn("auc", report["images"]["bundle"])
        self.assertEqual(report["float_operators"], [])

    def test_functional_h5_that_does_not_say_its_normalisation(self) -> None:
        layers = keras.layers
        image = keras.Input((64, 80, 3))
        x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(image)
        x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)])
        x = layers.Concatenate()([layers.MaxPooling2D(2)(x), layers.AveragePooling2D(2)(x)])
        model = keras.Model(image, layers.Dense(2, activation="softmax")(layers.Flatten()(layers.MaxPooling2D(4)(x))))
        pictures = rgb(80, 64) / 127.5 - 1.0
        spread(model, pictures)
        path = ROOT / "functional.h5"
        model.save(path)
        error = run(path, ROOT / "none", "--labels", "no,yes", images=IMAGES, code=1).stderr
        self.assertRegex(error, r"^normalize: the file does not say .*; give --normalize [^\n]*\n$")
        options = ["--labels", "no,yes", "--normalize", "minus-one-one", "--name", "mine", "--version", "2.0", "--threshold", "0.4"]
        self.bundle(path, predicted(model, pictures)[:, 1], *options)
        manifest = (ROOT / "bundles" / self._testMethodName / "functional/manifest.toml").read_text()
        for line in ('name = "mine"', 'version = "2.0"', "threshold = 0.4", 'positive = ["yes"]', "width = 80", "height = 64"):
            self.assertIn(line, manifest)

    def test_resizing_and_rescaling_inside(self) -> None:
        for extent, wanted in ((128, 128), (None, 64)):
            inner = sequential(size=64)
            model = keras.Sequential([keras.Input((extent, extent, 3)), keras.layers.Resizing(64, 64), *inner.layers])
            path = ROOT / f"resizing-{extent}.keras"
            model.save(path)
            with self.subTest(extent):
                said, report = self.bundle(path, predicted(model, rgb(wanted, wanted))[:, 0])
                self.assertIn(f"input:       {wanted}x{wanted}", said)
                self.assertEqual(report["newer_than_tensorflow_lite_1_15"], ["RESIZE_BILINEAR version 3"])
                self.assertIn("engines:     LiteRT only", said)

    def test_softmax_over_four_labels_named_by_the_folders(self) -> None:
        model, path = sequential(units=4, activation="softmax"), ROOT / "four.keras"
        model.save(path)
        said, _ = self.bundle(path, 1.0 - predicted(model, rgb(96, 96))[:, 2], images=IMAGES4)
        self.assertIn("labels:      glioma, meningioma, notumor, pituitary; positive: glioma, meningioma, pituitary", said)

    def test_keras_2_h5(self) -> None:
        model, path = sequential(tf_keras), ROOT / "keras2.h5"
        model.save(path)
        self.bundle(path, predicted(model, rgb(96, 96))[:, 0])

    def test_keras_2_h5_with_tensorflow_functions_in_its_graph(self) -> None:
        inner = sequential(tf_keras, scale=0.0)
        image = tf_keras.Input((96, 96, 3))
        model = tf_keras.Model(image, inner(tf.cast(image, tf.float32) / 255.0))
        path = ROOT / "operators.h5"
        model.save(path)
        said, _ = self.bundle(path, predicted(model, rgb(96, 96))[:, 0])
        self.assertIn("(tf_keras)", said)
        self.assertRegex(said, r"normalize: +none \(the model itself begins with (RealDiv|Mul)\)")

    def test_mixed_precision(self) -> None:
        for k, suffix in ((keras, "keras"), (tf_keras, "h5")):
            k.mixed_precision.set_global_policy("mixed_float16")
            self.addCleanup(k.mixed_precision.set_global_policy, "float32")
            model, path = sequential(k), ROOT / f"mixed.{suffix}"
            model.save(path)
            with self.subTest(k.__name__):
                said, report = self.bundle(path, predicted(model, rgb(96, 96))[:, 0], "--force")
                self.assertIn("its half precision made whole", said)
                self.assertEqual(report["float_operators"], [])

    def test_saved_model_of_keras_3_and_2(self) -> None:
        for k in (keras, tf_keras):
            model, path = sequential(k), ROOT / f"saved-{k.__name__}"
            model.export(path) if k is keras else tf.saved_model.save(model, str(path))
            with self.subTest(k.__name__):
                said, report = self.bundle(path, predicted(model, rgb(96, 96))[:, 0])
                self.assertIn("normalize:   none (the model itself begins with", said)
                self.assertNotIn("SHAPE", {operator["name"] for operator in report["operators"]})

    def test_grey_logits_with_an_activation_map(self) -> None:
        layers = keras.layers
        image = keras.Input((96, 96, 1))
        cells = layers.MaxPooling2D(4)(layers.Conv2D(8, 3, strides=4, activation="relu")(layers.Rescaling(1 / 255.0)(image)))
        score = layers.Dense(1)(layers.Flatten()(cells))
        grey = np.stack([cv2.cvtColor(seen(bgr, 96, 96), cv2.COLOR_BGR2GRAY) for bgr, _ in PICTURES]).astype(np.float32)[..., None]
        spread(keras.Model(image, score), grey)
        model, path = keras.Model(image, [score, layers.Conv2D(1, 1)(cells)]), ROOT / "cam.keras"
        model.save(path)
        said, _ = self.bundle(path, 1.0 / (1.0 + np.exp(-predicted(model, grey)[:, 0])))
        self.assertIn("color order: gray", said)
        self.assertIn("logit (the model's last operator has none; the daemon applies the sigmoid), and an activation map", said)
        self.assertIn("[output.heatmap]", (ROOT / "bundles" / self._testMethodName / "cam/manifest.toml").read_text())

    def test_vgg16_of_the_original_application(self) -> None:
        layers = keras.layers
        vgg = keras.applications.VGG16(include_top=False, weights=None, input_shape=(224, 224, 3))
        model = keras.Sequential([vgg, layers.Flatten(), layers.Dropout(0.5), layers.Dense(1, activation="sigmoid")])
        # As the application: what imread gives, BGR, goes through preprocess_input, which turns the channels round.
        app = np.stack([seen(bgr, 224, 224) for bgr, _ in PICTURES]).astype(np.float32)
        app = keras.applications.vgg16.preprocess_input(app)
        spread(model, app)
        path = ROOT / "braintumor.h5"
        model.save(path)
        said, report = self.bundle(path, predicted(model, app)[:, 0], process=True)
        self.assertIn("normalize:   caffe (a layer block1_conv1 as in Keras' VGG", said)
        self.assertEqual(report["newer_than_tensorflow_lite_1_15"], [])
        self.assertLess(float(said.split("memory:")[1].split()[0]), 16.0)
        print(f"\nVGG16: {said.split('memory:')[1].splitlines()[0].strip()}", file=sys.stderr)

    def test_tflite_files_are_wrapped(self) -> None:
        model = sequential(scale=0.0)
        pictures = rgb(96, 96) / 255.0
        expected = predicted(model, pictures)[:, 0]
        for element in (None, tf.uint8, tf.int8):
            converter = tf.lite.TFLiteConverter.from_keras_model(model)  # an open batch, as most files have
            if element:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                converter.representative_dataset = lambda: ([picture[None]] for picture in pictures)
                converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
                converter.inference_input_type = converter.inference_output_type = element
            name = element.name if element else "float32"
            path = ROOT / f"{name}.tflite"
            path.write_bytes(converter.convert())
            with self.subTest(name):
                options = [] if element else ["--normalize", "zero-one"]
                said, report = self.bundle(path, expected, *options, within=0.1 if element else 0.01)
                self.assertEqual(report["model"]["element"], name)
                self.assertIn("nothing to compare with", said)
                self.assertNotIn("SHAPE", {operator["name"] for operator in report["operators"]})
                if element:
                    self.assertIn("zero-one (the input's quantization covers 0 to 0.9", said)

    def test_tflite_without_images_is_wrapped_byte_for_byte(self) -> None:
        out = ROOT / "shipped"
        shipped = HERE.parent.parent / "braintumor"
        run(shipped / "model.tflite", out, "--normalize", "mean-std:127:128")
        self.assertEqual((out / "model.tflite").read_bytes(), (shipped / "model.tflite").read_bytes())
        picture = str(shipped / "golden/phantom-lesion.png")
        self.assertEqual(Bundle(out).classify(picture)["probability"], Bundle(shipped).classify(picture)["probability"])

    def test_an_integer_pool_over_many_cells_is_not_for_tensorflow_lite_1_15(self) -> None:
        layers = keras.layers
        for cells, expected in ((14, []), (28, ["AVERAGE_POOL_2D of 28x28"])):
            image = keras.Input((cells, cells, 3))
            model = keras.Model(image, layers.Dense(1)(layers.Flatten()(layers.AveragePooling2D(cells)(image))))
            pictures = rgb(cells, cells)
            graph = tflite.Graph(lambda x, model=model: [model(x)], cells, cells, 3)
            integer = tflite.File(graph.convert(list(pictures)))
            self.assertEqual(integer.wide_pools(), expected)
            self.assertEqual("LiteRT only" in assemble.engines(integer), bool(expected))
            self.assertEqual(tflite.File(graph.convert(None)).wide_pools(), [])

    def test_a_model_that_int8_ruins_is_told_and_can_stay_float(self) -> None:
        # One unit of a layer has weights 300 times the others', and nothing comes of it: the others round to 0.
        model = sequential()
        features = keras.Model(model.inputs, model.layers[-1].input)
        weights, bias = model.layers[-1].get_weights()
        big = keras.layers.Dense(2)
        last = keras.layers.Dense(1, activation="sigmoid")
        ruined = keras.Model(features.inputs, last(big(features.output)))
        big.set_weights(
            [np.concatenate([weights, np.full_like(weights, 300.0 * np.abs(weights).max())], axis=1), np.array([bias[0], 0.0])]
        )
        last.set_weights([np.array([[1.0], [0.0]]), np.zeros(1)])
        path = ROOT / "ruined.keras"
        ruined.save(path)
        said = run(path, ROOT / "ruined", images=IMAGES).stdout
        self.assertRegex(said, r"WARN: +decisions: only .* --keep-float")
        said, report = self.bundle(path, predicted(ruined, rgb(96, 96))[:, 0], "--keep-float", within=0.005)
        self.assertEqual((report["model"]["element"], report["images"]["decisions_equal"]), ("float32", 1.0))
        self.assertNotIn("WARN:        decisions", said)


@keras.saving.register_keras_serializable(package="mine")
class Mine(keras.layers.Layer):
    """A layer whose code is not in the file."""

    def call(self, x):
        return x * 2.0


class Refusals(unittest.TestCase):
    """One line says what is wrong and what to do; nothing is left behind."""

    def check(
        self, pattern: str, model: Path, *options: str, images: Path | None = None, code: int = 1, process: bool = False
    ) -> None:
        place = Path(tempfile.mkdtemp(dir=ROOT))
        found = run(model, place / "out", *options, images=images, code=code, process=process)
        self.assertRegex(found.stderr, rf"\A{pattern}[^\n]*\n\Z")
        self.assertIn("; ", found.stderr)
        self.assertEqual(list(place.iterdir()), [])

    @classmethod
    def setUpClass(cls) -> None:
        cls.good = ROOT / "good.keras"
        sequential().save(cls.good)

    def test_code_in_the_file(self) -> None:
        image = keras.Input((32, 32, 3))
        pooled = keras.layers.GlobalAveragePooling2D()
        for name, layer in (("Lambda", keras.layers.Lambda(lambda x: x / 255.0)), ("custom", Mine())):
            model = keras.Model(image, keras.layers.Dense(1, activation="sigmoid")(pooled(layer(image))))
            for suffix in ("keras", "h5"):
                path = ROOT / f"{name}.{suffix}"
                model.save(path)
                with self.subTest(path.name):
                    self.check(rf"model: .*{path.name}: has (a|the) {name} layer", path, images=IMAGES)

    def test_a_tensorflow_function_that_touches_files(self) -> None:
        image = tf_keras.Input((8, 8, 3))
        flat = tf_keras.layers.Flatten()(tf.cast(image, tf.float32))
        model = tf_keras.Model(image, tf_keras.layers.Dense(1, activation="sigmoid")(flat))
        path = ROOT / "writes.h5"
        model.save(path)
        import h5py

        with h5py.File(path, "a") as file:
            config = file.attrs["model_config"]
            self.assertIn('"function": "cast"', config)
            file.attrs["model_config"] = config.replace('"function": "cast"', '"function": "io.write_file"')
        self.check("model: .*: calls the TensorFlow function io.write_file, which is not run", path, images=IMAGES)

    def test_labels(self) -> None:
        self.check("labels: a,b,c for 1 score; give 2 different names", self.good, "--labels", "a,b,c", images=IMAGES, process=True)
        self.check("positive: tumour is none of the labels no_tumor,tumor", self.good, "--positive", "tumour", images=IMAGES)
        four = ROOT / "four-labels.keras"
        sequential(units=4, activation="softmax").save(four)
        self.check("labels: none for 4 scores; give --labels with 4 names", four, images=IMAGES)
        self.check("labels: a,b for 4 scores; give 4 different names", four, "--labels", "a,b", images=IMAGES)
        self.check("positive: which of a,b,c,d are positive is not clear", four, "--labels", "a,b,c,d", images=IMAGES)

    def test_images(self) -> None:
        few = ROOT / "few"
        few.mkdir()
        for i, (bgr, _) in enumerate(PICTURES[:19]):
            cv2.imwrite(str(few / f"{i}.jpg"), bgr)
        (few / "readme.txt").write_text("no image")
        self.check("images: .*few: 19 readable images of 20 files; expected at least 20", self.good, images=few)
        self.check("images: none; give --images", self.good)
        self.check("images: .*nowhere: is not a folder", self.good, images=ROOT / "nowhere")

    def test_models_of_another_kind(self) -> None:
        one, two = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
        both = keras.layers.Flatten()(keras.layers.Add()([one, two]))
        model, path = keras.Model([one, two], keras.layers.Dense(1, activation="sigmoid")(both)), ROOT / "two.keras"
        model.save(path)
        self.check("model: .*: has 2 inputs; only models with one image input", path, images=IMAGES)
        svd = tf.Module()
        svd.serve = tf.function(
            lambda image: tf.sigmoid(tf.reduce_sum(tf.linalg.svd(image[..., 0], compute_uv=False), axis=-1, keepdims=True)),
            input_signature=[tf.TensorSpec((None, 32, 32, 3))],
        )
        tf.saved_model.save(svd, str(ROOT / "svd"), signatures=svd.serve)
        pattern = r"model: cannot be made a TFLite file \(TFLite has nothing for tf.Svd\)"
        self.check(pattern, ROOT / "svd", "--normalize", "none", images=IMAGES)
        table = keras.Sequential([keras.Input((30,)), keras.layers.Dense(1, activation="sigmoid")])
        table.save(ROOT / "table.h5")
        self.check(r"model: .*: takes \[None, 30\]; expected one image", ROOT / "table.h5", images=IMAGES)
        keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(2, 3)]).save(ROOT / "map.keras")
        self.check(
            r"outputs: \[\[1, 30, 30, 2\]\]; expected one with scores", ROOT / "map.keras", "--normalize", "none", images=IMAGES
        )
        table.save_weights(ROOT / "only.weights.h5")
        self.check("model: .*: holds weights only", ROOT / "only.weights.h5", images=IMAGES)
        (ROOT / "text.h5").write_text("not a model")
        self.check("model: .*: not a model file of a known kind", ROOT / "text.h5", images=IMAGES)
        (ROOT / "cut.keras").write_bytes(self.good.read_bytes()[:2000])
        self.check("model: .*: is damaged", ROOT / "cut.keras", images=IMAGES)
        (ROOT / "cut.tflite").write_bytes((HERE.parent.parent / "braintumor/model.tflite").read_bytes()[:5000])
        self.check("model: is not an intact TFLite file", ROOT / "cut.tflite")
        self.check("model: .*absent.h5: cannot be read", ROOT / "absent.h5", images=IMAGES)

    def test_what_is_there_stays(self) -> None:
        out = ROOT / "there"
        shipped = HERE.parent.parent / "braintumor/model.tflite"
        options = ["--normalize", "mean-std:127:128"]
        run(shipped, out, *options)
        before = (out / "manifest.toml").read_text()
        self.assertRegex(run(shipped, out, *options, "--version", "2", code=1).stderr, "out: .*there: is there already; .*--force")
        self.assertRegex(run(self.good, out, "--force", "--labels", "a", images=IMAGES, code=1).stderr, "^labels: ")
        self.assertEqual((out / "manifest.toml").read_text(), before)
        run(shipped, out, *options, "--version", "2", "--force")
        self.assertIn('version = "2"', (out / "manifest.toml").read_text())
        self.assertRegex(
            run(shipped, IMAGES, *options, "--force", code=1).stderr, "out: .*images: is no model bundle and is not replaced"
        )

    def test_a_link_to_a_bundle_is_replaced_where_it_leads(self) -> None:
        there, link = ROOT / "linked", ROOT / "link"
        shipped = HERE.parent.parent / "braintumor/model.tflite"
        options = ["--normalize", "mean-std:127:128"]
        run(shipped, there, *options)
        link.symlink_to(there)
        run(shipped, link, *options, "--version", "2", "--force")
        self.assertTrue(link.is_symlink())
        self.assertIn('version = "2"', (there / "manifest.toml").read_text())

    def test_an_interrupt_leaves_the_bundle_that_was_there(self) -> None:
        made, out = ROOT / "made", ROOT / "kept"
        for folder, text in ((made, "new"), (out, "old")):
            folder.mkdir()
            (folder / "manifest.toml").write_text(text)
        rename = Path.rename

        def interrupted(self: Path, target: Path) -> Path:
            if self == made:
                raise KeyboardInterrupt
            return rename(self, target)

        with mock.patch.object(Path, "rename", interrupted), self.assertRaises(KeyboardInterrupt):
            assemble.put_in_place(made, out)
        self.assertEqual((out / "manifest.toml").read_text(), "old")
        assemble.put_in_place(made, out)
        self.assertEqual(((out / "manifest.toml").read_text(), made.exists()), ("new", False))

    def test_scores_with_an_axis_more_are_no_map(self) -> None:
        def found(*shapes: list[int]) -> tuple[int, int, int | None]:
            ends = [tflite.End("float32", shape, 0.0, 0) for shape in shapes]
            return conclude.outputs(mock.Mock(outputs=ends))

        self.assertEqual(found([1, 1, 4]), (0, 4, None))
        self.assertEqual(found([1, 7, 7], [1, 1, 4]), (1, 4, 0))

    def test_usage(self) -> None:
        self.check("usage: .*--normalize.*mean-std:1:0", self.good, "--normalize", "mean-std:1:0", code=2)
        self.check("usage: .*--threshold", self.good, "--threshold", "1.5", code=2)


if __name__ == "__main__":
    unittest.main(warnings="ignore")
