"""Depth per patch: the statistics that stand for a patch's pixels, and which patches supervise.

All of it is defined on the stored canvas depth (unsigned integers, see `pcd.depths`), so that another range or mask is
recomputed from a cache bit for bit as extraction would have written it. Axes: canvases `(B, h, w)`, patches `(B, P)` with
`P = rows * columns` of the encoder's grid in reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcd.errors import UsageError

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PixelRule:
    """Which pixels of a patch count (paper, equation 2): `min_depth <= D <= max_depth`, or `<` twice if `open_range`."""

    min_depth: float
    max_depth: float
    open_range: bool = False

    def keeps(self, metres: npt.NDArray[np.float64]) -> Bools:
        """True where a depth counts; NaN never does."""
        if self.open_range:
            return (metres > self.min_depth) & (metres < self.max_depth)
        return (metres >= self.min_depth) & (metres <= self.max_depth)

    def as_json(self) -> dict[str, Any]:
        """Plain values for fingerprints; an absent limit is None."""
        limit = None if math.isinf(self.max_depth) else self.max_depth
        return {"min_depth": self.min_depth, "max_depth": limit, "open_range": self.open_range}


@dataclass(frozen=True)
class PatchRule:
    """Which patches supervise (paper, section 3.1).

    At least `min_present` of the pixels have depth at all, at least `min_in_mask` (more than, if `mask_open`) lie in the mask,
    at least one pixel counts, and the mean of those that count is at least `min_mean` metres.
    """

    min_present: float = 0.5
    min_in_mask: float = 0.5
    mask_open: bool = False
    min_mean: float = 0.0


@dataclass(frozen=True)
class PatchStatistics:
    """Per patch `(B, P)`: pixels with any depth, pixels that count, their mean (equation 1) and population variance.

    `mean` is metres, `var` square metres; both 0 where no pixel counts.
    """

    present: npt.NDArray[np.uint16]
    count: npt.NDArray[np.uint16]
    mean: Floats
    var: Floats


def to_patches(canvas: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
    """`(B, h, w)` to `(B, P, pixels)`. Raises `UsageError` if the grid does not divide the canvas."""
    batch, height, width = canvas.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise UsageError(f"a {height}x{width} view does not divide into a grid of {rows}x{columns} patches.")
    cut = canvas.reshape(batch, rows, height // rows, columns, width // columns)
    return np.moveaxis(cut, 2, 3).reshape(batch, rows * columns, -1)


def patch_statistics(
    stored: npt.NDArray[np.uint16],
    units_per_metre: int,
    grid: tuple[int, int],
    rule: PixelRule,
    mask: Bools | None = None,
) -> PatchStatistics:
    """Statistics of stored canvases `(B, h, w)` under `rule`, in float64 and rounded once.

    `mask` is `(B, h, w)` or None; pixels outside it do not count, but are still `present`.
    """
    patches = to_patches(stored, grid)
    if patches.shape[-1] == 1:
        own = None if mask is None else to_patches(mask, grid)[..., 0]
        return _pixel_statistics(patches[..., 0], units_per_metre, rule, own)
    metres = patches.astype(np.float64) / units_per_metre
    present = patches != 0
    counts = present & rule.keeps(metres)
    if mask is not None:
        counts &= to_patches(mask, grid)
    number = counts.sum(axis=-1)
    safe = np.maximum(number, 1)
    mean = np.where(counts, metres, 0.0).sum(axis=-1) / safe
    deviation = np.where(counts, metres - mean[..., None], 0.0)
    var = np.square(deviation).sum(axis=-1) / safe
    return PatchStatistics(
        present.sum(axis=-1).astype(np.uint16),
        number.astype(np.uint16),
        mean.astype(np.float32),
        var.astype(np.float32),
    )


def _pixel_statistics(
    stored: npt.NDArray[np.uint16], units_per_metre: int, rule: PixelRule, mask: Bools | None
) -> PatchStatistics:
    """The same of patches `(B, P)` of one pixel each, looked up for every number that a uint16 can be."""
    metres = np.arange(1 << 16, dtype=np.float64) / units_per_metre
    keeps = rule.keeps(metres)
    keeps[0] = False  # no depth
    counts = keeps[stored] if mask is None else keeps[stored] & mask
    mean = np.where(counts, metres.astype(np.float32)[stored], np.float32(0))
    return PatchStatistics((stored != 0).astype(np.uint16), counts.astype(np.uint16), mean, np.zeros_like(mean))


def supervised(statistics: PatchStatistics, rule: PatchRule, pixels: int, in_mask: Floats | None = None) -> Bools:
    """Which patches `(B, P)` supervise. `pixels` per patch; `in_mask` the share `(B, P)` of each patch inside the mask."""
    valid = (statistics.count > 0) & (statistics.present >= rule.min_present * pixels) & (statistics.mean >= rule.min_mean)
    if in_mask is not None:
        valid &= in_mask > rule.min_in_mask if rule.mask_open else in_mask >= rule.min_in_mask
    return valid
