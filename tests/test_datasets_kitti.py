"""KITTI with the Eigen lists: the real excerpt, and small layouts with every mistake."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pcd.datasets import Dataset, create_dataset
from pcd.datasets.kitti import KittiDataset, KittiOptions, frame_key, read_calibration
from pcd.errors import DatasetError, MissingFileError, SampleError, UsageError
from tests.datasets_support import metres_of, read_pillow, read_png16, some_depth, some_rgb, write_jpeg, write_png

TRAIN, TEST = "eigen_train_files_with_gt.txt", "eigen_test_files_with_gt.txt"
DRIVE = "2011_09_26_drive_0001_sync"
OTHER = "2011_10_03_drive_0034_sync"


def image_name(drive: str, number: int, lens: int = 2) -> str:
    return f"{drive[:10]}/{drive}/image_0{lens}/data/{number:010d}.png"


def depth_name(drive: str, number: int, lens: int = 2) -> str:
    return f"{drive}/proj_depth/groundtruth/image_0{lens}/{number:010d}.png"


def line(drive: str, number: int, depth: str | None = None, focal: str = "721.5377", lens: int = 2) -> str:
    return f"{image_name(drive, number, lens)} {depth or depth_name(drive, number, lens)} {focal}\n"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Train drive in train/, test drive in val/, as the annotated depth is published."""
    root = tmp_path / "kitti"
    for number in range(3):
        write_png(root / "raw" / image_name(DRIVE, number), some_rgb())
        write_png(root / "data_depth_annotated" / "train" / depth_name(DRIVE, number), some_depth())
    write_png(root / "raw" / image_name(OTHER, 9), some_rgb())
    write_png(root / "data_depth_annotated" / "val" / depth_name(OTHER, 9), some_depth() + 1)
    (root / TRAIN).write_text("".join(line(DRIVE, number) for number in range(3)))
    (root / TEST).write_text(line(OTHER, 9, focal="718.856") + line(OTHER, 10, "None"))
    return root


def open_kitti(root: Path, **options) -> KittiDataset:
    return KittiDataset(KittiOptions(root=root, **options))


def test_the_real_excerpt(shared_data):
    root = shared_data / "official" / "kitti"
    dataset: Dataset = create_dataset("kitti", {"root": str(root)})
    assert [len(dataset.keys(split)) for split in ("train", "val", "test")] == [8, 0, 4]
    assert dataset.keys("train")[0] == "2011_09_26_drive_0001_sync/0000000005"
    assert dataset.notes == (f"{TEST}: 1 of 5 lines have no depth map and are left out",)
    depth_folder = root / "data_depth_annotated/train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02"
    image_folder = root / "raw/2011_09_26/2011_09_26_drive_0001_sync/image_02/data"
    for split in ("train", "test"):
        assert dataset.missing_files(split) == []
        for key in dataset.keys(split):
            sample, number = dataset.load(split, key), key.split("/")[1]
            expected = read_pillow(depth_folder / f"{number}.png").astype(np.float64)
            np.testing.assert_allclose(sample.depth, np.where(expected, expected / 256, np.nan), rtol=1e-6)
            assert np.abs(sample.rgb.astype(int) - read_pillow(image_folder / f"{number}.jpg")).max() <= 1
            assert dataset.size(split, key) == (375, 1242) == sample.rgb.shape[:2]
            assert sample.intrinsics is not None
            found = (sample.intrinsics.fx, sample.intrinsics.fy, sample.intrinsics.cx, sample.intrinsics.cy)
            np.testing.assert_allclose(found, (721.5377, 721.5377, 609.5593, 172.854), atol=1e-4)


def test_a_real_depth_map_byte_by_byte(shared_data):
    root = shared_data / "official" / "kitti"
    depth = open_kitti(root).load("test", f"{DRIVE}/0000000014").depth
    stored = read_png16(root / "data_depth_annotated/train" / depth_name(DRIVE, 14))
    rows = slice(180, 220)
    np.testing.assert_allclose(depth[rows], metres_of(stored[rows], 256), rtol=1e-6)
    assert 60 < np.nanmax(depth) < 90, "metres: divided by 1000 it would end near 22"


def test_what_the_dataset_says_of_itself(layout):
    dataset: Dataset = open_kitti(layout)
    plan = dataset.view_plan()
    assert (dataset.name, dataset.family, dataset.synthetic) == ("kitti", "kitti", False)
    assert (dataset.depth_range, dataset.units_per_metre) == ((1e-3, 80.0), 256)
    assert (plan.canvas, plan.grid, plan.crop) == ((336, 1344), (1, 4), None)
    assert open_kitti(layout, depth_range=(1, 30)).depth_range == (1.0, 30.0)


def test_published_layout_with_train_and_val(layout):
    dataset = open_kitti(layout)
    assert dataset.keys("train") == tuple(f"{DRIVE}/{number:010d}" for number in range(3))
    assert dataset.keys("test") == (f"{OTHER}/0000000009",)
    sample = dataset.load("test", f"{OTHER}/0000000009")
    np.testing.assert_allclose(sample.depth, metres_of(some_depth() + 1, 256), rtol=1e-6)
    assert np.array_equal(sample.rgb, some_rgb())


def test_the_official_test_list_has_652_frames(layout):
    lines = [line(OTHER, number, "None" if number % 15 == 0 and number < 675 else None) for number in range(697)]
    (layout / TEST).write_text("".join(lines))
    dataset = open_kitti(layout)
    assert len(dataset.keys("test")) == 652
    assert dataset.notes[0] == f"{TEST}: 45 of 697 lines have no depth map and are left out"


@pytest.mark.parametrize("place", ["", "train", "val", "data_depth_annotated", "data_depth_annotated/val"])
def test_depth_is_found_where_people_keep_it(layout, tmp_path, place):
    annotated = tmp_path / "elsewhere" / place
    annotated.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(layout / "data_depth_annotated" / "train", annotated)
    shutil.move(layout / "data_depth_annotated" / "val" / OTHER, annotated)
    dataset = open_kitti(layout, depth_root=tmp_path / "elsewhere")
    assert not dataset.missing_files("train") + dataset.missing_files("test")
    assert dataset.load("train", f"{DRIVE}/0000000001").depth.shape == (6, 8)
    assert dataset.size("test", f"{OTHER}/0000000009") == (6, 8)


def test_everything_elsewhere_needs_no_root(layout, tmp_path):
    first = open_kitti(layout)
    places = {"image_root": layout / "raw", "depth_root": layout}
    dataset = KittiDataset(KittiOptions(train_list=layout / TRAIN, test_list=layout / TEST, **places))
    assert dataset.identity() == first.identity()
    assert dataset.load("train", f"{DRIVE}/0000000001").depth.shape == (6, 8)
    with pytest.raises(UsageError, match=r"kitti: no folder given; set --root or dataset\.root"):
        KittiDataset(KittiOptions(train_list=layout / TRAIN, **places))


def test_jpeg_copies_of_png_images(layout):
    before = open_kitti(layout).identity()
    rgb = some_rgb(40, 56)
    for number in range(3):
        path = layout / "raw" / image_name(DRIVE, number)
        path.unlink()
        write_jpeg(path.with_suffix(".jpg"), rgb)
        write_png(layout / "data_depth_annotated/train" / depth_name(DRIVE, number), some_depth(40, 56))
    dataset = open_kitti(layout)
    assert "images are listed as PNG and stored as JPEG" in dataset.notes
    assert dataset.missing_files("train") == []
    path = (layout / "raw" / image_name(DRIVE, 0)).with_suffix(".jpg")
    assert np.abs(dataset.load("train", f"{DRIVE}/0000000000").rgb.astype(int) - read_pillow(path)).max() <= 1
    assert dataset.identity() != before, "other pixels, so not the same data"
    assert {**dataset.identity(), "jpeg_copies": False} == before


def test_png_is_preferred_and_jpeg_is_never_replaced(layout):
    write_jpeg((layout / "raw" / image_name(DRIVE, 0)).with_suffix(".jpg"), 255 - some_rgb())
    dataset = open_kitti(layout)
    assert np.array_equal(dataset.load("train", f"{DRIVE}/0000000000").rgb, some_rgb())
    assert not any("JPEG" in note for note in dataset.notes)
    (layout / TRAIN).write_text(line(DRIVE, 1).replace(".png", ".jpg", 1))
    with pytest.raises(MissingFileError, match=r"0000000001\.jpg is not there"):
        open_kitti(layout).load("train", f"{DRIVE}/0000000001")
    (layout / TRAIN).write_text(line(DRIVE, 0).replace(".png", ".tif", 1))
    with pytest.raises(MissingFileError, match=r"0000000000\.tif is not there"):
        open_kitti(layout).load("train", f"{DRIVE}/0000000000")


def test_cameras(layout):
    numbers = "7.1e+02 0 600 4.5e+01 0 7.2e+02 180 2e-01 0 0 1 2e-03"
    (layout / "raw/2011_09_26/calib_cam_to_cam.txt").write_text(
        f"calib_time: 09-Jan-2012\nP_rect_02: {numbers}\nP_rect_03: {numbers}\n"
    )
    dataset = open_kitti(layout)
    camera = dataset.load("train", f"{DRIVE}/0000000000").intrinsics
    assert camera is not None
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (710, 720, 600, 180)
    plain = dataset.load("test", f"{OTHER}/0000000009").intrinsics
    assert plain is not None
    assert (plain.fx, plain.fy, plain.cx, plain.cy) == (718.856, 718.856, 3.5, 2.5)
    assert dataset.notes[-1].startswith("no calib_cam_to_cam.txt for 2011_10_03: focal length from the list")


@pytest.mark.parametrize("numbers", ["1 2 3", "1 2 3 4 5 6 7 8 9 10 11 x", ""])
def test_broken_calibration(tmp_path, numbers):
    path = tmp_path / "calib_cam_to_cam.txt"
    path.write_text(f"K_02: 1 2\nP_rect_02: {numbers}\n")
    with pytest.raises(DatasetError, match=r"calib_cam_to_cam\.txt, line 2: P_rect_02 is not a 3x4 matrix"):
        read_calibration(path)


def test_calibration_of_the_real_excerpt(shared_data):
    cameras = read_calibration(shared_data / "official/kitti/raw/2011_09_26/calib_cam_to_cam.txt")
    assert sorted(cameras) == ["image_00", "image_01", "image_02", "image_03"]


@pytest.mark.parametrize(
    ("image", "key"),
    [
        (image_name(DRIVE, 5), f"{DRIVE}/0000000005"),
        (image_name(DRIVE, 5, lens=3), f"{DRIVE}/image_03/0000000005"),
        (f"{DRIVE}/image_02/data/0000000005.jpg", f"{DRIVE}/0000000005"),
        ("2011_09_26/some_drive/image_02/data/0000000005.png", None),
        (f"2011_09_26/{DRIVE}/data/0000000005.png", None),
    ],
)
def test_keys(image, key):
    assert frame_key(image) == key


def test_identity_names_the_depth_files(layout):
    before = open_kitti(layout).identity()
    (layout / TRAIN).write_text((layout / TRAIN).read_text().replace("groundtruth", "velodyne_raw"))
    assert open_kitti(layout).keys("train") == tuple(f"{DRIVE}/{number:010d}" for number in range(3))
    assert open_kitti(layout).identity() != before


def test_lists_can_be_read_before_any_image_is_there(layout):
    expected = open_kitti(layout).identity()
    shutil.rmtree(layout / "raw")
    assert open_kitti(layout).identity() == expected
    assert len(open_kitti(layout).missing_files("train")) == 3


def test_both_cameras_in_one_list(layout):
    write_png(layout / "raw" / image_name(DRIVE, 0, 3), 255 - some_rgb())
    write_png(layout / "data_depth_annotated/train" / depth_name(DRIVE, 0, 3), some_depth())
    (layout / TRAIN).write_text(line(DRIVE, 0) + line(DRIVE, 0, lens=3))
    assert np.array_equal(open_kitti(layout).load("train", f"{DRIVE}/image_03/0000000000").rgb, 255 - some_rgb())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(DRIVE, 1).replace(" 721.5377", ""), "line 2: found 2 fields, expected 3"),
        (line(DRIVE, 1, focal="f"), "line 2: focal length 'f'"),
        (line(DRIVE, 0), "lines 1 and 2 are both frame '2011_09_26_drive_0001_sync/0000000000'"),
        ("a/b.png c/d.png 721\n", "line 2: the image path 'a/b.png' has not the form of '2011_09_26/"),
    ],
)
def test_malformed_lists(layout, text, message):
    (layout / TRAIN).write_text(line(DRIVE, 0) + text)
    with pytest.raises(DatasetError, match=message):
        open_kitti(layout)


def test_a_list_without_any_depth(layout):
    (layout / TEST).write_text(line(OTHER, 9, "None"))
    with pytest.raises(DatasetError, match=f"{TEST} names no frame with depth"):
        open_kitti(layout)


def test_missing_root_list_image_and_depth(layout, tmp_path):
    with pytest.raises(MissingFileError, match=r"gone is not there \(set by --root or dataset\.root\).*eigen_train"):
        open_kitti(tmp_path / "gone")
    with pytest.raises(MissingFileError, match=r"gone is not there \(set by dataset\.image_root\)"):
        open_kitti(layout, image_root=tmp_path / "gone")
    (layout / "raw" / image_name(DRIVE, 0)).unlink()
    (layout / "data_depth_annotated/train" / depth_name(DRIVE, 1)).unlink()
    dataset = open_kitti(layout)
    assert [key for key, _ in dataset.missing_files("train")] == [f"{DRIVE}/0000000000", f"{DRIVE}/0000000001"]
    with pytest.raises(MissingFileError, match=r"image_02/data/0000000000\.png is not there.*line 1; set dataset\.image_root"):
        dataset.load("train", f"{DRIVE}/0000000000")
    with pytest.raises(MissingFileError, match=r"image_02/0000000001\.png is not there.*val.*line 2; set dataset\.depth_root"):
        dataset.load("train", f"{DRIVE}/0000000001")
    (layout / TRAIN).unlink()
    with pytest.raises(MissingFileError, match=rf"list {TRAIN} is not there.*dataset\.train_list"):
        open_kitti(layout)


def test_bad_samples_name_their_file(layout):
    folder = layout / "data_depth_annotated/train"
    write_png(folder / depth_name(DRIVE, 0), some_rgb().astype(np.uint16))
    write_png(folder / depth_name(DRIVE, 1), some_depth(7, 8))
    write_png(folder / depth_name(DRIVE, 2), np.zeros((6, 8), dtype=np.uint16))
    dataset = open_kitti(layout)
    for number, message in enumerate(
        ["3 channels; expected 16-bit, 1 channel", "is 6x8 .* 7x8; they must be equal", "no valid pixel"]
    ):
        with pytest.raises(SampleError, match=message) as caught:
            dataset.load("train", f"{DRIVE}/{number:010d}")
        assert depth_name(DRIVE, number) in str(caught.value)
