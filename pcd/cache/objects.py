"""Reading shards that are objects of a store: in ranges, of which several are under way at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from pcd.cache.shards import CRC_BYTES, ENTRY_BYTES, MISSING, RESIDUE, intact, unzip
from pcd.columns import ColumnSpec
from pcd.errors import CorruptError
from pcd.remote import AnyPath, RemotePath

IN_FLIGHT = 16
"""Requests of this process that are under way at once: a store answers each after some 10 to 100 ms, whatever it asks."""
GAP = 1 << 18
"""Rows this near to each other come with one request: what lies between costs less than another one."""
PIECE = 1 << 23
"""Most bytes asked for at once, unless one row has more: of a long run of rows several pieces come side by side."""

A = TypeVar("A")
B = TypeVar("B")
Bytes = npt.NDArray[np.uint8]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pcd-fetch")


def at_once(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`[function(item) for item in items]`, several at a time. Raises the error of the first item that fails.

    For what waits for a store. `function` must not call this itself.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    waiting = [_pool().submit(function, item) for item in items]
    try:
        return [each.result() for each in waiting]
    finally:
        for each in waiting:
            if not each.cancel():
                each.exception()  # nothing goes on when this returns


def each(function: Callable[[A], B], items: Sequence[A], *places: AnyPath) -> list[B]:
    """`[function(item) for item in items]`; several at a time if one of the places is in an object store."""
    if any(isinstance(place, RemotePath) for place in places):
        return at_once(function, items)
    return [function(item) for item in items]


@dataclass
class _Request:
    """Rows of one shard that one request brings: bytes `start:stop`, and of each row its place in the batch and its bytes."""

    shard: int
    start: int
    stop: int
    rows: list[tuple[int, int, int]] = field(default_factory=list)


class RemoteShards:
    """Rows of a column whose shards are objects. The index of a shard is read once. Several threads may use it at once."""

    def __init__(self, path_of: Callable[[int], RemotePath], spec: ColumnSpec, shard_rows: int, *, verify: bool) -> None:
        """`path_of(shard)` is its object, `spec` what is stored; `verify` checks the crc32c of uncompressed rows."""
        self._path_of = path_of
        self._spec = spec
        self._shard_rows = shard_rows
        self._verify = verify
        self._indexes: dict[int, npt.NDArray[np.uint64]] = {}

    def forget(self) -> None:
        """Read the indexes again: shards may have been written anew."""
        self._indexes = {}

    def read(self, numbers: npt.NDArray[np.int64], put: Callable[[int, Bytes], None]) -> tuple[int, CorruptError] | None:
        """Hand the stored bytes of each row, without checksum and decompressed, to `put(place in numbers, bytes)`.

        `put` is called in several threads. Returns the first place whose row cannot be read, and why. Raises `StoreError`.
        """
        bad: dict[int, CorruptError] = {}
        requests = self._requests(numbers, bad)
        for found in at_once(lambda request: self._answer(request, put), requests):
            bad.update(found)
        return min(bad.items(), default=None, key=lambda item: item[0])

    def _requests(self, numbers: npt.NDArray[np.int64], bad: dict[int, CorruptError]) -> list[_Request]:
        """What to ask for, in the order of the shards."""
        shards = numbers // self._shard_rows
        indexes = self._known(sorted(set(shards.tolist())))
        requests: list[_Request] = []
        for shard, index in indexes.items():
            places = np.flatnonzero(shards == shard)
            if isinstance(index, CorruptError):
                bad[int(places[0])] = index
                continue
            entries = index[numbers[places] % self._shard_rows]
            order = np.argsort(entries[:, 0], kind="stable")
            requests += self._joined(shard, places[order].tolist(), entries[order].tolist(), bad)
        return requests

    def _joined(
        self, shard: int, places: list[int], entries: list[list[int]], bad: dict[int, CorruptError]
    ) -> Iterator[_Request]:
        """Rows of one shard in the order of their bytes, neighbours together."""
        request: _Request | None = None
        for place, (offset, length) in zip(places, entries, strict=True):
            if offset == MISSING or length < CRC_BYTES:
                bad[place] = CorruptError(f"{self._path_of(shard)}: the row is absent although the shard is committed.")
                continue
            end = offset + length
            if request is None or offset - request.stop > GAP or max(end, request.stop) - request.start > PIECE:
                if request is not None:
                    yield request
                request = _Request(shard, offset, end)
            request.stop = max(request.stop, end)
            request.rows.append((place, offset - request.start, length))
        if request is not None:
            yield request

    def _known(self, shards: list[int]) -> dict[int, npt.NDArray[np.uint64] | CorruptError]:
        """The indexes of shards, those that are new all at once."""
        known: dict[int, npt.NDArray[np.uint64] | CorruptError] = {n: self._indexes[n] for n in shards if n in self._indexes}
        new = [shard for shard in shards if shard not in known]
        for shard, index in zip(new, at_once(self._read_index, new), strict=True):
            known[shard] = index
            if not isinstance(index, CorruptError):
                self._indexes[shard] = index
        return {shard: known[shard] for shard in shards}

    def _read_index(self, shard: int) -> npt.NDArray[np.uint64] | CorruptError:
        path, length = self._path_of(shard), self._shard_rows * ENTRY_BYTES + CRC_BYTES
        try:
            tail = bytes(path.read_tail(length))
        except FileNotFoundError:
            return CorruptError(f"{path}: the shard is committed but its object is gone.")
        if len(tail) != length or not intact(tail):
            return CorruptError(f"{path}: the shard index is damaged (index of {self._shard_rows} rows expected).")
        return np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)

    def _answer(self, request: _Request, put: Callable[[int, Bytes], None]) -> dict[int, CorruptError]:
        """The rows of a request, each checked and handed on; those that are damaged."""
        path = self._path_of(request.shard)
        try:
            data = np.frombuffer(path.read_range(request.start, request.stop - request.start), dtype=np.uint8)
        except FileNotFoundError:
            gone = CorruptError(f"{path}: the shard is committed but its object is gone.")
            return {place: gone for place, *_ in request.rows}
        bad = {}
        for place, offset, length in request.rows:
            body = self._body(data[offset : offset + length], length)
            if body is None:
                bad[place] = CorruptError(f"{path}: the row is damaged (cut short, or its crc32c does not agree).")
            else:
                put(place, body)
        return bad

    def _body(self, chunk: Bytes, length: int) -> Bytes | None:
        if len(chunk) != length or ((self._verify or self._spec.compress) and google_crc32c.value(chunk) != RESIDUE):
            return None
        body = unzip(chunk) if self._spec.compress else chunk[:-CRC_BYTES]
        return body if len(body) == self._spec.row_bytes else None


def zarr_array(path: RemotePath) -> Any:
    """The array at an address, as zarr-python opens it."""
    import zarr
    from zarr.storage import ObjectStore

    return zarr.open_array(ObjectStore(path.bucket.store, read_only=True), path=path.key, mode="r")
