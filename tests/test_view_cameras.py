"""Where a point of the world lands in a view, by the view's camera, against where its image lands in the view itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pcd.stages.extract import extract
from pcd.views import ViewPlan, image_canvas, to_views, view_cameras
from tests.test_extract import toy_recipe

HEIGHT, WIDTH = 120, 200
CAMERA = (150.0, 140.0, 96.3, 63.8)
POINTS = [(0.1, 0.2, 2.0), (-0.9, -0.5, 3.0), (0.8, -0.3, 2.5), (-0.15, 0.45, 1.9)]
"""Metres, in the axes of the camera."""


def blob(x: float, y: float) -> npt.NDArray[np.uint8]:
    """A frame with one bright spot whose centre of mass is (x, y)."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    spot = 250 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.5**2))
    return np.repeat(np.rint(spot).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    "plan",
    [
        ViewPlan(canvas=(HEIGHT, WIDTH)),
        ViewPlan(canvas=(90, 260)),
        ViewPlan(canvas=(96, 128), grid=(2, 2)),
        ViewPlan(canvas=(80, 150), grid=(1, 3), crop=(7, 115, 12, 190)),
    ],
    ids=["as-it-is", "resized", "tiles", "crop"],
)
def test_points_land_where_the_camera_of_the_view_says(plan: ViewPlan) -> None:
    height, width = plan.view_size
    cameras, seen = view_cameras(CAMERA, HEIGHT, WIDTH, plan), 0
    assert cameras.shape == (plan.views, 4)
    assert cameras.dtype == np.float32
    for x, y, z in POINTS:
        frame = blob(CAMERA[0] * x / z + CAMERA[2], CAMERA[1] * y / z + CAMERA[3])
        views = to_views(image_canvas(frame, plan), plan)[..., 0].astype(np.float64)
        whole = views[: plan.tiles].sum()
        for number, (view, (fx, fy, cx, cy)) in enumerate(zip(views, cameras.astype(np.float64), strict=True)):
            if view.sum() < 0.99 * whole:
                continue  # of another tile, or on the border of two
            mirrored = -1 if number >= plan.tiles else 1
            columns, rows = np.meshgrid(np.arange(width), np.arange(height))
            found = (view * columns).sum() / view.sum(), (view * rows).sum() / view.sum()
            np.testing.assert_allclose(found, (fx * mirrored * x / z + cx, fy * y / z + cy), atol=0.06)
            seen += 1
    assert seen >= 2 * (plan.tiles > 1) + 4 * (plan.tiles == 1)


def test_unknown_cameras_stay_unknown() -> None:
    assert np.isnan(view_cameras([np.nan] * 4, HEIGHT, WIDTH, ViewPlan(canvas=(60, 100)))).all()


def test_a_column_of_cameras_is_made_for_heads_that_learn_from_it(tmp_path: Path) -> None:
    """Toy frames are 24x40 with fx = fy = 30 and the axis at (20, 12); views are two tiles of 16x16 of a canvas of 16x32."""
    table = {"name": "depthclip-adapter", "space": "joint", "min_depth": 0.1, "max_depth": 10.0, "supervision": "self"}
    recipe = toy_recipe(head=table, encoders={"pixels": {"name": "pixels"}})
    cache = extract(recipe, tmp_path / "cache", device="cpu").cache
    train = cache.table("train")
    found = train.column("view/intrinsics").read(train.view_rows(train.usable()[:2]).reshape(-1))
    first, second = 20.5 * 0.8 - 0.5, 12.5 * 16 / 24 - 0.5
    across = [first, first - 16, 31 - first, 31 - first - 16]
    expected = [(30 * 0.8, 30 * 16 / 24, x, second) for x in across]
    np.testing.assert_allclose(found, expected * (len(found) // 4), rtol=1e-6, atol=1e-5)
