"""What an encoder is to pcd: a frozen network, views in, columns out, and the fingerprint of what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from pcd.columns import ColumnSpec

if TYPE_CHECKING:
    import torch

    from pcd.views import ViewPlan


NO_WEIGHTS = "none"
"""Kind of the weights, in the fingerprint, of an encoder that has none, such as `pixels`."""


class EncoderOptions(BaseModel):
    """Keys of the `[encoder]` table that every encoder understands; an encoder adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = "auto"
    """`auto` (the published weights of the tag), `random` (asked for by name only) or the path of a file."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random weights."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """`auto` is fp16 on a CUDA GPU and fp32 elsewhere."""
    prefix: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_-]*)?$")] = ""
    """What its columns' names begin with, `PREFIX/patch`; absent: the encoder's own, such as `clip`. Two models of one encoder
    in one cache need different ones."""


class Encoder(Protocol):
    """A frozen network. Creating one loads weights; `request` describes it without doing so.

    Construction: `Encoder(model, options, view_size, device)`, where `model` is what follows the colon of
    `openclip:MODEL/TAG`, `view_size` (height, width) in pixels and `device` a torch device name.
    """

    Options: ClassVar[type[EncoderOptions]]

    columns: tuple[ColumnSpec, ...]
    """The columns of `encode`: those it always makes, unless it is `Extendable`."""
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
        """What determines the columns: network, digest of the weights, layer, projection, precision, normalisation, size.

        Plain JSON. pcd itself reads `encoder` (the name it is registered under), `model`, `weights` (`kind`: `file`, `random`
        or `none`; `digest`), `precision`, `grid` (rows, columns) and `text` (true with a text tower).
        """
        ...

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)` on any device, to a tensor `(B, *shape)` per column in the column's dtype."""
        ...

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Float32 `(len(phrases), D)` on the CPU, not normalised. Raises `TextTowerError` without a text tower."""
        ...


@runtime_checkable
class Extendable(Protocol):
    """What an encoder has beside `Encoder` if it can make columns that are made only when a head reads them.

    Such a column comes from the same network as the others and has its `fingerprint`; what else determines it, such as a layer,
    stands beside that.
    """

    outputs: Mapping[str, Mapping[str, Any]]
    """What determines each such column of `columns` beside `fingerprint`, as plain JSON that is not empty: `{"layer": 6}`."""

    def offers(self, name: str) -> bool:
        """Whether it can make a column of this name. Raises `UsageError` for a layer that the network does not have."""
        ...

    def with_columns(self, names: Sequence[str]) -> Encoder:
        """The same encoder, its weights shared, making also these columns, which it offers; the others stay, bit for bit."""
        ...


@dataclass(frozen=True)
class RowKey:
    """Which view of which sample a row is: the sample's key in the dataset's list `split`, and the number of the view.

    Views are numbered flip-major: `number = flip * plan.tiles + tile`; see `pcd.views`.
    """

    split: str
    sample: str
    number: int
    plan: ViewPlan


@runtime_checkable
class Keyed(Protocol):
    """What an encoder has beside `Encoder` if it must know which samples the views are of; `encode` is for those without a key.

    Only extraction knows: it then calls this and not `encode`. Samples that could not be read are left out of it.
    """

    def encode_rows(self, views: torch.Tensor, rows: Sequence[RowKey]) -> dict[str, torch.Tensor]:
        """As `Encoder.encode`, one row per view. Raises `DatasetError` or `MissingFileError` for a row it has nothing for."""
        ...


@runtime_checkable
class Worded(Protocol):
    """What an encoder has beside `Encoder` if words can be learned in front of its text tower."""

    def text_tower(self) -> TextTower:
        """Its frozen text tower. Raises `TextTowerError` if its weights hold none."""
        ...


class TextTower(Protocol):
    """A frozen text tower that gradients pass through, for heads that learn words. On the CPU, float32, until moved."""

    width: int
    """Of a token's embedding."""
    context: int
    """Tokens of a sentence, padding included."""
    digest: str
    """Of what it computes: network and weights."""

    def tokens(self, phrases: Sequence[str]) -> torch.Tensor:
        """Token numbers int64 `(len(phrases), context)`. Raises `UsageError` for a phrase that is too long."""
        ...

    def needed(self, tokens: torch.Tensor) -> int:
        """How many tokens from the left decide the embeddings of these sentences; what follows may be cut off."""
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `(n, L, width)` of token numbers `(n, L)`, before positions are added."""
        ...

    def encode(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Text embeddings `(n, D)`, not normalised, of embedded tokens `(n, L, width)`; `tokens` say where sentences end."""
        ...

    def to(self, device: torch.device) -> TextTower:
        """The same tower on a device."""
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
