"""The losses of PureCLIP-Depth as pure functions on tensors.

Shapes: M patches that supervise, K depth bins, D embedding width, B maps of P patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(cosines: Tensor, bins: Tensor) -> Tensor:
    """Equation 14: mean of `1 - z . w_y` over patches, from all cosines `(M, K)` and the true bins `(M,)`.

    Gathered from the cosines rather than from the table: the gradient of a row lookup is summed in an order that the threads
    decide, and two runs would differ in the last bit.
    """
    return (1 - cosines.gather(1, bins[:, None])).mean()


def info_nce_loss(cosines: Tensor, bins: Tensor, temperature: float, targets: Tensor | None = None) -> Tensor:
    """Equation 13: cross-entropy of the scores `z . w_j / temperature` `(M, K)` against the true bin, mean over patches.

    With `targets` `(K, K)`, see `neighbour_targets`, against row `y` of them instead of the true bin `y` alone:
    `-sum_j targets[y, j] log softmax(scores)_j`. Its smallest value is then the entropy of the row instead of 0.
    """
    return F.cross_entropy(cosines / temperature, bins if targets is None else targets[bins])


def neighbour_targets(count: int, width: float) -> Tensor:
    """Label smoothing over neighbouring bins: row `y` of `(count, count)` is the target of a patch whose true bin is `y`.

    `q[y, j] = exp(-((j - y) / width)^2 / 2) / sum_k exp(-((k - y) / width)^2 / 2)`: a Gaussian of standard deviation `width`,
    which is counted in bins whatever their widths in metres, over the bins there are. Every row sums to 1; at either end of the
    range what would fall beyond goes to the other bins in proportion.
    """
    number = torch.arange(count, dtype=torch.float64)
    weights = torch.exp(-(((number - number[:, None]) / width) ** 2) / 2)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def pixel_rmse(depth: Tensor, count: Tensor, mean: Tensor, var: Tensor, *, per_map: bool) -> Tensor:
    """Equation 15 under nearest upsampling, exactly, from patch statistics. All arguments are `(B, P)`.

    A prediction is constant over its patch, so the sum of squared pixel errors of a patch is
    `count * ((depth - mean)^2 + var)`: no pixel is touched. `per_map` takes one square root per map and averages the maps that
    have a valid pixel (the paper); otherwise one square root over all pixels of the batch (the released code).
    Returns 0 with a zero gradient if no pixel is valid.
    """
    squares = count * ((depth - mean) ** 2 + var)
    if not per_map:
        return _safe_sqrt(squares.sum() / count.sum().clamp(min=1))
    pixels = count.sum(dim=-1)
    roots = _safe_sqrt(squares.sum(dim=-1) / pixels.clamp(min=1))
    return roots.sum() / (pixels > 0).sum().clamp(min=1)


def _safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, torch.ones_like(value)).sqrt(), torch.zeros_like(value))
