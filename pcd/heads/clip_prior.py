"""The depth map that CLIP gives without training, as an input of heads that refine it (paper 001, section 3.3).

It is the head `depthclip` inside another head, under the keys of `[head.clip]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pcd.heads.depthclip import DepthClipHead
from pcd.heads.tokens import Grid, Shape
from pcd.heads.words import WordOptions
from pcd.recipe import Positive


class ClipDepthOptions(WordOptions):
    """`[head.clip]`: the keys of `depthclip`. The defaults are those of paper 001's code: products are cosines, and there is no
    factor of 100 before the temperature divides them."""

    min_depth: float = 0.0
    max_depth: float = float("inf")
    normalise: Literal["before", "after"] = "after"
    logit_scale: Positive = 1.0
    temperature: Positive = 0.1
    """0.1 in front of the coarse/refined adapter, 0.001 in front of the multi-scale adapter."""


class ClipDepth(DepthClipHead):
    """CLIP's depth as maps. Nothing in it is trained; the texts are a buffer, so that a checkpoint holds them."""

    def __init__(self, options: ClipDepthOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`grid` is that of patch tokens; a map has its own. Raises `RecipeError` for columns that texts cannot meet."""
        shape = shapes[options.token_column]
        super().__init__(options, shapes, (shape[0], shape[1]) if len(shape) == 3 else grid)

    def maps(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, h, w)` on its grid."""
        return self.depth(columns).reshape(-1, *self.grid)
