"""Canvases from gathered rows, and windows laid over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcd.errors import SampleError, UsageError
from pcd.evaluation.pixels import combine_views
from pcd.prediction import canvas
from pcd.prediction.canvas import gathered_canvas
from pcd.prediction.windows import Tiles, Windows, lay_out
from pcd.views import ViewPlan, image_canvas, to_views

KITTI = ViewPlan(canvas=(32, 128), grid=(1, 4))
GRID = (4, 8)


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_the_gathered_canvas_is_the_canvas(size: tuple[int, int], canvas_size: tuple[int, int], seed: int) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    plan = ViewPlan(canvas_size)
    np.testing.assert_allclose(gathered_canvas(rgb, plan), image_canvas(rgb, plan), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(480, 640), (375, 1242), (3001, 4003), (672, 672), (1, 5000)])
def test_the_gathered_canvas_is_the_canvas_of_real_sizes(size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for plan in (ViewPlan((336, 336)), ViewPlan((336, 1344), (1, 4))):
        np.testing.assert_allclose(gathered_canvas(rgb, plan), image_canvas(rgb, plan), rtol=0, atol=1e-6)


def test_rows_are_gathered_of_large_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(canvas, "gathered_canvas", lambda rgb, plan: used.append(rgb.shape))
    for size in ((480, 640), (3000, 4000)):
        canvas.canvas_of(np.zeros((*size, 3), dtype=np.uint8), ViewPlan((16, 16)))
    assert used == [(3000, 4000, 3)]


def test_the_gathered_canvas_is_cropped() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    plan = ViewPlan((336, 336), crop=(40, 470, 38, 603))
    np.testing.assert_allclose(gathered_canvas(rgb, plan), image_canvas(rgb, plan), rtol=0, atol=1e-6)
    with pytest.raises(SampleError, match="smaller than the crop"):
        gathered_canvas(rgb[:400], plan)


def test_without_overlap_and_scale_the_tiles_are_those_of_training() -> None:
    layout = lay_out(KITTI, GRID)
    assert isinstance(layout, Tiles)
    whole = np.random.default_rng(0).random((*KITTI.canvas, 3)).astype(np.float32)
    np.testing.assert_array_equal(layout.cut(whole), to_views(whole, KITTI))
    patches = torch.rand(2, 8, *GRID)
    assert torch.equal(layout.combine(patches), combine_views(patches, KITTI))


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("scale", "overlap"), [(1, 0.5), (1, 0.3), (1.5, 0), (2, 0.75), (1.3, 0.9)])
def test_windows_that_agree_come_back_unchanged(scale: float, overlap: float, flips: bool) -> None:
    """Each window is given its part of one map, cut by the same function that cuts images: constants, ramps, anything."""
    plan = ViewPlan(KITTI.canvas, KITTI.grid, flips=flips)
    layout = lay_out(plan, GRID, scale, overlap)
    assert isinstance(layout, Windows)
    assert layout.plan.view_size[0] % 8 == layout.plan.view_size[1] % 4 == 0
    rows, columns = round(4 * scale), round(32 * scale)
    assert layout.plan.canvas == (rows * 8, columns * 4)
    ramp = np.arange(rows)[:, None] * 0.5 + np.arange(columns)[None] * 0.25 + 1
    for whole in (np.full((rows, columns), 3.7), ramp, np.random.default_rng(1).random((rows, columns)) + 1):
        pixels = np.kron(whole, np.ones((8, 4))).astype(np.float32)[..., None].repeat(3, axis=2)
        views = layout.cut(pixels)
        assert views.shape == (layout.views, 32, 32, 3)
        patches = torch.from_numpy(views[:, ::8, ::4, 0].copy())[None]
        np.testing.assert_allclose(layout.combine(patches)[0].numpy(), whole, rtol=1e-6)


def test_a_step_between_windows_becomes_a_smooth_slope() -> None:
    """Two windows that disagree by 1: the blend rises monotonically across their overlap, from the one to the other."""
    layout = lay_out(ViewPlan((32, 48), flips=False), (4, 6), 2, 0.5)
    assert isinstance(layout, Windows)
    values = torch.tensor([float(column > 2) for _ in layout.rows for column in layout.columns])
    blended = layout.combine(values[None, :, None, None].expand(1, -1, 4, 6).contiguous())[0]
    line = blended[0].numpy()
    assert line[0] == 0
    assert line[-1] == 1
    assert (np.diff(line) >= 0).all()
    assert ((line > 0.02) & (line < 0.98)).sum() >= 3
    np.testing.assert_allclose(blended.numpy(), np.broadcast_to(line, blended.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("overlap", "offsets"), [(0.5, (0, 4, 8, 12, 16, 20, 24)), (0.25, (0, 6, 12, 18, 24)), (0.1, (0, 6, 12, 18, 24))]
)
def test_offsets_are_the_fewest_with_that_overlap(overlap: float, offsets: tuple[int, ...]) -> None:
    layout = lay_out(KITTI, GRID, overlap=overlap)
    assert isinstance(layout, Windows)
    assert layout.columns == offsets or overlap == 0.1
    assert layout.rows == (0,)
    shared = 8 - np.diff(layout.columns)
    assert shared.min() >= np.floor(8 * overlap)
    assert layout.columns[-1] == 24


def test_one_view_stays_one_window() -> None:
    layout = lay_out(ViewPlan((32, 32)), GRID, overlap=0.5)
    assert isinstance(layout, Windows)
    assert layout.is_single
    patches = torch.rand(1, 2, *GRID)
    expected = combine_views(patches, ViewPlan((32, 32)))
    torch.testing.assert_close(layout.combine(patches), expected)


@pytest.mark.parametrize(
    ("scale", "overlap"), [(0.5, 0.0), (9, 0.0), (float("nan"), 0.0), (1, -0.1), (1, 0.95), (1, float("nan"))]
)
def test_other_scales_and_overlaps_are_refused(scale: float, overlap: float) -> None:
    with pytest.raises(UsageError, match="expected"):
        lay_out(KITTI, GRID, scale, overlap)


def test_another_number_of_views_is_refused() -> None:
    with pytest.raises(UsageError, match="expected \\(N, 14 views, 4, 8\\)"):
        lay_out(KITTI, GRID, overlap=0.5).combine(torch.rand(1, 8, *GRID))
