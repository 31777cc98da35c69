"""A small ray caster: a pinhole camera, convex solids, exact planar depth.

World axes: x right, y forward, z up, metres. Camera axes: x right, y down, z forward (as OpenCV). Integer coordinates are
pixel centres: pixel (row i, column j) is the ray through `((j - cx) / fx, (i - cy) / fy, 1)` in the camera frame. That
direction has z = 1, so the ray parameter of a hit is its planar depth, the z-coordinate in the camera frame.

Every solid is a unit solid under a linear map (its half sizes, a turn about the vertical, a shift); ray parameters survive
linear maps, so all intersections are found in unit coordinates, and only inside the rectangle the solid covers on screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pcd.datasets.base import Intrinsics
from pcd.datasets.scenes.materials import Floats, Material

Shape = Literal["box", "shell", "pillar", "ball"]
"""A box (whose top may be narrower), a box seen from inside, an upright cylinder, an ellipsoid."""
Vector = tuple[float, float, float]

NEAR = 0.1
"""Metres in front of the camera before which nothing is seen."""
TINY = np.float32(1e-12)

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if np.abs(_CORNERS[a] - _CORNERS[b]).sum() == 2])


@dataclass(frozen=True)
class Solid:
    """A convex solid. `half` holds its half sizes along its own axes, which are the world's turned by `yaw` (radians).

    `taper` is for boxes: the top is that share as long (along the solid's y) as the bottom; 0 makes a gable roof.
    `top`, `bottom` and `front` (the face towards the solid's +y) default to `material`.
    """

    shape: Shape
    centre: Vector
    half: Vector
    material: Material
    yaw: float = 0.0
    taper: float = 1.0
    top: Material | None = None
    bottom: Material | None = None
    front: Material | None = None
    casts_shadow: bool = True


@dataclass(frozen=True)
class Camera:
    """Where the camera is and looks: `yaw` turns left from +y, `pitch` up, `roll` clockwise as seen by it (radians)."""

    position: Vector
    yaw: float
    pitch: float
    roll: float
    intrinsics: Intrinsics
    height: int
    width: int

    def rotation(self) -> npt.NDArray[np.float64]:
        """`(3, 3)`, camera to world: its columns are the camera's x, y and z axes in the world."""
        cos_yaw, sin_yaw, cos_pitch, sin_pitch = _cos_sin(self.yaw) + _cos_sin(self.pitch)
        forward = np.array([-sin_yaw * cos_pitch, cos_yaw * cos_pitch, sin_pitch])
        right = np.array([cos_yaw, sin_yaw, 0.0])
        down = np.cross(forward, right)
        cos_roll, sin_roll = _cos_sin(self.roll)
        return np.stack([cos_roll * right + sin_roll * down, cos_roll * down - sin_roll * right, forward], axis=1)

    def axes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Ray slopes `x (W,)` and `y (H,)` of the columns and rows, in the camera frame."""
        k = self.intrinsics
        columns, rows = np.arange(self.width, dtype=np.float64), np.arange(self.height, dtype=np.float64)
        return (columns - k.cx) / k.fx, (rows - k.cy) / k.fy

    def directions(self) -> Floats:
        """World directions `(3, H, W)` of all pixels, with planar depth as their parameter."""
        x, y = self.axes()
        turn = self.rotation()
        return np.stack([_plane(turn[axis], x, y) for axis in range(3)])


@dataclass(frozen=True)
class Hits:
    """What each pixel sees: `depth (H, W)` float32 in metres, inf for nothing; `solid (H, W)` its index, -1 for nothing."""

    depth: Floats
    solid: npt.NDArray[np.int16]


def _cos_sin(angle: float) -> tuple[float, float]:
    return math.cos(angle), math.sin(angle)


def _plane(row: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Floats:
    """`row[0] * x + row[1] * y + row[2]` over the pixels `(len(y), len(x))`, without zeros (they are divided by)."""
    columns, rows = (row[0] * x + row[2]).astype(np.float32), (row[1] * y).astype(np.float32)
    values: Floats = columns[None, :] + rows[:, None]
    values[values == 0] = TINY
    return values


def turns(solids: Sequence[Solid]) -> npt.NDArray[np.float64]:
    """`(K, 3, 3)`: from world offsets to the solids' own axes, in metres."""
    yaw = np.array([solid.yaw for solid in solids])
    matrices = np.zeros((len(solids), 3, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = np.cos(yaw)
    matrices[:, 0, 1], matrices[:, 1, 0], matrices[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return matrices


def trace(camera: Camera, solids: Sequence[Solid]) -> Hits:
    """The nearest solid along every pixel's ray and its planar depth (to float32 rounding, about 1e-6 of the depth)."""
    depth = np.full((camera.height, camera.width), np.inf, dtype=np.float32)
    nearest = np.full(depth.shape, -1, dtype=np.int16)
    half = np.array([solid.half for solid in solids])
    to_unit = turns(solids) / half[:, :, None]
    offset = np.array(camera.position) - np.array([solid.centre for solid in solids])
    origins = np.einsum("kij,kj->ki", to_unit, offset).astype(np.float32)
    matrices = to_unit @ camera.rotation()
    x, y = camera.axes()
    for index, (top, bottom, left, right) in enumerate(screen_boxes(camera, solids)):
        if top >= bottom or left >= right:
            continue
        window = np.s_[top:bottom, left:right]
        rays = [_plane(matrices[index, axis], x[left:right], y[top:bottom]) for axis in range(3)]
        enter, leave = crossing(solids[index], list(origins[index]), rays)
        if solids[index].shape == "shell":
            enter = leave
        seen = (enter <= leave) & (enter > NEAR) & (enter < depth[window])
        np.copyto(depth[window], enter, where=seen)
        np.copyto(nearest[window], np.int16(index), where=seen)
    return Hits(depth, nearest)


def screen_boxes(camera: Camera, solids: Sequence[Solid]) -> list[tuple[int, int, int, int]]:
    """For each solid the rows `top:bottom` and columns `left:right` of the frame that can see it; empty if none can."""
    half, centre = np.array([solid.half for solid in solids]), np.array([solid.centre for solid in solids])
    to_world = np.swapaxes(turns(solids), 1, 2)
    corners = np.einsum("kij,kcj->kci", to_world, half[:, None, :] * _CORNERS) + centre[:, None, :]
    seen = (corners - np.array(camera.position)) @ camera.rotation()
    starts, ends = seen[:, _EDGES[:, 0]], seen[:, _EDGES[:, 1]]
    span = ends[..., 2] - starts[..., 2]
    share = (NEAR - starts[..., 2]) / np.where(span == 0, 1.0, span)
    cuts = starts + share[..., None] * (ends - starts)
    points = np.concatenate([seen, cuts], axis=1)
    valid = np.concatenate([seen[..., 2] >= NEAR, (share > 0) & (share < 1) & (span != 0)], axis=1)
    z, k = np.where(valid, points[..., 2], 1.0), camera.intrinsics
    columns, rows = k.fx * points[..., 0] / z + k.cx, k.fy * points[..., 1] / z + k.cy
    bounds = [_span(rows, valid, camera.height), _span(columns, valid, camera.width)]
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in np.concatenate(bounds, axis=1)]


def _span(values: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.int64]:
    low, high = np.where(valid, values, np.inf).min(axis=1), np.where(valid, values, -np.inf).max(axis=1)
    ends = np.stack([np.floor(low), np.ceil(high) + 1], axis=1)
    return np.asarray(np.clip(ends, 0, size), dtype=np.int64)


def crossing(solid: Solid, origin: Sequence[Floats], rays: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Where rays enter and leave a solid: parameters `(...)`; entering after leaving means a miss.

    `origin` (3 numbers or 3 arrays) and `rays` (3 arrays without zeros) are in the solid's unit coordinates.
    """
    if solid.shape == "ball":
        return _round(origin, rays)
    if solid.shape == "pillar":
        (low, high), (bottom, top) = _round(origin[:2], rays[:2]), _slab(origin[2], rays[2])
        return np.maximum(low, bottom), np.minimum(high, top)
    (left, right), (bottom, top) = _slab(origin[0], rays[0]), _slab(origin[2], rays[2])
    back, front = _slab(origin[1], rays[1]) if solid.taper == 1 else _slopes(origin, rays, solid.taper)
    return np.maximum(np.maximum(left, bottom), back), np.minimum(np.minimum(right, top), front)


def _slab(origin: Floats, ray: Floats) -> tuple[Floats, Floats]:
    """Between the planes -1 and +1 of one axis."""
    inverse = np.reciprocal(ray)
    middle, reach = -origin * inverse, np.abs(inverse)
    return middle - reach, middle + reach


def _slopes(origin: Sequence[Floats], rays: Sequence[Floats], taper: float) -> tuple[Floats, Floats]:
    """Between the two planes `|y| = 1 - slope * (z + 1)` that narrow a box towards its top."""
    slope = np.float32((1 - taper) / 2)
    enter, leave = np.full_like(rays[1], -np.inf), np.full_like(rays[1], np.inf)
    for side in (np.float32(1), np.float32(-1)):
        room = 1 - slope - side * origin[1] - slope * origin[2]
        speed = side * rays[1] + slope * rays[2]
        at = room / np.where(speed == 0, TINY, speed)
        enter = np.maximum(enter, np.where(speed < 0, at, np.float32(-np.inf)))
        leave = np.minimum(leave, np.where(speed < 0, np.float32(np.inf), at))
    return enter, leave


def _round(origin: Sequence[Floats], rays: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Unit circle (two axes) or sphere (three), measured from the point of closest approach, which keeps far hits exact."""
    none = np.float32(0)
    square = sum((ray * ray for ray in rays), none)
    closest = -sum((o * ray for o, ray in zip(origin, rays, strict=True)), none) / square
    apart = sum(((o + closest * ray) ** 2 for o, ray in zip(origin, rays, strict=True)), none)
    reach = np.sqrt(np.maximum(1 - apart, 0) / square)
    return np.where(apart < 1, closest - reach, np.float32(np.inf)), closest + reach
