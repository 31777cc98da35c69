"""Alignment against NumPy's and SciPy's fits, and what it must undo exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from pcd.errors import PredictionError, UsageError
from pcd.evaluation.alignment import ALIGNMENTS, MIN_DISPARITY, align, fit_line


def depths(seed: int, number: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    gt = rng.uniform(0.5, 9, number)
    return torch.from_numpy(gt * rng.lognormal(0.3, 0.2, number)), torch.from_numpy(gt)


def test_line_against_scipy_and_the_normal_equations() -> None:
    x, y = depths(0)
    scale, shift = fit_line(x, y)
    fit = linregress(x.numpy(), y.numpy())
    assert float(scale) == pytest.approx(fit.slope, rel=1e-12)
    assert float(shift) == pytest.approx(fit.intercept, rel=1e-12)
    left = np.array([[float((x * x).sum()), float(x.sum())], [float(x.sum()), len(x)]])
    normal = np.linalg.solve(left, np.array([float((x * y).sum()), float(y.sum())]))
    np.testing.assert_allclose([float(scale), float(shift)], normal, rtol=1e-10)


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_median_is_numpys(number: int) -> None:
    pred, gt = depths(1, number)
    expected = pred.numpy() * np.median(gt.numpy()) / np.median(pred.numpy())
    np.testing.assert_allclose(align(pred, gt, "median").numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("method", "distort"),
    [
        ("median", lambda g: 3.7 * g),
        ("lsq-depth", lambda g: 0.4 * g + 2.5),
        ("lsq-disparity", lambda g: 1 / (0.4 / g + 0.05)),
        ("lsq-sqrt-disparity", lambda g: 1 / (0.4 / g.sqrt() + 0.05) ** 2),
    ],
)
def test_each_method_undoes_its_own_distortion_and_no_other(method: str, distort) -> None:
    _, gt = depths(2)
    torch.testing.assert_close(align(distort(gt), gt, method), gt, rtol=1e-9, atol=1e-9)
    for other in ALIGNMENTS:
        if method != "median" and other != method:
            assert (align(distort(gt), gt, other) - gt).abs().max() > 1e-3, other


def test_only_valid_pixels_are_fitted_but_all_are_transformed() -> None:
    pred, gt = depths(3)
    mask = torch.arange(300) % 3 == 0
    expected = align(pred[mask], gt[mask], "lsq-depth")
    spoiled = gt.clone()
    spoiled[~mask] = torch.nan
    found = align(pred.reshape(20, 15), spoiled.reshape(20, 15), "lsq-depth", mask.reshape(20, 15))
    assert found.shape == (20, 15)
    torch.testing.assert_close(found.flatten()[mask], expected)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", ALIGNMENTS[1:])
def test_one_pixel_and_constant_predictions(method: str) -> None:
    one = align(torch.tensor([2.0]), torch.tensor([5.0]), method)
    assert float(one) == pytest.approx(5.0, rel=1e-12)
    level = align(torch.full((4,), 2.0), torch.tensor([1.0, 2.0, 3.0, 4.0]), method)
    assert level.unique().numel() == 1
    assert level.isfinite().all()


def test_disparities_are_limited_to_a_kilometre() -> None:
    """Ground truth that recedes as the prediction approaches: the fitted disparity becomes negative for far predictions."""
    pred, gt = torch.tensor([1.0, 2.0, 1000.0]), torch.tensor([1.0, 4.0, 1.0])
    found = align(pred, gt, "lsq-disparity", torch.tensor([True, True, False]))
    assert float(found[2]) == pytest.approx(1 / MIN_DISPARITY)


def test_nothing_valid_and_none_leave_the_prediction() -> None:
    pred, gt = depths(4)
    for method in ALIGNMENTS:
        torch.testing.assert_close(align(pred, gt, method, torch.zeros(300, dtype=torch.bool)), pred)
    torch.testing.assert_close(align(pred, gt, "none"), pred)


def test_what_cannot_be_aligned_is_refused() -> None:
    pred, gt = depths(5)
    with pytest.raises(UsageError, match="alignment = 'affine': known are none, median"):
        align(pred, gt, "affine")
    pred[7] = -0.5
    with pytest.raises(PredictionError, match=r"needs positive predictions, but the smallest is -0.5 m"):
        align(pred, gt, "lsq-disparity")
