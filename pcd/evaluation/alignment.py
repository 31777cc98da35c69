"""Fitting a prediction to its ground truth before scoring, image by image, in float64.

A metric method is scored without alignment. The other protocols ask how good the shape is once scale (and shift) are given
away, as papers on relative depth do; their numbers are not comparable with unaligned ones.

    median              d * median(g) / median(d)                       (Zhou et al. 2017)
    lsq-depth           s * d + t fitted to g                           (Marigold)
    lsq-disparity       s / d + t fitted to 1 / g                       (MiDaS)
    lsq-sqrt-disparity  s / sqrt(d) + t fitted to 1 / sqrt(g), squared  (DepthMaster)

Fits are least squares over the valid pixels. Disparities below 1e-3 per metre are raised to it before they are inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from pcd.errors import PredictionError, UsageError
from pcd.evaluation.protocol import Alignment

ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)

MIN_DISPARITY = 1e-3
"""Per metre: no aligned depth is beyond 1 km."""


def fit_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that minimise `sum (scale * x + shift - y)^2` over `(n,)` float64 values.

    For an `x` without any spread the scale is 0 and the shift the mean of `y`.
    """
    centred = x - x.mean()
    spread = centred.square().sum()
    scale = torch.where(spread > 0, (centred * (y - y.mean())).sum() / spread, 0.0)
    return scale, y.mean() - scale * x.mean()


def _median(pred: Tensor, chosen: Tensor, gt: Tensor) -> Tensor:
    middle = torch.quantile(chosen, 0.5)  # the mean of the two middle values for an even number, as NumPy's median
    return pred * (torch.quantile(gt, 0.5) / middle)


def _in_depth(pred: Tensor, chosen: Tensor, gt: Tensor) -> Tensor:
    scale, shift = fit_line(chosen, gt)
    return scale * pred + shift


def _in_disparity(pred: Tensor, chosen: Tensor, gt: Tensor) -> Tensor:
    scale, shift = fit_line(1 / chosen, 1 / gt)
    return 1 / (scale / pred + shift).clamp_min(MIN_DISPARITY)


def _in_sqrt_disparity(pred: Tensor, chosen: Tensor, gt: Tensor) -> Tensor:
    scale, shift = fit_line(chosen.rsqrt(), gt.rsqrt())
    return 1 / (scale * pred.rsqrt() + shift).square().clamp_min(MIN_DISPARITY)


_METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "median": _median,
    "lsq-depth": _in_depth,
    "lsq-disparity": _in_disparity,
    "lsq-sqrt-disparity": _in_sqrt_disparity,
}


def align(pred: Tensor, gt: Tensor, method: str, mask: Tensor | None = None) -> Tensor:
    """One prediction fitted to its ground truth over the valid pixels (all without a mask): one shape, metres, to float64.

    Without a valid pixel, or for "none", the prediction comes back as it is. The result may be negative after a fit in depth,
    and means nothing where an invalid pixel was not predicted positive. Raises `UsageError` for an unknown method and
    `PredictionError` if a valid pixel was not predicted positive.
    """
    pred = pred.double()
    if method == "none":
        return pred
    if method not in _METHODS:
        raise UsageError(f"alignment = {method!r}: known are {', '.join(ALIGNMENTS)}.")
    chosen, truth = (pred.flatten(), gt.flatten()) if mask is None else (pred[mask], gt[mask])
    if not len(chosen):
        return pred
    if not bool((chosen > 0).all()):
        raise PredictionError(
            f"alignment {method!r} needs positive predictions, but the smallest is {float(chosen.min()):g} m; "
            "score without alignment, or mend the head."
        )
    return _METHODS[method](pred, chosen, truth.double())
