"""What the model is shown: crop to the brain, resize to 224 x 224, RGB order.

This file is the definition the Rust daemon is held to. `brain_roi` is `crop_imgs` of the Flask app that ScanSentry
comes from, with a fallback where that code crashed.
"""

from pathlib import Path

import cv2
import numpy as np

SIZE = 224


def read_bgr(path: str | Path) -> np.ndarray:
    """Decode a file to uint8 [height, width, 3], BGR, as `cv2.imread` does (8 bit, EXIF applied, alpha dropped)."""
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"{path}: not an image that OpenCV can read")
    return image


def brain_mask(bgr: np.ndarray, threshold: int = 45, erode: int = 2, dilate: int = 2) -> np.ndarray:
    """uint8 [height, width], 255 where it is bright, without specks.

    RGB2GRAY is applied to the BGR array on purpose: the app did so (it matters for colour images only).
    """
    gray = cv2.cvtColor(bgr, cv2.COLOR_RGB2GRAY)
    gray = cv2.GaussianBlur(gray, (5, 5), 0)
    mask = cv2.threshold(gray, threshold, 255, cv2.THRESH_BINARY)[1]
    mask = cv2.erode(mask, None, iterations=erode)
    return cv2.dilate(mask, None, iterations=dilate)


def brain_roi(bgr: np.ndarray, threshold: int = 45, erode: int = 2, dilate: int = 2, margin: int = 0) -> tuple[int, int, int, int]:
    """The rectangle (x, y, width, height) around the largest bright outer contour.

    The crop is half open, so the contour's last row and column are lost, on purpose: the app did so. Where there is no
    contour, or the crop would be empty, the answer is the whole image.
    """
    mask = brain_mask(bgr, threshold, erode, dilate)
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    height, width = bgr.shape[:2]
    if not contours:
        return 0, 0, width, height
    points = max(contours, key=cv2.contourArea)[:, 0, :]
    left, top = np.maximum(points.min(axis=0) - margin, 0).tolist()
    right, bottom = np.minimum(points.max(axis=0) + margin, (width, height)).tolist()
    if right <= left or bottom <= top:
        return 0, 0, width, height
    return left, top, right - left, bottom - top


def model_input(bgr: np.ndarray, roi: tuple[int, int, int, int], size: int = SIZE) -> np.ndarray:
    """Crop and resize to uint8 [size, size, 3], RGB. Cubic, aspect not kept, no antialiasing (OpenCV's INTER_CUBIC)."""
    x, y, width, height = roi
    crop = bgr[y : y + height, x : x + width]
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_CUBIC)[:, :, ::-1].copy()


def to_float(pixels: np.ndarray) -> np.ndarray:
    """What the network sees of uint8 [n, side, side] grey or [n, side, side, 3] RGB."""
    real = (pixels.astype(np.float32) - 127.0) / 128.0
    return np.repeat(real[..., None], 3, -1) if real.ndim == 3 else real
