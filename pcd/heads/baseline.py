"""What the baseline heads share: options, the last step from channels to a depth, losses, and the one phase they train in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.errors import TrainingError
from pcd.heads.base import Context, Head, HeadOptions, PatchTargets, Phase
from pcd.heads.bins import DepthBins, Distribution, Spacing
from pcd.losses import log_gradient, masked_l1, pixel_rmse, silog
from pcd.recipe import Names, Positive, Section

Weight = Annotated[float, Field(ge=0)]
PHASE = "depth"


class Loss(Section):
    """`[head.loss]`: what is minimised over the patches, or pixels, that count for `[targets.depth]`."""

    kind: Literal["silog", "l1", "rmse"] = "silog"
    """`pcd.losses.silog`, mean absolute error, or root mean squared error. Each is one mean over the batch."""
    variance_focus: Annotated[float, Field(ge=0, le=1)] = 0.85
    """lambda of silog: 1 forgives a wrong scale of the whole batch, 0 does not."""
    scale: Positive = 10.0
    """alpha of silog."""
    root: bool = True
    """Whether silog takes the square root (BTS, AdaBins, DINOv2) or not (Eigen)."""
    weight: Literal["pixels", "patches"] = "pixels"
    """What counts alike. With `pixels` a patch weighs as much as it has pixels, and `rmse` is exactly that of the pixels; with
    `patches` every patch weighs the same, and only its mean depth is looked at."""
    gradient: Weight = 0.0
    """Weight of `pcd.losses.log_gradient` beside it. The one released with DINOv2 is not that: it takes its differences along
    the axes of images and channels, and is 0 for fewer than three images a step."""


class BaselineOptions(HeadOptions):
    """Keys of `[head]` that all baselines have."""

    model_config = ConfigDict(validate_default=True)

    columns: Names = ("clip/patch",)
    """Patch tokens or maps: `["clip/patch", "clip/patch@6"]`."""
    output: Literal["bins", "depth", "log-depth"] = "bins"
    """What the last layer gives: scores of depth bins, a depth in metres, or its logarithm."""
    bins: Annotated[int, Field(gt=1)] = 256
    spacing: Spacing = "even"
    normalisation: Literal["linear", "softmax"] = "linear"
    """How scores become probabilities: `relu(x) + floor` divided by their sum (AdaBins, DINOv2), or a softmax."""
    floor: Positive = 0.1
    """Of the linear normalisation: what a bin with no score at all has."""
    start: Literal["data", "random"] = "data"
    """The bias of the last layer before training: such that it alone gives the mean (log) depth of the training patches, or of
    bins how often each occurs, for which the training rows are read once; or as drawn: with bins the middle of the range."""
    loss: Loss = Loss()
    lr: Positive = 1e-3
    weight_decay: Weight = 1e-2
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""

    @field_validator("columns")
    @classmethod
    def _columns_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise PydanticCustomError("columns", "expected one column or more, each named once")
        return value

    @field_validator("max_depth")
    @classmethod
    def _range_is_not_empty(cls, value: float, info: ValidationInfo) -> float:
        low = info.data.get("min_depth", 0.0)
        if not 0 <= low < value:
            raise PydanticCustomError("range", "expected 0 <= min_depth < max_depth, min_depth is {low}", {"low": low})
        return value

    @field_validator("output", "spacing")
    @classmethod
    def _log_starts_above_zero(cls, value: str, info: ValidationInfo) -> str:
        if value.startswith("log") and info.data.get("min_depth", 1.0) <= 0:
            raise PydanticCustomError("log", "logarithms of depth need a min_depth above 0")
        return value

    @property
    def raw_channels(self) -> int:
        """Channels of the last layer."""
        return self.bins if self.output == "bins" else 1

    def phase(self, head: Head) -> Phase:
        """The one phase: all parameters at one rate."""
        momentum = self.momentum if self.optimiser == "sgd" else 0.0
        parameters = tuple(head.named_parameters())
        return Phase(PHASE, 1, parameters, self.lr, self.weight_decay, self.optimiser, momentum)


class DepthOutput(nn.Module):
    """From the channels of the last layer `(..., K)` to metres `(...)`; no parameters.

    Bins: expectation of the bin centres. DINOv2's 256 "bins" are equally spaced points from `min_depth` to `max_depth`, ends
    included; here they are the middles of 256 equal intervals, at most 0.2 % of the range away.
    `depth`: `min_depth + softplus(x)`, smooth where the published code has a ReLU, behind which a patch stops learning.
    `log-depth`: `exp(x)`.
    """

    def __init__(self, options: BaselineOptions) -> None:
        super().__init__()
        self._options = options
        bins = DepthBins(options.min_depth, options.max_depth, options.bins, options.spacing)
        centres = torch.as_tensor(bins.centres, dtype=torch.float32) if options.output == "bins" else None
        self.register_buffer("centres", centres, persistent=False)
        self.centres: Tensor | None

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of the bins, `(..., K)`, float32."""
        with without_autocast(scores):
            if self._options.normalisation == "softmax":
                return scores.float().softmax(dim=-1)
            kept = scores.float().relu() + self._options.floor
            return kept / kept.sum(dim=-1, keepdim=True)

    def forward(self, raw: Tensor) -> Tensor:
        """Metres as they are trained, above 0, float32; `depth` and `log-depth` may leave the range of the head."""
        with without_autocast(raw):
            if self.centres is not None:
                return self.probabilities(raw) @ self.centres
            value = raw.squeeze(-1).float()
            return value.exp() if self._options.output == "log-depth" else self._options.min_depth + F.softplus(value)

    def bounded(self, raw: Tensor) -> Tensor:
        """Metres inside the range of the head, as they are given to others."""
        depth: Tensor = self(raw)
        return depth.clamp(self._options.min_depth, self._options.max_depth)

    def distribution(self, scores: Tensor) -> Distribution | None:
        """Of scores `(B, P, K)`; None without bins."""
        return None if self.centres is None else Distribution(self.probabilities(scores), self.centres)

    @torch.no_grad()
    def start(self, bias: Tensor, context: Context) -> None:
        """Set the bias of the last layer, `(K,)` or `(1,)`, as the option `start` says.

        Raises `TrainingError` if no training patch counts.
        """
        if self._options.start == "random":
            return
        found = torch.cat([target.mean.reshape(-1)[target.flat].double().cpu() for target in _targets(context)])
        if not len(found):
            raise TrainingError('head.start = "data": no training patch has valid depth inside the range of the head.')
        if self.centres is not None:
            bias.copy_(self._scores_of(found))
        elif self._options.output == "log-depth":
            bias.fill_(float(found.log().mean()))
        else:
            bias.fill_(math.log(math.expm1(max(float(found.mean()) - self._options.min_depth, 1e-3))))

    def _scores_of(self, truth: Tensor) -> Tensor:
        """Scores `(K,)` whose probabilities are nearly the shares of the bins among depths `(N,)`: one part in ten is spread
        evenly over all bins, so that those of no patch can still be learnt."""
        options = self._options
        bins = DepthBins(options.min_depth, options.max_depth, options.bins, options.spacing)
        shares = torch.bincount(bins.index(truth), minlength=options.bins).double() / len(truth)
        if options.normalisation == "softmax":
            return (0.9 * shares + 0.1 / options.bins).log()
        return 9 * options.floor * options.bins * shares  # the floors of all bins together weigh floor * bins


def _targets(context: Context) -> Iterator[PatchTargets]:
    return (batch.targets[PHASE] for batch in context.batches())


def depth_losses(options: BaselineOptions, depth: Tensor, target: PatchTargets, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Losses of the depths `(M,)` of the cells that count, in the order of `target.flat`; `grid` of the target's cells."""
    settings = options.loss
    mean, count, var = (values.reshape(-1)[target.flat] for values in (target.mean, target.count, target.var))
    weight = count if settings.weight == "pixels" else None
    if settings.kind == "silog":
        focus, scale, root = settings.variance_focus, settings.scale, settings.root
        found = silog(depth, mean, weight, variance_focus=focus, scale=scale, root=root)
    elif settings.kind == "l1":
        found = masked_l1(depth, mean, weight)
    elif weight is None:
        found = pixel_rmse(depth, torch.ones_like(count), mean, torch.zeros_like(var), per_map=False)
    else:
        found = pixel_rmse(depth, count, mean, var, per_map=False)
    if not settings.gradient:
        return {"total": found}
    maps = torch.ones_like(target.mean).reshape(-1).index_put((target.flat,), depth)
    shape = (-1, *grid)
    gradient = log_gradient(maps.reshape(shape), target.mean.reshape(shape), target.valid.reshape(shape))
    return {"total": found + settings.gradient * gradient, settings.kind: found, "gradient": gradient}


def nothing(like: Tensor) -> dict[str, Tensor]:
    """Losses of a batch that teaches nothing."""
    return {"total": like.detach().new_zeros(())}
