"""The training loop: phases in turns, validation each epoch, early stopping, checkpoints, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcd.errors import TrainingError
from pcd.heads.base import Batch, Head, Phase
from pcd.recipe import TrainSection
from pcd.training import checkpoints
from pcd.training.rows import TrainingRows, random_stream
from pcd.training.schedule import EarlyStopping, cosine
from pcd.training.steps import Average, Products, Randomness, Turn, Turns, add_gradient, clip

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did: mean losses (`phase/name`), validation metrics, what improved, learning rates by phase, speed."""

    epoch: int
    step: int
    losses: dict[str, float]
    metrics: dict[str, float]
    improved: list[str]
    wait: int
    factor: float
    rates: dict[str, float]
    rows_per_second: float
    seconds: float
    """Of the whole epoch, `validation_seconds` among them."""
    validation_seconds: float


class Loop:
    """Trains a head on rows until the epochs or the patience run out.

    Randomness inside an epoch (dropout) depends on (seed, epoch) only, and a checkpoint is written after every epoch, so a run
    that was interrupted anywhere continues to the same weights, bit for bit on the CPU. Within an epoch nothing waits for the
    device: losses are read at its end.
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
        self.rows = rows
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.stopping = EarlyStopping(
            settings.monitor, higher_is_better, settings.patience, settings.decay_start, settings.decay_floor
        )
        self._settings = settings
        self._validate = validate
        self._folder = folder
        phases = head.phases()
        if not phases:
            raise TrainingError("nothing is trained: every phase has 0 steps or no trainable parameters.")
        self._device = phases[0].parameters[0][1].device
        self._precision = Products(settings.precision, self._device)
        self._turns = Turns(phases, settings.joint)
        self._optimisers = {phase.name: _optimiser(phase) for phase in self._turns.phases}
        self._average: Average | None = None
        self._now: _Epoch

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
        while not self.finished:
            self.begin()
            with self.randomness():
                for batch in self.rows.epoch(self.epoch):
                    self.learn(batch)
            on_epoch(self.end())

    def begin(self) -> None:
        """Begin an epoch. Raises `TrainingError` if it has no batch."""
        if self.rows.steps() == 0:
            raise TrainingError(
                f"an epoch has no batch: {len(self.rows.rows)} rows, batch_size {self._settings.batch_size}, "
                "drop_last; lower train.batch_size or set train.drop_last=false."
            )
        if self._settings.ema and self._average is None:
            self._average = Average(self._turns.phases, self._settings.ema)
        self.head.train()
        seed = int(random_stream(self._settings.seed, self.epoch, 1).integers(2**62))
        self._now = _Epoch(self._factor(), Randomness(seed, self._device))

    def randomness(self) -> AbstractContextManager[None]:
        """Around one or more calls of `learn`: within it random numbers are those of this training and epoch."""
        return self._now.randomness.own()

    def learn(self, batch: Batch) -> None:
        """One step."""
        now, turn, learnt = self._now, self._turns.at(self.step), False
        with self._precision.used():
            for term in turn.terms:
                with self._precision.forward():
                    losses = self.head.losses(batch, term.name)
                learnt = add_gradient(losses["total"], term) or learnt
                now.take(term.name, losses)
            self.step += 1
            if learnt:
                self._optimise(turn)
        now.rows += len(next(iter(batch.columns.values())))

    def end(self) -> EpochReport:
        """Validate and keep what the epoch has learnt. Raises `TrainingError`; what was kept before stays."""
        now = self._now
        losses = now.means()
        trained = time.perf_counter() - now.begin
        self._check(losses, now.numbers)
        with self._weights_to_keep() as live:
            with self._precision.used(), self._precision.forward():
                metrics = {name: float(value) for name, value in self._validate(self.head).items()}
            self.epoch += 1
            improved = self.stopping.update(self.epoch, metrics)
            seconds = time.perf_counter() - now.begin
            report = EpochReport(
                epoch=self.epoch,
                step=self.step,
                losses=losses,
                metrics=metrics,
                improved=improved,
                wait=self.stopping.wait,
                factor=now.factor,
                rates={phase.name: phase.lr * now.factor for phase in self._turns.phases},
                rows_per_second=now.rows / trained,
                seconds=seconds,
                validation_seconds=seconds - trained,
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

    def _optimise(self, turn: Turn) -> None:
        """Move the weights along the gradient. `step` already counts this step."""
        optimiser = self._optimisers[turn.phase.name]
        for group in optimiser.param_groups:
            group["lr"] = turn.phase.lr * self._now.factor * turn.rate(self._settings.switch_warmup)
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
    """AdamW; on a GPU all its parameters in one kernel."""
    parameters = [parameter for _, parameter in phase.parameters]
    fused = True if parameters[0].device.type == "cuda" else None
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay, fused=fused)


@dataclass
class _Epoch:
    """Sums of the epoch in progress, on the device until they are asked for."""

    factor: float
    randomness: Randomness
    rows: int = 0
    numbers: dict[str, int] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def take(self, phase: str, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a step."""
        for name, value in losses.items():
            key = f"{phase}/{name}"
            self._sums[key] = self._sums.get(key, 0) + value.detach()
            self.numbers[key] = self.numbers.get(key, 0) + int(value.requires_grad)

    def means(self) -> dict[str, float]:
        """Mean losses over the steps that taught something."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        return {key: value / max(self.numbers[key], 1) for key, value in zip(self._sums, sums, strict=True)}
