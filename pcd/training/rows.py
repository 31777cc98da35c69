"""Training rows: which ones an epoch visits, in which order, and where their columns are held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from pcd.cache import Table
from pcd.heads.base import Batch
from pcd.recipe import TrainSection
from pcd.training.targets import RowTargets

Rows = npt.NDArray[np.int64]
SHARE_OF_MEMORY = 0.5
"""`auto` holds columns in memory up to this share of what is free."""
LOAD_ROWS = 512


class RowSource(Protocol):
    """Where columns come from: `read(rows)` gives a tensor `(len(rows), *shape)` per column."""

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        ...


class StreamedRows:
    """Each batch is read from the cache."""

    def __init__(self, table: Table, columns: Sequence[str], device: torch.device) -> None:
        self._columns = {name: table.column(name) for name in columns}
        self._device = device

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        return {name: torch.from_numpy(column.read(rows)).to(self._device) for name, column in self._columns.items()}


class HeldRows:
    """The columns of `rows` are read once and held in host memory."""

    def __init__(self, table: Table, columns: Sequence[str], rows: Rows, device: torch.device) -> None:
        self._device = device
        self._position = np.full(table.samples * table.views, -1, dtype=np.int64)
        self._position[rows] = np.arange(len(rows))
        self._held: dict[str, Tensor] = {}
        for name in columns:
            column = table.column(name)
            held = np.empty((len(rows), *column.spec.shape), dtype=column.spec.dtype)
            for start in range(0, len(rows), LOAD_ROWS):
                part = rows[start : start + LOAD_ROWS]
                column.read(part, held[start : start + len(part)])
            self._held[name] = torch.from_numpy(held)

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        positions = torch.from_numpy(self._position[rows])
        return {name: held[positions].to(self._device) for name, held in self._held.items()}


def hold_or_stream(
    table: Table,
    columns: Sequence[str],
    rows: Rows,
    residency: Literal["auto", "host", "stream"],
    device: torch.device,
) -> tuple[RowSource, str]:
    """The row source and a line that says what was chosen and why. What is read is the same either way."""
    size = sum(table.column(name).spec.row_bytes for name in columns) * len(rows)
    free = psutil.virtual_memory().available
    if residency == "auto":
        residency = "host" if size < SHARE_OF_MEMORY * free else "stream"
    words = f"{size / 1e9:.2f} GB of columns, {free / 1e9:.1f} GB of memory free"
    if residency == "host":
        return HeldRows(table, columns, rows, device), f"{words}: held in memory"
    return StreamedRows(table, columns, device), f"{words}: read from the cache batch by batch"


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
        self._source: RowSource
        self._targets: Mapping[str, RowTargets]
        self._device: torch.device

    def attach(self, source: RowSource, targets: Mapping[str, RowTargets], device: torch.device) -> None:
        """Say where columns and targets (one per row of `rows`) come from."""
        self._source, self._targets, self._device = source, targets, device

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

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        order, size = self.order(epoch), self._settings.batch_size
        for step in range(self.steps()):
            yield self._batch(order[step * size : (step + 1) * size])

    def once(self) -> Iterator[Batch]:
        """Every row once, in the order of the table."""
        for start in range(0, len(self.rows), LOAD_ROWS):
            yield self._batch(self.rows[start : start + LOAD_ROWS])

    def _batch(self, rows: Rows) -> Batch:
        positions = self._position[rows]
        targets = {name: target.batch(positions, self._device) for name, target in self._targets.items()}
        return Batch(self._source.read(rows), targets)
