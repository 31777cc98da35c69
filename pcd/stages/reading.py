"""What a training reads from its cache, and how the runs of a sweep share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from pcd.cache import Cache, Table
from pcd.recipe import Recipe, Supervision
from pcd.training.rows import TrainingRows
from pcd.training.sources import JoinedRows, Placed, Residency, Rows, place_rows
from pcd.training.targets import StreamedTargets, Targets, training_targets

T = TypeVar("T")
Keep = npt.NDArray[np.bool_] | None


class Reading:
    """Each training reads its own columns and targets."""

    def columns(
        self, table: Table, names: Sequence[str], rows: Rows, residency: Residency, device: torch.device, keep: Keep = None
    ) -> Placed:
        """Where columns `names` of `rows` come from; `keep` `(len(rows), P)` says which patches are looked at, if not all."""
        return place_rows(table, names, rows, residency, device, keep)

    def targets(
        self,
        table: Table,
        rows: Rows,
        grid: tuple[int, int],
        settings: Mapping[str, Supervision],
        depth_range: tuple[float, float],
        group: str,
        hold: bool | None = None,
    ) -> Mapping[str, Targets]:
        """Targets of `rows`; see `pcd.training.targets.training_targets`."""
        return training_targets(table, rows, grid, settings, depth_range, group, hold)

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives for `key`."""
        return make()


OWN = Reading()
"""Every training for itself."""


class SharedReading(Reading):
    """A column is opened once, for all rows that any of several trainings visits.

    What is held in memory is read from the cache once and stays for as long as this object lives; patches that never count are
    held too, since they may count for another training. Targets are shared by the trainings alive that ask for the same.
    """

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        """`rows` says which rows of a table are opened; a training on others reads for itself."""
        self._rows = rows
        self._placed: dict[tuple[Any, ...], Placed] = {}
        self._prepared: dict[Hashable, Any] = {}
        self._targets: WeakValueDictionary[tuple[Any, ...], _Targets] = WeakValueDictionary()

    def columns(
        self, table: Table, names: Sequence[str], rows: Rows, residency: Residency, device: torch.device, keep: Keep = None
    ) -> Placed:
        """The columns as opened before, or opened now."""
        shared = self._rows.get(table.name, np.empty(0, dtype=np.int64))
        if not np.isin(rows, shared).all():
            return super().columns(table, names, rows, residency, device, keep)
        words, found = [], {}
        for name in names:
            key = (table.name, name, residency, device)
            if key not in self._placed:
                self._placed[key] = super().columns(table, (name,), shared, residency, device)
                words.append(f"{name}: {self._placed[key].words}")
            found[name] = self._placed[key]
        ahead, threads = (max(getattr(placed, name) for placed in found.values()) for name in ("ahead", "threads"))
        joined = JoinedRows({name: placed.source for name, placed in found.items()})
        return Placed(joined, "; ".join(words) or "columns shared with the runs before", ahead, threads)

    def targets(
        self,
        table: Table,
        rows: Rows,
        grid: tuple[int, int],
        settings: Mapping[str, Supervision],
        depth_range: tuple[float, float],
        group: str,
        hold: bool | None = None,
    ) -> Mapping[str, Targets]:
        """The targets of another training, if it asked for the same, held or not unless `hold` says which."""
        key = (table.name, rows.tobytes(), grid, tuple(settings.items()), depth_range, group)
        found = self._targets.get(key)
        if found is None or (hold is not None and hold is found.streamed):
            found = self._targets[key] = _Targets(super().targets(table, rows, grid, settings, depth_range, group, hold))
        return found

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave for `key` the first time; it stays for as long as this object lives."""
        if key not in self._prepared:
            self._prepared[key] = make()
        found: T = self._prepared[key]
        return found


class _Targets(dict[str, Targets]):
    """A dictionary that can be referred to weakly."""

    @property
    def streamed(self) -> bool:
        """Whether they are made for each batch."""
        return any(isinstance(target, StreamedTargets) for target in self.values())


def shared_reading(cache: Cache, recipes: Iterable[Recipe]) -> SharedReading:
    """One reading for trainings of these recipes on one cache: every training row that one of them visits, all of val."""
    learn, check = cache.table("train"), cache.table("val")
    distinct = {TrainingRows(learn, recipe.train).rows.tobytes() for recipe in recipes}
    train = np.unique(np.concatenate([np.frombuffer(rows, dtype=np.int64) for rows in distinct]))
    return SharedReading({"train": train, "val": check.view_rows(check.usable()).reshape(-1)})
