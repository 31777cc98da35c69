"""Baselines that look at one patch at a time: a linear map, and an MLP, from its tokens to a depth.

The linear probe is what a frozen encoder is usually judged by. DINOv2's, the model of this one: tokens of one or four layers,
each with the CLS token of that layer behind it, one 1x1 convolution to 256 bins with linear normalisation, trained with SILog.
Its class is called BNHead, but as released it has no BatchNorm: the lines are commented out. It enlarges tokens four times
(bilinear) before the map; here depths come on the grid of the tokens and a protocol makes pixels of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from pcd.heads.base import Batch, Context, Head, Phase
from pcd.heads.baseline import BaselineOptions, DepthOutput, depth_losses, nothing
from pcd.heads.bins import Distribution
from pcd.heads.tokens import joined, joined_width
from pcd.recipe import Names, Positive


class LinearOptions(BaselineOptions):
    """`[head]` of `name = "linear"`."""

    cls_columns: Names = ()
    """Vectors of the view, such as CLS tokens, that every patch sees behind its own: `["clip/cls"]`."""
    lr: Positive = 3e-3
    norm: Literal["batch", "layer", "none"] = "batch"
    """Before the map, over all channels it sees: BatchNorm, with the statistics of the training patches that count; LayerNorm;
    or none."""


class MlpOptions(LinearOptions):
    """`[head]` of `name = "mlp"`."""

    lr: Positive = 3e-4
    norm: Literal["batch", "layer", "none"] = "layer"
    layers: Annotated[int, Field(gt=0)] = 2
    """Hidden layers."""
    width: Annotated[int, Field(gt=0)] = 512
    """Of each of them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """After each of them."""


class LinearHead(Head):
    """One linear map from token to depth: 196,864 parameters at D = 768 and 256 bins, and 1,536 of a norm.

    BatchNorm takes its statistics from the patches that count, in training alone; they are buffers of the checkpoint.
    """

    Options = LinearOptions
    sees_valid_patches_only = True  # a map that must be resized is never held by patch, so nothing of it is left out

    def __init__(self, options: LinearOptions, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        """`shapes` gives `(P, D)` or `(h, w, C)` for `columns` and `(D,)` for `cls_columns`.

        Raises `RecipeError` for columns that do not lie on the grid.
        """
        super().__init__()
        self.options = options
        self.grid = grid
        self.output = DepthOutput(options)
        seen = joined_width(options.columns, shapes, grid, options.cls_columns)
        self.norm = _norm(options.norm, seen)
        self.hidden, last = self._hidden(options, seen)
        self.map = nn.Linear(last, options.raw_channels)

    def _hidden(self, options: LinearOptions, seen: int) -> tuple[nn.Module, int]:
        """What lies between the norm and the map, and how wide it ends."""
        return nn.Identity(), seen

    @staticmethod
    def reads(options: LinearOptions) -> tuple[str, ...]:
        """Tokens of all layers, then the vectors of the view."""
        return (*options.columns, *options.cls_columns)

    def initialise(self, context: Context) -> None:
        """Set the bias of the last layer as `start` says."""
        self.output.start(self.map.bias, context)

    def phases(self) -> tuple[Phase, ...]:
        """One phase over everything."""
        return (self.options.phase(self),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """`[head.loss]` over the patches that count; a batch with one patch has no BatchNorm statistics and teaches nothing."""
        target = batch.targets[phase]
        if len(target.flat) < 2:
            return nothing(self.map.weight)
        options = self.options
        tokens = joined(batch.columns, options.columns, self.grid, options.cls_columns, target.flat, target.view)
        return depth_losses(options, self.output(self._raw(tokens)), target, self.grid)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` of all patches."""
        return self.output.bounded(self._all(columns))

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution | None:
        """Over the bins, `(B, P, K)`; None without bins."""
        return self.output.distribution(self._all(columns))

    def _all(self, columns: Mapping[str, Tensor]) -> Tensor:
        """What the last layer gives for all patches: `(B, P, K)`."""
        tokens = joined(columns, self.options.columns, self.grid, self.options.cls_columns)
        return self._raw(tokens.flatten(0, 1)).reshape(*tokens.shape[:2], -1)

    def _raw(self, tokens: Tensor) -> Tensor:
        """`(M, W)` to `(M, K)`."""
        return cast(Tensor, self.map(self.hidden(self.norm(tokens))))


class MlpHead(LinearHead):
    """Hidden layers before the map, each Linear, GELU and Dropout: 789,248 parameters at D = 768, 2 x 512 and 256 bins."""

    Options = MlpOptions

    def _hidden(self, options: LinearOptions, seen: int) -> tuple[nn.Module, int]:
        assert isinstance(options, MlpOptions)
        parts: list[nn.Module] = []
        for _ in range(options.layers):
            parts += [nn.Linear(seen, options.width), nn.GELU(), nn.Dropout(options.dropout)]
            seen = options.width
        return nn.Sequential(*parts), seen


def _norm(kind: str, channels: int) -> nn.Module:
    """BatchNorm, LayerNorm or nothing on `(M, channels)`."""
    if kind == "batch":
        return nn.BatchNorm1d(channels)
    return nn.LayerNorm(channels) if kind == "layer" else nn.Identity()
