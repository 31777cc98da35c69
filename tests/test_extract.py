"""Extraction: complete, resumable, refusing what does not fit."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcd.cache import Cache
from pcd.cache.verify import verify_cache
from pcd.errors import CacheError, DatasetError, FingerprintError, MissingFileError, RecipeError, SampleError, SpaceError
from pcd.recipe import Recipe, parse_recipe
from pcd.stages import plan
from pcd.stages import rows as stage_rows
from pcd.stages.extract import Extraction, extract
from pcd.views import image_canvas, resize_depth, to_views
from tests.toy import ToyDataset, ToyEncoder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards per table: two samples each."""
    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)


def toy_recipe(**tables: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "toy",
        "dataset": {"name": "toy", **tables.pop("dataset", {})},
        "encoder": {"name": "toy:toy", "weights": "random", **tables.pop("encoder", {})},
        "head": {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0},
    }
    return parse_recipe({**base, **tables}, "test")


def files(root: Path) -> dict[str, bytes]:
    skip = {"provenance.jsonl", ".lock"}
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name not in skip}


def run(root: Path, recipe: Recipe | None = None, **options: Any) -> Extraction:
    return extract(recipe or toy_recipe(), root, device="cpu", **options)


def test_every_row_is_what_dataset_views_and_encoder_say(tmp_path: Path) -> None:
    cache = run(tmp_path / "cache").cache
    assert {name: table.samples for name, table in cache.manifest.tables.items()} == {"train": 11, "val": 1, "test": 5}
    assert verify_cache(cache) == []
    dataset = ToyDataset(ToyDataset.Options())
    encoder = ToyEncoder("", ToyEncoder.Options(), (16, 16), "cpu")
    sources = {"train": "train", "val": "train", "test": "test"}
    for table in cache.tables:
        plan_ = table.plan
        for number, key in enumerate(table.keys):
            sample = dataset.load(sources[table.name], key)  # type: ignore[arg-type]
            rows = table.view_rows(np.array([number]))[0]
            views = to_views(image_canvas(sample.rgb, plan_), plan_).transpose(0, 3, 1, 2)
            import torch

            tokens = encoder.encode(torch.from_numpy(views))
            for name in ("clip/patch", "clip/cls"):
                np.testing.assert_array_equal(table.column(name).read(rows), tokens[name].numpy())
            canvas = resize_depth(sample.depth, (16, 32), "masked-bilinear")
            stored = table.column("depth/canvas").read(rows)
            assert np.array_equal(stored[0], np.rint(np.nan_to_num(canvas[:, :16]).astype(np.float64) * 1000))
            assert np.array_equal(stored[2], stored[1][:, ::-1])  # first tile of the mirrored canvas
            if table.name != "train":
                native = table.column("depth/native").read([number])[0]
                assert np.array_equal(native, np.rint(np.nan_to_num(sample.depth).astype(np.float64) * 1000))
    assert "depth/native" not in cache.table("train").column_names()
    assert cache.table("test").column("sample/size").read([0]).tolist() == [[24, 40]]
    assert cache.table("test").column("sample/intrinsics").read([0]).tolist() == [[30, 30, 20, 12]]


def test_a_complete_cache_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before, calls = files(tmp_path), ToyEncoder.calls
    said: list[str] = []

    class Listener:
        def say(self, text: str) -> None:
            said.append(text)

        def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
            raise AssertionError("nothing is to be done")

        advance = stop = start

    assert run(tmp_path, progress=Listener()).encoded == 0
    assert ToyEncoder.calls == calls
    assert files(tmp_path) == before
    assert "is complete" in said[-1]


@pytest.mark.parametrize("after", [0, 1, 5, 9, 14])
def test_interrupted_anywhere_and_continued_is_byte_identical(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    original, counter = ToyEncoder.encode, itertools.count()

    def interrupted(self: ToyEncoder, views: Any) -> Any:
        if next(counter) == after:
            raise KeyboardInterrupt
        return original(self, views)

    monkeypatch.setattr(ToyEncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", batch_views=4)
    monkeypatch.setattr(ToyEncoder, "encode", original)
    assert not list((tmp_path / "parts").rglob("*.partial"))
    extraction = run(tmp_path / "parts", batch_views=4)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert extraction.encoded <= 17 - 2 * (after // 2) + 2


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"encoder": {"gain": 2.0}}, "encoder.weights.digest: found '1.0', wanted '2.0'"),
        ({"encoder": {"weights": "file"}}, "encoder.weights.kind: found 'random', wanted 'file'"),
        ({"dataset": {"factor": 0.5}}, "dataset.identity.factor: found 1.0, wanted 0.5"),
        ({"dataset": {"limit": 3}}, "tables.train.samples: found 11, wanted 2"),
        ({"dataset": {"far": 9.0}}, "dataset.depth_range: found [0.1, 10.0], wanted [0.1, 9.0]"),
        ({"views": {"flips": False}}, "views.flips: found True, wanted False"),
        ({"views": {"canvas": [32, 32]}}, "views.canvas: found [16, 32], wanted [32, 32]"),
    ],
)
def test_another_fingerprint_is_refused_by_field(tmp_path: Path, tables: dict[str, Any], field: str) -> None:
    run(tmp_path)
    before = files(tmp_path)
    with pytest.raises(FingerprintError) as error:
        run(tmp_path, toy_recipe(**tables))
    assert field in str(error.value)
    assert files(tmp_path) == before


def test_another_depth_resize_adds_its_columns_and_encodes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    calls = ToyEncoder.calls
    nearest = toy_recipe(views={"depth_resize": "nearest"})
    cache = run(tmp_path, nearest).cache
    assert ToyEncoder.calls == calls
    assert {"depth/canvas", "depth-nearest/canvas", "depth-nearest/mean"} <= set(cache.manifest.columns)
    assert verify_cache(Cache.open(tmp_path)) == []
    whole = run(tmp_path / "other", nearest).cache
    rows = range(whole.table("val").samples * 4)
    for name in ("canvas", "mean", "present"):
        column = f"depth-nearest/{name}"
        np.testing.assert_array_equal(
            cache.table("val").column(column).read(rows), whole.table("val").column(column).read(rows)
        )


def test_forgotten_shards_are_extracted_again(tmp_path: Path) -> None:
    cache = run(tmp_path).cache
    before = files(tmp_path)
    (tmp_path / "commits/test/clip/patch/000001.json").unlink()
    assert run(tmp_path).encoded == 2
    assert files(tmp_path) == before
    assert cache.table("test").samples == 5


def test_a_broken_sample_stops_or_is_recorded(tmp_path: Path) -> None:
    recipe = toy_recipe(dataset={"broken": ["test-3", "train-0"]})
    with pytest.raises(SampleError, match=r"sample (test-3|train-0): .*is broken.*--on-error skip"):
        run(tmp_path, recipe)
    extraction = run(tmp_path, recipe, on_error="skip")
    assert extraction.skipped == {"test-3": "test-3.png is broken.", "train-0": "train-0.png is broken."}
    table = Cache.open(tmp_path).table("test")
    assert [table.keys[n] for n in table.usable()] == ["test-0", "test-1", "test-2", "test-4"]
    from pcd.stages.inspect import inspect_cache

    assert inspect_cache(Cache.open(tmp_path))["skipped"] == extraction.skipped


def test_a_sample_that_was_read_once_cannot_be_skipped_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its new rows would be filler that readers take for the truth."""
    run(tmp_path, toy_recipe(dataset={"broken": ["test-1"]}), on_error="skip")
    nearest = toy_recipe(dataset={"broken": ["test-1", "test-2"]}, views={"depth_resize": "nearest"})
    with pytest.raises(SampleError, match=r"sample test-2: .*could be read when the cache was begun.*restore"):
        run(tmp_path, nearest, on_error="skip")
    fixed = toy_recipe(dataset={"broken": ["test-1"]}, views={"depth_resize": "nearest"})
    cache = run(tmp_path, fixed, on_error="skip").cache
    assert cache.complete
    assert len(cache.table("test").usable()) == 4


def test_missing_files_are_named_before_anything_is_encoded(tmp_path: Path) -> None:
    calls = ToyEncoder.calls
    with pytest.raises(MissingFileError, match=r"1 files that the lists name are not there.*\n  train-2: train-2\.png"):
        run(tmp_path, toy_recipe(dataset={"missing": ["train-2"]}))
    assert ToyEncoder.calls == calls


def test_a_frame_without_depth_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="no pixel of the canvas has depth"):
        run(tmp_path, toy_recipe(dataset={"factor": 0.0}, views={"crop": [0, 1, 0, 1]}))


def test_a_small_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    calls = ToyEncoder.calls
    with pytest.raises(SpaceError, match=r"are to be written and 0\.0 GB are free"):
        run(tmp_path)
    assert ToyEncoder.calls == calls


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    from pcd.cache.lock import writing

    with writing(tmp_path), pytest.raises(CacheError, match="is being written by process"):
        run(tmp_path)


def test_unknown_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="dataset: unknown key 'rot'"):
        run(tmp_path, toy_recipe(dataset={"rot": 1}))
    with pytest.raises(DatasetError, match="name no sample"):
        run(tmp_path, toy_recipe(dataset={"train": 0, "test": 0}))


def test_texts_are_embedded_once_beside_the_columns(tmp_path: Path) -> None:
    from pcd.stages.texts import text_digest

    coarse = toy_recipe(head={"name": "pureclip", "min_depth": 0.0, "max_depth": 4.0, "bins": 2})
    phrases = ("1.00 meter", "3.00 meter")
    cache = run(tmp_path, also=[coarse]).cache
    digest = text_digest(cache, list(cache.manifest.columns))
    assert digest is not None
    expected = ToyEncoder("", ToyEncoder.Options(), (16, 16), "cpu").embed_text(phrases)
    np.testing.assert_array_equal(cache.text(digest, phrases), expected.numpy())
    assert len(cache.texts()) == 2  # the recipe's own prompts too
    far = toy_recipe(head={"name": "pureclip", "min_depth": 0.0, "max_depth": 8.0, "bins": 2})
    assert run(tmp_path, also=[coarse, far]).encoded == 0
    assert len(Cache.open(tmp_path).texts()) == 3
    before = files(tmp_path)
    assert run(tmp_path, also=[far]).encoded == 0  # another question, the same answer
    assert files(tmp_path) == before


def test_the_same_question_is_answered_without_torch(tmp_path: Path) -> None:
    """In a process of its own: a complete cache must not wait for heavy imports."""
    command = ["extract", "--dataset", "synthetic", "--encoder", "openclip:pcd-demo", "--weights", "random", "--cache"]
    command += [str(tmp_path), "--limit", "2", "--set", "views.canvas=[32,32]", "--device", "cpu"]
    code = "import atexit, sys; from pcd.cli import main; atexit.register(lambda: print('torch' in sys.modules)); "
    code += f"sys.argv = ['pcd', *{command!r}]; main()"
    ends = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        ends.append((done.stdout.split()[-1], "Nothing to do" in done.stderr))
    assert ends == [("True", False), ("False", True)]


def test_no_result_depends_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a")
    monkeypatch.setattr(stage_rows, "DECODE_THREADS", 1)
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
