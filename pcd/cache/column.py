"""One column of one table, for reading."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcd.cache import commits, compact
from pcd.cache.manifest import ColumnEntry
from pcd.cache.objects import RemoteShards, zarr_array
from pcd.cache.parallel import share
from pcd.cache.shards import ShardReader
from pcd.columns import ColumnSpec
from pcd.errors import CorruptError, IncompleteError
from pcd.remote import AnyPath, RemotePath

if TYPE_CHECKING:
    import dask.array

OPEN_SHARDS = 128
"""File descriptors a column keeps open at most. Shard indexes are all kept: 16 bytes a row."""
SMALL_ROW = 1 << 14
"""Neighbouring rows up to this many bytes are read together: for them the calls cost more than one copy."""
RUN_BYTES = 1 << 18
"""Most bytes read together: they are still in the processor's cache when they are copied out."""
ZSTD_COST = 8
"""Compressed rows take about this many times as long per byte."""
DECODE_COST = 2
"""The same of rows in compact form."""

_lock = threading.Lock()
"""Guards the open shards of all columns. Held for look-ups alone, never while a file is opened or read."""


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # the thread that held it does not exist in a forked child


def chunk_path(root: AnyPath, table: str, spec: ColumnSpec, shard: int) -> AnyPath:
    """The file of a shard: Zarr's default chunk key under the array's folder."""
    return root.joinpath(table, spec.name, "c", str(shard), *("0" for _ in spec.shape))


class Column:
    """Rows of a column by number. Only committed rows can be read; what is not committed is an error, never zeros.

    `entry` and `spec` describe what is read, `stored` the array on disk. They differ for a column in compact form, whose rows
    are decoded on the way (see `pcd.cache.compact`).

    Several threads may read one column at once; a column may also be pickled, which opens it anew, and one that is no object
    store's be used after a fork.
    """

    def __init__(
        self, root: AnyPath, table: str, entry: ColumnEntry, rows: int, shard_rows: int, *, verify: bool = True
    ) -> None:
        self.root = root
        self.table = table
        self.entry = compact.as_read(entry)
        self.spec = self.entry.spec
        self.stored = entry.spec
        self.rows = rows
        self.shard_rows = shard_rows
        self._verify = verify
        self._listed = entry
        self._decoder = compact.Decoder(entry.spec.shape) if compact.is_compact(entry) else None
        self._dtype, self._row_bytes = np.dtype(self.spec.dtype), self.spec.row_bytes
        self._committed = commits.committed(root, table, entry.spec.name)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._indexes: dict[int, npt.NDArray[np.uint64]] = {}
        self._remote = self._shards_of(root) if isinstance(root, RemotePath) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Column, verify=self._verify), (self.root, self.table, self._listed, self.rows, self.shard_rows)

    def _shards_of(self, root: RemotePath) -> RemoteShards:
        def path_of(shard: int) -> RemotePath:
            path = chunk_path(root, self.table, self.stored, shard)
            assert isinstance(path, RemotePath)
            return path

        return RemoteShards(path_of, self.stored, self.shard_rows, verify=self._verify)

    @property
    def shards(self) -> int:
        """Shards of a complete column."""
        return -(-self.rows // self.shard_rows)

    def refresh(self) -> None:
        """Look again which shards are committed, and open their files anew: they may have been written again."""
        self.close()
        self._committed = commits.committed(self.root, self.table, self.spec.name)

    def missing(self) -> list[tuple[int, int]]:
        """Row ranges that no commit record vouches for, neighbours joined."""
        ranges: list[tuple[int, int]] = []
        for shard in range(self.shards):
            if shard in self._committed:
                continue
            start, stop = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        return ranges

    @property
    def complete(self) -> bool:
        """Whether every row can be read."""
        return all(shard in self._committed for shard in range(self.shards))

    def require(self) -> None:
        """Raise `IncompleteError`, naming the missing rows and the remedy, unless every row can be read."""
        if gaps := self.missing():
            raise IncompleteError(self._incomplete(gaps))

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The rows asked for, in that order: `(len(rows), *shape)`.

        Rows go straight into `out` if given: a contiguous array of that shape and the column's dtype over any writable memory
        (`tensor.numpy()` of a pinned tensor, `np.frombuffer` of a buffer). A large batch is shared among a few threads.

        Raises `IndexError` for rows that do not exist, `IncompleteError` for rows that are not committed, both before anything
        is read; `CorruptError`, naming the first such row in the order asked, for bytes that fail their checksum; and
        `ValueError` for an `out` that does not fit.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        self._check(numbers)
        if out is None:
            out = np.empty((len(numbers), *self.spec.shape), dtype=self._dtype)
        target = self._bytes_of(out, len(numbers))
        if self._remote is not None:
            self._fetch(self._remote, numbers, target)
            return out
        runs = self._runs(numbers)
        size = target.nbytes * (ZSTD_COST if self.spec.compress else DECODE_COST if self._decoder else 1)
        share(partial(self._read_run, numbers, target, runs), len(runs) - 1, size)
        return out

    def _check(self, numbers: npt.NDArray[np.int64]) -> None:
        outside = numbers[(numbers < 0) | (numbers >= self.rows)]
        if len(outside):
            raise IndexError(f"column {self.spec.name} of table {self.table} has rows 0 to {self.rows - 1}, not {outside[0]}")
        if not self._committed.issuperset((numbers // self.shard_rows).tolist()):
            raise IncompleteError(self._incomplete(self.missing()))

    def _bytes_of(self, out: npt.NDArray[Any], rows: int) -> npt.NDArray[np.uint8]:
        """`out` as the bytes of each row, `(rows, bytes)`, in the same memory."""
        shape = (rows, *self.spec.shape)
        fits = out.shape == shape and out.dtype == self._dtype
        if not fits or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"column {self.spec.name}: got an array {out.shape} {out.dtype} to read into, "
                f"expected {shape} {self.spec.dtype}, contiguous and writable"
            )
        return out.view(np.uint8).reshape(rows, self._row_bytes)

    def _runs(self, numbers: npt.NDArray[np.int64]) -> Sequence[int]:
        """Where the runs of neighbours that are read together begin, and the end."""
        if self.spec.compress or self._decoder or self._row_bytes > SMALL_ROW:
            return range(len(numbers) + 1)
        most = RUN_BYTES // self._row_bytes
        begins = (np.diff(numbers) != 1) | (numbers[1:] % self.shard_rows % most == 0)
        return [0, *(np.flatnonzero(begins) + 1).tolist(), len(numbers)]

    def as_dask(self) -> dask.array.Array:
        """The whole column as a lazy dask array `(rows, *shape)`, a shard per block: for statistics over more than memory.

        Raises `IncompleteError` unless every row is committed: a plain Zarr reader would show zeros.
        """
        import dask.array

        self.require()
        blocks = (self.shard_rows, *self.stored.shape)
        where = self.root / self.table / self.spec.name
        stored = zarr_array(where) if isinstance(where, RemotePath) else str(where)
        array: dask.array.Array = dask.array.from_zarr(stored, chunks=blocks)  # type: ignore[no-untyped-call]
        if self._decoder is None:
            return array
        chunks = (array.chunks[0], *((size,) for size in self.spec.shape))
        tokens: dask.array.Array = dask.array.map_blocks(  # type: ignore[no-untyped-call]
            compact.decode, array, dtype=self._dtype, chunks=chunks
        )
        return tokens

    def _fetch(self, shards: RemoteShards, numbers: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """All rows from an object store."""

        def put(place: int, stored: npt.NDArray[np.uint8]) -> None:
            if self._decoder is None:
                out[place] = stored
            else:
                self._decoder.buffer[:] = stored
                self._decoder.decode(out[place].view(np.float16).reshape(self.spec.shape))

        if (bad := shards.read(numbers, put)) is not None:
            raise self._corrupt(int(numbers[bad[0]]), bad[1]) from None

    def _read_run(self, numbers: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], runs: Sequence[int], run: int) -> None:
        begin, end = runs[run], runs[run + 1]
        if end - begin > 1 and self._read_together(int(numbers[begin]), out[begin:end]):
            return
        for position in range(begin, end):
            self._read_row(int(numbers[position]), out[position])

    def _read_together(self, first: int, out: npt.NDArray[np.uint8]) -> bool:
        """Whether neighbours of one shard could be read with one call; if not, reading row by row finds out why."""
        try:
            return self._reader(first // self.shard_rows).read_run(first % self.shard_rows, out)
        except CorruptError:
            return False

    def _read_row(self, row: int, out: npt.NDArray[np.uint8]) -> None:
        try:
            reader, place = self._reader(row // self.shard_rows), row % self.shard_rows
            if self._decoder is None:
                reader.read(place, out)
            else:
                reader.read(place, self._decoder.buffer)
                self._decoder.decode(out.view(np.float16).reshape(self.spec.shape))
        except CorruptError as error:
            raise self._corrupt(row, error) from None

    def _corrupt(self, row: int, error: CorruptError) -> CorruptError:
        return CorruptError(
            f"column {self.spec.name}, table {self.table}, row {row}: {error} "
            f"`pcd cache verify {self.root} --repair` writes the bad shards anew."
        )

    def _reader(self, shard: int) -> ShardReader:
        with _lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        path = chunk_path(self.root, self.table, self.spec, shard)
        assert isinstance(path, Path)
        try:
            reader = ShardReader(path, self.stored, self.shard_rows, verify=self._verify, index=self._indexes.get(shard))
        except FileNotFoundError:
            raise CorruptError(f"{path}: the shard is committed but its file is gone.") from None
        with _lock:
            self._indexes[shard] = reader.index
            reader = self._open.setdefault(shard, reader)  # another thread may have been faster
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)  # closed once no thread reads from it
        return reader

    def _incomplete(self, gaps: list[tuple[int, int]]) -> str:
        shown = ", ".join(f"{start}:{stop}" for start, stop in gaps[:4]) + (" ..." if len(gaps) > 4 else "")
        missing = sum(stop - start for start, stop in gaps)
        return (
            f"column {self.spec.name} of table {self.table} in {self.root} lacks {missing} of {self.rows} rows ({shown}). "
            f"The same `pcd extract --cache {self.root}` completes it."
        )

    def close(self) -> None:
        """Close the open shard files, each when no thread reads from it any more, and forget their indexes."""
        with _lock:
            self._open.clear()
            self._indexes.clear()
        if self._remote is not None:
            self._remote.forget()
