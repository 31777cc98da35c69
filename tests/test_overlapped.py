"""Ranges of samples that are under way at once, as on a GPU: the same bytes, and nothing left behind by an error or Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcd.cache import Cache
from pcd.cache.leftovers import leftovers
from pcd.errors import SampleError
from pcd.stages import extract as stage
from pcd.stages import plan
from tests.test_extract import files, run, toy_recipe
from tests.toy import ToyEncoder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_same_bytes(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one")
    monkeypatch.setattr(stage, "ranges_at_once", lambda device: number)
    assert run(tmp_path / "many").encoded == 17
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_an_error_and_an_interruption_leave_nothing_and_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one")
    monkeypatch.setattr(stage, "ranges_at_once", lambda device: 3)
    with pytest.raises(SampleError, match="train-4"):
        run(tmp_path / "many", toy_recipe(dataset={"broken": ["train-4"]}))
    assert leftovers(Cache.open(tmp_path / "many")) == []
    original, calls = ToyEncoder.encode, ToyEncoder.calls

    def pressed(self: ToyEncoder, views: object) -> object:
        if ToyEncoder.calls >= calls + 2:
            raise KeyboardInterrupt
        return original(self, views)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ToyEncoder, "encode", pressed)
        run(tmp_path / "many")
    assert leftovers(Cache.open(tmp_path / "many")) == []
    assert 0 < run(tmp_path / "many").encoded < 17
    assert files(tmp_path / "many") == files(tmp_path / "one")
