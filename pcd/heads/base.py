"""What a head is to pcd: the trainable part, columns in, depth out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pcd.heads.bins import Distribution


class HeadOptions(BaseModel):
    """Keys of the `[head]` table that every head understands; a head adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_depth: float
    """Metres."""
    max_depth: float
    """Metres."""


@dataclass(frozen=True)
class PatchTargets:
    """What one loss may look at, `(B, P)` each: pixels that count, their mean and variance, and whether the patch counts.

    `count` is 0 where `valid` is false, so a loss over pixels needs no second mask.
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of the columns a head reads, `(B, *shape)` each, and the targets by the name of the supervision."""

    columns: Mapping[str, Tensor]
    targets: Mapping[str, PatchTargets]


@dataclass(frozen=True)
class Phase:
    """One of the phases a head's training alternates between: `steps` at a time, its own AdamW over `parameters`."""

    name: str
    steps: int
    parameters: Sequence[tuple[str, nn.Parameter]]
    lr: float
    weight_decay: float


class Context(Protocol):
    """What a head may ask for before training starts."""

    def text(self, phrases: Sequence[str]) -> Tensor:
        """Text embeddings `(len(phrases), D)`, not normalised. Raises `TextTowerError` if there are none."""
        ...

    def batches(self) -> Iterator[Batch]:
        """The training rows once, in order."""
        ...


class Head(nn.Module):
    """Base of all heads. Construction: `Head(options, shapes, grid)`.

    `shapes` maps each column the head reads to its per-row shape; `grid` is (rows, columns) of patches. Parameters are made
    from the caller's seed; `initialise` then looks at the context.
    """

    Options: ClassVar[type[HeadOptions]]

    grid: tuple[int, int]

    @staticmethod
    def reads(options: Any) -> tuple[str, ...]:
        """The columns the head needs."""
        raise NotImplementedError

    @staticmethod
    def phrases(options: Any) -> tuple[str, ...]:
        """The phrases whose text embeddings the head needs; none by default."""
        return ()

    def initialise(self, context: Context) -> None:
        """Set what depends on texts or training data. By default nothing does."""

    def phases(self) -> tuple[Phase, ...]:
        """How the head wants to be optimised."""
        raise NotImplementedError

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Losses of a phase by name, scalar each; `total` is minimised.

        A batch without anything to learn from gives a `total` that requires no gradient: the step is then passed over.
        """
        raise NotImplementedError

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Depth in metres per patch `(B, P)`."""
        raise NotImplementedError

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution | None:
        """What the head believes about each patch, for a head that works with depth bins; its mean is `depth`.

        None by default: such a head says nothing about its uncertainty.
        """
        return None

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The same as `depth`."""
        return self.depth(columns)


def gather_valid(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Where patches count: their numbers in the flattened `(B * P)` axis, and the view each belongs to, `(M,)` both."""
    flat = torch.nonzero(valid.reshape(-1)).squeeze(1)
    return flat, flat // valid.shape[1]
