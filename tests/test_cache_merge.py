"""Caches become one: parts, columns and splits; verified, resumable, and nothing that contradicts itself."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pcd.cache import Cache, commits, provenance
from pcd.cache import copy as copying
from pcd.cache.copy import Copied, copy_cache
from pcd.cache.lock import writing
from pcd.cache.merge import merge_caches
from pcd.cache.verify import verify_cache
from pcd.errors import CacheError, FingerprintError, UsageError
from pcd.stages.extract import extract
from tests.cache_support import FAR, SHARD, SMALL, cache, local, pcd, small_shards, spoil, whole
from tests.test_cli import Command
from tests.test_extract import files, toy_recipe

__all__ = ["cache", "pcd", "small_shards", "whole"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The cache `whole` in three parts, each in a folder of its own; not to be changed."""
    roots = [tmp_path_factory.mktemp("part") / "cache" for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcd.stages.plan.MAX_SHARD_ROWS", 8)
        for number, root in enumerate(roots, start=1):
            extract(toy_recipe(dataset=SMALL), root, device="cpu", also=[FAR], part=f"{number}/3")
    return roots


def merge(target: Path, *sources: Path, **options: Any) -> Copied:
    return merge_caches([Cache.open(source) for source in sources], target, **options)


def test_parts_are_the_whole(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    before = [files(root) for root in parts]
    told: list[tuple[int, int]] = []
    counted = itertools.count()
    first = merge(tmp_path, parts[0], parts[1], start=lambda *args: told.append(args), advance=lambda: next(counted))
    records = [len(list(root.glob("commits/*/*/*/*.json"))) for root in parts]
    assert all(records)
    assert (first.shards, first.present, first.absent, first.damaged) == (records[0] + records[1], 0, records[2], [])
    assert (told, next(counted)) == ([(first.shards, 0)], first.shards)
    second = merge(tmp_path, parts[2])
    assert (second.shards, second.present, second.absent) == (records[2], first.shards, 0)
    assert files(tmp_path) == files(whole)
    assert [files(root) for root in parts] == before
    lines = [line for root in parts for line in (root / "provenance.jsonl").read_text().splitlines()]
    assert (tmp_path / "provenance.jsonl").read_text().splitlines() == lines
    assert [entry["part"] for entry in provenance.records(tmp_path)] == ["1/3", "2/3", "3/3"]
    again = merge(tmp_path, *parts)
    assert (again.shards, again.present) == (0, sum(records))
    assert files(tmp_path) == files(whole)
    assert (tmp_path / "provenance.jsonl").read_text().splitlines() == lines
    assert extract(toy_recipe(dataset=SMALL), tmp_path, device="cpu", also=[FAR]).encoded == 0


def test_columns_and_splits_are_the_whole(whole: Path, tmp_path: Path) -> None:
    copy_cache(Cache.open(whole), tmp_path / "tokens", columns=["clip/patch", "clip/cls"])
    copy_cache(Cache.open(whole), tmp_path / "train", tables=["train"])
    copy_cache(Cache.open(whole), tmp_path / "scored", tables=["val", "test"])
    assert merge(tmp_path / "some", tmp_path / "tokens", tmp_path / "train").absent == 0
    assert Cache.open(tmp_path / "some").manifest.columns["depth/mean"].tables == ("train",)
    assert Cache.open(tmp_path / "some").manifest.columns["clip/cls"].tables == ("train", "val", "test")
    assert merge(tmp_path / "some", tmp_path / "scored").absent == 0
    assert files(tmp_path / "some") == files(whole)


def test_what_was_asked_of_one_only_is_looked_for_again(whole: Path, tmp_path: Path) -> None:
    """Else an extraction would believe that texts are there which only the other recipe wanted."""
    extract(toy_recipe(dataset=SMALL), tmp_path / "other", device="cpu")
    merge(tmp_path / "both", whole, tmp_path / "other")
    assert "asked" not in Cache.open(tmp_path / "both").manifest.encoders["toy"]
    assert extract(toy_recipe(dataset=SMALL), tmp_path / "both", device="cpu", also=[FAR]).encoded == 0


def test_interrupted_anywhere_it_goes_on(
    parts: list[Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = copying.copy_shard
    for after in (0, 1, 30):
        root, count = tmp_path / f"at-{after}", itertools.count()

        def stop(*args: Any, count: Any = count, after: int = after) -> None:
            if next(count) == after:
                raise KeyboardInterrupt
            original(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("pcd.cache.merge.copy_shard", stop)
            merge(root, *parts)
        assert {fault.kind for fault in verify_cache(Cache.open(root))} == {"absent"}
        assert merge(root, *parts).present == after
        assert files(root) == files(whole)


def test_a_shard_with_other_content_is_refused_by_name(whole: Path, cache: Path, tmp_path: Path) -> None:
    path = commits.path(cache, "train", "clip/patch", 1)
    record = commits.read(cache, "train", "clip/patch", 1)
    commits.write(cache, commits.Commit(**{**vars(record), "sha256": "0" * 64}))
    assert json.loads(path.read_text())["sha256"] == "0" * 64
    with pytest.raises(CacheError) as error:
        merge(tmp_path / "both", whole, cache)
    assert f"1 shards have different content in two caches:\n  train/clip/patch, shard 1: {whole}, {cache}\n" in str(
        error.value
    )
    assert not (tmp_path / "both" / "manifest.json").exists()
    before = files(cache)
    with pytest.raises(CacheError, match=f"train/clip/patch, shard 1: {cache}, {whole}"):
        merge(cache, whole)
    assert files(cache) == before


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"dataset": {**SMALL, "limit": 2}}, "dataset.identity.train: found 6, wanted 2"),
        ({"dataset": SMALL, "views": {"flips": False}}, "views.flips: found True, wanted False"),
        (
            {"dataset": SMALL, "encoder": {"gain": 2.0}},
            "clip/cls.fingerprint.encoder.weights.digest: found '1.0', wanted '2.0'",
        ),
    ],
)
def test_other_samples_views_and_columns_are_refused_by_field(
    whole: Path, tmp_path: Path, tables: dict[str, Any], field: str
) -> None:
    extract(toy_recipe(**tables), tmp_path / "other", device="cpu")
    with pytest.raises(FingerprintError) as error:
        merge(tmp_path / "both", whole, tmp_path / "other")
    assert f"{whole} and {tmp_path / 'other'} were made in different ways" in str(error.value)
    assert field in str(error.value)
    assert not (tmp_path / "both" / "manifest.json").exists()


def test_a_damaged_shard_is_taken_from_another_source_or_reported(whole: Path, cache: Path, tmp_path: Path) -> None:
    spoil(cache / SHARD)
    local(commits.path(cache, "test", "clip/cls", 0)).write_text("{}")
    done = merge(tmp_path / "both", cache, whole)
    assert (done.damaged, done.absent) == ([], 0)
    assert files(tmp_path / "both") == files(whole)
    alone = merge(tmp_path / "alone", cache)
    assert len(alone.damaged) == 2
    assert any(str(cache / SHARD) in line for line in alone.damaged)
    assert not (tmp_path / "alone" / SHARD).exists()
    (tmp_path / "both" / SHARD).unlink()  # the target says that it has it
    reasons = merge(tmp_path / "both", cache).damaged
    assert [str(root / SHARD) in line for root, line in zip((tmp_path / "both", cache), reasons, strict=True)] == [True, True]
    assert merge(tmp_path / "both", whole).shards == 1
    assert files(tmp_path / "both") == files(whole)


def test_the_target_is_held_and_no_source(whole: Path, tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(CacheError, match="is being written by process"):
        merge(tmp_path, whole)
    for target in (whole, whole / "inside"):
        with pytest.raises(UsageError, match="choose another folder"):
            merge(target, whole)


def test_as_a_command(pcd: Command, parts: list[Path], whole: Path) -> None:
    for number, root in enumerate(parts):
        shutil.copytree(root, f"part-{number}")
    code, out, err = pcd("cache", "merge", "part-0", "part-1", "all")
    assert code == 1
    assert "shards are absent in all of them" in err
    code, out, err = pcd("cache", "merge", "part-0", "part-1", "part-2", "all")
    assert code == 0, err
    assert "were there already" in out
    assert files(Path("all")) == files(whole)
    code, _, err = pcd("cache", "merge", "all")
    assert code == 2
    assert "expected SRC... DST" in err
