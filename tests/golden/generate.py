"""Writes the golden vectors: `python tests/golden/generate.py` (see requirements.txt for the versions).

`crop/files/*.png` are generated pictures; `crop/vectors.json` lists cases: a file, the parameters, and what the
reference (reference.py: OpenCV) makes of it: the rectangle, the contour's area, or why the application crashes.
`crop/expected/CASE.resized.png` is the resized picture, `CASE.tensor.png` the tensor's bytes (int8 as two's complement) in
the tensor's own channel order. `decode/` comes from decode_files.py.
"""

import json
import pathlib
import sys

import cv2
import numpy as np

import decode_files
import reference

ROOT = pathlib.Path(__file__).parent
RNG = np.random.default_rng(20261123)


def blank(w, h):
    return np.zeros((h, w), np.uint8)


def phantom(w, h, shift=(0, 0), lesion=False):
    """A head: skull ring, brain, ventricles, optionally a bright lesion."""
    im = blank(w, h)
    c = (w // 2 + shift[0], h // 2 + shift[1])
    ax = (int(w * 0.38), int(h * 0.43))
    cv2.ellipse(im, c, ax, 7, 0, 360, 190, -1)
    cv2.ellipse(im, c, (int(ax[0] * 0.9), int(ax[1] * 0.9)), 7, 0, 360, 30, -1)
    cv2.ellipse(im, c, (int(ax[0] * 0.84), int(ax[1] * 0.84)), 7, 0, 360, 105, -1)
    for s in (-1, 1):
        cv2.ellipse(im, (c[0] + s * w // 14, c[1]), (w // 30 + 1, h // 9), 12 * s, 0, 360, 35, -1)
    if lesion:
        cv2.circle(im, (c[0] + w // 6, c[1] - h // 8), max(2, w // 16), 225, -1)
    noise = RNG.normal(0, 4, im.shape)
    return np.clip(im + noise, 0, 255).astype(np.uint8)


def coarse_noise(w, h, cell, low=0, high=255):
    small = RNG.integers(low, high + 1, (h // cell + 2, w // cell + 2), dtype=np.uint8)
    return cv2.resize(small, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)[:h, :w]


def shapes():
    """Name -> grey or RGB picture."""
    out = {}
    out["phantom"] = phantom(190, 224, lesion=True)
    out["phantom-small"] = phantom(61, 72)
    out["phantom-square"] = phantom(128, 128, lesion=True)
    out["phantom-wide"] = phantom(200, 90)
    for name, shift in {"left": (-40, 0), "right": (45, 0), "top": (0, -45), "bottom": (0, 50), "corner": (50, 55)}.items():
        out[f"phantom-{name}"] = phantom(120, 140, shift)
    rgb = np.dstack([phantom(96, 110), phantom(96, 110, (9, -7)), phantom(96, 110, (-12, 5))])
    out["color-phantom"] = rgb
    tint = phantom(100, 90).astype(int)
    strong = np.clip(tint * 2, 0, 255)
    out["color-red"] = np.dstack([strong, tint // 4, tint // 8]).astype(np.uint8)
    out["color-blue"] = np.dstack([tint // 8, tint // 5, strong]).astype(np.uint8)
    out["color-noise"] = np.dstack([coarse_noise(90, 70, 9) for _ in range(3)])
    for i, (w, h) in enumerate([(64, 64), (65, 63), (127, 40), (33, 90), (17, 16), (128, 20)]):
        out[f"noise-white-{w}x{h}"] = RNG.integers(0, 256, (h, w), dtype=np.uint8)
        out[f"noise-dark-{w}x{h}"] = RNG.integers(0, 92, (h, w), dtype=np.uint8)
    for cell in (3, 5, 8, 13, 21):
        out[f"noise-coarse-{cell}"] = coarse_noise(150, 130, cell)
        out[f"noise-coarse-dark-{cell}"] = coarse_noise(131, 97, cell, 0, 92)
    x = np.arange(160)
    out["gradient-x"] = np.tile((x * 255 // 159).astype(np.uint8), (60, 1))
    out["gradient-y"] = np.ascontiguousarray(out["gradient-x"].T)
    out["gradient-diagonal"] = ((x[None, :80] + x[:70, None]) % 256).astype(np.uint8)
    out["gradient-near-threshold"] = np.tile((40 + x[:100] // 10).astype(np.uint8), (40, 1))
    for level in (45, 46, 255):
        out[f"flat-{level}"] = np.full((40, 50), level, np.uint8)
    out["black"] = blank(40, 30)
    im = blank(120, 100)
    cv2.line(im, (3, 3), (110, 90), 255, 1)
    cv2.line(im, (3, 90), (110, 20), 255, 3)
    cv2.line(im, (60, 0), (60, 99), 255, 5)
    out["thin-lines"] = im
    im = blank(120, 100)
    cv2.line(im, (10, 10), (100, 85), 200, 7)
    cv2.circle(im, (90, 25), 18, 255, 2)
    cv2.circle(im, (30, 70), 22, 255, 6)
    out["thin-rings"] = im
    im = blank(140, 100)
    for x0 in range(5, 130, 22):
        cv2.circle(im, (x0 + 8, 50), 11, 180, -1)
    out["touching-discs"] = im
    im = blank(130, 110)
    for i in range(5):
        cv2.rectangle(im, (5 + 20 * i, 5 + 20 * i), (24 + 20 * i, 24 + 20 * i), 255, -1)
    out["touching-diagonal"] = im
    im = blank(150, 120)
    for y0 in (5, 45, 85):
        for x0 in (8, 58, 108):
            cv2.rectangle(im, (x0, y0), (x0 + 25, y0 + 20), 220, -1)
    out["equal-rectangles"] = im
    im = blank(150, 120)
    for c in [(30, 30), (110, 40), (40, 95), (115, 90)]:
        cv2.circle(im, c, 17, 240, -1)
    out["equal-discs"] = im
    out["equal-mirrored"] = np.hstack([phantom(70, 80), phantom(70, 80)[:, ::-1]])
    im = blank(150, 60)
    cv2.rectangle(im, (5, 5), (44, 24), 255, -1)
    cv2.rectangle(im, (60, 10), (79, 49), 255, -1)
    cv2.rectangle(im, (95, 30), (134, 49), 255, -1)
    out["equal-different-shape"] = im
    im = blank(140, 120)
    cv2.circle(im, (70, 60), 55, 255, 6)
    cv2.circle(im, (70, 60), 30, 255, -1)
    out["nested"] = im
    im = blank(140, 120)
    cv2.rectangle(im, (0, 0), (139, 119), 200, 8)
    cv2.circle(im, (70, 60), 30, 255, -1)
    out["frame"] = im
    im = blank(140, 120)
    cv2.ellipse(im, (40, 60), (36, 50), 0, 60, 300, 255, 7)
    cv2.circle(im, (100, 60), 26, 255, -1)
    out["open-ring"] = im
    im = blank(160, 120)
    for a in range(0, 720, 4):
        r = 8 + a / 16
        cv2.circle(im, (int(80 + r * np.cos(np.radians(a))), int(60 + r * np.sin(np.radians(a)))), 4, 230, -1)
    out["spiral"] = im
    im = blank(130, 90)
    cv2.rectangle(im, (0, 20), (40, 60), 255, -1)
    out["border-left"] = im
    out["border-right"] = np.ascontiguousarray(im[:, ::-1])
    out["border-top"] = np.ascontiguousarray(im.T)
    out["border-bottom"] = np.ascontiguousarray(im.T[::-1])
    im = blank(100, 80)
    im[0:3, :] = 255
    im[:, 97:] = 255
    out["border-edges"] = im
    im = blank(100, 80)
    for p in [(0, 0), (99, 0), (0, 79), (99, 79)]:
        cv2.circle(im, p, 14, 255, -1)
    out["border-corners"] = im
    im = blank(80, 80)
    im[::9, ::9] = 255
    out["specks"] = im
    checker = ((np.indices((96, 96)) // 12).sum(0) % 2 * 255).astype(np.uint8)
    out["checker"] = checker
    for w, h in [(1, 1), (2, 2), (3, 1), (1, 7), (1, 40), (40, 1), (2, 30), (30, 2), (3, 3), (5, 4), (6, 6), (15, 40)]:
        out[f"tiny-{w}x{h}"] = RNG.integers(60, 256, (h, w), dtype=np.uint8)
    out["words-64"] = RNG.integers(20, 120, (40, 64), dtype=np.uint8)
    out["words-129"] = coarse_noise(129, 50, 7)
    huge = blank(5000, 4200)
    cv2.ellipse(huge, (2400, 2000), (1900, 1700), 20, 0, 360, 140, -1)
    cv2.ellipse(huge, (2500, 2100), (600, 900), 20, 0, 360, 20, -1)
    cv2.circle(huge, (4800, 4100), 90, 250, -1)
    out["huge"] = huge
    return out


# Crops beside the application's, by the file's name: (threshold, erode, dilate, margin).
CROPS = {
    "phantom": [(45, 2, 2, 5), (45, 2, 2, -7), (120, 2, 2, 0), (45, 0, 0, 0), (45, 1, 3, 0), (0, 2, 2, 0)],
    "phantom-left": [(45, 2, 2, 3), (45, 2, 2, -3)],
    "phantom-right": [(45, 2, 2, 9), (45, 2, 2, -90)],
    "noise-white-64x64": [(127, 0, 0, 0), (127, 1, 0, 0), (127, 0, 1, 0), (140, 0, 0, 0), (255, 0, 0, 0)],
    "noise-white-65x63": [(127, 0, 0, 0), (127, 1, 1, 0), (115, 3, 1, 0)],
    "noise-white-127x40": [(127, 0, 0, 0), (110, 1, 2, 0)],
    "noise-coarse-8": [(127, 0, 0, 0), (127, 5, 5, 0), (90, 3, 40, 0)],
    "noise-coarse-3": [(127, 0, 0, 0), (127, 1, 1, 0), (100, 2, 0, 0)],
    "specks": [(10, 0, 0, 0), (10, 0, 3, 0)],
    "words-64": [(70, 0, 0, 0), (70, 1, 1, 0)],
    "checker": [(45, 0, 0, 0), (128, 6, 6, 0), (128, 5, 6, 0)],
}

# name of the file -> (size, filter, keep aspect); cropped by the application's rule first unless it refuses.
RESIZES = [
    ("phantom", (224, 224), "cubic", False),
    ("color-phantom", (224, 224), "cubic", False),
    ("phantom", (64, 80), "cubic", False),
    ("phantom", (64, 64), "cubic", True),
    ("phantom", (64, 64), "linear", False),
    ("phantom", (64, 64), "area", False),
    ("phantom", (64, 64), "nearest", False),
    ("phantom-small", (90, 70), "cubic", False),
    ("phantom-small", (90, 70), "linear", False),
    ("phantom-small", (90, 70), "area", False),
    ("phantom-small", (90, 70), "nearest", False),
    ("phantom-wide", (48, 48), "cubic", True),
    ("phantom-wide", (50, 70), "linear", True),
    ("phantom-wide", (50, 70), "area", True),
    ("phantom-wide", (190, 20), "area", False),
    ("color-noise", (60, 60), "cubic", False),
    ("color-noise", (61, 47), "linear", False),
    ("color-noise", (41, 33), "area", False),
    ("color-noise", (110, 90), "area", False),
    ("color-noise", (41, 33), "nearest", False),
    ("color-noise", (45, 45), "cubic", True),
    ("noise-white-64x64", (32, 32), "linear", False),
    ("noise-white-64x64", (32, 32), "area", False),
    ("noise-white-64x64", (32, 32), "cubic", False),
    ("noise-white-64x64", (16, 32), "area", False),
    ("noise-white-64x64", (64, 64), "cubic", False),
    ("noise-white-64x64", (128, 128), "cubic", False),
    ("noise-white-65x63", (64, 64), "cubic", False),
    ("noise-white-65x63", (64, 64), "linear", False),
    ("noise-white-65x63", (13, 9), "area", False),
    ("noise-white-127x40", (40, 60), "cubic", False),
    ("checker", (32, 32), "cubic", False),
    ("checker", (31, 33), "linear", False),
    ("gradient-diagonal", (50, 50), "cubic", False),
    ("noise-dark-17x16", (40, 40), "cubic", False),
    ("tiny-1x1", (8, 8), "cubic", False),
    ("tiny-1x40", (8, 16), "cubic", False),
    ("tiny-40x1", (16, 8), "linear", False),
    ("tiny-2x30", (5, 9), "area", False),
    ("tiny-5x4", (20, 20), "cubic", False),
    ("huge", (96, 96), "cubic", False),
    ("huge", (60, 50), "linear", False),
]

TENSORS = [
    ("color-noise", "caffe", "int8", 1.0, -7),
    ("color-noise", "caffe", "uint8", 1.0078, 118),
    ("color-noise", "zero_one", "uint8", 1 / 255, 0),
    ("color-noise", "zero_one", "int8", 0.00392, -128),
    ("color-noise", "minus_one_one", "int8", 0.0078125, -1),
    ("color-noise", "mean_std", "int8", 0.0186, -14),
    ("color-noise", "none", "uint8", 1.0, 0),
    ("color-phantom", "caffe", "int8", 0.99, -4),
]


def save(im, path):
    """Grey or RGB, losslessly and as small as PNG gets."""
    cv2.imwrite(str(path), im if im.ndim == 2 else im[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def main():
    folder = ROOT / "crop"
    for sub in ("files", "expected"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for old in (folder / sub).iterdir():
            old.unlink()
    crops, resizes, tensors, read = [], [], [], {}
    for name, im in shapes().items():
        path = folder / "files" / f"{name}.png"
        save(im, path)
        read[name] = cv2.imread(str(path))
        for spec in [(45, 2, 2, 0), *CROPS.get(name, [])]:
            case = {"file": name, **dict(zip(("threshold", "erode", "dilate", "margin"), spec))}
            try:
                *rect, area = reference.crop_rect(read[name], *spec)
                case |= {"rect": rect, "area": area}
            except reference.Refused as refused:
                case["refused"] = str(refused)
            crops.append(case)
    for i, (name, size, filter, keep) in enumerate(RESIZES):
        im = read[name]
        try:
            x, y, w, h, _ = reference.crop_rect(im)
        except reference.Refused:
            x, y, w, h = 0, 0, im.shape[1], im.shape[0]
        resized = reference.resize(im[y : y + h, x : x + w], size, filter, keep)
        grey = (im == im[:, :, :1]).all()
        save(resized[:, :, 0] if grey else resized[:, :, ::-1], folder / "expected" / f"{i}.resized.png")
        resizes.append({"file": name, "rect": [x, y, w, h], "size": size, "filter": filter, "keep_aspect": keep})
    for i, (name, mode, dtype, scale, zero_point) in enumerate(TENSORS):
        im = read[name]
        x, y, w, h, _ = reference.crop_rect(im)
        resized = cv2.resize(im[y : y + h, x : x + w], (40, 40), interpolation=cv2.INTER_CUBIC)
        tensor = reference.quantize(reference.normalize(resized, mode), scale, zero_point, dtype)
        save(tensor.view(np.uint8), folder / "expected" / f"{i}.tensor.png")
        tensors.append({"file": name, "rect": [x, y, w, h], "size": [40, 40], "normalization": mode, "dtype": dtype, "scale": scale, "zero_point": zero_point})
    vectors = {"opencv": cv2.__version__, "crops": crops, "resizes": resizes, "tensors": tensors}
    lines = {k: "[\n " + ",\n ".join(map(json.dumps, v)) + "\n]" if isinstance(v, list) else json.dumps(v) for k, v in vectors.items()}
    (folder / "vectors.json").write_text("{\n" + ",\n".join(f'"{k}": {v}' for k, v in lines.items()) + "\n}\n")
    decode_files.main(ROOT)
    print(f"OpenCV {cv2.__version__}: {len(crops)} crops, {len(resizes)} resizes, {len(tensors)} tensors")


if __name__ == "__main__":
    sys.exit(main())
