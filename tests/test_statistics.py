"""Intervals and comparisons against SciPy, closed forms and exhaustive enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pcd.errors import UsageError
from pcd.evaluation.metrics import PIXEL_METRICS, masked_sums, metrics_from_sums
from pcd.evaluation.statistics import compare, intervals, pooled_intervals


def test_interval_against_scipy_and_the_normal_approximation() -> None:
    values = np.random.default_rng(0).gamma(2.0, 0.1, 400)
    found = intervals({"abs_rel": values})["abs_rel"]
    other = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.groups == 400
    for mine, theirs, normal in (
        (found.low, other.confidence_interval.low, values.mean() - half),
        (found.high, other.confidence_interval.high, values.mean() + half),
    ):
        assert mine == pytest.approx(theirs, abs=0.08 * half)
        assert mine == pytest.approx(normal, abs=0.15 * half)


def test_interval_against_all_resamples_of_three() -> None:
    values = np.array([1.0, 2.0, 6.0])
    means = [np.mean(chosen) for chosen in itertools.product(values, repeat=3)]
    found = intervals({"x": values}, level=0.8, resamples=50_000)["x"]
    assert found.low == pytest.approx(np.quantile(means, 0.1), abs=1e-9)
    assert found.high == pytest.approx(np.quantile(means, 0.9), abs=1e-9)


def test_missing_scores_do_not_count_and_a_seed_repeats() -> None:
    values = np.random.default_rng(2).random(50)
    holes = np.concatenate([values, np.full(30, np.nan)])
    found = intervals({"a": holes, "b": np.full(80, np.nan)}, seed=3)
    assert found["a"].mean == pytest.approx(values.mean())
    assert found["a"].groups == 50
    assert math.isnan(found["b"].mean)
    assert math.isnan(found["b"].low)
    assert found["b"].groups == 0
    assert intervals({"a": holes}, seed=3)["a"] == intervals({"a": holes}, seed=3)["a"]
    assert intervals({"a": holes}, seed=4)["a"] != intervals({"a": holes}, seed=3)["a"]
    assert math.isnan(intervals({"a": [np.nan]})["a"].high)


def test_groups_are_drawn_whole() -> None:
    """Twenty copies of each of thirty scores are no more certain than the thirty; taken singly they would seem so."""
    scenes = np.random.default_rng(4).random(30)
    names = [f"scene {n}" for n in range(30) for _ in range(20)]
    repeated = np.repeat(scenes, 20)
    single = intervals({"x": scenes}, seed=5)["x"]
    grouped = intervals({"x": repeated}, names, seed=5)["x"]
    assert (grouped.low, grouped.high) == pytest.approx((single.low, single.high))
    assert grouped.groups == 30
    naive = intervals({"x": repeated}, seed=5)["x"]
    assert naive.high - naive.low < 0.4 * (grouped.high - grouped.low)


def test_groups_of_different_size_keep_every_score_equal() -> None:
    """The mean over tiles is that over all tiles, not over the means of images."""
    found = intervals({"x": [1.0, 2.0, 3.0, 10.0]}, ["a", "a", "a", "b"])["x"]
    assert found.mean == 4.0
    assert (found.low, found.high) == (2.0, 10.0)


def test_pooled_pixels() -> None:
    rng = np.random.default_rng(6)
    gt = torch.from_numpy(rng.uniform(1, 9, (40, 25)))
    pred = gt * torch.from_numpy(rng.lognormal(0, 0.2, (40, 1)))
    mask = torch.from_numpy(rng.random((40, 25)) < 0.6)
    mask[3] = False
    sums = masked_sums(pred, gt, mask)
    found = pooled_intervals(sums.numpy(), seed=7)
    assert set(found) == set(PIXEL_METRICS)
    centre = metrics_from_sums(sums.sum(dim=0))
    for name, interval in found.items():
        assert interval.mean == pytest.approx(float(centre[name]))
        assert interval.low <= interval.mean <= interval.high
        assert interval.groups == 39
    resampled = []
    for _ in range(2000):
        chosen = rng.integers(0, 40, 40)
        difference = (pred - gt)[chosen][mask[chosen]]
        resampled.append(float(difference.square().mean().sqrt()))
    width = np.subtract(*np.quantile(resampled, (0.975, 0.025)))
    assert found["rmse"].high - found["rmse"].low == pytest.approx(width, rel=0.1)
    assert math.isnan(pooled_intervals(np.zeros((2, sums.shape[1])))["rmse"].mean)


def test_comparison_of_few_images_is_exact() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.random(9), rng.random(9) * 0.7
    keys = [f"image {n}" for n in range(9)]
    found = compare(dict(zip(keys, first, strict=True)), dict(zip(reversed(keys), reversed(second), strict=True)))
    exact = stats.permutation_test((first, second), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=2**9)
    assert found.p_value == pytest.approx(exact.pvalue)
    assert found.difference == pytest.approx(np.mean(first - second))
    assert (found.lower, found.higher, found.equal) == ((first < second).sum(), (first > second).sum(), 0)
    assert found.images == 9


def test_comparison_of_many_images() -> None:
    rng = np.random.default_rng(9)
    base = rng.random(500)
    keys = [str(n) for n in range(500)]
    noisy = dict(zip(keys, base + rng.normal(0, 0.1, 500), strict=True))
    shifted = dict(zip(keys, base + 0.02 + rng.normal(0, 0.1, 500), strict=True))
    found = compare(noisy, shifted)
    t_test = stats.ttest_rel(list(noisy.values()), list(shifted.values()))
    assert found.p_value == pytest.approx(t_test.pvalue, rel=0.4, abs=2e-4)
    assert found.low < found.difference < found.high < 0
    assert compare(noisy, noisy).p_value == 1.0
    assert compare(noisy, noisy).equal == 500
    assert compare(noisy, shifted, seed=1) == compare(noisy, shifted, seed=1)


def test_comparison_leaves_out_unscored_images_and_refuses_others() -> None:
    found = compare({"a": 1.0, "b": math.nan, "c": 3.0}, {"a": 2.0, "b": 1.0, "c": 3.0})
    assert (found.images, found.excluded, found.lower, found.equal) == (2, 1, 1, 1)
    with pytest.raises(UsageError, match=r"not scored on the same images: 2 of 3 are in one only, for example 'a'"):
        compare({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 1.0})
    with pytest.raises(UsageError, match="none of the 1 images has a score"):
        compare({"a": math.nan}, {"a": 1.0})
    with pytest.raises(UsageError, match="give one for each score"):
        intervals({"x": [1.0, 2.0]}, ["only one"])
    with pytest.raises(UsageError, match="different numbers of scores"):
        intervals({"x": [1.0, 2.0], "y": [1.0]})
