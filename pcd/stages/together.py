"""Training the variants of a sweep side by side, and scoring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcd.cache import Cache
from pcd.device import resolve_device
from pcd.errors import PcdError
from pcd.progress import Progress
from pcd.recipe import Recipe
from pcd.stages.history import recording
from pcd.stages.reading import shared_reading
from pcd.stages.report import evaluated
from pcd.stages.runs import Run
from pcd.stages.sweep_plan import Variant
from pcd.stages.train import Training, prepare
from pcd.training.loop import EpochReport, Loop
from pcd.training.rows import TrainingRows
from pcd.training.sources import Rows, RowSource
from pcd.training.together import run_together

SCORES_FILE = "samples.csv"
"""Scores by sample, in the folder of an evaluation."""


def run_folder(root: Path, variant: str, seed: int) -> Path:
    """Where the run of a variant lies."""
    return root / variant / f"seed-{seed}"


@dataclass(frozen=True)
class Scoring:
    """What the runs of a sweep are scored on (a table), under which protocols (labels), and with the weights of which epoch."""

    split: str
    protocols: tuple[str, ...]
    checkpoint: str


class Failures:
    """Runs of a sweep that ended in an error of pcd; the others go on."""

    def __init__(self, root: Path, progress: Progress) -> None:
        self.found: list[dict[str, Any]] = []
        """Variant, seed, kind of error and message of each."""
        self._root = root
        self._progress = progress

    def add(self, variant: str, seed: int, error: PcdError) -> None:
        """Say and record it."""
        self._progress.stop()
        self.take({"variant": variant, "seed": seed, "error": type(error).__name__, "message": str(error)})

    def take(self, failure: dict[str, Any]) -> None:
        """Say and record one that was met elsewhere."""
        folder = run_folder(self._root, failure["variant"], failure["seed"])
        self._progress.say(f"{folder}: failed, the others go on: {failure['message']}")
        self.found.append(failure)

    @contextmanager
    def recorded(self, variant: str, seed: int) -> Iterator[None]:
        """An error of pcd inside is recorded."""
        try:
            yield
        except PcdError as error:
            self.add(variant, seed, error)


class Together:
    """Trains variants on one read of a cache: those whose rows have the same order take their steps on the same batches."""

    def __init__(
        self,
        variants: Sequence[Variant],
        cache: Cache,
        root: Path,
        device: str,
        progress: Progress,
        on_epoch: Callable[[EpochReport], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs go to `root`. `check` is called before each batch that is read; what it raises ends the training."""
        self._variants = variants
        self._cache = cache
        self._root = root
        self._device = device
        self._progress = progress
        self._on_epoch = on_epoch
        self._check = check
        self._reading = shared_reading(cache, [variant.recipe for variant in variants])

    def scored(self, seed: int, scoring: Scoring, failures: Failures) -> dict[str, Path]:
        """Train and score every variant with this seed; the folders of the evaluations by variant."""
        found: dict[str, Path] = {}
        for name, run in self.train(seed, failures).items():
            with failures.recorded(name, seed):
                found[name] = evaluated(
                    run,
                    self._cache,
                    scoring.split,
                    list(scoring.protocols),
                    scoring.checkpoint,
                    self._device,
                    self._progress,
                )
        return found

    def train(self, seed: int, failures: Failures) -> dict[str, Run]:
        """Train every variant with this seed; the finished runs by variant."""
        prepared: dict[str, Training] = {}
        for variant in self._variants:
            with failures.recorded(variant.name, seed):
                prepared[variant.name] = self._prepare(variant, seed)
        groups: dict[tuple[Any, ...], dict[str, Training]] = {}
        for name, training in prepared.items():
            if training.loop is not None:
                groups.setdefault(row_order(training.run.recipe), {})[name] = training
        failed: set[str] = set()
        for group in groups.values():
            failed |= self._side_by_side(group, seed, failures)
        return {name: training.run for name, training in prepared.items() if name not in failed}

    def _prepare(self, variant: Variant, seed: int) -> Training:
        return prepare(
            variant.seeded(seed),
            self._cache,
            run_folder(self._root, variant.name, seed),
            device=self._device,
            progress=self._progress,
            reading=self._reading,
        )

    def _side_by_side(self, group: dict[str, Training], seed: int, failures: Failures) -> set[str]:
        """Trainings whose rows have the same order, on one read of all they look at; the names of those that failed."""
        recipe = next(iter(group.values())).run.recipe
        loops = {training.loop: name for name, training in group.items() if training.loop is not None}
        columns = dict.fromkeys(name for training in group.values() for name in training.run.info["columns"])
        table, device = self._cache.table("train"), torch.device(resolve_device(self._device))
        rows = TrainingRows(table, recipe.train).rows
        placed = self._reading.columns(table, list(columns), rows, recipe.train.residency, device)
        placed = replace(placed, source=_Checked(placed.source, self._check))
        failed: set[str] = set()
        epochs = sum(loop.epochs for loop in loops)
        self._progress.start(f"training {len(loops)} variants", epochs, "epochs", done=sum(loop.epoch for loop in loops))
        with ExitStack() as stack:
            records = {loop: stack.enter_context(recording(group[name].run, loop.history)) for loop, name in loops.items()}

            def after_epoch(loop: Loop, report: EpochReport) -> None:
                records[loop]()
                self._progress.advance()
                self._on_epoch(report)

            def on_error(loop: Loop, error: PcdError) -> None:
                failed.add(loops[loop])
                failures.add(loops[loop], seed, error)

            run_together(loops, placed, after_epoch, on_error)
        self._progress.stop()
        return failed


class _Checked:
    """Rows before which something is called."""

    def __init__(self, source: RowSource, check: Callable[[], None]) -> None:
        self._source = source
        self._check = check

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        self._check()
        return self._source.read(rows)


def row_order(recipe: Recipe) -> tuple[Any, ...]:
    """What the order of a training's rows and the size of its batches follow from, beside the seed."""
    train = recipe.train
    return train.batch_size, train.drop_last, train.tiles, train.flips, train.samples_per_scene, train.residency
