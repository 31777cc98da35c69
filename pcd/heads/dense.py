"""What heads with a decoder share: pictures and maps as convolutions want them, losses on maps, and Eigen's refining layers.

Maps in the cache are `(h, w, C)` a row; here they are `(B, C, h, w)`. A head gives depths `(B, P)`, P counted row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.errors import RecipeError
from pcd.heads.base import Head, HeadOptions, PatchTargets, Phase
from pcd.recipe import Positive, Section

Shapes = Mapping[str, tuple[int, ...]]
Error = Literal["l1", "l2"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per channel of RGB in [0, 1]: what DepthCLIP and the released code of paper 001 give to every network."""


class Stage(Section):
    """One of the two stages of a coarse-to-fine network: `steps` at a time, and its own rates (paper 001's code: SGD)."""

    steps: Annotated[int, Field(ge=0)] = 1
    """Turns of 1 and 1 train the coarse network as a stage of its own would, since nothing of the refining layers comes back to
    it; they only see a coarse map that still moves. For one stage after the other, as published, give the steps of each whole
    stage: an epoch has rows / batch_size of them. 0 leaves the stage out."""
    lr: Positive = 0.02
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimiser: Literal["adamw", "sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""

    def phase(self, name: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> Phase:
        """This stage over named parameters of a head."""
        return Phase(name, self.steps, tuple(parameters), self.lr, self.weight_decay, self.optimiser, self.momentum)


class TwoStageOptions(HeadOptions):
    """What coarse-to-fine heads share."""

    refined: bool = True
    """False: the coarse map is the depth (the rows `Coarse` of paper 001's table 2)."""
    width: Annotated[int, Field(gt=1)] = 64
    """Maps of the refining layers."""
    training: Literal["turns", "together"] = "turns"
    """Turns: the refining layers never change the coarse part (Eigen; paper 001). Together: one loss on the refined map trains
    both, with the rates of `[head.refine]`."""
    rgb: str = "pixels/rgb"
    coarse: Stage = Stage()
    refine: Stage = Stage()


class TwoStageHead(Head):
    """A head with a coarse part and perhaps refining layers, and depths at a quarter of the picture."""

    options: TwoStageOptions
    coarse: nn.Module
    refine: Refining | None

    @staticmethod
    def output_grid(options: TwoStageOptions, shapes: Shapes, grid: tuple[int, int]) -> tuple[int, int]:
        """A quarter of the picture: 104x136 for 416x544. Raises `RecipeError` if its sides are no multiples of 4."""
        return quarter(shapes, options.rgb)

    def refined(self, image: Tensor, coarse: Tensor, phase: str) -> Tensor:
        """What phase `phase` trains, or "" for what the head gives: maps of the size of `coarse` `(B, h / 4, w / 4)`.

        In phase `refine` no gradient goes back to the coarse part.
        """
        if phase == "coarse" or self.refine is None:
            return coarse
        found: Tensor = self.refine(image, coarse.detach() if phase == "refine" else coarse)
        return found

    def phases(self) -> tuple[Phase, ...]:
        """`coarse` and `refine` in turns, or `depth` over everything."""
        if self.options.training == "together" and self.refine is not None:
            return (self.options.refine.phase("depth", self.named_parameters()),)
        parts = [("coarse", self.options.coarse, self.coarse), ("refine", self.options.refine, self.refine)]
        return tuple(
            stage.phase(name, part.named_parameters(prefix=name))
            for name, stage, part in parts
            if part is not None and stage.steps
        )


class Normalised(nn.Module):
    """RGB `(B, h, w, 3)` uint8 to `(B, 3, h, w)` float32, scaled to [0, 1], less `MEAN`, by `STD`."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, rgb: Tensor) -> Tensor:
        """The normalised picture."""
        return (channels_first(rgb) / 255 - self.mean) / self.std


class Refining(nn.Module):
    """Eigen's fine network on a picture and a coarse map a quarter its size, as paper 001 has it (section 4.2).

    conv 9x9 stride 2 to `width - 1` maps, ReLU, max-pooling 2, the coarse map beside them, conv 5x5 to `width`, ReLU, conv 5x5
    to one map. With padding, so that 416x544 gives 104x136; the original pads the two later convolutions alone. 119,437
    parameters at the published width of 64.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edges = nn.Conv2d(3, width - 1, 9, stride=2, padding=4)
        self.mixed = nn.Conv2d(width, width, 5, padding=2)
        self.out = nn.Conv2d(width, 1, 5, padding=2)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """`(B, 3, h, w)` and `(B, h / 4, w / 4)` to `(B, h / 4, w / 4)`."""
        edges = F.max_pool2d(F.relu(self.edges(image)), 2)
        mixed = F.relu(self.mixed(torch.cat([edges, coarse[:, None].to(edges)], dim=1)))
        found: Tensor = self.out(mixed)
        return found[:, 0]


def channels_first(column: Tensor) -> Tensor:
    """`(B, h, w, C)` of any type to `(B, C, h, w)` float32. Channels stay neighbours in memory, as convolutions like them."""
    return column.float().permute(0, 3, 1, 2)


def map_shape(shapes: Shapes, name: str, channels: int | None = None) -> tuple[int, int, int]:
    """(h, w, C) of a column of maps. Raises `RecipeError` for a column of another kind."""
    shape = shapes[name]
    if len(shape) != 3 or (channels is not None and shape[2] != channels):
        raise RecipeError(f"head: column {name} is {shape} a row; expected (h, w, {channels or 'channels'}).")
    return shape


def quarter(shapes: Shapes, name: str) -> tuple[int, int]:
    """Rows and columns of a quarter of a picture. Raises `RecipeError` for a picture whose sides are no multiples of 4."""
    height, width, _ = map_shape(shapes, name, 3)
    if height % 4 or width % 4:
        raise RecipeError(f"head: column {name} is {height}x{width}; expected multiples of 4, for depths at a quarter of it.")
    return height // 4, width // 4


def in_range(depth: Tensor, options: HeadOptions) -> Tensor:
    """What a head gives: metres `(B, P)` float32 of any map `(B, ...)`, cut to the depth range."""
    return depth.float().flatten(1).clamp(options.min_depth, options.max_depth)


def map_error(depth: Tensor, target: PatchTargets, kind: Error, mask: bool) -> Tensor:
    """Mean absolute (l1) or squared (l2) error in metres of a map `(B, P)`, over the cells that count (equations 8 and 9).

    Every cell weighs the same. For l2 equation 9 has a norm, which for one number is its absolute value; the released code has
    the square, and so has this. Without `mask` all cells count, those without ground truth as 0 metres: what the released code
    does, on ground truth whose holes were filled.
    """
    with without_autocast(depth):
        away = depth.float().flatten(1) - target.mean
        error = away.abs() if kind == "l1" else away * away
        if not mask:
            return error.mean()
        keep = target.valid.to(error)
        return (error * keep).sum() / keep.sum().clamp(min=1)


def scale_invariant(log_depth: Tensor, target: PatchTargets, share: float) -> Tensor:
    """Eigen et al. 2014, equation 4: `mean(g^2) - share * mean(g)^2` of every map, averaged over the maps that count.

    `g = log depth - log truth` over the cells of a map `(B, P)` that count; the paper's lambda, `share`, is 0.5. No root and no
    factor, unlike `pcd.losses.silog`. Computed as `var + (1 - share) * mean^2`, which is no difference of large numbers.
    """
    with without_autocast(log_depth):
        keep = target.valid.to(torch.float32)
        truth = torch.where(target.valid, target.mean, torch.ones_like(target.mean)).log()
        error = (log_depth.float().flatten(1) - truth) * keep
        count = keep.sum(dim=1)
        mean = error.sum(dim=1) / count.clamp(min=1)
        spread = (((error - mean[:, None]) * keep) ** 2).sum(dim=1) / count.clamp(min=1)
        return (spread + (1 - share) * mean**2).sum() / (count > 0).sum().clamp(min=1)


def roughness(depth: Tensor, image: Tensor) -> Tensor:
    """Edge-aware roughness of metres `(B, h, w)` under a normalised picture `(B, 3, h, w)` of the same size.

    `mean |dx D| exp(-|dx I|) + mean |dy D| exp(-|dy I|)`, |dI| being the mean over colours: as in the released code. Equation 7
    has `exp(+|dI|)`, which would ask for smoothness most of all at edges.
    """
    with without_autocast(depth):
        depth, image = depth.float(), image.float()
        beside = (image[..., :, 1:] - image[..., :, :-1]).abs().mean(dim=1)
        below = (image[..., 1:, :] - image[..., :-1, :]).abs().mean(dim=1)
        across = (depth[:, :, 1:] - depth[:, :, :-1]).abs() * torch.exp(-beside)
        down = (depth[:, 1:] - depth[:, :-1]).abs() * torch.exp(-below)
        return across.mean() + down.mean()
