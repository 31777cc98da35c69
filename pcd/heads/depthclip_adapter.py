"""CLIP-Adapter on DepthCLIP ("Unveiling the Efficacy of Foundation Models for Depth Estimation", section 4.1).

Two small bottlenecks change the image tokens and the texts before they are compared: `w A(x) + (1 - w) x` with
`A = ReLU(W2 ReLU(W1 x))`. On an RN50 both narrow to 8 channels, 49,152 parameters in all. As released the order of DepthCLIP's
steps is put right (unit length after every second channel) and the products are not multiplied by 100.

What differs from the released training: each view is a row of its own, where the code averages the prediction of an image and
of its mirror image before the loss; and weights are float32. Whether its texts have unit length before they are adapted is not
known; here they have the length that CLIP gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pcd.errors import RecipeError
from pcd.heads.base import Batch, Context, PatchTargets, Phase
from pcd.heads.self_supervision import PhotometricLoss, SelfSupervision
from pcd.heads.tokens import Grid, Shape, require_grid
from pcd.heads.words import FineOptions, WordHead, WordOptions, counted, fitting_text, in_text_space
from pcd.losses import masked_l1
from pcd.recipe import Positive, Section
from pcd.smoothness import smoothness

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class ImageAdapter(Section):
    """`[head.image]`: the adapter of the image tokens."""

    reduction: Annotated[int, Field(gt=0)] = 256
    """Channels per channel of the bottleneck: 2048 / 256 = 8."""
    weight: Share = 0.2
    """Of what the adapter gives, beside the token itself. 0: no adapter (table 4)."""


class TextAdapter(Section):
    """`[head.text]`: the adapter of the texts."""

    reduction: Annotated[int, Field(gt=0)] = 128
    """Channels per channel of the bottleneck: 1024 / 128 = 8."""
    weight: Share = 0.2
    """As that of `[head.image]`."""


class AdapterOptions(WordOptions, FineOptions):
    """`[head]` of `name = "depthclip-adapter"`."""

    normalise: Literal["before", "after"] = "after"
    logit_scale: Positive = 1.0
    image: ImageAdapter = ImageAdapter()
    text: TextAdapter = TextAdapter()
    loss: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared error. (Equation 9, printed for L2, is the absolute error once more.)"""
    mask: bool = True
    """Whether only cells with ground truth count. False, as published for in-painted ground truth: all cells do, and one
    without depth counts as 0 m."""
    smoothness: Weight = 1e-3
    """Weight of the smoothness of the depths, see `pcd.smoothness`."""
    edges: Literal["none", "aware", "printed"] = "none"
    """What the image says about smoothness: nothing; less of it is asked for at edges (the released code); or more, as equation
    7 is printed. The latter two read `rgb_column`."""
    rgb_column: str = "pixels/rgb"
    supervision: Literal["depth", "self"] = "depth"
    """Ground truth depth, or a second view: then `[head.self_supervision]` holds instead of the keys from `loss` to here."""
    self_supervision: SelfSupervision = SelfSupervision()
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.02
    momentum: Share = 0.9
    weight_decay: Weight = 1e-4


class Adapter(nn.Module):
    """`w A(x) + (1 - w) x` with `A` a bottleneck without biases."""

    def __init__(self, width: int, settings: ImageAdapter | TextAdapter, name: str) -> None:
        """Raises `RecipeError` for a reduction to less than one channel."""
        super().__init__()
        narrow = width // settings.reduction
        if not narrow:
            raise RecipeError(f"head.{name}.reduction = {settings.reduction} leaves nothing of {width} channels.")
        self.weight = settings.weight
        self.down = nn.Linear(width, narrow, bias=False)
        self.up = nn.Linear(narrow, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., width)` to the same."""
        adapted: Tensor = self.up(self.down(inputs).relu()).relu()
        return self.weight * adapted.to(inputs) + (1 - self.weight) * inputs


class DepthClipAdapterHead(WordHead):
    """DepthCLIP with adapters; the texts are a buffer `(K, D)`, so that only a new training needs a text tower."""

    Options = AdapterOptions
    options: AdapterOptions
    text: Tensor

    def __init__(self, options: AdapterOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`shapes` as for `DepthClipHead`, and `(h, w, 3)` if edges are looked at. Raises `RecipeError`."""
        super().__init__(options, shapes, grid, options.depths)
        channels = require_grid(options.token_column, shapes[options.token_column], grid)
        self.image_adapter = Adapter(channels, options.image, "image") if options.image.weight else None
        self.text_adapter = Adapter(self.width, options.text, "text") if options.text.weight else None
        self.register_buffer("text", torch.zeros(len(options.words), self.width))
        if options.edges != "none":
            _require_pixels(options.rgb_column, shapes[options.rgb_column], self.grid)
        by_itself = options.supervision == "self"
        self.photometric = PhotometricLoss(options.self_supervision, shapes, self.grid, options) if by_itself else None

    @staticmethod
    def reads(options: AdapterOptions) -> tuple[str, ...]:
        """The tokens, and the view itself if edges are looked at."""
        return (options.token_column,) if options.edges == "none" else (options.token_column, options.rgb_column)

    @classmethod
    def learns_from(cls, options: AdapterOptions) -> tuple[str, ...]:
        """And what a second view is made of."""
        more = options.self_supervision.columns if options.supervision == "self" else ()
        return tuple(dict.fromkeys((*cls.reads(options), *more)))

    @staticmethod
    def phrases(options: AdapterOptions) -> tuple[str, ...]:
        """A sentence for each word."""
        return options.sentences

    def initialise(self, context: Context) -> None:
        """Keep the texts. Raises `TextTowerError` without a text tower, `RecipeError` if their width does not fit, and without
        cameras for second views."""
        if self.photometric is not None:
            self.photometric.check(context)
        text = context.text(self.phrases(self.options))
        self.text.copy_(fitting_text(text, *self.text.shape))

    def image(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Adapted tokens in the space of the texts `(B, P, D)`."""
        tokens = self.tokens(columns)
        return in_text_space(tokens if self.image_adapter is None else self.image_adapter(tokens), self.options)

    def texts(self) -> Tensor:
        """Adapted texts as unit vectors."""
        return F.normalize(self.text if self.text_adapter is None else self.text_adapter(self.text), dim=-1)

    def phases(self) -> tuple[Phase, ...]:
        """One: both adapters on the loss of depths. None without adapters."""
        options, parameters = self.options, tuple(self.named_parameters())
        if not parameters:
            return ()
        momentum = options.momentum if options.optimiser == "sgd" else 0.0
        return (Phase("depth", 1, parameters, options.lr, options.weight_decay, options.optimiser, momentum),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Error of the depths (equation 8) and their smoothness (equation 7), or equation 6."""
        target = batch.targets["depth"]
        if self.photometric is not None:
            return self.photometric.losses(self.depth(batch.columns), batch.columns, target)
        if self.options.mask and not len(target.flat):
            return {"total": self.text.new_zeros(())}
        depth = self.depth(batch.columns)
        error = self.depth_error(depth, target)
        rough = smoothness(
            depth.reshape(-1, *self.grid), self.edges(batch.columns), sign=1 if self.options.edges == "printed" else -1
        )
        return {"total": error + self.options.smoothness * rough, self.options.loss: error, "smoothness": rough}

    def depth_error(self, depth: Tensor, target: PatchTargets) -> Tensor:
        """Error of depths `(B, P)`; cells with ground truth weigh as much as they have pixels, all alike without a mask."""
        if not self.options.mask:
            known = torch.where(target.valid, target.mean, 0.0)
            away = depth - known
            return (away.abs() if self.options.loss == "l1" else away.square()).mean()
        found, truth, pixels = counted(depth, target)
        if self.options.loss == "l1":
            return masked_l1(found, truth, pixels)
        return ((found - truth).square() * pixels).sum() / pixels.sum()

    def edges(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """The view on the output grid `(B, 3, h, w)`, in [0, 1], if it is looked at."""
        if self.options.edges == "none":
            return None
        rgb = columns[self.options.rgb_column].permute(0, 3, 1, 2).float() / 255
        return F.adaptive_avg_pool2d(rgb, self.grid)


def _require_pixels(name: str, shape: Shape, grid: Grid) -> None:
    if len(shape) != 3 or shape[2] != 3 or shape[0] % grid[0] or shape[1] % grid[1]:
        raise RecipeError(
            f"head: {name} is {shape}; edges need (h, w, 3) whose sides are multiples of the depths' grid, {grid[0]}x{grid[1]}."
        )
