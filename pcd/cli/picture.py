"""Small pictures in a terminal: two pixels in each character cell, the upper half block in front of a background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

UPPER_HALF = "\N{UPPER HALF BLOCK}"
SPACE = 2
"""Columns between pictures that stand side by side."""


class Picture:
    """RGB uint8 `(h, w, 3)` as `(h + 1) // 2` lines of `w` characters; under an odd last row is the terminal's background."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for top in range(0, len(self.pixels), 2):
            upper, lower = self.pixels[top], self.pixels[top + 1] if top + 1 < len(self.pixels) else None
            for column in range(len(upper)):
                behind = None if lower is None else _colour(lower[column])
                yield Segment(UPPER_HALF, Style(color=_colour(upper[column]), bgcolor=behind))
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.pixels.shape[1], self.pixels.shape[1])


def _colour(pixel: npt.NDArray[np.uint8]) -> Color:
    return Color.from_rgb(*(int(part) for part in pixel))


def shows_pictures(console: Console) -> bool:
    """Whether a person is looking through something that can show them: a terminal with at least 256 colours and Unicode."""
    colours = console.color_system in ("truecolor", "256") and not console.no_color
    return console.is_terminal and not console.is_dumb_terminal and colours and not console.options.ascii_only


def picture_layout(number: int, aspect: float, columns: int, limits: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How many of `number` pictures stand side by side in a terminal of `columns`, and the (height, width) of each in pixels.

    `aspect` is width by height; `limits` the fewest and the most columns of each, if there is room.
    """
    smallest, largest = limits
    most = min(number, max(1, (columns + SPACE) // (smallest + SPACE)))
    side_by_side = -(-number // -(-number // most))
    width = max(1, min(largest, (columns + SPACE) // side_by_side - SPACE))
    return side_by_side, (max(1, round(width / aspect)), width)


def gallery(pictures: Sequence[tuple[str, Picture]], side_by_side: int) -> Table:
    """Pictures with their titles, in rows of `side_by_side`, of which there are at least as many."""
    grid = Table.grid(padding=(0, SPACE, 0, 0))
    for number in range(side_by_side):
        grid.add_column(width=max(picture.pixels.shape[1] for _, picture in pictures[number::side_by_side]))
    for start in range(0, len(pictures), side_by_side):
        row = pictures[start : start + side_by_side]
        grid.add_row(*(Text(title, no_wrap=True, overflow="ellipsis") for title, _ in row))
        grid.add_row(*(picture for _, picture in row))
    return grid


def scale_bars(bars: Sequence[tuple[str, npt.NDArray[np.uint8], str, str]]) -> Table:
    """A line each: a number, colours `(n, 3)` from left to right, another number, and what the numbers mean."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    for number in range(3):
        grid.add_column(justify="left" if number == 1 else "right", no_wrap=True)
    for low, colours, high, words in bars:
        grid.add_row(Text(low), Picture(np.stack([colours, colours])), Text(high), Text(words))
    return grid
