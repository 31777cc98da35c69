"""Metrics: hand-computed cases, plain loops, and the sums they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcd.errors import UsageError
from pcd.evaluation.metrics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    METRICS,
    PIXEL_METRICS,
    SUMS,
    binned_sums,
    describe,
    gathered_sums,
    masked_metrics,
    masked_sums,
    metrics_from_sums,
)


def loop_metrics(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """One image pixel by pixel, `(prediction, truth)`, from the definitions of Eigen et al. 2014 and the KITTI benchmark."""
    number = len(pairs)
    logs = [math.log(p) - math.log(g) for p, g in pairs]
    within = dict.fromkeys(("delta1", "delta2", "delta3", "delta_105", "delta_110"), 0)
    bounds = {"delta1": 1.25, "delta2": 1.5625, "delta3": 1.953125, "delta_105": 1.05, "delta_110": 1.1}
    for p, g in pairs:
        for name, bound in bounds.items():
            if max(p / g, g / p) < bound:
                within[name] += 1
    mean_log = math.fsum(logs) / number
    return {
        "abs_rel": math.fsum(abs(p - g) / g for p, g in pairs) / number,
        "sq_rel": math.fsum((p - g) ** 2 / g for p, g in pairs) / number,
        "rmse": math.sqrt(math.fsum((p - g) ** 2 for p, g in pairs) / number),
        "rmse_log": math.sqrt(math.fsum(e * e for e in logs) / number),
        "log10": math.fsum(abs(math.log10(p) - math.log10(g)) for p, g in pairs) / number,
        "silog": 100 * math.sqrt(math.fsum((e - mean_log) ** 2 for e in logs) / number),
        "abs_diff": math.fsum(abs(p - g) for p, g in pairs) / number,
        "bias": math.fsum(p - g for p, g in pairs) / number,
        **{name: count / number for name, count in within.items()},
    }


def random_images(seed: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    gt = rng.uniform(0.2, 9, shape).astype(np.float32)
    pred = gt * rng.lognormal(0.05, 0.3, shape)
    mask = rng.random(shape) < 0.7
    return torch.from_numpy(pred), torch.from_numpy(gt), torch.from_numpy(mask)


def test_two_pixels_by_hand() -> None:
    found = masked_metrics(torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 4.0]]), torch.ones(1, 2, dtype=torch.bool))
    expected = {
        "abs_rel": (1 / 1 + 1 / 4) / 2,
        "sq_rel": (1 / 1 + 1 / 4) / 2,
        "rmse": 1.0,
        "rmse_log": math.sqrt((math.log(2) ** 2 + math.log(0.75) ** 2) / 2),
        "log10": (math.log10(2) + math.log10(4 / 3)) / 2,
        "silog": 100 * (math.log(2) - math.log(0.75)) / 2,  # half the distance of two values is their standard deviation
        "abs_diff": 1.0,
        "bias": 0.0,
        "delta1": 0.0,
        "delta2": 0.5,
        "delta3": 0.5,
        "delta_105": 0.0,
        "delta_110": 0.0,
        "pixels": 2,
    }
    assert set(found) == {*PIXEL_METRICS, "pixels"} == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-14), name


def test_a_ratio_equal_to_the_threshold_is_not_within_it() -> None:
    pred, gt = torch.tensor([[1.25, 0.8, 5.0, 1.0]]), torch.tensor([[1.0, 1.0, 4.0, 1.0]])
    found = masked_metrics(pred, gt, torch.ones_like(pred, dtype=torch.bool))
    assert float(found["delta1"]) == 0.5  # 0.8 in float32 lies a little above four fifths; 1.25 and 5 / 4 are exact
    assert float(found["delta2"]) == 1.0


def test_a_constant_factor_has_no_silog_and_a_perfect_prediction_no_error() -> None:
    gt = torch.rand(3, 7, 5, dtype=torch.float64) * 5 + 0.1
    mask = torch.ones_like(gt, dtype=torch.bool)
    scaled = masked_metrics(1.7 * gt, gt, mask)
    assert scaled["silog"].max() < 1e-5
    torch.testing.assert_close(scaled["abs_rel"], torch.full((3,), 0.7, dtype=torch.float64))
    perfect = masked_metrics(gt, gt, mask)
    for name in PIXEL_METRICS:
        expected = 1.0 if name.startswith("delta") else 0.0
        assert perfect[name].tolist() == [expected] * 3


@pytest.mark.parametrize("shape", [(1, 1), (4, 9, 11), (3, 1, 5), (2, 130, 97)])
def test_against_plain_loops(shape: tuple[int, ...]) -> None:
    pred, gt, mask = random_images(1, shape)
    found = masked_metrics(pred, gt, mask)
    for image in range(shape[0]):
        pairs = list(zip(pred[image][mask[image]].tolist(), gt[image][mask[image]].tolist(), strict=True))
        assert int(found["pixels"][image]) == len(pairs)
        for name, value in (loop_metrics(pairs) if pairs else dict.fromkeys(PIXEL_METRICS, math.nan)).items():
            np.testing.assert_allclose(float(found[name][image]), value, rtol=1e-11, atol=1e-11, err_msg=name)


def test_what_stands_in_masked_pixels_does_not_matter() -> None:
    pred, gt, mask = random_images(2, (2, 20, 20))
    expected = masked_metrics(pred, gt, mask)
    bad = torch.tensor([math.nan, math.inf, -1.0, 0.0])
    pred[~mask] = bad.repeat(200)[: int((~mask).sum())].double()
    gt[~mask] = bad.roll(1).repeat(200)[: int((~mask).sum())]
    for name, value in masked_metrics(pred, gt, mask).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_an_image_without_valid_pixels_is_nan_and_has_no_pixels() -> None:
    pred, gt, mask = random_images(3, (3, 6, 6))
    mask[1] = False
    found = masked_metrics(pred, gt, mask)
    assert found["pixels"][1] == 0
    for name in PIXEL_METRICS:
        assert found[name].isnan().tolist() == [False, True, False]


def test_both_ways_of_summing_agree_beyond_one_block() -> None:
    pred, gt, mask = random_images(4, (1, 300, 311))
    masked = masked_sums(pred, gt, mask)[0].numpy()
    gathered = gathered_sums(pred[mask].numpy(), gt[mask].double().numpy())
    assert gathered[0] == mask.sum() > 8192
    np.testing.assert_allclose(gathered, masked, rtol=1e-12)


def test_pooled_pixels_follow_exactly_from_summed_sums() -> None:
    pred, gt, mask = random_images(5, (4, 25, 30))
    pooled = metrics_from_sums(masked_sums(pred, gt, mask).sum(dim=0))
    pairs = list(zip(pred[mask].tolist(), gt[mask].tolist(), strict=True))
    for name, value in loop_metrics(pairs).items():
        assert float(pooled[name]) == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_accumulation_is_float64() -> None:
    """A million small float32 errors: a float32 sum would be off in the fourth digit."""
    gt = torch.full((1, 1_000_000), 8.0)
    pred = gt + 0.001
    found = masked_metrics(pred, gt, torch.ones_like(gt, dtype=torch.bool))
    exact = float(pred[0, 0].double() - 8.0)
    assert float(found["abs_diff"]) == pytest.approx(exact, rel=1e-11)


def test_depth_bins_against_a_search_per_pixel() -> None:
    pred, gt, _ = random_images(6, (1, 40, 40))
    edges = np.array([0.5, 2.0, 2.5, 6.0, 8.0])
    truth = gt.double().numpy().ravel()
    truth[:6] = [2.0, 2.5, 0.5, 8.0, 0.1, 50.0]  # on the edges and beyond them
    found = binned_sums(pred.numpy().ravel(), truth, edges)
    assert found.shape == (4, len(SUMS))
    members: list[list[tuple[float, float]]] = [[], [], [], []]
    for p, g in zip(pred.numpy().ravel().tolist(), truth.tolist(), strict=True):
        number = 0 if g < 2.0 else 1 if g < 2.5 else 2 if g < 6.0 else 3
        members[number].append((p, g))
    for number, pairs in enumerate(members):
        assert found[number, 0] == len(pairs)
        metrics = metrics_from_sums(torch.from_numpy(found[number]))
        for name, value in loop_metrics(pairs).items():
            assert float(metrics[name]) == pytest.approx(value, rel=1e-11, abs=1e-11)


def test_directions_units_and_words() -> None:
    assert {"delta1", "delta_105", "boundary_f1"} <= HIGHER_IS_BETTER
    assert {"abs_rel", "rmse", "log10", "silog", "abs_diff"} <= LOWER_IS_BETTER
    assert set(METRICS) - HIGHER_IS_BETTER - LOWER_IS_BETTER == {"bias"}
    assert {name for name, metric in METRICS.items() if metric.unit == "m"} == {"sq_rel", "rmse", "abs_diff", "bias"}
    assert describe("rmse") == "RMSE: root of the mean of (p - g)^2, in metres; lower is better"
    assert "nearest to 0" in describe("bias")
    with pytest.raises(UsageError, match=r"Unknown metric 'absrel'\. Did you mean 'abs_rel'"):
        describe("absrel")
