"""What a head is to pcd: the trainable part, columns in, depth out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pcd.encoders.base import TextTower
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
    """One of the phases a head's training alternates between: `steps` at a time, its own optimiser over `parameters`."""

    name: str
    steps: int
    parameters: Sequence[tuple[str, nn.Parameter]]
    lr: float
    weight_decay: float
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    """Of sgd."""


class Context(Protocol):
    """What a head may ask for before training starts."""

    def text(self, phrases: Sequence[str]) -> Tensor:
        """Text embeddings `(len(phrases), D)`, not normalised. Raises `TextTowerError` if there are none."""
        ...

    def text_tower(self) -> TextTower:
        """The text tower of the encoder whose columns the head reads, loaded now. Raises `TextTowerError` if it has none."""
        ...

    def batches(self) -> Iterator[Batch]:
        """The training rows once, in order."""
        ...


class Head(nn.Module):
    """Base of all heads. Construction: `Head(options, shapes, grid)`.

    `shapes` maps each column the head reads to its per-row shape: `(P, D)` patch tokens, `(D,)` one vector a view, `(h, w, C)`
    feature maps. `grid` is (rows, columns) of the first of them that has one. Parameters are made from the caller's seed;
    `initialise` then looks at the context. Heads give P depths a view, P counted on their `output_grid`.
    """

    Options: ClassVar[type[HeadOptions]]

    sees_valid_patches_only: ClassVar[bool] = False
    """Whether training looks at no token of a patch that no loss counts: then those need not be held."""

    grid: tuple[int, int]
    """Rows and columns of the depths that the head gives: its `output_grid`."""

    @staticmethod
    def output_grid(options: Any, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the depths of a view: by default those of the tokens; finer for a head with a decoder.

        Targets come on this grid, and its cells become pixels as a protocol says.
        """
        return grid

    @staticmethod
    def reads(options: Any) -> tuple[str, ...]:
        """The columns that depth follows from."""
        raise NotImplementedError

    @classmethod
    def learns_from(cls, options: Any) -> tuple[str, ...]:
        """The columns of a training batch: those, and what only the losses look at, such as `view/intrinsics`."""
        return cls.reads(options)

    @staticmethod
    def phrases(options: Any) -> tuple[str, ...]:
        """The phrases whose text embeddings the head needs; none by default."""
        return ()

    def attach(self, context: Context) -> None:
        """Get hold of what training needs and a checkpoint does not hold, such as a frozen text tower. By default nothing.

        Called before every training, a resumed one as well, and before `initialise`; never to evaluate or predict.
        """

    def initialise(self, context: Context) -> None:
        """Set what depends on texts or training data, before a new training. By default nothing does."""

    def phases(self) -> tuple[Phase, ...]:
        """How the head wants to be optimised. No phase: nothing is trained, the head is ready once it is initialised."""
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


@torch.no_grad()
def has_distribution(head: Head, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a head in evaluation mode gives a distribution: some do so by their options. Tried on columns of zeros."""
    if type(head).distribution is Head.distribution:
        return False
    device = next((value.device for value in (*head.parameters(), *head.buffers())), torch.device("cpu"))
    columns = {name: torch.zeros(1, *shapes[name], device=device) for name in head.reads(head.options)}
    return head.distribution(columns) is not None


def _to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy to a GPU starts from pinned memory, or the host would wait until everything before it is done."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
