"""Views and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pcd.errors import SampleError, UsageError
from pcd.views import (
    ViewPlan,
    depth_canvas,
    from_views,
    image_canvas,
    merge_tiles,
    resize_depth,
    resize_image,
    resize_nearest,
    split_tiles,
    to_views,
)

KITTI = ViewPlan(canvas=(336, 1344), grid=(1, 4))
NYU = ViewPlan(canvas=(336, 336), crop=(40, 470, 38, 603))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_views_and_back_is_the_identity(rows: int, columns: int, height: int, width: int, flips: bool) -> None:
    plan = ViewPlan((rows * height, columns * width), (rows, columns), flips=flips)
    canvas = np.arange(rows * height * columns * width, dtype=np.float32).reshape(plan.canvas)
    views = to_views(canvas, plan)
    assert views.shape == (plan.views, height, width)
    back = from_views(views, plan)
    assert back.shape == (2 if flips else 1, *plan.canvas)
    for restored in back:
        np.testing.assert_array_equal(restored, canvas)


def test_tiles_are_in_reading_order_and_flip_reverses_them() -> None:
    canvas = np.arange(2 * 8).reshape(2, 8)
    tiles = split_tiles(canvas, (1, 4))
    np.testing.assert_array_equal(tiles[1], canvas[:, 2:4])
    views = to_views(canvas, ViewPlan((2, 8), (1, 4)))
    np.testing.assert_array_equal(views[4 + 0], canvas[:, 6:8][:, ::-1])  # first tile of the mirrored canvas
    np.testing.assert_array_equal(merge_tiles(tiles, (1, 4)), canvas)


def test_colour_images_keep_their_channels() -> None:
    canvas = np.random.default_rng(0).random((4, 6, 3)).astype(np.float32)
    plan = ViewPlan((4, 6), (2, 3))
    np.testing.assert_array_equal(from_views(to_views(canvas, plan), plan)[1], canvas)


def test_resize_agrees_with_torch() -> None:
    image = np.random.default_rng(1).random((37, 53, 3)).astype(np.float32)
    for size in ((20, 90), (74, 30), (37, 53)):
        ours = resize_image(image, size)
        theirs = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=2e-6)


def test_nearest_takes_the_floor_index() -> None:
    row = np.arange(5)[None].repeat(2, axis=0)
    np.testing.assert_array_equal(resize_nearest(row, (1, 3)), [[0, 1, 3]])
    np.testing.assert_array_equal(resize_nearest(row, (2, 10))[0], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


def _slow_masked_bilinear(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The half-valid rule pixel by pixel, from the definition of bilinear interpolation with half-pixel centres."""
    height, width = depth.shape
    out = np.full(size, np.nan)
    for y in range(size[0]):
        for x in range(size[1]):
            sy = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            sx = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            y0, x0 = int(sy), int(sx)
            total = weight = 0.0
            for yy, wy in ((y0, 1 - (sy - y0)), (min(y0 + 1, height - 1), sy - y0)):
                for xx, wx in ((x0, 1 - (sx - x0)), (min(x0 + 1, width - 1), sx - x0)):
                    if np.isfinite(depth[yy, xx]):
                        total += wy * wx * depth[yy, xx]
                        weight += wy * wx
            if weight >= 0.5:
                out[y, x] = total / weight
    return out


def test_masked_bilinear_follows_the_half_valid_rule() -> None:
    generator = np.random.default_rng(2)
    depth = generator.uniform(0.5, 9, (23, 31)).astype(np.float32)
    depth[generator.random(depth.shape) < 0.4] = np.nan
    for size in ((17, 29), (50, 40)):
        ours, slow = resize_depth(depth, size, "masked-bilinear"), _slow_masked_bilinear(depth, size)
        differ = np.isfinite(ours) != np.isfinite(slow)
        assert differ.mean() < 0.002  # only where the weight is one half up to rounding
        both = np.isfinite(ours) & np.isfinite(slow)
        np.testing.assert_allclose(ours[both], slow[both], rtol=2e-5)


def test_masked_bilinear_of_a_full_map_is_bilinear() -> None:
    depth = np.random.default_rng(3).uniform(1, 5, (20, 20)).astype(np.float32)
    np.testing.assert_allclose(resize_depth(depth, (33, 15), "masked-bilinear"), resize_image(depth, (33, 15)), rtol=1e-6)


def test_nyu_crop_uses_the_documented_rows_and_columns() -> None:
    depth = np.full((480, 640), np.nan, dtype=np.float32)
    depth[40:470, 38:603] = 2.0
    assert np.isfinite(depth_canvas(depth, NYU, "nearest")).all()
    depth[40] = np.nan
    assert np.isnan(depth_canvas(depth, NYU, "nearest")[0]).all()
    rgb = np.zeros((480, 640, 3), dtype=np.uint8)
    rgb[40:470, 38:603] = 255
    assert image_canvas(rgb, NYU).min() == 1.0


def test_frame_smaller_than_the_crop_is_named() -> None:
    with pytest.raises(SampleError, match=r"300x400 is smaller than the crop rows 40:470"):
        image_canvas(np.zeros((300, 400, 3), dtype=np.uint8), NYU)


@pytest.mark.parametrize("bad", [{"canvas": (10, 10), "grid": (3, 1)}, {"canvas": (4, 4), "crop": (5, 5, 0, 4)}])
def test_impossible_plans_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="views"):
        ViewPlan(**bad)  # type: ignore[arg-type]


def test_plan_survives_json() -> None:
    for plan in (NYU, KITTI, ViewPlan((8, 8), flips=False)):
        assert ViewPlan.from_json(plan.as_json()) == plan
    assert KITTI.views == 8
    assert KITTI.view_size == (336, 336)
