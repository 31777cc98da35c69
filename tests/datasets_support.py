"""Image files written and read without OpenCV, so that the readers under test are checked against something else."""

from __future__ import annotations

import csv
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(path: Path, array: np.ndarray) -> Path:
    """An unfiltered PNG of uint8 or uint16, `(H, W)` or `(H, W, 3)`, built from the format's definition."""
    height, width = array.shape[:2]
    bits, colour = array.dtype.itemsize * 8, 0 if array.ndim == 2 else 2
    rows = array.astype(array.dtype.newbyteorder(">")).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    distances = [(abs(guess - value), order) for order, value in enumerate((left, up, corner))]
    return (left, up, corner)[min(distances)[1]]


def read_png16(path: Path) -> np.ndarray:
    """A 16-bit grey PNG, decoded byte by byte as the format's definition says."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        (length,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + length]
        if name == b"IHDR":
            width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content)
            assert (bits, colour, interlaced) == (16, 0, 0)
        packed += content if name == b"IDAT" else b""
        at += length + 12
    raw, stride, step = zlib.decompress(packed), width * 2, 2
    above = bytearray(stride)
    rows = []
    for row in range(height):
        kind, line = raw[row * (stride + 1)], bytearray(raw[row * (stride + 1) + 1 : (row + 1) * (stride + 1)])
        for i in range(stride if kind else 0):
            left, corner = (line[i - step], above[i - step]) if i >= step else (0, 0)
            add = (0, left, above[i], (left + above[i]) // 2, _paeth(left, above[i], corner))[kind]
            line[i] = (line[i] + add) & 255
        rows.append(np.frombuffer(bytes(line), dtype=">u2"))
        above = line
    return np.stack(rows).astype(np.uint16)


def write_jpeg(path: Path, array: np.ndarray, orientation: int | None = None) -> Path:
    """A JPEG by Pillow, with an EXIF orientation if asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)
    return path


def read_pillow(path: Path) -> np.ndarray:
    """The pixels of an image file as Pillow decodes them."""
    with Image.open(path) as image:
        return np.array(image)


def metres_of(stored: np.ndarray, units: float) -> np.ndarray:
    """Stored integers to float64 metres, NaN for 0, one pixel at a time."""
    return np.array([[value / units if value else np.nan for value in row] for row in stored.tolist()])


def some_rgb(height: int = 6, width: int = 8) -> np.ndarray:
    """A small picture in which every pixel differs."""
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def some_depth(height: int = 6, width: int = 8, hole: bool = True) -> np.ndarray:
    """Stored 16-bit depth in which every pixel differs, the first one missing."""
    depth = (np.arange(height * width, dtype=np.uint16) * 37 + 500).reshape(height, width)
    if hole:
        depth[0, 0] = 0
    return depth


def write_csv(root: Path, rows: list[dict[str, Any]], name: str = "manifest.csv") -> None:
    """A manifest with the columns of all rows; what a row lacks is an empty cell."""
    with (root / name).open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def scene_rows(root: Path) -> list[dict[str, Any]]:
    """Six frames of three scenes as files, and their manifest rows."""
    scenes = ["hall", "hall", "hall", "yard", "yard", "attic"]
    for i in range(len(scenes)):
        write_png(root / f"rgb/{i}.png", some_rgb() + np.uint8(i))
        write_png(root / f"depth/{i}.png", some_depth() + np.uint16(i))
    return [{"image": f"rgb/{i}.png", "depth": f"depth/{i}.png", "scene": scene} for i, scene in enumerate(scenes)]
