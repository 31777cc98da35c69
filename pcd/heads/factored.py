"""The MLPs of PureCLIP as a training step computes them: the functions and gradients of the modules with fewer products.

With M patches, width D and hidden width H the modules take 15 M D H multiplications forward and backward, these take 11.

* A LayerNorm before a Linear is folded into its weights: `W (gamma * x + beta) = (W * gamma) x + W beta`. The gradients of
  gamma and beta then follow from those of the folded weights instead of from a gradient at every patch, and tokens, which are
  constant, get none at all.
* The CLS half of psi's input is the same for all patches of a view: its share of the LayerNorm's mean and variance, and its
  product with the weights, are computed once per view.
* GELU, Dropout and the Linears around them are one node of the graph, which keeps two hidden tensors `(M, H)` instead of three.

Under `torch.autocast` the two large products of an MLP are computed in its type, with all their inputs and gradients rounded to
it, and everything else in float32.

Nothing here has parameters: the head's `nn.Sequential`s keep theirs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ALIGNMENT = 8
"""Columns of a product are padded to a multiple of this; others take up to 1.5 times as long on a CPU."""
SMALLEST_NORM = 1e-12
"""That of `F.normalize`."""


def mlp(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """`layers(inputs)`, `(M, D)` to `(M, E)`: LayerNorm, Linear, GELU, Dropout, Linear, LayerNorm, both Linear without bias."""
    product = _product_type(inputs)
    with _no_autocast(inputs):
        norm, weight, bias = _folded(layers)
        inputs = F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
        return _after_norm(layers, inputs, weight, bias, product)


def mlp_with_view(layers: nn.Sequential, inputs: Tensor, shared: Tensor, view: Tensor) -> Tensor:
    """`layers(cat([inputs, shared[view]], dim=-1))`: patches `(M, D)`, constants of the views `(B, C)`, `view (M,)` joins them.

    The first product takes the columns of `_Standardised`, D + B + 1 and a few of zeros, instead of D + C. It pays for B well
    below C.
    """
    product = _product_type(inputs)
    with _no_autocast(inputs):
        norm, weight, bias = _folded(layers)
        own, common = torch.split(weight, [inputs.shape[1], shared.shape[1]], dim=1)
        share = inputs.shape[1] / weight.shape[1]
        per_view = common @ (shared - shared.mean(dim=1, keepdim=True)).T
        per_gap = (1 - share) * own.sum(dim=1, keepdim=True) - share * common.sum(dim=1, keepdim=True)
        padding = weight.new_zeros(len(weight), _padding(inputs, shared))
        columns = cast(Tensor, _Standardised.apply(inputs, shared, view, norm.eps))  # type: ignore[no-untyped-call]
        return _after_norm(layers, columns, torch.cat([own, per_view, per_gap, padding], dim=1), bias, product)


def unit_rows(inputs: Tensor) -> Tensor:
    """`F.normalize(inputs, dim=-1)` of `(M, D)`, with fewer passes over the patches backward."""
    with _no_autocast(inputs):
        return cast(Tensor, _UnitRows.apply(inputs))  # type: ignore[no-untyped-call]


def _product_type(inputs: Tensor) -> torch.dtype:
    """The type of large products: that of autocast where it is on, else that of the inputs."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype


def _no_autocast(inputs: Tensor) -> torch.autocast:
    return torch.autocast(inputs.device.type, enabled=False)


def _folded(layers: nn.Sequential) -> tuple[nn.LayerNorm, Tensor, Tensor]:
    """The first LayerNorm, and the weight and bias that do to standardised inputs what its gamma and beta and the Linear do."""
    norm, weight = cast(nn.LayerNorm, layers[0]), cast(nn.Linear, layers[1]).weight
    return norm, weight * norm.weight, weight @ norm.bias


def _after_norm(layers: nn.Sequential, inputs: Tensor, weight: Tensor, bias: Tensor, product: torch.dtype) -> Tensor:
    """All but the first LayerNorm, with another first Linear."""
    dropout, second = cast(nn.Dropout, layers[3]), cast(nn.Linear, layers[4])
    probability = dropout.p if dropout.training else 0.0
    operands = (inputs.to(product), weight.to(product), bias.to(product), second.weight.to(product))
    hidden = _TwoLinears.apply(*operands, probability)  # type: ignore[no-untyped-call]
    return cast(Tensor, layers[5](hidden.to(inputs.dtype)))


def _padding(inputs: Tensor, shared: Tensor) -> int:
    return -(inputs.shape[1] + len(shared) + 1) % ALIGNMENT


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, `(M, 1)`."""
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(-1)


class _Standardised(torch.autograd.Function):
    """LayerNorm of `cat([x, c[view]])` without gamma and beta, in columns that do not repeat c, which is constant.

    With means m_x and m_c of the parts, widths D and C, n = D + C and g = m_x - m_c, the mean of the whole is
    m_x - (C / n) g = m_c + (D / n) g and its variance is (|x - m_x|^2 + |c - m_c|^2) / n + (D C / n^2) g^2: sums of squares,
    whatever the means. The columns, all times 1 / sqrt(variance + eps): x - m_x; 1 for the patch's view and 0 for the others,
    which stands for c - m_c; g. A product of these columns sums over the patches of a view backward, in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shared: Tensor, view: Tensor, eps: float) -> Tensor:
        """`(M, D + B + 1)` and columns of zeros."""
        width, total = inputs.shape[1], inputs.shape[1] + shared.shape[1]
        product = width * shared.shape[1] / total**2
        middle, shared_middle = inputs.mean(dim=1, keepdim=True), shared.mean(dim=1, keepdim=True)
        centred, gap = inputs - middle, middle - shared_middle[view]
        squares = _dot(centred, centred) + (shared - shared_middle).square().sum(dim=1, keepdim=True)[view]
        scale = (squares / total + product * gap * gap + eps).rsqrt()
        member = view[:, None] == torch.arange(len(shared), device=view.device)
        padding = inputs.new_zeros(len(inputs), _padding(inputs, shared))
        columns = torch.cat([centred, member.to(inputs.dtype), gap, padding], dim=1).mul_(scale)
        ctx.save_for_backward(columns, scale)
        ctx.sizes = width, width + len(shared), total, product
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the patches."""
        columns, scale = ctx.saved_tensors
        width, place, total, product = ctx.sizes
        along = _dot(gradient, columns)
        centred = torch.addcmul(gradient[:, :width], columns[:, :width], along, value=-1 / total)
        gap = gradient[:, place, None] - product * along * columns[:, place, None]
        centred += gap / width - centred.mean(dim=1, keepdim=True)
        return centred.mul_(scale), None, None, None


class _TwoLinears(torch.autograd.Function):
    """Linear, GELU, Dropout, Linear without bias. Backward writes into a tensor that forward kept: a second one raises."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, first: Tensor, bias: Tensor, second: Tensor, dropout: float) -> Tensor:
        """`dropout` is the probability. On the CPU it draws what `nn.Dropout` would."""
        before = torch.addmm(bias, inputs, first.T)
        hidden = F.gelu(before)
        noise = torch.empty_like(hidden)
        if dropout:
            hidden *= noise.bernoulli_(1 - dropout).div_(1 - dropout)
        else:
            noise.fill_(1)
        if any(ctx.needs_input_grad):
            slope = torch.ops.aten.gelu_backward.grad_input(noise, before, grad_input=before)
            ctx.save_for_backward(inputs, first, second, hidden, slope)
        return hidden @ second.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of what needs one."""
        inputs, first, second, hidden, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad
        second_gradient = gradient.T @ hidden if needs[3] else None
        before = torch.mm(gradient, second, out=hidden).mul_(slope)
        return (
            before @ first if needs[0] else None,
            before.T @ inputs if needs[1] else None,
            before.sum(dim=0) if needs[2] else None,
            second_gradient,
            None,
        )


class _UnitRows(torch.autograd.Function):
    """Rows divided by their norms."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        """Unit rows; shorter ones for rows shorter than `SMALLEST_NORM`."""
        norm = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        unit: Tensor = inputs / norm.clamp(min=SMALLEST_NORM)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What is across the row."""
        unit, norm = ctx.saved_tensors
        along = _dot(unit, gradient) * (norm >= SMALLEST_NORM)
        return torch.addcmul(gradient, unit, along, value=-1).div_(norm.clamp(min=SMALLEST_NORM))
