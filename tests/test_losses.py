"""Losses against plain loops written from the equations, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcd.heads.bins import DepthBins
from pcd.losses import alignment_loss, info_nce_loss, pixel_rmse


def _unit(generator: np.random.Generator, rows: int, width: int) -> np.ndarray:
    values = generator.normal(size=(rows, width))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def test_alignment_and_info_nce() -> None:
    generator = np.random.default_rng(0)
    fused, table = _unit(generator, 7, 6), _unit(generator, 4, 6)
    bins, tau = [0, 3, 1, 1, 2, 0, 3], 0.07
    align = nce = 0.0
    for i, y in enumerate(bins):
        scores = [sum(fused[i, d] * table[j, d] for d in range(6)) / tau for j in range(4)]
        align += 1 - scores[y] * tau
        nce -= math.log(math.exp(scores[y]) / sum(math.exp(s) for s in scores))
    z, w, indices = torch.tensor(fused), torch.tensor(table), torch.tensor(bins)
    assert float(alignment_loss(z @ w.T, indices)) == pytest.approx(align / 7, rel=1e-12)
    assert float(info_nce_loss(z @ w.T, indices, tau)) == pytest.approx(nce / 7, rel=1e-12)


@pytest.mark.parametrize("per_map", [True, False])
def test_pixel_rmse_touches_every_pixel_without_seeing_it(per_map: bool) -> None:
    """From count, mean and variance per patch, to rounding the root over all pixels of the upsampled map (equation 15)."""
    generator = np.random.default_rng(1)
    depth = generator.uniform(1, 9, (3, 4))
    pixels = generator.uniform(0.5, 9.5, (3, 4, 25))
    valid = generator.random((3, 4, 25)) < 0.5
    valid[0, 1] = False
    valid[2] = False  # a map without any valid pixel
    roots, squares, number = [], 0.0, 0
    for b in range(3):
        errors = [(depth[b, p] - pixels[b, p, i]) ** 2 for p in range(4) for i in range(25) if valid[b, p, i]]
        squares, number = squares + math.fsum(errors), number + len(errors)
        roots += [math.sqrt(math.fsum(errors) / len(errors))] if errors else []
    expected = sum(roots) / len(roots) if per_map else math.sqrt(squares / number)
    count = valid.sum(-1)
    mean = np.where(valid, pixels, 0).sum(-1) / np.maximum(count, 1)
    var = np.where(valid, (pixels - mean[..., None]) ** 2, 0).sum(-1) / np.maximum(count, 1)
    args = [torch.tensor(a, dtype=torch.float64) for a in (depth, count, mean, var)]
    assert float(pixel_rmse(*args, per_map=per_map)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("per_map", [True, False])
def test_pixel_rmse_gradient_is_that_of_the_upsampled_map(per_map: bool) -> None:
    generator = np.random.default_rng(2)
    truth = torch.tensor(generator.uniform(1, 9, (2, 8, 8)))
    valid = torch.tensor(generator.random((2, 8, 8)) < 0.6)
    patch = torch.tensor(generator.uniform(1, 9, (2, 2, 2)), requires_grad=True)
    canvas = patch.repeat_interleave(4, 1).repeat_interleave(4, 2)
    squared = torch.where(valid, (canvas - truth) ** 2, 0.0)
    if per_map:
        loss = (squared.sum((1, 2)) / valid.sum((1, 2))).sqrt().mean()
    else:
        loss = (squared.sum() / valid.sum()).sqrt()
    (expected,) = torch.autograd.grad(loss, patch)
    cut, kept = (t.reshape(2, 2, 4, 2, 4).transpose(2, 3).reshape(2, 4, 16) for t in (truth, valid))
    count = kept.sum(-1).double()
    mean = torch.where(kept, cut, 0.0).sum(-1) / count
    var = torch.where(kept, (cut - mean[..., None]) ** 2, 0.0).sum(-1) / count
    depth = patch.detach().reshape(2, 4).requires_grad_()
    (got,) = torch.autograd.grad(pixel_rmse(depth, count, mean, var, per_map=per_map), depth)
    torch.testing.assert_close(got.reshape(2, 2, 2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_map", [True, False])
def test_pixel_rmse_without_pixels_or_errors_has_a_finite_gradient(per_map: bool) -> None:
    zero = torch.zeros(2, 3)
    for count in (zero, torch.ones(2, 3)):
        depth = torch.zeros(2, 3, requires_grad=True)
        loss = pixel_rmse(depth, count, zero, zero, per_map=per_map)
        loss.backward()
        assert loss.item() == 0
        assert depth.grad is not None
        assert depth.grad.abs().sum() == 0


def test_bins_are_those_of_the_paper() -> None:
    nyu = DepthBins(1e-3, 10, 15)
    assert [f"{c:.2f}" for c in nyu.centres] == (
        "0.33 1.00 1.67 2.33 3.00 3.67 4.33 5.00 5.67 6.33 7.00 7.67 8.33 9.00 9.67".split()
    )
    assert [f"{c:.2f}" for c in DepthBins(1e-3, 30, 15).centres] == [f"{c:.2f}" for c in np.arange(1, 30, 2)]
    assert f"{DepthBins(0.00390625, 117.1875, 15).edges[1]:.2f}" == "7.82"


def test_bin_index_is_open_below_and_closed_above() -> None:
    bins = DepthBins(0.0, 10.0, 5)
    depths = torch.tensor([-1.0, 0.0, 1e-6, 2.0, 2.0001, 9.99, 10.0, 50.0])
    assert bins.index(depths).tolist() == [0, 0, 0, 0, 1, 4, 4, 4]
