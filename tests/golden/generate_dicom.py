"""Writes tests/golden/dicom/: small generated DICOM files, and the 8-bit pictures that they stand for.

`dicom/files/*` are the inputs, all drawn here (no patient). `dicom/expected.json` says per file: `code` of the rejection,
or `frames`, `width`, `height`, `notes`, and `tolerance` in levels; `dicom/expected/<name>-<frame>.png` are the pictures:
the pixels as pydicom decodes them, rescaled and windowed by pydicom, stretched to 0..255. Only what pydicom has no
word on is computed here: the percentile window, MONOCHROME1's inversion, padding.

    python -m venv venv && venv/bin/pip install pydicom==3.0.2 pylibjpeg==2.1.0 pylibjpeg-openjpeg==2.6.0 \
        pyjpegls==1.5.1 pillow numpy
    venv/bin/python tests/golden/generate_dicom.py
    venv/bin/python tests/golden/generate_dicom.py --reference ../shared/data/dicom target/dicom-reference
"""

import io
import json
import pathlib
import shutil
import struct
import sys
import warnings

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

warnings.simplefilter("ignore")
W, H = 42, 36
MR = "1.2.840.10008.5.1.4.1.1.4"
ROOT = "1.2.826.0.1.3680043.8.498.99"  # pydicom's own root, then made up


def phantom(width=W, height=H, turn=0):
    """A head: ellipse, inner structure, a bright spot; 0..1, no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    u, v = (x - width * 0.5) / (width * 0.42), (y - height * 0.48) / (height * 0.45)
    head = u**2 + v**2 < 1
    out = np.where(head, 0.35 + 0.2 * np.sin(3 * u + turn) * np.cos(4 * v), 0.01 * ((x * 7 + y * 3) % 5))
    out = np.where((u - 0.3) ** 2 + (v + 0.2) ** 2 < 0.04, 0.95, out)
    return out


def dataset(pixels, syntax=ExplicitVRLittleEndian, bits=None, signed=False, photometric="MONOCHROME2", **tags):
    """A data set around `pixels`: (frames,) rows, columns (, 3), of an integer type."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MR
    meta.MediaStorageSOPInstanceUID = f"{ROOT}.1.1.1"
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = f"{ROOT}.9"
    ds = Dataset()
    ds.file_meta, ds.preamble = meta, b"\0" * 128
    ds.SOPClassUID, ds.SOPInstanceUID = MR, f"{ROOT}.1.1.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.1", f"{ROOT}.1.1"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "CANARY^PATIENT", "CANARY-ID", "19010203"
    ds.Modality, ds.InstanceNumber = "MR", 7
    ds.StudyDate, ds.StudyTime = "20260102", "030405"
    ds.AcquisitionDate, ds.AcquisitionTime = "20260102", "040506.789"
    color = 3 if photometric in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT") else 1
    frames = pixels.ndim > (3 if color == 3 else 2)
    ds.Rows, ds.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    if frames:
        ds.NumberOfFrames = pixels.shape[0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = color, photometric
    if color == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(signed)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def write(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(ds, syntax, **options):
    ds.compress(syntax, generate_instance_uid=False, **options)
    return ds


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def encapsulated(ds, syntax, frames, **tags):
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def jpeg_lossless(pixels, precision):
    """Lossless JPEG (SOF3), predictor 1, one component, one fixed Huffman table of 17 codes of 5 bits."""
    height, width = pixels.shape
    bits = []
    for y in range(height):
        for x in range(width):
            if x:
                predicted = int(pixels[y, x - 1])
            else:
                predicted = int(pixels[y - 1, 0]) if y else 1 << (precision - 1)
            difference = (int(pixels[y, x]) - predicted + 32768) % 65536 - 32768
            size = abs(difference).bit_length()
            bits.append(f"{size:05b}")
            if 0 < size < 16:
                value = difference if difference > 0 else difference + (1 << size) - 1
                bits.append(f"{value:0{size}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    data = bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)).replace(b"\xff", b"\xff\0")
    segment = lambda marker, body: struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    return (
        b"\xff\xd8"
        + segment(0xC3, struct.pack(">BHHB", precision, height, width, 1) + b"\1\x11\0")
        + segment(0xC4, b"\0" + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17)))
        + segment(0xDA, b"\1\1\0\1\0\0")
        + data
        + b"\xff\xd9"
    )


def without_meta(data):
    """The bare data set: no preamble, no meta group."""
    ds = pydicom.dcmread(io.BytesIO(data))
    start = 132 + 12 + ds.file_meta.FileMetaInformationGroupLength
    return data[start:]


def percentile_levels(values, keep):
    """The window from the 0.5th to the 99.5th percentile by nearest ranks, as levels."""
    ordered = np.sort(values[keep])
    last = len(ordered) - 1
    low, high = ordered[(last * 5 + 500) // 1000], ordered[(last * 995 + 500) // 1000]
    return np.clip((values - low) / (high - low), 0, 1) * 255


def levels(ds, pixels, frame=0):
    """pydicom's rescale and window, stretched to 0..255."""
    stored = pixels.astype(np.int64)
    keep = np.ones(stored.shape, bool)
    if "PixelPaddingValue" in ds:
        keep = stored != ds.PixelPaddingValue
    scope = Dataset()
    for name in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"):
        if name in ds:
            setattr(scope, name, ds[name].value)
    if "SharedFunctionalGroupsSequence" in ds:
        groups = [ds.SharedFunctionalGroupsSequence[0], ds.PerFrameFunctionalGroupsSequence[frame]]
        for group in groups:
            for item in group.get("PixelValueTransformationSequence", []):
                scope.RescaleSlope, scope.RescaleIntercept = item.RescaleSlope, item.RescaleIntercept
            for item in group.get("FrameVOILUTSequence", []):
                scope.WindowCenter, scope.WindowWidth = item.WindowCenter, item.WindowWidth
    values = apply_modality_lut(pixels, scope).astype(float)
    if "WindowWidth" in scope and "ModalityLUTSequence" not in ds:
        out = apply_voi_lut(values, scope, index=0, prefer_lut=False)
        slope, intercept = float(scope.get("RescaleSlope", 1)), float(scope.get("RescaleIntercept", 0))
        low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1) if ds.PixelRepresentation else (0, 2**ds.BitsStored - 1)
        low, high = low * slope + intercept, high * slope + intercept
        out = (out - low) / (high - low) * 255
    elif ds.BitsStored == 8 and not ds.PixelRepresentation and "RescaleSlope" not in ds:
        out = values
    else:
        out = percentile_levels(values, keep)
    out = np.floor(np.clip(out, 0, 255) + 0.5 + 1e-9)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        out = 255 - out
    out[~keep] = 0
    return out.astype(np.uint8)


def files():
    """Name to (bytes, data set to take the expected pictures from, notes, tolerance), or (bytes, rejection code)."""
    out = {}
    p = phantom()
    u12 = (p * 3000 + 40).astype(np.uint16)
    s16 = (p * 2400 - 900).astype(np.int16)
    u8 = (p * 255).astype(np.uint8)
    rgb = np.dstack([u8, np.roll(u8, 4, 1), 255 - u8])
    window = dict(WindowCenter=1500, WindowWidth=2600)
    many = np.stack([(phantom(turn=t) * 3000 + 40).astype(np.uint16) for t in range(3)])
    reduced, percentile, aspect = "sixteen_bit_reduced", "percentile_window", "aspect_corrected"

    def add(name, ds, notes=(reduced,), tolerance=0, data=None):
        data = data or write(ds)
        out[name] = (data, ds, list(notes), tolerance)

    add("explicit-little", dataset(u12, bits=12, **window))
    add("implicit-little", dataset(u12, ImplicitVRLittleEndian, bits=12, **window))
    add("explicit-big", dataset(s16, ExplicitVRBigEndian, signed=True, WindowCenter=200, WindowWidth=1500))
    add("deflated", dataset(u12, DeflatedExplicitVRLittleEndian, bits=12, **window))
    for name in ("explicit-little", "implicit-little", "explicit-big"):
        data, ds, notes, tolerance = out[name]
        out[f"bare-{name}"] = (without_meta(data), ds, notes, tolerance)
    data, ds, notes, tolerance = out["explicit-little"]
    out["no-preamble"] = (data[132:], ds, notes, tolerance)
    out["prefix-only"] = (data[128:], ds, notes, tolerance)
    add("rescaled", dataset(u12, bits=12, RescaleSlope="9.570207", RescaleIntercept="-19595", WindowCenter="-927", WindowWidth="22650"))
    add("two-windows", dataset(u12, bits=12, WindowCenter=[1500, 100], WindowWidth=[2600, 10]))
    add("linear-exact", dataset(u12, bits=12, VOILUTFunction="LINEAR_EXACT", **window))
    add("sigmoid", dataset(s16, signed=True, VOILUTFunction="SIGMOID", WindowCenter=100, WindowWidth=900))
    add("threshold", dataset(u12, bits=12, WindowCenter=1200, WindowWidth=1))
    add("monochrome1", dataset(u12, bits=12, photometric="MONOCHROME1", **window))
    add("no-window-signed", dataset(s16, signed=True), (reduced, percentile))
    add("no-window-10-bit", dataset((p * 1000).astype(np.uint16), bits=10), (reduced, percentile))
    padded = s16.copy()
    padded[:, :9] = -2000
    add("padding", dataset(padded, signed=True, PixelPaddingValue=-2000), (reduced, percentile))
    add("padding-monochrome1", dataset(padded, signed=True, photometric="MONOCHROME1", PixelPaddingValue=-2000, WindowCenter=200, WindowWidth=2000))
    add("shifted", dataset(u12 << 4, bits=12, HighBit=15, **window), data=None)
    out["shifted"][1].PixelData, out["shifted"][1].HighBit = u12.tobytes(), 11  # what the bits mean, for pydicom
    add("gray8", dataset(u8), ())
    add("gray8-window", dataset(u8, WindowCenter=100, WindowWidth=120), ())
    add("gray8-rescaled", dataset(u8, RescaleSlope=2, RescaleIntercept=-100), (percentile,))
    add("gray8-signed", dataset((u8.astype(int) - 128).astype(np.int8), signed=True, WindowCenter=0, WindowWidth=200), ())
    add("odd-size", dataset(u8[:35, :41]), ())
    ds = dataset(u12, bits=12, **window)
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [4096, 0, 16], "US", list(range(4096))
    ds.ModalityLUTSequence = Sequence([item])
    ds["ModalityLUTSequence"].value[0]["LUTDescriptor"].VR = ds["ModalityLUTSequence"].value[0]["LUTData"].VR = "US"
    add("modality-lut", ds, (reduced, percentile))

    add("rgb", dataset(rgb, photometric="RGB"), ())
    add("rgb-planar", dataset(rgb, photometric="RGB", PlanarConfiguration=1, PixelData=np.moveaxis(rgb, 2, 0).tobytes()), ())
    add("rgb-all-gray", dataset(np.dstack([u8] * 3), photometric="RGB"), ())
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    add("ybr-full", dataset(ybr, photometric="YBR_FULL"), (), 1)
    flat = ybr.copy()
    flat[:, 1::2, 1:] = flat[:, ::2, 1:]
    pairs = np.stack([flat[:, ::2, 0], flat[:, 1::2, 0], flat[:, ::2, 1], flat[:, ::2, 2]], axis=2)
    add("ybr-422", dataset(flat, photometric="YBR_FULL_422", PixelData=pairs.tobytes()), (), 1)
    for name, kind in (("palette8", np.uint8), ("palette16", np.uint16)):
        ds = dataset((u8 // 2).astype(kind), photometric="PALETTE COLOR")
        for i, colour in enumerate(("Red", "Green", "Blue")):
            table = ((np.arange(100) * (i + 2) * 257) % 65536).astype("<u2")
            setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [100, 10, 16])
            ds[f"{colour}PaletteColorLookupTableDescriptor"].VR = "US"
            setattr(ds, f"{colour}PaletteColorLookupTableData", table.tobytes())
        add(name, ds, ())

    add("rle", compressed(dataset(u12, bits=12, **window), RLELossless))
    add("rle-8", compressed(dataset(u8), RLELossless), ())
    add("rle-rgb", compressed(dataset(rgb, photometric="RGB"), RLELossless), ())
    add("rle-frames", compressed(dataset(many, bits=12, **window), RLELossless))
    add("jpeg2000-lossless", compressed(dataset(u12, bits=12, **window), JPEG2000Lossless))
    add("jpeg2000-signed", compressed(dataset(s16, signed=True, WindowCenter=200, WindowWidth=1500), JPEG2000Lossless))
    add("jpeg2000-rgb", compressed(dataset(rgb, photometric="RGB"), JPEG2000Lossless), ())
    add("jpeg2000-lossy", compressed(dataset(u12, bits=12, **window), JPEG2000, j2k_cr=[6]), tolerance=2)
    add("jpeg2000-frames", compressed(dataset(many, bits=12, **window), JPEG2000Lossless))
    add("jpeg-ls", compressed(dataset(u12, bits=12, **window), JPEGLSLossless))
    add("jpeg-ls-8", compressed(dataset(u8), JPEGLSLossless), ())
    add("jpeg-ls-signed", compressed(dataset(s16, signed=True, WindowCenter=200, WindowWidth=1500), JPEGLSLossless))
    add("jpeg-ls-near", compressed(dataset(u12, bits=12, **window), JPEGLSNearLossless, jls_error=3))
    add("jpeg-ls-near-8", compressed(dataset(u8), JPEGLSNearLossless, jls_error=2), ())
    blocks = np.kron(np.arange(42).reshape(6, 7) * 97 % 4096, np.ones((6, 6))).astype(np.uint16)
    add("jpeg-ls-runs", compressed(dataset(blocks, bits=12, **window), JPEGLSLossless))
    add("jpeg-ls-colour", compressed(dataset(rgb, photometric="RGB"), JPEGLSLossless), ())
    out["jpeg-ls-colour"] = (out["jpeg-ls-colour"][0], "unsupported")
    add("jpeg-lossless", encapsulated(dataset(u12, bits=12, **window), JPEGLosslessSV1, [jpeg_lossless(u12, 12)]))
    out["jpeg-lossless"] = (out["jpeg-lossless"][0], dataset(u12, bits=12, **window), [reduced], 0)
    add("jpeg-lossless-8", encapsulated(dataset(u8), JPEGLosslessSV1, [jpeg_lossless(u8, 8)]), ())
    out["jpeg-lossless-8"] = (out["jpeg-lossless-8"][0], dataset(u8), [], 0)
    add("jpeg-baseline", encapsulated(dataset(u8), JPEGBaseline8Bit, [jpeg(Image.fromarray(u8))]), (), 2)
    colour = encapsulated(dataset(rgb, photometric="RGB"), JPEGBaseline8Bit, [jpeg(Image.fromarray(rgb))], PhotometricInterpretation="YBR_FULL_422")
    # pylibjpeg upsamples the colours in another way than libjpeg-turbo does.
    add("jpeg-baseline-colour", colour, (), 10)
    kept = encapsulated(dataset(rgb, photometric="RGB"), JPEGBaseline8Bit, [jpeg(Image.fromarray(rgb), keep_rgb=True, subsampling=0)])
    add("jpeg-baseline-rgb", kept, (), 2)
    # A single frame in three pieces, and frames of several pieces each, told apart by the offset table.
    frame = jpeg(Image.fromarray(u8))
    split = dataset(u8)
    split.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    split.PixelData = encapsulate([frame], fragments_per_frame=3)
    split["PixelData"].is_undefined_length = True
    add("jpeg-pieces", split, (), 2)
    split = dataset(np.stack([u8, 255 - u8]))
    split.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    split.PixelData = encapsulate([frame, jpeg(Image.fromarray(255 - u8))], fragments_per_frame=2)
    split["PixelData"].is_undefined_length = True
    add("jpeg-frames-of-pieces", split, (), 2)

    add("frames", dataset(many, bits=12, **window))
    ds = dataset(many, bits=12, SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1")
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID

    def group(**sequences):
        item = Dataset()
        for name, tags in sequences.items():
            inner = Dataset()
            for tag, value in tags.items():
                setattr(inner, tag, value)
            setattr(item, name, Sequence([inner]))
        return item

    ds.SharedFunctionalGroupsSequence = Sequence([group(PixelValueTransformationSequence=dict(RescaleSlope=2, RescaleIntercept=-100, RescaleType="US"))])
    ds.PerFrameFunctionalGroupsSequence = Sequence([group(FrameVOILUTSequence=dict(WindowCenter=2000 + 500 * i, WindowWidth=3000 + 900 * i)) for i in range(3)])
    add("enhanced", ds)

    out["aspect-tall"] = (write(dataset(u8, PixelSpacing=[1.0, 0.5])), (W, 2 * H), [aspect], 0)
    out["aspect-wide"] = (write(dataset(u8, PixelAspectRatio=[1, 3])), (3 * W, H), [aspect], 0)
    out["aspect-square"] = (write(dataset(u8, PixelSpacing=[0.7, 0.7])), (W, H), [], 0)

    wide = encapsulated(dataset(u12, bits=12), JPEGExtended12Bit, [jpeg(Image.fromarray(u8)).replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc1\0\x0b\x0c")])
    out["jpeg-extended-12"] = (write(wide), "unsupported")
    out["mpeg4"] = (write(encapsulated(dataset(u8), UID("1.2.840.10008.1.2.4.102"), [b"\0" * 40])), "unsupported")
    known = write(encapsulated(dataset(u8), UID("1.2.840.10008.1.2.4.102"), [b"\0" * 40]))
    out["private-syntax"] = (known.replace(b"1.2.840.10008.1.2.4.102", b"1.2.826.0.1.3680043.8.4"), "unsupported")
    out["one-bit"] = (write(dataset(u8, BitsAllocated=1, BitsStored=1, HighBit=0)), "unsupported")

    def object_of(class_uid, **tags):
        ds = dataset(u8, SOPClassUID=class_uid)
        ds.file_meta.MediaStorageSOPClassUID = class_uid
        for name in list(ds.dir()):
            if ds[name].tag.group == 0x28 or name == "PixelData":
                del ds[name]
        for name, value in tags.items():
            setattr(ds, name, value)
        return write(ds)

    out["report"] = (object_of("1.2.840.10008.5.1.4.1.1.88.22", Modality="SR", ValueType="CONTAINER"), "not_an_image_object")
    out["presentation"] = (object_of("1.2.840.10008.5.1.4.1.1.11.1", Modality="PR"), "not_an_image_object")
    out["key-objects"] = (object_of("1.2.840.10008.5.1.4.1.1.88.59", Modality="KO"), "not_an_image_object")
    out["dicomdir"] = (object_of("1.2.840.10008.1.3.10", FileSetID="CANARY"), "not_an_image_object")
    seg = dataset(u8, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", Modality="SEG")
    out["segmentation"] = (write(seg), "not_an_image_object")
    out["image-without-pixels"] = (object_of(MR, Rows=36, Columns=42), "truncated")
    # Claims of more than there is.
    out["claims-65535"] = (write(dataset(u8, Rows=65535, Columns=65535)), "too_many_pixels")
    out["claims-frames"] = (write(dataset(u8, NumberOfFrames=10_000_000)), "corrupt")
    data = write(dataset(u8))
    at = data.rindex(b"\xe0\x7f\x10\0OB\0\0")
    out["claims-4-gigabytes"] = (data[: at + 8] + b"\xfe\xff\xff\xff" + data[at + 12 :], "truncated")
    return out


def main(root):
    folder = root / "dicom"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    (folder / "expected").mkdir()
    expected = {}
    for name, (data, source, *rest) in files().items():
        (folder / "files" / f"{name}.dcm").write_bytes(data)
        if isinstance(source, str):
            expected[name] = {"code": source}
            continue
        notes, tolerance = rest
        if isinstance(source, tuple):
            expected[name] = {"frames": 1, "width": source[0], "height": source[1], "notes": notes, "tolerance": None}
            continue
        pixels = source.pixel_array
        count = int(source.get("NumberOfFrames", 1))
        for frame in range(count):
            one = pixels[frame] if count > 1 else pixels
            if source.PhotometricInterpretation.startswith("MONOCHROME"):
                picture = levels(source, one, frame)
            elif source.PhotometricInterpretation == "PALETTE COLOR":
                picture = (pydicom.pixels.apply_color_lut(one, source) >> 8).astype(np.uint8)
            else:
                picture = one  # RGB: pydicom has converted YBR
            Image.fromarray(picture).save(folder / "expected" / f"{name}-{frame}.png", optimize=True)
        expected[name] = {"frames": count, "width": int(source.Columns), "height": int(source.Rows), "notes": notes, "tolerance": tolerance}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return expected


def reference(data, folder):
    """What pydicom makes of the files in `data`, as PNG: for the comparison in tests/it/dicom.rs, not to be committed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(data.iterdir()):
        try:
            ds = pydicom.dcmread(path)
            pixels = ds.pixel_array
        except Exception as error:
            print(f"{path.name}: pydicom cannot: {str(error).splitlines()[0]}")
            continue
        for frame in range(int(ds.get("NumberOfFrames", 1))):
            one = pixels[frame] if pixels.ndim == 3 else pixels
            Image.fromarray(levels(ds, one, frame)).save(folder / f"{path.name}-{frame}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reference"]:
        reference(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        print(len(main(pathlib.Path(__file__).parent)), "files")
