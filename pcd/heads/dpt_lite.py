"""A small convolutional decoder over several cached columns, after DPT: a pyramid of them, fused from coarse to fine.

What it leaves out of DPT: the CLS token ("readout") and levels of different widths. One column alone makes a whole pyramid, as
in ViTDet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, cast

import torch.nn.functional as F
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pcd.heads.base import Batch, Context, Head, Phase
from pcd.heads.baseline import BaselineOptions, DepthOutput, depth_losses, nothing
from pcd.heads.bins import Distribution
from pcd.heads.tokens import Grid, Shape, as_map, require_grid, resized


class DptLiteOptions(BaselineOptions):
    """`[head]` of `name = "dpt-lite"`. Of tokens, `columns` goes from the shallowest layer to the deepest, as in DPT."""

    output: Literal["bins", "depth", "log-depth"] = "log-depth"
    normalisation: Literal["linear", "softmax"] = "softmax"
    """Of bins. The floors of a linear normalisation together weigh as much as the scores that a few hundred steps make: on 58
    frames that had AbsRel 0.56 after 120 steps, a softmax 0.16."""
    channels: Annotated[int, Field(gt=1)] = 128
    """Of every level."""
    scale: Annotated[int, Field(gt=0)] = 2
    """Cells of the depths to one cell of the first column in each direction: a power of two."""
    norm: Literal["layer", "none"] = "layer"
    """Every token standardised over its channels before anything else, or not. The 1x1 convolution has scale and shift."""
    lr: Annotated[float, Field(gt=0)] = 3e-4

    @field_validator("scale")
    @classmethod
    def _halves(cls, value: int) -> int:
        if value & (value - 1):
            raise PydanticCustomError("scale", "expected a power of two: 1, 2, 4, 8 ...")
        return value


class DptLiteHead(Head):
    """Four layers of 768 channels at 128 channels and scale 4: 3,451,521 parameters.

    About 8 x 10^9 multiplications a view and forward pass on 21x21 tokens, three quarters of them on the finest level.
    """

    Options = DptLiteOptions

    def __init__(self, options: DptLiteOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`shapes` gives `(P, D)` on `grid`, or `(h, w, C)` on any, for every column. Raises `RecipeError` for any other."""
        super().__init__()
        self.options = options
        self.grid = self.output_grid(options, shapes, grid)
        self.output = DepthOutput(options)
        self._own = grid
        widths = {name: require_grid(name, shapes[name], grid) for name in options.columns}
        self._sizes, self._places = pyramid(options, shapes, grid)
        wide, levels = options.channels, len(self._sizes)
        parts = [Reassemble(widths[name], wide, _size(shapes[name], grid), self._sizes[level]) for name, level in self._places]
        self.reassemble = nn.ModuleList(parts)
        taken = sorted({level for _, level in self._places if level < levels - 1})
        self.beside = nn.ModuleDict({str(level): ResidualUnit(wide) for level in taken})
        self.fuse = nn.ModuleList(ResidualUnit(wide) for _ in range(levels))
        self.narrow = nn.Conv2d(wide, wide // 2, 3, padding=1)
        self.map = nn.Conv2d(wide // 2, options.raw_channels, 1)

    @staticmethod
    def output_grid(options: DptLiteOptions, shapes: Mapping[str, Shape], grid: Grid) -> Grid:
        """`scale` times that of the first column."""
        return options.scale * grid[0], options.scale * grid[1]

    @staticmethod
    def reads(options: DptLiteOptions) -> tuple[str, ...]:
        """The columns that are fused."""
        return options.columns

    def initialise(self, context: Context) -> None:
        """Set the bias of the last layer as `start` says."""
        assert self.map.bias is not None
        self.output.start(self.map.bias, context)

    def phases(self) -> tuple[Phase, ...]:
        """One phase over everything."""
        return (self.options.phase(self),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """`[head.loss]` over the cells of the finer grid that count."""
        target = batch.targets[phase]
        if not len(target.flat):
            return nothing(self.map.weight)
        depth = self.output(self._raw(batch.columns)).reshape(-1)[target.flat]
        return depth_losses(self.options, depth, target, self.grid)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` of all cells of the finer grid."""
        return self.output.bounded(self._raw(columns))

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution | None:
        """Over the bins, `(B, P, K)`; None without bins."""
        return self.output.distribution(self._raw(columns))

    def _raw(self, columns: Mapping[str, Tensor]) -> Tensor:
        """What the last layer gives: `(B, P, K)`, P counted on the finer grid."""
        maps = {name: self._standardised(columns[name]) for name in self.options.columns}
        levels: list[Tensor | None] = [None] * len(self._sizes)
        for part, (name, level) in zip(self.reassemble, self._places, strict=True):
            found, there = part(maps[name]), levels[level]
            levels[level] = found if there is None else there + found
        fused = cast(Tensor, self.fuse[-1](levels[-1]))
        for level in reversed(range(len(levels) - 1)):
            fused, there = resized(fused, self._sizes[level]), levels[level]
            fused = fused if there is None else fused + self.beside[str(level)](there)
            fused = self.fuse[level](fused)
        return cast(Tensor, self.map(self.narrow(fused).relu())).flatten(2).transpose(1, 2)

    def _standardised(self, column: Tensor) -> Tensor:
        """A column as a map `(B, C, h, w)`."""
        column = column.float()
        return as_map(F.layer_norm(column, column.shape[-1:]) if self.options.norm == "layer" else column, self._own)


class Reassemble(nn.Module):
    """A column on its level: 1x1 convolution, then its size, then 3x3 convolution.

    To an exact multiple of its size a column is enlarged by a transposed convolution whose kernels do not overlap (DPT): only
    so can the channels of a token say what lies where inside its patch. To any other size it is resized (`tokens.resized`).
    """

    def __init__(self, channels: int, wide: int, own: Grid, size: Grid) -> None:
        """From `(channels, *own)` to `(wide, *size)`."""
        super().__init__()
        self._size, self._shrinks = size, size[0] < own[0]
        factor = size[0] // own[0]
        exact = factor > 1 and size == (factor * own[0], factor * own[1])
        self.project = nn.Conv2d(channels, wide, 1)
        self.enlarge = nn.ConvTranspose2d(wide, wide, factor, stride=factor) if exact else None
        self.smooth = nn.Conv2d(wide, wide, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """`(B, channels, *own)` to `(B, wide, *size)`.

        Resizing and a 1x1 convolution may be exchanged: the one that makes less comes first, and no gradient goes back through
        what shrinks.
        """
        if self._shrinks:
            maps = self.project(resized(maps, self._size))
        elif self.enlarge is not None:
            maps = self.enlarge(self.project(maps))
        else:
            maps = resized(self.project(maps), self._size)
        return cast(Tensor, self.smooth(maps))


class ResidualUnit(nn.Module):
    """DPT's residual unit: `x + conv(relu(conv(relu(x))))`, 3x3, without a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(B, C, h, w)` to the same."""
        return cast(Tensor, inputs + self.second(self.first(inputs.relu()).relu()))


def pyramid(
    options: DptLiteOptions, shapes: Mapping[str, Shape], grid: Grid
) -> tuple[tuple[Grid, ...], tuple[tuple[str, int], ...]]:
    """Sizes of the levels from fine to coarse, each half the one before (rounded up), and the columns with their levels.

    The finest level is the grid of the depths. Maps of another size than `grid`, such as stages of a ResNet, go to the level
    nearest to it. Columns on `grid` take what those leave of the levels down to `grid`, in the order they are named, and then
    coarser ones: four layers at scale 4 come to 4, 2, 1 and 1/2 times the grid, as in DPT. If there are fewer of them than
    levels, the last one, the deepest, takes all that remain.
    """
    finest = DptLiteHead.output_grid(options, shapes, grid)
    of_grid = options.scale.bit_length() - 1
    maps = [name for name in options.columns if _size(shapes[name], grid) != grid]
    places = [(name, _nearest_level(finest[0] / shapes[name][0])) for name in maps]
    free = [*sorted(set(range(of_grid)) - {level for _, level in places}), of_grid]
    tokens = [name for name in options.columns if name not in maps]
    free += range(of_grid + 1, of_grid + 1 + max(0, len(tokens) - len(free)))
    places += [(tokens[min(number, len(tokens) - 1)], level) for number, level in enumerate(free)]
    deepest = max(level for _, level in places)
    return tuple((-(-finest[0] // 2**level), -(-finest[1] // 2**level)) for level in range(deepest + 1)), tuple(places)


def _size(shape: Shape, grid: Grid) -> Grid:
    """Rows and columns of a column of tokens on `grid`, or of a map."""
    return (shape[0], shape[1]) if len(shape) == 3 else grid


def _nearest_level(factor: float) -> int:
    """How many halvings shrink by about `factor`."""
    return max(0, round(math.log2(factor)))
