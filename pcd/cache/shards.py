"""One shard file of a Zarr v3 array: written whole by one writer, read row by row.

A shard holds `rows` inner chunks of one row each, in order. Each chunk is the row's little-endian bytes (through zstd if the
column is compressed) followed by their crc32c; the file ends with the shard index (offset and length of every chunk, uint64)
and the index's own crc32c. That is the standard `sharding_indexed` codec with the index at the end, so any Zarr v3 reader
opens it; writing it here makes it durable, streams it, and digests it on the way.
"""

from __future__ import annotations

import hashlib
import io
import os
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from pcd.columns import ColumnSpec
from pcd.errors import CacheError, CorruptError
from pcd.files import make_folder, naming, partial_of, publish
from pcd.remote import AnyPath, RemotePath

CRC_BYTES = 4
ENTRY_BYTES = 16
MISSING = 2**64 - 1
ZSTD_LEVEL = 3
LARGE = 1 << 18
"""Bytes from which on it pays to hash in another thread while they are written."""


RESIDUE = 0x48674BC7
"""crc32c of any bytes followed by their own little-endian crc32c: one call checks a chunk without cutting it."""


def crc32c(data: bytes | npt.NDArray[np.uint8]) -> bytes:
    """crc32c of some bytes, little-endian, as Zarr's codec stores it."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def intact(data: bytes) -> bool:
    """Whether bytes that end in their crc32c are what was written."""
    return len(data) >= CRC_BYTES and google_crc32c.value(data) == RESIDUE


def unzip(chunk: Any) -> npt.NDArray[np.uint8]:
    """The row in the chunk of a compressed column, whose crc32c has been checked."""
    return np.frombuffer(zstd.decompress(memoryview(chunk)[:-CRC_BYTES]), dtype=np.uint8)


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard file is: its length and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


@cache
def _hasher() -> ThreadPoolExecutor:
    """One thread that hashes what is written meanwhile, piece by piece in the order given."""
    return ThreadPoolExecutor(1, thread_name_prefix="pcd-hash")


os.register_at_fork(after_in_child=_hasher.cache_clear)  # a forked child has no such thread and starts its own


class ShardWriter:
    """Collects the rows of one shard in `<name>.partial`; `finish` makes them durable under the final name.

    Rows for an object store are collected in memory, since an object appears whole.
    """

    def __init__(self, path: AnyPath, spec: ColumnSpec, rows: int) -> None:
        """`rows` is the shard's capacity; a last shard may be finished with fewer.

        Here, in `append` and in `finish` a disk that is full or fails raises `SpaceError` or `WriteError`, naming the file.
        """
        self.path = path
        self._spec = spec
        self._capacity = rows
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._index = np.full((rows, 2), MISSING, dtype="<u8")
        self._written = 0
        self._offset = 0
        self._hash = hashlib.sha256()
        self._hashing: deque[Future[None]] = deque()
        with naming(path):
            make_folder(path.parent)
            self._handle: BinaryIO = io.BytesIO() if isinstance(path, RemotePath) else partial_of(path).open("wb")

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self._capacity - self._written

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows `(n, *shape)`, which must not change until `settle` or `finish`.

        Raises `ValueError` for another shape or dtype, or when the shard is full.
        """
        if rows.shape[1:] != self._spec.shape or rows.dtype != np.dtype(self._spec.dtype) or len(rows) > self.room:
            raise ValueError(
                f"column {self._spec.name}: got {len(rows)} rows of {rows.shape[1:]} {rows.dtype}, "
                f"expected at most {self.room} of {self._spec.shape} {self._spec.dtype}"
            )
        data = np.ascontiguousarray(rows, dtype=self._dtype).view(np.uint8).reshape(len(rows), self._spec.row_bytes)
        with naming(self.path):
            for row in data:
                self._put(zstd.compress(row, ZSTD_LEVEL) if self._spec.compress else row)

    def _put(self, body: bytes | npt.NDArray[np.uint8]) -> None:
        self._index[self._written] = (self._offset, len(body) + CRC_BYTES)
        self._write(body)
        self._write(crc32c(body))
        self._written += 1

    def _write(self, data: Any) -> None:
        self._handle.write(data)
        self._offset += len(data)
        if len(data) >= LARGE or self._hashing:  # in order behind those before it
            self._hashing.append(_hasher().submit(self._hash.update, data))
        else:
            self._hash.update(data)

    def settle(self) -> None:
        """Wait until nobody looks at the appended rows any more."""
        while self._hashing:
            self._hashing.popleft().result()

    def finish(self) -> ShardRecord:
        """Write the index, fsync, rename, fsync the folder; of an object: upload it."""
        index = self._index.tobytes()
        with naming(self.path):
            self._write(index + crc32c(index))
            if isinstance(self.path, RemotePath):
                assert isinstance(self._handle, io.BytesIO)
                upload(self.path, self._handle.getbuffer())
            else:
                self._handle.flush()
                os.fsync(self._handle.fileno())
                self._handle.close()
                publish(partial_of(self.path), self.path)
        self.settle()
        return ShardRecord(self._offset, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close and remove what was collected. On a disk that fails it may stay behind, as after a crash."""
        if isinstance(self.path, RemotePath):
            return  # nothing but memory was used
        with suppress(OSError):  # a full disk does not take the last bytes of the buffer either
            self._handle.close()
        with suppress(OSError):
            partial_of(self.path).unlink(missing_ok=True)


def upload(path: RemotePath, data: bytes | memoryview) -> None:
    """Write a shard's object, whole or not at all. What a crash left there, which no record vouches for, is replaced.

    Raises `CacheError` if somebody else writes it at the same time.
    """
    try:
        path.put_new(data)
    except FileExistsError:
        try:
            path.put_over(data, path.version())
        except (FileExistsError, FileNotFoundError):
            raise CacheError(f"{path} is being written by somebody else as well; wait for it to end.") from None


class ShardReader:
    """Random rows of one shard file: the index is read and verified once, rows come by `preadv` into the caller's memory.

    May be used by several threads at once. The file is closed by `close`, or when nobody refers to the reader any more: it can
    be dropped while another thread still reads.
    """

    def __init__(
        self, path: Path, spec: ColumnSpec, rows: int, *, verify: bool = True, index: npt.NDArray[np.uint64] | None = None
    ) -> None:
        """`index` is the `index` of an earlier reader of the same file: it is then not read again.

        Raises `FileNotFoundError`, and `CorruptError` if the file is too short or its index fails its checksum.
        """
        self.path = path
        self._spec = spec
        self._verify = verify
        self._descriptor = os.open(path, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        self.index = self._read_index(rows) if index is None else index
        """Offset and length of each row's chunk, `(rows, 2)`."""

    def _read_index(self, rows: int) -> npt.NDArray[np.uint64]:
        size = os.fstat(self._descriptor).st_size
        length = rows * ENTRY_BYTES + CRC_BYTES
        tail = os.pread(self._descriptor, length, size - length) if size >= length else b""
        if len(tail) != length or not intact(tail):
            self.close()
            raise CorruptError(f"{self.path}: the shard index is damaged ({size} bytes, index of {rows} rows expected).")
        return np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(rows, 2)

    def read(self, row: int, out: npt.NDArray[np.uint8]) -> None:
        """Read the bytes of row `row` of the shard into `out` `(bytes of a row,)`.

        Raises `CorruptError` for a row that is absent, cut short or fails its checksum. Uncompressed rows are not checked if
        `verify` is off; compressed ones always are, which costs little beside zstd.
        """
        offset, length = self.index[row].tolist()
        fill = self._fill_compressed if self._spec.compress else self._fill
        if offset == MISSING:
            raise CorruptError(f"{self.path}: row {row} of the shard is absent although the shard is committed.")
        if not fill(out, offset, length):
            raise CorruptError(f"{self.path}: row {row} of the shard is damaged (cut short, or its crc32c does not agree).")

    def _fill(self, target: Any, offset: int, length: int) -> bool:
        if length != target.nbytes + CRC_BYTES:
            return False
        if not self._verify:
            return bool(os.preadv(self._descriptor, [target], offset) == target.nbytes)
        stored = bytearray(CRC_BYTES)
        if os.preadv(self._descriptor, [target, stored], offset) != length:
            return False
        return int(google_crc32c.value(target)) == int.from_bytes(stored, "little")

    def _fill_compressed(self, target: npt.NDArray[np.uint8], offset: int, length: int) -> bool:
        chunk = os.pread(self._descriptor, length, offset)
        if len(chunk) != length or not intact(chunk):
            return False
        body = unzip(chunk)
        if len(body) != target.nbytes:
            return False
        target[:] = body
        return True

    def read_run(self, first: int, out: npt.NDArray[np.uint8]) -> bool:
        """Read the bytes of neighbouring rows from row `first` on into `out` `(n, bytes of a row)` with one `preadv`.

        Returns False, with `out` untouched, if that cannot be done or a row is not intact: `read` then says which and why.
        """
        entries, length = self.index[first : first + len(out)], out.shape[1] + CRC_BYTES
        if (entries[:, 1] != length).any() or (np.diff(entries[:, 0]) != length).any():
            return False
        chunks = np.empty((len(out), length), dtype=np.uint8)
        if os.preadv(self._descriptor, [chunks.data], int(entries[0, 0])) != chunks.nbytes:
            return False
        if self._verify and any(google_crc32c.value(chunk) != RESIDUE for chunk in chunks):
            return False
        out[:] = chunks[:, :-CRC_BYTES]
        return True

    def close(self) -> None:
        """Close the file."""
        self._finalizer()
