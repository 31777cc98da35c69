"""One column of one table, for reading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcd.cache import commits
from pcd.cache.manifest import ColumnEntry
from pcd.cache.shards import ShardReader
from pcd.columns import ColumnSpec
from pcd.errors import CorruptError, IncompleteError

if TYPE_CHECKING:
    import dask.array

OPEN_SHARDS = 128
"""File descriptors a column keeps open at most; indexes of 128 shards of 64 rows are 130 kB."""


def chunk_path(root: Path, table: str, spec: ColumnSpec, shard: int) -> Path:
    """The file of a shard: Zarr's default chunk key under the array's folder."""
    return root.joinpath(table, spec.name, "c", str(shard), *("0" for _ in spec.shape))


class Column:
    """Rows of a column by number. Only committed rows can be read; what is not committed is an error, never zeros."""

    def __init__(self, root: Path, table: str, entry: ColumnEntry, rows: int, shard_rows: int, *, verify: bool = True) -> None:
        self.root = root
        self.table = table
        self.entry = entry
        self.spec = entry.spec
        self.rows = rows
        self.shard_rows = shard_rows
        self._verify = verify
        self._committed = commits.committed(root, table, entry.spec.name)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def shards(self) -> int:
        """Shards of a complete column."""
        return -(-self.rows // self.shard_rows)

    def refresh(self) -> None:
        """Look again which shards are committed."""
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
        """The rows asked for, in that order: `(len(rows), *shape)`, into `out` if given (contiguous, right dtype).

        Raises `IncompleteError` for rows that are not committed, `IndexError` for rows that do not exist and `CorruptError`
        for bytes that fail their checksum.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if out is None:
            out = np.empty((len(numbers), *self.spec.shape), dtype=self.spec.dtype)
        for shard in np.unique(numbers // self.shard_rows):
            reader = self._reader(int(shard))
            for position in np.flatnonzero(numbers // self.shard_rows == shard):
                self._read_row(reader, int(numbers[position]), out[position : position + 1])
        return out

    def as_dask(self) -> dask.array.Array:
        """The whole column as a lazy dask array `(rows, *shape)`, a shard per block: for statistics over more than memory.

        Raises `IncompleteError` unless every row is committed: a plain Zarr reader would show zeros.
        """
        import dask.array

        self.require()
        blocks = (self.shard_rows, *self.spec.shape)
        array: dask.array.Array = dask.array.from_zarr(  # type: ignore[no-untyped-call]
            str(self.root / self.table / self.spec.name), chunks=blocks
        )
        return array

    def _read_row(self, reader: ShardReader, row: int, out: npt.NDArray[Any]) -> None:
        if not 0 <= row < self.rows:
            raise IndexError(f"column {self.spec.name} of table {self.table} has rows 0 to {self.rows - 1}, not {row}")
        try:
            reader.read(row % self.shard_rows, out)
        except CorruptError as error:
            raise CorruptError(
                f"column {self.spec.name}, table {self.table}, row {row}: {error} "
                f"`pcd cache verify {self.root}` lists all damage; delete the shard's commit record and extract again."
            ) from None

    def _reader(self, shard: int) -> ShardReader:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard not in self._committed:
            raise IncompleteError(self._incomplete(self.missing()))
        path = chunk_path(self.root, self.table, self.spec, shard)
        if not path.is_file():
            raise CorruptError(f"{path}: the shard is committed but its file is gone.")
        reader = ShardReader(path, self.spec, self.shard_rows, verify=self._verify)
        self._open[shard] = reader
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return reader

    def _incomplete(self, gaps: list[tuple[int, int]]) -> str:
        shown = ", ".join(f"{start}:{stop}" for start, stop in gaps[:4]) + (" ..." if len(gaps) > 4 else "")
        missing = sum(stop - start for start, stop in gaps)
        return (
            f"column {self.spec.name} of table {self.table} in {self.root} lacks {missing} of {self.rows} rows ({shown}). "
            f"The same `pcd extract --cache {self.root}` completes it."
        )

    def close(self) -> None:
        """Close the open shard files."""
        while self._open:
            self._open.popitem()[1].close()
