"""The canvas of an image of any size, without a float copy of the image.

Bilinear interpolation without antialiasing touches two source rows and two source columns per canvas cell, however large the
image is: those are gathered first, and only they become floats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pcd.views import FloatArray, ViewPlan, crop_region, image_canvas

LARGE = 2**22
"""Pixels beyond which rows are gathered; below, the float copy takes 50 MB at most and is faster."""


def canvas_of(rgb: npt.NDArray[np.uint8], plan: ViewPlan) -> FloatArray:
    """The canvas of an image `(H, W, 3)` under a plan: as in extraction, and for large images with little memory."""
    return gathered_canvas(rgb, plan) if rgb.shape[0] * rgb.shape[1] > LARGE else image_canvas(rgb, plan)


def _taps(source: int, target: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The two source cells of each target cell and the weight of the second: half-pixel centres, float32 weights."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).clip(0, source - 1)
    low = np.floor(position).astype(np.int64)
    return low, (low + 1).clip(max=source - 1), (position - low).astype(np.float32).astype(np.float64)


def _between(first: FloatArray, second: FloatArray, weight: npt.NDArray[np.float64]) -> FloatArray:
    """`first + (second - first) * weight`, rounded once, as OpenCV does on processors with a fused multiply-add."""
    return (first + (second - first) * weight).astype(np.float32)


def gathered_canvas(rgb: npt.NDArray[np.uint8], plan: ViewPlan) -> FloatArray:
    """The same as `pcd.views.image_canvas` to 1e-6: RGB uint8 `(H, W, 3)` to float32 `(canvas H, canvas W, 3)` in [0, 1].

    Beyond the image itself memory grows with the canvas, and with the image's width times the canvas's height in bytes.
    Raises `SampleError` if the image is smaller than the plan's crop.
    """
    top, bottom, left, right = crop_region(plan, rgb.shape[0], rgb.shape[1])
    if 1 in (bottom - top, right - left):  # a single line: its float copy is small, and OpenCV takes coarser positions for it
        return image_canvas(rgb, plan)
    upper, lower, down = _taps(bottom - top, plan.canvas[0])
    west, east, across = _taps(right - left, plan.canvas[1])

    def line(rows: npt.NDArray[np.int64]) -> FloatArray:
        gathered = rgb[top + rows]
        first, second = (gathered[:, left + columns].astype(np.float32) / np.float32(255) for columns in (west, east))
        return _between(first, second, across[:, None])

    return _between(line(upper), line(lower), down[:, None, None])
