"""Depth maps as pictures that a person can read: colours with a scale in metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = "turbo_r"
"""Near is warm, far is cold."""
ERROR_COLOURS = "RdBu"
"""Of prediction minus truth: too near is warm, too far is cold."""
UNSURE_COLOURS = "magma"
"""Of standard deviations."""
NO_VALUE = (153, 153, 153)
"""Grey, where there is no number."""
WIDTH = 5.0
"""Inches of one panel."""
WIDE = 2.0
"""Pictures this many times wider than high stand above each other, others side by side."""


@dataclass(frozen=True)
class Panel:
    """One map or image with its title: `(h, w)` metres (NaN is drawn grey) or RGB uint8 `(h, w, 3)`."""

    title: str
    pixels: npt.NDArray[np.float32] | npt.NDArray[np.uint8]


def depth_scale(maps: Sequence[npt.NDArray[np.float32]]) -> tuple[float, float]:
    """The 2nd and 98th percentile of all finite depths together, in metres."""
    values = np.concatenate([np.zeros(0, dtype=np.float32), *(depth[np.isfinite(depth)] for depth in maps)])
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (2, 98))
    return float(low), float(max(high, low + 1e-3))


def is_wide(size: tuple[int, int]) -> bool:
    """Whether pictures of `size` (height, width) stand above each other rather than side by side."""
    return size[1] >= WIDE * size[0]


def paint(
    values: npt.NDArray[np.float32], span: tuple[float, float], colours: str = COLOURS, steps: int = 256
) -> npt.NDArray[np.uint8]:
    """Numbers `(h, w)` as RGB uint8 `(h, w, 3)`, `NO_VALUE` for NaN, the outermost of `steps` colours beyond `span`."""
    low, high = span
    table = mpl.colormaps[colours].resampled(steps)(np.arange(steps), bytes=True)[:, :3]
    share = (np.nan_to_num(values) - np.float32(low)) * np.float32(steps / (high - low))
    rgb: npt.NDArray[np.uint8] = table[share.clip(0, steps - 1).astype(np.uint8)]
    rgb[~np.isfinite(values)] = NO_VALUE
    return rgb


def resampled(pixels: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """A picture or map at another `size` (height, width): area means of what has a value, or the nearest cell to enlarge.

    Numbers are averaged before they become colours, so that a colour always stands for a number.
    """
    height, width = pixels.shape[:2]
    mode = cv2.INTER_AREA if size[0] <= height and size[1] <= width else cv2.INTER_NEAREST
    if pixels.ndim == 3:
        return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=mode))
    there = np.isfinite(pixels)
    weight = cv2.resize(there.astype(np.float64), size[::-1], interpolation=mode)
    total = cv2.resize(np.where(there, pixels, 0).astype(np.float64), size[::-1], interpolation=mode)
    mean = np.full(size, np.nan)
    np.divide(total, weight, out=mean, where=weight > 1e-9)
    return mean.astype(np.float32)


def save_panels(path: Path, rows: Sequence[Sequence[Panel]], title: str, scale: tuple[float, float] | None = None) -> None:
    """Draw rows of panels with one shared scale in metres and save them as PNG (or what the suffix says)."""
    depths = [panel.pixels for row in rows for panel in row if panel.pixels.ndim == 2]
    low, high = scale or depth_scale([depth.astype(np.float32) for depth in depths])
    height, width = rows[0][0].pixels.shape[:2]
    columns = max(len(row) for row in rows)
    wide = WIDTH * (2 if columns == 1 else 1)
    size = (columns * wide + 1, len(rows) * (wide * height / width + 0.35) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    image = None
    for line, row in zip(axes, rows, strict=True):
        for axis, panel in zip(line, row, strict=False):
            axis.set_title(panel.title, fontsize=10)
            axis.set_facecolor("0.6")
            if panel.pixels.ndim == 2:
                image = axis.imshow(np.ma.masked_invalid(panel.pixels), cmap=COLOURS, vmin=low, vmax=high)
            else:
                axis.imshow(panel.pixels)
            axis.set_xticks([])
            axis.set_yticks([])
        for axis in line[len(row) :]:
            axis.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes, label="depth in metres", fraction=0.03, pad=0.01)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
