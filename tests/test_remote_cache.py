"""A cache on a real S3 server: the same bytes as on disk, whatever happened on the way, and nothing wrong goes unnoticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from zarr.storage import ObjectStore

from pcd.cache import Cache, ColumnEntry, Manifest, TableEntry, commits, lease, objects, shards
from pcd.cache.gc import collect, garbage
from pcd.cache.leftovers import leftovers
from pcd.cache.verify import verify_cache
from pcd.cache.writer import RangeWriter
from pcd.columns import ColumnSpec
from pcd.errors import CacheError, CorruptError, IncompleteError, StoreError
from pcd.fingerprint import digest
from pcd.remote import RemotePath
from pcd.stages.caches import list_caches
from pcd.stages.extract import extract
from pcd.stages.inspect import inspect_cache
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from pcd.views import ViewPlan
from tests.cache_support import HERE, small_shards
from tests.store_support import BUCKET, Server, copied, objects_of, remote, server, store
from tests.test_extract import files, toy_recipe

__all__ = ["server", "small_shards", "store"]
RECIPE = toy_recipe(dataset={"train": 5, "test": 1})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache on disk; not to be changed."""
    root = tmp_path_factory.mktemp("local") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcd.stages.plan.MAX_SHARD_ROWS", 8)
        extract(RECIPE, root, device="cpu")
    return root


@pytest.fixture(scope="module")
def whole(server: Server, local: Path) -> RemotePath:
    """The cache on the store, extracted straight to it; not to be changed."""
    root = remote("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcd.stages.plan.MAX_SHARD_ROWS", 8)
        extraction = extract(RECIPE, str(root), device="cpu")
    assert extraction.encoded == 6
    return root


@pytest.fixture
def cache(whole: RemotePath, store: RemotePath) -> RemotePath:
    """A copy of it, to be spoilt."""
    return copied(whole, store)


def test_the_same_bytes_as_on_disk(whole: RemotePath, local: Path) -> None:
    assert objects_of(whole) == files(local)
    assert (whole / "provenance.jsonl").is_file()
    assert extract(RECIPE, whole, device="cpu").encoded == 0


def test_every_column_reads_the_same(whole: RemotePath, local: Path) -> None:
    rng = np.random.default_rng(0)
    with Cache.open(str(whole)) as ours, Cache.open(local) as theirs, Cache.open(whole, verify=False) as unchecked:
        assert ours.complete
        assert ours.manifest == theirs.manifest
        assert [table.keys for table in ours.tables] == [table.keys for table in theirs.tables]
        for table in theirs.tables:
            for name in table.column_names():
                column = table.column(name)
                rows = rng.integers(0, column.rows, 2 * column.rows)
                for opened in (ours, unchecked):
                    found = opened.table(table.name).column(name)
                    np.testing.assert_array_equal(found.read(rows).view("u1"), column.read(rows).view("u1"))
        assert ours.texts() == theirs.texts()


def test_other_readers_read_the_same(whole: RemotePath, local: Path, server: Server) -> None:
    column = Cache.open(local).table("train").column("clip/patch")
    wanted = column.read(range(column.rows))
    group = zarr.open_group(ObjectStore(whole.bucket.store, read_only=True), path=whole.key, mode="r")
    np.testing.assert_array_equal(np.asarray(group["train/clip/patch"][:]), wanted)  # type: ignore[index]
    place = {"driver": "s3", "bucket": BUCKET, "path": f"{whole.key}/train/clip/patch/"}
    place |= {"endpoint": f"http://127.0.0.1:{server.port}", "aws_region": "us-east-1"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    np.testing.assert_array_equal(array.read().result(), wanted)
    lazy = Cache.open(whole).table("train").column("clip/patch").as_dask()
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), wanted)


def noise(root: RemotePath, spec: ColumnSpec, rows: int, shard: int) -> tuple[Cache, np.ndarray]:
    """A cache of one column of noise, and that noise."""
    keys = [str(number) for number in range(rows)]
    manifest = Manifest({"name": "noise"}, ViewPlan((16, 16), flips=False), {}, {"train": TableEntry(rows, digest(keys))})
    cache = Cache.create(root, manifest, {"train": keys})
    cache.add_columns({spec.name: ColumnEntry(spec, shard, ("train",), {})})
    values = np.random.default_rng(1).integers(0, 200, (rows, *spec.shape)).astype(spec.dtype)
    with RangeWriter(cache.table("train"), [spec.name], 0, rows) as writer:
        for start in range(0, rows, 7):
            writer.append({spec.name: values[start : start + 7]})
    return Cache.open(root), values


@pytest.mark.parametrize(
    ("gap", "piece", "compress"), [(0, 1, False), (100, 1000, True), (1 << 18, 1 << 23, False), (1 << 18, 1 << 23, True)]
)
def test_rows_come_in_few_requests_or_many(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, gap: int, piece: int, compress: bool
) -> None:
    spec = ColumnSpec("n/x", (9, 5), "float16", ("a", "b"), "x", axis="sample", compress=compress)
    cache, values = noise(store, spec, 30, 8)
    monkeypatch.setattr(objects, "GAP", gap)
    monkeypatch.setattr(objects, "PIECE", piece)
    asked: list[int] = []
    ask = RemotePath.read_range

    def count(path: RemotePath, start: int, length: int) -> memoryview:
        asked.append(length)
        return ask(path, start, length)

    monkeypatch.setattr(RemotePath, "read_range", count)
    column = cache.table("train").column("n/x")
    for rows in (range(30), [3], [29, 0, 0, 8, 7, 29], [16, 23]):
        np.testing.assert_array_equal(column.read(list(rows)), values[list(rows)])
    assert (len(asked) == 4 + 1 + 3 + 1) if gap == 1 << 18 else len(asked) > 9
    with pytest.raises(IndexError, match="rows 0 to 29, not 30"):
        column.read([30])


class Broken(BaseException):
    """Whoever extracts is gone."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Writing an object fails when `left` are written; every other time when the object is there already."""
    state = {"left": -1, "times": 0}
    put = RemotePath._put

    def fail(path: RemotePath, data: Any, mode: Any) -> Any:
        if state["left"] == 0 and not path.name.startswith(lease.LOCK):
            state["times"] += 1
            if state["times"] % 2:
                put(path, data, mode)
            raise Broken
        state["left"] -= 1
        return put(path, data, mode)

    monkeypatch.setattr(RemotePath, "_put", fail)
    yield state
    state["left"] = -1


def test_interrupted_anywhere_it_goes_on(store: RemotePath, local: Path, failing: dict[str, int]) -> None:
    """Each attempt gets a little further: metadata, shards and records are all met."""
    done, wanted = 0, files(local)
    for attempt in range(40):
        failing["left"] = 9 + 11 * attempt
        try:
            extract(RECIPE, store, device="cpu")
            break
        except Broken:
            pass
        failing["left"] = -1
        found = {path.relative_to(store).as_posix(): path.read_bytes() for path in (store / "commits").glob("*/*/*/*.json")}
        assert len(found) >= done
        done = len(found)
        for name, record in found.items():  # what is committed is what it would have been
            assert record == wanted[name]
    failing["left"] = -1
    assert attempt > 5
    assert objects_of(store) == wanted
    findings = verify(store)
    assert (findings.faults, findings.leftovers) == ([], [])


def test_what_is_not_committed_does_not_exist(store: RemotePath) -> None:
    spec = ColumnSpec("n/x", (3,), "float16", ("a",), "x", axis="sample")
    noise(store, spec, 12, 8)
    commits.path(store, "train", "n/x", 1).unlink()
    cache = Cache.open(store)
    with pytest.raises(IncompleteError, match=f"lacks 4 of 12 rows .* `pcd extract --cache {store}` completes"):
        cache.table("train").column("n/x").read([9])
    assert [(fault.kind, fault.shard) for fault in verify_cache(cache, fast=True)] == [("absent", 1)]


def test_a_record_is_never_written_over(store: RemotePath) -> None:
    commit = commits.Commit(table="t", column="c", shard=1, start=0, stop=1, bytes=1, sha256="1", fingerprint="0")
    commits.write(store, commit)
    commits.write(store, commit)  # the same one
    with pytest.raises(CacheError, match=r"000001.json: somebody else has committed this shard meanwhile"):
        commits.write(store, dataclasses.replace(commit, sha256="0"))
    assert commits.read(store, "t", "c", 1) == commit


def test_a_shard_that_somebody_else_writes_is_left_alone(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store / "shard"
    shards.upload(path, b"of a crash")
    shards.upload(path, b"mine")
    assert path.read_bytes() == b"mine"
    seen = path.version()
    path.put(b"of somebody else")
    monkeypatch.setattr(RemotePath, "version", lambda path: seen)
    with pytest.raises(CacheError, match="shard is being written by somebody else"):
        shards.upload(path, b"mine")
    assert path.read_bytes() == b"of somebody else"


def flip(path: RemotePath) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.put(bytes(data))


def test_damage_is_found_and_mended(cache: RemotePath, local: Path) -> None:
    flip(cache / "train/clip/patch/c/1/0/0")
    (cache / "train/clip/cls/c/1/0").unlink()
    cut, empty = cache / "train/depth/mean/c/1/0", cache / "train/depth/count/c/1/0"
    cut.put(cut.read_bytes()[:-1])
    empty.put(b"")
    pair = [cache / f"train/depth/var/c/{number}/0" for number in (0, 1)]
    for path, data in zip(pair, [path.read_bytes() for path in reversed(pair)], strict=True):
        path.put(data)
    opened = Cache.open(cache)
    for name in ("clip/patch", "clip/cls", "depth/mean", "depth/count"):
        with pytest.raises(CorruptError, match=rf"column {name}, table train, row 8: .*`pcd cache verify {cache} --repair`"):
            opened.table("train").column(name).read([0, 8, 5])
    faults = verify(cache).faults
    assert all(fault.kind == "damaged" for fault in faults)
    bad = {("clip/patch", 1), ("clip/cls", 1), ("depth/mean", 1), ("depth/count", 1)}
    assert {(fault.column, fault.shard) for fault in faults} == bad | {("depth/var", 0), ("depth/var", 1)}
    seen_fast = {(fault.column, fault.shard) for fault in verify(cache, fast=True).faults}
    assert seen_fast == bad - {("clip/patch", 1)}  # lengths and indexes are as they should be
    done = repair(cache, faults, HERE)
    assert done.notes == []
    assert objects_of(cache) == files(local)


def test_damaged_metadata_is_found_and_mended(cache: RemotePath, local: Path) -> None:
    text = next(path for path, _ in (cache / "text").walk() if path.name == "0")
    paths = [cache / name for name in ("manifest.json", "train/samples.json", "train/clip/patch/zarr.json")]
    for path in (*paths, text):
        flip(path)
    faults = verify(cache, fast=True).faults
    assert len({fault.path for fault in faults if fault.path}) == 4
    assert repair(cache, faults, HERE).notes == []
    assert objects_of(cache) == files(local)


def test_a_server_that_goes_away_is_named_and_what_is_there_stays(
    store: RemotePath, server: Server, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, shards_written = RemotePath._put, list[RemotePath]()

    def stop(path: RemotePath, data: Any, mode: Any) -> Any:
        if "/c/" in path.key and len(shards_written) == 10:
            server.stop()
        shards_written.extend([path] if "/c/" in path.key else [])
        return put(path, data, mode)

    monkeypatch.setattr(RemotePath, "_put", stop)
    with pytest.raises(StoreError, match=rf"{store}/.*the store cannot be reached, or fails .*give the same command again"):
        extract(RECIPE, store, device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr("pcd.stages.plan.MAX_SHARD_ROWS", 8)
    server.start()
    assert verify(store, fast=True).faults
    extract(RECIPE, store, device="cpu")
    assert objects_of(store) == files(local)


def test_looking_at_caches(whole: RemotePath, local: Path, store: RemotePath) -> None:
    here, there = inspect_cache(Cache.open(local)), inspect_cache(Cache.open(whole))
    assert there.pop("path") == str(whole)
    here.pop("path")
    assert len(there.pop("history")) == len(here.pop("history")) == 1
    assert there == here
    copied(whole, store / "deep" / "one")
    (store / "two" / "manifest.json").put(b'{"format": "pcd-cache", "schema": 99}')
    (store / "other" / "manifest.json").put(b'{"format": "another"}')
    one, two = list_caches(store)
    assert (one["path"], two["path"]) == (f"{store}/deep/one", f"{store}/two")
    assert one["bytes"] == sum(found.st_size for _, found in whole.walk())
    assert (one["complete"], one["dataset"], one["shards"]["committed"]) == (True, "toy", one["shards"]["of"])
    assert "schema 99" in two["error"]


def test_columns_are_dropped_and_leftovers_removed(cache: RemotePath, whole: RemotePath) -> None:
    (cache / "train/clip/cls/c/99/0").put(b"of a crash")
    (cache / "notes.txt").put(b"somebody's")
    assert [file.path for file in leftovers(Cache.open(cache))] == ["notes.txt", "train/clip/cls/c/99/0"]
    shown = garbage(cache, ["depth/canvas"])
    assert collect(cache, shown) == shown.bytes
    left = {path.relative_to(cache).as_posix() for path, _ in cache.walk()}
    before = {path.relative_to(whole).as_posix() for path, _ in whole.walk()}
    assert left == {name for name in before if "depth/canvas" not in name} | {"notes.txt"}
    assert "depth/canvas" not in Cache.open(cache).manifest.columns
    assert verify(cache).faults == []
