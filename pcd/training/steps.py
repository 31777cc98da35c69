"""What a step optimises, how exactly and how far: phases in turns or all at once, precision, warm-up, clipping, averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pcd.errors import RecipeError, UsageError
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
        """`joint` merges several phases into one over the parameters of them all, with the rates of the first.

        Raises `RecipeError` if their optimisers differ.
        """
        self._terms: dict[str, tuple[Phase, ...]] = {phase.name: (phase,) for phase in phases}
        self.phases = tuple(phases)
        """The phases that have an optimiser."""
        if joint and len(phases) > 1:
            self.phases = (_joined(phases),)
            self._terms = {JOINT: tuple(phases)}
        self._cycle = [(phase, place) for phase in self.phases for place in range(phase.steps)]

    def at(self, step: int) -> Turn:
        """The turn of a step. A phase that is alone begins once; the others begin anew in every cycle."""
        phase, place = self._cycle[step % len(self._cycle)]
        return Turn(phase, self._terms[phase.name], step if len(self.phases) == 1 else place)


def _joined(phases: Sequence[Phase]) -> Phase:
    """One phase for all."""
    if len({_optimiser_of(phase) for phase in phases}) > 1:
        shown = ", ".join(f"{phase.name} has {_optimiser_of(phase)}" for phase in phases)
        raise RecipeError(
            f"train.joint steps for all phases of the head with one optimiser, and theirs differ: {shown}. Give all phases the "
            "same optimiser and momentum in [head], or leave train.joint out."
        )
    everything = {name: parameter for phase in phases for name, parameter in phase.parameters}
    return replace(phases[0], name=JOINT, steps=1, parameters=tuple(everything.items()))


def _optimiser_of(phase: Phase) -> str:
    """For example `sgd with momentum 0.9`."""
    return f"sgd with momentum {phase.momentum:g}" if phase.optimiser == "sgd" else phase.optimiser


def new_optimiser(phase: Phase) -> torch.optim.Optimizer:
    """AdamW, on a GPU all its parameters in one kernel; or SGD, whose weight decay is part of the gradient (L2)."""
    parameters = [parameter for _, parameter in phase.parameters]
    if phase.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=phase.lr, momentum=phase.momentum, weight_decay=phase.weight_decay)
    fused = True if parameters[0].device.type == "cuda" else None
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay, fused=fused)


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


class Products:
    """In which precision matrix products are computed: `fp32`, `tf32` (a GPU's) or `bf16`; weights are float32 throughout."""

    def __init__(self, precision: Literal["fp32", "tf32", "bf16"], device: torch.device) -> None:
        """Raises `UsageError` for tf32 on anything but a CUDA GPU."""
        if precision == "tf32" and device.type != "cuda":
            raise UsageError(f'train.precision = "tf32" is a mode of CUDA GPUs, and this is a {device.type}; use "fp32".')
        self._precision = precision
        self._device = device

    def forward(self) -> AbstractContextManager[Any]:
        """Around forward passes: bf16 products. Their gradients follow them by themselves."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16")

    @contextmanager
    def used(self) -> Iterator[None]:
        """Around whole steps and validations: tf32 products."""
        before = torch.get_float32_matmul_precision()
        if self._precision == "tf32":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class Randomness:
    """The random numbers of one training, whatever else draws some in between."""

    def __init__(self, seed: int, device: torch.device) -> None:
        """Numbers that follow from `seed`, on the host and on `device`; the global state stays as it is."""
        self._device = device
        before = self._state()
        torch.manual_seed(seed)
        self._own = self._state()
        self._set(before)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within it they are drawn; afterwards the global state is as it was."""
        before = self._state()
        self._set(self._own)
        try:
            yield
        finally:
            self._own = self._state()
            self._set(before)

    def _state(self) -> tuple[Tensor, ...]:
        own = torch.get_rng_state()
        return (own, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else (own,)

    def _set(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self._device)


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
