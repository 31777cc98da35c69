"""The visible points of a frame: where they are, how they are turned, and their place on the surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcd.datasets.scenes.materials import Floats
from pcd.datasets.scenes.raycast import Camera, Hits, Solid

SIDE, FRONT, TOP, BOTTOM = range(4)
"""Faces of a solid that may be made of different materials."""
_X, _Y, _Z, _CURVED = range(4)


@dataclass(frozen=True)
class Surface:
    """The points `(N,)` of a frame that hit something, in reading order.

    `pixel` flat index; `solid` its index; `face` SIDE, FRONT, TOP or BOTTOM; `point`, `normal` `(3, N)` in the world (metres,
    unit length); `u`, `v` coordinates on the surface in metres, from a corner of the face.
    """

    shape: tuple[int, int]
    pixel: npt.NDArray[np.intp]
    solid: npt.NDArray[np.int16]
    face: npt.NDArray[np.int8]
    point: Floats
    normal: Floats
    u: Floats
    v: Floats

    def widths(self, values: Floats) -> Floats:
        """How much a value `(N,)` changes from pixel to pixel: towards the nearer neighbour in value, rows plus columns."""
        grid = np.full(self.shape, np.nan, dtype=np.float32)
        grid.ravel()[self.pixel] = values
        total = np.zeros(self.shape, dtype=np.float32)
        for steps, sums in ((np.diff(grid, axis=0), total), (np.diff(grid, axis=1).T, total.T)):
            size = np.abs(steps)
            sums[1:-1] += np.fmin(size[:-1], size[1:])
            sums[0] += size[0]
            sums[-1] += size[-1]
        return np.nan_to_num(total.ravel()[self.pixel], copy=False, nan=1.0)


class _Table:
    """The solids as arrays, to be looked up by pixel."""

    def __init__(self, solids: Sequence[Solid]) -> None:
        yaw = np.array([solid.yaw for solid in solids])
        self.centre = np.array([solid.centre for solid in solids], dtype=np.float32).T
        self.half = np.array([solid.half for solid in solids], dtype=np.float32).T
        self.cos, self.sin = np.cos(yaw).astype(np.float32), np.sin(yaw).astype(np.float32)
        self.slope = np.array([(1 - solid.taper) / 2 for solid in solids], dtype=np.float32)
        self.outward = np.array([-1 if solid.shape == "shell" else 1 for solid in solids], dtype=np.float32)
        self.pillar = np.array([solid.shape == "pillar" for solid in solids])
        self.curved = np.array([solid.shape in ("pillar", "ball") for solid in solids])


def find_surface(camera: Camera, solids: Sequence[Solid], hits: Hits, rays: Floats) -> Surface:
    """Points, normals, faces and surface coordinates of all pixels that hit something; `rays` `(3, H, W)`."""
    pixel = np.flatnonzero(hits.solid >= 0)
    solid, depth = hits.solid.ravel()[pixel], hits.depth.ravel()[pixel]
    point = np.array(camera.position, dtype=np.float32)[:, None] + np.take(rays.reshape(3, -1), pixel, axis=1) * depth
    table = _Table(solids)
    offset = np.asarray(point - np.take(table.centre, solid, axis=1), dtype=np.float32)
    cos, sin, half = table.cos[solid], table.sin[solid], np.take(table.half, solid, axis=1)
    local: Floats = np.stack([offset[0] * cos + offset[1] * sin, offset[1] * cos - offset[0] * sin, offset[2]])
    unit = local / half
    axis = _face_axis(table, solid, unit)
    normal = _normals(table, solid, axis, unit, half)
    world = np.stack([normal[0] * cos - normal[1] * sin, normal[0] * sin + normal[1] * cos, normal[2]])
    face = np.where(axis == _Z, np.where(local[2] > 0, TOP, BOTTOM), np.where((axis == _Y) & (local[1] > 0), FRONT, SIDE))
    corner = local + half
    u, v = np.where(axis == _X, corner[1], corner[0]), np.where(axis == _Z, corner[1], corner[2])
    bent = np.flatnonzero(axis == _CURVED)
    u[bent] = np.arctan2(local[1, bent], local[0, bent]) * half[0, bent]
    return Surface(hits.depth.shape, pixel, solid, face.astype(np.int8), point, world, u, v)


def _face_axis(table: _Table, solid: npt.NDArray[np.int16], unit: Floats) -> npt.NDArray[np.int8]:
    """Which face a point is on: the axis whose unit coordinate is largest, `_CURVED` where there are no flat faces."""
    size = np.abs(unit)
    size[1] /= np.maximum(1 - table.slope[solid] * (unit[2] + 1), np.float32(1e-3))
    sideways = np.maximum(size[0], size[1])
    axis = np.where(size[2] >= sideways, _Z, np.where(size[0] >= size[1], _X, _Y)).astype(np.int8)
    curved = np.flatnonzero(table.curved[solid])
    capped = table.pillar[solid[curved]] & (size[2, curved] >= np.hypot(unit[0, curved], unit[1, curved]))
    axis[curved] = np.where(capped, _Z, _CURVED)
    return axis


def _normals(table: _Table, solid: npt.NDArray[np.int16], axis: npt.NDArray[np.int8], unit: Floats, half: Floats) -> Floats:
    """Unit normals `(3, N)` in the solids' own axes."""
    normal = np.zeros_like(unit)
    for flat in (_X, _Y, _Z):
        pixels = np.flatnonzero(axis == flat)
        normal[flat, pixels] = np.sign(unit[flat, pixels]) * table.outward[solid[pixels]]
    slope = table.slope[solid]
    sloping = np.flatnonzero((slope > 0) & (axis == _Y))
    normal[2, sloping] = slope[sloping] * half[1, sloping] / half[2, sloping]
    bent = np.flatnonzero(axis == _CURVED)
    normal[:, bent] = unit[:, bent] / half[:, bent]
    normal[2, bent] *= ~table.pillar[solid[bent]]
    uneven = np.concatenate([sloping, bent])
    normal[:, uneven] /= np.sqrt((normal[:, uneven] ** 2).sum(axis=0))
    return normal
