"""Patch statistics and supervision against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pcd.errors import UsageError
from pcd.patches import PatchRule, PixelRule, patch_statistics, supervised, to_patches


def _loop(stored, units, grid, rule, mask):
    batch, height, width = stored.shape
    ph, pw = height // grid[0], width // grid[1]
    for b in range(batch):
        for p in range(grid[0] * grid[1]):
            values, present = [], 0
            for y in range((p // grid[1]) * ph, (p // grid[1] + 1) * ph):
                for x in range((p % grid[1]) * pw, (p % grid[1] + 1) * pw):
                    depth = int(stored[b, y, x]) / units
                    present += stored[b, y, x] != 0
                    if stored[b, y, x] == 0 or (mask is not None and not mask[b, y, x]):
                        continue
                    inside = (
                        rule.min_depth < depth < rule.max_depth
                        if rule.open_range
                        else rule.min_depth <= depth <= rule.max_depth
                    )
                    values += [depth] if inside else []
            mean = math.fsum(values) / len(values) if values else 0.0
            var = math.fsum((v - mean) ** 2 for v in values) / len(values) if values else 0.0
            yield b, p, present, len(values), mean, var


@pytest.mark.parametrize("open_range", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_agree_with_a_loop(open_range: bool, masked: bool) -> None:
    generator = np.random.default_rng(5)
    stored = generator.integers(0, 12000, (3, 12, 18), dtype=np.uint16)
    stored[generator.random(stored.shape) < 0.5] = 0
    stored[0, :4, :6] = 0  # a patch without any depth
    stored[1, :4, :6] = 11000  # a patch beyond the range
    stored[2, 0, 0] = 2000  # a value on the limit
    mask = generator.random(stored.shape) < 0.6 if masked else None
    rule = PixelRule(2.0, 10.0, open_range)
    got = patch_statistics(stored, 1000, (3, 3), rule, mask)
    for b, p, present, count, mean, var in _loop(stored, 1000, (3, 3), rule, mask):
        assert (got.present[b, p], got.count[b, p]) == (present, count)
        assert got.mean[b, p] == np.float32(mean)
        assert got.var[b, p] == pytest.approx(var, rel=1e-6)
    assert got.count[0, 0] == 0
    assert got.mean[0, 0] == 0


def test_variance_of_far_flat_patches_does_not_cancel() -> None:
    stored = np.full((1, 4, 4), 60000, dtype=np.uint16)
    stored[0, 0, 0] = 60001
    got = patch_statistics(stored, 1000, (1, 1), PixelRule(0, 100))
    assert got.var[0, 0] == pytest.approx(1e-6 * (1 / 16) * (15 / 16), rel=1e-5)


def test_grid_must_divide() -> None:
    with pytest.raises(UsageError, match="10x10 view does not divide into a grid of 3x3"):
        to_patches(np.zeros((1, 10, 10)), (3, 3))


def test_supervision_rules() -> None:
    stored = np.zeros((1, 2, 8), dtype=np.uint16)
    stored[0, :, 0:2] = 3000  # all four pixels
    stored[0, 0, 2:4] = 3000  # exactly half
    stored[0, 0, 4] = 3000  # a quarter
    got = patch_statistics(stored, 1000, (1, 4), PixelRule(0.1, 10))
    assert supervised(got, PatchRule(min_present=0.5), 4).tolist() == [[True, True, False, False]]
    assert supervised(got, PatchRule(min_present=0.0), 4).tolist() == [[True, True, True, False]]
    assert supervised(got, PatchRule(min_present=0.0, min_mean=3.5), 4).tolist() == [[False] * 4]
    share = np.array([[0.5, 0.6, 1.0, 1.0]], dtype=np.float32)
    assert supervised(got, PatchRule(min_present=0, min_in_mask=0.5), 4, share).tolist() == [[True, True, True, False]]
    half_open = PatchRule(min_present=0, min_in_mask=0.5, mask_open=True)
    assert supervised(got, half_open, 4, share).tolist() == [[False, True, True, False]]


def test_present_counts_what_the_range_leaves_out() -> None:
    """Most of the patch has depth, little of it inside the range: the half-missing rule of the paper keeps the patch."""
    stored = np.full((1, 2, 2), 50000, dtype=np.uint16)
    stored[0, 0, 0] = 5000
    got = patch_statistics(stored, 1000, (1, 1), PixelRule(0.001, 30))
    assert (got.present[0, 0], got.count[0, 0]) == (4, 1)
    assert supervised(got, PatchRule(), 4).all()
