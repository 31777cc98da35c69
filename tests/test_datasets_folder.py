"""Anybody's frames by a manifest: the real collection, and small tables with every mistake."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcd import depths
from pcd.datasets import Dataset, Grouped, create_dataset
from pcd.datasets.folder import FolderDataset, FolderOptions
from pcd.errors import DatasetError, MissingFileError, RecipeError, SampleError, UsageError
from tests.datasets_support import metres_of, read_pillow, read_png16, scene_rows, some_depth, some_rgb, write_csv, write_png


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return scene_rows(tmp_path)


@pytest.fixture
def root(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write_csv(tmp_path, rows)
    return tmp_path


def open_folder(root: Path, **options) -> FolderDataset:
    return FolderDataset(FolderOptions(root=root, **{"unit": "mm", **options}))


def test_the_real_collection_as_it_is(shared_data):
    root = shared_data / "rgbd"
    options = {"root": str(root), "manifest": "frames.csv", "group": "scene", "test_fraction": 0.2}
    dataset: Dataset = create_dataset("folder", options)
    train, test = dataset.keys("train"), dataset.keys("test")
    assert len(train) + len(test) == 158
    assert len(test) == pytest.approx(32, abs=6)
    assert not dataset.missing_files("train") + dataset.missing_files("test")
    assert isinstance(dataset, Grouped)
    scenes = dataset.groups("train"), dataset.groups("test")
    assert not set(scenes[0].values()) & set(scenes[1].values())
    assert dataset.units_per_metre == 256, "the rows differ, and 256 units hold all"
    with (root / "frames.csv").open() as handle:
        table = {row["image"]: row for row in csv.DictReader(handle)}
    for split in ("train", "test"):
        for key in dataset.keys(split)[::9]:
            sample = dataset.load(split, key)
            image = next(name for name in table if name.startswith(key + "."))
            row = table[image]
            stored = read_pillow(root / row["depth"]).astype(np.float64)
            expected = np.where(stored, stored / float(row["units_per_metre"]), np.nan)
            np.testing.assert_allclose(sample.depth, expected, rtol=1e-6)
            assert np.abs(sample.rgb.astype(int) - read_pillow(root / image)).max() <= 1
            assert (None if sample.intrinsics is None else sample.intrinsics.fx) == (float(row["fx"]) if row["fx"] else None)
            assert np.isfinite(sample.depth).mean() == pytest.approx(float(row["valid_fraction"]), abs=1e-3)


def test_one_real_scene_in_sequence(shared_data):
    dataset = open_folder(
        shared_data / "rgbd",
        manifest="frames.csv",
        where={"scene": "7scenes_redkitchen"},
        order="sequence",
        test_fraction=0.2,
    )
    assert (len(dataset.keys("train")), len(dataset.keys("test"))) == (64, 16)
    assert max(dataset.keys("train")) < min(dataset.keys("test"))
    assert dataset.units_per_metre == 1000
    key = dataset.keys("test")[0]
    rows = slice(100, 130)
    expected = metres_of(read_png16(shared_data / "rgbd" / (key.removesuffix(".rgb") + ".depth.png"))[rows], 1000)
    np.testing.assert_allclose(dataset.load("test", key).depth[rows], expected, rtol=1e-6)


def test_without_options_everything_is_for_training(root):
    dataset: Dataset = open_folder(root)
    assert dataset.keys("train") == tuple(f"rgb/{i}" for i in range(6))
    assert dataset.keys("val") == dataset.keys("test") == ()
    sample = dataset.load("train", "rgb/3")
    assert np.array_equal(sample.rgb, some_rgb() + np.uint8(3))
    np.testing.assert_allclose(sample.depth, metres_of(some_depth() + np.uint16(3), 1000), rtol=1e-6)
    assert sample.intrinsics is None
    assert (dataset.family, dataset.synthetic, dataset.size("train", "rgb/3")) == ("generic", False, (6, 8))
    plan = dataset.view_plan()
    assert (plan.canvas, plan.grid, plan.crop) == ((336, 336), (1, 1), None)


def test_json_lines_say_the_same_as_csv(root, rows):
    first = open_folder(root)
    (root / "manifest.csv").unlink()
    (root / "manifest.jsonl").write_text("\n\n".join(json.dumps({**row, "level": 1, "note": None}) for row in rows) + "\n")
    second = open_folder(root)
    assert second.identity() == first.identity()
    assert open_folder(root, where={"level": 1}).keys("train") == first.keys("train")


def test_columns_and_their_defaults(tmp_path, rows):
    rows[0] |= {"units_per_metre": "", "unit": "", "invalid": "", "min_depth": "", "fx": ""}
    rows[1] |= {"units_per_metre": "500", "key": "second"}
    rows[2] |= {"unit": "1/256", "invalid": "539; 576;", "max_depth": 20}
    rows[3] |= {"min_depth": "0.6", "max_depth": "1.5"}
    rows[4] |= {"fx": "500", "fy": "501", "cx": "4", "cy": "3"}
    write_csv(tmp_path, rows)
    dataset = open_folder(tmp_path, invalid=[611, 613], max_depth=2)
    stored = some_depth().astype(np.float64)

    def expected(i: int, units: float, invalid: tuple[int, ...], smallest: float, largest: float) -> np.ndarray:
        value = stored + i
        metres = value / units
        missing = (value == 0) | np.isin(value, invalid) | (metres < smallest) | (metres > largest)
        return np.where(missing, np.nan, metres)

    cases = {
        "rgb/0": expected(0, 1000, (611, 613), 0, 2),
        "second": expected(1, 500, (611, 613), 0, 2),
        "rgb/2": expected(2, 256, (539, 576), 0, 20),
        "rgb/3": expected(3, 1000, (611, 613), 0.6, 1.5),
        "rgb/4": expected(4, 1000, (611, 613), 0, 2),
    }
    for key, metres in cases.items():
        np.testing.assert_allclose(dataset.load("train", key).depth, metres, rtol=1e-6, err_msg=key)
    camera = dataset.load("train", "rgb/4").intrinsics
    assert camera is not None
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (500, 501, 4, 3)
    assert dataset.depth_range == (1e-3, 2.0)


def test_units_that_keep_the_ground_truth(tmp_path, rows):
    for row, units in zip(rows, (1000, 5000, 1000, 1000, 1000, 1000), strict=True):
        row["units_per_metre"] = units
    write_csv(tmp_path, rows)
    dataset = FolderDataset(FolderOptions(root=tmp_path))
    assert dataset.units_per_metre == 1000, "the coarsest file reaches 65.535 m, which millimetres hold"
    for key in dataset.keys("train"):
        depths.encode(dataset.load("train", key).depth, dataset.units_per_metre)
    rows[0]["units_per_metre"] = 256
    write_csv(tmp_path, rows)
    assert FolderDataset(FolderOptions(root=tmp_path)).units_per_metre == 256
    assert FolderDataset(FolderOptions(root=tmp_path, max_depth=20)).units_per_metre == 1000


def test_float_files(tmp_path):
    write_png(tmp_path / "a.png", some_rgb())
    metres = some_depth().astype(np.float32) / 100
    np.save(tmp_path / "a.npy", metres)
    Image.fromarray(metres).save(tmp_path / "a.tiff")
    write_csv(tmp_path, [{"image": "a.png", "depth": "a.npy", "key": "n"}, {"image": "a.png", "depth": "a.tiff", "key": "t"}])
    dataset = FolderDataset(FolderOptions(root=tmp_path))
    for key in ("n", "t"):
        np.testing.assert_array_equal(dataset.load("train", key).depth, np.where(metres > 0, metres, np.nan))
        assert dataset.size("train", key) == (6, 8)
    assert dataset.units_per_metre == 256
    assert FolderDataset(FolderOptions(root=tmp_path, max_depth=30)).units_per_metre == 1000


def test_a_split_column(tmp_path, rows):
    for row, split in zip(rows, ("train", "test", "train", "val", "test", "train"), strict=True):
        row["split"] = split
    write_csv(tmp_path, rows)
    dataset = open_folder(tmp_path, limit=2)
    assert dataset.keys("train") == ("rgb/0", "rgb/2")
    assert dataset.keys("val") == ("rgb/3",)
    assert dataset.keys("test") == ("rgb/1", "rgb/4")
    with pytest.raises(UsageError, match=r"has a column split, so dataset\.test_fraction has no use"):
        open_folder(tmp_path, test_fraction=0.5)
    rows[5]["split"] = ""
    write_csv(tmp_path, rows)
    with pytest.raises(DatasetError, match=r"manifest\.csv, line 7: no split, but other rows have one"):
        open_folder(tmp_path)


def test_seeded_test_set(root):
    first = open_folder(root, test_fraction=0.34)
    assert (len(first.keys("train")), len(first.keys("test"))) == (4, 2)
    assert first.keys("test") == open_folder(root, test_fraction=0.34).keys("test")
    assert len({open_folder(root, test_fraction=0.34, split_seed=seed).keys("test") for seed in range(8)}) > 1
    assert first.groups("test") == {}


def test_groups_are_never_torn_apart(root):
    for seed in range(6):
        dataset = open_folder(root, test_fraction=0.34, split_seed=seed, group="scene")
        train, test = dataset.groups("train"), dataset.groups("test")
        assert tuple(train) == dataset.keys("train")
        assert test
        assert not set(train.values()) & set(test.values())


def test_the_end_of_each_scene(root):
    dataset = open_folder(root, test_fraction=0.34, order="sequence", group="scene")
    assert dataset.keys("test") == ("rgb/2", "rgb/4")
    assert open_folder(root, test_fraction=0.34, order="sequence").keys("test") == ("rgb/4", "rgb/5")


def test_selected_rows(root):
    assert open_folder(root, where={"scene": "yard"}).keys("train") == ("rgb/3", "rgb/4")
    both = open_folder(root, where={"scene": ["yard", "attic"], "image": "rgb/5.png"})
    assert both.keys("train") == ("rgb/5",)
    with pytest.raises(DatasetError, match=r"no column 'scen'.*Did you mean 'scene'"):
        open_folder(root, where={"scen": "yard"})
    with pytest.raises(DatasetError, match=r"no row has scene = yrd.*Did you mean 'yard'"):
        open_folder(root, where={"scene": "yrd"})
    with pytest.raises(DatasetError, match=r"no column 'room'"):
        open_folder(root, group="room")


def test_identity_follows_what_the_samples_are(root, tmp_path_factory):
    first = open_folder(root, test_fraction=0.34)
    moved = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(root, moved)
    assert open_folder(moved, test_fraction=0.34).identity() == first.identity()
    assert (
        FolderDataset(FolderOptions(manifest=moved / "manifest.csv", unit="mm", test_fraction=0.34)).identity()
        == first.identity()
    )
    others: list[dict[str, Any]] = [
        {"unit": "cm"},
        {"invalid": 7},
        {"max_depth": 3},
        {"min_depth": 0.6},
        {"limit": 3},
        {"split_seed": 3},
    ]
    identities = [str(open_folder(root, **{"test_fraction": 0.34, **other}).identity()) for other in [{}, *others]]
    assert len(set(identities)) == len(identities)
    assert not any(str(root) in text for text in identities)


def test_options_of_the_wrong_form(root):
    with pytest.raises(RecipeError, match=r"dataset: where = 'yard'"):
        create_dataset("folder", {"root": str(root), "where": "yard"})
    with pytest.raises(RecipeError, match=r"dataset: test_fraction = 1"):
        create_dataset("folder", {"root": str(root), "test_fraction": 1})


def test_notes_on_the_range(root):
    assert open_folder(root).notes == ("no depth_range given: trained and scored up to 10 m",)
    assert open_folder(root, unit="1/256").depth_range == (1e-3, 80.0)
    assert open_folder(root, depth_range=[0.5, 5]).notes == ()
    with pytest.raises(UsageError, match=r"min_depth 20 is not below the largest depth of 10 m"):
        open_folder(root, min_depth=20)


def test_missing_root_and_manifest(root, tmp_path):
    with pytest.raises(UsageError, match=r"folder: no folder given; set --root or dataset\.root"):
        FolderDataset(FolderOptions())
    with pytest.raises(MissingFileError, match=r"gone is not there \(set by --root or dataset\.root\)"):
        open_folder(tmp_path / "gone", manifest="frames.csv")
    with pytest.raises(MissingFileError, match=r"no manifest .*frames\.csv or frames\.csv; set dataset\.manifest"):
        open_folder(root, manifest="frames.csv")
    with pytest.raises(UsageError, match=r"frames\.txt: expected a file that ends in \.csv"):
        open_folder(root, manifest="frames.txt")
    shutil.copy(root / "manifest.csv", root / "manifest.jsonl")
    with pytest.raises(UsageError, match=r"has manifest\.csv and manifest\.jsonl; choose one"):
        open_folder(root)
    (root / "manifest.csv").unlink()
    (root / "manifest.jsonl").unlink()
    with pytest.raises(MissingFileError, match=r"the manifest is not there: no file .*manifest\.csv, nor .*manifest\.jsonl"):
        open_folder(root)


def test_missing_and_bad_samples(root):
    (root / "rgb/0.png").unlink()
    (root / "depth/1.png").unlink()
    write_png(root / "depth/2.png", some_depth(5, 8))
    write_png(root / "depth/3.png", some_rgb()[..., 1])
    dataset = open_folder(root)
    assert dataset.missing_files("train") == [("rgb/0", root / "rgb/0.png"), ("rgb/1", root / "depth/1.png")]
    with pytest.raises(MissingFileError, match=r"rgb/0\.png is not there.*names it in line 2; paths are relative to"):
        dataset.load("train", "rgb/0")
    with pytest.raises(MissingFileError, match=r"depth/1\.png is not there.*line 3"):
        dataset.size("train", "rgb/1")
    with pytest.raises(SampleError, match=r"rgb/2\.png is 6x8 .*depth/2\.png 5x8"):
        dataset.load("train", "rgb/2")
    with pytest.raises(SampleError, match=r"depth/3\.png is 8-bit"):
        dataset.load("train", "rgb/3")
    with pytest.raises(SampleError, match=r"depth/4\.png has no valid pixel"):
        open_folder(root, min_depth=5).load("train", "rgb/4")


def test_absolute_paths_with_keys_leave_no_trace_in_the_identity(root, rows):
    for i, row in enumerate(rows):
        row |= {"image": str(root / row["image"]), "depth": str(root / row["depth"]), "key": f"frame-{i}"}
    write_csv(root, rows)
    dataset = open_folder(root)
    assert dataset.load("train", "frame-2").depth.shape == (6, 8)
    frame = dataset._table.row("train", "frame-2")
    assert frame.facts()[:3] == ["frame-2", "2.png", "2.png"]
