"""The coarse/refined adapter of paper 001, section 4.2: linear layers on CLIP's depth map, refined by convolutions on the RGB.

    coarse   Linear(P, hidden), Linear(hidden, h w / 16): from CLIP's P depths to a map a quarter of the view
    refine   `pcd.heads.dense.Refining`: the picture's edges beside the coarse map

Between the two linear layers there is no activation, so together they are one linear map of rank P or less (221 for 416x544,
where P is 13x17): 14,144 outputs of 221 inputs through 58,857,280 parameters. What CLIP's depth does not tell, the coarse map
cannot tell. At the published temperature of 0.1, without DepthCLIP's factor of 100, seven cosines that differ by hundredths
give an almost even softmax, and all inputs lie near 2.14 m: one more reason why the paper's table 2 has this method far below
a network on the RGB.

The released code trains the coarse part first, keeps its best weights, then the refining layers with the coarse part fixed: by
SGD, momentum 0.9, weight decay 0.1, rates 0.02 and 0.002, batches of 64, ten epochs each, the rate a tenth after each of the
first five. It learns from the mean of a view and its mirror image, cut to 0 to 10 m, and shrinks ground truth to a quarter by
bilinear sampling; here mirrored views are rows of their own (`train.flips`), losses see the maps as they are (a cell that a
cut holds back gets no gradient and may stay there), and the truth of a cell is the mean of its 4x4 pixels.

The rates are for views of 416x544. In views of a few thousand pixels, where a cell is a larger share of the mean, they
diverge: lower them, or set `train.grad_clip = 1.0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pcd.heads import dense
from pcd.heads.base import Batch, Context
from pcd.heads.clip_prior import ClipDepth, ClipDepthOptions
from pcd.heads.dense import Stage, TwoStageHead, TwoStageOptions


class CoarseRefinedOptions(TwoStageOptions):
    """`[head]` of `name = "coarse-refined"`. The defaults of its tables are the released code's, but for its schedule."""

    hidden: Annotated[int, Field(gt=0)] = 4096
    loss: dense.Error = "l2"
    mask: bool = True
    """False: cells without ground truth count as 0 metres, as in the released code, whose ground truth is dense."""
    smoothness: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of `pcd.heads.dense.roughness`."""
    clip: ClipDepthOptions = ClipDepthOptions()
    coarse: Stage = Stage(lr=0.02, weight_decay=0.1)
    refine: Stage = Stage(lr=0.002, weight_decay=0.1)


class CoarseRefinedHead(TwoStageHead):
    """The coarse/refined adapter: 58,976,717 parameters at 416x544 as published. Depths are at a quarter of the view."""

    Options = CoarseRefinedOptions
    options: CoarseRefinedOptions

    def __init__(self, options: CoarseRefinedOptions, shapes: dense.Shapes, grid: tuple[int, int]) -> None:
        """`shapes` gives CLIP's tokens or map, and `(h, w, 3)` for the picture.

        Raises `RecipeError` for columns of another kind or a picture whose sides are no multiples of 4.
        """
        super().__init__()
        self.options = options
        self.clip = ClipDepth(options.clip, shapes, grid)
        self.grid = dense.quarter(shapes, options.rgb)
        inputs, outputs = self.clip.grid[0] * self.clip.grid[1], self.grid[0] * self.grid[1]
        self.coarse = nn.Sequential(nn.Linear(inputs, options.hidden), nn.Linear(options.hidden, outputs))
        self.image = dense.Normalised()
        self.refine = dense.Refining(options.width) if options.refined else None

    @staticmethod
    def reads(options: CoarseRefinedOptions) -> tuple[str, ...]:
        """What CLIP's depth is computed from, and the picture; the coarse map alone needs its size, its training its edges."""
        return (options.clip.token_column, options.rgb)

    @staticmethod
    def phrases(options: CoarseRefinedOptions) -> tuple[str, ...]:
        """The sentences of CLIP's depth."""
        return options.clip.sentences

    def initialise(self, context: Context) -> None:
        """Fill the texts of CLIP's depth. Raises `TextTowerError` if the encoder's weights hold no text tower."""
        self.clip.initialise(context)

    def coarse_map(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, h / 4, w / 4)`, not cut to any range."""
        found: Tensor = self.coarse(self.clip.depth(columns))
        return found.reshape(-1, *self.grid)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` at a quarter of the view, cut to the depth range."""
        image = self.image(columns[self.options.rgb])
        return dense.in_range(self.refined(image, self.coarse_map(columns), ""), self.options)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """The error of the coarse map in phase `coarse`, that of the refined one in the others, and its roughness."""
        options, target = self.options, batch.targets["depth"]
        if options.mask and not len(target.flat):
            return {"total": target.mean.new_zeros(())}
        image = self.image(batch.columns[options.rgb])
        found = self.refined(image, self.coarse_map(batch.columns), phase)
        error = dense.map_error(found, target, options.loss, options.mask)
        if not options.smoothness:
            return {"total": error}
        rough = dense.roughness(found, F.avg_pool2d(image, 4))
        return {"total": error + options.smoothness * rough, "error": error, "roughness": rough}
