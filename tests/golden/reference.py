"""The Flask application's preprocessing in OpenCV: what ScanSentry has to match.

`crop_rect` and `preprocess` are `crop_imgs` and `preprocess_imgs` with their parameters as arguments and the rectangle
given back; the calls to OpenCV, their order and arguments are the application's. `Refused` is raised where it crashes.

`python reference.py real DATA OUT [N]` writes the answers for every N-th image under DATA (an `index.csv` beside them), for
`cargo test --test it parity`: OUT/png/I.png (what imread gave), OUT/resized/I.png and OUT/index.json.
"""

import csv
import json
import pathlib
import sys

import cv2
import numpy as np

FILTERS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


class Refused(Exception):
    """The application crashes here."""


def contours(img, threshold=45, erode=2, dilate=2):
    """The outer contours as `imutils.grab_contours` hands them over."""
    gray = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)
    gray = cv2.GaussianBlur(gray, (5, 5), 0)
    thresh = cv2.threshold(gray, threshold, 255, cv2.THRESH_BINARY)[1]
    if erode:
        thresh = cv2.erode(thresh, None, iterations=erode)
    if dilate:
        thresh = cv2.dilate(thresh, None, iterations=dilate)
    found = cv2.findContours(thresh.copy(), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return found[0] if len(found) == 2 else found[1]


def crop_rect(img, threshold=45, erode=2, dilate=2, margin=0):
    """The crop of a BGR image as (x, y, width, height, area of the contour)."""
    cnts = contours(img, threshold, erode, dilate)
    if len(cnts) == 0:
        raise Refused("blank")
    c = max(cnts, key=cv2.contourArea)
    left = tuple(map(int, c[c[:, :, 0].argmin()][0]))
    right = tuple(map(int, c[c[:, :, 0].argmax()][0]))
    top = tuple(map(int, c[c[:, :, 1].argmin()][0]))
    bottom = tuple(map(int, c[c[:, :, 1].argmax()][0]))
    ends = (top[1] - margin, bottom[1] + margin, left[0] - margin, right[0] + margin)
    if min(ends) < 0:
        raise Refused("negative_index")
    cut = img[ends[0] : ends[1], ends[2] : ends[3]]
    if cut.size == 0:
        raise Refused("empty_crop")
    return ends[2], ends[0], cut.shape[1], cut.shape[0], float(cv2.contourArea(c))


def resize(img, size, filter="cubic", keep_aspect=False):
    """To `size` (width, height); letterboxed in black when the aspect is kept."""
    if not keep_aspect:
        return cv2.resize(img, size, interpolation=FILTERS[filter])
    (width, height), (w, h) = size, (img.shape[1], img.shape[0])
    if w * height >= h * width:
        w, h = width, min(max((2 * h * width + w) // (2 * w), 1), height)
    else:
        w, h = min(max((2 * w * height + h) // (2 * h), 1), width), height
    img = cv2.resize(img, (w, h), interpolation=FILTERS[filter])
    x, y = (width - w) // 2, (height - h) // 2
    return cv2.copyMakeBorder(img, y, height - h - y, x, width - w - x, cv2.BORDER_CONSTANT, value=(0, 0, 0))


def normalize(img, mode):
    """`img` as imread's BGR. Keras' preprocess_input, without Keras, in float32.

    `caffe` is what the application does: the channels of the BGR image are reversed, then the means for B, G, R are taken
    off in that order. The other modes are given RGB, as other applications do.
    """
    x = img[:, :, ::-1].astype(np.float32)
    if mode == "caffe":
        return x - np.array([103.939, 116.779, 123.68], np.float32)
    if mode == "zero_one":
        return x / np.float32(255)
    if mode == "minus_one_one":
        return x / np.float32(127.5) - np.float32(1)
    if mode == "mean_std":
        return (x - np.array([123.675, 116.28, 103.53], np.float32)) / np.array([58.395, 57.12, 57.375], np.float32)
    return x


def quantize(x, scale, zero_point, dtype):
    info = np.iinfo(dtype)
    return np.clip(np.round(x / np.float32(scale)) + zero_point, info.min, info.max).astype(dtype)


def preprocess(img, size=(224, 224)):
    """`crop_imgs` and `preprocess_imgs` up to `preprocess_input`: the rectangle and the resized BGR image."""
    x, y, w, h, area = crop_rect(img)
    return (x, y, w, h, area), cv2.resize(img[y : y + h, x : x + w], dsize=size, interpolation=cv2.INTER_CUBIC)


def real(data, out, step):
    for folder in ("png", "resized"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    index = []
    with open(data / "index.csv", newline="") as table:
        rows = list(csv.DictReader(table))[::step]
    for i, row in enumerate(rows):
        img = cv2.imread(str(data / row["file"]))
        entry = {"source": row["source"], "file": str(data / row["file"]), "rect": None}
        try:
            rect, resized = preprocess(img)
            entry["rect"], entry["area"] = rect[:4], rect[4]
        except Refused as refused:
            entry["refused"] = str(refused)
            resized = None
        grey = bool((img == img[:, :, :1]).all())
        plain = lambda im: np.ascontiguousarray(im[:, :, 0]) if grey else im
        cv2.imwrite(str(out / "png" / f"{i}.png"), plain(img), fast)
        if resized is not None:
            cv2.imwrite(str(out / "resized" / f"{i}.png"), plain(resized), fast)
        index.append(entry)
    (out / "index.json").write_text(json.dumps({"opencv": cv2.__version__, "images": index}))


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] != "real":
        sys.exit(__doc__)
    real(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 1)
