"""Training rows: which ones an epoch visits, in which order, and the batches made of them.

The order is random over all rows, wherever they lie, also when they are streamed: a row of tokens is a chunk of its own of
nearly 1 MB, which is read nearly as fast from anywhere as from next to the last one. An order shuffled in blocks of shards
gains less than a tenth (`benchmarks/row_order.py`), and neighbours would meet in a batch. On a disk whose heads move it gains
more: a cache there is better copied to another (`pcd cache copy`) or held in memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pcd.cache import Table
from pcd.heads.base import Batch
from pcd.overlap import ahead
from pcd.recipe import TrainSection
from pcd.training.sources import LOAD_ROWS, Placed, Rows
from pcd.training.targets import RowTargets, StreamedTargets, Targets

Columns = Mapping[str, Tensor]
TARGETS_AHEAD = 2
"""Batches whose targets are made ahead where columns need no reading ahead."""
ONCE_BYTES = 1 << 30
"""`TrainingRows.once` gives so much at a time, if that is fewer than `LOAD_ROWS` rows."""
CELL_BYTES = 29
"""A cell of `PatchTargets`, if it counts."""


@dataclass(frozen=True)
class Loaded:
    """A batch as it was read: table rows, their columns, and those of their targets that had to be made."""

    rows: Rows
    columns: Columns
    made: Mapping[StreamedTargets, RowTargets]


def random_stream(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def spread_over_scenes(samples: Rows, keys: Sequence[str], number: int) -> Rows:
    """At most `number` of the sample numbers of each scene, as far apart as they come; ascending."""
    scenes: dict[str, list[int]] = {}
    for sample in samples.tolist():
        scenes.setdefault(keys[sample].rpartition("/")[0], []).append(sample)
    chosen = []
    for members in scenes.values():
        few = min(number, len(members))
        chosen += [members[(2 * place + 1) * len(members) // (2 * few)] for place in range(few)]
    return np.array(sorted(chosen), dtype=np.int64)


class TrainingRows:
    """The rows of a training table and their targets, in batches.

    Order and choice of tiles depend on (seed, epoch) only.
    """

    def __init__(self, table: Table, settings: TrainSection) -> None:
        self._table = table
        self._settings = settings
        self._samples = table.usable()
        if settings.samples_per_scene is not None:
            self._samples = spread_over_scenes(self._samples, table.keys, settings.samples_per_scene)
        self.rows = np.sort(table.view_rows(self._samples, flips=settings.flips).reshape(-1))
        """All rows an epoch may visit, ascending: the order of targets and of held columns."""
        self._position = np.full(table.samples * table.views, -1, dtype=np.int64)
        self._position[self.rows] = np.arange(len(self.rows))
        self._placed: Placed
        self._targets: Mapping[str, Targets]
        self._device: torch.device

    def attach(self, placed: Placed, targets: Mapping[str, Targets], device: torch.device) -> None:
        """Say where columns and targets (one per row of `rows`) come from."""
        self._placed, self._targets, self._device = placed, targets, device

    @property
    def streamed(self) -> list[StreamedTargets]:
        """Those of its targets that are made for each batch, each once."""
        return list(dict.fromkeys(target for target in self._targets.values() if isinstance(target, StreamedTargets)))

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
        tiles = self._table.plan.tiles if self._settings.tiles == "random" else 1
        rows, size = len(self.rows) // tiles, self._settings.batch_size
        return rows // size if self._settings.drop_last else -(-rows // size)

    def read(
        self, epoch: int, placed: Placed | None = None, targets: Iterable[StreamedTargets] | None = None
    ) -> Generator[Loaded]:
        """Each batch of an epoch with its columns (from `placed`, if given), read ahead where that pays.

        So are targets that are made: its own, or `targets` if given, for trainings that learn from the same batches.
        """
        placed = placed or self._placed
        make = list(dict.fromkeys(self.streamed if targets is None else targets))
        order, size = self.order(epoch), self._settings.batch_size
        batches = [order[step * size : (step + 1) * size] for step in range(self.steps())]

        def load(rows: Rows) -> Loaded:
            return Loaded(rows, placed.source.read(rows), {target: target.made(rows) for target in make})

        depth = placed.ahead or (TARGETS_AHEAD if make else 0)
        if not depth:
            yield from map(load, batches)
            return
        with closing(ahead(load, batches, threads=1 if make else placed.threads, depth=depth)) as found:
            yield from found

    def batch(self, loaded: Loaded) -> Batch:
        """A batch as heads see it."""
        positions = self._position[loaded.rows]
        targets = {}
        for name, target in self._targets.items():
            made = loaded.made.get(target) if isinstance(target, StreamedTargets) else None
            targets[name] = target.batch(positions, self._device) if made is None else made.whole(self._device)
        return Batch(loaded.columns, targets)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        with closing(self.read(epoch)) as found:
            for loaded in found:
                yield self.batch(loaded)

    def once(self) -> Iterator[Batch]:
        """Every row once, in the order of the table."""
        size = self._rows_at_once()
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            yield self.batch(Loaded(rows, self._placed.source.read(rows), {}))

    def _rows_at_once(self) -> int:
        """`LOAD_ROWS`, or fewer of rows that are large."""
        if not len(self.rows):
            return LOAD_ROWS
        columns = self._placed.source.read(self.rows[:1])
        cells = sum(target.cells for target in self._targets.values())
        row = sum(column.nbytes for column in columns.values()) + CELL_BYTES * cells
        return max(1, min(LOAD_ROWS, ONCE_BYTES // max(row, 1)))
