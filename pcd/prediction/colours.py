"""Depth as colours: pixels for side-by-side pictures, and drawn pictures with a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pcd.evaluation.pictures import UNSURE_COLOURS, WIDTH, is_wide, paint
from pcd.prediction.result import FloatArray, strips

Rgb = npt.NDArray[np.uint8]
Span = tuple[float, float]
"""Metres of the first and the last colour."""

THUMBNAIL = 2048
"""Pixels of the longer side of what is drawn."""
MARGIN = 0.25
"""Share of the first frame's range by which the colours of a video reach further on both sides."""


@dataclass(frozen=True)
class Survey:
    """Smallest and largest value of a map, and every so many-th pixel of it as a small map."""

    low: float
    high: float
    small: FloatArray

    @property
    def is_finite(self) -> bool:
        """Whether every pixel is a number."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def survey(rows: Callable[[int, int], FloatArray], size: tuple[int, int]) -> Survey:
    """Look through a map of `size` once, strip by strip."""
    step = -(-max(size) // THUMBNAIL)
    low, high = np.float32(np.inf), np.float32(-np.inf)
    small = []
    for top, bottom in strips(*size, multiple=step):
        strip = rows(top, bottom)
        low, high = np.minimum(low, strip.min()), np.maximum(high, strip.max())  # which keep NaN, as min and max do not
        small.append(strip[step // 2 :: step, step // 2 :: step])
    return Survey(float(low), float(high), np.concatenate(small))


def shrink(rgb: Rgb, size: tuple[int, int]) -> Rgb:
    """An image brought to the size of a small map; unchanged if it has it."""
    if rgb.shape[:2] == size:
        return rgb
    return np.asarray(cv2.resize(rgb, (size[1], size[0]), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def side_by_side(rgb: Rgb, rows: Callable[[int, int], FloatArray], span: Span) -> tuple[tuple[int, int], Iterator[Rgb]]:
    """Image and coloured depth at full size and nothing else: the size of the picture, and its strips from top to bottom."""
    height, width = rgb.shape[:2]

    def beside() -> Iterator[Rgb]:
        for top, bottom in strips(height, width):
            yield np.concatenate([rgb[top:bottom], paint(rows(top, bottom), span)], axis=1)

    def above() -> Iterator[Rgb]:
        for top, bottom in strips(height, width):
            yield rgb[top:bottom]
        for top, bottom in strips(height, width):
            yield paint(rows(top, bottom), span)

    return ((2 * height, width), above()) if is_wide((height, width)) else ((height, 2 * width), beside())


def save_spread(path: Path, rgb: Rgb, spread: FloatArray, title: str) -> None:
    """Draw an image and its standard deviation `(h, w)` in metres, dark where the head is sure; colours start at 0."""
    height, width = spread.shape
    lines, columns = (2, 1) if is_wide((height, width)) else (1, 2)
    panel = WIDTH * (2 if columns == 1 else 1)
    figure = Figure(figsize=(columns * panel + 1, lines * (panel * height / width + 0.35) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns).reshape(-1)
    axes[0].imshow(rgb)
    top = max(float(np.percentile(spread, 98)), 1e-3)
    image = axes[1].imshow(spread, cmap=UNSURE_COLOURS, vmin=0, vmax=top)
    for axis, heading in zip(axes, ("image", "uncertainty"), strict=True):
        axis.set_title(heading, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=list(axes), label="standard deviation in metres", fraction=0.03, pad=0.01)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
