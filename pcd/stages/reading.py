"""What a training reads from its cache, and how the runs of a sweep share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.cache import Cache, Table
from pcd.recipe import Recipe, Supervision
from pcd.training.rows import RowSource, TrainingRows, hold_or_stream
from pcd.training.targets import RowTargets, row_targets

Rows = npt.NDArray[np.int64]


class Reading:
    """Each training reads its own columns and targets."""

    def columns(
        self, table: Table, names: Sequence[str], rows: Rows, residency: Any, device: torch.device
    ) -> tuple[RowSource, str]:
        """Where columns `names` of `rows` come from, and a line that says how; `residency` as in `[train]`."""
        return hold_or_stream(table, names, rows, residency, device)

    def targets(
        self,
        table: Table,
        rows: Rows,
        grid: tuple[int, int],
        settings: Mapping[str, Supervision],
        depth_range: tuple[float, float],
        group: str,
    ) -> Mapping[str, RowTargets]:
        """Targets of `rows`; see `pcd.training.targets.row_targets`."""
        return row_targets(table, rows, grid, settings, depth_range, group)


OWN = Reading()
"""Every training for itself."""


class SharedReading(Reading):
    """Trainings one after the other: a column is opened once, for all rows that any of them visits.

    What is held in memory is read from the cache once and stays for as long as this object lives. Each column is opened by
    itself, so that a head that reads fewer of them copies no more than it needs. Of targets only the newest are kept.
    """

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        """`rows` says which rows of a table are opened; a training on others reads for itself."""
        self._rows = rows
        self._sources: dict[tuple[Any, ...], RowSource] = {}
        self._targets: tuple[Any, Mapping[str, RowTargets]] | None = None

    def columns(
        self, table: Table, names: Sequence[str], rows: Rows, residency: Any, device: torch.device
    ) -> tuple[RowSource, str]:
        """The columns as opened before, or opened now."""
        shared = self._rows.get(table.name, np.empty(0, dtype=np.int64))
        if not np.isin(rows, shared).all():
            return super().columns(table, names, rows, residency, device)
        words, found = [], {}
        for name in names:
            key = (table.name, name, residency, device)
            if key not in self._sources:
                self._sources[key], line = super().columns(table, (name,), shared, residency, device)
                words.append(f"{name}: {line}")
            found[name] = self._sources[key]
        return _Joined(found), "; ".join(words) or "columns shared with the runs before"

    def targets(
        self,
        table: Table,
        rows: Rows,
        grid: tuple[int, int],
        settings: Mapping[str, Supervision],
        depth_range: tuple[float, float],
        group: str,
    ) -> Mapping[str, RowTargets]:
        """The targets of the training before, if this one asks for the same."""
        key = (table.name, rows.tobytes(), grid, tuple(settings.items()), depth_range, group)
        if self._targets is None or self._targets[0] != key:
            self._targets = None  # freed before the next are made
            self._targets = key, super().targets(table, rows, grid, settings, depth_range, group)
        return self._targets[1]


class _Joined:
    """Columns that come from a source each."""

    def __init__(self, sources: Mapping[str, RowSource]) -> None:
        self._sources = sources

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        return {name: source.read(rows)[name] for name, source in self._sources.items()}


def shared_reading(cache: Cache, recipes: Iterable[Recipe]) -> SharedReading:
    """One reading for trainings of these recipes on one cache: every training row that one of them visits, all of val."""
    learn, check = cache.table("train"), cache.table("val")
    distinct = {TrainingRows(learn, recipe.train).rows.tobytes() for recipe in recipes}
    train = np.unique(np.concatenate([np.frombuffer(rows, dtype=np.int64) for rows in distinct]))
    return SharedReading({"train": train, "val": check.view_rows(check.usable()).reshape(-1)})
