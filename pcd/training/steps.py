"""What a step optimises and how far: phases that take turns or all at once, warm-up, clipped gradients, averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcd.heads.base import Phase

JOINT = "joint"
"""Name of the phase that stands for all of them with `train.joint`."""
WARMING = 10
"""An average of weights looks back over at most the last tenth of all steps: at first it follows closely."""


@dataclass(frozen=True)
class Turn:
    """A step's phase, the phases whose losses it minimises, and its place since the last switch, from 0."""

    phase: Phase
    terms: tuple[Phase, ...]
    place: int

    def rate(self, warmup: int) -> float:
        """What the learning rate is multiplied by: rises linearly to 1 at the `warmup`-th step after a switch."""
        return min((self.place + 1) / warmup, 1.0) if warmup else 1.0


class Turns:
    """Whose turn it is at each step: a function of the step's number alone, so that a resumed training agrees.

    Steps that teach nothing count as well: a warm-up goes on while they are passed over.
    """

    def __init__(self, phases: Sequence[Phase], joint: bool) -> None:
        """`joint` merges several phases into one over the parameters of them all, with the rates of the first."""
        self._terms: dict[str, tuple[Phase, ...]] = {phase.name: (phase,) for phase in phases}
        self.phases = tuple(phases)
        """The phases that have an optimiser."""
        if joint and len(phases) > 1:
            everything = {name: parameter for phase in phases for name, parameter in phase.parameters}
            self.phases = (Phase(JOINT, 1, tuple(everything.items()), phases[0].lr, phases[0].weight_decay),)
            self._terms = {JOINT: tuple(phases)}
        self._cycle = [(phase, place) for phase in self.phases for place in range(phase.steps)]

    def at(self, step: int) -> Turn:
        """The turn of a step. A phase that is alone begins once; the others begin anew in every cycle."""
        phase, place = self._cycle[step % len(self._cycle)]
        return Turn(phase, self._terms[phase.name], step if len(self.phases) == 1 else place)


def add_gradient(total: Tensor, phase: Phase) -> bool:
    """Add the gradient of a loss to the parameters of its phase, and no others; False if it teaches nothing."""
    if not total.requires_grad:
        return False
    total.backward(inputs=[parameter for _, parameter in phase.parameters])  # type: ignore[no-untyped-call]
    return True


def clip(phase: Phase, limit: float) -> None:
    """Scale the gradient of a phase down to norm `limit`, if that is not 0, without waiting for the device."""
    if limit:
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in phase.parameters], limit)


class Average:
    """An exponential moving average of the trained weights, on their device.

    After step n (from 1) it keeps `min(decay, n / (n + 10))` of itself, so that it does not drag the weights of the very start
    along. Weights that no phase trains, and buffers, are not averaged.
    """

    def __init__(self, phases: Sequence[Phase], decay: float) -> None:
        """Starts as a copy of the weights."""
        self._decay = decay
        self._weights: Mapping[str, nn.Parameter] = {name: value for phase in phases for name, value in phase.parameters}
        self.values = {name: value.detach().clone() for name, value in self._weights.items()}
        """The average by the name of the parameter."""

    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`."""
        keep = min(self._decay, step / (step + WARMING))
        for name, value in self._weights.items():
            self.values[name].lerp_(value.detach(), 1.0 - keep)

    @contextmanager
    def in_place(self) -> Iterator[Mapping[str, Tensor]]:
        """Within it the head has the averaged weights, afterwards again its own, which are given, bit for bit."""
        own = {name: value.detach().clone() for name, value in self._weights.items()}
        self.put(self.values)
        try:
            yield own
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set the head's trained weights."""
        for name, weight in self._weights.items():
            weight.copy_(values[name])
