"""What heads share that compare image tokens with texts: the space they are compared in, the softmax over words, the depth.

Every such head has K sentences with a depth in metres each; the depth of a patch is the mean of those depths, weighted by the
softmax of how much its token agrees with each sentence (DepthCLIP; equations 2 to 4 of "Unveiling the Efficacy").

DepthCLIP and Auty & Mikolajczyk as released do not compare in CLIP's joint space: they take the last feature map of a ResNet,
in front of the attention pool, and every second of its channels, so that as many remain as a text embedding has. These numbers
were never trained to agree with texts. `space` says which of the two is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from pcd.device import without_autocast
from pcd.errors import RecipeError
from pcd.heads.base import Head, HeadOptions, PatchTargets
from pcd.heads.bins import Distribution
from pcd.heads.tokens import Grid, Shape, on_grid, require_grid
from pcd.recipe import Names, Positive

WORDS = ("giant", "extremely close", "close", "not in distance", "a little remote", "far", "unseen")
"""DepthCLIP's."""
DEPTHS = (1.00, 1.50, 2.00, 2.25, 2.50, 2.75, 3.00)
"""DepthCLIP's depths of them in metres."""

Depths = Annotated[
    tuple[Positive, ...],
    Field(min_length=2),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class SpaceOptions(HeadOptions):
    """Keys of every head that compares image tokens with texts. `min_depth` and `max_depth` say which ground truth counts."""

    space: Literal["released", "joint"] = "released"
    """`released`: every second channel of `map_column`, a ResNet's last feature map; `joint`: `patch_column`, tokens in the
    joint space of images and texts."""
    map_column: str = "clip/layer4"
    patch_column: str = "clip/patch"
    normalise: Literal["before", "after"] = "before"
    """Of `released`: unit length before every second channel is left out, and not again (the released codes of DepthCLIP and
    Auty), or after it, so that products are cosines ("Unveiling the Efficacy"). In the joint space they always are."""
    temperature: Positive = 0.1
    logit_scale: Positive = 100.0
    """What the products are multiplied by before the temperature divides them."""

    @property
    def token_column(self) -> str:
        """The column whose tokens are compared with texts."""
        return self.map_column if self.space == "released" else self.patch_column


class WordOptions(SpaceOptions):
    """Keys of a head with words of human language, a depth each."""

    template: str = "This {object} is {depth}"
    """`{object}` stands for `object_word`, `{depth}` for each of `words`."""
    object_word: str = "object"
    words: Names = WORDS
    depths: Depths = Field(DEPTHS, validate_default=True)
    """Of the words, in metres, all inside `min_depth` to `max_depth`."""

    @field_validator("depths")
    @classmethod
    def _one_for_each_word(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        words = info.data.get("words", value)
        if len(words) != len(value):
            raise PydanticCustomError("depths", f"{len(value)} depths for {len(words)} words; give each word one")
        low, high = info.data.get("min_depth", 0.0), info.data.get("max_depth", float("inf"))
        if not low <= min(value) <= max(value) <= high:
            raise PydanticCustomError("depths", f"depths must lie between min_depth = {low} and max_depth = {high}")
        return value

    @property
    def sentences(self) -> tuple[str, ...]:
        """One sentence for each word. Raises `RecipeError` for a template without `{depth}`."""
        require_places("head.template", self.template, ("{depth}",))
        filled = self.template.replace("{object}", self.object_word)
        return tuple(filled.replace("{depth}", word) for word in self.words)


class FineOptions(SpaceOptions):
    """Keys of a head whose loss may look between the patches."""

    upsample: Annotated[int, Field(gt=0)] = 1
    """Depths per patch and side, bilinear between patches with aligned corners. The published losses are of pixels: 32 for the
    patches of a ResNet. 1: the loss compares each patch with the mean of its pixels."""


def require_places(key: str, template: str, places: Sequence[str]) -> None:
    """Raises `RecipeError` for a template that lacks one of `places`."""
    if missing := [place for place in places if place not in template]:
        raise RecipeError(f"{key} = {template!r}: {missing[0]} is missing; it stands for what differs between the sentences.")


def text_width(options: SpaceOptions, shapes: Mapping[str, Shape], grid: Grid) -> int:
    """Channels D that texts must have. Raises `RecipeError` for a column without places, or an odd number of channels."""
    channels = require_grid(options.token_column, shapes[options.token_column], grid)
    if options.space == "joint":
        return channels
    if channels % 2:
        raise RecipeError(f'head: {options.map_column} has {channels} channels, and space = "released" takes every second.')
    return channels // 2


def fitting_text(text: Tensor, rows: int, width: int) -> Tensor:
    """`text` if it is `(rows, width)`. Raises `RecipeError` for texts that cannot be compared with the tokens."""
    if tuple(text.shape) != (rows, width):
        raise RecipeError(
            f"head: {len(text)} texts are {text.shape[-1]} wide, and {rows} of width {width} can be compared with the image "
            'tokens. space = "released" fits towers whose last feature map has twice as many channels as their texts (RN50: '
            '2048 and 1024); use space = "joint" for the others.'
        )
    return text


def in_text_space(tokens: Tensor, options: SpaceOptions) -> Tensor:
    """Tokens `(..., C)` as what is multiplied with unit texts: `(..., D)`."""
    if options.space == "joint":
        return F.normalize(tokens, dim=-1)
    if options.normalise == "before":
        return F.normalize(tokens, dim=-1)[..., ::2]
    return F.normalize(tokens[..., ::2], dim=-1)


def stretched(count: int, factor: int) -> Tensor:
    """Linear interpolation from `count` places to `count * factor` with aligned corners, as a matrix `(count * factor, count)`.

    Products with it are summed in a fixed order backward; the interpolation of a GPU is not.
    """
    fine = count * factor
    position = torch.arange(fine, dtype=torch.float64) * ((count - 1) / max(fine - 1, 1))
    return (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0).float()


class WordHead(Head):
    """Base of the heads that compare tokens with K texts. A head gives `texts()`, and may change the tokens."""

    options: Any
    centres: Tensor
    _rows: Tensor
    _columns: Tensor

    def __init__(
        self, options: SpaceOptions, shapes: Mapping[str, Shape], grid: Grid, centres: Sequence[float] | None = None
    ) -> None:
        """`centres` are the depths of the K texts in metres, for a head that knows them. Raises `RecipeError`."""
        super().__init__()
        self.options = options
        self.width = text_width(options, shapes, grid)
        self.grid = self.output_grid(options, shapes, grid)
        self._patches = grid
        if centres is not None:
            self.register_buffer("centres", torch.tensor(centres, dtype=torch.float32), persistent=False)
        for name, own, fine in zip(("_rows", "_columns"), grid, self.grid, strict=True):
            self.register_buffer(name, stretched(own, fine // own), persistent=False)

    @staticmethod
    def output_grid(options: Any, shapes: Mapping[str, Shape], grid: Grid) -> Grid:
        """That of the tokens, or `upsample` times as fine."""
        factor: int = getattr(options, "upsample", 1)
        return grid[0] * factor, grid[1] * factor

    @staticmethod
    def reads(options: Any) -> tuple[str, ...]:
        """The tokens that are compared with texts."""
        return (options.token_column,)

    def tokens(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Image tokens as they are read `(B, P, C)`, float32."""
        return on_grid(columns[self.options.token_column], self._patches).float()

    def image(self, columns: Mapping[str, Tensor]) -> Tensor:
        """What is multiplied with the texts `(B, P, D)`."""
        return in_text_space(self.tokens(columns), self.options)

    def texts(self) -> Tensor:
        """The K texts as they are multiplied `(K, D)`."""
        raise NotImplementedError

    def probabilities(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Softmax over the texts, at every patch: `(B, P, K)`."""
        image, texts = self.image(columns), self.texts()
        with without_autocast(image):
            products = image @ texts.T
        logits: Tensor = products * (self.options.logit_scale / self.options.temperature)
        return logits.softmax(dim=-1)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` on the output grid: expected depths, interpolated."""
        probabilities = self.probabilities(columns)
        with without_autocast(probabilities):
            return self.upsampled(probabilities @ self.centres[:, None]).squeeze(-1)

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution:
        """The softmax on the output grid `(B, P, K)`; between patches it is the interpolated one, whose mean is the depth."""
        return Distribution(self.upsampled(self.probabilities(columns)), self.centres)

    def upsampled(self, values: Tensor) -> Tensor:
        """`(B, P, C)` of the patches on the output grid."""
        if self.grid == self._patches:
            return values
        with without_autocast(values):
            maps = values.transpose(1, 2).reshape(values.shape[0], values.shape[2], *self._patches)
            fine: Tensor = self._rows @ maps @ self._columns.T
            return fine.flatten(2).transpose(1, 2)


def counted(depth: Tensor, target: PatchTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and true depth of the cells that count, and the pixels they stand for: `(M,)` each."""
    return tuple(value.reshape(-1)[target.flat] for value in (depth, target.mean, target.count))  # type: ignore[return-value]
