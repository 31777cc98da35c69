"""Boundary F1: from its definition pixel by pixel, and on images whose edges are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pcd.evaluation.boundary import boundary_f1


def loop_f1(pred: np.ndarray, gt: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Depth Pro's definition on inverse depth, one pixel pair at a time."""
    height, width = gt.shape
    inverse_pred, inverse_gt = 1 / pred, 1 / gt
    total = weights = 0.0
    for k in range(10):
        t = 1.05 + 0.2 * k / 9
        precision = recall = 0.0
        for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            hits = edges_pred = edges_gt = 0
            for i in range(height):
                for j in range(width):
                    a, b = i + di, j + dj
                    if not (0 <= a < height and 0 <= b < width):
                        continue
                    if mask is not None and not (mask[i, j] and mask[a, b]):
                        continue
                    in_pred = inverse_pred[a, b] / inverse_pred[i, j] > t
                    in_gt = inverse_gt[a, b] / inverse_gt[i, j] > t
                    hits += in_pred and in_gt
                    edges_pred += in_pred
                    edges_gt += in_gt
            precision += 0.25 * hits / max(edges_pred, 1)
            recall += 0.25 * hits / max(edges_gt, 1)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        total += t * f1
        weights += t
    return total / weights


def random_pair(seed: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    gt = np.exp(rng.normal(0, 0.15, shape))
    pred = gt * np.exp(rng.normal(0, 0.05, shape))
    return pred, gt, rng.random(shape) < 0.8


@pytest.mark.parametrize("shape", [(9, 12), (1, 30), (30, 1), (17, 5)])
def test_against_plain_loops(shape: tuple[int, int]) -> None:
    pred, gt, mask = random_pair(0, shape)
    expected = loop_f1(pred, gt)
    assert 0.1 < expected < 1
    assert boundary_f1(pred, gt) == pytest.approx(expected, rel=1e-12)
    assert boundary_f1(pred, gt, mask) == pytest.approx(loop_f1(pred, gt, mask), rel=1e-12)


def test_a_block_is_found_where_it_is_and_nowhere_else() -> None:
    gt = np.full((12, 12), 4.0, dtype=np.float32)
    gt[4:8, 4:8] = 2.0
    assert boundary_f1(3 * gt, gt) == pytest.approx(1.0)  # blind to scale
    assert boundary_f1(np.roll(gt, 1, axis=1), gt) == pytest.approx(2 * 0.75 / 4)  # three of four pixels of two sides
    assert boundary_f1(np.full_like(gt, 3.0), gt) == 0.0
    assert boundary_f1(gt, np.full_like(gt, 3.0)) == 0.0


def test_steps_between_thresholds_count_by_weight() -> None:
    """A step of 1.10 exceeds the first three of the ten thresholds (1.05, 1.0722, 1.0944)."""
    gt = np.ones((6, 6))
    gt[2:4, 2:4] = 1.10
    thresholds = [1.05 + 0.2 * k / 9 for k in range(10)]
    assert boundary_f1(gt, gt) == pytest.approx(sum(thresholds[:3]) / sum(thresholds))
    gt[2:4, 2:4] = 1.25  # not more than the last threshold
    assert boundary_f1(gt, gt) == pytest.approx(sum(thresholds[:9]) / sum(thresholds))


def test_a_ratio_equal_to_the_threshold_is_no_edge() -> None:
    gt = np.ones((5, 12))
    gt[1:4, 1:4] = 1.3
    pred = gt.copy()
    pred[1:4, 7:10] = 1.25  # false edges for all thresholds but the last, 1.25 itself: precision one half, recall 1
    thresholds = [1.05 + 0.2 * k / 9 for k in range(10)]
    expected = (sum(thresholds[:9]) * 2 / 3 + thresholds[9]) / sum(thresholds)
    assert boundary_f1(pred, gt) == pytest.approx(expected)
    assert boundary_f1(gt, pred) == pytest.approx(expected)


def test_directions_without_edges_count_as_missed() -> None:
    """As published: a straight edge is one in one of the four directions, so that even the truth itself reaches a quarter."""
    gt = np.ones((4, 4))
    gt[:, 2:] = 2.0
    assert boundary_f1(gt, gt) == pytest.approx(0.25)
    gt[2:] *= 2.0
    assert boundary_f1(gt, gt) == pytest.approx(0.5)


def test_invalid_pixels_make_no_edges() -> None:
    pred, gt, mask = random_pair(1, (10, 10))
    expected = boundary_f1(pred, gt, mask)
    gt[~mask] = np.nan
    pred[~mask] = 1000.0
    assert boundary_f1(pred, gt, mask) == expected
    assert math.isnan(boundary_f1(pred, gt, np.zeros_like(mask)))
