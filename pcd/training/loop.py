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
from pcd.heads.base import Batch, Head
from pcd.recipe import OneCycle, TrainSection
from pcd.training import checkpoints
from pcd.training.rows import TrainingRows, random_stream
from pcd.training.schedule import EarlyStopping, cosine, one_cycle, stairs
from pcd.training.steps import Average, Products, Randomness, Turn, Turns, add_gradient, clip, new_optimiser

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did: mean losses (`phase/name`), validation metrics, what improved, learning rates by phase, speed.

    `factor` and `rates` are those of the epoch's last step. Where there was nothing to train, there are no losses and rates.
    """

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
    """Trains a head on rows until the epochs or the patience run out. A head without phases is only validated and kept, once.

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
        """`validate` gives the metrics of the head as it stands; checkpoints go to `folder`.

        Raises `UsageError` for a precision that the head's device does not have, `RecipeError` for phases that cannot be joint,
        `TrainingError` for a head without phases that has parameters which require a gradient.
        """
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
        if not phases and any(parameter.requires_grad for parameter in head.parameters()):
            raise TrainingError(
                "nothing is trained: every phase has 0 steps or no trainable parameters, but the head has parameters to train."
            )
        self._device = next((tensor.device for tensor in head.state_dict().values()), torch.device("cpu"))
        self._precision = Products(settings.precision, self._device)
        self._turns = Turns(phases, settings.joint)
        self._optimisers = {phase.name: new_optimiser(phase) for phase in self._turns.phases}
        self._average: Average | None = None
        self._now: _Epoch

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: whether the head has phases."""
        return bool(self._turns.phases)

    @property
    def epochs(self) -> int:
        """How many epochs there are at most: one, in which no batch is read, if there is nothing to train."""
        return self._settings.epochs if self.trains else 1

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return is_finished(self._settings, self.epoch, self.stopping.wait, trains=self.trains)

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
            if self.trains:
                with self.randomness():
                    for batch in self.rows.epoch(self.epoch):
                        self.learn(batch)
            on_epoch(self.end())

    def begin(self) -> None:
        """Begin an epoch. Raises `TrainingError` if it has no batch."""
        if self.trains and self.rows.steps() == 0:
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
        now.factor = self._factor()
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
        if self.trains:
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
        """What the learning rates of the coming step are multiplied by; but for one cycle, the same for all of an epoch."""
        settings = self._settings
        if settings.decay == "plateau" or not self.trains:
            return self.stopping.factor
        if settings.decay == "step":
            return stairs(self.epoch, settings.decay_step or 1, settings.decay_factor or 1.0)
        epochs = settings.decay_epochs or settings.epochs
        if settings.decay == "onecycle":
            return one_cycle(self.step, epochs * self.rows.steps(), settings.onecycle or OneCycle())
        return cosine(self.epoch, epochs, settings.decay_floor)

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
                "Lower the learning rates of [head], or limit the gradient (train.grad_clip)."
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
        state |= {} if self.trains else {checkpoints.UNTRAINED: True}
        tensors = {**weights, **checkpoints.live_tensors(live)}
        tensors |= checkpoints.optimiser_tensors(self._turns.phases, self._optimisers)
        checkpoints.save(self._folder / checkpoints.LAST, tensors, state)
        checkpoints.prune(self._folder, self.stopping.kept_epochs)


def is_finished(settings: TrainSection, epoch: int, wait: int, *, trains: bool = True) -> bool:
    """Whether training ends after `epoch` epochs, the last `wait` of them without improvement.

    Where there is nothing to train (`trains` is False) one is all there is.
    """
    return epoch >= (settings.epochs if trains else 1) or wait >= settings.patience


def epochs_left(settings: TrainSection, state: Mapping[str, Any]) -> int:
    """How many more epochs a training may take whose checkpoint holds `state`; 0 if it is finished."""
    trains = checkpoints.UNTRAINED not in state
    finished = is_finished(settings, state["epoch"], state["stopping"]["wait"], trains=trains)
    return 0 if finished else settings.epochs - int(state["epoch"])


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
