"""The images behind a cache are found again, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pcd.cache.provenance import PROVENANCE
from pcd.datasets import Split
from pcd.errors import DatasetError
from pcd.stages.extract import extract
from pcd.stages.frames import located, open_frames
from tests.cache_support import local
from tests.test_extract import toy_recipe
from tests.toy import ToyDataset


def test_samples_of_every_table_are_those_of_the_dataset(tmp_path: Path) -> None:
    cache = extract(toy_recipe(), tmp_path / "cache", device="cpu").cache
    frames = open_frames(cache)
    toy = ToyDataset(ToyDataset.Options())
    sources: dict[str, Split] = {"train": "train", "val": "train", "test": "test"}
    for table, source in sources.items():
        key = cache.table(table).keys[0]
        np.testing.assert_array_equal(frames.load(table, key).rgb, toy.load(source, key).rgb)


def test_other_images_are_refused(tmp_path: Path) -> None:
    cache = extract(toy_recipe(), tmp_path / "cache", device="cpu").cache
    entry = json.loads((cache.root / PROVENANCE).read_text())
    entry["dataset"]["factor"] = 2.0
    (local(cache.root) / PROVENANCE).write_text(json.dumps(entry) + "\n")
    with pytest.raises(DatasetError, match="are not those"):
        open_frames(cache)


def test_a_cache_that_does_not_know_says_so(tmp_path: Path) -> None:
    cache = extract(toy_recipe(), tmp_path / "cache", device="cpu").cache
    (cache.root / PROVENANCE).unlink()
    with pytest.raises(DatasetError, match="--root"):
        open_frames(cache)


def test_relative_roots_are_recorded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located({"name": "nyu", "root": "here"}) == {"name": "nyu", "root": str(tmp_path / "here")}
    assert located({"name": "synthetic"}) == {"name": "synthetic"}
