"""Writing a range of samples into the columns of a table, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pcd.cache import commits, compact, lease
from pcd.cache.column import Column, chunk_path
from pcd.cache.objects import each
from pcd.cache.shards import ShardWriter
from pcd.cache.table import Table
from pcd.fingerprint import digest
from pcd.remote import RemotePath


class ColumnWriter:
    """Rows of one column in order, from the start of a shard; each full shard is made durable and committed at once."""

    def __init__(self, column: Column, start: int, stop: int) -> None:
        """Rows `start:stop`; `start` is the first row of a shard. Shards that are committed already are passed over."""
        self._column = column
        self._row = start
        self._stop = stop
        self._writer: ShardWriter | None = None
        self._fingerprint = digest(column.entry.fingerprint)
        self._done = commits.committed(column.root, column.table, column.spec.name)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows `(n, *shape)` in the column's dtype, as they will be read.

        Raises `ValueError` for another shape or dtype, `CacheError` for values that the column's compact form cannot hold.
        """
        while len(rows):
            shard = self._row // self._column.shard_rows
            end = min((shard + 1) * self._column.shard_rows, self._stop)
            part, rows = rows[: end - self._row], rows[end - self._row :]
            if shard not in self._done:
                self._write(shard, part)
            self._row += len(part)
            if self._row == end and self._writer is not None:
                self._commit(shard, end)
        if self._writer is not None:
            self._writer.settle()

    def _write(self, shard: int, rows: npt.NDArray[Any]) -> None:
        column = self._column
        if self._writer is None:
            path = chunk_path(column.root, column.table, column.spec, shard)
            self._writer = ShardWriter(path, column.stored, column.shard_rows)
        self._writer.append(rows if column.stored == column.spec else self._coded(rows))

    def _coded(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of a column in compact form as they are stored."""
        column = self._column
        if rows.shape[1:] != column.spec.shape or rows.dtype != np.dtype(column.spec.dtype):
            raise ValueError(
                f"column {column.spec.name}: got rows of {rows.shape[1:]} {rows.dtype} to code, "
                f"expected {column.spec.shape} {column.spec.dtype}"
            )
        return compact.encode(rows, f"column {column.spec.name} of table {column.table}", self._row)

    def _commit(self, shard: int, stop: int) -> None:
        assert self._writer is not None
        column = self._column
        if isinstance(column.root, RemotePath):
            lease.confirm(column.root)  # else the bytes of whoever has it now would be replaced
        record = self._writer.finish()
        self._writer = None
        commits.write(
            column.root,
            commits.Commit(
                table=column.table,
                column=column.spec.name,
                shard=shard,
                start=shard * column.shard_rows,
                stop=stop,
                bytes=record.bytes,
                sha256=record.sha256,
                fingerprint=self._fingerprint,
            ),
        )

    def abandon(self) -> None:
        """Drop the shard in flight."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None


class RangeWriter:
    """A range of samples of several columns at once. A context manager: whatever is in flight on an error is dropped."""

    def __init__(self, table: Table, columns: Iterable[str], start: int, stop: int) -> None:
        """Samples `start:stop` of the named columns; `start` begins a shard in each of them."""
        self._root = table.root
        self._writers: dict[str, ColumnWriter] = {}
        for name in columns:
            column = table.column(name)
            per_sample = table.views if column.spec.axis == "view" else 1
            self._writers[name] = ColumnWriter(column, start * per_sample, stop * per_sample)

    def append(self, rows: dict[str, npt.NDArray[Any]]) -> None:
        """Append rows to the columns named; rows of columns that are not being written are ignored.

        Columns on an object store are written side by side: each shard and each record waits for an answer.
        """
        jobs = [(self._writers[name], values) for name, values in rows.items() if name in self._writers]
        each(lambda job: job[0].append(job[1]), jobs, self._root)

    def __enter__(self) -> RangeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.abandon()
