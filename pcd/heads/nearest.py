"""Nearest neighbours in token space: what frozen tokens know of depth without any training by gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from pcd.device import without_autocast
from pcd.errors import TrainingError
from pcd.heads.base import Batch, Context, Head, HeadOptions, Phase
from pcd.heads.tokens import on_grid, require_grid

BLOCK = 8192
"""Tokens of the memory that are compared at once with `QUERIES` patches: 64 MB of cosines."""
QUERIES = 2048
SMALLEST_DISTANCE = 1e-6
"""Distances below count as this: in float32 a token is about so far from itself."""


class NearestOptions(HeadOptions):
    """`[head]` of `name = "nearest"`."""

    k: Annotated[int, Field(gt=0)] = 16
    """Neighbours whose depths are averaged."""
    weights: Literal["uniform", "distance"] = "distance"
    """All alike, or each by 1 / (1 - cosine)."""
    average: Literal["log", "depth"] = "log"
    """Of the logarithms (a geometric mean), or of the depths themselves."""
    memory: Annotated[int, Field(gt=0)] = 65536
    """Training tokens that are kept, in float16, in every checkpoint. If there are more, they are drawn at random by
    `train.seed`."""
    patch_column: str = "clip/patch"
    """Patch tokens or a map."""

    @model_validator(mode="after")
    def _memory_holds_the_neighbours(self) -> Self:
        if self.k > self.memory:
            raise PydanticCustomError("k", f"k = {self.k} neighbours do not fit into a memory of {self.memory} tokens")
        return self


class NearestHead(Head):
    """The depth of a patch is the average of those of the `k` training patches with the nearest tokens, by cosine.

    A training patch is one that counts under `[targets.depth]`; its depth is the mean of its pixels. It has no parameters.
    """

    Options = NearestOptions
    sees_valid_patches_only = True

    def __init__(self, options: NearestOptions, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        """Raises `RecipeError` for a column without a grid."""
        super().__init__()
        self.options = options
        self.grid = grid
        width = require_grid(options.patch_column, shapes[options.patch_column], grid)
        self._seed = int(torch.randint(2**62, ()))
        """Drawn where weights would be, so it follows from the run's seed."""
        self.register_buffer("tokens", torch.zeros(options.memory, width, dtype=torch.float16))
        self.register_buffer("metres", torch.zeros(options.memory))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))
        self.tokens: Tensor
        self.metres: Tensor
        self.kept: Tensor
        """How many rows of the memory are filled."""
        self._filled = 0
        """The same where nobody has to wait for a device."""
        self.register_load_state_dict_post_hook(lambda head, _: head._count())  # type: ignore[no-untyped-call]

    @staticmethod
    def reads(options: NearestOptions) -> tuple[str, ...]:
        """The patch tokens."""
        return (options.patch_column,)

    @torch.no_grad()
    def initialise(self, context: Context) -> None:
        """Keep `memory` training patches, every one that counts with the same probability; all of them if there are no more.

        Each draws a number, in the order of the table; those with the smallest stay. So one pass is enough, and the choice does
        not depend on how rows are read. Raises `TrainingError` if no patch counts, or for tokens beyond the range of float16.
        """
        stream = np.random.Generator(np.random.PCG64(self._seed))
        drawn, limit = np.empty(0), np.inf
        tokens, metres = self.tokens.cpu()[:0], self.metres.cpu()[:0]
        for batch in context.batches():
            own = stream.random(len(batch.targets["depth"].flat))
            candidates = np.flatnonzero(own < limit)
            token, depth = self._patches(batch, torch.from_numpy(candidates))
            drawn = np.concatenate([drawn, own[candidates]])
            tokens, metres = torch.cat([tokens, token]), torch.cat([metres, depth])
            if len(drawn) > self.options.memory:
                stay = np.sort(np.argpartition(drawn, self.options.memory - 1)[: self.options.memory])
                drawn, limit = drawn[stay], drawn[stay].max()
                tokens, metres = tokens[torch.from_numpy(stay)], metres[torch.from_numpy(stay)]
        if not len(drawn):
            raise TrainingError("head nearest: no training patch has valid depth under the recipe's rules (targets.depth).")
        if not tokens.isfinite().all():
            raise TrainingError(f"head nearest: tokens of {self.options.patch_column} are beyond float16, 65504.")
        self.tokens[: len(tokens)], self.metres[: len(metres)] = tokens.to(self.tokens), metres.to(self.metres)
        self.kept.fill_(len(tokens))
        self._count()

    def _count(self) -> None:
        self._filled = int(self.kept)

    def _patches(self, batch: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(M, D)` float16 and depths `(M,)` of some of the patches that count, in host memory."""
        target = batch.targets["depth"]
        flat = target.flat[chosen.to(target.flat.device)]
        tokens = on_grid(batch.columns[self.options.patch_column], self.grid).flatten(0, 1)[flat]
        return tokens.half().cpu(), target.mean.reshape(-1)[flat].cpu()

    def phases(self) -> tuple[Phase, ...]:
        """None."""
        return ()

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)`. Beside its tokens in float32 it takes some 100 MB, however large the memory is."""
        tokens = on_grid(columns[self.options.patch_column], self.grid)
        with without_autocast(tokens):
            cosine, metres = self._neighbours(F.normalize(tokens.flatten(0, 1).float(), dim=-1))
            values = metres.log() if self.options.average == "log" else metres
            if self.options.weights == "distance":
                weight = 1 / (1 - cosine).clamp(min=SMALLEST_DISTANCE)
                found = (weight * values).sum(dim=1) / weight.sum(dim=1)
            else:
                found = values.mean(dim=1)
            found = found.exp() if self.options.average == "log" else found
        return found.reshape(tokens.shape[:2])

    def _neighbours(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and depths `(M, k)` of the nearest tokens of each unit vector `(M, D)`; fewer if fewer are kept."""
        cosine, metres = queries.new_empty(queries.shape[0], 0), queries.new_empty(queries.shape[0], 0)
        parts = [queries] if torch.compiler.is_compiling() else torch.split(queries, QUERIES)  # a graph has no number of them
        for start in range(0, self._filled, BLOCK):
            block = slice(start, min(start + BLOCK, self._filled))
            stored = F.normalize(self.tokens[block].float(), dim=-1)
            nearest = [(part @ stored.T).topk(min(self.options.k, len(stored))) for part in parts]
            own = torch.cat([found.values for found in nearest])
            depths = self.metres[block][torch.cat([found.indices for found in nearest])]
            both = torch.cat([cosine, own], dim=1)
            cosine, order = both.topk(min(self.options.k, both.shape[1]))
            metres = torch.cat([metres, depths], dim=1).gather(1, order)
        return cosine, metres
