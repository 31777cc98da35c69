"""Eigen, Puhrsch and Fergus 2014: depth from one picture by a coarse network on all of it and a fine one on its details.

    coarse   conv 11x11 stride 4 to 96, pool 2, conv 5x5 to 256, pool 2, conv 3x3 to 384, conv 3x3 to 384,
             conv 3x3 stride 2 to 256, each with ReLU; Linear to 4096, ReLU, dropout 0.5; Linear to the coarse map
    refine   `pcd.heads.dense.Refining`

Both maps are a quarter of the picture and hold the logarithm of depth. The loss is the scale-invariant one (equation 4, with
lambda 0.5). No other network is asked: the head reads the picture alone.

The original takes 228x304 to 55x74, since its first convolutions have no padding; here they have, so that the cells of the map
tile the view and ground truth has an exact mean per cell: 228x304 gives 57x76, 416x544 gives 104x136. The original's
convolutions 1 to 5 start from ImageNet weights, here from random ones. It has rates of 0.001 for those, 0.1 for the linear
layers, 0.001 for the refining layers and 0.01 for the second of them, on a common scale of about 5; here a stage has one rate.
It shows 2 million samples to the coarse network, then 1.5 million to the fine one with the coarse one fixed, in batches of 32,
with random scale, rotation, crop, colour and flips, of which a cache holds the flips.

Paper 001 has a reference of this name, but its released code cannot train it: the linear layers are applied to each of the 256
maps alone, which gives 256 maps of depth, and the refining layers expect one. It has no fourth convolution, no dropout, metres
instead of logarithms, and the squared error; the last two are `loss = "l2"` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from pcd.errors import RecipeError
from pcd.heads import dense
from pcd.heads.base import Batch
from pcd.heads.dense import Stage, TwoStageHead, TwoStageOptions

Width = Annotated[int, Field(gt=0)]
Widths = Annotated[
    tuple[Width, Width, Width, Width, Width], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


class DepthEigenOptions(TwoStageOptions):
    """`[head]` of `name = "depth-eigen"`."""

    widths: Widths = (96, 256, 384, 384, 256)
    """Maps of the coarse network's convolutions."""
    hidden: Width = 4096
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    loss: Literal["scale-invariant", "l2"] = "scale-invariant"
    """Of logarithms; or the squared error in metres, in which case the maps are metres."""
    scale_invariance: Annotated[float, Field(ge=0, le=1)] = 0.5
    """lambda of equation 4: 0 is the squared error of logarithms, 1 forgives every map a wrong scale."""
    coarse: Stage = Stage(lr=0.005)
    refine: Stage = Stage(lr=0.005)


class Coarse(nn.Module):
    """The coarse network on a picture `(B, 3, h, w)`, normalised: a map `(B, h / 4, w / 4)`."""

    def __init__(self, options: DepthEigenOptions, grid: tuple[int, int]) -> None:
        """`grid` is that of the map. Raises `RecipeError` for a picture of less than 16x16 pixels."""
        super().__init__()
        if min(grid) < 4:
            raise RecipeError(f"head: {options.rgb} is {4 * grid[0]}x{4 * grid[1]} pixels; depth-eigen needs 16x16 or more.")
        self.grid = grid
        layers: list[nn.Module] = []
        channels = 3
        kinds = ((11, 4, 4), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 2, 1))
        for number, (width, (size, stride, padding)) in enumerate(zip(options.widths, kinds, strict=True)):
            layers += [nn.Conv2d(channels, width, size, stride, padding), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < 2 else []
            channels = width
        self.convolutions = nn.Sequential(*layers)
        # Twice halved by pooling, rounding down, and once by the stride, rounding up.
        rows, columns = ((side // 4 + 1) // 2 for side in grid)
        self.all = nn.Linear(channels * rows * columns, options.hidden)
        self.dropout = nn.Dropout(options.dropout)
        self.map = nn.Linear(options.hidden, grid[0] * grid[1])

    def forward(self, image: Tensor) -> Tensor:
        """The coarse map."""
        found: Tensor = self.map(self.dropout(F.relu(self.all(self.convolutions(image).flatten(1)))))
        return found.reshape(-1, *self.grid)


class DepthEigenHead(TwoStageHead):
    """The network of Eigen et al. on a picture: 95,019,257 parameters at 228x304. Depths are at a quarter of the view."""

    Options = DepthEigenOptions
    options: DepthEigenOptions

    def __init__(self, options: DepthEigenOptions, shapes: dense.Shapes, grid: tuple[int, int]) -> None:
        """`shapes` gives `(h, w, 3)` for the picture. Raises `RecipeError` if its sides are no multiples of 4, or below 16."""
        super().__init__()
        self.options = options
        self.grid = dense.quarter(shapes, options.rgb)
        self.image = dense.Normalised()
        self.coarse = Coarse(options, self.grid)
        self.refine = dense.Refining(options.width) if options.refined else None

    @staticmethod
    def reads(options: DepthEigenOptions) -> tuple[str, ...]:
        """The picture alone."""
        return (options.rgb,)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` at a quarter of the view, cut to the depth range."""
        image = self.image(columns[self.options.rgb])
        found = self.refined(image, self.coarse(image), "").float()
        return dense.in_range(found if self.options.loss == "l2" else found.exp(), self.options)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """The scale-invariant loss, or the squared error, of the map that the phase trains."""
        target = batch.targets["depth"]
        if not len(target.flat):
            return {"total": target.mean.new_zeros(())}
        image = self.image(batch.columns[self.options.rgb])
        found = self.refined(image, self.coarse(image), phase)
        if self.options.loss == "l2":
            return {"total": dense.map_error(found, target, "l2", mask=True)}
        return {"total": dense.scale_invariant(found, target, self.options.scale_invariance)}
