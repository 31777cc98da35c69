"""PureCLIP-Depth: depth as a rotation inside CLIP's embedding space.

Two MLPs, phi and psi, turn a patch token into a unit vector that is compared with a table of learnable depth vectors; the
softmax over the table weighs the centres of the depth bins. Equations and sections are those of the paper. Where paper and
released code disagree there is an option; `pipelines/README.md` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pcd.errors import RecipeError, TrainingError
from pcd.heads import factored
from pcd.heads.base import Batch, Context, Head, HeadOptions, Phase, gather_valid
from pcd.heads.bins import DepthBins, Distribution
from pcd.losses import alignment_loss, info_nce_loss, pixel_rmse
from pcd.recipe import Positive, Section

Weight = Annotated[float, Field(ge=0)]


class EmbeddingPhase(Section):
    """`[head.embedding]`: the phase of equation 11."""

    steps: Annotated[int, Field(ge=0)] = 100
    lr: Positive = 3e-4
    weight_decay: Weight = 1e-2
    alignment: Weight = 1.0
    info_nce: Weight = 1.0
    """lambda of equation 11."""


class DepthPhase(Section):
    """`[head.depth]`: the phase of equation 12."""

    steps: Annotated[int, Field(ge=0)] = 100
    """0 leaves the phase out, as in the ablations without the RMSE loss."""
    lr: Positive = 1e-3
    weight_decay: Weight = 0.0
    train_table: bool = False
    """False: the table is frozen in this phase (the paper); True: it is trained (the released code)."""
    rmse_over: Literal["map", "batch"] = "map"
    """One square root per depth map (equation 15), or one per batch (the released code)."""


class PureClipOptions(HeadOptions):
    """`[head]` of `name = "pureclip"`."""

    bins: Annotated[int, Field(gt=1)] = 15
    hidden: Annotated[int, Field(gt=0)] = 4
    """Hidden width of the MLPs in multiples of the embedding width D."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    temperature: Positive = 0.07
    """tau of equations 3 and 13."""
    cls: bool = True
    """Whether psi sees the CLS token (False: psi maps from D, the paper's table 4)."""
    train_mlps: bool = True
    """False: phi and psi stay as drawn (the paper's table 3)."""
    table_init: Literal["text", "random", "tokens"] = "text"
    """Text embeddings of the prompts, random, or the mean normalised token of each bin's patches."""
    prompt: str = "{centre:.2f} meter"
    patch_column: str = "clip/patch"
    cls_column: str = "clip/cls"
    embedding: EmbeddingPhase = EmbeddingPhase()
    depth: DepthPhase = DepthPhase()


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


class PureClipHead(Head):
    """The head of PureCLIP-Depth: 11,815,680 parameters at D = 768, K = 15."""

    Options = PureClipOptions

    def __init__(self, options: PureClipOptions, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        """`shapes` gives `(P, D)` for the patch column and `(D,)` for the CLS column.

        Raises `RecipeError` for an empty depth range or CLS tokens of another width than the patches.
        """
        super().__init__()
        if not 0 <= options.min_depth < options.max_depth:
            raise RecipeError(f"head: min_depth = {options.min_depth}, max_depth = {options.max_depth}: the range is empty.")
        self.options = options
        self.grid = grid
        self.bins = DepthBins(options.min_depth, options.max_depth, options.bins)
        width = shapes[options.patch_column][-1]
        if options.cls and shapes[options.cls_column] != (width,):
            raise RecipeError(f"head: {options.cls_column} is {shapes[options.cls_column]}, patches are {width} wide.")
        self.phi = _mlp(width, options.hidden * width, width, options.dropout)
        self.psi = _mlp(2 * width if options.cls else width, options.hidden * width, width, options.dropout)
        self.table = nn.Parameter(torch.randn(options.bins, width))
        self.register_buffer("centres", torch.as_tensor(self.bins.centres, dtype=torch.float32), persistent=False)
        self.centres: Tensor
        if not options.train_mlps:
            self.phi.requires_grad_(False)
            self.psi.requires_grad_(False)

    @staticmethod
    def reads(options: PureClipOptions) -> tuple[str, ...]:
        """Patch tokens, and the CLS token if psi sees it."""
        return (options.patch_column, options.cls_column) if options.cls else (options.patch_column,)

    @staticmethod
    def phrases(options: PureClipOptions) -> tuple[str, ...]:
        """One prompt per bin with `table_init = "text"`. Raises `RecipeError` for a template without `{centre}`."""
        if options.table_init != "text":
            return ()
        centres = DepthBins(options.min_depth, options.max_depth, options.bins).centres
        try:
            prompts = tuple(options.prompt.format(centre=centre) for centre in centres)
        except (KeyError, IndexError, ValueError) as error:
            raise RecipeError(
                f"head.prompt = {options.prompt!r}: {error!r}; use a template such as '{{centre:.2f}} meter'."
            ) from None
        if len(set(prompts)) == 1:
            raise RecipeError(f"head.prompt = {options.prompt!r} gives the same text for every bin; it needs {{centre}}.")
        return prompts

    def initialise(self, context: Context) -> None:
        """Fill the depth table (paper, section 2.3)."""
        if self.options.table_init == "random":
            return
        if self.options.table_init == "text":
            vectors = context.text(self.phrases(self.options))
        else:
            vectors = self._bin_means(context)
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
            flat, _ = gather_valid(target.valid)
            tokens = F.normalize(batch.columns[self.options.patch_column].flatten(0, 1)[flat].double(), dim=-1).cpu()
            bins = self.bins.index(target.mean.reshape(-1)[flat]).cpu()
            sums.index_add_(0, bins, tokens)
            number += torch.bincount(bins, minlength=self.options.bins)
        filled = torch.nonzero(number).squeeze(1)
        if not len(filled):
            raise TrainingError("head.table_init = 'tokens': no training patch has valid depth inside the range of the head.")
        nearest = (torch.arange(len(number))[:, None] - filled).abs().argmin(dim=1)
        means: Tensor = sums[filled] / number[filled, None]
        return means[nearest]

    def embed(self, patch: Tensor, cls: Tensor | None, view: Tensor) -> Tensor:
        """Equations 9 and 10: unit vectors `(M, D)` of patch tokens `(M, D)` and CLS tokens `(B, D)`; `view (M,)` joins them.

        The CLS token is normalised before the concatenation, the patch token is not (as in the released code).
        """
        shared = None if cls is None else F.normalize(cls.float(), dim=-1)
        if self.training:
            return self._embed_in_training(patch, shared, view)
        rotated = self.phi(patch.float())
        if shared is not None:
            rotated = torch.cat([rotated, shared[view]], dim=-1)
        return F.normalize(self.psi(rotated), dim=-1)

    def _embed_in_training(self, patch: Tensor, shared: Tensor | None, view: Tensor) -> Tensor:
        """The same to rounding, for less. Evaluation keeps to the modules, which an exporter can trace."""
        rotated = factored.mlp(self.phi, patch.float())
        if shared is None:
            return factored.unit_rows(factored.mlp(self.psi, rotated))
        return factored.unit_rows(factored.mlp_with_view(self.psi, rotated, shared, view))

    def expected_depth(self, fused: Tensor) -> Tensor:
        """Equations 3 to 5: metres `(M,)` of unit vectors `(M, D)`."""
        return self.probabilities(fused) @ self.centres

    def probabilities(self, fused: Tensor) -> Tensor:
        """Equations 3 and 4: `(M, K)`."""
        return (fused @ self.unit_table().T / self.options.temperature).softmax(dim=-1)

    def unit_table(self) -> Tensor:
        """The depth table with unit rows `(K, D)`."""
        return F.normalize(self.table, dim=-1)

    def _embed_where(self, columns: Mapping[str, Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the patches that count, and their numbers in the flattened `(B * P)` axis."""
        flat, view = gather_valid(valid)
        patch = columns[self.options.patch_column].flatten(0, 1)[flat]
        cls = columns[self.options.cls_column] if self.options.cls else None
        return self.embed(patch, cls, view), flat

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` of all patches."""
        return self.distribution(columns).mean

    def distribution(self, columns: Mapping[str, Tensor]) -> Distribution:
        """Equations 3 and 4 for all patches: `(B, P, K)`."""
        patch = columns[self.options.patch_column]
        everywhere = torch.ones(patch.shape[:2], dtype=torch.bool, device=patch.device)
        fused, _ = self._embed_where(columns, everywhere)
        return Distribution(self.probabilities(fused).reshape(*patch.shape[:2], -1), self.centres)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Equation 11 in phase `embedding`, equation 15 in phase `depth`, over the patches that count."""
        target = batch.targets[phase]
        if not bool(target.valid.any()):
            return {"total": self.table.detach().new_zeros(())}
        fused, flat = self._embed_where(batch.columns, target.valid)
        if phase == "depth":
            return {"total": self._depth_loss(fused, flat, batch)}
        weights, cosines = self.options.embedding, fused @ self.unit_table().T
        bins = self.bins.index(target.mean.reshape(-1)[flat])
        align = alignment_loss(cosines, bins)
        nce = info_nce_loss(cosines, bins, self.options.temperature)
        return {"total": weights.alignment * align + weights.info_nce * nce, "alignment": align, "info_nce": nce}

    def _depth_loss(self, fused: Tensor, flat: Tensor, batch: Batch) -> Tensor:
        target = batch.targets["depth"]
        depth = torch.zeros_like(target.mean).reshape(-1).index_put((flat,), self.expected_depth(fused))
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
