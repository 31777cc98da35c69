"""Training rows: which ones an epoch visits, in which order, and the batches made of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pcd.cache import Table
from pcd.heads.base import Batch
from pcd.overlap import ahead
from pcd.recipe import TrainSection
from pcd.training.sources import LOAD_ROWS, Placed, Rows
from pcd.training.targets import RowTargets

Columns = Mapping[str, Tensor]


def random_stream(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class TrainingRows:
    """The rows of a training table and their targets, in batches.

    Order and choice of tiles depend on (seed, epoch) only.
    """

    def __init__(self, table: Table, settings: TrainSection) -> None:
        self._table = table
        self._settings = settings
        self._samples = table.usable()
        self.rows = np.sort(table.view_rows(self._samples, flips=settings.flips).reshape(-1))
        """All rows an epoch may visit, ascending: the order of targets and of held columns."""
        self._position = np.full(table.samples * table.views, -1, dtype=np.int64)
        self._position[self.rows] = np.arange(len(self.rows))
        self._placed: Placed
        self._targets: Mapping[str, RowTargets]
        self._device: torch.device

    def attach(self, placed: Placed, targets: Mapping[str, RowTargets], device: torch.device) -> None:
        """Say where columns and targets (one per row of `rows`) come from."""
        self._placed, self._targets, self._device = placed, targets, device

    def order(self, epoch: int) -> Rows:
        """The rows of an epoch in the order they are visited."""
        stream = random_stream(self._settings.seed, epoch)
        rows = self.rows
        if self._settings.tiles == "random":
            tile = stream.integers(0, self._table.plan.tiles, size=len(self._samples))
            rows = self._table.view_rows(self._samples, flips=self._settings.flips, tile=tile).reshape(-1)
        return stream.permutation(rows)

    def steps(self) -> int:
        """Batches of an epoch."""
        rows, size = len(self.order(0)), self._settings.batch_size
        return rows // size if self._settings.drop_last else -(-rows // size)

    def read(self, epoch: int, placed: Placed | None = None) -> Generator[tuple[Rows, Columns]]:
        """The rows of each batch of an epoch and their columns (from `placed`, if given), read ahead where that pays."""
        placed = placed or self._placed
        order, size = self.order(epoch), self._settings.batch_size
        batches = [order[step * size : (step + 1) * size] for step in range(self.steps())]
        if not placed.ahead:
            yield from ((rows, placed.source.read(rows)) for rows in batches)
            return
        with closing(ahead(placed.source.read, batches, threads=1, depth=placed.ahead)) as columns:
            yield from zip(batches, columns, strict=True)

    def batch(self, rows: Rows, columns: Columns) -> Batch:
        """Rows with their columns and targets."""
        positions = self._position[rows]
        return Batch(columns, {name: target.batch(positions, self._device) for name, target in self._targets.items()})

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        with closing(self.read(epoch)) as found:
            for rows, columns in found:
                yield self.batch(rows, columns)

    def once(self) -> Iterator[Batch]:
        """Every row once, in the order of the table."""
        for start in range(0, len(self.rows), LOAD_ROWS):
            rows = self.rows[start : start + LOAD_ROWS]
            yield self.batch(rows, self._placed.source.read(rows))
