"""The losses of the depth heads against plain loops, and against themselves on single pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.losses import log_gradient, masked_l1, silog
from tests.baseline_support import slow_silog


def made(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).uniform(0.5, 9, shape))


@pytest.mark.parametrize("focus", [0.0, 0.5, 0.85])
def test_silog_is_what_is_printed(focus: float) -> None:
    depth, truth, weight = made(0, 50), made(1, 50), made(2, 50).round()
    plain = slow_silog(depth.tolist(), truth.tolist(), [1.0] * 50, focus)
    assert float(silog(depth, truth, variance_focus=focus)) == pytest.approx(10 * plain, rel=1e-12)
    assert float(silog(depth, truth, variance_focus=focus, scale=1.0)) == pytest.approx(plain, rel=1e-12)
    assert float(silog(depth, truth, variance_focus=focus, scale=2.0, root=False)) == pytest.approx(2 * plain**2, rel=1e-12)
    weighted = slow_silog(depth.tolist(), truth.tolist(), weight.tolist(), focus)
    assert float(silog(depth, truth, weight, variance_focus=focus)) == pytest.approx(10 * weighted, rel=1e-12)
    assert weighted != pytest.approx(plain, rel=1e-3)


def test_silog_of_scaled_depths() -> None:
    """Focus 1 does not see a scale; focus 0.85 sees the rest of it: sqrt(0.15) |log s| for depths that are right but for s."""
    depth, truth = made(0, 50), made(1, 50)
    assert float(silog(3 * depth, truth, variance_focus=1.0)) == pytest.approx(float(silog(depth, truth, variance_focus=1.0)))
    assert float(silog(3 * truth, truth)) == pytest.approx(10 * math.sqrt(0.15) * math.log(3))


@pytest.mark.parametrize("loss", [silog, masked_l1])
def test_a_weight_is_that_many_pixels(loss: Any) -> None:
    """On a grid of pixels the loss is exact: a patch of n equal pixels weighs n."""
    depth, truth, number = made(0, 6), made(1, 6), torch.tensor([3, 1, 4, 1, 5, 9])
    pixels = loss(depth.repeat_interleave(number), truth.repeat_interleave(number))
    assert float(loss(depth, truth, number.float())) == pytest.approx(float(pixels), rel=1e-12)
    assert float(loss(depth, truth, number * 0.01)) == pytest.approx(float(pixels), rel=1e-6)


def test_silog_on_patches_wants_depths_that_are_too_large() -> None:
    """As its documentation says: by about var / (2 mean^2), since the log of a mean is not the mean of the logs."""
    pixels = torch.tensor(np.random.default_rng(0).normal(4, 0.4, 100_000))
    excess = float(pixels.mean().log() - pixels.log().mean())
    assert excess == pytest.approx(float(pixels.var() / (2 * pixels.mean() ** 2)), rel=0.05)


def test_l1_is_a_mean_and_at_most_that_of_the_pixels() -> None:
    pixels, depth = made(0, 8, 16), made(1, 8)
    count = torch.full((8,), 16.0)
    errors = [abs(p - x) for p, row in zip(depth.tolist(), pixels.tolist(), strict=True) for x in row]
    exact = masked_l1(depth.repeat_interleave(16), pixels.reshape(-1))
    assert float(exact) == pytest.approx(math.fsum(errors) / len(errors), rel=1e-12)
    assert float(masked_l1(depth, pixels.mean(dim=1), count)) < float(exact)


@pytest.mark.parametrize("root", [True, False])
def test_gradients(root: bool) -> None:
    depth, truth, weight = made(0, 3, 4).requires_grad_(), made(1, 3, 4), made(2, 3, 4)
    valid = made(3, 3, 4) < 6
    flat = [values.reshape(-1) for values in (depth, truth, weight)]
    assert torch.autograd.gradcheck(lambda d: silog(d, *flat[1:], root=root), flat[0])
    assert torch.autograd.gradcheck(lambda d: masked_l1(d, *flat[1:]), flat[0])
    assert torch.autograd.gradcheck(lambda d: log_gradient(d[None], truth[None], valid[None]), depth)


def slow_log_gradient(depth: Tensor, truth: Tensor, valid: Tensor, scales: int) -> float:
    total = 0.0
    for scale in range(scales):
        found: list[float] = []
        number = 0
        for b in range(len(depth)):
            rows, columns = (range(0, size, 2**scale) for size in depth.shape[1:])
            g = {(y, x): math.log(depth[b, y, x]) - math.log(truth[b, y, x]) for y in rows for x in columns if valid[b, y, x]}
            number += len(g)
            for (y, x), value in g.items():
                found += [abs(value - g[near]) for near in ((y + 2**scale, x), (y, x + 2**scale)) if near in g]
        total += math.fsum(found) / max(number, 1)
    return total


@pytest.mark.parametrize("scales", [1, 2, 4])
def test_gradient_matching(scales: int) -> None:
    depth, truth, valid = made(0, 2, 5, 7), made(1, 2, 5, 7), made(2, 2, 5, 7) < 6
    expected = slow_log_gradient(depth, truth, valid, scales)
    assert float(log_gradient(depth, truth, valid, scales)) == pytest.approx(expected, rel=1e-12)
    spoilt = torch.where(valid, truth, 0.0)
    assert float(log_gradient(depth, spoilt, valid, scales)) == pytest.approx(expected, rel=1e-12)
    assert float(log_gradient(3 * truth, truth, valid, scales)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [silog, masked_l1])
def test_nothing_to_learn_from_is_zero_and_so_is_its_gradient(loss: Any) -> None:
    truth = made(0, 6).float()
    cases = [(truth.clone(), truth, None), (truth[:0].clone(), truth[:0], None), (2 * truth, truth, torch.zeros(6))]
    for depth, wanted, weight in cases:
        depth.requires_grad_()
        found = loss(depth, wanted, weight)
        found.backward()
        assert found.item() == 0
        assert depth.grad is not None
        assert not depth.grad.any()
    valid = torch.zeros(1, 2, 3, dtype=torch.bool)
    nowhere = truth.reshape(1, 2, 3).clone().requires_grad_()
    log_gradient(nowhere, torch.zeros(1, 2, 3), valid).backward()
    assert nowhere.grad is not None
    assert not nowhere.grad.any()


def test_autocast_does_not_round_a_loss() -> None:
    depth, truth, valid = made(0, 2, 4, 4).float(), made(1, 2, 4, 4).float(), made(2, 2, 4, 4) < 6
    args = (depth.reshape(-1), truth.reshape(-1))
    plain = silog(*args), masked_l1(*args), log_gradient(depth, truth, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = silog(*args), masked_l1(*args), log_gradient(depth, truth, valid)
    assert plain == found
    half = depth.bfloat16()
    assert silog(half.reshape(-1), args[1]).dtype == torch.float32
    assert float(silog(half.reshape(-1), args[1])) == pytest.approx(float(silog(half.reshape(-1).float(), args[1])))
