"""Manifests of `folder`: units, and rows and files that cannot be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcd.datasets import create_dataset
from pcd.datasets.folder import FolderDataset, FolderOptions
from pcd.errors import DatasetError, RecipeError, UsageError
from tests.datasets_support import metres_of, scene_rows, some_depth, write_csv


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return scene_rows(tmp_path)


@pytest.fixture
def root(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write_csv(tmp_path, rows)
    return tmp_path


def open_folder(root: Path, **options) -> FolderDataset:
    return FolderDataset(FolderOptions(root=root, **{"unit": "mm", **options}))


@pytest.mark.parametrize(("unit", "units"), [("mm", 1000), ("cm", 100), ("m", 1), ("1/256", 256), ("1/5000", 5000)])
def test_units_by_name(root, unit, units):
    dataset = open_folder(root, unit=unit)
    np.testing.assert_allclose(dataset.load("train", "rgb/0").depth, metres_of(some_depth(), units), rtol=1e-6)
    assert dataset.units_per_metre == units


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"split": "tset"}, r"line 2: split = 'tset': Input should be 'train', 'val' or 'test'"),
        ({"units_per_metre": "many"}, r"line 2: units_per_metre = 'many'"),
        ({"units_per_metre": "0"}, r"line 2: units_per_metre = '0': .* greater than 0"),
        ({"unit": "inch"}, r"line 2: unit = 'inch': .*give one of m, cm, mm, or 1/N"),
        ({"unit": "mm", "units_per_metre": "1000"}, r"line 2: both unit and units_per_metre"),
        ({"fx": "500"}, r"line 2: the camera is incomplete"),
        ({"fx": "nan", "fy": "1", "cx": "1", "cy": "1"}, r"line 2: fx = 'nan'"),
        ({"min_depth": "3", "max_depth": "2"}, r"line 2: min_depth 3 is not below max_depth 2"),
        ({"image": ""}, r"line 2: image: Field required"),
        ({"depth": "d.exr"}, r"line 2: depth = d\.exr: expected a file that ends in \.png, \.npy"),
        ({"key": "rgb/1"}, r"lines 2 and 3 are both frame 'rgb/1'; remove one, or add a column key"),
        ({"image": "/abs/a.png"}, r"line 2: /abs/a\.png is an absolute path.*add a column key"),
        ({"group": ""}, r"line 2: column 'group' is empty, but dataset\.group needs it"),
    ],
)
def test_malformed_rows(tmp_path, rows, cells, message):
    rows[0] |= cells
    rows[1]["group"] = "g"
    write_csv(tmp_path, rows)
    with pytest.raises(DatasetError, match=message) as caught:
        open_folder(tmp_path, group="group" if "group" in cells else None)
    assert str(tmp_path / "manifest.csv") in str(caught.value)


def test_an_unknown_unit(root):
    with pytest.raises(DatasetError, match=r"line 2: the unit of depth/0\.png is not known; add a column units_per_metre"):
        open_folder(root, unit=None)
    with pytest.raises(UsageError, match=r"both dataset\.unit and dataset\.units_per_metre"):
        open_folder(root, units_per_metre=1000)
    with pytest.raises(RecipeError, match=r"unit = 'inch'"):
        create_dataset("folder", {"root": str(root), "unit": "inch"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "picture,depth\na,b\n", r"line 1: no column 'image'"),
        ("m.csv", "image;depth\na;b\n", r"line 1: no column 'image'.*comma-separated"),
        ("m.csv", "image,depth\n", r"has no rows"),
        ("m.csv", "", r"line 1: no column 'image'"),
        ("m.csv", "image,depth\na.png,b.png,c\n", r"line 2: found 3 cells, expected 2"),
        ("m.csv", 'image,depth\na.png,"b.png\n', r"line 2: unexpected end of data; expected comma-separated"),
        ("m.jsonl", '{"image": "a.png"\n', r"line 1: not JSON"),
        ("m.jsonl", "\n[1, 2]\n", r"line 2: found list, expected an object"),
        ("m.jsonl", '{"image": "a.png"}\n', r"line 1: depth: Field required"),
    ],
)
def test_malformed_manifests(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_folder(tmp_path, manifest=name)
