"""What an encoder is to pcd: a frozen network, views in, columns out, and the fingerprint of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from pcd.columns import ColumnSpec

if TYPE_CHECKING:
    import torch


class EncoderOptions(BaseModel):
    """Keys of the `[encoder]` table that every encoder understands; an encoder adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = "auto"
    """`auto` (the published weights of the tag), `random` (asked for by name only) or the path of a file."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random weights."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """`auto` is fp16 on a CUDA GPU and fp32 elsewhere."""


class Encoder(Protocol):
    """A frozen network. Creating one loads weights; `request` describes it without doing so.

    Construction: `Encoder(model, options, view_size, device)`, where `model` is what follows the colon of
    `openclip:MODEL/TAG`, `view_size` (height, width) in pixels and `device` a torch device name.
    """

    Options: ClassVar[type[EncoderOptions]]

    columns: tuple[ColumnSpec, ...]
    grid: tuple[int, int]
    """Patches of a view: (rows, columns)."""
    has_text: bool
    random_weights: bool

    @staticmethod
    def request(model: str, options: EncoderOptions) -> dict[str, Any]:
        """What was asked for, in plain values, cheap: no import of torch models, no weights read.

        For a weights file: its name, size and modification time, so that an unchanged request needs no new digest.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What determines the columns: network, digest of the weights, layer, projection, precision, normalisation, size."""
        ...

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)` on any device, to a tensor `(B, *shape)` per column in the column's dtype."""
        ...

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Float32 `(len(phrases), D)` on the CPU, not normalised. Raises `TextTowerError` without a text tower."""
        ...


@runtime_checkable
class Exportable(Protocol):
    """What an encoder has beside `Encoder` if runs on it can be exported."""

    def network(self) -> torch.nn.Module:
        """What `encode` computes as a network of tensor operations: the same views in, the same dictionary out."""
        ...

    def image_weights(self) -> dict[str, torch.Tensor] | None:
        """Tensors that, saved as one safetensors file, are all that the option `weights` needs to compute the same columns.

        None if no file is needed, as for random weights, which come from their seed.
        """
        ...
