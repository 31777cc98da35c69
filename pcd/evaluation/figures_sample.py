"""One sample as panels: what they are, how their numbers become colours, small ones for a terminal and a whole figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from pcd.evaluation.pictures import COLOURS, ERROR_COLOURS, UNSURE_COLOURS, depth_scale, is_wide, paint, resampled
from pcd.views import ViewPlan, to_views

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.float32]
Kind = Literal["rgb", "depth", "error", "spread", "share", "mask"]
GAP = 8
"""Pixels between the views in their layout."""
SPARSE, BLOCK = 0.5, 4
"""Maps with values in less than this share of their pixels are drawn as means over blocks: single pixels cannot be seen."""
TITLE_WIDTH = 44
"""Characters of a title above a panel of single width."""


@dataclass(frozen=True)
class Scale:
    """What the colours of one kind of map say: limits, matplotlib's name of the colours, and words with the unit."""

    low: float
    high: float
    colours: str
    words: str
    steps: int = 256
    """Different colours."""


@dataclass(frozen=True)
class SamplePanel:
    """One picture of a sample: RGB uint8 `(h, w, 3)`, or numbers `(h, w)` with NaN where there are none.

    `kind` says what the numbers are: `depth`, `error` and `spread` in metres, `share` from 0 to 1, `mask` 0 or 1. `marks` are
    words at (column, row) of the picture.
    """

    name: str
    title: str
    kind: Kind
    pixels: Pixels | Map
    marks: tuple[tuple[int, int, str], ...] = ()
    span: int = 1
    """Columns of the figure it takes."""


def scales(panels: Sequence[SamplePanel]) -> dict[Kind, Scale]:
    """One scale for all panels of a kind. That of errors is white at 0 and symmetric, up to the size of 9 in 10 of them."""
    found: dict[Kind, list[Map]] = {}
    for panel in panels:
        if panel.kind != "rgb":
            found.setdefault(panel.kind, []).append(panel.pixels.astype(np.float32))
    made: dict[Kind, Scale] = {
        "share": Scale(0, 1, "cividis", "share of the pixels"),
        "mask": Scale(0, 1, "gray", "counts in the loss", 2),
    }
    if maps := found.get("depth"):
        made["depth"] = Scale(*depth_scale(maps), COLOURS, "depth in metres")
    if maps := found.get("error"):
        sizes = np.abs(np.concatenate([each[np.isfinite(each)] for each in maps]))
        most = max(float(np.percentile(sizes, 90)), 1e-3) if sizes.size else 1.0
        made["error"] = Scale(-most, most, ERROR_COLOURS, "predicted minus true depth in metres (red: too near)")
    if maps := found.get("spread"):
        made["spread"] = Scale(0.0, depth_scale(maps)[1], UNSURE_COLOURS, "standard deviation in metres")
    return made


def coloured(values: Map, scale: Scale) -> Pixels:
    """Numbers `(h, w)` as RGB uint8 `(h, w, 3)` in the colours of a scale."""
    return paint(values, (scale.low, scale.high), scale.colours, scale.steps)


def ramp(scale: Scale, steps: int) -> Pixels:
    """The colours of a scale from its lower to its upper limit, `(steps, 3)`."""
    row: Pixels = coloured(np.linspace(scale.low, scale.high, steps, dtype=np.float32)[None], scale)[0]
    return row


def small(panel: SamplePanel, scale: Scale | None, size: tuple[int, int]) -> Pixels:
    """A panel as RGB uint8 of `size` (height, width); `scale` is needed for all but images."""
    values = resampled(panel.pixels, size)
    return np.asarray(values, dtype=np.uint8) if scale is None else coloured(values.astype(np.float32), scale)


def principal_colours(tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], float]:
    """The first three principal components of tokens `(n, D)` as red, green and blue `(n, 3)`, and their share of the variance.

    Each goes from 0 at its 5th to 1 at its 95th percentile, as CLIP has a few patches far from all others; a component's
    sign is that of its largest loading.
    """
    centred = tokens.astype(np.float64) - tokens.astype(np.float64).mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    first = vectors[:, ::-1][:, :3]
    first = first * np.sign(first[np.abs(first).argmax(axis=0), np.arange(first.shape[1])])
    values = np.zeros((len(tokens), 3))
    values[:, : first.shape[1]] = centred @ first
    low, high = np.percentile(values, (5, 95), axis=0)
    rgb = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    total = float(variances.sum())
    return rgb.astype(np.float32), float(variances[::-1][:3].sum()) / total if total > 0 else 0.0


def views_panel(canvas: Pixels, plan: ViewPlan) -> SamplePanel:
    """All views of a canvas `(H, W, 3)` as the encoder sees them, each with its number; the mirrored ones on the right."""
    (height, width), (rows, columns) = plan.view_size, plan.grid
    down, across = height + GAP, width + GAP
    halves = plan.views // plan.tiles
    size = (rows * down - GAP, columns * halves * across - GAP, 3)
    layout, marks = np.full(size, 255, dtype=np.uint8), []
    for number, view in enumerate(to_views(canvas, plan)):
        mirrored, tile = divmod(number, plan.tiles)
        top, left = tile // columns * down, (tile % columns + mirrored * columns) * across
        layout[top : top + height, left : left + width] = view
        marks.append((left, top, f"{number}{' mirrored' if mirrored else ''}"))
    title = f"views 0 to {plan.views - 1}, as the encoder sees them"
    return SamplePanel("views", title, "rgb", layout, tuple(marks), span=halves)


GROUPS: tuple[tuple[Kind, ...], ...] = (("rgb",), ("depth",), ("share", "mask", "error", "spread"))
"""Kinds that stand together in the figure: images, everything in the shared scale of depth, and the rest."""
ORDER = ("image", "truth", "prediction", "true bin", "likely bin", "error", "std")
"""What stands first in its group; the rest follows as it comes."""
BARS: dict[Kind, float] = {"rgb": 0.0, "depth": 0.0}
"""Inches under each panel of a kind for its own bar; the depths share one under all of them."""
OWN_BAR, SHARED_BAR, TITLE = 0.65, 0.65, 0.4


def save_sample(path: Path, panels: Sequence[SamplePanel], title: str) -> None:
    """Draw all panels with their scales and save them as PNG (or what the suffix says)."""
    ordered = sorted(panels, key=lambda panel: (panel.span, ORDER.index(panel.name) if panel.name in ORDER else len(ORDER)))
    groups = [found for kinds in GROUPS if (found := [panel for panel in ordered if panel.kind in kinds])]
    height, width = next((p.pixels.shape for p in panels if p.name == "truth"), panels[0].pixels.shape)[:2]
    columns, wide = (2, 6.5) if is_wide((height, width)) else (5, 3.3)
    each = wide * height / width + TITLE
    rows = [_places(group, columns)[-1][0] + 1 for group in groups]
    tall = [
        number * (each + BARS.get(group[0].kind, OWN_BAR)) + SHARED_BAR * (group[0].kind == "depth")
        for number, group in zip(rows, groups, strict=True)
    ]
    figure = Figure(figsize=(columns * wide, sum(tall) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title + "\n", fontsize=11)
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=tall)
    for part, group in zip(parts[:, 0], groups, strict=True):
        _draw_group(part, group, columns, scales(panels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _places(group: Sequence[SamplePanel], columns: int) -> list[tuple[int, int]]:
    """Row and column of each panel, filled in reading order; a panel that does not fit into a row begins the next."""
    places, row, column = [], 0, 0
    for panel in group:
        if column + panel.span > columns and column:
            row, column = row + 1, 0
        places.append((row, column))
        column += panel.span
    return places


def _draw_group(part: SubFigure, group: Sequence[SamplePanel], columns: int, made: dict[Kind, Scale]) -> None:
    """One group in rows of `columns`; the depths share one bar, every other map has its own."""
    places = _places(group, columns)
    grid, axes = part.add_gridspec(places[-1][0] + 1, columns), []
    for panel, (row, column) in zip(group, places, strict=True):
        axis = part.add_subplot(grid[row, column : column + panel.span])
        axes.append(axis)
        _draw(axis, panel, made.get(panel.kind), TITLE_WIDTH * panel.span * (2 if columns == 2 else 1))
        if panel.kind not in BARS:
            _bar(part, made[panel.kind], [axis], 20 if columns > 2 else 45)
    if group[0].kind == "depth":
        _bar(part, made["depth"], axes, 60)


def _draw(axis: Axes, panel: SamplePanel, scale: Scale | None, width: int) -> None:
    words, pixels = panel.title, panel.pixels
    if panel.kind in ("depth", "error") and np.isfinite(pixels).mean() < SPARSE and min(pixels.shape) >= 50 * BLOCK:
        pixels = resampled(pixels, (pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK))
        words += f" (drawn as means of {BLOCK}x{BLOCK})"
    axis.set_title(textwrap.fill(words, width), fontsize=9)
    axis.imshow(small(replace(panel, pixels=pixels), scale, (pixels.shape[0], pixels.shape[1])), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for left, top, mark in panel.marks:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.text(left + 4, top + 4, mark, fontsize=7, va="top", ha="left", bbox=box)


def _bar(part: SubFigure, scale: Scale, axes: list[Axes], aspect: int) -> None:
    """The scale under some panels; pointed ends say that there may be values beyond."""
    colours = ScalarMappable(Normalize(scale.low, scale.high), matplotlib.colormaps[scale.colours].resampled(scale.steps))
    extend = "neither" if (scale.low, scale.high) == (0, 1) else "both" if scale.low else "max"
    bar = part.colorbar(colours, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=aspect, extend=extend)
    bar.set_label(scale.words, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if scale.steps == 2:
        bar.set_ticks([0.25, 0.75], labels=["no", "yes"])
