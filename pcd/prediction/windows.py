"""Views laid over a canvas: the tiles of training, or overlapping windows that are blended.

A layout says which views of an image the encoder sees and how their patch maps become one map of the canvas. `Tiles` is what
training and scoring do. `Windows` have the size of a training view as well, but may overlap and cover an enlarged canvas; they
start at whole patches, so that the patches of all windows lie on one grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.errors import UsageError
from pcd.evaluation.pixels import combine_views
from pcd.views import FloatArray, ViewPlan, flip, to_views

MAX_OVERLAP = 0.9
MAX_SCALE = 8.0


class Layout(Protocol):
    """Which views an image becomes, and the way back."""

    @property
    def plan(self) -> ViewPlan:
        """The canvas; mirrored views exist if `flips`. Its crop is not looked at."""
        ...

    @property
    def views(self) -> int:
        """Views per image, mirrored ones included."""
        ...

    def cut(self, canvas: FloatArray) -> FloatArray:
        """A canvas `(H, W, 3)` to views `(views, h, w, 3)`."""
        ...

    def combine(self, patches: Tensor) -> Tensor:
        """Patch maps of all views `(N, views, gh, gw)` to maps of the canvas `(N, Gh, Gw)`; mirrored views are averaged in."""
        ...


@dataclass(frozen=True)
class Tiles:
    """The tiles of the view plan, side by side, as in training."""

    plan: ViewPlan

    @property
    def views(self) -> int:
        """Views per image."""
        return self.plan.views

    def cut(self, canvas: FloatArray) -> FloatArray:
        """See `Layout`."""
        return to_views(canvas, self.plan)

    def combine(self, patches: Tensor) -> Tensor:
        """See `Layout`."""
        return combine_views(patches, self.plan, tta=self.plan.flips)


@dataclass(frozen=True)
class Windows:
    """Windows of `grid` patches at offsets `rows` x `columns` (in patches) on a canvas of `canvas_grid` patches.

    Windows are blended with the weight `sin^2` along both axes, largest in a window's middle; the weights of each patch are
    divided by their sum, so that maps that agree come back unchanged.
    """

    plan: ViewPlan
    grid: tuple[int, int]
    canvas_grid: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def _offsets(self) -> list[tuple[int, int]]:
        return [(row, column) for row in self.rows for column in self.columns]

    @property
    def views(self) -> int:
        """Views per image."""
        return len(self._offsets) * (2 if self.plan.flips else 1)

    @property
    def is_single(self) -> bool:
        """Whether one window covers the canvas."""
        return self.canvas_grid == self.grid

    def cut(self, canvas: FloatArray) -> FloatArray:
        """See `Layout`; the mirrored windows lie on the mirrored canvas, at the same offsets."""
        height, width = (cells // number for cells, number in zip(self.plan.canvas, self.canvas_grid, strict=True))
        size = height * self.grid[0], width * self.grid[1]
        canvases = [canvas, flip(canvas)] if self.plan.flips else [canvas]
        starts = [(row * height, column * width) for row, column in self._offsets]
        return np.stack([whole[top : top + size[0], left : left + size[1]] for whole in canvases for top, left in starts])

    def combine(self, patches: Tensor) -> Tensor:
        """See `Layout`. Raises `UsageError` for another number of views."""
        if patches.ndim != 4 or patches.shape[1:] != (self.views, *self.grid):
            expected = f"(N, {self.views} views, {self.grid[0]}, {self.grid[1]})"
            raise UsageError(f"predictions have shape {tuple(patches.shape)}; expected {expected}.")
        weight = torch.from_numpy(np.outer(_bump(self.grid[0]), _bump(self.grid[1]))).to(patches.device)
        halves = patches.reshape(len(patches), -1, len(self._offsets), *self.grid).double()
        total = halves.new_zeros(*halves.shape[:2], *self.canvas_grid)
        weights = halves.new_zeros(self.canvas_grid)
        for number, (row, column) in enumerate(self._offsets):
            place = (..., slice(row, row + self.grid[0]), slice(column, column + self.grid[1]))
            total[place] += weight * halves[:, :, number]
            weights[place] += weight
        blended = total / weights
        if self.plan.flips:
            return ((blended[:, 0] + blended[:, 1].flip(-1)) / 2).to(patches.dtype)
        return blended[:, 0].to(patches.dtype)


def _bump(cells: int) -> npt.NDArray[np.float64]:
    """`sin^2` over one axis, sampled at the middle of each patch: never 0."""
    return np.sin(np.pi * (np.arange(cells) + 0.5) / cells) ** 2


def _offsets(total: int, cells: int, overlap: float) -> tuple[int, ...]:
    """The fewest evenly spread offsets whose windows share at least about `overlap` of their length."""
    step = max(1, math.floor(cells * (1 - overlap) + 1e-9))
    number = math.ceil((total - cells) / step) + 1
    return tuple(int(offset) for offset in np.round(np.linspace(0, total - cells, number)))


def lay_out(plan: ViewPlan, grid: tuple[int, int], scale: float = 1.0, overlap: float = 0.0) -> Layout:
    """The layout for a canvas enlarged by `scale`, rounded to whole patches, with neighbouring views sharing `overlap`.

    `grid` is (rows, columns) of patches of one view. Scale 1 without overlap gives the plan's own tiles.
    Raises `UsageError` for a scale outside [1, 8] or an overlap outside [0, 0.9].
    """
    if not 1 <= scale <= MAX_SCALE:
        raise UsageError(f"scale {scale:g}: expected 1 (the canvas of training) to {MAX_SCALE:g}; a view does not fit below 1.")
    if not 0 <= overlap <= MAX_OVERLAP:
        raise UsageError(f"overlap {overlap:g}: expected a fraction of a view from 0 to {MAX_OVERLAP:g}.")
    if scale == 1 and overlap == 0:
        return Tiles(plan)
    height, width = plan.view_size[0] // grid[0], plan.view_size[1] // grid[1]
    rows, columns = round(plan.grid[0] * grid[0] * scale), round(plan.grid[1] * grid[1] * scale)
    return Windows(
        plan=replace(plan, canvas=(rows * height, columns * width), grid=(1, 1)),
        grid=grid,
        canvas_grid=(rows, columns),
        rows=_offsets(rows, grid[0], overlap),
        columns=_offsets(columns, grid[1], overlap),
    )
