"""The folder of images: which of them are taken, and what the model sees of each."""

import random
from pathlib import Path

import cv2
import numpy as np

from common import Refused, first_line

import preprocess
import reference

# What the daemon reads besides DICOM, by its first bytes.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIN_IMAGES = 20
MIN_SIDE = 16
SEED = 7
# Names of folders that say what is in them, besides the labels.
NEGATIVE = {"no", "negative", "normal", "healthy", "notumor", "notumour", "none", "0"}
POSITIVE = {"yes", "positive", "tumor", "tumour", "1"}


def plain(name: str) -> str:
    """A name without case, spaces, hyphens and underscores."""
    return "".join(c for c in name.lower() if c.isalnum())


def is_negative(name: str) -> bool:
    return plain(name) in NEGATIVE


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in it, sorted, as Keras' loaders number them."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def truth(place: Path, labels: list[str], positive: list[str]) -> bool | None:
    """Whether a file of the folder is positive, by the name of the folder directly in it; None where that does not say."""
    name = plain(place.parts[0]) if len(place.parts) > 1 else ""
    for label in labels:
        if name == plain(label):
            return label in positive
    return name in POSITIVE if name in NEGATIVE | POSITIVE else None


class Pictures:
    """Up to `most` images of a folder, a fixed random choice, as the model sees them before normalisation."""

    def __init__(self, folder: Path, most: int, manifest: dict):
        try:
            files = sorted(
                p for p in folder.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts)
            )
        except OSError as error:
            raise Refused(f"images: {folder}: cannot be read ({error.strerror}); give a folder of images") from error
        self.folder, self.total = folder, len(files)
        self.levels: list[np.ndarray] = []
        """uint8 [height, width, channels] each."""
        self.truth: list[bool | None] = []
        self.skipped: list[str] = []
        random.Random(SEED).shuffle(files)
        output = manifest["output"]
        for file in files:
            if len(self.levels) == most:
                break
            place = file.relative_to(folder)
            try:
                self.levels.append(seen(file, manifest))
            except ValueError as error:
                self.skipped.append(f"{place}: {error}")
            else:
                self.truth.append(truth(place, output["labels"], output["positive"]))

    def expect_enough(self) -> None:
        """Refuses a folder from which nothing can be learned."""
        if len(self.levels) < MIN_IMAGES:
            raise Refused(
                f"images: {self.folder}: {len(self.levels)} readable images of {self.total} files; expected at least {MIN_IMAGES}, "
                "better 100 or more, like those that the model will see"
            )

    def known(self) -> np.ndarray | None:
        """1 for positive, 0 for negative, of all images; None unless every one has a truth and both occur."""
        if None in self.truth or len(set(self.truth)) != 2:
            return None
        return np.array(self.truth, int)


def seen(file: Path, manifest: dict) -> np.ndarray:
    """What the model sees of a file: uint8 [height, width, channels]. ValueError says why the daemon would not classify it."""
    try:
        with file.open("rb") as opened:
            if not opened.read(8).startswith(MAGIC):
                raise ValueError("no JPEG, PNG, BMP or TIFF")
    except OSError as error:
        raise ValueError(error.strerror) from error
    try:
        bgr = cv2.imread(str(file))
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot read it ({first_line(error)})") from error
    if bgr is None:
        raise ValueError("OpenCV cannot read it")
    height, width = bgr.shape[:2]
    if manifest["preprocess"]["crop"]["method"] != "none":
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width}x{height} pixels are too few")
        if not preprocess.brain_mask(bgr).any():
            raise ValueError("nothing in it is bright enough to crop to")
    roi = reference.region(bgr, manifest)
    return reference.levels(bgr, roi, manifest)
