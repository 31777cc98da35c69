"""From the patch depths of the views to depth maps: merge tiles, un-flip, average, upsample, place in the frame.

Every way of resizing is separable and takes two cells of each axis, so only the region that is scored is ever computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.errors import UsageError
from pcd.evaluation.protocol import Upsample
from pcd.regions import Region
from pcd.views import ViewPlan, crop_region

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[Any]
UPSAMPLE: tuple[Upsample, ...] = get_args(Upsample)


def _positions(source: int, target: int, places: IntArray, mode: str) -> FloatArray:
    """Where target cells lie on the source axis: float64 cell indices within [0, source - 1]."""
    if mode == "nearest":
        return (places * source // target).astype(np.float64)  # integers: floating point misses exact multiples
    if mode == "bilinear":
        return ((places + 0.5) * source / target - 0.5).clip(0, source - 1)
    if mode == "bilinear-align-corners":
        return places * ((source - 1) / max(target - 1, 1))
    raise UsageError(f"upsample = {mode!r}: known are {', '.join(UPSAMPLE)}.")


def on_cpu(tensor: Tensor) -> bool:
    """Whether to compute with NumPy, in one thread: waking others for arrays this small costs more than it gains."""
    return tensor.device.type == "cpu"


class _Taps(NamedTuple):
    """Resizing one axis: output cell k is `first[k]` times input cell `low[k]` plus `second[k]` times input cell `high[k]`."""

    low: IntArray
    high: IntArray
    first: FloatArray
    second: FloatArray


@lru_cache(maxsize=256)
def _taps(source: int, target: int, mode: str, start: int, stop: int, outside: str) -> _Taps:
    """Output cells `start:stop` of resizing an axis from `source` to `target` cells.

    Cells beyond `[0, target)` repeat the nearest one inside ("edge") or are zero ("zero").
    """
    if outside not in ("edge", "zero"):
        raise UsageError(f"outside = {outside!r}: known are edge, zero.")
    wanted = np.arange(start, stop)
    position = _positions(source, target, wanted.clip(0, target - 1), mode)
    low = np.floor(position).astype(np.int64)
    second = position - low
    first = 1 - second
    if outside == "zero":
        beyond = (wanted < 0) | (wanted >= target)
        first[beyond] = second[beyond] = 0
    return _Taps(low, (low + 1).clip(max=source - 1), first, second)


def _resize_array(patches: FloatArray, rows: _Taps, columns: _Taps) -> FloatArray:
    """Rows, then columns, on the CPU."""
    for axis, taps in ((-2, rows), (-1, columns)):
        shape = (-1, 1) if axis == -2 else (-1,)
        weights = [weight.astype(patches.dtype).reshape(shape) for weight in (taps.first, taps.second)]
        resized = patches.take(taps.low, axis=axis)
        if taps.second.any() or not taps.first.all():
            other = patches.take(taps.high, axis=axis)
            resized *= weights[0]
            other *= weights[1]
            resized += other
        patches = resized
    return patches


def _resize_tensor(patches: Tensor, rows: _Taps, columns: _Taps) -> Tensor:
    """The same on an accelerator."""
    for axis, taps in ((-2, rows), (-1, columns)):
        shape = (-1, 1) if axis == -2 else (-1,)
        low, high, first, second = (torch.from_numpy(part).to(patches.device) for part in taps)
        resized = patches.index_select(axis, low) * first.to(patches.dtype).reshape(shape)
        patches = resized + patches.index_select(axis, high) * second.to(patches.dtype).reshape(shape)
    return patches


def _resize(patches: Tensor, size: tuple[int, int], mode: str, window: Region, outside: str) -> Tensor:
    """Patches `(B, Gh, Gw)` resized to `size`, of which only `window` is computed; the window may reach beyond `size`."""
    top, bottom, left, right = window
    rows = _taps(patches.shape[-2], size[0], mode, top, bottom, outside)
    columns = _taps(patches.shape[-1], size[1], mode, left, right, outside)
    if on_cpu(patches):
        return torch.from_numpy(_resize_array(patches.numpy(), rows, columns))
    return _resize_tensor(patches, rows, columns)


def combine_views(patches: Tensor, plan: ViewPlan, tta: bool = True) -> Tensor:
    """Patch depths of all views `(N, views, gh, gw)`, flip-major, to canvases `(N, rows * gh, columns * gw)`.

    Tiles are merged in reading order; with `tta` the un-flipped canvases of both halves are averaged (paper, section 3.2),
    without it the mirrored views are ignored. The twin of `views.from_views`. Raises `UsageError` for a number of views that
    is not the plan's, or for `tta` without mirrored views.
    """
    if patches.ndim != 4 or patches.shape[1] != plan.views:
        raise UsageError(
            f"predictions have shape {tuple(patches.shape)}; expected (samples, {plan.views} views, rows, columns)."
        )
    if tta and not plan.flips:
        raise UsageError("flip TTA needs mirrored views, and there are none: extract with flips, or score without TTA.")
    number, _, height, width = patches.shape
    rows, columns = plan.grid
    halves = 2 if plan.flips else 1
    tiles = patches.reshape(number, halves, rows, columns, height, width)
    canvases = tiles.transpose(3, 4).reshape(number, halves, rows * height, columns * width)
    if not tta:
        return canvases[:, 0]
    return (canvases[:, 0] + canvases[:, 1].flip(-1)) / 2


def upsample(patches: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize patch depths `(B, Gh, Gw)` to `size` (height, width), in their own precision (float32 or float64).

    `nearest` takes cell `floor(i * G / size)`; `bilinear` has half-pixel centres; `bilinear-align-corners` puts the centres of
    the outer cells on the outer pixels. Raises `UsageError` for another mode.
    """
    return _resize(patches, size, mode, (0, size[0], 0, size[1]), "edge")


def canvas_prediction(patches: Tensor, plan: ViewPlan, mode: str) -> Tensor:
    """Combined patch depths `(B, Gh, Gw)` on the plan's canvas: `(B, canvas H, canvas W)`."""
    return upsample(patches, plan.canvas, mode)


def native_prediction(
    patches: Tensor, plan: ViewPlan, native_size: tuple[int, int], mode: str, outside: str, region: Region | None = None
) -> Tensor:
    """Combined patch depths `(B, Gh, Gw)` on stored frames of `native_size`, or on a region of them: `(B, h, w)`.

    The patches are resized straight to the plan's crop of the frame, not by way of the canvas. Pixels outside the crop repeat
    the nearest pixel inside ("edge") or are 0 ("zero"): the NYU crop rows 40:470 do not cover row 470 of the Eigen region.
    Raises `SampleError` if the frame is smaller than the crop.
    """
    top, bottom, left, right = crop_region(plan, *native_size)
    window = region or (0, native_size[0], 0, native_size[1])
    shifted = (window[0] - top, window[1] - top, window[2] - left, window[3] - left)
    return _resize(patches, (bottom - top, right - left), mode, shifted, outside)
