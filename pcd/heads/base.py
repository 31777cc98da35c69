"""What a head is to pcd: the trainable part, columns in, depth out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
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

    `count` is 0 where `valid` is false, so a loss over pixels needs no second mask. The M patches that count are also listed:
    to find them on a GPU the host would have to wait for it at every step.
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    valid: Tensor
    flat: Tensor
    """Numbers `(M,)` of the patches that count in the flattened `(B * P)` axis, ascending."""
    view: Tensor
    """The view `(M,)` each of them belongs to, from 0 to B - 1."""

    @staticmethod
    def from_host(
        count: npt.NDArray[Any],
        mean: npt.NDArray[Any],
        var: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        *,
        device: torch.device,
    ) -> PatchTargets:
        """From arrays `(B, P)` in host memory, without waiting for the device."""
        flat = np.flatnonzero(valid)
        arrays = (count, mean, var, valid, flat, flat // valid.shape[1])
        return PatchTargets(*(_to_device(array, device) for array in arrays))


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

    sees_valid_patches_only: ClassVar[bool] = False
    """Whether training looks at no token of a patch that no loss counts: then those need not be held."""

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


def _to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy to a GPU starts from pinned memory, or the host would wait until everything before it is done."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
