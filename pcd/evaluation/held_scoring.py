"""Scoring the same samples again and again, as validation does: ground truth is prepared once and held on the device.

`HeldScorer` gives the means that `scoring.Scorer` gives, for one protocol on the canvas. Nothing in it waits for the device but
the one read of the finished means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.errors import PredictionError, UsageError
from pcd.evaluation.metrics import PIXEL_METRICS, SUMS, masked_sums, metrics_from_sums
from pcd.evaluation.patchwise import OFFSET, SortedPatches, Stored, metres_of_stored, shifted
from pcd.evaluation.pixels import combine_views, upsample
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.scoring import Scorer, admitted, compared, counted
from pcd.patches import to_patches
from pcd.regions import inside
from pcd.views import ViewPlan

CANVASES_AT_ONCE = 32
"""Canvases scored together patch by patch: 40 MB at 576 patches."""
PIXELS_AT_ONCE = 1 << 20
"""Pixels scored together where whole maps are needed: 0.15 GB of float64 maps. At least one canvas is."""


def why_not_held(protocol: Protocol, device: torch.device) -> str | None:
    """Why `HeldScorer` cannot score under a protocol on a device, to be said to a person; None if it can."""
    if protocol.resolution == "native":
        return f"{protocol.label} scores frames as stored, which differ in size"
    if protocol.alignment != "none":
        return f"{protocol.label} aligns each prediction with its ground truth first (alignment = {protocol.alignment!r})"
    if device.type == "mps":
        return "sums are float64, which an mps device does not have"
    return None


class HeldScorer:
    """Scores predictions for the samples `keys` under one protocol.

    Ground truth is put in by `hold` before anything is scored. Under nearest upsampling it is held by `patchwise.SortedPatches`
    and no pixel is visited; under other upsampling, or where the patches do not divide the canvas, as maps. Scoring takes a
    bounded amount of memory beside it, see `CANVASES_AT_ONCE` and `PIXELS_AT_ONCE`.
    """

    def __init__(
        self,
        protocol: Protocol,
        plan: ViewPlan,
        grid: tuple[int, int],
        keys: Sequence[str],
        units_per_metre: int,
        device: torch.device,
    ) -> None:
        """`grid` is (rows, columns) of patches of a view, `units_per_metre` of stored ground truth.

        Raises `UsageError` for what `why_not_held` has a reason against and for what `Scorer` refuses.
        """
        if reason := why_not_held(protocol, device):
            raise UsageError(f"ground truth cannot be held for this protocol: {reason}.")
        Scorer([protocol], plan)  # refuses what does not fit the plan
        self.protocol = protocol
        self.plan = plan if protocol.tta else replace(plan, flips=False)
        """The views that predictions are of: without TTA the unmirrored ones only."""
        self.grid = grid
        self.keys = tuple(keys)
        self._counts = np.asarray(counted(protocol, _float_metres(units_per_metre)))
        self._inside = inside(protocol.region_in(*plan.canvas), *plan.canvas)
        self._held: _HeldPatches | _HeldMaps
        if constant_over_patches(protocol, plan, grid):
            self._held = _HeldPatches(plan, grid, len(self.keys), units_per_metre, device)
        else:
            self._held = _HeldMaps(protocol, plan, grid, len(self.keys), units_per_metre, device)

    def hold(self, first: int, stored: Stored) -> None:
        """Put in ground truth of the samples from number `first` on: canvases `(n, H, W)` of stored depths, 0 for missing."""
        self._held.hold(first, np.where(self._counts[stored] & self._inside, stored, np.uint16(0)))

    def sums(self, patches: Tensor) -> Tensor:
        """Sums of every unit, a sample or a tile of one, `(units, len(SUMS))` float64, for `patches` as in `means`."""
        combined = combine_views(patches.double(), self.plan, self.protocol.tta)
        by_tile = self.protocol.averaging == "tile"
        starts = range(0, len(combined), self._held.at_once)
        parts = [slice(start, start + self._held.at_once) for start in starts]
        found = [self._held.sums(part, self.protocol, combined[part], by_tile) for part in parts]
        return torch.cat(found) if found else combined.new_zeros((0, len(SUMS)))

    def values(self, patches: Tensor) -> Tensor:
        """What `means` reads, still on the device: every metric, and the number of the first sample that is not finite."""
        sums = self.sums(patches)
        metrics = metrics_from_sums(sums)
        if self.protocol.averaging == "pixels":
            metrics = {name: value[None] for name, value in metrics_from_sums(sums.sum(dim=0)).items()}
        broken = patches.isfinite().flatten(1).all(dim=1).logical_not().int()
        first = torch.cat([broken, broken.new_ones(1)]).argmax()
        return torch.stack([*(metrics[name].nanmean() for name in PIXEL_METRICS), first.double()])

    def means(self, patches: Tensor) -> dict[str, float]:
        """Every metric by the protocol's averaging, as `Scores.means`: NaN if no pixel counts anywhere.

        `patches` are depths in metres `(N, views, rows, columns)` of all samples on the device, views as in `plan`. Raises
        `PredictionError` for a prediction that is not finite and `UsageError` for a shape that does not fit.
        """
        expected = (len(self.keys), self.plan.views, *self.grid)
        if tuple(patches.shape) != expected:
            raise UsageError(f"predictions have shape {tuple(patches.shape)}; expected {expected}.")
        *means, first = self.values(patches).tolist()
        if first < len(self.keys):
            raise PredictionError(f"the prediction of {self.keys[int(first)]} is not finite; the head has diverged.")
        return dict(zip(PIXEL_METRICS, means, strict=True))


def held_bytes(protocol: Protocol, plan: ViewPlan, grid: tuple[int, int], samples: int) -> int:
    """Memory that ground truth of `samples` samples takes on the device: 0.45 MB for each 336x336 canvas, as maps 0.23 MB."""
    pixels = plan.canvas[0] * plan.canvas[1]
    if not constant_over_patches(protocol, plan, grid):
        return samples * 2 * pixels
    patches = plan.tiles * grid[0] * grid[1]
    return samples * patches * SortedPatches.bytes_per_patch(pixels // patches)


def constant_over_patches(protocol: Protocol, plan: ViewPlan, grid: tuple[int, int]) -> bool:
    """Whether every pixel of a patch is predicted the same: patches are upsampled by nearest neighbour and divide the view."""
    divides = all(size % cells == 0 for size, cells in zip(plan.view_size, grid, strict=True))
    return protocol.upsample == "nearest" and divides


def _float_metres(units_per_metre: int) -> npt.NDArray[np.float32]:
    """Metres `(65536,)` of every stored depth, NaN for 0."""
    metres = metres_of_stored(units_per_metre).astype(np.float32)
    metres[0] = np.nan
    return metres


class _HeldPatches:
    """Ground truth sorted within patches; see `pcd.evaluation.patchwise`."""

    at_once = CANVASES_AT_ONCE

    def __init__(self, plan: ViewPlan, grid: tuple[int, int], samples: int, units: int, device: torch.device) -> None:
        self._tiles = plan.grid
        self._cells = (plan.grid[0] * grid[0], plan.grid[1] * grid[1])
        patches = self._cells[0] * self._cells[1]
        self._sorted = SortedPatches(samples, patches, plan.canvas[0] * plan.canvas[1] // patches, units, device)

    def hold(self, first: int, stored: Stored) -> None:
        """Canvases `(n, H, W)`, 0 where a pixel does not count."""
        self._sorted.hold(first, to_patches(stored, self._cells))

    def sums(self, part: slice, protocol: Protocol, combined: Tensor, by_tile: bool) -> Tensor:
        """Sums `(units, len(SUMS))` of the canvases `part`, predicted as `combined` `(n, Gh, Gw)`."""
        pred = combined.flatten(1)
        count = admitted(protocol, pred)
        pred = torch.where(count, compared(protocol, pred), 1.0)
        sums = self._sorted.sums(part, pred) * count.unsqueeze(-1)
        rows, columns = self._tiles if by_tile else (1, 1)
        shape = (len(sums), rows, self._cells[0] // rows, columns, self._cells[1] // columns, len(SUMS))
        tiles: Tensor = sums.reshape(shape).sum(dim=(2, 4))
        return tiles.flatten(0, 2)


class _HeldMaps:
    """Ground truth as maps of stored depths, 2 bytes a pixel."""

    def __init__(
        self, protocol: Protocol, plan: ViewPlan, grid: tuple[int, int], samples: int, units: int, device: torch.device
    ) -> None:
        self._tiles, self._canvas = plan.grid, plan.canvas
        self.at_once = max(1, PIXELS_AT_ONCE // (plan.canvas[0] * plan.canvas[1]))
        self._stored = torch.full((samples, *plan.canvas), -OFFSET, dtype=torch.int16, device=device)
        self._metres = torch.from_numpy(metres_of_stored(units)).to(device)
        resize = []
        for cells, size in ((plan.grid[0] * grid[0], plan.canvas[0]), (plan.grid[1] * grid[1], plan.canvas[1])):
            each = torch.eye(cells, dtype=torch.float64)
            resize.append(upsample(each[None], (size, cells), protocol.upsample)[0].to(device))
        self._rows, self._columns = resize[0], resize[1].T.contiguous()

    def hold(self, first: int, stored: Stored) -> None:
        """Canvases `(n, H, W)`, 0 where a pixel does not count."""
        self._stored[first : first + len(stored)] = torch.from_numpy(shifted(stored)).to(self._stored.device)

    def sums(self, part: slice, protocol: Protocol, combined: Tensor, by_tile: bool) -> Tensor:
        """Sums `(units, len(SUMS))` of the canvases `part`, predicted as `combined` `(n, Gh, Gw)`."""
        pred = self._rows @ combined @ self._columns
        stored = self._stored[part].int() + OFFSET
        mask = (stored > 0) & admitted(protocol, pred)
        pred, gt = compared(protocol, pred), self._metres[stored]
        rows, columns = self._tiles if by_tile else (1, 1)
        height, width = self._canvas[0] // rows, self._canvas[1] // columns
        cut = (values.reshape(-1, rows, height, columns, width).transpose(2, 3) for values in (pred, gt, mask))
        return masked_sums(*(values.flatten(0, 2) for values in cut))
