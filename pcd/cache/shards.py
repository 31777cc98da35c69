"""One shard file of a Zarr v3 array: written whole by one writer, read row by row.

A shard holds `rows` inner chunks of one row each, in order. Each chunk is the row's little-endian bytes (through zstd if the
column is compressed) followed by their crc32c; the file ends with the shard index (offset and length of every chunk, uint64)
and the index's own crc32c. That is the standard `sharding_indexed` codec with the index at the end, so any Zarr v3 reader
opens it; writing it here makes it durable, streams it, and digests it on the way.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from pcd.columns import ColumnSpec
from pcd.errors import CorruptError
from pcd.files import partial_of, publish

CRC_BYTES = 4
ENTRY_BYTES = 16
MISSING = np.uint64(2**64 - 1)
ZSTD_LEVEL = 3


RESIDUE = 0x48674BC7
"""crc32c of any bytes followed by their own little-endian crc32c: one call checks a chunk without cutting it."""


def crc32c(data: bytes) -> bytes:
    """crc32c of some bytes, little-endian, as Zarr's codec stores it."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def intact(data: bytes) -> bool:
    """Whether bytes that end in their crc32c are what was written."""
    return len(data) >= CRC_BYTES and google_crc32c.value(data) == RESIDUE


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard file is: its length and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


class ShardWriter:
    """Collects the rows of one shard in `<name>.partial`; `finish` makes them durable under the final name."""

    def __init__(self, path: Path, spec: ColumnSpec, rows: int) -> None:
        """`rows` is the shard's capacity; a last shard may be finished with fewer."""
        self.path = path
        self._spec = spec
        self._capacity = rows
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._index = np.full((rows, 2), MISSING, dtype="<u8")
        self._written = 0
        self._offset = 0
        self._hash = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = partial_of(path).open("wb")

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self._capacity - self._written

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows `(n, *shape)`. Raises `ValueError` for another shape or dtype, or when the shard is full."""
        if rows.shape[1:] != self._spec.shape or rows.dtype != np.dtype(self._spec.dtype) or len(rows) > self.room:
            raise ValueError(
                f"column {self._spec.name}: got {len(rows)} rows of {rows.shape[1:]} {rows.dtype}, "
                f"expected at most {self.room} of {self._spec.shape} {self._spec.dtype}"
            )
        for row in np.ascontiguousarray(rows, dtype=self._dtype):
            data = row.tobytes()
            self._put(zstd.compress(data, ZSTD_LEVEL) if self._spec.compress else data)

    def _put(self, chunk: bytes) -> None:
        chunk += crc32c(chunk)
        self._index[self._written] = (self._offset, len(chunk))
        self._write(chunk)
        self._written += 1

    def _write(self, data: bytes) -> None:
        self._handle.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def finish(self) -> ShardRecord:
        """Write the index, fsync, rename, fsync the folder."""
        index = self._index.tobytes()
        self._write(index + crc32c(index))
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        publish(partial_of(self.path), self.path)
        return ShardRecord(self._offset, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close and remove what was collected."""
        self._handle.close()
        partial_of(self.path).unlink(missing_ok=True)


class ShardReader:
    """Random rows of one shard file: the index is read and verified once, rows come by `preadv`."""

    def __init__(self, path: Path, spec: ColumnSpec, rows: int, *, verify: bool = True) -> None:
        """Raises `CorruptError` if the file is too short or its index fails its checksum."""
        self.path = path
        self._spec = spec
        self._verify = verify
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._index = self._read_index(rows)
        except BaseException:
            self.close()
            raise

    def _read_index(self, rows: int) -> npt.NDArray[np.uint64]:
        size = os.fstat(self._descriptor).st_size
        length = rows * ENTRY_BYTES + CRC_BYTES
        tail = os.pread(self._descriptor, length, size - length) if size >= length else b""
        if len(tail) != length or not intact(tail):
            raise CorruptError(f"{self.path}: the shard index is damaged ({size} bytes, index of {rows} rows expected).")
        return np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(rows, 2)

    def read(self, row: int, out: npt.NDArray[Any]) -> None:
        """Read row `row` of the shard into `out` (contiguous, of the column's shape and dtype).

        Raises `CorruptError` for a row that is absent, cut short or fails its checksum.
        """
        offset, length = (int(value) for value in self._index[row])
        if offset == MISSING:
            raise CorruptError(f"{self.path}: row {row} of the shard is absent although the shard is committed.")
        target = out.view(np.uint8).reshape(-1).data
        if not self._verify and not self._spec.compress:
            if os.preadv(self._descriptor, [target], offset) != target.nbytes:
                self._damaged(row)
            return
        chunk = os.pread(self._descriptor, length, offset)
        if len(chunk) != length or not intact(chunk):
            self._damaged(row)
        body: bytes | memoryview = memoryview(chunk)[:-CRC_BYTES]
        if self._spec.compress:
            body = zstd.decompress(body)
        if len(body) != target.nbytes:
            self._damaged(row)
        target[:] = body

    def _damaged(self, row: int) -> None:
        raise CorruptError(f"{self.path}: row {row} of the shard is damaged (cut short, or its crc32c does not agree).")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
