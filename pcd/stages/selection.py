"""One sample of a table, whole or one view of it: how canvases and patch values are cut to what is shown."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcd.cache import Table
from pcd.errors import UsageError, suggest
from pcd.views import ViewPlan, from_views, to_views

NEAR_KEYS = 5
"""Keys that an error for an unknown one names."""


@dataclass(frozen=True)
class Selection:
    """Sample `number` of a table; `view` is None for the whole canvas, or the number of one view."""

    table: Table
    number: int
    view: int | None = None

    def __post_init__(self) -> None:
        if self.view is not None and not 0 <= self.view < self.table.views:
            raise UsageError(f"--view {self.view}: samples of {self.table.root} have views 0 to {self.table.views - 1}.")

    @property
    def plan(self) -> ViewPlan:
        """How samples became views."""
        return self.table.plan

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """The sample's number, `(1,)`."""
        return np.array([self.number])

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The rows of all its views, `(views,)`."""
        rows: npt.NDArray[np.int64] = self.table.view_rows(self.samples)[0]
        return rows

    @property
    def shown(self) -> list[int]:
        """The views that are shown: all that are not mirrored, or the chosen one."""
        return list(range(self.plan.tiles)) if self.view is None else [self.view]

    def pixels(self, canvas: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What is shown of a canvas `(H, W, ...)`."""
        return canvas if self.view is None else to_views(canvas, self.plan)[self.view]

    def patches(self, values: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
        """What is shown of the patch values of all views `(views, P, ...)`: `(rows, columns, ...)`."""
        cells = values.reshape(len(values), *grid, *values.shape[2:])
        shown: npt.NDArray[Any] = from_views(cells, self.plan)[0] if self.view is None else cells[self.view]
        return shown


def find_sample(table: Table, sample: str) -> int:
    """The number of a sample given by key or by number. Raises `UsageError` naming the nearest keys."""
    if sample in table.keys:
        return table.keys.index(sample)
    if sample.isdecimal() and int(sample) < table.samples:
        return int(sample)
    near = [key for key in table.keys if sample in key][:NEAR_KEYS]
    near = near or difflib.get_close_matches(sample, table.keys, n=NEAR_KEYS, cutoff=0.4) or list(table.keys[:NEAR_KEYS])
    more = f" and {table.samples - len(near)} more" if table.samples > len(near) else ""
    raise UsageError(
        f"table {table.name} of {table.root} has no sample {sample!r}.{suggest(sample, near)[:-1]}{more}; "
        f"or give a number from 0 to {table.samples - 1}."
    )
