"""PNG files written row by row, so that a picture is never held whole."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_START = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}
_UP = 2
"""PNG's filter type for differences to the row above: smooth maps become mostly small numbers."""
_LEVEL = 1
"""zlib's fastest: twice as fast as 3 on depth maps, and 17 % larger."""


def _chunk(handle: BinaryIO, kind: bytes, data: bytes) -> None:
    handle.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def write_png(path: Path, size: tuple[int, int], channels: int, bits: int, strips: Iterable[npt.NDArray[Any]]) -> None:
    """Write a PNG of `size` (height, width), 1 (grey) or 3 (RGB) channels of 8 or 16 bits.

    `strips` are its rows from top to bottom, uint8 or uint16 `(rows, W)` or `(rows, W, 3)`. Raises `ValueError` if they are of
    another shape or not as many as announced.
    """
    height, width = size
    packer, done = zlib.compressobj(_LEVEL), 0
    above = np.zeros((1, width * channels * bits // 8), dtype=np.uint8)
    with path.open("wb") as handle:
        handle.write(_START)
        _chunk(handle, b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _COLOUR_TYPE[channels], 0, 0, 0))
        for strip in strips:
            raw = np.ascontiguousarray(strip, dtype=">u2" if bits == 16 else np.uint8).view(np.uint8)
            rows = np.concatenate([above, raw.reshape(len(strip), above.shape[1])])
            filtered = np.full((len(strip), 1 + above.shape[1]), _UP, dtype=np.uint8)
            np.subtract(rows[1:], rows[:-1], out=filtered[:, 1:])
            above, done = rows[-1:].copy(), done + len(strip)
            _chunk(handle, b"IDAT", packer.compress(filtered.tobytes()))
        if done != height:
            raise ValueError(f"{path}: {done} rows for a picture of {height}")
        _chunk(handle, b"IDAT", packer.flush())
        _chunk(handle, b"IEND", b"")
