"""Errors against depth and against uncertainty: by hand, in plain loops, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pcd.evaluation.analysis import BINS, CELLS, FINE, Analysis, PatchBeliefs, choose_samples
from pcd.evaluation.protocols import get_protocol
from pcd.evaluation.ranks import ranks, sparsification, spearman

PROTOCOL = get_protocol("eigen", "generic", (1.0, 16.0))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_joint_distribution_and_moments_by_depth_in_plain_loops() -> None:
    images = {}
    for number in range(3):
        gt = generator(number).uniform(1, 16, 400)
        images[f"i{number}"] = np.clip(gt * generator(number + 9).uniform(0.7, 1.2, 400), 1, 16), gt
    analysis = Analysis(PROTOCOL)
    for key, (pred, gt) in images.items():
        analysis.pixels(key, pred[:150], gt[:150])  # as tiles come: one key, several times
        analysis.pixels(key, pred[150:], gt[150:])
    found = analysis.as_json()
    joint = [[0] * (CELLS) for _ in range(CELLS)]
    errors: dict[int, list[float]] = {}
    for pred, gt in images.values():
        for p, g in zip(pred.tolist(), gt.tolist(), strict=True):
            cells = [min(int((value - 1) * FINE), CELLS - 1) for value in (g, p)]
            joint[cells[0]][cells[1]] += 1
            errors.setdefault(min(int(g - 1), BINS - 1), []).append(p - g)
    assert found["joint"] == joint
    for at, row in enumerate(found["by_depth"]):
        assert (row["low"], row["high"]) == (pytest.approx(1 + at), pytest.approx(2 + at))
        assert row["pixels"] == len(errors[at])
        mean = math.fsum(errors[at]) / len(errors[at])
        assert row["bias"] == pytest.approx(mean)
        assert row["std"] == pytest.approx(math.sqrt(math.fsum((e - mean) ** 2 for e in errors[at]) / len(errors[at])))
        assert row["rmse"] == pytest.approx(math.sqrt(math.fsum(e * e for e in errors[at]) / len(errors[at])))
        assert row["bias_low"] <= row["bias"] <= row["bias_high"]
        assert row["std_low"] <= row["std"] * 1.001


def test_bins_narrow_until_a_small_range_of_depths_fills_enough_of_them() -> None:
    gt = generator().uniform(2, 4, 5000)  # two of the widest bins, four of half the width, eight of a quarter
    analysis = Analysis(PROTOCOL)
    analysis.pixels("a", gt + 0.5, gt)
    rows = analysis.as_json()["by_depth"]
    filled = [row for row in rows if row["pixels"]]
    assert len(rows) == 4 * BINS
    assert len(filled) == 8
    assert sum(row["pixels"] for row in rows) == 5000
    assert all(row["bias"] == pytest.approx(0.5) and row["std"] == pytest.approx(0, abs=1e-6) for row in filled)


def test_bins_without_pixels_are_null_not_zero() -> None:
    analysis = Analysis(PROTOCOL)
    analysis.pixels("a", np.array([2.0]), np.array([2.5]))
    rows = analysis.as_json()["by_depth"]
    at = next(number for number, row in enumerate(rows) if row["low"] <= 2.5 < row["high"])
    assert rows[at]["bias"] == -0.5
    assert rows[at]["images"] == 1
    others = rows[:at] + rows[at + 1 :]
    assert all(row["pixels"] == 0 and row["bias"] is None and row["rmse"] is None for row in others)
    assert Analysis(PROTOCOL).as_json()["by_depth"][0]["pixels"] == 0


def test_predictions_beyond_the_range_go_to_the_outer_cells() -> None:
    analysis = Analysis(PROTOCOL)
    analysis.pixels("a", np.array([0.2, 99.0]), np.array([1.0, 16.0]))
    joint = np.array(analysis.as_json()["joint"])
    assert joint[0, 0] == joint[-1, -1] == 1


def test_patches_are_compared_with_the_mean_of_their_pixels_in_range() -> None:
    truth = generator().uniform(0.5, 17, (2, 6, 8)).astype(np.float32)
    truth[generator(1).random(truth.shape) < 0.5] = np.nan
    truth[0, :3, :4] = np.nan
    depth, std, entropy = (torch.from_numpy(generator(seed).uniform(0.1, 4, (2, 2, 2))) for seed in (2, 3, 4))
    analysis = Analysis(PROTOCOL)
    analysis.patches(PatchBeliefs(depth, std, entropy / 4), truth)
    found = analysis.as_json()["uncertainty"]
    errors, relative, deviations, entropies = [], [], [], []
    for n in range(2):
        for r in range(2):
            for c in range(2):
                pixels = [v for v in truth[n, 3 * r : 3 * r + 3, 4 * c : 4 * c + 4].ravel().tolist() if 1 <= v <= 16]
                if pixels:
                    mean = math.fsum(pixels) / len(pixels)
                    errors.append(abs(depth[n, r, c].item() - mean))
                    relative.append(errors[-1] / mean)
                    deviations.append(std[n, r, c].item())
                    entropies.append(entropy[n, r, c].item())
    assert found["patches"] == len(errors) == 7
    assert found["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 7), rel=1e-5)
    assert found["within_1_std"] == sum(e <= s for e, s in zip(errors, deviations, strict=True)) / 7
    assert found["entropy"]["spearman"] == pytest.approx(stats.spearmanr(entropies, relative).statistic)
    assert found["std"]["spearman"] == pytest.approx(stats.spearmanr(deviations, errors).statistic)
    assert sum(g["abs_rel"] for g in found["entropy"]["groups"]) == pytest.approx(sum(relative), rel=1e-5)  # one patch each
    assert [g["signal"] for g in found["std"]["groups"]] == pytest.approx(sorted(deviations))


def test_a_head_without_distribution_has_no_uncertainty() -> None:
    assert Analysis(PROTOCOL).as_json()["uncertainty"] is None


def test_ranks_agree_with_scipy_on_ties() -> None:
    values = generator().integers(0, 20, 500).astype(float)
    other = generator(1).integers(0, 9, 500).astype(float) + values
    np.testing.assert_allclose(ranks(values) + 1, stats.rankdata(values))
    assert spearman(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)
    assert spearman(values, np.ones(500)) is None


def test_sparsification_of_perfect_useless_and_wrong_uncertainty() -> None:
    error = np.arange(1.0, 101.0)
    perfect = sparsification(error * 3, error)
    assert perfect["ause"] == 0.0
    assert perfect["error"][10] == pytest.approx(25.5)  # half removed: the mean of 1 to 50
    useless = sparsification(np.ones(100), error)
    assert useless["error"] == pytest.approx([50.5] * 20)
    assert sparsification(-error, error)["ause"] > useless["ause"] > 0


def test_samples_are_chosen_by_rank_and_only_once() -> None:
    scores = {"e": 0.5, "a": 0.1, "b": 0.2, "x": math.nan, "d": 0.4, "c": 0.3, "f": 0.6, "b2": 0.2}
    assert choose_samples(scores, 2) == [
        ("best", "a"),
        ("best", "b"),
        ("median", "b2"),
        ("median", "c"),
        ("worst", "e"),
        ("worst", "f"),
    ]
    assert choose_samples({"a": 0.1, "b": 0.2}, 3) == [("best", "a"), ("best", "b")]
    assert choose_samples({}, 3) == []
