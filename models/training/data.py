"""What is trained on: the image index, healthy volumes, phantoms; groups, folds, and how often each is shown.

The images stay outside the project: `index.csv` (file,label,source,group,licence) says where they are.
"""

import collections
import csv
import dataclasses
import gzip
import hashlib
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np

import phantom
from preprocess import brain_roi, read_bgr

# Share of the steps by (source, label); label 1 is "yes". Every source with both labels gets about as much yes as no, so that
# the source alone says little; cheng (all yes) is kept small for the same reason.
SHARES = {
    ("navoneel", 0): 0.06, ("navoneel", 1): 0.07,
    ("br35h", 0): 0.10, ("br35h", 1): 0.10,
    ("btp", 0): 0.08, ("btp", 1): 0.09,
    ("lgg", 0): 0.08, ("lgg", 1): 0.12,
    ("cheng", 1): 0.08,
    ("openneuro", 0): 0.07,
    ("icbm152", 0): 0.015, ("colin27", 0): 0.03,
    ("phantom", 0): 0.03, ("phantom", 1): 0.06,
}  # fmt: skip

# The same for views of tumour-free slices with a generated lesion, which are "yes".
LESION_SHARES = {
    "navoneel": 0.02, "br35h": 0.03, "btp": 0.025, "lgg": 0.035, "openneuro": 0.05, "icbm152": 0.01, "colin27": 0.02,
}  # fmt: skip

FOLDS = 5
PHANTOMS = 400


@dataclasses.dataclass
class Sample:
    """One picture, without its pixels (see `image`). Label 1 is a tumour."""

    file: str
    label: int
    source: str
    group: str  # never on both sides of a split
    family: str  # sources that share groups: navoneel and br35h are "navoneel+br35h"
    fold: int  # 0-4; -1 for what is never tested on
    pixels: np.ndarray | None = dataclasses.field(repr=False, default=None)  # uint8 [h, w, 3] BGR, where there is no file

    def image(self) -> np.ndarray:
        """uint8 [height, width, 3], BGR."""
        return read_bgr(self.file) if self.pixels is None else self.pixels


def load(index: Path, volumes: Path | None) -> list[Sample]:
    """The index, the slices of the healthy volumes in the folder `volumes` (see `slices`), and the phantoms.

    All-black pictures are left out: the daemon rejects such a file before the model sees it.
    """
    with open(index, newline="") as file:
        rows = list(csv.DictReader(file))
    samples = []
    for row in rows:
        path = index.parent / row["file"]
        if read_bgr(path).max() > 0:
            source, label = row["source"], int(row["label"] == "yes")
            family = "navoneel+br35h" if source in ("navoneel", "br35h") else source
            samples.append(Sample(str(path), label, source, patient_group(row), family, -1))
    for family in {s.family for s in samples}:
        groups = sorted({s.group for s in samples if s.family == family}, key=lambda g: (family != "btp" and dealt(g), g))
        fold = {group: i % FOLDS for i, group in enumerate(groups)}
        for sample in samples:
            if sample.family == family:
                sample.fold = fold[sample.group]
    for name, plane, picture in slices(volumes) if volumes else []:
        source = name.removesuffix("-stripped")
        samples.append(Sample(f"{name}/{plane}", 0, source, source, "volumes", -1, picture))
    for i, (picture, label) in enumerate(phantom.pool(PHANTOMS, 1)):
        samples.append(Sample(f"phantom/{i}", label, "phantom", f"phantom-{i}", "phantom", -1, picture))
    return samples


def dealt(group: str) -> str:
    """Where a group stands when folds are dealt: a hash of its name."""
    return hashlib.sha256(f"cv1/{group}".encode()).hexdigest()


def patient_group(row: dict) -> str:
    """The group to split by. cheng's blocks of 12 neighbouring files can cut a patient in two: join blocks in fours."""
    if row["source"] != "cheng":
        return row["group"]
    kind, block = row["group"].rsplit("-", 1)
    return f"{kind}-x{int(block) // 4:03d}"


def weights(samples: list[Sample], index: np.ndarray, lesion: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Chance of each view, float64 [views], sum 1: by SHARES and LESION_SHARES, and within them 1 / sqrt(size of the group).

    `index` [views]: which sample a view shows; `lesion` [views]: with a generated lesion; `train` [samples]: may be shown.
    """
    size = collections.Counter((s.source, s.label, s.group) for s, used in zip(samples, train, strict=True) if used)
    weight, kinds = np.zeros(len(index)), collections.defaultdict(list)
    for i, (j, drawn) in enumerate(zip(index, lesion, strict=True)):
        s = samples[j]
        if train[j]:
            weight[i] = size[(s.source, s.label, s.group)] ** -0.5
            kinds[(s.source, 2 if drawn else s.label)].append(i)
    for (source, label), members in kinds.items():
        share = LESION_SHARES.get(source, 0.0) if label == 2 else SHARES[(source, label)]
        weight[members] *= share / weight[members].sum()
    return weight / weight.sum()


def slices(folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """(volume, plane, uint8 [h, w, 3]) of tumour-free T1 volumes: 20 slices a plane from the middle half of the head.

    Colin 27 with and without skull (`ch2.nii.gz`, `ch2bet.nii.gz` of Debian's mricron-data) and ICBM 152 2009 symmetric
    (inside the PyPI wheel nilearn 0.14.1); `train.sh` fetches both into the folder.
    """
    wheel = next(folder.glob("nilearn-*.whl"))
    templates = folder / "usr/share/mricron/templates"
    with zipfile.ZipFile(wheel) as archive:
        icbm = archive.read("nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    volumes = {
        "colin27": nifti((templates / "ch2.nii.gz").read_bytes()),
        "colin27-stripped": nifti((templates / "ch2bet.nii.gz").read_bytes()),
        "icbm152": nifti(icbm),
    }
    found = []
    for name, volume in volumes.items():
        volume = np.clip(volume / np.quantile(volume[volume > 0], 0.995), 0, 1) * 255
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            for part in np.linspace(0.28, 0.78, 20):
                cut = np.rot90(np.take(volume, int(volume.shape[axis] * part), axis)).astype(np.uint8)
                if (cut > 45).mean() >= 0.05:
                    found.append((name, plane, cv2.cvtColor(np.ascontiguousarray(cut), cv2.COLOR_GRAY2BGR)))
    return found


def nifti(data: bytes) -> np.ndarray:
    """float32 [x, y, z] of a gzipped little-endian NIfTI-1 file; scaling is left out, since slices are scaled anyway."""
    data = gzip.decompress(data)
    shape, kind, offset = struct.unpack("<8h", data[40:56])[1:4], *struct.unpack("<h", data[70:72]), *struct.unpack("<f", data[108:112])
    dtype = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 512: "<u2"}[kind]
    return np.frombuffer(data, dtype, int(np.prod(shape)), int(offset)).reshape(shape, order="F").astype(np.float32)
