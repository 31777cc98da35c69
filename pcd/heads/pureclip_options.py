"""`[head]` of `name = "pureclip"`: its keys, and what follows from them alone: the columns read, the bins and their prompts.

Where paper and released code disagree there is a key; `pipelines/README.md` lists them, and those that neither has.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pcd.errors import RecipeError
from pcd.heads.base import HeadOptions
from pcd.heads.bins import DepthBins, Spacing
from pcd.recipe import Positive, Section

Weight = Annotated[float, Field(ge=0)]
Layers = Annotated[
    tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


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
    spacing: Spacing = "even"
    """Bins of one width, or each a constant factor wider than the one before (`log`, which needs `min_depth` above 0)."""
    hidden: Annotated[int, Field(gt=0)] = 4
    """Hidden width of the MLPs in multiples of the embedding width D."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    temperature: Positive = 0.07
    """tau of equations 3 and 13."""
    label_smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How far the target of InfoNCE spreads to neighbouring bins: the standard deviation of a Gaussian, counted in bins, see
    `pcd.losses.neighbour_targets`. 0: the true bin alone (equation 13)."""
    cls: bool = True
    """Whether psi sees the CLS token (False: psi maps from D, the paper's table 4)."""
    fusion: Literal["concat", "film"] = "concat"
    """How psi sees it: beside the rotated token (equation 10), or as a scale and a shift of its channels."""
    train_mlps: bool = True
    """False: phi, psi and the maps of `film` stay as drawn (the paper's table 3)."""
    table_init: Literal["text", "text-shuffled", "random", "tokens"] = "text"
    """Text embeddings of the prompts; the same, but no bin given its own (a permutation drawn with the run's first weights, so
    by `train.seed`); random; or the mean normalised token of each bin's patches."""
    prompt: str = "{centre:.2f} meter"
    patch_column: str = "clip/patch"
    layers: Layers = ()
    """Layers whose tokens, column `PATCH_COLUMN@LAYER`, phi sees beside those of `patch_column`."""
    cls_column: str = "clip/cls"
    embedding: EmbeddingPhase = EmbeddingPhase()
    depth: DepthPhase = DepthPhase()

    @field_validator("spacing")
    @classmethod
    def _log_starts_above_zero(cls, value: Spacing, info: ValidationInfo) -> Spacing:
        if value == "log" and info.data.get("min_depth", 1.0) <= 0:
            raise PydanticCustomError("spacing", "bins that grow by a constant factor need a min_depth above 0")
        return value

    @field_validator("layers")
    @classmethod
    def _layers_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("layers", "a layer is named twice")
        return value

    @property
    def token_columns(self) -> tuple[str, ...]:
        """What phi sees, in the order of its inputs: the columns of patch tokens."""
        return (self.patch_column, *(f"{self.patch_column}@{layer}" for layer in self.layers))

    @property
    def depth_bins(self) -> DepthBins:
        """The depth bins. Raises `RecipeError` for an empty depth range."""
        if not 0 <= self.min_depth < self.max_depth:
            raise RecipeError(f"head: min_depth = {self.min_depth}, max_depth = {self.max_depth}: the range is empty.")
        return DepthBins(self.min_depth, self.max_depth, self.bins, self.spacing)


def prompts(options: PureClipOptions) -> tuple[str, ...]:
    """One prompt per bin if the table starts from texts, else none. Raises `RecipeError` for a template without `{centre}`."""
    if options.table_init not in ("text", "text-shuffled"):
        return ()
    centres = options.depth_bins.centres
    try:
        found = tuple(options.prompt.format(centre=centre) for centre in centres)
    except (KeyError, IndexError, ValueError) as error:
        raise RecipeError(
            f"head.prompt = {options.prompt!r}: {error!r}; use a template such as '{{centre:.2f}} meter'."
        ) from None
    if len(set(found)) == 1:
        raise RecipeError(f"head.prompt = {options.prompt!r} gives the same text for every bin; it needs {{centre}}.")
    return found
