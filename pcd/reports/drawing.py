"""How figures look, on paper and inside a page that may be light or dark."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pcd.files import write_bytes

SERIES = ("#3b78c4", "#d9822b", "#2f9e6e", "#b04a8f", "#8a6fd1", "#c2493d", "#6d8a2f", "#1f9aa8")
"""One colour per run; readable on white and on near-black."""
INK = "#101418"
"""Text and axes; inside a page it becomes the page's own text colour."""
GRID = "#d9dce1"
"""Grid lines; inside a page the page's own line colour."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pcd",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
_DPI = 200


def style() -> Any:
    """The context in which figures are made and saved."""
    return mpl.rc_context(_STYLE)


def new_figure(columns: int, rows: int = 1, *, width: float = 9.6, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` times `columns` axes, `width` inches wide, each row `height` inches high."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = [axis for row in axes for axis in row]
    for axis in flat:
        axis.set_axisbelow(True)
    return figure, flat


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `STEM.png` (200 dpi) and `STEM.svg`, on white; each appears whole or not at all."""
    files = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    looks: tuple[dict[str, Any], ...] = ({"dpi": _DPI}, {"metadata": {"Date": None}})
    for file, look in zip(files, looks, strict=True):
        drawn = io.BytesIO()
        with style():
            figure.savefig(drawn, format=file.suffix[1:], facecolor="white", **look)
        figure.set_layout_engine("none")  # everything has its place now
        write_bytes(file, drawn.getvalue())
    return files


def inline(figure: Figure, prefix: str, words: str) -> str:
    """The figure as an `<svg>` element for a page: no background, colours of the page, ids that start with `prefix`.

    `words` say what it shows to those who cannot see it.
    """
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    label = words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
