"""PureCLIP-Depth: depth as a rotation inside CLIP's embedding space.

Two MLPs, phi and psi, turn a patch token into a unit vector that is compared with a table of learnable depth vectors; the
softmax over the table weighs the centres of the depth bins. Equations and sections are those of the paper. Where paper and
released code disagree there is an option; `pipelines/README.md` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.errors import RecipeError, TrainingError
from pcd.heads import factored
from pcd.heads.base import Batch, Context, Head, PatchTargets, Phase
from pcd.heads.bins import Distribution
from pcd.heads.pureclip_options import DepthPhase, EmbeddingPhase, PureClipOptions, prompts
from pcd.losses import alignment_loss, info_nce_loss, neighbour_targets, pixel_rmse

__all__ = ["DepthPhase", "EmbeddingPhase", "PureClipHead", "PureClipOptions"]


def _mlp(width_in: int, hidden: int, width_out: int, dropout: float) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Dropout, Linear, LayerNorm, both Linear without bias (paper section 3.4, code)."""
    return nn.Sequential(
        nn.LayerNorm(width_in),
        nn.Linear(width_in, hidden, bias=False),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width_out, bias=False),
        nn.LayerNorm(width_out),
    )


def _zeros(width_in: int, width_out: int) -> nn.Linear:
    """A linear map that is 0 at first. No bias: phi ends with a LayerNorm, which has a scale and a shift for all views."""
    made = nn.Linear(width_in, width_out, bias=False)
    nn.init.zeros_(made.weight)
    return made


def _cycle(count: int) -> Tensor:
    """A random permutation `(count,)` that is one cycle: nothing stays in its place."""
    order = torch.randperm(count)
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(1)
    return cycle


def _all_views(patch: Tensor) -> Tensor:
    """The view `(B * P,)` of every patch of `(B, P, W)`."""
    return torch.arange(len(patch), device=patch.device)[:, None].expand(patch.shape[:2]).reshape(-1)


def _widths(options: PureClipOptions, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """The embedding width D, and the width W of what phi sees. Raises `RecipeError` for columns that do not fit together."""
    patches, width = shapes[options.patch_column]
    for name in options.token_columns:
        if len(shapes[name]) != 2 or shapes[name][0] != patches:
            raise RecipeError(f"head: {name} is {shapes[name]}, {options.patch_column} has {patches} patches.")
    if options.cls and shapes[options.cls_column] != (width,):
        raise RecipeError(f"head: {options.cls_column} is {shapes[options.cls_column]}, patches are {width} wide.")
    return width, sum(shapes[name][1] for name in options.token_columns)


class PureClipHead(Head):
    """The head of PureCLIP-Depth: 11,815,680 parameters at D = 768, K = 15."""

    Options = PureClipOptions
    sees_valid_patches_only = True

    def __init__(self, options: PureClipOptions, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        """`shapes` gives `(P, D)` for the patch column and its layers, and `(D,)` for the CLS column.

        Raises `RecipeError` for an empty depth range or columns that do not fit together.
        """
        super().__init__()
        self.options = options
        self.grid = grid
        self.bins = options.depth_bins
        width, seen = _widths(options, shapes)
        beside = options.cls and options.fusion == "concat"
        self.phi = _mlp(seen, options.hidden * width, width, options.dropout)
        self.psi = _mlp(2 * width if beside else width, options.hidden * width, width, options.dropout)
        self.table = nn.Parameter(torch.randn(options.bins, width))
        self.film = _zeros(width, 2 * width) if options.cls and not beside else None
        self._shuffle = _cycle(options.bins) if options.table_init == "text-shuffled" else None
        smoothed = neighbour_targets(options.bins, options.label_smoothing) if options.label_smoothing else None
        self.register_buffer("centres", torch.as_tensor(self.bins.centres, dtype=torch.float32), persistent=False)
        self.register_buffer("edges", self.bins.edge_tensor(), persistent=False)
        self.register_buffer("smoothed", smoothed, persistent=False)
        self.centres: Tensor
        self.edges: Tensor
        self.smoothed: Tensor | None
        if not options.train_mlps:
            for part in (self.phi, self.psi, *([] if self.film is None else [self.film])):
                part.requires_grad_(False)

    @staticmethod
    def reads(options: PureClipOptions) -> tuple[str, ...]:
        """Patch tokens of all layers, and the CLS token if psi sees it."""
        return (*options.token_columns, options.cls_column) if options.cls else options.token_columns

    @staticmethod
    def phrases(options: PureClipOptions) -> tuple[str, ...]:
        """One prompt per bin if the table starts from texts. Raises `RecipeError` for a template without `{centre}`."""
        return prompts(options)

    def initialise(self, context: Context) -> None:
        """Fill the depth table (paper, section 2.3)."""
        if self.options.table_init == "random":
            return
        if self.options.table_init == "tokens":
            vectors = self._bin_means(context)
        else:
            vectors = context.text(self.phrases(self.options))
            vectors = vectors if self._shuffle is None else vectors[self._shuffle]
        if vectors.shape != self.table.shape:
            raise RecipeError(f"head: the table is {tuple(self.table.shape)}, its initial vectors are {tuple(vectors.shape)}.")
        with torch.no_grad():
            self.table.copy_(F.normalize(vectors.to(self.table), dim=-1))

    @torch.no_grad()
    def _bin_means(self, context: Context) -> Tensor:
        """Mean normalised token of each bin's patches `(K, D)`, in float64; an empty bin takes its nearest neighbour's."""
        sums = torch.zeros(self.table.shape, dtype=torch.float64)
        number = torch.zeros(self.options.bins, dtype=torch.float64)
        for batch in context.batches():
            target = batch.targets["embedding"]
            tokens = batch.columns[self.options.patch_column].flatten(0, 1)[target.flat]
            tokens = F.normalize(tokens.double(), dim=-1).cpu()
            bins = self._bins_of(target).cpu()
            sums.index_add_(0, bins, tokens)
            number += torch.bincount(bins, minlength=self.options.bins)
        filled = torch.nonzero(number).squeeze(1)
        if not len(filled):
            raise TrainingError("head.table_init = 'tokens': no training patch has valid depth inside the range of the head.")
        nearest = (torch.arange(len(number))[:, None] - filled).abs().argmin(dim=1)
        means: Tensor = sums[filled] / number[filled, None]
        return means[nearest]

    def embed(self, patch: Tensor, cls: Tensor | None, view: Tensor | None = None) -> Tensor:
        """Equations 9 and 10: unit vectors `(M, D)` of patch tokens `(M, W)` and CLS tokens `(B, D)`; `view (M,)` joins them.

        W is D times the layers that phi sees. Without `view` the patches are all of every view, `(B, P, W)`, and M is B * P.
        The CLS token is normalised before it is used, the patch token is not (as in the released code).
        """
        shared = None if cls is None else F.normalize(cls.float(), dim=-1)
        if self.training:
            return self._embed_in_training(patch, shared, view)
        rotated = self.phi(patch.flatten(0, -2).float()).to(self.table)
        if shared is not None and self.film is not None:
            rotated = self._modulate(rotated, shared, patch, view)
        elif shared is not None:
            own = shared[view] if view is not None else shared[:, None].expand(-1, patch.shape[1], -1).flatten(0, 1)
            rotated = torch.cat([rotated, own], dim=-1)
        return F.normalize(self.psi(rotated).to(self.table), dim=-1)

    def _embed_in_training(self, patch: Tensor, shared: Tensor | None, view: Tensor | None) -> Tensor:
        """The same to rounding, for less. Evaluation keeps to the modules, which an exporter can trace."""
        rotated = factored.mlp(self.phi, patch.flatten(0, -2).float())
        if shared is None:
            return factored.unit_rows(factored.mlp(self.psi, rotated))
        if self.film is not None:
            return factored.unit_rows(factored.mlp(self.psi, self._modulate(rotated, shared, patch, view)))
        view = _all_views(patch) if view is None else view
        return factored.unit_rows(factored.mlp_with_view(self.psi, rotated, shared, view))

    def _modulate(self, rotated: Tensor, shared: Tensor, patch: Tensor, view: Tensor | None) -> Tensor:
        """FiLM: `(1 + s) * z + t` of rotated tokens z; s and t are linear in the view's CLS token and computed once per view.

        Patches take those of their view by a product with zeros and ones: the gradient of a row lookup is summed in an order
        that the threads decide.
        """
        assert self.film is not None
        with without_autocast(rotated):
            maps = self.film(shared)
            if view is None:
                maps = maps[:, None].expand(-1, patch.shape[1], -1).flatten(0, 1)
            else:
                maps = (view[:, None] == torch.arange(len(shared), device=view.device)).to(maps.dtype) @ maps
            scale, shift = maps.chunk(2, dim=-1)
            return torch.addcmul(rotated + shift, rotated, scale)

    def expected_depth(self, fused: Tensor) -> Tensor:
        """Equations 3 to 5: metres `(M,)` of unit vectors `(M, D)`."""
        with without_autocast(fused):
            return self.probabilities(fused) @ self.centres

    def probabilities(self, fused: Tensor) -> Tensor:
        """Equations 3 and 4: `(M, K)`."""
        return (self.cosines(fused) / self.options.temperature).softmax(dim=-1)

    def cosines(self, fused: Tensor) -> Tensor:
        """Products of unit vectors `(M, D)` with those of the table: `(M, K)`. The temperature multiplies their errors."""
        with without_autocast(fused):
            return fused @ self.unit_table().T

    def unit_table(self) -> Tensor:
        """The depth table with unit rows `(K, D)`."""
        return F.normalize(self.table, dim=-1)

    def _tokens(self, columns: Mapping[str, Tensor], flat: Tensor | None = None) -> Tensor:
        """What phi sees of all patches `(B, P, W)`, or `(M, W)` of those numbered `flat` in the flattened `(B * P)` axis."""
        found = [columns[name] for name in self.options.token_columns]
        if flat is not None:
            found = [tokens.flatten(0, 1)[flat] for tokens in found]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _cls(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        return columns[self.options.cls_column] if self.options.cls else None

    def _bins_of(self, target: PatchTargets) -> Tensor:
        """The true bins `(M,)` of the patches that count."""
        return self.bins.index(target.mean.reshape(-1)[target.flat], self.edges)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` of all patches."""
        return self.distribution(columns).mean

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution:
        """Equations 3 and 4 for all patches: `(B, P, K)`."""
        tokens = self._tokens(columns)
        fused = self.embed(tokens, self._cls(columns))
        return Distribution(self.probabilities(fused).reshape(*tokens.shape[:2], -1), self.centres)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Equation 11 in phase `embedding`, equation 15 in phase `depth`, over the patches that count."""
        target = batch.targets[phase]
        if not len(target.flat):
            return {"total": self.table.detach().new_zeros(())}
        fused = self.embed(self._tokens(batch.columns, target.flat), self._cls(batch.columns), target.view)
        if phase == "depth":
            return {"total": self._depth_loss(fused, target)}
        weights, cosines = self.options.embedding, self.cosines(fused)
        bins = self._bins_of(target)
        align = alignment_loss(cosines, bins)
        nce = info_nce_loss(cosines, bins, self.options.temperature, self.smoothed)
        return {"total": weights.alignment * align + weights.info_nce * nce, "alignment": align, "info_nce": nce}

    def _depth_loss(self, fused: Tensor, target: PatchTargets) -> Tensor:
        depth = torch.zeros_like(target.mean).reshape(-1).index_put((target.flat,), self.expected_depth(fused))
        per_map = self.options.depth.rmse_over == "map"
        return pixel_rmse(depth.reshape(target.mean.shape), target.count, target.mean, target.var, per_map=per_map)

    def phases(self) -> tuple[Phase, ...]:
        """Two optimisers that take turns (paper, section 2.5), starting with the embedding phase."""
        everything = [(name, value) for name, value in self.named_parameters() if value.requires_grad]
        no_table = [(name, value) for name, value in everything if name != "table"]
        embedding, depth = self.options.embedding, self.options.depth
        candidates: list[tuple[str, Any, list[tuple[str, nn.Parameter]]]] = [
            ("embedding", embedding, everything),
            ("depth", depth, everything if depth.train_table else no_table),
        ]
        return tuple(
            Phase(name, settings.steps, parameters, settings.lr, settings.weight_decay)
            for name, settings, parameters in candidates
            if settings.steps and parameters
        )
