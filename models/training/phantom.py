"""Synthetic head slices, with and without a bright lesion: for the demo, the golden images and a share of training.

Only filled rotated ellipses, Gaussian blur and additive noise, so that the Rust simulator can draw the same family.
All lengths are fractions of the image's smaller side unless said otherwise; grey levels are 0-255. RANGES is the whole
specification: each value is drawn uniformly from its range.

    phantom.py --seed 1 --lesion out.png
"""

import argparse

import cv2
import numpy as np

RANGES = {
    "size": (180, 512),  # px, width; the height is width * aspect
    "aspect": (0.92, 1.22),
    "head_x": (0.35, 0.45),  # semi-axis of the scalp, of the width
    "head_y": (0.38, 0.46),  # of the height
    "head_tilt": (-12.0, 12.0),  # degrees
    "offset": (-0.03, 0.03),  # of the centre, of width and height
    "scalp": (90.0, 210.0),  # grey
    "skull": (8.0, 40.0),  # grey of the dark ring
    "skull_outer": (0.91, 0.95),  # of the head's semi-axes
    "skull_inner": (0.82, 0.88),  # of the head's semi-axes; the brain ends here
    "stripped": (0.0, 1.0),  # below 0.15: no scalp and no skull
    "brain": (65.0, 125.0),  # grey matter, grey
    "white": (-22.0, 32.0),  # white matter minus grey matter
    "sulci": (30, 60),  # number of dark folds at the brain's edge
    "sulcus_depth": (12.0, 40.0),  # grey, subtracted
    "ventricle": (0.0, 1.0),  # below 0.8 dark (as T1, FLAIR), else bright (as T2)
    "ventricle_dark": (12.0, 45.0),  # grey
    "ventricle_bright": (150.0, 215.0),  # grey
    "ventricle_long": (0.07, 0.14),
    "ventricle_short": (0.018, 0.042),
    "ventricle_tilt": (5.0, 25.0),  # degrees, mirrored left and right
    "texture": (2.0, 9.0),  # grey, standard deviation of the smooth texture
    "texture_scale": (0.012, 0.035),  # its Gaussian sigma
    "shading": (-0.15, 0.15),  # brightness change across the image, horizontal and vertical
    "blur": (0.5, 1.4),  # px at a width of 256, of the whole picture
    "noise": (1.5, 6.0),  # grey, standard deviation
    "lesion_size": (0.055, 0.13),  # semi-axis
    "lesion_aspect": (0.65, 1.0),
    "lesion_radius": (0.30, 0.62),  # distance from the middle, of the brain's semi-axes
    "lesion_gain": (60.0, 125.0),  # grey above the brain's
    "lesion_core": (0.0, 1.0),  # below 0.3: a dark core (ring enhancement)
    "lesion_lobes": (1, 3),  # overlapping ellipses
    "edema_gain": (0.0, 32.0),  # grey above the brain's
    "edema_size": (1.4, 2.1),  # of the lesion
}

# Narrower ranges for a demo, where nearly every picture should come out right: of the 60 that `scansentry simulate --seed 5` draws, model 0.2.0 (and 0.2.1)
# finds 30 of 30 plain ones negative (at most .05) and 29 of 30 with a lesion positive. Sulci and texture are needed: without them some plain
# ones passed for positive.
DEMO = {
    "size": (224, 400),
    "stripped": (1.0, 1.0),  # always scalp and skull
    "ventricle": (0.0, 0.0),  # always dark
    "lesion_size": (0.075, 0.13),
    "lesion_gain": (80.0, 125.0),
}


def draw(rng: np.random.Generator, lesion: bool, **fixed: float) -> np.ndarray:
    """One phantom as uint8 [height, width] grey. `fixed` overrides single values of RANGES (for the demo's parameters)."""

    def pick(name: str) -> float:
        low, high = RANGES[name]
        value = rng.uniform(low, high)  # always drawn, so that fixing one value leaves the others as they were
        return fixed.get(name, value)

    width = int(pick("size"))
    height = int(width * pick("aspect"))
    side = min(width, height)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.zeros((height, width), np.float32)
    cx, cy = width * (0.5 + pick("offset")), height * (0.5 + pick("offset"))
    hx, hy, tilt = width * pick("head_x"), height * pick("head_y"), pick("head_tilt")

    def ellipse(x: float, y: float, a: float, b: float, degrees: float) -> np.ndarray:
        """Boolean mask of the pixels inside the ellipse with centre (x, y), semi-axes a, b (px), turned by degrees."""
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        u, v = (xs - x) * cos + (ys - y) * sin, (ys - y) * cos - (xs - x) * sin
        return (u / a) ** 2 + (v / b) ** 2 <= 1.0

    def at(across: float, down: float) -> tuple[float, float]:
        """Pixel of a point given in the tilted head's own axes (px from the head's middle)."""
        cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
        return cx + across * cos - down * sin, cy + across * sin + down * cos

    def smooth(sigma: float) -> np.ndarray:
        """Noise of mean 0 and standard deviation 1, blurred to the given scale (px)."""
        field = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), max(sigma, 0.5))
        return (field - field.mean()) / (field.std() + 1e-6)

    # The head, from outside in.
    scalp, skull, skull_outer = pick("scalp"), pick("skull"), pick("skull_outer")
    inner, brain_grey = pick("skull_inner"), pick("brain")
    if pick("stripped") >= 0.15:
        image[ellipse(cx, cy, hx, hy, tilt)] = scalp
        image[ellipse(cx, cy, hx * skull_outer, hy * skull_outer, tilt)] = skull
    bx, by = hx * inner, hy * inner
    brain = ellipse(cx, cy, bx, by, tilt)
    image[brain] = brain_grey

    # White matter: one ellipse a hemisphere. Sulci: short dark folds pointing inwards. The midline fissure.
    white = pick("white")
    for hemisphere in (-1, 1):
        x, y = at(hemisphere * 0.40 * bx, 0.0)
        image[ellipse(x, y, 0.36 * bx, 0.70 * by, tilt)] += white
    depth = pick("sulcus_depth")
    for angle in rng.uniform(0.0, 2.0 * np.pi, int(pick("sulci"))):
        reach = rng.uniform(0.84, 0.97)
        x, y = at(np.cos(angle) * reach * bx, np.sin(angle) * reach * by)
        length, thickness = side * rng.uniform(0.015, 0.045), side * rng.uniform(0.003, 0.008)
        turn = np.degrees(np.arctan2(np.sin(angle) * by, np.cos(angle) * bx)) + tilt + rng.uniform(-35.0, 35.0)
        image[ellipse(x, y, length, thickness, turn) & brain] -= depth
    image[ellipse(cx, cy, max(0.004 * side, 0.7), 0.95 * by, tilt)] -= depth

    # Ventricles: a leaning pair beside the midline.
    long, short, lean = side * pick("ventricle_long"), side * pick("ventricle_short"), pick("ventricle_tilt")
    dark, bright = pick("ventricle_dark"), pick("ventricle_bright")
    ventricle_grey = dark if pick("ventricle") < 0.8 else bright
    for hemisphere in (-1, 1):
        x, y = at(hemisphere * 1.6 * short, 0.0)
        image[ellipse(x, y, short, long, tilt + hemisphere * lean)] = ventricle_grey

    texture, texture_sigma = pick("texture"), side * pick("texture_scale")
    image[brain] += texture * smooth(texture_sigma)[brain]

    if lesion:
        size, ratio, gain = side * pick("lesion_size"), pick("lesion_aspect"), pick("lesion_gain")
        radius, angle = pick("lesion_radius"), rng.uniform(0.0, 2.0 * np.pi)
        # Off the midline: the sine part (front to back) is kept below 0.85 of the radius.
        across, down = np.cos(angle), np.clip(np.sin(angle), -0.85, 0.85)
        across = np.copysign(max(abs(across), 0.5), across)
        x, y = at(across * radius * bx, down * radius * by)
        core, lobes = pick("lesion_core"), int(rng.integers(1, 4))
        lobes, edema_gain, edema = int(fixed.get("lesion_lobes", lobes)), pick("edema_gain"), size * pick("edema_size")
        halo = ellipse(x, y, edema, edema * ratio, rng.uniform(0.0, 180.0)) & brain
        image += edema_gain * cv2.GaussianBlur(halo.astype(np.float32), (0, 0), max(0.02 * side, 0.5))
        body = np.zeros(image.shape, bool)
        for _ in range(lobes):
            dx, dy = rng.uniform(-0.45, 0.45, 2) * size * (lobes > 1)
            body |= ellipse(x + dx, y + dy, size, size * ratio, rng.uniform(0.0, 180.0))
        body &= brain
        image[body] = brain_grey + gain + texture * smooth(texture_sigma)[body]
        if core < 0.3:
            image[ellipse(x, y, 0.5 * size, 0.5 * size * ratio, 0.0) & brain] = 0.55 * brain_grey

    # The scanner: shading, point spread, noise (on the background too, but clipped at 0).
    shade = 1.0 + pick("shading") * (xs / width - 0.5) * 2.0 + pick("shading") * (ys / height - 0.5) * 2.0
    image = cv2.GaussianBlur(image * shade, (0, 0), pick("blur") * width / 256.0)
    noise = pick("noise") * rng.standard_normal((height, width)).astype(np.float32)
    noise[~ellipse(cx, cy, hx, hy, tilt)] *= 0.3
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def pool(count: int, seed: int) -> list[tuple[np.ndarray, int]]:
    """`count` phantoms as (uint8 [h, w, 3] BGR, label), half of them with a lesion (label 1)."""
    drawn = []
    for i in range(count):
        grey = draw(np.random.default_rng([seed, i]), lesion=i % 2 == 1)
        drawn.append((cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), i % 2))
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="draw one phantom")
    parser.add_argument("file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lesion", action="store_true")
    args = parser.parse_args()
    cv2.imwrite(args.file, draw(np.random.default_rng(args.seed), args.lesion))
