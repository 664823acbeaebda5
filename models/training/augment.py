"""A random view of a slice, as a scanner, an export and the crop could have made it: uint8 [224, 224] grey.

Colour is left out on purpose: some collections have it and some do not, so it would give the source away.
"""

import cv2
import numpy as np

import lesions
from preprocess import SIZE

KERNEL = np.ones((3, 3), np.uint8)


def view(
    gray: np.ndarray, roi: tuple[int, int, int, int], rng: np.random.Generator, lesion: bool, scalp: float = 0.12
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(view, coverage of the generated lesion 0-1 or None) of a grey slice (uint8) with its crop.

    `lesion`: draw one, None as the whole answer where none fits. `scalp`: how often a scalp is drawn around the head; above
    .5 also something like a face.
    """

    def chance(p: float) -> bool:
        return rng.random() < p

    # Geometry: where the crop falls, turning, shear, mirror; one warp without antialiasing, as the daemon resizes.
    x, y, width, height = roi
    if chance(0.15):
        x, y, (height, width) = 0, 0, gray.shape[:2]
    grow = rng.uniform(-0.07, 0.14, 4) if chance(0.7) else np.zeros(4)
    left, right = x - grow[0] * width, x + width * (1 + grow[1])
    top, bottom = y - grow[2] * height, y + height * (1 + grow[3])
    scale = np.array([(right - left) / SIZE, (bottom - top) / SIZE])
    angle = np.radians(rng.normal(0, 10)) + (np.pi / 2 * rng.integers(4) if chance(0.15) else 0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[1, rng.normal(0, 0.06)], [0, 1]]) @ np.diag(np.exp(rng.normal(0, 0.08, 2)))
    if chance(0.5):
        turn[:, 0] *= -1
    if chance(0.12):
        turn[:, 1] *= -1
    matrix = scale[:, None] * turn  # output pixel, from the middle -> source pixel, from the crop's middle
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    shift = middle - matrix @ np.array([SIZE / 2, SIZE / 2])
    shrink = max(width, height) / SIZE
    source = cv2.GaussianBlur(gray, (0, 0), 0.4 * shrink) if shrink > 1.3 and chance(0.5) else gray
    filter_ = cv2.INTER_CUBIC if chance(0.7) else cv2.INTER_LINEAR
    picture = cv2.warpAffine(source, np.column_stack([matrix, shift]), (SIZE, SIZE), flags=filter_ | cv2.WARP_INVERSE_MAP)
    picture = picture.astype(np.float32) / 255

    coverage = None
    if lesion:
        for _ in range(3):
            made = lesions.add(picture, rng)
            if made is not None:
                picture, coverage = made
                break
        else:
            return None
    if chance(0.15):
        picture = strip(picture, rng)
    elif chance(scalp):
        picture, coverage = wrap(picture, coverage, rng, face=scalp > 0.5)

    # The scanner and the export: window, gamma, curve, coil shading, sharpness, resolution, noise, JPEG.
    if chance(0.1):
        clahe = cv2.createCLAHE(rng.uniform(1, 4), (4, 4))
        picture = clahe.apply((picture * 255).astype(np.uint8)).astype(np.float32) / 255
    if chance(0.45):
        low, high = rng.uniform(0, 0.08), np.quantile(picture, rng.uniform(0.96, 1))
        picture = np.clip((picture - low) / max(high - low, 0.2), 0, 1)
    if chance(0.7):
        picture = picture ** np.exp(rng.normal(0, 0.33))
    if chance(0.25):  # another sequence: any rising curve, or one that is nearly straight but need not rise
        levels = np.linspace(0, 1, 6)
        curve = np.sort(rng.random(6)) if chance(0.7) else np.clip(levels + rng.normal(0, 0.18, 6), 0, 1)
        curve[0] = 0
        picture = np.interp(picture, levels, curve / max(curve.max(), 0.5)).astype(np.float32)
    if chance(0.6):
        picture = picture * rng.uniform(0.65, 1.3) + rng.uniform(-0.06, 0.06) * (picture > 0.02)
    if chance(0.35):
        field = rng.normal(1, 0.25, (3, 3)).astype(np.float32)
        picture = picture * cv2.resize(field, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    if chance(0.25):
        small = int(SIZE * rng.uniform(0.3, 0.8))
        picture = cv2.resize(cv2.resize(picture, (small, small), interpolation=cv2.INTER_AREA), (SIZE, SIZE))
    if chance(0.35):
        soft = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 1.7))
        picture = soft if chance(0.6) else picture + rng.uniform(0.3, 1.3) * (picture - soft)
    if chance(0.4):
        picture = picture + rng.normal(0, rng.uniform(0, 0.06), (SIZE, SIZE)).astype(np.float32)
    out = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if chance(0.25):
        out = cv2.imdecode(cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))])[1], 0)
    if chance(0.2):  # hide a part: no single place may decide; but never most of the lesion
        h, w = (SIZE * rng.uniform(0.08, 0.25, 2)).astype(int)
        row, column = int(rng.integers(SIZE - h)), int(rng.integers(SIZE - w))
        if coverage is None or coverage[row : row + h, column : column + w].sum() < 0.3 * coverage.sum():
            out[row : row + h, column : column + w] = rng.choice([0, int(out.mean())])
    return out, coverage


def strip(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Roughly without skull: the head's hull, eroded."""
    mask = lesions.head(picture)
    if mask is None:
        return picture
    steps = max(1, int(rng.uniform(0.03, 0.10) * np.sqrt(mask.sum())))
    mask = cv2.erode(np.pad(mask, 1), KERNEL, iterations=steps)[1:-1, 1:-1]
    return picture * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8) if mask.mean() > 0.1 else picture


def wrap(
    picture: np.ndarray, coverage: np.ndarray | None, rng: np.random.Generator, face: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Smaller, with a dark and a bright ring (skull and scalp) around the head's hull, and sometimes blobs for a face."""
    mask = lesions.head(picture)
    if mask is None:
        return picture, coverage
    scale = rng.uniform(0.78, 0.92)
    shrink = np.array([[scale, 0, SIZE / 2 * (1 - scale)], [0, scale, SIZE / 2 * (1 - scale)]], np.float32)
    picture = cv2.warpAffine(picture, shrink, (SIZE, SIZE))
    mask = cv2.warpAffine(mask, shrink, (SIZE, SIZE), flags=cv2.INTER_NEAREST)
    if coverage is not None:
        coverage = cv2.warpAffine(coverage, shrink, (SIZE, SIZE))
    gap, thickness = int(rng.integers(2, 7)), int(rng.integers(3, 9))
    skull = cv2.dilate(mask, KERNEL, iterations=gap)
    scalp = cv2.dilate(skull, KERNEL, iterations=thickness)
    if face and rng.random() < 0.6:
        blobs = np.zeros((SIZE, SIZE), np.uint8)
        for _ in range(rng.integers(1, 4)):
            centre = (int(rng.normal(SIZE * 0.5, SIZE * 0.28)), int(SIZE * rng.uniform(0.7, 1.05)))
            axes = (int(SIZE * rng.uniform(0.08, 0.3)), int(SIZE * rng.uniform(0.08, 0.25)))
            cv2.ellipse(blobs, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        grey = rng.uniform(0.15, 0.7) + lesions.smooth(rng, rng.uniform(2, 8), SIZE) * rng.uniform(0.05, 0.25)
        tissue = cv2.GaussianBlur(blobs.astype(np.float32), (0, 0), 1.2) * np.clip(grey, 0, 1)
        picture = np.where((mask > 0) | (skull > 0), picture, np.maximum(picture, tissue)).astype(np.float32)
    ring = np.where(skull > 0, rng.uniform(0.02, 0.15), np.where(scalp > 0, rng.uniform(0.4, 0.9), picture))
    return cv2.GaussianBlur(np.where(mask > 0, picture, ring).astype(np.float32), (0, 0), 0.7), coverage
