"""Point clouds: depth, colours and a pinhole camera to a PLY file.

Pixel (row, column) has its centre at `v = row`, `u = column`, as in OpenCV and in the calibration of KITTI and NYU. Depth is
the coordinate z along the optical axis, not the length of the ray: `x = (u - cx) z / fx`, `y = (v - cy) z / fy`; x points
right, y down and z forward.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcd.datasets.base import Intrinsics
from pcd.errors import UsageError
from pcd.prediction.result import FloatArray, Prediction, strips

VERTEX = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")],
)
_TYPES = {"<f4": "float", "|u1": "uchar"}
_COMMENTS = (
    "metres; x right, y down, z forward (OpenCV); z is depth along the optical axis, not the length of the ray",
    "x = (u - cx) z / fx, y = (v - cy) z / fy; the centre of pixel (row, column) is at u = column, v = row",
)


def parse_intrinsics(text: str) -> Intrinsics:
    """`FX,FY,CX,CY` in pixels. Raises `UsageError` for anything but four numbers with positive focal lengths."""
    try:
        fx, fy, cx, cy = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"intrinsics {text!r}: expected four numbers FX,FY,CX,CY in pixels, e.g. 518.9,519.5,325.6,253.7."
        ) from None
    if not (fx > 0 and fy > 0 and all(map(math.isfinite, (fx, fy, cx, cy)))):
        raise UsageError(f"intrinsics {text!r}: focal lengths FX and FY must be positive, all four finite.")
    return Intrinsics(fx, fy, cx, cy)


def intrinsics_from_fov(degrees: float, size: tuple[int, int]) -> Intrinsics:
    """A camera with square pixels and its axis through the middle of an image of `size` (height, width).

    `degrees` lie between the outer edges of the first and last column. Raises `UsageError` outside (0, 180).
    """
    if not 0 < degrees < 180:
        raise UsageError(f"field of view {degrees:g}: expected horizontal degrees between 0 and 180.")
    focal = size[1] / 2 / math.tan(math.radians(degrees) / 2)
    return Intrinsics(focal, focal, (size[1] - 1) / 2, (size[0] - 1) / 2)


def points(
    depth: FloatArray, rgb: npt.NDArray[np.uint8], camera: Intrinsics, top: int = 0, stride: int = 1
) -> npt.NDArray[np.void]:
    """Vertices of rows `top` onwards, every `stride`-th pixel of both axes: a structured array `(n,)` of `VERTEX`."""
    z = depth[::stride, ::stride]
    vertices = np.empty(z.shape, dtype=VERTEX)
    v, u = top + stride * np.arange(z.shape[0])[:, None], stride * np.arange(z.shape[1])
    vertices["x"] = (u - camera.cx) / camera.fx * z
    vertices["y"] = (v - camera.cy) / camera.fy * z
    vertices["z"] = z
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = rgb[::stride, ::stride, channel]
    return vertices.reshape(-1)


def write_ply(
    path: Path,
    rgb: npt.NDArray[np.uint8],
    prediction: Prediction,
    camera: Intrinsics,
    stride: int = 1,
    notes: tuple[str, ...] = (),
) -> int:
    """Write a binary little-endian PLY, strip by strip; returns the number of points. `notes` become comments of the header."""
    height, width = prediction.size
    number = -(-height // stride) * -(-width // stride)
    lens = f"fx {camera.fx:.9g} fy {camera.fy:.9g} cx {camera.cx:.9g} cy {camera.cy:.9g}"
    header = ["ply", "format binary_little_endian 1.0"]
    comments = (*_COMMENTS, f"{lens}; image {height} x {width} (height x width), stride {stride}", *notes)
    header += [f"comment {line}" for line in comments]
    header += [f"element vertex {number}"]
    header += [f"property {_TYPES[VERTEX[name].str]} {name}" for name in VERTEX.names or ()]
    with path.open("wb") as handle:
        handle.write(("\n".join([*header, "end_header"]) + "\n").encode("ascii", "replace"))
        for top, bottom in strips(height, width, stride):
            part = points(prediction.depth_rows(top, bottom), rgb[top:bottom], camera, top, stride)
            handle.write(part.tobytes())
    return number
