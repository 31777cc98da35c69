"""Reading images and depth maps: the one place where stored numbers become metres.

Files are decoded from memory, because OpenCV then refuses a file that was cut short instead of filling in the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pcd.datasets.base import Intrinsics, Sample
from pcd.errors import DatasetError, MissingFileError, SampleError, UsageError

Rgb = npt.NDArray[np.uint8]
Depth = npt.NDArray[np.float32]

DEPTH_SUFFIXES = (".png", ".npy", ".tif", ".tiff")
"""Depth files that `read_depth` understands."""

_PNG_START = b"\x89PNG\r\n\x1a\n"


def read_rgb(path: Path) -> Rgb:
    """An image file as RGB uint8 `(H, W, 3)`; grey is repeated, alpha dropped, 16 bits reduced to 8.

    The EXIF orientation is ignored: a depth map has none, and pixel (row, column) must mean the same in both files.
    Raises `MissingFileError`, or `SampleError` for a file that is no image or was cut short.
    """
    return np.asarray(_decoded(path, "image", cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION), dtype=np.uint8)


def read_depth_png(path: Path, units_per_metre: float, invalid: float | Sequence[float] = 0) -> Depth:
    """A 16-bit single-channel PNG as float32 `(H, W)` in metres, NaN where there is no depth.

    `invalid` are further stored values that mean "no depth"; 0 always does.
    Raises `MissingFileError`, or `SampleError` for a broken file or another depth or number of channels.
    """
    stored = _decoded(path, "depth map", cv2.IMREAD_UNCHANGED)
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise SampleError(
            f"depth map {path} is {_kind(stored)}; expected 16-bit, 1 channel. A picture of a depth map "
            "(coloured, or reduced to 8 bits) has lost its metres: point the list to the original file."
        )
    return _to_metres(stored, units_per_metre, invalid)


def read_depth(path: Path, units_per_metre: float | None, invalid: float | Sequence[float] = 0) -> Depth:
    """A depth map in PNG (16 bits), NumPy or TIFF (16 bits or more, or float) as float32 metres `(H, W)`, NaN for none.

    Without `units_per_metre` the file must hold floats, taken as metres. Zero, negative and non-finite values and those in
    `invalid` (as stored) are missing. Raises `MissingFileError` or `SampleError`.
    """
    suffix = path.suffix.lower()
    if suffix == ".png" and units_per_metre is not None:
        return read_depth_png(path, units_per_metre, invalid)
    if suffix == ".npy":
        stored = _numpy_file(path, mapped=False)
    elif suffix in DEPTH_SUFFIXES:
        stored = _decoded(path, "depth map", cv2.IMREAD_UNCHANGED)
    else:
        raise SampleError(f"depth map {path}: a {suffix!r} file cannot be read; convert it to {', '.join(DEPTH_SUFFIXES)}.")
    wide = stored.dtype.kind == "f" or (stored.dtype.kind in "iu" and stored.dtype.itemsize >= 2)
    if stored.ndim != 2 or not wide:
        raise SampleError(f"depth map {path} is {_kind(stored)}; expected one channel of 16-bit integers or of floats.")
    if units_per_metre is None and stored.dtype.kind != "f":
        raise SampleError(f"depth map {path} holds integers ({stored.dtype}) and no unit is known; state units per metre.")
    return _to_metres(stored, units_per_metre or 1.0, invalid)


def depth_size(path: Path) -> tuple[int, int]:
    """(height, width) of a depth map. PNG and NumPy files are asked for their header only; TIFF files are decoded.

    Raises `MissingFileError` or `SampleError`.
    """
    suffix = path.suffix.lower()
    if suffix == ".png":
        header = _bytes(path, "depth map", 24)
        if len(header) < 24 or not header.startswith(_PNG_START) or header[12:16] != b"IHDR":
            raise SampleError(f"depth map {path} does not start as a PNG file does: it is broken or of another format.")
        width, height = struct.unpack(">II", header[16:24])
        return int(height), int(width)
    stored = _numpy_file(path, mapped=True) if suffix == ".npy" else _decoded(path, "depth map", cv2.IMREAD_UNCHANGED)
    if stored.ndim != 2:
        raise SampleError(f"depth map {path} is {_kind(stored)}; expected one channel.")
    return int(stored.shape[0]), int(stored.shape[1])


def checked_sample(key: str, image: tuple[Path, Rgb], depth: tuple[Path, Depth], intrinsics: Intrinsics | None) -> Sample:
    """A sample of an image and a depth map, each with the file it came from.

    Raises `SampleError` if their sizes differ or if no pixel has depth.
    """
    (image_path, rgb), (depth_path, metres) = image, depth
    if rgb.shape[:2] != metres.shape:
        turned = rgb.shape[1::-1] == metres.shape
        hint = " One lies on its side: EXIF orientation is ignored, so store the image upright." if turned else ""
        raise SampleError(
            f"image {image_path} is {rgb.shape[0]}x{rgb.shape[1]} (height x width), its depth map {depth_path} "
            f"{metres.shape[0]}x{metres.shape[1]}; they must be equal.{hint}"
        )
    if not np.isfinite(metres).any():
        raise SampleError(f"depth map {depth_path} has no valid pixel: nothing to train on or to score.")
    return Sample(key=key, rgb=rgb, depth=metres, intrinsics=intrinsics)


def require_root(root: Path | None, dataset: str, layout: str, option: str = "root") -> Path:
    """The folder given by an option. `layout` says in words what it should hold.

    Raises `UsageError` if none was given and `MissingFileError` if it is not a folder.
    """
    flag = "--root or " if option == "root" else ""
    if root is None:
        raise UsageError(f"{dataset}: no folder given; set {flag}dataset.{option} to one with {layout}.")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "is not there"
        raise MissingFileError(f"{dataset}: {root} {what} (set by {flag}dataset.{option}); expected a folder with {layout}.")
    return root


def find_file(candidates: Sequence[Path], what: str, advice: str) -> Path:
    """The first candidate that exists. Raises `MissingFileError` naming all of them, and then `advice`."""
    found = first_existing(candidates)
    if found is None:
        places = f"{candidates[0]}" + "".join(f", nor {other}" for other in candidates[1:])
        raise MissingFileError(f"{what} is not there: no file {places}. {advice}")
    return found


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first candidate that is a file, or None."""
    return next((path for path in candidates if path.is_file()), None)


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark. Raises `MissingFileError` or `DatasetError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"{path} is not there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text: {error}.") from error


def _bytes(path: Path, what: str, count: int = -1) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(count)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"{what} {path} is not there; check the dataset's root and the list that names it.") from None
    except OSError as error:
        raise SampleError(f"{what} {path} cannot be read: {error.strerror}.") from error


def _decoded(path: Path, what: str, flags: int) -> npt.NDArray[Any]:
    data = np.frombuffer(_bytes(path, what), dtype=np.uint8)
    # imdecode throws on an empty buffer and returns None on everything else that it cannot decode.
    array = cv2.imdecode(data, flags) if data.size else None
    if array is None:
        raise SampleError(
            f"{what} {path} ({data.size} bytes) cannot be decoded: it is cut short, damaged or of another format."
        )
    return array


def _numpy_file(path: Path, mapped: bool) -> npt.NDArray[Any]:
    _bytes(path, "depth map", 1)
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SampleError(f"depth map {path} is not a whole NumPy file of numbers: {error}.") from error
    return array


def _kind(array: npt.NDArray[Any]) -> str:
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else f"array of shape {array.shape},"
    return f"{array.dtype.itemsize * 8}-bit ({array.dtype}), {channels} channel{'' if channels == 1 else 's'}"


def _to_metres(stored: npt.NDArray[Any], units_per_metre: float, invalid: float | Sequence[float]) -> Depth:
    with np.errstate(over="ignore"):
        metres = stored.astype(np.float32) / np.float32(units_per_metre)
    missing = ~np.isfinite(metres) | (metres <= 0)
    for value in [invalid] if isinstance(invalid, int | float) else invalid:
        missing |= stored == value
    metres[missing] = np.nan
    return np.asarray(metres, dtype=np.float32)
