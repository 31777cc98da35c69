"""Columns from files: cut, mirrored and stored as plain numpy says, and everything that can be wrong with such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pcd.cache import Cache
from pcd.cache.verify import verify_cache
from pcd.encoders import create_encoder, request_of
from pcd.encoders.base import RowKey
from pcd.encoders.folder import FolderEncoder
from pcd.encoders.folder_files import describe_column, write_column
from pcd.errors import DatasetError, MissingFileError, TextTowerError, UsageError
from pcd.recipe import Recipe
from pcd.stages.extract import extract
from pcd.views import ViewPlan
from tests.test_extract import toy_recipe

PLAN = ViewPlan(canvas=(16, 32), grid=(1, 2))
"""Of the toy dataset: two tiles, mirrored."""
KEYS = [*(f"train-{n}" for n in range(12)), *(f"test-{n}" for n in range(5))]
GRID = (4, 4)
FACTS: dict[str, Any] = {"model": "somebody's net", "grid": GRID, "fingerprint": {"weights": "abc", "layer": 3}}


def canvas_of(key: str) -> np.ndarray:
    """Segment numbers of a whole canvas, at half its resolution."""
    return np.random.default_rng(KEYS.index(key)).integers(0, 9, (8, 16)).astype(np.uint8)


def tokens_of(key: str) -> np.ndarray:
    """Patch tokens of the four views."""
    return np.random.default_rng(100 + KEYS.index(key)).normal(size=(4, 16, 3)).astype(np.float16)


def make_folder(folder: Path) -> Path:
    describe_column(
        folder, "sam/segments", shape=(8, 8), dtype="uint8", dims=("y", "x"), meaning="segments", views="canvas", **FACTS
    )
    file = describe_column(
        folder, "net/patch", shape=(16, 3), dtype="float16", dims=("patch", "channel"), meaning="tokens", **FACTS
    )
    for key in KEYS:
        write_column(folder, "sam/segments", key, canvas_of(key))
        write_column(folder, "net/patch", key, tokens_of(key))
    return file


@pytest.fixture(scope="module")
def index_file(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("columns"))


def make(file: Path, **options: Any) -> FolderEncoder:
    encoder = create_encoder("folder", {"weights": str(file), **options}, PLAN.view_size, "cpu")
    assert isinstance(encoder, FolderEncoder)
    return encoder


def rows_of(key: str, plan: ViewPlan = PLAN) -> list[RowKey]:
    return [RowKey("train", key, number, plan) for number in range(plan.views)]


def views(number: int) -> torch.Tensor:
    return torch.zeros(number, 3, *PLAN.view_size)


def folder_recipe(file: Path, **options: Any) -> Recipe:
    dataset = options.pop("dataset", {})
    table = {"name": "folder", "weights": str(file), **options}
    return toy_recipe(dataset=dataset).model_copy(update={"encoder": table})


def check_rows(cache: Cache, skipped: tuple[str, ...] = ()) -> None:
    for table in cache.tables:
        for number, key in enumerate(table.keys):
            rows = table.view_rows(np.array([number]))[0]
            whole = canvas_of(key)
            expected = np.stack([whole[:, :8], whole[:, 8:], whole[:, ::-1][:, :8], whole[:, ::-1][:, 8:]])
            zero = 0 if key in skipped else 1
            np.testing.assert_array_equal(table.column("sam/segments").read(rows), expected * zero)
            np.testing.assert_array_equal(table.column("net/patch").read(rows), tokens_of(key) * zero)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_row_is_the_files_view(tmp_path, index_file, batch):
    """Batches end in the middle of a sample's views, or hold those of several."""
    cache = extract(folder_recipe(index_file), tmp_path, device="cpu", batch_views=batch).cache
    assert verify_cache(cache) == []
    check_rows(cache)
    entry = cache.manifest.columns["sam/segments"].fingerprint["encoder"]
    assert entry["columns"]["sam/segments"] == {"views": "canvas", "fingerprint": FACTS["fingerprint"]}
    assert entry["grid"] == [4, 4]


def test_samples_that_were_skipped_need_no_file(tmp_path):
    file = make_folder(tmp_path / "columns")
    for column in ("sam-segments", "net-patch"):
        (tmp_path / "columns" / column / "train-3.npy").unlink()
    recipe = folder_recipe(file, dataset={"broken": ("train-3",)})
    found = extract(recipe, tmp_path / "cache", device="cpu", on_error="skip", batch_views=6)
    assert set(found.skipped) == {"train-3"}
    assert verify_cache(found.cache) == []
    table = found.cache.table("train")
    at = table.keys.index("train-3")
    assert at not in table.usable()
    check_rows(found.cache, skipped=("train-3",))


def test_a_canvas_of_tokens_is_cut_by_patches(tmp_path):
    """One array of the canvas's patches: tiles of 2x3 patches, two rows of two tiles."""
    plan = ViewPlan(canvas=(8, 12), grid=(2, 2))
    facts = {**FACTS, "grid": (2, 3)}
    shape, dims = (6, 5), ("patch", "channel")
    file = describe_column(tmp_path, "net/patch", shape=shape, dtype="float32", dims=dims, meaning="t", views="canvas", **facts)
    whole = np.random.default_rng(1).normal(size=(4, 6, 5)).astype(np.float32)
    write_column(tmp_path, "net/patch", "a", whole)
    found = make(file).encode_rows(views(8), rows_of("a", plan))["net/patch"].numpy()
    for flip, canvas in enumerate((whole, whole[:, ::-1])):
        for tile, (row, column) in enumerate(((0, 0), (0, 3), (2, 0), (2, 3))):
            expected = [canvas[row + y, column + x] for y in range(2) for x in range(3)]
            np.testing.assert_array_equal(found[flip * 4 + tile], expected)


def test_one_file_for_all_samples(tmp_path, index_file):
    told = json.loads(index_file.read_text())
    told["columns"]["net/patch"] |= {"files": "all.npy", "keys": KEYS}
    told["columns"]["sam/segments"] |= {"files": "all.safetensors"}
    np.save(tmp_path / "all.npy", np.stack([tokens_of(key) for key in KEYS]))
    save_file({key: canvas_of(key) for key in KEYS}, tmp_path / "all.safetensors")
    (tmp_path / "columns.json").write_text(json.dumps(told))
    one, many = make(tmp_path), make(index_file)
    for key in ("test-4", "train-0"):
        found, expected = (encoder.encode_rows(views(4), rows_of(key)) for encoder in (one, many))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(MissingFileError, match=r"all\.npy has nothing for sample 'other' .* It has 17 samples"):
        one.encode_rows(views(4), rows_of("other"))
    told["columns"]["net/patch"]["keys"] = KEYS[:-1]
    (tmp_path / "columns.json").write_text(json.dumps(told))
    with pytest.raises(DatasetError, match=r"all\.npy has 17 samples, columns\.json 16 keys of net/patch"):
        make(tmp_path)


def test_columns_can_be_chosen_and_renamed(index_file):
    encoder = make(index_file, columns=["sam/segments"], prefix="second")
    assert [spec.name for spec in encoder.columns] == ["second/segments"]
    assert list(encoder.encode_rows(views(4), rows_of("test-0"))) == ["second/segments"]
    assert encoder.fingerprint()["weights"] != make(index_file).fingerprint()["weights"]
    with pytest.raises(UsageError, match=r"has no column 'sam/segment'\. Did you mean 'sam/segments'"):
        make(index_file, columns=["sam/segment"])


def test_the_digest_knows_statements_names_and_sizes(tmp_path):
    file = make_folder(tmp_path / "columns")
    first = make(file).fingerprint()
    asked = request_of("folder", {"weights": str(file)})
    assert str(tmp_path) not in json.dumps([first, asked])
    (tmp_path / "columns").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "columns.json"
    assert make(moved).fingerprint() == first
    assert request_of("folder", {"weights": str(moved)}) == asked
    (tmp_path / "moved" / "net-patch" / "test-4.npy").unlink()
    smaller = make(moved).fingerprint()
    assert smaller["weights"]["digest"] != first["weights"]["digest"]
    assert request_of("folder", {"weights": str(moved)}) != asked
    told = json.loads(moved.read_text())
    told["columns"]["net/patch"]["fingerprint"] = {"weights": "abd", "layer": 3}
    moved.write_text(json.dumps(told))
    assert make(moved).fingerprint()["weights"] != smaller["weights"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 16, 3), np.float16), r"its shape is \(3, 16, 3\); expected \(4, 16, 3\) \(views 'each'\)"),
        (np.zeros((4, 15, 3), np.float16), r"its shape is \(4, 15, 3\); expected \(4, 16, 3\)"),
        (np.zeros((4, 16, 3), np.float32), "it is float32; expected float16"),
        (np.full((4, 16, 3), np.nan, np.float16), "values that are not finite"),
        (None, r"test-1\.npy is not there"),
        (b"no array", r"test-1\.npy cannot be read as a \.npy array"),
    ],
)
def test_arrays_that_are_not_what_was_stated(tmp_path, array, message):
    file = make_folder(tmp_path / "columns")
    path = tmp_path / "columns" / "net-patch" / "test-1.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(DatasetError, match=message):
        make(file).encode_rows(views(4), rows_of("test-1"))


def test_a_map_must_be_of_the_canvas(index_file):
    plan = ViewPlan(canvas=(16, 32), grid=(2, 1))
    with pytest.raises(
        DatasetError, match=r"column sam/segments: its shape is \(8, 16\); expected \(16, 8\) \(views 'canvas'\)"
    ):
        make(index_file, columns=["sam/segments"]).encode_rows(views(1), rows_of("test-1", plan)[:1])
    with pytest.raises(DatasetError, match=r"sample key '\.\./x' is no file name inside"):
        make(index_file).encode_rows(views(1), rows_of("../x")[:1])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"fingerprint": {}}, "net/patch.fingerprint"),
    ({"dims": ["patch"]}, "1 dims for a shape of 2 axes"),
    ({"shape": [15, 3]}, "has 15 patches, the grid 16"),
    ({"dtype": "float64"}, "dtype"),
    ({"views": "canvas", "dims": ["a", "b"]}, "needs dims that begin with y, x or with patch"),
    ({"files": "all.npy"}, "keys are for one .npy file"),
    ({"files": "nowhere"}, "nowhere is not there"),
    ({"unit": "m"}, "unknown key"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_an_index_that_cannot_be_used(tmp_path, index_file, change, message):
    told = json.loads(index_file.read_text())
    told["columns"] = {"net/patch": {**told["columns"]["net/patch"], "files": str(index_file.parent / "net-patch"), **change}}
    (tmp_path / "columns.json").write_text(json.dumps(told))
    with pytest.raises(DatasetError, match=message):
        make(tmp_path / "columns.json")


def test_what_the_folder_cannot_do_is_said(tmp_path, index_file):
    encoder = make(index_file)
    with pytest.raises(
        UsageError, match=r"come from files.* other images cannot be predicted .* Compute net/patch, sam/segments"
    ):
        encoder.encode(views(1))
    with pytest.raises(TextTowerError):
        encoder.embed_text(["a chair"])
    for options, message in (({}, "say where the columns are with --weights"), ({"weights": "random"}, "say where")):
        with pytest.raises(UsageError, match=message):
            create_encoder("folder", options, PLAN.view_size, "cpu")
    with pytest.raises(UsageError, match="the path goes elsewhere"):
        create_encoder("folder:/data/sam", {}, PLAN.view_size, "cpu")
    with pytest.raises(MissingFileError, match=r"columns\.json is not there"):
        make(tmp_path / "columns.json")
    (tmp_path / "columns.json").write_text("[1")
    with pytest.raises(DatasetError, match="is no JSON object"):
        make(tmp_path)
    facts: dict[str, Any] = {"shape": (8, 8), "dtype": "uint8", "dims": ("y", "x"), "meaning": "m"}
    with pytest.raises(UsageError, match=r"holds columns of \"somebody's net\" on grid \[4, 4\]"):
        describe_column(index_file.parent, "a/b", **{**FACTS, "model": "other"}, **facts)
    with pytest.raises(DatasetError, match="pcd itself makes the columns of depth/"):
        describe_column(tmp_path / "new", "depth/canvas", **FACTS, **facts)
    with pytest.raises(UsageError, match="it is uint8; expected float16"):
        write_column(index_file.parent, "net/patch", "x", np.zeros((4, 16, 3), np.uint8))
    with pytest.raises(UsageError, match=r"its shape is \(9, 16\); expected \(8, 16\)"):
        write_column(index_file.parent, "sam/segments", "x", np.zeros((9, 16), np.uint8))
