"""Patches to pixels: against plain loops, torch and OpenCV, and back through the views."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcd.errors import SampleError, UsageError
from pcd.evaluation import pixels
from pcd.evaluation.pixels import UPSAMPLE, canvas_prediction, combine_views, native_prediction, upsample
from pcd.views import ViewPlan, from_views, to_views

NYU = ViewPlan(canvas=(336, 336), crop=(40, 470, 38, 603))
SIZES = [
    ((24, 24), (336, 336)),
    ((24, 24), (430, 565)),
    ((3, 5), (7, 13)),
    ((7, 3), (2, 2)),
    ((1, 1), (4, 5)),
    ((21, 84), (5, 1)),
]


def grid(size: tuple[int, int], number: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1])
    return torch.rand(number, *size, generator=generator, dtype=torch.float64) * 9 + 0.5


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_nearest_is_the_integer_formula(source: tuple[int, int], target: tuple[int, int]) -> None:
    patches = grid(source)
    found = upsample(patches, target, "nearest")
    for i in range(target[0]):
        for j in range(0, target[1], 7):
            expected = patches[:, i * source[0] // target[0], j * source[1] // target[1]]
            assert torch.equal(found[:, i, j], expected)


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("corners", [False, True])
def test_bilinear_against_torch(source: tuple[int, int], target: tuple[int, int], corners: bool) -> None:
    patches = grid(source)
    expected = F.interpolate(patches[:, None], target, mode="bilinear", align_corners=corners)[:, 0]
    found = upsample(patches, target, "bilinear-align-corners" if corners else "bilinear")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_bilinear_against_opencv_and_nearest_against_the_loss() -> None:
    patches = grid((24, 24), 1)
    found = upsample(patches, (430, 565), "bilinear")[0].numpy()
    np.testing.assert_allclose(found, cv2.resize(patches[0].numpy(), (565, 430), interpolation=cv2.INTER_LINEAR), atol=1e-4)
    canvas = canvas_prediction(patches, NYU, "nearest")
    torch.testing.assert_close(canvas, patches.repeat_interleave(14, dim=1).repeat_interleave(14, dim=2), rtol=0, atol=0)


def test_precision_is_that_of_the_patches() -> None:
    assert upsample(grid((3, 3)).float(), (7, 7), "bilinear").dtype == torch.float32
    assert upsample(grid((3, 3)), (7, 7), "bilinear").dtype == torch.float64


@pytest.mark.parametrize("mode", UPSAMPLE)
def test_accelerators_compute_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = grid((24, 24))
    plan = ViewPlan(canvas=(48, 48), crop=(4, 40, 3, 50))
    for outside in ("edge", "zero"):
        expected = native_prediction(patches, plan, (44, 57), mode, outside)
        with monkeypatch.context() as patched:
            patched.setattr(pixels, "on_cpu", lambda tensor: False)
            found = native_prediction(patches, plan, (44, 57), mode, outside)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", UPSAMPLE)
def test_native_predictions_are_placed_in_the_frame(mode: str) -> None:
    """Rows 40:470 are predicted; row 470 of the Eigen region repeats row 469, or is zero."""
    patches = grid((24, 24), 1)
    inside = upsample(patches, (430, 565), mode)[0]
    edge = native_prediction(patches, NYU, (480, 640), mode, "edge")[0]
    zero = native_prediction(patches, NYU, (480, 640), mode, "zero")[0]
    for frame in (edge, zero):
        assert torch.equal(frame[40:470, 38:603], inside)
    assert torch.equal(edge[470, 38:603], inside[-1])
    assert torch.equal(edge[0, 38:603], inside[0])
    assert torch.equal(edge[40:470, 0], inside[:, 0])
    assert edge[479, 639] == inside[-1, -1]
    assert zero[470].abs().max() == 0
    assert zero[:, :38].abs().max() == 0
    assert zero.sum() == pytest.approx(float(inside.sum()), rel=1e-12)


def test_a_frame_smaller_than_the_grid_is_zero_outside_its_crop() -> None:
    patches = grid((24, 24), 1)
    plan = ViewPlan(canvas=(48, 48), crop=(2, 9, 3, 13))
    frame = native_prediction(patches, plan, (12, 16), "bilinear", "zero")[0]
    assert torch.equal(frame[2:9, 3:13], upsample(patches, (7, 10), "bilinear")[0])
    assert int((frame != 0).sum()) == 70


def test_a_region_is_the_same_part_of_the_whole_frame() -> None:
    patches = grid((24, 24), 3)
    whole = native_prediction(patches, NYU, (480, 640), "bilinear", "edge")
    part = native_prediction(patches, NYU, (480, 640), "bilinear", "edge", (45, 471, 41, 601))
    assert part.shape == (3, 426, 560)
    assert torch.equal(part, whole[:, 45:471, 41:601])
    assert native_prediction(patches, NYU, (480, 640), "bilinear", "edge", (45, 45, 41, 601)).shape == (3, 0, 560)


def test_without_crop_the_whole_frame_is_predicted() -> None:
    plan = ViewPlan(canvas=(28, 56), grid=(1, 4))
    patches = grid((2, 4))
    found = native_prediction(patches, plan, (37, 121), "bilinear", "zero")
    torch.testing.assert_close(found, upsample(patches, (37, 121), "bilinear"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "plan", [NYU, ViewPlan((8, 12), (2, 3)), ViewPlan((4, 8), (1, 4)), ViewPlan((6, 4), (2, 1), flips=False)]
)
def test_views_are_combined_as_the_array_functions_do(plan: ViewPlan) -> None:
    height, width = plan.grid[0] * 3, plan.grid[1] * 5
    patch_plan = ViewPlan((height, width), plan.grid, flips=plan.flips)
    views = np.random.default_rng(0).random((4, plan.views, 3, 5))
    expected = np.stack([from_views(sample, patch_plan) for sample in views])
    tensor = torch.from_numpy(views)
    np.testing.assert_array_equal(combine_views(tensor, plan, tta=False).numpy(), expected[:, 0])
    if plan.flips:
        np.testing.assert_array_equal(combine_views(tensor, plan, tta=True).numpy(), expected.mean(axis=1))
    truth = np.random.default_rng(1).random((height, width))
    back = combine_views(torch.from_numpy(to_views(truth, patch_plan))[None], plan, tta=plan.flips)
    np.testing.assert_array_equal(back[0].numpy(), truth)


def test_what_cannot_be_done_is_refused() -> None:
    patches = grid((2, 2))
    with pytest.raises(UsageError, match=r"expected \(samples, 8 views, rows, columns\)"):
        combine_views(torch.zeros(3, 4, 2, 2), ViewPlan((4, 16), (1, 4)))
    with pytest.raises(UsageError, match="flip TTA needs mirrored views"):
        combine_views(torch.zeros(3, 1, 2, 2), ViewPlan((4, 4), flips=False), tta=True)
    with pytest.raises(UsageError, match="known are nearest, bilinear, bilinear-align-corners"):
        upsample(patches, (4, 4), "bicubic")
    with pytest.raises(UsageError, match="outside = 'mirror'"):
        native_prediction(patches, ViewPlan((4, 4)), (8, 8), "nearest", "mirror")
    with pytest.raises(SampleError, match="smaller than the crop"):
        native_prediction(patches, NYU, (240, 320), "bilinear", "edge")
