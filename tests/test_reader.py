"""The reader of columns: the same bits as other readers of Zarr, whatever the layout and however many threads read."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pcd.cache import Cache, ColumnEntry, Manifest, TableEntry, column, parallel
from pcd.cache.column import Column, chunk_path
from pcd.cache.shards import ShardReader, ShardWriter
from pcd.cache.writer import RangeWriter
from pcd.columns import ColumnSpec
from pcd.errors import CorruptError, IncompleteError
from pcd.fingerprint import digest
from pcd.views import ViewPlan
from tests.cache_support import local

TOKENS = ColumnSpec("noise/rows", (60, 80), "float16", ("patch", "channel"), "rows that are read one by one", axis="sample")
SMALL = ColumnSpec("noise/rows", (7,), "uint16", ("patch",), "rows that are read together", axis="sample")
PACKED = replace(SMALL, shape=(30,), compress=True)
KINDS = pytest.mark.parametrize("spec", [TOKENS, SMALL, PACKED], ids=["one by one", "together", "compressed"])

Use = Callable[[int], None]


@pytest.fixture(autouse=True, scope="module")
def not_durable() -> Iterator[None]:
    """Many small caches: what power cuts leave is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Use:
    def use(number: int) -> None:
        """So many threads for every batch, however small."""
        monkeypatch.setattr(parallel, "THREADS", number)
        monkeypatch.setattr(parallel, "THREAD_BYTES", 1)

    return use


def make(root: Path, spec: ColumnSpec, shard: int, rows: int, *, committed: int | None = None) -> tuple[Cache, np.ndarray]:
    """A cache of one column and its values: random bits, NaNs of all kinds among them."""
    keys = [str(number) for number in range(rows)]
    manifest = Manifest({"name": "noise"}, ViewPlan((4, 4)), {}, {"train": TableEntry(rows, digest(keys))})
    cache = Cache.create(root, manifest, {"train": keys})
    cache.add_columns({spec.name: ColumnEntry(spec, shard, ("train",), {"made": "up"}, {"note": "of the column"})})
    bits = np.random.default_rng(rows).integers(0, 256, (rows, spec.row_bytes), dtype=np.uint8)
    values = bits.view(spec.dtype).reshape(rows, *spec.shape)
    stop = rows if committed is None else committed
    with RangeWriter(cache.table("train"), [spec.name], 0, stop) as writer:
        writer.append({spec.name: values[:stop]})
    return Cache.open(root), values


def open_column(cache: Cache, *, verify: bool = True) -> Column:
    return Cache.open(cache.root, verify=verify).table("train").column(TOKENS.name)


def flip(cache: Cache, row: int, shard: int = 8) -> None:
    """Change one bit of an uncompressed or compressed row, found by zarr's own description of the index."""
    path = local(chunk_path(cache.root, "train", cache.manifest.columns[TOKENS.name].spec, row // shard))
    data = bytearray(path.read_bytes())
    entries = np.frombuffer(data[-16 * shard - 4 : -4], dtype="<u8").reshape(shard, 2)
    data[int(entries[row % shard, 0]) + 3] ^= 4
    path.write_bytes(data)


def read_elsewhere(folder: Path, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """The same rows by zarr-python, tensorstore and xarray."""
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    array: Any = zarr.open_array(folder, mode="r")
    with xarray.open_zarr(folder.parent, consolidated=False, mask_and_scale=False, chunks=None) as dataset:
        return {
            "zarr-python": np.asarray(array.oindex[np.array(rows)]),
            "tensorstore": np.asarray(tensorstore.open(store).result()[list(rows)].read().result()),
            "xarray": dataset[folder.name].values[list(rows)],
        }


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ColumnSpec, int, int, list[int]]:
    shape = draw(st.sampled_from([(), (1,), (3,), (4, 5), (2, 3, 2), (130, 70)]))  # the last is too large to be read together
    dtype = draw(st.sampled_from(["uint8", "uint16", "int32", "float16", "float32"]))
    spec = ColumnSpec(
        TOKENS.name, shape, dtype, ("a", "b", "c")[: len(shape)], "x", axis="sample", compress=draw(st.booleans())
    )
    rows = draw(st.integers(1, 40))
    some = st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)
    neighbours = st.builds(
        lambda a, b: list(range(min(a, b), max(a, b) + 1)), st.integers(0, rows - 1), st.integers(0, rows - 1)
    )
    asked = [row for part in draw(st.lists(some | neighbours, min_size=1, max_size=3)) for row in part]
    return spec, draw(st.integers(1, 16)), rows, asked


@settings(max_examples=30, deadline=None)
@given(layouts(), st.integers(1, 3), st.sampled_from([32, column.RUN_BYTES]), st.booleans())
def test_every_reader_reads_the_same_bits(
    layout: tuple[ColumnSpec, int, int, list[int]], number: int, run_bytes: int, verify: bool
) -> None:
    spec, shard, rows, asked = layout
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        cache, values = make(Path(name) / "cache", spec, shard, rows)
        patch.setattr(parallel, "THREADS", number)
        patch.setattr(parallel, "THREAD_BYTES", 1)
        patch.setattr(column, "RUN_BYTES", max(run_bytes, spec.row_bytes))
        ours = open_column(cache, verify=verify).read(asked)
        assert (ours.shape, ours.dtype) == ((len(asked), *spec.shape), np.dtype(spec.dtype))
        assert ours.tobytes() == values[asked].tobytes()
        for reader, theirs in read_elsewhere(local(cache.root) / "train" / spec.name, asked).items():
            assert theirs.dtype == ours.dtype, reader
            assert theirs.tobytes() == ours.tobytes(), reader


def test_xarray_sees_dimension_names_attributes_and_metres(tmp_path: Path) -> None:
    spec = ColumnSpec("depth/canvas", (3, 4), "uint16", ("y", "x"), "depth", axis="sample", compress=True, units_per_metre=256)
    cache, values = make(tmp_path / "cache", spec, 4, 10)
    with xarray.open_zarr(cache.root / "train" / "depth", consolidated=False, mask_and_scale=False, chunks=None) as dataset:
        array = dataset["canvas"]
        assert (array.dims, array.shape, array.dtype) == (("sample", "y", "x"), (10, 3, 4), np.uint16)
        assert array.attrs["units"] == "1/256 m"
        assert array.attrs["note"] == "of the column"
        assert array.attrs["meaning"] == "depth"
        assert array.attrs["fingerprint"] == digest({"made": "up"})
    with xarray.open_zarr(cache.root / "train" / "depth", consolidated=False, chunks=None) as dataset:
        np.testing.assert_allclose(dataset["canvas"].values, np.where(values == 0, np.nan, values / 256), rtol=1e-6)


@KINDS
def test_damage_is_named_by_the_first_row_asked_whatever_thread_meets_it(
    tmp_path: Path, spec: ColumnSpec, threads: Use
) -> None:
    cache, values = make(tmp_path / "cache", spec, 8, 44)
    bad = [13, 29, 30, 43]
    for row in bad:
        flip(cache, row)
    opened, rng = open_column(cache), np.random.default_rng(0)
    for turn in range(30):
        threads(1 + turn % 4)
        order = np.arange(44) if turn < 4 else rng.integers(0, 44, 30)
        first = next((int(row) for row in order if row in bad), None)
        if first is None:
            np.testing.assert_array_equal(opened.read(order).view(np.uint8), values[order].view(np.uint8))
            continue
        with pytest.raises(
            CorruptError, match=rf"column noise/rows, table train, row {first}: .*row {first % 8} of the shard"
        ) as e:
            opened.read(order)
        assert str(e.value).endswith(f"`pcd cache verify {cache.root} --repair` writes the bad shards anew.")
    good = np.setdiff1d(np.arange(44), bad)
    assert opened.read(good).tobytes() == values[good].tobytes()


@KINDS
@pytest.mark.parametrize("verify", [True, False])
def test_short_and_missing_files_are_damage(tmp_path: Path, spec: ColumnSpec, verify: bool, threads: Use) -> None:
    cache, values = make(tmp_path / "cache", spec, 8, 24)
    path = chunk_path(cache.root, "train", spec, 1)
    for number in (1, 3):
        threads(number)
        opened = open_column(cache, verify=verify)
        whole = path.read_bytes()
        assert opened.read(range(24)).tobytes() == values.tobytes()  # the index of every shard is known now
        os.truncate(local(path), 2 * spec.row_bytes if not spec.compress else 30)
        with pytest.raises(CorruptError, match=rf"row {8 if spec.compress else 9}: .* is damaged \(cut short"):
            opened.read(range(24))
        with pytest.raises(CorruptError, match=r"row 8: .* the shard index is damaged"):
            open_column(cache, verify=verify).read(range(24))
        path.unlink()
        opened.close()
        with pytest.raises(CorruptError, match=r"row 15: .* committed but its file is gone"):
            opened.read([0, 15, 14])
        path.write_bytes(whole)
        assert opened.read(range(24)).tobytes() == values.tobytes()


def test_rows_that_do_not_exist_are_refused_before_anything_is_read(tmp_path: Path, threads: Use) -> None:
    cache, _ = make(tmp_path / "cache", SMALL, 8, 24, committed=16)
    flip(cache, 0)
    opened, out = open_column(cache), np.full((4, 7), 9, dtype=np.uint16)
    for number in (1, 3):
        threads(number)
        for wrong in (24, -1, -20, 10**12):
            with pytest.raises(IndexError, match=f"rows 0 to 23, not {wrong}"):
                opened.read([0, 20, wrong, 99], out)
        with pytest.raises(IncompleteError, match=r"lacks 8 of 24 rows \(16:24\)"):
            opened.read([1, 0, 3, 20], out)
    assert (out == 9).all()
    assert opened.read([]).shape == (0, 7)


@KINDS
def test_without_verification_bits_are_handed_on(tmp_path: Path, spec: ColumnSpec) -> None:
    cache, values = make(tmp_path / "cache", spec, 8, 16)
    flip(cache, 9)
    opened = open_column(cache, verify=False)
    if spec.compress:  # always checked: zstd of damaged bytes can be anything
        with pytest.raises(CorruptError, match="row 9"):
            opened.read(range(16))
        return
    different = (opened.read(range(16)).view(np.uint8) != values.view(np.uint8)).reshape(16, -1).sum(axis=1)
    assert different.tolist() == [0] * 9 + [1] + [0] * 6


def test_a_large_batch_is_read_by_threads_and_a_small_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(TOKENS, shape=(500, 200))
    cache, values = make(tmp_path / "cache", spec, 8, 30)
    order = np.random.default_rng(0).integers(0, 30, 60)
    monkeypatch.setattr(parallel, "THREADS", 1)
    single = open_column(cache).read(order)
    assert single.tobytes() == values[order].tobytes()
    monkeypatch.setattr(parallel, "THREADS", 2)
    met, began, read = threading.Barrier(2, timeout=20), set(), ShardReader.read

    def together(reader: ShardReader, row: int, out: np.ndarray) -> None:
        if threading.get_ident() not in began:
            began.add(threading.get_ident())
            met.wait()  # breaks unless two threads are here
        read(reader, row, out)

    monkeypatch.setattr(ShardReader, "read", together)
    assert single.nbytes >= 2 * parallel.THREAD_BYTES
    assert open_column(cache).read(order).tobytes() == single.tobytes()
    assert len(began) == 2
    with pytest.raises(threading.BrokenBarrierError):
        began.clear()
        met.abort()
        open_column(cache).read(order[:8])
    assert began == {threading.get_ident()}


@KINDS
def test_many_threads_read_one_column_with_few_files_open(
    tmp_path: Path, spec: ColumnSpec, monkeypatch: pytest.MonkeyPatch, threads: Use
) -> None:
    cache, values = make(tmp_path / "cache", spec, 4, 60)
    monkeypatch.setattr(column, "OPEN_SHARDS", 2)
    threads(3)
    opened, before = open_column(cache), len(list(Path("/dev/fd").iterdir()))

    def reads(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            order = rng.integers(0, 60, rng.integers(1, 20))
            assert opened.read(order).tobytes() == values[order].tobytes()
            if seed == 0:
                opened.close()  # never under the hands of the others

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(reads, range(6)))
            assert len(opened._open) <= 2
    finally:
        sys.setswitchinterval(interval)
    opened.close()
    assert len(list(Path("/dev/fd").iterdir())) <= before  # every file is closed


def test_rows_go_straight_into_the_memory_given(tmp_path: Path, threads: Use) -> None:
    cache, values = make(tmp_path / "cache", TOKENS, 8, 20)
    threads(2)
    opened, order = open_column(cache), [3, 19, 3]
    tensor, buffer = torch.zeros(3, 60, 80, dtype=torch.float16), bytearray(3 * TOKENS.row_bytes + 1)
    unaligned = np.frombuffer(buffer, dtype=np.uint8)[1:].view(np.float16).reshape(3, 60, 80)
    for out in (tensor.numpy(), unaligned, np.zeros((5, 60, 80), np.float16)[1:4]):
        assert opened.read(order, out) is out
        assert out.tobytes() == values[order].tobytes()
    assert tensor.numpy().tobytes() == bytes(buffer[1:]) == values[order].tobytes()
    read_only = np.zeros((3, 60, 80), np.float16)
    read_only.flags.writeable = False
    for wrong in (read_only, read_only[:2], read_only.astype(np.float32), np.zeros((3, 80, 60), np.float16).swapaxes(1, 2)):
        with pytest.raises(ValueError, match=r"expected \(3, 60, 80\) float16, contiguous and writable"):
            opened.read(order, wrong)
        assert not wrong.any()


def test_a_column_works_after_a_fork_and_a_pickle(tmp_path: Path, threads: Use) -> None:
    cache, values = make(tmp_path / "cache", TOKENS, 4, 40)
    threads(2)
    opened, pool = open_column(cache), parallel._pool()
    assert opened.read(range(40)).tobytes() == values.tobytes()  # the threads run now
    assert pickle.loads(pickle.dumps(opened)).read(range(40)).tobytes() == values.tobytes()
    with column._lock, getattr(pool, "_shutdown_lock"), warnings.catch_warnings():  # noqa: B009  # as another thread may hold them
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads run: that is what is tested
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it if it hangs
            try:
                os._exit(0 if opened.read(range(40)).tobytes() == values.tobytes() else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_what_was_written_anew_is_seen_after_a_refresh(tmp_path: Path) -> None:
    cache, values = make(tmp_path / "cache", PACKED, 4, 10)
    opened = open_column(cache)
    opened.read(range(10))
    writer = ShardWriter(chunk_path(cache.root, "train", PACKED, 1), PACKED, 4)
    writer.append(values[:2])
    writer.finish()
    opened.refresh()
    assert opened.read([4, 5, 8]).tobytes() == values[[0, 1, 8]].tobytes()
    with pytest.raises(CorruptError, match=r"row 7: .* row 3 of the shard is absent although the shard is committed"):
        opened.read([4, 7])


def test_shared_work_ends_with_the_first_failure_in_order(threads: Use) -> None:
    threads(3)
    called: list[int] = []

    def work(task: int) -> None:
        called.append(task)
        time.sleep(0.01 if task == 4 else 0)
        if task in (4, 5):
            raise FileNotFoundError(str(task))

    with pytest.raises(FileNotFoundError, match="4"):
        parallel.share(work, 100, 100)
    assert set(range(5)) <= set(called)
    assert len(called) == len(set(called)) < 100
    with pytest.raises(ZeroDivisionError):
        parallel.share(lambda task: print(1 // 0), 9, 9)
