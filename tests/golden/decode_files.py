"""Writes tests/golden/decode/: small image files in many formats, and what cv2.imread makes of each.

`decode/files/*` are the inputs; `decode/expected/<name>.png` is `cv2.imread(file)` (IMREAD_COLOR) stored losslessly,
in the usual RGB order; `decode/expected.json` says per file: `null` if imread refused it, else width, height,
`gray` (all three channels are equal at every pixel), `lossy` (a JPEG: decoders may differ by a level or two) and the
SHA-256 of the RGB bytes, row by row, without padding.
"""

import hashlib
import io
import json
import pathlib
import struct
import zlib

import cv2
import numpy as np
import tifffile
from PIL import Image

W, H = 45, 37


def gray_picture(width=W, height=H):
    """A ring with a bright spot on a ramp: every level of grey occurs, no symmetry (so that rotations show)."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x * 5 + y) % 256
    disc = ((x - width * 0.45) ** 2 / (width * 0.35) ** 2 + (y - height * 0.5) ** 2 / (height * 0.4) ** 2) < 1
    spot = ((x - width * 0.3) ** 2 + (y - height * 0.35) ** 2) < 12
    out = np.where(disc, 90 + (x * 3 + y * 2) % 100, ramp // 8)
    return np.where(spot, 250, out).astype(np.uint8)


def color_picture(width=W, height=H):
    g = gray_picture(width, height).astype(int)
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([g, (g * 2 + x * 4) % 256, (255 - g + y * 3) % 256], axis=2).astype(np.uint8)


def png(width, height, depth, color, rows, chunks=(), interlace=False):
    """A PNG from samples: `rows` is (height, width, channels) of integers below 2**depth."""
    rows = np.asarray(rows).reshape(height, width, -1)

    def pack(part):
        raw = b""
        for row in part:
            flat = row.reshape(-1)
            if depth == 16:
                line = flat.astype(">u2").tobytes()
            elif depth == 8:
                line = flat.astype(np.uint8).tobytes()
            else:
                bits = np.zeros(len(flat) * depth, np.uint8)
                for i in range(depth):
                    bits[i::depth] = (flat >> (depth - 1 - i)) & 1
                line = np.packbits(bits).tobytes()
            raw += b"\0" + line
        return raw

    if interlace:
        raw = b""
        for x0, y0, dx, dy in [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]:
            part = rows[y0::dy, x0::dx]
            if part.size:
                raw += pack(part)
    else:
        raw = pack(rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = b"\x89PNG\r\n\x1a\n"
    out += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, int(interlace)))
    for kind, data in chunks:
        out += chunk(kind, data)
    return out + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def bmp(width, height, bits, data, palette=b"", compression=0, masks=b"", top_down=False):
    """A BMP with a BITMAPINFOHEADER around ready-made pixel data."""
    offset = 14 + 40 + len(masks) + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, bits, compression, len(data), 2835, 2835, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + masks + palette + data


def rows_padded(rows):
    return b"".join(bytes(r) + b"\0" * (-len(bytes(r)) % 4) for r in rows)


def rle8(index):
    out = bytearray()
    for row in index[::-1]:
        i = 0
        while i < len(row):
            run = 1
            while i + run < len(row) and run < 255 and row[i + run] == row[i]:
                run += 1
            out += bytes([run, row[i]])
            i += run
        out += b"\0\0"
    return bytes(out + b"\0\1")


def save(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def files():
    gray, color = gray_picture(), color_picture()
    wide = gray.astype(np.uint16) * 257 ^ (np.arange(W, dtype=np.uint16) * 37)[None, :]
    wide_color = color.astype(np.uint16) * 256 + color[:, :, ::-1]
    alpha = ((np.arange(W)[None, :] * 6 + np.arange(H)[:, None]) % 256).astype(np.uint8)
    palette = [(i * 37 % 256, i * 101 % 256, 255 - i) for i in range(256)]
    plte = lambda n: (b"PLTE", bytes(v for p in palette[:n] for v in p))
    out = {}

    for depth in (1, 2, 4):
        out[f"png-gray{depth}"] = png(W, H, depth, 0, gray.astype(int) >> (8 - depth))
        out[f"png-palette{depth}"] = png(W, H, depth, 3, gray.astype(int) >> (8 - depth), [plte(2**depth)])
    out["png-gray8"] = png(W, H, 8, 0, gray)
    out["png-gray8-trns"] = png(W, H, 8, 0, gray, [(b"tRNS", struct.pack(">H", 250))])
    out["png-gray16"] = png(W, H, 16, 0, wide)
    out["png-graya8"] = png(W, H, 8, 4, np.dstack([gray, alpha]))
    out["png-graya16"] = png(W, H, 16, 4, np.dstack([wide, alpha.astype(np.uint16) * 257]))
    out["png-palette8"] = png(W, H, 8, 3, gray, [plte(256)])
    out["png-palette8-gray"] = png(W, H, 8, 3, gray, [(b"PLTE", bytes(v for i in range(256) for v in (i, i, i)))])
    out["png-palette8-trns"] = png(W, H, 8, 3, gray, [plte(256), (b"tRNS", bytes(range(0, 200)))])
    out["png-rgb8"] = png(W, H, 8, 2, color)
    out["png-rgb8-gray"] = png(W, H, 8, 2, np.dstack([gray] * 3))
    out["png-rgb8-trns"] = png(W, H, 8, 2, color, [(b"tRNS", struct.pack(">HHH", *map(int, color[0, 0])))])
    out["png-rgb8-gamma"] = png(W, H, 8, 2, color, [(b"gAMA", struct.pack(">I", 100000))])
    out["png-rgb8-interlaced"] = png(W, H, 8, 2, color, interlace=True)
    out["png-gray8-interlaced"] = png(W, H, 8, 0, gray, interlace=True)
    out["png-rgb16"] = png(W, H, 16, 2, wide_color)
    out["png-rgba8"] = png(W, H, 8, 6, np.dstack([color, alpha]))
    out["png-rgba16"] = png(W, H, 16, 6, np.dstack([wide_color, alpha.astype(np.uint16) * 257]))
    for o in (1, 3, 6, 8):
        out[f"png-exif{o}"] = png(W, H, 8, 2, color, [(b"eXIf", exif(o)[6:] if exif(o).startswith(b"Exif") else exif(o))])
    out["png-1x1"] = png(1, 1, 8, 0, [[77]])

    g, c = Image.fromarray(gray), Image.fromarray(color)
    for name, im, options in [
        ("jpeg-gray", g, {}),
        ("jpeg-444", c, {"subsampling": 0}),
        ("jpeg-422", c, {"subsampling": 1}),
        ("jpeg-420", c, {"subsampling": 2}),
        ("jpeg-420-progressive", c, {"subsampling": 2, "progressive": True}),
        ("jpeg-gray-progressive", g, {"progressive": True}),
        ("jpeg-restart", c, {"subsampling": 2, "restart_marker_blocks": 2}),
        ("jpeg-q30", c, {"quality": 30}),
        ("jpeg-rgb", c, {"keep_rgb": True, "subsampling": 0}),
        ("jpeg-cmyk", c.convert("CMYK"), {}),
    ]:
        out[name] = save(im, **{"format": "JPEG", "quality": 90, **options})
    for o in range(1, 9):
        out[f"jpeg-exif{o}"] = save(c, format="JPEG", quality=90, subsampling=0, exif=exif(o))

    quads = lambda n: b"".join(bytes([p[2], p[1], p[0], 0]) for p in palette[:n])
    bits1 = np.packbits(gray > 100, axis=1)
    low = (gray >> 4).astype(np.uint8)
    even = np.pad(low, ((0, 0), (0, W % 2)))
    out["bmp-1"] = bmp(W, H, 1, rows_padded(bits1[::-1]), quads(2))
    out["bmp-4"] = bmp(W, H, 4, rows_padded((even[:, ::2] << 4 | even[:, 1::2])[::-1]), quads(16))
    out["bmp-8"] = bmp(W, H, 8, rows_padded(gray[::-1]), quads(256))
    out["bmp-8-gray"] = save(g, format="BMP")
    out["bmp-8-rle"] = bmp(W, H, 8, rle8(low), quads(16), compression=1)
    bgr = color[:, :, ::-1]
    c16 = color.astype(np.uint16)
    r555 = (c16[:, :, 0] >> 3) << 10 | (c16[:, :, 1] >> 3) << 5 | c16[:, :, 2] >> 3
    r565 = (c16[:, :, 0] >> 3) << 11 | (c16[:, :, 1] >> 2) << 5 | c16[:, :, 2] >> 3
    out["bmp-16-555"] = bmp(W, H, 16, rows_padded(r.astype("<u2").tobytes() for r in r555[::-1]))
    out["bmp-16-565"] = bmp(W, H, 16, rows_padded(r.astype("<u2").tobytes() for r in r565[::-1]), compression=3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    out["bmp-24"] = bmp(W, H, 24, rows_padded(r.tobytes() for r in bgr[::-1]))
    out["bmp-24-topdown"] = bmp(W, H, 24, rows_padded(r.tobytes() for r in bgr), top_down=True)
    out["bmp-32"] = bmp(W, H, 32, np.dstack([bgr, alpha])[::-1].tobytes())

    def tiff(data, **options):
        buffer = io.BytesIO()
        # A fixed date and no software tag: the file is the same on every run.
        tifffile.imwrite(buffer, data, software=False, datetime=None, metadata=None, **options)
        return buffer.getvalue()

    out["tiff-gray8"] = tiff(gray, photometric="minisblack")
    out["tiff-gray8-white0"] = tiff(gray, photometric="miniswhite")
    out["tiff-gray16"] = tiff(wide, photometric="minisblack")
    out["tiff-gray16-be"] = tiff(wide, photometric="minisblack", byteorder=">")
    out["tiff-gray-f32"] = tiff((gray / 255).astype(np.float32), photometric="minisblack")
    out["tiff-gray-f32-255"] = tiff(gray.astype(np.float32), photometric="minisblack")
    out["tiff-gray-i16"] = tiff(gray.astype(np.int16) * 100 - 3000, photometric="minisblack")
    out["tiff-rgb8"] = tiff(color, photometric="rgb")
    out["tiff-rgb8-planar"] = tiff(np.moveaxis(color, 2, 0), photometric="rgb", planarconfig="separate")
    out["tiff-rgb8-tiled"] = tiff(color, photometric="rgb", tile=(16, 16))
    out["tiff-rgb16"] = tiff(wide_color, photometric="rgb")
    out["tiff-rgba8"] = tiff(np.dstack([color, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    out["tiff-pages"] = tiff(np.stack([color, 255 - color]), photometric="rgb")
    out["tiff-gray1"] = save(Image.fromarray(gray > 100), format="TIFF")
    out["tiff-palette8"] = tiff(gray, photometric="palette", colormap=(np.array(palette).T * 257).astype(np.uint16))
    out["tiff-orientation3"] = tiff(color, photometric="rgb", extratags=[(274, "H", 1, 3, True)])
    out["tiff-orientation6"] = tiff(color, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    for name, compression in [("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("packbits", "packbits")]:
        out[f"tiff-rgb8-{name}"] = save(c, format="TIFF", compression=compression)
        out[f"tiff-gray8-{name}"] = save(g, format="TIFF", compression=compression)
    return out


def extension(name):
    return {"png": "png", "jpeg": "jpg", "bmp": "bmp", "tiff": "tif"}[name.split("-")[0]]


def main(root):
    folder = root / "decode"
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "expected").mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, data in files().items():
        file = f"{name}.{extension(name)}"
        (folder / "files" / file).write_bytes(data)
        read = cv2.imread(str(folder / "files" / file))
        if read is None:
            expected[file] = None
            continue
        assert read.dtype == np.uint8 and read.ndim == 3
        rgb = np.ascontiguousarray(read[:, :, ::-1])
        Image.fromarray(rgb).save(folder / "expected" / f"{name}.png", optimize=True)
        expected[file] = {
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "gray": bool((rgb == rgb[:, :, :1]).all()),
            "lossy": name.startswith("jpeg"),
            "rgb_sha256": hashlib.sha256(rgb.tobytes()).hexdigest(),
        }
    (folder / "expected.json").write_text(json.dumps({"opencv": cv2.__version__, "files": expected}, indent=1) + "\n")
    return expected


if __name__ == "__main__":
    result = main(pathlib.Path(__file__).parent)
    refused = [f for f, e in result.items() if e is None]
    print(f"{len(result)} files, imread refused {refused}")
