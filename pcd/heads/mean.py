"""Mean depth: what a head must beat that looks at no image. Nothing is trained by gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.errors import TrainingError
from pcd.heads.base import Context, Head, HeadOptions, Phase

_ROWS = 16
"""Views whose targets are in float64 at once."""


class MeanOptions(HeadOptions):
    """`[head]` of `name = "mean"`."""

    per: Literal["dataset", "position"] = "dataset"
    """One depth for all patches, or one for each place in the view."""
    patch_column: str = "clip/patch"
    """Its grid is that of the depths; its values are not looked at. A smaller column of the same encoder, such as `clip/cls`,
    gives the same depths and is read faster."""


class MeanHead(Head):
    """The mean depth of the training pixels that count under `[targets.depth]`; it has no parameters.

    With `per = "position"` that of each patch position. A position without such pixels takes the depth of the nearest one that
    has some, see `nearest_filled`.
    """

    Options = MeanOptions

    def __init__(self, options: MeanOptions, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        """Any column will do."""
        super().__init__()
        self.options = options
        self.grid = grid
        self.register_buffer("metres", torch.zeros(grid[0] * grid[1] if options.per == "position" else 1))
        self.metres: Tensor

    @staticmethod
    def reads(options: MeanOptions) -> tuple[str, ...]:
        """One column: no head can do without."""
        return (options.patch_column,)

    @torch.no_grad()
    def initialise(self, context: Context) -> None:
        """Look at the depth of every training row once. Raises `TrainingError` if no pixel counts."""
        number = torch.zeros(self.grid[0] * self.grid[1], dtype=torch.float64)
        total = torch.zeros_like(number)
        for batch in context.batches():
            target = batch.targets["depth"]
            for count, mean in zip(torch.split(target.count, _ROWS), torch.split(target.mean, _ROWS), strict=True):
                number += count.double().sum(dim=0).cpu()
                total += (count.double() * mean.double()).sum(dim=0).cpu()
        if not number.any():
            raise TrainingError("head mean: no training pixel has valid depth under the recipe's rules; check [targets.depth].")
        if self.options.per == "dataset":
            self.metres.fill_(float(total.sum() / number.sum()))
            return
        nearest = nearest_filled((number > 0).reshape(self.grid).numpy()).reshape(-1)
        self.metres.copy_((total / number.clamp(min=1))[torch.from_numpy(nearest)])

    def phases(self) -> tuple[Phase, ...]:
        """None."""
        return ()

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)`, the same for every view."""
        return self.metres.expand(columns[self.options.patch_column].shape[0], self.grid[0] * self.grid[1])


def nearest_filled(filled: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The flat number `(h, w)` of the nearest cell that is filled `(h, w)`, by straight distance; at least one must be.

    Of equally near ones that in the leftmost column, then the uppermost. In O(h w (h + w)): first along columns, then rows.
    """
    height, width = filled.shape
    row, column = np.arange(height), np.arange(width)
    across = np.square(column[:, None] - column).astype(np.float64)
    found = np.empty((height, width), dtype=np.int64)
    for y in range(height):
        away = np.where(filled, np.abs(row - y)[:, None], np.inf)
        upright = away.argmin(axis=0)
        nearest = (across + np.square(away.min(axis=0))).argmin(axis=1)
        found[y] = upright[nearest] * width + nearest
    return found
