"""What a loss may look at, for every training row, from the cache alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pcd.cache import Table
from pcd.errors import CacheError
from pcd.heads.base import PatchTargets
from pcd.patches import PatchRule, PatchStatistics, PixelRule, patch_statistics, supervised, to_patches
from pcd.recipe import Supervision
from pcd.regions import garg, inside
from pcd.views import ViewPlan, to_views

STATISTICS = ("present", "count", "mean", "var")
CHUNK = 256
"""Rows whose canvas depth is in memory at once: 58 MB at 336x336."""


@dataclass(frozen=True)
class RowTargets:
    """Targets of N rows, `(N, P)` each, in host memory (13 bytes a patch)."""

    count: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    var: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]

    def batch(self, positions: npt.NDArray[np.int64], device: torch.device) -> PatchTargets:
        """The targets of some rows as tensors `(B, P)`."""
        return PatchTargets.from_host(
            self.count[positions], self.mean[positions], self.var[positions], self.valid[positions], device=device
        )


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
    made: dict[Supervision, RowTargets] = {}
    for supervision in settings.values():
        if supervision not in made:
            made[supervision] = _row_targets(table, rows, grid, supervision, depth_range, group)
    return {name: made[supervision] for name, supervision in settings.items()}


def _row_targets(
    table: Table,
    rows: npt.NDArray[np.int64],
    grid: tuple[int, int],
    settings: Supervision,
    depth_range: tuple[float, float],
    group: str,
) -> RowTargets:
    rule, mask = pixel_rule(settings, depth_range), mask_views(settings, table.plan)
    height, width = table.plan.view_size
    pixels = height * width // (grid[0] * grid[1])
    share = None if mask is None else to_patches(mask, grid).mean(axis=-1).astype(np.float32)
    patch_rule = PatchRule(settings.min_present, settings.min_in_mask, settings.patch_mask_open, settings.min_mean)
    parts = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        views = part % table.views
        pixel_mask = None if mask is None or not settings.mask_pixels else mask[views]
        statistics = _statistics(table, group, part, grid, rule, pixel_mask)
        valid = supervised(statistics, patch_rule, pixels, None if share is None else share[views])
        parts.append((statistics, valid))
    valid = np.concatenate([valid for _, valid in parts])
    return RowTargets(
        count=np.concatenate([part.count for part, _ in parts]).astype(np.float32) * valid,
        mean=np.concatenate([part.mean for part, _ in parts]),
        var=np.concatenate([part.var for part, _ in parts]),
        valid=valid,
    )


def _statistics(
    table: Table,
    group: str,
    rows: npt.NDArray[np.int64],
    grid: tuple[int, int],
    rule: PixelRule,
    mask: npt.NDArray[np.bool_] | None,
) -> PatchStatistics:
    """The stored statistics if they were made by this rule, else the same function on the stored canvas depth."""
    stored_as = table.manifest.columns[f"{group}/count"].fingerprint.get("rule")
    if mask is None and stored_as == {**rule.as_json(), "grid": list(grid)}:
        return PatchStatistics(*(table.column(f"{group}/{name}").read(rows) for name in STATISTICS))
    canvas = table.column(f"{group}/canvas")
    if canvas.spec.units_per_metre is None:
        raise CacheError(f"{table.root}: column {group}/canvas does not say how its integers become metres.")
    return patch_statistics(canvas.read(rows), canvas.spec.units_per_metre, grid, rule, mask)
