"""Shadows and contact darkening, found for some of the pixels and spread over the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcd.datasets.scenes.materials import Floats
from pcd.datasets.scenes.raycast import TINY, Solid, crossing, turns
from pcd.datasets.scenes.scene import Light
from pcd.datasets.scenes.surface import Surface

STEP = 3
"""One pixel in `STEP` rows and columns is tested: a ninth of the price, and soft edges. Odd, see `spread`."""
SUN_DISTANCE = 300.0
LIFT = 0.004
"""Metres above its surface at which a point is tested, so that rounding does not bury it."""
CONTACT = 0.15
"""Metres over which the darkening beside other solids fades."""


class Samples:
    """Every `STEP`th pixel's surface point and the solids that may darken it."""

    def __init__(self, surface: Surface, solids: Sequence[Solid]) -> None:
        self.shape, self.pixel = surface.shape, surface.pixel
        rows, columns = np.divmod(surface.pixel, surface.shape[1])
        chosen = np.flatnonzero((rows % STEP == STEP // 2) & (columns % STEP == STEP // 2))
        self.coarse = ((self.shape[0] + STEP - 1) // STEP, (self.shape[1] + STEP - 1) // STEP)
        self.home = (rows[chosen] // STEP) * self.coarse[1] + columns[chosen] // STEP
        self.solid, self.normal = surface.solid[chosen], surface.normal[:, chosen]
        self.point = surface.point[:, chosen] + np.float32(LIFT) * self.normal
        self.numbers = [k for k, solid in enumerate(solids) if solid.casts_shadow]
        self.solids = [solids[k] for k in self.numbers]
        self.centre = np.array([s.centre for s in self.solids], dtype=np.float32).reshape(-1, 3)
        self.half = np.array([s.half for s in self.solids], dtype=np.float32).reshape(-1, 3)
        self.radius = np.sqrt((self.half**2).sum(axis=1))
        self.turn = turns(self.solids).astype(np.float32)
        square = np.einsum("in,in->n", self.point, self.point)
        self.apart = square - 2 * (self.centre @ self.point) + (self.centre**2).sum(axis=1)[:, None]
        """Squared distances `(K, M)` from the points to the centres of the solids."""

    def spread(self, values: Floats) -> Floats:
        """Values `(M,)` of the tested points for all visible points: smoothed, then interpolated linearly.

        Repeating each value `STEP` times and averaging over `STEP` pixels is linear interpolation when `STEP` is odd.
        """
        grid = np.ones(self.coarse, dtype=np.float32)
        grid.ravel()[self.home] = values
        grid = _averaged(grid, (0.25, 0.5, 0.25))
        fine = np.repeat(np.repeat(grid, STEP, axis=0), STEP, axis=1)
        fine = _averaged(fine, (1 / STEP,) * STEP)
        return np.take(fine[: self.shape[0], : self.shape[1]], self.pixel)

    def openness(self) -> Floats:
        """The share of the surrounding light that is left beside other solids, `(M,)`."""
        left = np.ones(self.home.size, dtype=np.float32)
        for k, number in enumerate(self.numbers):
            near = np.flatnonzero((self.apart[k] < (self.radius[k] + 3 * CONTACT) ** 2) & (self.solid != number))
            if near.size:
                local = self.turn[k] @ (self.point[:, near] - self.centre[k][:, None])
                left[near] *= 1 - np.float32(0.4) * np.exp(_distance(self.solids[k], local) * np.float32(-1 / CONTACT))
        return left

    def lit(self, light: Light) -> Floats:
        """0 where a solid stands between the point and the light, else 1, `(M,)`."""
        position = np.array(light.position, dtype=np.float32)[:, None]
        sun = np.isinf(light.reach)
        towards = np.broadcast_to(position * np.float32(SUN_DISTANCE), self.point.shape) if sun else position - self.point
        open_way = np.ones(self.home.size, dtype=np.bool_)
        facing = np.einsum("in,in->n", towards, self.normal) > 0
        length = np.sqrt(np.einsum("in,in->n", towards, towards))
        unit = towards / length
        ahead = self.centre @ unit - np.einsum("in,in->n", self.point, unit)
        for k, number in enumerate(self.numbers):
            reach = self.radius[k] * np.float32(1.05) + np.float32(0.05)
            may = (self.apart[k] - ahead[k] * ahead[k] < reach * reach) & (ahead[k] > -reach) & (ahead[k] < length + reach)
            some = np.flatnonzero(may & facing & open_way & (self.solid != number))
            if some.size:
                open_way[some] = ~self._blocked(k, self.point[:, some], towards[:, some])
        return open_way.astype(np.float32)

    def _blocked(self, k: int, point: Floats, towards: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        to_unit = self.turn[k] / self.half[k][:, None]
        rays, origin = to_unit @ towards, to_unit @ (point - self.centre[k][:, None])
        rays[rays == 0] = TINY
        enter, leave = crossing(self.solids[k], list(origin), list(rays))
        return (enter <= leave) & (leave > 0) & (enter < 1)


def _distance(solid: Solid, local: Floats) -> Floats:
    """Metres from points outside a solid to it, `(N,)`; approximate for curved ones."""
    half = np.array(solid.half, dtype=np.float32)[:, None]
    if solid.shape == "ball":
        reach = np.sqrt(((local / half) ** 2).sum(axis=0))
        return np.asarray(np.maximum(reach - 1, 0) * half.min(), dtype=np.float32)
    beyond = np.maximum(np.abs(local) - half, 0)
    return np.asarray(np.sqrt((beyond * beyond).sum(axis=0)), dtype=np.float32)


def _averaged(grid: Floats, weights: tuple[float, ...]) -> Floats:
    """Weighted means over `len(weights)` rows and columns, edges repeated."""
    margin = len(weights) // 2
    for _ in range(2):
        padded = np.pad(grid, ((margin, margin), (0, 0)), mode="edge")
        total = np.zeros_like(grid)
        for start, weight in enumerate(weights):
            total += np.float32(weight) * padded[start : start + len(grid)]
        grid = np.ascontiguousarray(total.T)
    return grid
