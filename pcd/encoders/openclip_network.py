"""What the image towers of open_clip have in common as networks: views in, columns out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pcd.columns import ColumnSpec
from pcd.device import Precision

Size = tuple[int, int]
Kind = Literal["patch", "tokens", "cls", "maskclip", "stem", "layer"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Tap:
    """Where in a tower a column is taken that is made on demand: of which kind, behind which block or stage, from 1.

    `name` is what follows the prefix in the column's name: `patch@6`, `maskclip`, `layer3`.
    """

    kind: Kind
    layer: int
    name: str


@dataclass(frozen=True)
class Reading:
    """How a tower is read: RGB in [0, 1] minus `mean`, over `std`; columns are named `prefix/...`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    prefix: str


class ImageNetwork(nn.Module, ABC):
    """Views `(B, 3, h, w)`, RGB in [0, 1], through an image tower to a dictionary of columns.

    `patch` float16 `(B, P, D)` and `cls` float32 `(B, D)` always, and those of `taps`. The operations behind the former are the
    same whatever else is asked for. Everything between is a tensor operation, so that it can be exported; nothing is checked.
    """

    kinds: tuple[Kind, ...]
    """The kinds of columns that it makes on demand, in the order they are made in."""
    patch_meaning: str
    cls_meaning: str

    def __init__(self, visual: nn.Module, reading: Reading, name: str, taps: Iterable[Tap] = ()) -> None:
        """`name` is the model's, for messages."""
        super().__init__()
        self.visual: Any = visual
        self.reading, self.model_name = reading, name
        self.taps = tuple(sorted(set(taps), key=lambda tap: (self.kinds.index(tap.kind), tap.layer)))
        self.dtype = DTYPES[reading.precision]
        for key, value in (("mean", reading.mean), ("std", reading.std)):
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor

    @abstractmethod
    def find(self, name: str) -> Tap | None:
        """The tap of what follows the prefix in a column's name; None if that is no column of any tower of open_clip.

        Raises `UsageError` for a column that other towers have, or that this one has for other layers.
        """

    @abstractmethod
    def output(self, tap: Tap) -> dict[str, Any]:
        """What determines a column made on demand beside the encoder's fingerprint, as plain JSON."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the encoder's fingerprint says about how `patch` and `cls` are taken from the tower."""

    @abstractmethod
    def spec(self, tap: Tap, grid: Size) -> ColumnSpec:
        """The column of a tap for views with `grid` (rows, columns) of patches."""

    def with_taps(self, taps: Iterable[Tap]) -> ImageNetwork:
        """The same network, its weights shared, that makes the columns of `taps` as well."""
        other = type(self)(self.visual, self.reading, self.model_name, (*self.taps, *taps))
        return other.to(self.mean.device).eval()

    def column(self, name: str) -> str:
        """A column's whole name: `clip/patch`."""
        return f"{self.reading.prefix}/{name}"

    def specs(self, grid: Size) -> tuple[ColumnSpec, ...]:
        """All columns for views with `grid` (rows, columns) of patches, in the order of `forward`."""
        width = int(self.visual.output_dim)
        return (
            self.tokens_spec("patch", (grid[0] * grid[1], width), self.patch_meaning),
            ColumnSpec(self.column("cls"), (width,), "float32", ("channel",), self.cls_meaning),
            *(self.spec(tap, grid) for tap in self.taps),
        )

    def tokens_spec(self, name: str, shape: Size, meaning: str) -> ColumnSpec:
        """The column of one vector per patch."""
        return ColumnSpec(self.column(name), shape, "float16", ("patch", "channel"), meaning)

    def outputs(self) -> dict[str, dict[str, Any]]:
        """See `pcd.encoders.base.Extendable.outputs`."""
        return {self.column(tap.name): self.output(tap) for tap in self.taps}

    def normalised(self, views: torch.Tensor) -> torch.Tensor:
        """Views as the tower takes them."""
        return ((views - self.mean) / self.std).to(self.dtype)
