"""The cache on disk: written by pcd, read by pcd and by zarr-python, never zeros for what is not there."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from pcd.cache import Cache, ColumnEntry, Manifest, TableEntry, commits
from pcd.cache.column import chunk_path
from pcd.cache.lock import writing
from pcd.cache.shards import LARGE
from pcd.cache.verify import damaged_shards, verify_cache
from pcd.cache.writer import RangeWriter
from pcd.columns import ColumnSpec
from pcd.errors import CacheError, CorruptError, IncompleteError
from pcd.files import partial_of
from pcd.fingerprint import digest
from pcd.views import ViewPlan
from tests.cache_support import local

TOKENS = ColumnSpec("clip/patch", (3, 5), "float16", ("patch", "channel"), "tokens")
MAP = ColumnSpec("depth/canvas", (4, 6), "uint16", ("y", "x"), "depth", compress=True, units_per_metre=256)
OK = ColumnSpec("sample/ok", (), "uint8", (), "read", axis="sample")
SAMPLES, SHARD = 7, 2
KEYS = [f"key-{n}" for n in range(SAMPLES)]


def make_cache(root: Path) -> Cache:
    manifest = Manifest(
        dataset={"name": "toy"},
        plan=ViewPlan((4, 6), (1, 2)),
        split={"seed": 0},
        tables={"train": TableEntry(SAMPLES, digest(KEYS))},
    )
    cache = Cache.create(root, manifest, {"train": KEYS})
    cache.add_columns({s.name: ColumnEntry(s, SHARD, ("train",), {"made by": s.name}) for s in (TOKENS, MAP, OK)})
    return cache


def make_rows() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "clip/patch": generator.normal(size=(SAMPLES * 4, 3, 5)).astype(np.float16),
        "depth/canvas": generator.integers(0, 9, (SAMPLES * 4, 4, 6)).astype(np.uint16),
        "sample/ok": np.array([1, 1, 0, 1, 1, 1, 1], dtype=np.uint8),
    }


def fill(cache: Cache, rows: dict[str, np.ndarray], start: int = 0, stop: int = SAMPLES) -> None:
    table = cache.table("train")
    with RangeWriter(table, rows, start, stop) as writer:
        for sample in range(start, stop):
            writer.append(
                {n: v[sample * 4 : sample * 4 + 4] if n != "sample/ok" else v[sample : sample + 1] for n, v in rows.items()}
            )
    for name in rows:
        table.column(name).refresh()


@pytest.fixture
def full(tmp_path: Path) -> tuple[Cache, dict[str, np.ndarray]]:
    cache, rows = make_cache(tmp_path / "cache"), make_rows()
    fill(cache, rows)
    return cache, rows


def test_pcd_and_zarr_python_read_the_same_bits(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, rows = full
    group = zarr.open_group(cache.root, mode="r")
    for name, values in rows.items():
        array = group[f"train/{name}"]
        assert isinstance(array, zarr.Array)
        assert np.asarray(array[:]).tobytes() == values.tobytes()
        order = np.random.default_rng(1).permutation(len(values))
        assert cache.table("train").column(name).read(order).tobytes() == values[order].tobytes()


def test_zarr_python_writes_shards_that_pcd_reads(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, rows = full
    for name in ("clip/patch", "depth/canvas"):
        array = zarr.open_array(cache.root / "train" / name, mode="r+")
        array[:] = rows[name][::-1]
        cache.close()
        np.testing.assert_array_equal(cache.table("train").column(name).read(range(SAMPLES * 4)), rows[name][::-1])


def test_columns_are_lazy_dask_arrays_once_they_are_complete(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, rows = full
    lazy = cache.table("train").column("clip/patch").as_dask()
    assert lazy.chunks[0] == (8, 8, 8, 4)
    np.testing.assert_array_equal(lazy.compute(), rows["clip/patch"])
    commits.path(cache.root, "train", "clip/patch", 2).unlink()
    with pytest.raises(IncompleteError, match="16:24"):
        Cache.open(cache.root).table("train").column("clip/patch").as_dask()


def test_arrays_carry_names_units_and_fingerprints(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    array = zarr.open_array(full[0].root / "train" / "depth/canvas", mode="r")
    assert array.metadata.dimension_names == ("view", "y", "x")  # type: ignore[union-attr]
    assert array.attrs["units"] == "1/256 m"
    assert array.attrs["fingerprint"] == digest({"made by": "depth/canvas"})
    assert array.shards == (SHARD * 4, 4, 6)
    assert array.chunks == (1, 4, 6)


def test_a_record_vouches_for_the_bytes_that_were_appended_whatever_becomes_of_the_array(tmp_path: Path) -> None:
    """Large rows are hashed while they are written: the array is the caller's again once it is appended."""
    wide = ColumnSpec("clip/wide", (LARGE // 2 + 3,), "float16", ("channel",), "noise")
    cache = make_cache(tmp_path)
    cache.add_columns({wide.name: ColumnEntry(wide, SHARD, ("train",), {"made by": "noise"})})
    table, rng = cache.table("train"), np.random.default_rng(0)
    first = rng.integers(0, 1 << 14, (16, *wide.shape), dtype=np.uint16).view(np.float16)
    expected = first.copy()
    with RangeWriter(table, [wide.name], 0, 4) as writer:  # two shards of eight rows
        for start, stop in itertools.pairwise((0, 3, 4, 10, 16)):
            writer.append({wide.name: first[start:stop]})
            first[start:stop] = 1.0
    column = table.column(wide.name)
    column.refresh()
    np.testing.assert_array_equal(column.read(range(16)), expected)
    for shard in commits.committed(cache.root, "train", wide.name):
        data = chunk_path(cache.root, "train", wide, shard).read_bytes()
        assert commits.read(cache.root, "train", wide.name, shard).sha256 == hashlib.sha256(data).hexdigest()


def test_uncommitted_rows_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    cache, rows = make_cache(tmp_path / "cache"), make_rows()
    fill(cache, rows, 0, 4)
    column = cache.table("train").column("clip/patch")
    assert column.missing() == [(16, 28)]
    assert not cache.complete
    np.testing.assert_array_equal(column.read([15, 0]), rows["clip/patch"][[15, 0]])
    with pytest.raises(IncompleteError, match=r"clip/patch of table train .* lacks 12 of 28 rows \(16:28\)") as error:
        column.read([16])
    assert "pcd extract" in str(error.value)
    fill(cache, rows, 4, SAMPLES)
    assert cache.complete
    with pytest.raises(IndexError, match="rows 0 to 27, not 30"):
        column.read([30])


def test_a_shard_without_its_record_does_not_exist(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, _ = full
    commits.path(cache.root, "train", "clip/patch", 1).unlink()
    with pytest.raises(IncompleteError, match="8:16"):
        Cache.open(cache.root).table("train").column("clip/patch").read([9])


def test_an_error_on_the_way_leaves_neither_shard_nor_partial_file(tmp_path: Path) -> None:
    cache, rows = make_cache(tmp_path / "cache"), make_rows()
    table = cache.table("train")
    with pytest.raises(KeyboardInterrupt), RangeWriter(table, ["clip/patch"], 0, 2) as writer:
        writer.append({"clip/patch": rows["clip/patch"][:3]})
        path = chunk_path(cache.root, "train", TOKENS, 0)
        assert partial_of(local(path)).exists()
        raise KeyboardInterrupt
    assert not partial_of(local(path)).exists()
    assert not path.exists()
    assert table.column("clip/patch").missing() == [(0, 28)]


def test_interrupted_and_continued_is_byte_identical(tmp_path: Path, full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    whole, rows = full
    parts = make_cache(tmp_path / "parts")
    fill(parts, rows, 0, 2)
    with RangeWriter(parts.table("train"), rows, 2, 4) as writer:
        writer.append({"clip/patch": rows["clip/patch"][8:11]})
    fill(parts, rows, 2, SAMPLES)
    files = {p.relative_to(local(whole.root)): p.read_bytes() for p in local(whole.root).rglob("*") if p.is_file()}
    assert files == {p.relative_to(local(parts.root)): p.read_bytes() for p in local(parts.root).rglob("*") if p.is_file()}


def test_committed_shards_are_never_written_again(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, rows = full
    fill(cache, {name: np.zeros_like(values) for name, values in rows.items()})
    np.testing.assert_array_equal(cache.table("train").column("clip/patch").read([5]), rows["clip/patch"][[5]])


@pytest.mark.parametrize("column", [TOKENS, MAP], ids=lambda spec: spec.name)
def test_every_flipped_bit_of_a_row_is_caught(full: tuple[Cache, dict[str, np.ndarray]], column: ColumnSpec) -> None:
    cache, rows = full
    path = chunk_path(cache.root, "train", column, 0)
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(bad))
        cache.close()
        with pytest.raises(CorruptError, match=column.name):
            cache.table("train").column(column.name).read(range(8))
        assert verify_cache(cache), f"byte {position}"
    path.write_bytes(good)
    cache.close()
    np.testing.assert_array_equal(cache.table("train").column(column.name).read(range(8)), rows[column.name][:8])
    assert verify_cache(cache) == []


def test_verify_names_what_is_wrong(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, _rows = full
    first, second = (chunk_path(cache.root, "train", TOKENS, n) for n in (0, 1))
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)
    third = chunk_path(cache.root, "train", TOKENS, 2)
    third.write_bytes(third.read_bytes()[:-1])
    chunk_path(cache.root, "train", MAP, 0).unlink()
    commits.path(cache.root, "train", "sample/ok", 3).unlink()
    (local(cache.root) / "train" / "samples.json").write_text(json.dumps(KEYS[::-1]))
    faults = {(f.column, f.shard): f for f in verify_cache(Cache.open(cache.root))}
    assert set(faults) == {
        ("samples", None),
        ("clip/patch", 0),
        ("clip/patch", 1),
        ("clip/patch", 2),
        ("depth/canvas", 0),
        ("sample/ok", 3),
    }
    assert "not those that were committed" in faults["clip/patch", 0].detail
    assert faults["sample/ok", 3].kind == "absent"
    assert "is gone" in faults["depth/canvas", 0].detail


def test_shards_whose_records_are_dropped_are_written_anew(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, rows = full
    path = chunk_path(cache.root, "train", TOKENS, 1)
    good = path.read_bytes()
    path.write_bytes(b"\0" + good[1:])
    assert damaged_shards(verify_cache(cache)) == {("train", "clip/patch"): {1}}
    commits.path(cache.root, "train", "clip/patch", 1).unlink()
    again = Cache.open(cache.root)
    assert again.table("train").column("clip/patch").missing() == [(8, 16)]
    fill(again, rows, 2, 4)
    assert path.read_bytes() == good
    assert verify_cache(again) == []


def test_foreign_records_are_caught(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, _ = full
    record = commits.path(cache.root, "train", "clip/patch", 0)
    value = json.loads(record.read_text())
    for field, other in (("start", 1), ("fingerprint", "0" * 64), ("digest", "1" * 64), ("shard", 1)):
        local(record).write_text(json.dumps({**value, field: other}))
        assert [f.shard for f in verify_cache(cache)] == [0], field
    local(record).write_text("{")
    assert "damaged" in verify_cache(cache)[0].detail
    del value["digest"]
    honest = commits.Commit(**value)
    for foreign, words in (
        (replace(honest, fingerprint="0" * 64), "another fingerprint"),
        (replace(honest, stop=7), "speaks of rows 0:7"),
        (replace(honest, sha256="0" * 64), "not those that were committed"),
        (replace(honest, bytes=3), "3 were written"),
    ):
        commits.write(cache.root, foreign)  # agrees with its own digest, not with the cache
        assert [words in fault.detail for fault in verify_cache(cache)] == [True]
    commits.write(cache.root, honest)
    assert verify_cache(cache) == []


def test_texts_lie_beside_the_columns(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    cache, _ = full
    values = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
    assert cache.text("e" * 64, ["1 meter", "2 meter"]) is None
    cache.add_text("e" * 64, ["1 meter", "2 meter"], values)
    np.testing.assert_array_equal(cache.text("e" * 64, ["1 meter", "2 meter"]), values)
    assert cache.text("e" * 64, ["2 meter", "1 meter"]) is None
    assert cache.text("f" * 64, ["1 meter", "2 meter"]) is None
    assert cache.texts() == [{"encoder": "e" * 64, "phrases": ["1 meter", "2 meter"]}]


def test_usable_samples_and_rows(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    table = full[0].table("train")
    assert table.usable().tolist() == [0, 1, 3, 4, 5, 6]
    samples = np.array([1, 3])
    assert table.view_rows(samples).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert table.view_rows(samples, flips=False).tolist() == [[4, 5], [12, 13]]
    assert table.view_rows(samples, tile=np.array([0, 1])).tolist() == [[4, 6], [13, 15]]
    assert table.view_rows(samples, flips=False, tile=np.array([1, 0])).tolist() == [[5], [12]]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(CacheError, match=r"is being written by process \d+ on"), writing(tmp_path):
        pass
    with writing(tmp_path):
        pass


def test_what_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"is not a pcd cache: manifest\.json is not there"):
        Cache.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "pcd-cache", "schema": 99}')
    with pytest.raises(CacheError, match="has schema 99, this pcd reads schema 1"):
        Cache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        Cache.open(tmp_path)


def test_unknown_tables_and_columns_are_suggested(full: tuple[Cache, dict[str, np.ndarray]]) -> None:
    with pytest.raises(CacheError, match=r"no table 'trian'\. Did you mean 'train'"):
        full[0].table("trian")
    with pytest.raises(CacheError, match=r"no column 'clip/path'\. Did you mean 'clip/patch'"):
        full[0].table("train").column("clip/path")


def test_wrong_rows_are_not_written(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="expected at most"), RangeWriter(cache.table("train"), ["clip/patch"], 0, 2) as writer:
        writer.append({"clip/patch": np.zeros((1, 3, 5), dtype=np.float32)})
