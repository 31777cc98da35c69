"""A small head with phases as a test wants them, its training on a toy cache, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcd.cache import Cache
from pcd.heads.base import Batch, Head, HeadOptions, Phase
from pcd.recipe import TrainSection
from pcd.training.loop import EpochReport, Loop
from pcd.training.rows import TrainingRows
from tests.test_training import make_rows


class Plain(Head):
    """One linear map of the token to log depth in phase `depth`, another in `embedding`; both see the same rows."""

    Options = HeadOptions

    def __init__(self, phases: Sequence[Phase]) -> None:
        """`phases` say everything but the parameters: those of the map of the same name."""
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(6, 1) for name in ("embedding", "depth")})
        self._phases = phases

    def phases(self) -> tuple[Phase, ...]:
        return tuple(replace(phase, parameters=tuple(self.of(phase.name))) for phase in self._phases)

    def of(self, phase: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a phase."""
        return [(f"maps.{phase}.{name}", value) for name, value in self.maps[phase].named_parameters()]

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        target = batch.targets[phase]
        tokens = batch.columns["clip/patch"].flatten(0, 1)[target.flat].float()
        away = self.maps[phase](tokens)[:, 0] - target.mean.reshape(-1)[target.flat].log()
        return {"total": away.square().mean()}

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.maps["depth"](columns["clip/patch"].float())[..., 0].exp()
        return found


def phase(name: str, lr: float = 0.1, **settings: Any) -> Phase:
    """A phase of `Plain`, two steps at a time."""
    return Phase(**{"name": name, "steps": 2, "parameters": (), "lr": lr, "weight_decay": 0.0, **settings})


def plain_rows(cache: Cache) -> TrainingRows:
    """Six batches an epoch."""
    return make_rows(cache, batch_size=4)


def plain_loop(
    cache: Cache, folder: Path, phases: Sequence[Phase], epochs: int = 3, validate: Any = None, **settings: Any
) -> Loop:
    """A loop around a new `Plain`, always with the same first weights."""
    torch.manual_seed(7)
    section = TrainSection(**{"epochs": epochs, "batch_size": 4, "monitor": ("rmse",), "patience": 1000, **settings})
    return Loop(Plain(phases), plain_rows(cache), section, frozenset(), validate or (lambda head: {"rmse": 1.0}), folder)


def rates_of(loop: Loop) -> list[tuple[str, float]]:
    """Phase and learning rate of every step that an optimiser takes while the loop runs."""
    seen: list[tuple[str, float]] = []
    for name, optimiser in loop._optimisers.items():
        optimiser.register_step_pre_hook(lambda opt, *_, name=name: seen.append((name, opt.param_groups[0]["lr"])))
    loop.run(lambda report: None)
    return seen


def interrupted(loop: Loop, epoch: int) -> None:
    """Run it and stop after an epoch."""

    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KeyboardInterrupt

    try:
        loop.run(stop)
    except KeyboardInterrupt:
        return
    raise AssertionError(f"never came to epoch {epoch}")


def state(loop: Loop) -> dict[str, Tensor]:
    """The weights."""
    return {name: value.clone() for name, value in loop.head.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether they agree in every bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
