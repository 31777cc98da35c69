"""The training loop: phases in turns, validation each epoch, early stopping, checkpoints, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcd.errors import TrainingError
from pcd.heads.base import Head, Phase
from pcd.recipe import TrainSection
from pcd.training import checkpoints
from pcd.training.rows import TrainingRows, random_stream
from pcd.training.schedule import EarlyStopping, cosine
from pcd.training.steps import Average, Turn, Turns, add_gradient, clip

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did: mean losses (`phase/name`), validation metrics, what improved, rates."""

    epoch: int
    step: int
    losses: dict[str, float]
    metrics: dict[str, float]
    improved: list[str]
    wait: int
    factor: float
    rows_per_second: float
    seconds: float


class Loop:
    """Trains a head on rows until the epochs or the patience run out.

    Randomness inside an epoch (dropout) depends on (seed, epoch) only, and a checkpoint is written after every epoch, so a run
    that was interrupted anywhere continues to the same weights, bit for bit on the CPU.
    """

    def __init__(
        self,
        head: Head,
        rows: TrainingRows,
        settings: TrainSection,
        higher_is_better: frozenset[str],
        validate: Callable[[Head], Metrics],
        folder: Path,
    ) -> None:
        """`validate` gives the metrics of the head as it stands; checkpoints go to `folder`."""
        self.head = head
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.stopping = EarlyStopping(
            settings.monitor, higher_is_better, settings.patience, settings.decay_start, settings.decay_floor
        )
        self._rows = rows
        self._settings = settings
        self._validate = validate
        self._folder = folder
        phases = head.phases()
        if not phases:
            raise TrainingError("nothing is trained: every phase has 0 steps or no trainable parameters.")
        self._turns = Turns(phases, settings.joint)
        self._optimisers = {phase.name: _optimiser(phase) for phase in self._turns.phases}
        self._average: Average | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return is_finished(self._settings, self.epoch, self.stopping.wait)

    def resume(self) -> bool:
        """Go back to the last checkpoint; False if there is none."""
        path = self._folder / checkpoints.LAST
        if not path.is_file():
            return False
        tensors, state = checkpoints.load(path)
        checkpoints.load_weights(self.head, tensors, path)
        checkpoints.restore_optimisers(self._turns.phases, self._optimisers, tensors)
        if self._settings.ema:
            self._average = Average(self._turns.phases, self._settings.ema)
            checkpoints.restore_live(self._average, tensors, path)
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.stopping.restore(state["stopping"])
        return True

    def run(self, on_epoch: Callable[[EpochReport], None]) -> None:
        """Train until finished. Raises `TrainingError` for a loss that is not finite or rows that teach nothing."""
        if self._rows.steps() == 0:
            raise TrainingError(
                f"an epoch has no batch: {len(self._rows.rows)} rows, batch_size {self._settings.batch_size}, "
                "drop_last; lower train.batch_size or set train.drop_last=false."
            )
        if self._settings.ema and self._average is None:
            self._average = Average(self._turns.phases, self._settings.ema)
        while not self.finished:
            on_epoch(self._run_epoch())

    def _run_epoch(self) -> EpochReport:
        begin = time.perf_counter()
        factor = self._factor()
        losses, rows = self._train(factor)
        trained = time.perf_counter() - begin
        with self._weights_to_keep() as live:
            metrics = {name: float(value) for name, value in self._validate(self.head).items()}
            self.epoch += 1
            improved = self.stopping.update(self.epoch, metrics)
            report = EpochReport(
                self.epoch,
                self.step,
                losses,
                metrics,
                improved,
                self.stopping.wait,
                factor,
                rows / trained,
                time.perf_counter() - begin,
            )
            self._save(report, live)
        return report

    def _factor(self) -> float:
        """What the learning rates of the coming epoch are multiplied by."""
        settings = self._settings
        if settings.decay == "plateau":
            return self.stopping.factor
        return cosine(self.epoch, settings.decay_epochs or settings.epochs, settings.decay_floor)

    def _weights_to_keep(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The head with the weights that are validated and kept; gives the weights behind an average."""
        return nullcontext({}) if self._average is None else self._average.in_place()

    def _train(self, factor: float) -> tuple[dict[str, float], int]:
        """One pass over the rows; returns mean losses and the number of rows."""
        self.head.train()
        sums: dict[str, Tensor] = {}
        numbers: dict[str, int] = {}
        rows = 0
        devices = [p.device for p in self.head.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(random_stream(self._settings.seed, self.epoch, 1).integers(2**62)))
            for batch in self._rows.epoch(self.epoch):
                turn, learnt = self._turns.at(self.step), False
                for term in turn.terms:
                    losses = self.head.losses(batch, term.name)
                    learnt = add_gradient(losses["total"], term) or learnt
                    for name, value in losses.items():
                        key = f"{term.name}/{name}"
                        sums[key] = sums.get(key, 0) + value.detach()
                        numbers[key] = numbers.get(key, 0) + int(value.requires_grad)
                self.step += 1
                if learnt:
                    self._optimise(turn, factor)
                rows += len(next(iter(batch.columns.values())))
        means = {key: float(value) / max(numbers[key], 1) for key, value in sums.items()}
        self._check(means, numbers)
        return means, rows

    def _optimise(self, turn: Turn, factor: float) -> None:
        """Move the weights along the gradient. `step` already counts this step."""
        optimiser = self._optimisers[turn.phase.name]
        for group in optimiser.param_groups:
            group["lr"] = turn.phase.lr * factor * turn.rate(self._settings.switch_warmup)
        clip(turn.phase, self._settings.grad_clip)
        optimiser.step()
        self.head.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.step)

    def _check(self, means: Mapping[str, float], numbers: Mapping[str, int]) -> None:
        bad = [key for key, value in means.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"epoch {self.epoch + 1}: the mean of {bad[0]} is {means[bad[0]]}; the last good epoch is {self.epoch}. "
                "Lower the learning rates (head.embedding.lr, head.depth.lr)."
            )
        if not any(numbers.values()):
            raise TrainingError(
                "no training patch has valid depth under the recipe's rules; check the depth range of the head and [targets]."
            )

    def _save(self, report: EpochReport, live: Mapping[str, Tensor]) -> None:
        """Weights of a best epoch first, then `last`, which speaks of them; then what nobody speaks of goes."""
        self.history.append(report.__dict__)
        weights = checkpoints.weights_of(self.head)
        if report.improved:
            path = checkpoints.epoch_file(self._folder, self.epoch)
            checkpoints.save(path, weights, {"epoch": self.epoch, "metrics": report.metrics})
        state = {"epoch": self.epoch, "step": self.step, "stopping": self.stopping.state(), "history": self.history}
        tensors = {**weights, **checkpoints.live_tensors(live)}
        tensors |= checkpoints.optimiser_tensors(self._turns.phases, self._optimisers)
        checkpoints.save(self._folder / checkpoints.LAST, tensors, state)
        checkpoints.prune(self._folder, self.stopping.kept_epochs)


def is_finished(settings: TrainSection, epoch: int, wait: int) -> bool:
    """Whether training ends after `epoch` epochs, the last `wait` of them without improvement."""
    return epoch >= settings.epochs or wait >= settings.patience


def _optimiser(phase: Phase) -> torch.optim.Optimizer:
    parameters = [parameter for _, parameter in phase.parameters]
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay)
