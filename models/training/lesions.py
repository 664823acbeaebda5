"""Generated lesions in real slices, with their place: what frees the model from the source of a picture.

Most collections are all "yes" or all "no", or lean to one by sequence, plane or skull-stripping. A lesion drawn into a
tumour-free slice makes a "yes" that differs from its "no" by the lesion alone, and its place is known, so the class
activation map can be trained too. All lengths are fractions of the head's side (the root of its area) unless said otherwise.
"""

import cv2
import numpy as np

MODES = {"bright": 0.34, "dark": 0.14, "ring": 0.24, "mixed": 0.14, "subtle": 0.14}


def smooth(rng: np.random.Generator, sigma: float, side: int) -> np.ndarray:
    """float32 [side, side], noise of mean 0 and standard deviation 1, blurred with `sigma` px."""
    field = cv2.GaussianBlur(rng.standard_normal((side, side)).astype(np.float32), (0, 0), max(sigma, 0.6))
    return (field - field.mean()) / (field.std() + 1e-6)


def head(view: np.ndarray) -> np.ndarray | None:
    """uint8 [side, side], 1 inside the convex hull of the largest bright part of `view` (float, 0-1); None where all is dark."""
    level = max(0.06, 0.18 * np.quantile(view, 0.97))
    mask = cv2.morphologyEx((view > level).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    if not contours:
        return None
    filled = np.zeros(view.shape, np.uint8)
    cv2.fillPoly(filled, [cv2.convexHull(max(contours, key=cv2.contourArea))], 1)
    return filled


def add(view: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """`view` (float32 [side, side], 0-1) with a lesion, and the lesion's coverage (same shape, 0-1); None where none fits."""
    inside_head = head(view)
    if inside_head is None or inside_head.mean() < 0.08:
        return None
    pixels, side = view.shape[0], np.sqrt(inside_head.sum())
    depth = cv2.distanceTransform(np.pad(inside_head, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    allowed = depth > rng.uniform(0.10, 0.2) * side
    if allowed.sum() < 40:
        return None
    ys, xs = np.nonzero(allowed)
    chosen = rng.integers(len(ys))
    cy, cx = float(ys[chosen]), float(xs[chosen])
    radius = side * np.exp(rng.uniform(np.log(0.035), np.log(0.16)))
    y, x = np.mgrid[0:pixels, 0:pixels].astype(np.float32)
    if rng.random() < 0.5:  # mass effect: tissue around it is pushed outwards
        push = rng.uniform(0.15, 0.6)
        dx, dy = x - cx, y - cy
        distance = np.sqrt(dx * dx + dy * dy) + 1e-3
        move = push * radius * np.exp(-((distance / (2.2 * radius)) ** 2)) * np.minimum(distance / radius, 1)
        x_from, y_from = (x - dx / distance * move).astype(np.float32), (y - dy / distance * move).astype(np.float32)
        view = cv2.remap(view.astype(np.float32), x_from, y_from, cv2.INTER_LINEAR)

    # Shape: an ellipse with a rough edge, sometimes with a second lobe; `far` is 1 on its edge.
    turn, long = rng.uniform(0, np.pi), radius * np.exp(rng.normal(0, 0.22))
    short = radius * radius / long
    u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), -(x - cx) * np.sin(turn) + (y - cy) * np.cos(turn)
    rough = smooth(rng, radius * rng.uniform(0.25, 0.7), pixels) * rng.uniform(0.05, 0.3)
    far = np.sqrt((u / long) ** 2 + (v / short) ** 2) + rough
    if rng.random() < 0.3:
        ox, oy = rng.normal(0, 0.8 * radius, 2)
        lobe = np.sqrt(((x - cx - ox) / (0.7 * radius)) ** 2 + ((y - cy - oy) / (0.7 * radius)) ** 2) + rough
        far = np.minimum(far, lobe)
    brain = cv2.erode(inside_head.astype(np.float32), None, iterations=int(max(1, 0.05 * side)))
    brain = cv2.GaussianBlur(brain, (0, 0), 2)
    sharp = np.exp(rng.uniform(np.log(3), np.log(20)))
    coverage = sigmoid((1 - far) * sharp) * brain
    if coverage.sum() < 0.4 * radius * radius:
        return None

    # Grey levels, relative to this picture's tissue.
    core_of_head = depth > 0.12 * side
    tissue = view[core_of_head] if core_of_head.sum() > 50 else view[inside_head > 0]
    low, middle, high = np.quantile(tissue, [0.1, 0.5, 0.95])
    span = max(high - low, 0.12)
    around = float((view * coverage).sum() / coverage.sum())
    mode = rng.choice(list(MODES), p=list(MODES.values()))
    if rng.random() < 0.5:  # oedema
        halo = rng.uniform(1.25, 2.3) - far - smooth(rng, radius * 0.6, pixels) * 0.15
        halo = sigmoid(halo * rng.uniform(3, 8)) * brain
        gain = rng.uniform(0.08, 0.4) * span
        brighter = mode == "bright" or rng.random() < 0.45
        view = view + halo * gain * (1 if brighter else -1) * rng.uniform(0.5, 1)
    texture = smooth(rng, rng.uniform(1, max(1.2, radius * 0.3)), pixels) * rng.uniform(0.02, 0.12) * span
    base = 0.5 * around + 0.5 * middle
    if mode == "bright":
        body = base + rng.uniform(0.3, 1.1) * span + texture
    elif mode == "dark":
        body = base - rng.uniform(0.25, 0.8) * span + texture
    elif mode == "ring":
        core = sigmoid((rng.uniform(0.45, 0.8) - far) * sharp * 1.3)
        body = (base + rng.uniform(0.35, 1.1) * span) * (1 - core) + (base - rng.uniform(0, 0.7) * span) * core + texture
    elif mode == "mixed":
        body = base + rng.uniform(-0.2, 0.6) * span
        body = body + smooth(rng, radius * rng.uniform(0.12, 0.4), pixels) * rng.uniform(0.15, 0.4) * span
    else:
        body = base + rng.choice([-1, 1]) * rng.uniform(0.12, 0.3) * span + texture
    share = rng.uniform(0.75, 1) * coverage
    return np.clip(view * (1 - share) + body * share, 0, 1).astype(np.float32), coverage


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))
