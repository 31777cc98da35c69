"""Is everything there, and is it what was written?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcd.cache import commits
from pcd.cache.column import Column, chunk_path
from pcd.cache.shards import ShardReader
from pcd.cache.store import Cache
from pcd.errors import CacheError, CorruptError
from pcd.fingerprint import digest, file_digest


@dataclass(frozen=True)
class Fault:
    """Something wrong: where, in which column and rows, and whether it is absent or damaged."""

    table: str
    column: str
    shard: int | None
    rows: str
    kind: str
    detail: str


def shard_count(cache: Cache) -> int:
    """How many shards a complete cache has: the length of a progress bar."""
    return sum(table.column(name).shards for table in cache.tables for name in table.column_names())


def verify_cache(cache: Cache, advance: Callable[[], None] = lambda: None) -> list[Fault]:
    """Check every commit record, file length, SHA-256, shard index and row checksum; `advance` is called per shard."""
    faults: list[Fault] = []
    for table in cache.tables:
        try:
            _ = table.keys
        except CorruptError as error:
            faults.append(Fault(table.name, "samples", None, "all", "damaged", str(error)))
        for name in table.column_names():
            column = table.column(name)
            faults += _verify_metadata(column)
            for shard in range(column.shards):
                fault = _verify_shard(column, shard)
                faults += [fault] if fault else []
                advance()
    if not cache.manifest.columns:
        faults.append(Fault("-", "-", None, "all", "absent", "the cache has no columns yet"))
    return faults


def _verify_metadata(column: Column) -> list[Fault]:
    file = column.root / column.table / column.spec.name / "zarr.json"
    if file.is_file():
        return []
    return [Fault(column.table, column.spec.name, None, "all", "absent", f"{file} is gone")]


def _verify_shard(column: Column, shard: int) -> Fault | None:
    start, stop = shard * column.shard_rows, min((shard + 1) * column.shard_rows, column.rows)

    def fault(kind: str, detail: str) -> Fault:
        return Fault(column.table, column.spec.name, shard, f"{start}:{stop}", kind, detail)

    record = commits.path(column.root, column.table, column.spec.name, shard)
    if not record.is_file():
        return fault("absent", "not committed")
    try:
        commit = commits.read(column.root, column.table, column.spec.name, shard)
        if (commit.start, commit.stop) != (start, stop):
            return fault("damaged", f"the record speaks of rows {commit.start}:{commit.stop}")
        if commit.fingerprint != digest(column.entry.fingerprint):
            return fault("damaged", "the record carries another fingerprint than the manifest")
        detail = _verify_file(column, commit)
    except CorruptError as error:
        return fault("damaged", str(error))
    return fault("damaged", detail) if detail else None


def _verify_file(column: Column, commit: commits.Commit) -> str:
    path = chunk_path(column.root, column.table, column.spec, commit.shard)
    if not path.is_file():
        return f"{path} is gone"
    if path.stat().st_size != commit.bytes:
        return f"{path} has {path.stat().st_size} bytes, {commit.bytes} were written"
    if file_digest(path) != commit.sha256:
        return f"{path}: {_damaged_rows(column, path, commit)}"
    return ""


def _damaged_rows(column: Column, path: Path, commit: commits.Commit) -> str:
    """Which rows of a file with a wrong SHA-256 fail their own checksum."""
    reader = ShardReader(path, column.spec, column.shard_rows)
    out = np.empty((1, *column.spec.shape), dtype=column.spec.dtype)
    bad = []
    for row in range(commit.stop - commit.start):
        try:
            reader.read(row, out)
        except CorruptError:
            bad.append(commit.start + row)
    reader.close()
    if not bad:
        return "the bytes are not those that were committed, though each row agrees with its own checksum"
    shown = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
    return f"{len(bad)} of {commit.stop - commit.start} rows fail their checksum: {shown}"


def forget(cache: Cache, faults: list[Fault]) -> int:
    """Remove the commit records of damaged shards, so that the same `extract` writes exactly those anew; returns how many.

    Raises `CacheError` if something other than a shard is damaged: that cannot be extracted again in place.
    """
    whole = [fault for fault in faults if fault.shard is None]
    if whole:
        raise CacheError(f"{cache.root}: {whole[0].detail}; this cannot be mended in place, extract into a new folder.")
    damaged = [fault for fault in faults if fault.kind == "damaged" and fault.shard is not None]
    for fault in damaged:
        assert fault.shard is not None
        commits.path(cache.root, fault.table, fault.column, fault.shard).unlink()
    return len(damaged)
