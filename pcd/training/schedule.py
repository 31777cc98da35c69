"""Early stopping and learning-rate decay: on validation metrics (paper, section 3.3), or over the epochs or steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pcd.recipe import OneCycle


@dataclass(frozen=True)
class Best:
    """The best value of a metric and the epoch that gave it."""

    value: float
    epoch: int


@dataclass
class EarlyStopping:
    """Counts epochs without any improvement of any watched metric.

    The learning rate stays whole while the count is below `decay_start`, then falls linearly to `floor` times itself at
    `patience`, where training ends. Any strict improvement sets the count back to 0 and the rate back to full.
    """

    watched: tuple[str, ...]
    higher_is_better: frozenset[str]
    patience: int
    decay_start: int
    floor: float
    wait: int = 0
    best: dict[str, Best] = field(default_factory=dict)

    def update(self, epoch: int, metrics: Mapping[str, float]) -> list[str]:
        """Take an epoch's metrics; returns the watched ones that improved. A NaN never improves anything."""
        improved = [name for name in self.watched if self._improves(name, metrics[name])]
        for name in improved:
            self.best[name] = Best(float(metrics[name]), epoch)
        self.wait = 0 if improved else self.wait + 1
        return improved

    def _improves(self, name: str, value: float) -> bool:
        if value != value:
            return False
        if name not in self.best:
            return True
        best = self.best[name].value
        return value > best if name in self.higher_is_better else value < best

    @property
    def factor(self) -> float:
        """What the learning rates are multiplied by."""
        if self.wait < self.decay_start:
            return 1.0
        span = max(self.patience - self.decay_start, 1)
        return 1.0 - (1.0 - self.floor) * min((self.wait - self.decay_start) / span, 1.0)

    @property
    def kept_epochs(self) -> set[int]:
        """Epochs that are the best of at least one metric."""
        return {best.epoch for best in self.best.values()}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"wait": self.wait, "best": {name: asdict(best) for name, best in self.best.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.wait = int(state["wait"])
        self.best = {name: Best(**best) for name, best in state["best"].items()}


def cosine(epoch: int, epochs: int, floor: float) -> float:
    """What the learning rate is multiplied by in the epoch after `epoch` whole ones: 1 at first, `floor` from `epochs` on."""
    return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


def stairs(epoch: int, length: int, factor: float) -> float:
    """What the learning rate is multiplied by in the epoch after `epoch` whole ones: `factor` for every `length` of them."""
    return float(factor ** (epoch // length))


def one_cycle(step: int, steps: int, shape: OneCycle) -> float:
    """What the learning rate is multiplied by in the step after `step` others, of `steps`; later ones stay at the end.

    Half a cosine from `1 / div_factor` up to 1 at step `pct_start * steps - 1` (counted from 0), and half a cosine down to
    `1 / (div_factor * final_div_factor)` at the last. Momentum is not cycled, as with torch's `cycle_momentum=False`.
    """
    begin = 1.0 / shape.div_factor
    top, end = shape.pct_start * steps - 1, steps - 1
    if step < top:
        return _eased(begin, 1.0, step / top)
    share = min((step - top) / (end - top), 1.0) if end > top else 0.0
    return _eased(1.0, begin / shape.final_div_factor, share)


def _eased(first: float, last: float, share: float) -> float:
    """Half a cosine from `first` to `last`."""
    return last + (first - last) * (1.0 + math.cos(math.pi * share)) / 2
