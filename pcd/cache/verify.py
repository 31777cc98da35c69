"""Is everything there, and is it what was written?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from pcd.cache import commits
from pcd.cache.column import Column, chunk_path
from pcd.cache.fault import Fault
from pcd.cache.metadata import verify_metadata
from pcd.cache.shards import CRC_BYTES, ENTRY_BYTES, MISSING, RESIDUE, intact
from pcd.cache.store import Cache
from pcd.errors import CorruptError
from pcd.files import json_text
from pcd.fingerprint import digest
from pcd.overlap import ahead
from pcd.remote import AnyPath, RemotePath

__all__ = ["Fault", "damaged_shards", "shard_count", "verify_cache"]

THREADS = min(4, os.cpu_count() or 1)
"""Shards checked at once; each is held in memory as a whole, 50 to 100 MB."""


def shard_count(cache: Cache) -> int:
    """How many shards a complete cache has: the length of a progress bar."""
    return sum(table.column(name).shards for table in cache.tables for name in table.column_names())


def verify_cache(cache: Cache, advance: Callable[[], None] = lambda: None, *, fast: bool = False) -> list[Fault]:
    """Check the metadata, and each shard's commit record, length, SHA-256, index and the crc32c of every row.

    `fast` leaves out what needs the data to be read: SHA-256 and rows. `advance` is called per shard.
    """
    faults = verify_metadata(cache)
    columns = [
        (table.column(name), digest(table.manifest.columns[name].fingerprint))
        for table in cache.tables
        for name in table.column_names()
    ]
    jobs = [(column, fingerprint, shard) for column, fingerprint in columns for shard in range(column.shards)]
    with closing(ahead(lambda job: _verify_shard(*job, fast), jobs, THREADS, THREADS)) as results:
        for fault in results:
            faults += [fault] if fault else []
            advance()
    return faults


def damaged_shards(faults: list[Fault]) -> dict[tuple[str, str], set[int]]:
    """Shards to write anew, by table and column."""
    found: dict[tuple[str, str], set[int]] = {}
    for fault in faults:
        if fault.kind == "damaged" and fault.shard is not None:
            found.setdefault((fault.table, fault.column), set()).add(fault.shard)
    return found


def _verify_shard(column: Column, fingerprint: str, shard: int, fast: bool) -> Fault | None:
    start, stop = shard * column.shard_rows, min((shard + 1) * column.shard_rows, column.rows)
    record = commits.path(column.root, column.table, column.spec.name, shard)
    try:
        try:
            noted = record.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return Fault(column.table, column.spec.name, shard, f"{start}:{stop}", "absent", "not committed")
        commit = commits.parsed(record, noted, column.table, column.spec.name, shard)
        if noted != json_text({**asdict(commit), "digest": commit.digest}).encode():
            detail = f"{record} is spelled otherwise than it was written"
        elif (commit.start, commit.stop) != (start, stop):
            detail = f"the record speaks of rows {commit.start}:{commit.stop}"
        elif commit.fingerprint != fingerprint:
            detail = "the record carries another fingerprint than the manifest"
        else:
            detail = _verify_file(column, commit, fast)
    except CorruptError as error:
        detail = str(error)
    return Fault(column.table, column.spec.name, shard, f"{start}:{stop}", "damaged", detail) if detail else None


def _verify_file(column: Column, commit: commits.Commit, fast: bool) -> str:
    path = chunk_path(column.root, column.table, column.spec, commit.shard)
    if isinstance(path, RemotePath):
        return _verify_object(path, column, commit, fast)
    if not path.is_file():
        return f"{path} is gone"
    if (size := path.stat().st_size) != commit.bytes:
        return f"{path} has {size} bytes, {commit.bytes} were written"
    if fast:
        index = _index(_tail(path, column.shard_rows * ENTRY_BYTES + CRC_BYTES))
        return "" if index is not None else f"{path}: the shard index is damaged"
    return _verify_bytes(path, np.fromfile(path, dtype=np.uint8), column, commit)


def _verify_object(path: RemotePath, column: Column, commit: commits.Commit, fast: bool) -> str:
    """The same of an object, with as few requests as can be."""
    length = column.shard_rows * ENTRY_BYTES + CRC_BYTES
    try:
        data = path.read_tail(length) if fast else memoryview(path.read_bytes())
        size = path.stat().st_size if fast else len(data)
    except FileNotFoundError:
        return f"{path} is gone"
    if size != commit.bytes:
        return f"{path} has {size} bytes, {commit.bytes} were written"
    if fast:
        return "" if _index(bytes(data)) is not None else f"{path}: the shard index is damaged"
    return _verify_bytes(path, np.frombuffer(data, dtype=np.uint8), column, commit)


def _verify_bytes(path: AnyPath, data: npt.NDArray[np.uint8], column: Column, commit: commits.Commit) -> str:
    agrees = hashlib.sha256(data.data).hexdigest() == commit.sha256
    index = _index(data[-(column.shard_rows * ENTRY_BYTES + CRC_BYTES) :].tobytes())
    if index is None:
        return f"{path}: the shard index is damaged"
    bad = [commit.start + row for row in range(commit.stop - commit.start) if not _row_intact(data, *index[row].tolist())]
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
        return f"{path}: {len(bad)} of {commit.stop - commit.start} rows fail their checksum: {shown}"
    if not agrees:
        return f"{path}: the bytes are not those that were committed, though each row agrees with its own checksum"
    return ""


def _tail(path: Path, length: int) -> bytes:
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - length))
        return handle.read()


def _index(tail: bytes) -> npt.NDArray[np.uint64] | None:
    """Offset and length of every row `(rows, 2)`, or None if the index fails its checksum."""
    return np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(-1, 2) if intact(tail) else None


def _row_intact(data: npt.NDArray[np.uint8], offset: int, length: int) -> bool:
    if offset == MISSING or length < CRC_BYTES or offset + length > len(data):
        return False
    return int(google_crc32c.value(data[offset : offset + length])) == RESIDUE
