"""The losses of PureCLIP-Depth, and those that depth heads share, as pure functions on tensors.

Shapes: M patches that supervise, K depth bins, D embedding width, B maps of P patches. Depths are metres.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd.device import without_autocast


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


def silog(
    depth: Tensor,
    truth: Tensor,
    weight: Tensor | None = None,
    *,
    variance_focus: float = 0.85,
    scale: float = 10.0,
    root: bool = True,
) -> Tensor:
    """The scale-invariant logarithmic loss over the batch: `scale * sqrt(mean(g^2) - variance_focus * mean(g)^2)`.

    `g = log depth - log truth` of the cells `(M,)` that count, both above 0; means are weighted by `weight` `(M,)`, such as
    their pixels, or all alike. Without `root` the square itself, times `scale` (Eigen's form, there with a focus of 0.5).
    BTS and AdaBins take 0.85 and 10; that of DINOv2's probe has the unbiased variance and adds 0.001 in both logarithms.

    Exact where a cell is a pixel. On patches the mean depth of a patch stands for its pixels, and the logarithm of a mean is
    not the mean of the logarithms: it is larger, by about var / (2 mean^2), and the depth that suits it best too far by that
    share. Returns 0 with a zero gradient if nothing counts or nothing is wrong.
    """
    with without_autocast(depth):
        error = _wide(depth).log() - truth.log()
        mean = _weighted_mean(error, weight)
        # the same as above without a difference of large numbers
        square = _weighted_mean((error - mean) ** 2, weight) + (1.0 - variance_focus) * mean**2
        return scale * (_safe_sqrt(square) if root else square)


def masked_l1(depth: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute error in metres of the cells `(M,)` that count, weighted by `weight` `(M,)`, such as their pixels.

    Exact where a cell is a pixel. On patches it is the error of the patch means, which is at most that of the pixels: what
    they differ by inside a patch is left out. Returns 0 with a zero gradient if nothing counts.
    """
    with without_autocast(depth):
        return _weighted_mean((_wide(depth) - truth).abs(), weight)


def log_gradient(depth: Tensor, truth: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Gradient matching (MegaDepth): how much `g = log depth - log truth` differs between neighbours, on maps `(B, h, w)`.

    At each of `scales` scales every 1st, 2nd, 4th ... cell is taken in both directions; the absolute differences of g to the
    right and below, where both cells are `valid`, are added and divided by the number of valid cells. The sum over the scales
    for which a map is large enough. Depths that are not valid may be any number above 0, truths anything.
    """
    with without_autocast(depth):
        error = torch.where(valid, _wide(depth).log() - torch.where(valid, truth, 1.0).log(), 0.0)
        keep, total = valid.to(error), error.new_zeros(())
        for _ in range(scales):
            right = (error[:, :, 1:] - error[:, :, :-1]).abs() * keep[:, :, 1:] * keep[:, :, :-1]
            below = (error[:, 1:] - error[:, :-1]).abs() * keep[:, 1:] * keep[:, :-1]
            total = total + (right.sum() + below.sum()) / keep.sum().clamp(min=1)
            error, keep = error[:, ::2, ::2], keep[:, ::2, ::2]
        return total


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of `(M,)`; 0 if nothing has a weight."""
    if weight is None:
        return values.sum() / max(len(values), 1)
    weight = weight.to(values)
    return (values * weight).sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def _safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, torch.ones_like(value)).sqrt(), torch.zeros_like(value))
