"""The synthetic dataset: what it promises about keys, depth, intrinsics and repeatability."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import pytest

from pcd.datasets import create_dataset, registry
from pcd.datasets.synthetic import SyntheticDataset, SyntheticOptions
from pcd.errors import RecipeError, SampleError, UsageError
from pcd.fingerprint import canonical
from pcd.views import ViewPlan

SMALL = {"height": 60, "width": 80, "train": 6, "test": 4}


def make(**options) -> SyntheticDataset:
    return SyntheticDataset(SyntheticOptions(**{**SMALL, **options}))


def digest(sample) -> str:
    return hashlib.sha256(sample.rgb.tobytes() + sample.depth.tobytes()).hexdigest()


def backproject(depth, intrinsics, camera) -> np.ndarray:
    """Points `(H, W, 3)` in the world, from the returned intrinsics and the pose, by elementary rotations in float64."""
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    x, y = (columns - intrinsics.cx) / intrinsics.fx * depth, (rows - intrinsics.cy) / intrinsics.fy * depth
    seen = np.stack([x, y, depth.astype(np.float64)], axis=-1)

    def turn(axis: int, angle: float) -> np.ndarray:
        first, second = [(1, 2), (2, 0), (0, 1)][axis]
        matrix = np.eye(3)
        matrix[first, first] = matrix[second, second] = math.cos(angle)
        matrix[second, first], matrix[first, second] = math.sin(angle), -math.sin(angle)
        return matrix

    upright = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    pose = turn(2, camera.yaw) @ turn(0, camera.pitch) @ upright @ turn(2, camera.roll)
    points: np.ndarray = seen @ pose.T + np.array(camera.position)
    return points


def test_room_pixels_backproject_onto_the_room_and_its_furniture():
    dataset = make(kind="indoor", holes=0.0, height=120, width=160)
    for key in dataset.keys("train"):
        sample, scene = dataset.load("train", key), dataset.scene("train", key)
        points = backproject(sample.depth, sample.intrinsics, scene.camera)
        size = 2 * np.array(scene.solids[0].half)
        assert (points > -1e-4).all()
        assert (points < size + 1e-4).all()
        walls = (np.minimum(points, size - points) < 1e-4).any(axis=-1)
        assert walls.mean() > 0.1
        # What is not on a wall lies on the surface of a solid: on a face of a box, or one radius from the centre or axis.
        rest, on_something = points[~walls], np.zeros((~walls).sum(), dtype=bool)
        for solid in scene.solids[1:]:
            offset = rest - np.array(solid.centre)
            cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
            local = np.stack([offset @ [cos, sin, 0], offset @ [-sin, cos, 0], offset[:, 2]], axis=-1)
            if solid.shape == "box":
                away = np.abs(local) - np.array(solid.half)
                on_something |= np.abs(away.max(axis=-1)) < 2e-4
            elif solid.shape == "ball":
                on_something |= np.abs(np.linalg.norm(local / np.array(solid.half), axis=-1) - 1) < 2e-3
            else:
                radius, flat = np.hypot(local[:, 0], local[:, 1]), np.abs(np.abs(local[:, 2]) - solid.half[2]) < 2e-4
                on_something |= (np.abs(radius - solid.half[0]) < 2e-4) | (flat & (radius < solid.half[0]))
        assert on_something.mean() > 0.9999


def test_road_pixels_have_the_height_of_the_road():
    dataset = make(kind="outdoor", height=90, width=180)
    for key in dataset.keys("train"):
        sample, scene = dataset.load("train", key), dataset.scene("train", key)
        points = backproject(sample.depth, sample.intrinsics, scene.camera)
        on_road = np.abs(points[..., 2]) < 1e-3
        assert on_road.mean() > 0.08, key
        assert np.nanmin(points[..., 2]) > -0.05
        nearest = points[-1, 80:100]
        assert (np.abs(nearest[:, 2]) < 1e-4).any() or scene.camera.yaw > 0.1 or scene.camera.yaw < -0.1


@pytest.mark.parametrize("kind", ["indoor", "outdoor", "mixed"])
def test_samples_are_bit_identical_in_any_order(kind):
    first, second = make(kind=kind), make(kind=kind, train=5)
    forward = {key: digest(first.load("train", key)) for key in first.keys("train")[:4]}
    backward = {key: digest(second.load("train", key)) for key in reversed(second.keys("train")[:4])}
    assert forward == backward
    assert len(set(forward.values())) == 4


def test_scenes_depend_on_seed_split_and_number():
    samples = [make().load("train", "indoor-train-00001"), make().load("test", "indoor-test-00001")]
    samples += [make(seed=1).load("train", "indoor-train-00001"), make().load("train", "indoor-train-00002")]
    assert len({digest(sample) for sample in samples}) == 4


def test_noise_and_holes_leave_the_scene_alone():
    clean = make(noise=0.0, holes=0.0).load("train", "indoor-train-00000")
    dirty = make(noise=0.05, holes=0.3).load("train", "indoor-train-00000")
    valid = np.isfinite(dirty.depth)
    assert (~valid).sum() == round(0.3 * valid.size)
    np.testing.assert_array_equal(dirty.depth[valid], clean.depth[valid])
    change = dirty.rgb.astype(float) - clean.rgb
    inside = (clean.rgb > 50) & (clean.rgb < 200)
    assert change[inside].std() == pytest.approx(0.05 * 255, rel=0.1)


def test_rooms_have_depth_everywhere_and_roads_none_in_the_sky():
    rooms, roads = make(holes=0.0), make(kind="outdoor", width=120)
    for key in rooms.keys("train"):
        depth = rooms.load("train", key).depth
        assert np.isfinite(depth).all()
        assert depth.min() >= 0.1
        assert depth.max() <= 10.0
    missing = []
    for key in roads.keys("train"):
        sample, scene = roads.load("train", key), roads.scene("train", key)
        depth = sample.depth
        missing.append(np.isnan(depth).mean())
        assert np.nanmin(depth) >= 0.5
        assert np.nanmax(depth) <= 80.0
        assert np.isfinite(depth[-1]).all()
        top = max(solid.centre[2] + solid.half[2] for solid in scene.solids)
        points = backproject(np.where(np.isnan(depth), 80.0, depth), sample.intrinsics, scene.camera)
        assert np.isnan(depth[points[..., 2] > top]).all()
    assert 0.02 < np.mean(missing) < 0.6


def test_types_shapes_and_lists():
    dataset = make(kind="mixed", limit=3)
    assert dataset.keys("train") == ("indoor-train-00000", "outdoor-train-00001", "indoor-train-00002")
    assert dataset.keys("val") == ()
    assert len(dataset.keys("test")) == 3
    assert dataset.missing_files("train") == []
    sample = dataset.load("train", "outdoor-train-00001")
    assert sample.rgb.shape == (60, 80, 3)
    assert sample.rgb.dtype == np.uint8
    assert sample.depth.shape == dataset.size("train", sample.key) == (60, 80)
    assert sample.depth.dtype == np.float32
    assert sample.key == "outdoor-train-00001"
    assert sample.intrinsics is not None
    assert (sample.intrinsics.cx, sample.intrinsics.cy) == (39.5, 29.5)


def test_images_vary_and_are_well_exposed():
    for kind in ("indoor", "outdoor"):
        dataset = make(kind=kind, train=12)
        images = [dataset.load("train", key).rgb for key in dataset.keys("train")]
        for image in images:
            assert 25 < image.mean() < 215
            assert image.std() > 15
        depths = [float(np.nanmedian(dataset.load("train", key).depth)) for key in dataset.keys("train")]
        assert max(depths) > 1.4 * min(depths)


@pytest.mark.parametrize(
    ("options", "depth_range", "units", "plan"),
    [
        ({}, (0.1, 10.0), 1000, ViewPlan((224, 224), (1, 1))),
        ({"kind": "outdoor"}, (0.5, 80.0), 256, ViewPlan((224, 448), (1, 2))),
        ({"kind": "outdoor", "height": 376, "width": 1240}, (0.5, 80.0), 256, ViewPlan((224, 672), (1, 3))),
        ({"kind": "mixed"}, (0.5, 80.0), 256, ViewPlan((224, 224), (1, 1))),
    ],
)
def test_what_it_says_about_itself(options, depth_range, units, plan):
    dataset = create_dataset("synthetic", options)
    assert (dataset.family, dataset.synthetic) == ("generic", True)
    assert (dataset.depth_range, dataset.units_per_metre) == (depth_range, units)
    assert dataset.view_plan() == plan
    assert "synthetic" in registry.names()


def test_identity_changes_with_whatever_changes_the_samples():
    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"kind": "outdoor"},
        {"height": 61},
        {"width": 81},
        {"noise": 0.1},
        {"holes": 0.1},
        {"limit": 2},
    ]
    changes += [{"train": 5}, {"kind": "outdoor", "lidar": True}]
    texts = [canonical(make(**change).identity()) for change in changes]
    assert len(set(texts)) == len(changes)
    assert canonical(make().identity()) == texts[0]
    assert make().identity()["version"] >= 1


def test_lidar_keeps_some_of_the_depth_as_it_is():
    dense, sparse = (
        make(kind="outdoor", height=180, width=600, lidar=lidar).load("train", "outdoor-train-00000") for lidar in (False, True)
    )
    kept = np.isfinite(sparse.depth)
    np.testing.assert_array_equal(sparse.depth[kept], dense.depth[kept])
    assert 0.02 < kept.mean() < 0.5 * np.isfinite(dense.depth).mean()
    np.testing.assert_array_equal(sparse.rgb, dense.rgb)


@pytest.mark.parametrize("call", ["load", "size", "scene"])
@pytest.mark.parametrize("key", ["indoor-train-00006", "indoor-test-00000", "outdoor-train-00000", "nonsense"])
def test_an_unknown_key_is_named(call, key):
    with pytest.raises(SampleError, match=re.escape(repr(key))) as error:
        getattr(make(), call)("train", key)
    assert "indoor-train-00000 to indoor-train-00005" in str(error.value)


def test_an_unknown_split_is_named():
    with pytest.raises(UsageError, match=r"'trian'.*train, val, test"):
        make().keys("trian")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lidar": True}, "lidar.*rooms are not scanned"),
        ({"root": "/somewhere"}, "root.*leave 'root' out"),
        ({"kind": "outdor"}, "kind"),
        ({"holes": 1.0}, "holes"),
        ({"seed": -1}, "seed"),
        ({"hieght": 240}, "hieght.*Did you mean 'height'"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(RecipeError, match=words):
        create_dataset("synthetic", options)
