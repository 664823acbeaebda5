"""Somebody's model file -> a model bundle (models/README.md) that the daemon takes.

    convert.py --model braintumor.h5 --images FOLDER --out models/mine

Keras files and SavedModels are quantized to int8 with uint8 in and out, over the images as the daemon prepares them;
`.tflite` files are wrapped as they are. Every conclusion is printed with its reason, and each has an option that overrules it.
Exit 0; 1 with one line of error, and nothing written; 2 for a wrong command line.
"""

import argparse
import gc
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
from common import Refused, first_line, say, silence

MOST_IMAGES = 300
MAX_MODEL = 1 << 30  # the daemon's limit, bytes
NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")
FILTERS = ["cubic", "linear", "nearest", "area"]


class Parser(argparse.ArgumentParser):
    """One line for a wrong command line, as everywhere."""

    def error(self, message: str):
        print(f"usage: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if not all(NAME.fullmatch(name) for name in found):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME,NAME,... of letters, digits, - _ . +")
        return found

    def name(text: str) -> str:
        if not NAME.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid, expected 1-64 letters, digits, - _ . +")
        return text

    def size(text: str) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or not all(1 <= int(n) <= 4096 for n in found.groups()):
            raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT of 1-4096 pixels")
        return int(found[2]), int(found[1])

    def share(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 < value < 1.0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
        return value

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 20:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 20")
        return int(text)

    parser = Parser(description="Make a model bundle of a Keras, SavedModel or TFLite file.")
    parser.add_argument("--model", type=Path, required=True, help=".h5, .keras, .tflite, or a SavedModel folder")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of images like those it will see; sub-folders yes and no, or named like the labels, give figures",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle, made")
    parser.add_argument("--force", action="store_true", help="replace --out")
    parser.add_argument("--name", type=name, help="name of the model in every result; default: the file's")
    parser.add_argument("--version", type=name, default="1")
    parser.add_argument("--labels", type=names, help="names in the order of the scores; for one score NEGATIVE,POSITIVE")
    parser.add_argument("--positive", type=names, help="labels that make a positive decision")
    parser.add_argument("--threshold", type=share, default=0.5)
    parser.add_argument("--activation", choices=["sigmoid", "softmax", "logit"], help="what the scores are")
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT, for a model that takes any")
    parser.add_argument("--color-order", choices=["rgb", "bgr"], help="of the channels in the tensor; default rgb")
    parser.add_argument("--crop", choices=["brain-contour", "none"], default="brain-contour")
    parser.add_argument("--resize", choices=FILTERS, default="cubic")
    parser.add_argument(
        "--normalize",
        type=normalize_table,
        help="none, zero-one, minus-one-one, caffe, or mean-std:M[,M,M]:S[,S,S] in levels 0-255",
    )
    parser.add_argument("--keep-float", action="store_true", help="bundle the float32 model, not an int8 one")
    parser.add_argument("--max-images", type=count, default=MOST_IMAGES, help="more are sampled (default %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="what the libraries say, and where an error came from")
    return parser.parse_args()


def normalize_table(text: str) -> dict:
    """The manifest's preprocess.normalize out of the option."""
    mode, *numbers = text.split(":")
    if mode in ("none", "zero-one", "minus-one-one", "caffe") and not numbers:
        return {"mode": mode}
    try:
        mean, std = ([float(n) for n in part.split(",")] for part in numbers)
    except ValueError:
        mean, std = [], []
    if (
        mode != "mean-std"
        or not {len(mean), len(std)} <= {1, 3}
        or not all(n > 0 for n in std)
        or not all(map(math.isfinite, mean + std))
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not none, zero-one, minus-one-one, caffe or mean-std:M[,M,M]:S[,S,S]")
    return {"mode": mode, "mean": mean * (3 // len(mean)), "std": std * (3 // len(std))}


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not args.verbose:
        silence()
    try:
        convert(args)
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 (one line for the user, whatever a library raises)
        if args.verbose:
            traceback.print_exc()
        print(f"convert: {type(error).__name__}: {first_line(error)}; --verbose says more", file=sys.stderr)
        return 1
    return 0


def convert(args: argparse.Namespace) -> None:
    """Everything from the options to the bundle."""
    out = args.out.resolve()  # what a link leads to is replaced, not the link
    if (out.exists() or args.out.is_symlink()) and not args.force:
        raise Refused(f"out: {args.out}: is there already; give another folder, or --force to replace it")
    if out.exists() and not (out / "manifest.toml").is_file():
        raise Refused(f"out: {args.out}: is no model bundle and is not replaced; give another folder")
    if args.images is not None and not args.images.is_dir():
        raise Refused(f"images: {args.images}: is not a folder; give a folder of images")

    # TensorFlow takes seconds to come up: only now.
    import assemble
    import conclude
    import images
    import source as sources
    import tflite

    source = sources.load(args.model)
    wrapped = source.tflite is not None
    say("model", f"{source.kind}{', wrapped as it is' if wrapped else ''}")
    if not wrapped and args.images is None:
        raise Refused("images: none; give --images, a folder of images like those that the model will see")
    if wrapped:
        model, why = tflite.File(source.tflite), "the model's input"
        if args.size and list(args.size) != model.input.shape[1:3]:
            height, width = model.input.shape[1:3]
            raise Refused(f"size: is not what the model takes; leave --size out, it takes {width}x{height}")
    else:
        height, width, why = conclude.size(source, args.size)
        model = tflite.Graph(source.call, height, width, source.shape[2] or 3)
    manifest = describe(args, source, model, why)

    pictures = original = None
    if args.images is not None:
        pictures = images.Pictures(args.images, args.max_images, manifest)
        known = "; the folders say which are positive" if pictures.known() is not None else ""
        say("images", f"{len(pictures.levels)} of {pictures.total} files{known}")
        for line in pictures.skipped[:20]:
            say("skipped", line)
        if len(pictures.skipped) > 20:
            say("skipped", f"and {len(pictures.skipped) - 20} more")
        pictures.expect_enough()
    kind = source.kind
    if wrapped:
        file = model
    else:
        original = assemble.probabilities(model, pictures, manifest)
        # The weights of a large model need not be in memory twice while it is converted.
        source.call = source.holder = model.call = None
        gc.collect()
        samples = None if args.keep_float else assemble.calibration(pictures.levels, manifest)
        file = tflite.File(model.convert(samples))
        del model
        index, _, heatmap = conclude.outputs(file)
        manifest["output"] |= {"index": index} | ({} if heatmap is None else {"heatmap": {"index": heatmap}})
    if len(file.data) > MAX_MODEL:
        raise Refused(f"model: {len(file.data) >> 20} MiB; the daemon takes up to {MAX_MODEL >> 20} MiB, leave --keep-float out")

    out.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        half.chmod(0o755)
        assemble.write(half, args.model, kind, file, manifest, pictures, original)
        assemble.put_in_place(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    say("memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
    say("bundle", f"{args.out}; try: scansentry classify --bundle {args.out} FILE")


def describe(args: argparse.Namespace, source, model, size_reason: str) -> dict:
    """The manifest without hash and golden images; every conclusion is said with its reason."""
    import conclude

    _, height, width, channels = model.input.shape
    index, count, heatmap = conclude.outputs(model)
    activation, activation_reason = conclude.activation(model, index, count, args.activation)
    labels, positive, labels_reason = conclude.labels(count, args.labels, args.positive, args.images)
    if args.normalize is not None:
        normalize, normalize_reason = args.normalize, "--normalize"
    else:
        text, normalize_reason = conclude.normalize(source, model)
        normalize = normalize_table(text)
    if channels == 1 and args.color_order:
        raise Refused(f"color-order: {args.color_order} for a model that takes grey pictures; leave it out")
    if channels == 1:
        order, order_reason = "gray", "one channel"
    elif args.color_order:
        order, order_reason = args.color_order, "--color-order"
    elif normalize["mode"] == "caffe":
        order, order_reason = (
            "rgb",
            "as the original application feeds it; trained on pictures loaded as RGB (Keras, PIL): --color-order bgr",
        )
    else:
        order, order_reason = "rgb", "most models; --color-order bgr if it was trained on OpenCV's order"
    crop_reason = "--crop none if it was trained on whole pictures" if args.crop == "brain-contour" else "--crop"
    name = args.name or re.sub(r"[^A-Za-z0-9._+-]+", "-", args.model.resolve().stem).strip("-")[:64] or "model"
    say("input", f"{width}x{height} ({size_reason})")
    say("color order", f"{order} ({order_reason})")
    say("crop", f"{args.crop} ({crop_reason}); resize {args.resize}")
    say("normalize", f"{normalize['mode']}{mean_std(normalize)} ({normalize_reason})")
    say(
        "output",
        f"{count} score{'s' if count > 1 else ''}, {activation} ({activation_reason})"
        + (", and an activation map" if heatmap is not None else ""),
    )
    say("labels", f"{', '.join(labels)}; positive: {', '.join(positive)} ({labels_reason})")
    return {
        "format": 1,
        "name": name,
        "version": args.version,
        "file": "model.tflite",
        "sha256": "",
        "description": f"Converted from {args.model.resolve().name}.",
        "intended_use": "Research use only, not for diagnosis. A negative only means that this model found no tumour pattern.",
        "input": {"width": width, "height": height, "color_order": order},
        "preprocess": {
            "crop": {"method": args.crop},
            "resize": {"filter": args.resize},
            "normalize": normalize,
        },
        "output": {"activation": activation, "index": index, "labels": labels, "positive": positive}
        | ({} if heatmap is None else {"heatmap": {"index": heatmap}}),
        "decision": {"threshold": args.threshold},
    }


def mean_std(normalize: dict) -> str:
    return f" {normalize['mean']} {normalize['std']}" if "mean" in normalize else ""


if __name__ == "__main__":
    sys.exit(main())
