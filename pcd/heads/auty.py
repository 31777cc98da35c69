"""Learned words for depth (Auty & Mikolajczyk, "Learning to Prompt CLIP for Monocular Depth Estimation", 2023).

DepthCLIP with K depth bins whose words are vectors in front of the frozen text tower, learned from ground truth. As released
it reads the last feature map of an RN50 as DepthCLIP does, and divides the texts, unit vectors already, by the Frobenius norm
of their matrix, sqrt(K): the products are then multiplied by 1000 / sqrt(K), 378 for 7 bins and 62.5 for 256.

Published are 7, 20, 128 and 256 bins of the dataset's range or of 1 mm to 80 m, even or uniform in the logarithm; the sentences
"This {object} is {depth}" and "This {object} appears to be {depth}" with one vector a bin for the depth; and learned sentences
"1o1d", "1o2d" and "4o4d", taken here as so many vectors for the object, which all bins share, and so many a bin for the depth.
How the words between them read in the learned sentences is not known; here they are those of the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pcd.errors import RecipeError
from pcd.heads.base import Batch, Context, Phase
from pcd.heads.bins import DepthBins, Spacing
from pcd.heads.learned_words import OWN, SHARED, LearnedWords
from pcd.heads.tokens import Grid, Shape
from pcd.heads.words import FineOptions, WordHead, counted, require_places
from pcd.losses import silog
from pcd.recipe import Positive


class AutyOptions(FineOptions):
    """`[head]` of `name = "auty"`."""

    bins: Annotated[int, Field(gt=1)] = 20
    """K."""
    spacing: Spacing = "even"
    bins_from: Positive | None = None
    """Where the bins begin, in metres; absent: `min_depth`."""
    bins_to: Positive | None = None
    """Where they end; absent: `max_depth` ("dset"); 80.0 is "const80"."""
    template: str = "This {object} is {depth}"
    object_word: str = "object"
    """What stands for `{object}` if `object_vectors` is 0."""
    object_vectors: Annotated[int, Field(ge=0)] = 0
    """Learned vectors that stand for `{object}` in all sentences: the o of "4o4d"."""
    depth_vectors: Annotated[int, Field(gt=0)] = 1
    """Learned vectors that stand for `{depth}` in each of the sentences: the d."""
    token_width: Annotated[int, Field(gt=0)] = 512
    """Channels of the text tower's tokens: 512 for RN50 and ViT-B, 768 for ViT-L/14."""
    text_norm: Literal["released", "rows"] = "released"
    """`released`: unit texts divided by the norm of their matrix; `rows`: unit texts."""
    variance_focus: Annotated[float, Field(ge=0, le=1)] = 0.85
    """lambda of SILog."""
    loss_scale: Positive = 10.0
    """alpha of SILog."""
    lr: Positive = 3.57e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1

    @property
    def depth_bins(self) -> DepthBins:
        """The depth bins. Raises `RecipeError` for an empty range, or one that begins at 0 m: a depth of 0 has no logarithm."""
        low = self.min_depth if self.bins_from is None else self.bins_from
        high = self.max_depth if self.bins_to is None else self.bins_to
        if not 0 < low < high:
            raise RecipeError(f"head: bins from {low} to {high} m: give a range above 0 that is not empty.")
        return DepthBins(low, high, self.bins, self.spacing)

    @property
    def sentence(self) -> str:
        """The template with the places of learned vectors. Raises `RecipeError` if it has none."""
        require_places("head.template", self.template, ("{object}", "{depth}") if self.object_vectors else ("{depth}",))
        filled = self.template.replace("{object}", SHARED if self.object_vectors else self.object_word)
        return filled.replace("{depth}", OWN)


class AutyHead(WordHead):
    """DepthCLIP with learned words: `bins * depth_vectors + object_vectors` vectors of `token_width`, 3,584 numbers for 7."""

    Options = AutyOptions
    options: AutyOptions

    def __init__(self, options: AutyOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`shapes` as for `DepthClipHead`. Raises `RecipeError`."""
        super().__init__(options, shapes, grid, options.depth_bins.centres.tolist())
        self.prompts = LearnedWords(
            [options.sentence] * options.bins,
            options.object_vectors,
            options.depth_vectors,
            options.token_width,
            self.width,
        )

    def attach(self, context: Context) -> None:
        """Learn through the text tower. Raises `TextTowerError` if there is none, `RecipeError` if its widths do not fit."""
        self.prompts.attach(context.text_tower())

    def texts(self) -> Tensor:
        """Texts of unit length or, as released, divided by the norm of all of them."""
        unit = F.normalize(self.prompts(), dim=-1)
        return unit if self.options.text_norm == "rows" else unit / torch.linalg.vector_norm(unit)

    def phases(self) -> tuple[Phase, ...]:
        """One: the vectors on the loss of depths."""
        parameters: tuple[Any, ...] = tuple(self.named_parameters())
        return (Phase("depth", 1, parameters, self.options.lr, self.options.weight_decay),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """SILog over all cells of the batch that count. Raises `TextTowerError` if no tower is attached."""
        target = batch.targets["depth"]
        if not len(target.flat):
            return {"total": self.prompts.text.new_zeros(())}
        found, truth, pixels = counted(self.depth(batch.columns), target)
        options = self.options
        return {"total": silog(found, truth, pixels, variance_focus=options.variance_focus, scale=options.loss_scale)}
