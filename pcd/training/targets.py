"""What a loss may look at, for every training row, from the cache alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch

from pcd.cache import Table
from pcd.errors import CacheError
from pcd.heads.base import PatchTargets
from pcd.patches import PatchRule, PatchStatistics, PixelRule, patch_statistics, supervised, to_patches
from pcd.recipe import Supervision
from pcd.regions import garg, inside
from pcd.views import ViewPlan, to_views

STATISTICS = ("present", "count", "mean", "var")
CHUNK_PIXELS = 1 << 22
"""Pixels of canvas depth that statistics are made of at once: they take some 40 bytes each."""
BYTES = 13
"""A patch of `RowTargets`."""
SHARE_OF_MEMORY = 0.25
"""Targets are held up to this share of the host memory that is free; columns want the rest."""


class Targets(Protocol):
    """Targets of the rows of a training."""

    @property
    def cells(self) -> int:
        """Patches of a row."""
        ...

    def batch(self, positions: npt.NDArray[np.int64], device: torch.device) -> PatchTargets:
        """The targets of some rows, by their place among all rows of the training, as tensors `(B, P)`."""
        ...


@dataclass(frozen=True)
class RowTargets:
    """Targets of N rows, `(N, P)` each, in host memory (13 bytes a patch)."""

    count: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    var: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]

    @property
    def cells(self) -> int:
        """Patches of a row."""
        return int(self.valid.shape[1])

    def batch(self, positions: npt.NDArray[np.int64], device: torch.device) -> PatchTargets:
        """The targets of some rows as tensors `(B, P)`."""
        return PatchTargets.from_host(
            self.count[positions], self.mean[positions], self.var[positions], self.valid[positions], device=device
        )

    def whole(self, device: torch.device) -> PatchTargets:
        """The targets of all rows as tensors `(N, P)`; on a CPU in the same memory."""
        return PatchTargets.from_host(self.count, self.mean, self.var, self.valid, device=device)


class StreamedTargets:
    """Targets that are made for each batch from the stored ground truth, bit for bit those that `RowTargets` would hold."""

    def __init__(
        self,
        table: Table,
        rows: npt.NDArray[np.int64],
        grid: tuple[int, int],
        settings: Supervision,
        depth_range: tuple[float, float],
        group: str,
    ) -> None:
        """As `row_targets`, of one supervision."""
        self._rows = rows
        self._maker = _Maker(table, grid, settings, depth_range, group)

    @property
    def cells(self) -> int:
        """Patches of a row."""
        return self._maker.cells

    def made(self, rows: npt.NDArray[np.int64]) -> RowTargets:
        """The targets of rows of the table, in the order asked. Several threads may ask at once."""
        return self._maker.targets(rows)

    def batch(self, positions: npt.NDArray[np.int64], device: torch.device) -> PatchTargets:
        """The targets of some rows as tensors `(B, P)`."""
        return self.made(self._rows[positions]).whole(device)


def pixel_rule(settings: Supervision, depth_range: tuple[float, float]) -> PixelRule:
    """The rule of equation 2; absent limits are the head's range."""
    low = depth_range[0] if settings.min_depth is None else settings.min_depth
    high = depth_range[1] if settings.max_depth is None else settings.max_depth
    return PixelRule(low, high, settings.open_range)


def mask_views(settings: Supervision, plan: ViewPlan) -> npt.NDArray[np.bool_] | None:
    """The mask as each view `(views, h, w)` sees it, or None."""
    if settings.mask == "none":
        return None
    height, width = plan.canvas
    return to_views(inside(garg(height, width), height, width), plan)


def row_targets(
    table: Table,
    rows: npt.NDArray[np.int64],
    grid: tuple[int, int],
    settings: Mapping[str, Supervision],
    depth_range: tuple[float, float],
    group: str,
) -> dict[str, RowTargets]:
    """Targets of `rows` under each named supervision, from the ground truth in column group `group` (see `views.TRUTH`).

    Equal supervisions share their arrays.
    """
    made = {each: _Maker(table, grid, each, depth_range, group).targets(rows) for each in dict.fromkeys(settings.values())}
    return {name: made[supervision] for name, supervision in settings.items()}


def training_targets(
    table: Table,
    rows: npt.NDArray[np.int64],
    grid: tuple[int, int],
    settings: Mapping[str, Supervision],
    depth_range: tuple[float, float],
    group: str,
    hold: bool | None = None,
) -> Mapping[str, Targets]:
    """The same for a training: held if `hold`, made for each batch if it is False; absent: held if memory has room for them.

    Either way they are the same bits.
    """
    distinct = dict.fromkeys(settings.values())
    if hold is None:
        size = BYTES * len(rows) * grid[0] * grid[1] * len(distinct)
        hold = size <= SHARE_OF_MEMORY * psutil.virtual_memory().available
    if hold:
        return row_targets(table, rows, grid, settings, depth_range, group)
    streamed = {each: StreamedTargets(table, rows, grid, each, depth_range, group) for each in distinct}
    return {name: streamed[supervision] for name, supervision in settings.items()}


class _Maker:
    """Makes the targets of rows under one supervision."""

    def __init__(
        self, table: Table, grid: tuple[int, int], settings: Supervision, depth_range: tuple[float, float], group: str
    ) -> None:
        self.cells = grid[0] * grid[1]
        self._table, self._grid, self._group = table, grid, group
        self._rule, self._mask = pixel_rule(settings, depth_range), mask_views(settings, table.plan)
        self._mask_pixels = settings.mask_pixels
        self._share = None if self._mask is None else to_patches(self._mask, grid).mean(axis=-1).astype(np.float32)
        self._patch_rule = PatchRule(settings.min_present, settings.min_in_mask, settings.patch_mask_open, settings.min_mean)
        height, width = table.plan.view_size
        self._view_pixels = height * width

    def targets(self, rows: npt.NDArray[np.int64]) -> RowTargets:
        """The targets of rows of the table, a bounded number of pixels at a time."""
        shape, size = (len(rows), self.cells), max(1, CHUNK_PIXELS // self._view_pixels)
        count, mean, var = (np.empty(shape, dtype=np.float32) for _ in range(3))
        found = RowTargets(count, mean, var, np.empty(shape, dtype=np.bool_))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            statistics = self._statistics(rows[part])
            share = None if self._share is None else self._share[rows[part] % self._table.views]
            valid = supervised(statistics, self._patch_rule, self._view_pixels // self.cells, share)
            found.count[part] = statistics.count.astype(np.float32) * valid
            found.mean[part], found.var[part], found.valid[part] = statistics.mean, statistics.var, valid
        return found

    def _statistics(self, rows: npt.NDArray[np.int64]) -> PatchStatistics:
        """The stored statistics if they were made by this rule, else the same function on the stored canvas depth."""
        table, group, rule = self._table, self._group, self._rule
        mask = self._mask[rows % table.views] if self._mask is not None and self._mask_pixels else None
        stored_as = table.manifest.columns[f"{group}/count"].fingerprint.get("rule")
        if mask is None and stored_as == {**rule.as_json(), "grid": list(self._grid)}:
            return PatchStatistics(*(table.column(f"{group}/{name}").read(rows) for name in STATISTICS))
        canvas = table.column(f"{group}/canvas")
        if canvas.spec.units_per_metre is None:
            raise CacheError(f"{table.root}: column {group}/canvas does not say how its integers become metres.")
        return patch_statistics(canvas.read(rows), canvas.spec.units_per_metre, self._grid, rule, mask)
