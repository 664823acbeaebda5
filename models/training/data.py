"""The image index, the grouped split, what is sampled how often, and augmentation.

The images themselves stay outside the project: only `index.csv` (file,label,source,group,licence) says where they are.
"""

import collections
import csv
import dataclasses
import hashlib
from pathlib import Path

import cv2
import numpy as np

import phantom
from preprocess import brain_roi, read_bgr

# Share of an epoch by (source, label); label 1 is "yes". Found by trial for the first four sources (FACTS.md), extended
# to lgg, openneuro and the phantoms. Every source with both labels gets about as much yes as no, so that the source
# alone says little; cheng (all yes) and openneuro (all no) are kept small for the same reason.
SHARES = {
    ("navoneel", 0): 0.06, ("navoneel", 1): 0.08,
    ("br35h", 0): 0.18, ("br35h", 1): 0.12,
    ("btp", 0): 0.10, ("btp", 1): 0.08,
    ("lgg", 0): 0.10, ("lgg", 1): 0.09,
    ("cheng", 1): 0.07,
    ("openneuro", 0): 0.05,
    ("phantom", 0): 0.035, ("phantom", 1): 0.035,
}  # fmt: skip

# Seven patients only, so they are dealt by hand: two never seen, one for calibration, four to learn from.
BTP_SPLIT = {"btp-P02": "test", "btp-P05": "test", "btp-P07": "calibration"}
TEST_PERCENT, CALIBRATION_PERCENT = 20, 12


@dataclasses.dataclass
class Sample:
    """One picture. `image` is uint8 [height, width, 3] BGR, `roi` (x, y, width, height), label 1 = tumour."""

    file: str
    label: int
    source: str
    group: str
    part: str  # train | calibration | test
    image: np.ndarray = dataclasses.field(repr=False, default=None)
    roi: tuple[int, int, int, int] = None
    weight: float = 1.0  # 1 / sqrt(size of its group), within source and label


def part_of(group: str) -> str:
    """The side of the split a group stands on: a hash of its name, so that it never depends on the other groups."""
    if group.startswith("btp-"):
        return BTP_SPLIT.get(group, "train")
    bucket = int(hashlib.sha256(f"scansentry-1/{group}".encode()).hexdigest(), 16) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "calibration" if bucket < TEST_PERCENT + CALIBRATION_PERCENT else "train"


def patient_group(row: dict) -> str:
    """The group to split by. cheng's blocks of 12 neighbouring files can cut a patient in two: join blocks in fours."""
    if row["source"] != "cheng":
        return row["group"]
    kind, block = row["group"].rsplit("-", 1)
    return f"{kind}-x{int(block) // 4:03d}"


def load(index: Path) -> list[Sample]:
    """Read every image of the index (paths relative to it) with its region and its side of the split."""
    with open(index, newline="") as file:
        rows = list(csv.DictReader(file))
    samples = []
    for row in rows:
        group = patient_group(row)
        image = read_bgr(index.parent / row["file"])
        if image.max() == 0:
            continue  # all black (one of lgg): the daemon rejects such a file before the model sees it
        samples.append(
            Sample(row["file"], int(row["label"] == "yes"), row["source"], group, part_of(group), image, brain_roi(image))
        )
    return with_weights(samples)


def phantoms(count: int, seed: int, part: str) -> list[Sample]:
    """Generated slices (see phantom.py), half with a lesion; each is its own group."""
    return [
        Sample(f"phantom/{seed}/{i}", label, "phantom", f"phantom-{seed}-{i}", part, image, brain_roi(image))
        for i, (image, label) in enumerate(phantom.pool(count, seed))
    ]


def with_weights(samples: list[Sample]) -> list[Sample]:
    """Set each sample's weight to 1 / sqrt(n), n the samples of the same group, source and label."""
    size = collections.Counter((s.source, s.label, s.group) for s in samples)
    for sample in samples:
        sample.weight = size[(sample.source, sample.label, sample.group)] ** -0.5
    return samples


def balanced(samples: list[Sample]) -> np.ndarray:
    """Weights, sum 1, under which every (source, label) present has its SHARES share: for fitting, not for sampling."""
    weight = np.array([s.weight for s in samples])
    total = collections.defaultdict(float)
    for s, w in zip(samples, weight, strict=True):
        total[(s.source, s.label)] += w
    weight *= [SHARES[(s.source, s.label)] / total[(s.source, s.label)] for s in samples]
    return weight / weight.sum()


def epoch(samples: list[Sample], count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of one epoch, drawn with replacement by SHARES and group weight, shuffled."""
    return rng.choice(len(samples), size=count, p=balanced(samples))


def augment(sample: Sample, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random view of the sample: float32 [size, size, 3], RGB, (pixel - 127) / 128."""

    def chance(p: float) -> bool:
        return rng.random() < p

    # Geometry: where the crop falls, turning, shear, mirror; one cubic warp without antialiasing, as the daemon resizes.
    x, y, width, height = sample.roi
    if chance(0.1):
        x, y, (height, width) = 0, 0, sample.image.shape[:2]
    grow = rng.uniform(-0.06, 0.12, 4) if chance(0.7) else np.zeros(4)
    left, right = x - grow[0] * width, x + width * (1 + grow[1])
    top, bottom = y - grow[2] * height, y + height * (1 + grow[3])
    scale = np.array([(right - left) / size, (bottom - top) / size])
    angle = np.radians(rng.normal(0.0, 10.0)) + (np.pi / 2 * rng.integers(4) if chance(0.12) else 0.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[1.0, rng.normal(0.0, 0.05)], [0.0, 1.0]]) @ np.diag(np.exp(rng.normal(0.0, 0.06, 2)))
    if chance(0.5):
        turn[:, 0] *= -1
    if chance(0.1):
        turn[:, 1] *= -1
    matrix = scale[:, None] * turn  # output pixel, from the middle -> source pixel, from the crop's middle
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    shift = middle - matrix @ np.array([size / 2, size / 2])
    filter_ = cv2.INTER_CUBIC if chance(0.7) else cv2.INTER_LINEAR
    view = cv2.warpAffine(sample.image, np.column_stack([matrix, shift]), (size, size), flags=filter_ | cv2.WARP_INVERSE_MAP)
    if chance(0.85):  # colour is a shortcut (some collections have it, some do not)
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)

    # The scanner and the export: window, gamma, coil shading, sharpness, resolution, noise, JPEG.
    if chance(0.08):
        clahe = cv2.createCLAHE(rng.uniform(1.0, 4.0), (4, 4))
        view = cv2.merge([clahe.apply(c) for c in cv2.split(view)])
    view = view.astype(np.float32) / 255.0
    if chance(0.4):
        low, high = rng.uniform(0.0, 0.08), np.quantile(view, rng.uniform(0.97, 1.0))
        view = np.clip((view - low) / max(high - low, 0.2), 0.0, 1.0)
    if chance(0.7):
        view = view ** np.exp(rng.normal(0.0, 0.3))
    if chance(0.6):
        view = view * rng.uniform(0.7, 1.25) + rng.uniform(-0.06, 0.06) * (view > 0.02)
    if chance(0.3):
        field = cv2.resize(rng.normal(1.0, 0.25, (3, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        view = view * field[:, :, None]
    if chance(0.2):
        small = int(size * rng.uniform(0.35, 0.8))
        view = cv2.resize(cv2.resize(view, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    if chance(0.3):
        soft = cv2.GaussianBlur(view, (0, 0), rng.uniform(0.5, 1.6))
        view = soft if chance(0.6) else view + rng.uniform(0.3, 1.2) * (view - soft)
    if chance(0.4):
        view = view + rng.normal(0.0, rng.uniform(0.0, 0.05), (size, size, 1)).astype(np.float32)
    view = (np.clip(view, 0.0, 1.0) * 255.0).astype(np.uint8)
    if chance(0.2):
        quality = int(rng.integers(30, 90))
        view = cv2.imdecode(cv2.imencode(".jpg", view, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    if chance(0.2):  # hide a part: no single place may decide
        h, w = (size * rng.uniform(0.08, 0.25, 2)).astype(int)
        top, left = int(rng.integers(size - h)), int(rng.integers(size - w))
        view[top : top + h, left : left + w] = rng.choice([0, int(view.mean())])
    return (view[:, :, ::-1].astype(np.float32) - 127.0) / 128.0
