"""NYU Depth v2 in the BTS layout: the real excerpt, and small layouts with every mistake."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pcd.datasets import Dataset, create_dataset
from pcd.datasets.nyu import NyuDataset, NyuOptions, frame_key
from pcd.errors import DatasetError, MissingFileError, RecipeError, SampleError, UsageError
from tests.datasets_support import metres_of, read_pillow, read_png16, some_depth, some_rgb, write_jpeg, write_png

TRAIN, TEST = "nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt"


def line(scene: str, number: int, focal: str = "518.8579", slash: str = "/") -> str:
    return f"{slash}{scene}/rgb_{number:05d}.jpg {slash}{scene}/sync_depth_{number:05d}.png {focal}\n"


def frame(folder: Path, scene: str, number: int, size: tuple[int, int] = (6, 8)) -> None:
    write_jpeg(folder / scene / f"rgb_{number:05d}.jpg", some_rgb(*size))
    write_png(folder / scene / f"sync_depth_{number:05d}.png", some_depth(*size))


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """As published: train lines with a leading slash under sync/, test lines without under official_splits/test/."""
    root = tmp_path / "nyu"
    for number in range(3):
        frame(root / "sync", "kitchen_0001", number)
    frame(root / "official_splits" / "test", "bathroom", 45)
    (root / TRAIN).write_text("".join(line("kitchen_0001", number) for number in range(3)))
    (root / TEST).write_text(line("bathroom", 45, slash=""))
    return root


def open_nyu(root: Path, **options) -> NyuDataset:
    return NyuDataset(NyuOptions(root=root, **options))


def test_the_real_excerpt(shared_data):
    root = shared_data / "official" / "nyu"
    dataset: Dataset = create_dataset("nyu", {"root": str(root)})
    assert dataset.keys("train") == ("basement_0001a_out/00000", "basement_0001a_out/00050")
    assert dataset.keys("test") == ("basement_0001a_out/00100",)
    assert dataset.keys("val") == ()
    assert not dataset.missing_files("train")
    for split in ("train", "test"):
        for key in dataset.keys(split):
            sample = dataset.load(split, key)
            scene, number = key.split("/")
            expected = read_pillow(root / scene / f"sync_depth_{number}.png")
            assert sample.key == key
            assert np.abs(sample.rgb.astype(int) - read_pillow(root / scene / f"rgb_{number}.jpg")).max() <= 1
            np.testing.assert_allclose(sample.depth, np.where(expected, expected / 1000, np.nan), rtol=1e-6)
            assert dataset.size(split, key) == (480, 640) == sample.depth.shape
            assert sample.intrinsics is not None
            found = (sample.intrinsics.fx, sample.intrinsics.fy, sample.intrinsics.cx, sample.intrinsics.cy)
            np.testing.assert_allclose(found, (518.858, 519.470, 325.582, 253.736), atol=1e-3)


def test_a_real_depth_map_byte_by_byte(shared_data):
    root = shared_data / "official" / "nyu"
    depth = open_nyu(root).load("test", "basement_0001a_out/00100").depth
    rows = slice(200, 240)
    expected = metres_of(read_png16(root / "basement_0001a_out" / "sync_depth_00100.png")[rows], 1000)
    np.testing.assert_allclose(depth[rows], expected, rtol=1e-6)


def test_what_the_dataset_says_of_itself(layout):
    dataset: Dataset = open_nyu(layout)
    plan = dataset.view_plan()
    assert (dataset.name, dataset.family, dataset.synthetic) == ("nyu", "nyu", False)
    assert (dataset.depth_range, dataset.units_per_metre) == ((1e-3, 10.0), 1000)
    assert (plan.canvas, plan.grid, plan.crop) == ((336, 336), (1, 1), (40, 470, 38, 603))
    assert open_nyu(layout, depth_range=[0.5, 8]).depth_range == (0.5, 8.0)


def test_published_layout_with_its_two_folders(layout):
    dataset = open_nyu(layout)
    assert dataset.keys("train") == tuple(f"kitchen_0001/0000{number}" for number in range(3))
    sample = dataset.load("test", "bathroom/00045")
    np.testing.assert_allclose(sample.depth, metres_of(some_depth(), 1000), rtol=1e-6)
    assert sample.intrinsics is None, "the principal point is known for 480x640 only"
    assert dataset.missing_files("train") == dataset.missing_files("test") == []


def test_focal_length_of_the_list(layout):
    frame(layout, "kitchen_0001", 7, (480, 640))
    (layout / TRAIN).write_text(line("kitchen_0001", 7, "259.42895"))
    camera = open_nyu(layout).load("train", "kitchen_0001/00007").intrinsics
    assert camera is not None
    np.testing.assert_allclose((camera.fx, camera.fy), (259.42895, 259.7348), atol=1e-4)


def test_lists_and_folders_elsewhere(layout, tmp_path, monkeypatch):
    shutil.move(layout / "sync", tmp_path / "a")
    shutil.move(layout / "official_splits" / "test", tmp_path / "b")
    shutil.move(layout / TRAIN, tmp_path / "train.txt")
    (layout / "sub").mkdir()
    shutil.move(layout / TEST, layout / "sub" / "test.txt")
    monkeypatch.chdir(tmp_path)
    folders = {"train_root": tmp_path / "a", "test_root": "b"}
    dataset = open_nyu(layout, train_list="train.txt", test_list="sub/test.txt", **folders)
    assert dataset.load("train", "kitchen_0001/00001").depth.shape == (6, 8)
    assert dataset.load("test", "bathroom/00045").depth.shape == (6, 8)
    whole = NyuDataset(NyuOptions(train_list=Path("train.txt"), test_list=Path("nyu/sub/test.txt"), **folders))
    assert whole.identity() == dataset.identity()


def test_identity_knows_samples_but_not_places(layout, tmp_path):
    first = open_nyu(layout).identity()
    shutil.move(layout, tmp_path / "moved")
    assert open_nyu(tmp_path / "moved").identity() == first
    assert str(tmp_path) not in str(first)
    limited = open_nyu(tmp_path / "moved", limit=2)
    assert limited.keys("train") == ("kitchen_0001/00000", "kitchen_0001/00001")
    assert limited.identity() != first
    assert limited.identity() != open_nyu(tmp_path / "moved", limit=1).identity()
    assert open_nyu(tmp_path / "moved", limit=3).identity() == first
    (tmp_path / "moved" / TEST).write_text(line("bathroom", 46))
    assert open_nyu(tmp_path / "moved").identity() != first


@pytest.mark.parametrize(
    ("image", "key"),
    [("a/rgb_00045.jpg", "a/00045"), ("a/b/45.png", "a/b/45"), ("rgb_1.jpg", "1"), ("a/rgb_00045", None)],
)
def test_keys(image, key):
    assert frame_key(image) == key


def test_missing_files_are_listed_without_opening(layout):
    (layout / "sync" / "kitchen_0001" / "rgb_00001.jpg").unlink()
    depth = layout / "sync" / "kitchen_0001" / "sync_depth_00002.png"
    depth.unlink()
    dataset = open_nyu(layout)
    found = dataset.missing_files("train")
    assert [(key, path.name) for key, path in found] == [
        ("kitchen_0001/00001", "rgb_00001.jpg"),
        ("kitchen_0001/00002", "sync_depth_00002.png"),
    ]
    with pytest.raises(
        MissingFileError, match=r"kitchen_0001/rgb_00001\.jpg is not there.*sync.*line 2; set dataset\.train_root"
    ):
        dataset.load("train", "kitchen_0001/00001")
    with pytest.raises(MissingFileError, match=r"sync_depth_00002\.png is not there.*line 3"):
        dataset.size("train", "kitchen_0001/00002")


def test_missing_root_and_lists(layout, tmp_path):
    with pytest.raises(UsageError, match=r"nyu: no folder given; set --root or dataset\.root"):
        NyuDataset(NyuOptions())
    with pytest.raises(MissingFileError, match=r"gone is not there \(set by --root or dataset\.root\).*nyudepthv2_train"):
        open_nyu(tmp_path / "gone")
    with pytest.raises(MissingFileError, match=r"gone is not there \(set by dataset\.test_root\)"):
        open_nyu(layout, test_root=tmp_path / "gone")
    with pytest.raises(MissingFileError, match=r"holds neither layout; .*nyu_depth_v2_labeled\.mat"):
        open_nyu(tmp_path)
    with pytest.raises(MissingFileError, match=r"list other\.txt is not there.*dataset\.train_list"):
        open_nyu(layout, train_list="other.txt")
    (layout / TEST).unlink()
    with pytest.raises(MissingFileError, match=rf"list {TEST} is not there: no file {layout}.*dataset\.test_list"):
        open_nyu(layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/a/rgb_1.jpg /a/d_1.png\n", "line 2: found 2 fields, expected 3"),
        ("/a/rgb_1.jpg /a/d_1.png /a/dense_1.png 518\n", "line 2: found 4 fields, expected 3"),
        ("/a/rgb_1.jpg /a/d_1.png 518,8\n", "line 2: focal length '518,8': expected a number of pixels above 0"),
        ("/a/rgb_1.jpg /a/d_1.png nan\n", "line 2: focal length 'nan'"),
        ("/a/rgb_1.jpg /a/d_1.png -1\n", "line 2: focal length '-1'"),
        ("/a/rgb_1 /a/d_1.png 518\n", "line 2: the image path 'a/rgb_1' has not the form of"),
        (line("k", 9, slash="") + line("k", 9), "lines 2 and 3 are both frame 'k/00009'"),
    ],
)
def test_malformed_lists(layout, text, message):
    (layout / TRAIN).write_text(line("kitchen_0001", 0) + text)
    with pytest.raises(DatasetError, match=message) as caught:
        open_nyu(layout)
    assert str(layout / TRAIN) in str(caught.value)


def test_blank_lines_are_nothing_and_an_empty_list_is_an_error(layout):
    (layout / TRAIN).write_text("\n" + line("kitchen_0001", 0) + "\n\n")
    assert open_nyu(layout).keys("train") == ("kitchen_0001/00000",)
    (layout / TRAIN).write_text("\n\n")
    with pytest.raises(DatasetError, match=f"{TRAIN} names no frame with depth"):
        open_nyu(layout)


def test_bad_samples_name_their_file(layout):
    scene = layout / "sync" / "kitchen_0001"
    write_png(scene / "sync_depth_00000.png", some_rgb()[..., 0])
    write_jpeg(scene / "rgb_00001.jpg", some_rgb(6, 9))
    write_png(scene / "sync_depth_00002.png", np.zeros((6, 8), dtype=np.uint16))
    dataset = open_nyu(layout)
    for number, message in enumerate(
        [r"sync_depth_00000\.png is 8-bit", r"rgb_00001\.jpg is 6x9", r"sync_depth_00002\.png has no valid"]
    ):
        with pytest.raises(SampleError, match=message):
            dataset.load("train", f"kitchen_0001/0000{number}")


def test_samples_in_both_lists_are_noted(layout):
    assert open_nyu(layout).notes == ("sync layout",)
    (layout / TEST).write_text(line("bathroom", 45) + line("kitchen_0001", 1))
    assert "1 samples are in the train and in the test list" in open_nyu(layout).notes


def test_options_that_cannot_be_used(layout):
    with pytest.raises(UsageError, match="no sample 'x/1' among the 3 of the train list"):
        open_nyu(layout).load("train", "x/1")
    with pytest.raises(UsageError, match=r"dataset\.depth = 'filled' is only in the labelled file"):
        open_nyu(layout, depth="filled")
    with pytest.raises(UsageError, match=r"dataset\.mat has no meaning for the sync layout"):
        open_nyu(layout, mat="a.mat")
    with pytest.raises(RecipeError, match=r"unknown key 'rot'.*Did you mean 'root'"):
        create_dataset("nyu", {"rot": "x"})
    with pytest.raises(RecipeError, match="limit = 0"):
        create_dataset("nyu", {"limit": 0})
    with pytest.raises(RecipeError, match=r"depth_range = \[8, 1\].*give \[smallest, largest\]"):
        create_dataset("nyu", {"depth_range": [8, 1]})
