"""Dropping columns and copying caches: interrupted anywhere, finished by the same command, nothing good lost."""

from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcd.cache import Cache, commits
from pcd.cache.copy import copy_cache
from pcd.cache.gc import collect, garbage
from pcd.cache.leftovers import leftovers
from pcd.cache.lock import writing
from pcd.cache.manifest import MANIFEST, SPARE
from pcd.errors import CacheError, SpaceError, UsageError
from pcd.stages.extract import extract
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from tests.cache_support import FAR, HERE, SHARD, SMALL, cache, pcd, small_shards, spoil, whole
from tests.test_cli import Command
from tests.test_extract import files, toy_recipe

__all__ = ["cache", "pcd", "small_shards", "whole"]


# ---- gc


def test_gc_drops_a_column_and_nothing_else(cache: Path) -> None:
    before = files(cache)
    shown = garbage(cache, ["depth/var"])
    assert shown.columns == ("depth/var",)
    gone = {name for name in before if "depth/var/" in name}
    assert {file.path for file in shown.files} == gone
    assert files(cache) == before  # looking removes nothing
    assert collect(cache, shown) == sum(len(before[name]) for name in gone)
    after = files(cache)
    assert before.keys() - after.keys() == gone
    assert {name for name in after if after[name] != before[name]} == {MANIFEST, SPARE}
    assert not (cache / "train/depth/var").exists()
    findings = verify(cache)
    assert (findings.faults, findings.leftovers) == ([], [])
    extract(toy_recipe(dataset=SMALL), cache, device="cpu", also=[FAR])  # not "nothing to do"
    assert files(cache) == before


def test_gc_interrupted_anywhere_is_finished_by_a_second(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = tmp_path / "finished"
    shutil.copytree(cache, finished)
    collect(finished, garbage(finished, ["clip/patch", "clip/cls"]))
    assert not list(finished.rglob("clip*"))
    assert Cache.open(finished).manifest.encoders == {}
    original = Path.unlink
    for after in (0, 1, 5, 11, 12, 13, 17, 21, 26):
        root, count = tmp_path / f"at-{after}", itertools.count()
        shutil.copytree(cache, root)
        shown = garbage(root, ["clip/patch", "clip/cls"])

        def stop(self: Path, missing_ok: bool = False, count: Any = count, after: int = after) -> None:
            if next(count) == after:
                raise KeyboardInterrupt
            original(self, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", stop)
            collect(root, shown)
        assert verify(root).faults == []
        assert "clip/patch" not in Cache.open(root).table("train").column_names()
        collect(root, garbage(root, ["clip/patch", "clip/cls"]))
        assert files(root) == files(finished)
        assert sorted(p for p in root.rglob("*") if p.is_dir() and not any(p.iterdir())) == []


def test_gc_removes_what_crashes_left_and_nothing_of_anybody_else(cache: Path) -> None:
    import zarr

    before = files(cache)
    left = ["train/clip/patch/c/0/0/0.partial", "train/clip/patch/c/99/0/0", "commits/train/clip/patch/000099.json"]
    left += ["commits/train/old/column/000000.json", "train/old/column/c/0/0", "text/abc/def/c/0/0"]
    for name in left:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"{}")
    zarr.create_array(cache / "train/mine", shape=(2,), chunks=(1,), dtype="uint8")[:] = 1
    (cache / "notes.txt").write_text("mine")
    findings = verify(cache)
    assert findings.faults == []
    assert {file.path for file in findings.leftovers if file.ours} == set(left)
    alone = {file.path for file in findings.leftovers if not file.ours}
    assert alone == {"notes.txt", "train/mine/zarr.json", "train/mine/c/0", "train/mine/c/1"}
    collect(cache, garbage(cache))
    assert files(cache).keys() - before.keys() == alone
    assert {name: data for name, data in files(cache).items() if name in before} == before


def test_gc_asks_first(pcd: Command, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(cache)
    code, out, err = pcd("cache", "gc", "cache", "--column", "depth/native")
    assert code == 2
    assert "--yes" in err
    assert "column depth/native: " in out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert pcd("cache", "gc", "cache", "--column", "depth/native")[0] == 1
    assert files(cache) == before
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert pcd("cache", "gc", "cache", "--column", "depth/native")[0] == 0
    assert "depth/native" not in Cache.open(cache).manifest.columns
    assert pcd("cache", "gc", "cache", "--column", "depth/mean", "--yes")[0] == 0
    assert "nothing to remove" in pcd("cache", "gc", "cache")[1]
    code, _, err = pcd("cache", "gc", "cache", "--column", "sample/ok", "--yes")
    assert (code, "is needed to read all others" in err) == (2, True)
    with pytest.raises(UsageError, match=r"no column 'depth/vra'\. Did you mean 'depth/var'"):
        garbage(cache, ["depth/vra"])
    with writing(cache), pytest.raises(CacheError, match="is being written"):
        collect(cache, garbage(cache, ["depth/var"]))


# ---- copy


def test_a_copy_is_the_same_bytes_and_continues(cache: Path, tmp_path: Path) -> None:
    target, count = tmp_path / "copy", itertools.count()

    def stop_at(number: int) -> Any:
        def advance() -> None:
            if next(count) == number:
                raise KeyboardInterrupt

        return advance

    with Cache.open(cache) as source:
        with pytest.raises(KeyboardInterrupt):
            copy_cache(source, target, advance=stop_at(20))
        assert not Cache.open(target).complete
        assert not list(target.rglob("*.partial"))
        assert {fault.kind for fault in verify(target).faults} == {"absent"}
        second = copy_cache(source, target)
        assert second.present == 21
        assert (second.shards, second.damaged, second.absent) == (verify(cache).shards - 21, [], 0)
        assert copy_cache(source, target).shards == 0
    assert files(target) == files(cache)
    assert verify(target).faults == []


def test_a_copy_never_takes_over_damage(cache: Path, tmp_path: Path) -> None:
    spoil(cache / SHARD)
    (cache / "test/clip/cls/c/0/0").unlink()
    commits.path(cache, "val", "sample/ok", 0).unlink()
    with Cache.open(cache) as source:
        copied = copy_cache(source, tmp_path / "copy")
    assert (len(copied.damaged), copied.absent) == (2, 1)
    assert {(f.table, f.column, f.shard, f.kind) for f in verify(tmp_path / "copy").faults} == {
        ("train", "clip/patch", 1, "absent"),
        ("test", "clip/cls", 0, "absent"),
        ("val", "sample/ok", 0, "absent"),
    }
    repair(cache, verify(cache).faults, HERE)
    with Cache.open(cache) as source:
        assert copy_cache(source, tmp_path / "copy").shards == 2


def test_a_part_is_a_cache_and_grows(pcd: Command, cache: Path, tmp_path: Path) -> None:
    code, out, err = pcd("cache", "copy", "cache", "part", "--columns", "clip/patch,depth/mean", "--tables", "train,val")
    assert code == 0, err
    part = Cache.open("part")
    assert set(part.table("train").column_names()) == {"clip/patch", "depth/mean"} | {
        f"sample/{n}" for n in ("ok", "size", "intrinsics")
    }
    assert part.complete
    assert verify(tmp_path / "part").faults == []
    with Cache.open(cache) as source:
        np.testing.assert_array_equal(
            part.table("train").column("clip/patch").read(range(20)), source.table("train").column("clip/patch").read(range(20))
        )
    assert part.manifest.identity() == Cache.open(cache).manifest.identity()
    code, out, _ = pcd("cache", "copy", "cache", "part", "--columns", "clip/patch")
    assert (code, "were there already" in out) == (0, True)
    assert Cache.open("part").manifest.columns["clip/patch"].tables == ("train", "val", "test")
    assert Cache.open("part").manifest.columns["depth/mean"].tables == ("train", "val")
    assert pcd("cache", "copy", "cache", "part")[0] == 0
    assert files(tmp_path / "part") == files(cache)


def test_a_copy_into_something_else_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache.open(cache) as source:
        extract(toy_recipe(dataset={**SMALL, "factor": 0.5}), tmp_path / "other", device="cpu")
        before = files(tmp_path / "other")
        with pytest.raises(CacheError, match=r"holds another cache.*\n.*factor: found 0\.5, wanted 1\.0"):
            copy_cache(source, tmp_path / "other")
        assert files(tmp_path / "other") == before
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/a.jpg").write_bytes(b"mine")
        with pytest.raises(CacheError, match=r"holds other files \(a\.jpg\)"):
            copy_cache(source, tmp_path / "photos")
        assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
        for inside in (cache, cache / "train", tmp_path):
            with pytest.raises(UsageError, match="choose another folder"):
                copy_cache(source, inside)
        with pytest.raises(UsageError, match=r"no table 'tarin' to copy\. Did you mean 'train'"):
            copy_cache(source, tmp_path / "copy", tables=["tarin"])
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(SpaceError, match="are to be copied"):
            copy_cache(source, tmp_path / "copy")


def test_a_second_copy_takes_repaired_shards_again(cache: Path, tmp_path: Path) -> None:
    """A shard of other bytes than those copied before, vouched for by its own record, replaces them."""
    with Cache.open(cache) as source:
        copy_cache(source, tmp_path / "copy")
        path, record = cache / "train/depth/mean/c/0/0", commits.read(cache, "train", "depth/mean", 0)
        path.write_bytes((cache / "train/depth/var/c/0/0").read_bytes())
        other = commits.read(cache, "train", "depth/var", 0)
        commits.write(cache, dataclasses.replace(record, sha256=other.sha256, bytes=other.bytes))
        assert copy_cache(source, tmp_path / "copy").shards == 1
    assert files(tmp_path / "copy") == files(cache)
    assert leftovers(Cache.open(tmp_path / "copy")) == []
