"""DepthCLIP (Zhang et al., 2022): depth from CLIP without any training.

A patch is compared with seven sentences, "This object is giant" to "This object is unseen", each of which stands for a depth of
1 to 3 m; its depth is their mean, weighted by a softmax. As released it reads the last feature map of an RN50
(`space = "released"`); `space = "joint"` is what the method says it does.

The depths of the words are what they are: nothing is clamped or scaled to `min_depth` and `max_depth`, which must enclose them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd.errors import UsageError
from pcd.heads.base import Batch, Context, Phase
from pcd.heads.tokens import Grid, Shape
from pcd.heads.words import WordHead, WordOptions, fitting_text


class DepthClipHead(WordHead):
    """The zero-shot head: no parameters, and the texts as a buffer `(K, D)`."""

    Options = WordOptions
    options: WordOptions
    text: Tensor

    def __init__(self, options: WordOptions, shapes: Mapping[str, Shape], grid: Grid) -> None:
        """`shapes` has a map `(h, w, 2 D)` or tokens `(P, 2 D)`; `(P, D)` in the joint space. Raises `RecipeError`."""
        super().__init__(options, shapes, grid, options.depths)
        self.register_buffer("text", torch.zeros(len(options.words), self.width))

    @staticmethod
    def phrases(options: WordOptions) -> tuple[str, ...]:
        """A sentence for each word."""
        return options.sentences

    def initialise(self, context: Context) -> None:
        """Keep the texts. Raises `TextTowerError` without a text tower, `RecipeError` if their width does not fit."""
        text = context.text(self.phrases(self.options))
        self.text.copy_(fitting_text(text, *self.text.shape))

    def texts(self) -> Tensor:
        """Unit vectors."""
        return F.normalize(self.text, dim=-1)

    def phases(self) -> tuple[Phase, ...]:
        """None: nothing is trained."""
        return ()

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """There is none. Raises `UsageError`."""
        raise UsageError(f"the head depthclip is not trained; it has no loss for phase {phase!r}.")
