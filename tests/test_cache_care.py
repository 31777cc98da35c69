"""Looking after caches: ls, inspect, and what verify and repair do with caches of other circumstances."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from pcd.cache import Cache, commits, provenance
from pcd.cache.manifest import MANIFEST, SPARE
from pcd.errors import CorruptError, MissingFileError
from pcd.stages.caches import list_caches
from pcd.stages.extract import extract
from pcd.stages.inspect import describe_step, inspect_cache
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from tests.cache_support import HERE, SHARD, SMALL, cache, pcd, small_shards, spoil, whole
from tests.test_cli import Command
from tests.test_extract import files, toy_recipe

__all__ = ["cache", "pcd", "small_shards", "whole"]


# ---- verify and repair


def test_fast_verify_reads_no_data(cache: Path) -> None:
    spoil(cache / SHARD)
    assert verify(cache, fast=True).faults == []
    assert [f.shard for f in verify(cache).faults] == [1]
    path = cache / "test/depth/var/c/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # the index's checksum
    assert [(f.column, f.detail.rpartition(": ")[2]) for f in verify(cache, fast=True).faults] == [
        ("depth/var", "the shard index is damaged")
    ]


def test_repair_is_noted_and_leaves_the_rest_alone(cache: Path, whole: Path) -> None:
    spoil(cache / SHARD)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("c/**/*") if path.is_file()}
    assert repair(cache, verify(cache).faults, HERE).mended == ["1 shard of clip/patch"]
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert [path.relative_to(cache).as_posix() for path in changed] == [SHARD]
    assert files(cache) == files(whole)
    assert provenance.records(cache)[-1]["repaired"] == ["1 shard of clip/patch"]
    assert "repaired 1 shard of clip/patch" in describe_step(inspect_cache(Cache.open(cache))["history"][-1])


def test_repair_with_another_encoder_is_refused_and_loses_nothing(cache: Path) -> None:
    spoil(cache / SHARD)
    before = files(cache)
    outcome = repair(cache, verify(cache).faults, dataclasses.replace(HERE, weights="file"))
    assert outcome.mended == []
    assert "encoder.weights.kind: found 'file', wanted 'random'" in outcome.notes[0]
    assert files(cache) == before


def test_repair_without_the_images_says_so_and_keeps_the_good_rows(cache: Path) -> None:
    """A sample that was readable is not any more: the damaged shard stays, and so do its undamaged rows."""
    record = provenance.records(cache)[0]
    record["dataset"]["broken"] = [Cache.open(cache).table("train").keys[2]]
    (cache / provenance.PROVENANCE).write_text(json.dumps(record) + "\n")
    spoil(cache / SHARD)
    before = files(cache)
    outcome = repair(cache, verify(cache).faults, HERE)
    assert "It could be read when the cache was made: restore the file." in outcome.notes[0]
    assert files(cache) == before
    with Cache.open(cache) as opened:
        opened.table("train").column("clip/patch").read([15])
        with pytest.raises(CorruptError):
            opened.table("train").column("clip/patch").read([8])
    (cache / provenance.PROVENANCE).unlink()
    assert verify(cache).notes[0].startswith("samples not compared with the dataset")
    assert "could not be mended" in repair(cache, verify(cache).faults, HERE).notes[0]


def test_samples_that_were_skipped_stay_skipped(tmp_path: Path) -> None:
    """Even if they could be read by now: columns that are not written anew hold filler for them."""
    root = tmp_path / "cache"
    extract(toy_recipe(dataset={**SMALL, "broken": ["test-1"]}), root, device="cpu", on_error="skip")
    before, record = files(root), provenance.records(root)[0]
    record["dataset"]["broken"] = []
    (root / provenance.PROVENANCE).write_text(json.dumps(record) + "\n")
    for name in ("test/sample/ok/c/0", "test/clip/cls/c/0/0"):
        (root / name).write_bytes(b"gone")
    repair(root, verify(root).faults, HERE)
    assert files(root) == before


def older(root: Path) -> None:
    """As an earlier pcd wrote it: a manifest without a digest, and no spare copy."""
    value = json.loads((root / MANIFEST).read_text())
    del value["digest"]
    (root / MANIFEST).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    (root / SPARE).unlink()


def test_caches_of_earlier_versions_are_whole_and_can_be_repaired(cache: Path) -> None:
    older(cache)
    assert verify(cache).faults == []
    before = files(cache)
    spoil(cache / SHARD)
    metadata = cache / "train/clip/patch/zarr.json"
    metadata.write_text(metadata.read_text().replace("float16", "int16"))
    assert repair(cache, verify(cache).faults, HERE).notes == []
    assert files(cache) == before


def test_an_older_manifest_that_was_edited_is_found_but_not_believed(cache: Path) -> None:
    older(cache)
    value = json.loads((cache / MANIFEST).read_text())
    value["columns"]["clip/patch"]["spec"]["dtype"] = "int16"
    (cache / MANIFEST).write_text(json.dumps(value))
    before = files(cache)
    faults = verify(cache).faults
    assert {fault.path for fault in faults} == {f"{table}/clip/patch/zarr.json" for table in ("train", "val", "test")}
    assert "its column clip/patch is not what dataset and encoder give" in repair(cache, faults, HERE).notes[0]
    assert files(cache) == before
    value["columns"]["clip/patch"]["fingerprint"]["views"]["flips"] = False
    (cache / MANIFEST).write_text(json.dumps(value))
    assert "its fingerprint does not belong to the rest" in verify(cache).faults[0].detail


def test_torn_provenance_is_found_and_cut_off(cache: Path) -> None:
    path = cache / provenance.PROVENANCE
    good = path.read_text()
    path.write_text(good + '{"time": "2026')
    provenance.append(cache, {"encoded": 0})  # the next line does not continue the torn one
    faults = verify(cache).faults
    assert "line 2 cannot be read" in faults[0].detail
    repair(cache, faults, HERE)
    assert path.read_text().startswith(good)
    assert [sorted(entry)[:1] for entry in provenance.records(cache)] == [["batch_views"], ["command"], ["command"]]
    assert verify(cache).faults == []


def test_samples_are_compared_with_the_dataset(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toy import ToyDataset

    original = ToyDataset.keys
    monkeypatch.setattr(ToyDataset, "keys", lambda self, split: original(self, split)[::-1])
    assert {f.path for f in verify(cache).faults} == {f"{t}/samples.json" for t in ("train", "val", "test")} - {
        "val/samples.json"
    }


def test_verify_repairs_on_the_command_line(pcd: Command, cache: Path) -> None:
    spoil(cache / SHARD)
    (cache / "test/zarr.json").unlink()
    code, _, err = pcd("cache", "verify", "cache")
    assert code == 1
    assert "--repair` writes what is damaged anew" in err
    code, out, err = pcd("cache", "verify", "cache", "--repair", "--device", "cpu")
    assert code == 0, err
    assert "written anew: 1 shard of clip/patch" in err
    assert out.rstrip().endswith("everything is there and whole.")
    assert "fast: the data were not read" in pcd("cache", "verify", "cache", "--fast")[1]
    commits.path(cache, "test", "clip/cls", 0).unlink()
    code, _, err = pcd("cache", "verify", "cache", "--repair")
    assert code == 1
    assert "completed by the same `pcd extract`" in err


# ---- ls and inspect


def test_ls_lists_what_is_there(pcd: Command, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "caches/deep/second")
    (tmp_path / "caches/link").symlink_to(cache)
    (tmp_path / "caches/loop").symlink_to(tmp_path / "caches")
    (tmp_path / "caches/other").mkdir()
    (tmp_path / "caches/other/manifest.json").write_text("{}")
    commits.path(cache, "train", "clip/cls", 0).unlink()
    shutil.copytree(cache, tmp_path / "caches/bad")
    spoil(tmp_path / "caches/bad" / MANIFEST)
    found = {Path(entry["path"]).name: entry for entry in list_caches(tmp_path / "caches")}
    assert found.keys() == {"bad", "link", "second"}
    assert "damaged" in found["bad"]["error"]
    assert found["second"]["complete"] is True
    shards = found["link"]["shards"]
    assert (found["link"]["complete"], shards["of"] - shards["committed"]) == (False, 1)
    assert found["second"]["tables"] == {"train": 5, "val": 1, "test": 3}
    assert found["second"]["encoders"] == ["toy:toy"]
    assert found["second"]["bytes"] == sum(p.stat().st_size for p in (tmp_path / "caches/deep").rglob("*") if p.is_file())
    assert 0 <= found["second"]["seconds"] < 600
    code, out, err = pcd("cache", "ls", "caches")
    assert (code, "is damaged, or was edited" in err) == (0, True)
    assert "% of shards" in out
    assert {entry["path"] for entry in json.loads(pcd("cache", "ls", "caches", "--json")[1])} == {
        f"caches/{name}" for name in ("bad", "link", "deep/second")
    }
    assert "no caches under caches/other" in pcd("cache", "ls", "caches/other")[1]
    with pytest.raises(MissingFileError):
        list_caches(tmp_path / "nowhere")


def test_inspect_shows_fingerprints_and_history(pcd: Command, cache: Path) -> None:
    facts = json.loads(pcd("cache", "inspect", "cache", "--json")[1])
    step = facts["history"][0]
    assert step["encoded"] == 9
    assert step["device"] == f"cpu ({os.cpu_count()} cores)"
    assert {"command", "pcd", "torch", "open_clip", "zarr", "python", "seconds", "time"} <= step.keys()
    column = next(column for column in facts["columns"] if column["name"] == "clip/patch")
    record = commits.read(cache, "train", "clip/patch", 0)
    assert record.fingerprint.startswith(column["fingerprint"])
    out = pcd("cache", "inspect", "cache")[1]
    assert column["fingerprint"] in out
    assert "9 samples in" in out
