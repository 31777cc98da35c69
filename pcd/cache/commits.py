"""Commit records: the only proof that a shard exists.

A record is a small JSON file written after the shard's bytes are durable. Its digest covers column, table, row range,
fingerprint and content, so that a shard that was swapped or comes from elsewhere is caught.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pcd.errors import CorruptError
from pcd.files import read_json, sync, write_json
from pcd.fingerprint import digest

FOLDER = "commits"


@dataclass(frozen=True)
class Commit:
    """Shard `shard` of `column` in `table`: rows `start:stop` and what its file must be."""

    table: str
    column: str
    shard: int
    start: int
    stop: int
    bytes: int
    sha256: str
    fingerprint: str

    @property
    def digest(self) -> str:
        """Covers every field."""
        return digest(asdict(self))


def folder(root: Path, table: str, column: str) -> Path:
    """Where the commit records of a column lie."""
    return root / FOLDER / table / column


def path(root: Path, table: str, column: str, shard: int) -> Path:
    """The record of one shard."""
    return folder(root, table, column) / f"{shard:06d}.json"


def write(root: Path, commit: Commit) -> None:
    """Write durably."""
    write_json(path(root, commit.table, commit.column, commit.shard), {**asdict(commit), "digest": commit.digest})


def read(root: Path, table: str, column: str, shard: int) -> Commit:
    """Read and check one record. Raises `CorruptError` if it is damaged or speaks of another shard."""
    file = path(root, table, column, shard)
    try:
        value = read_json(file)
        claimed = value.pop("digest")
        commit = Commit(**value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file}: the commit record is damaged ({error}).") from None
    if commit.digest != claimed or (commit.table, commit.column, commit.shard) != (table, column, shard):
        raise CorruptError(f"{file}: the commit record does not agree with its own digest or place.")
    return commit


def committed(root: Path, table: str, column: str) -> set[int]:
    """Shards that have a record, from the file names alone."""
    where = folder(root, table, column)
    if not where.is_dir():
        return set()
    with os.scandir(where) as entries:
        return {int(entry.name[:-5]) for entry in entries if entry.name.endswith(".json") and entry.name[:-5].isdigit()}


def forget_strangers(root: Path, table: str, column: str, belongs: Callable[[Commit], bool]) -> None:
    """Remove, durably, the records of a column that are damaged or do not belong to it.

    An interrupted `gc` may leave records of a column dropped: they must not vouch for another one of the same name.
    """
    strangers = []
    for shard in sorted(committed(root, table, column)):
        try:
            known = belongs(read(root, table, column, shard))
        except CorruptError:
            known = False
        strangers += [] if known else [path(root, table, column, shard)]
    for file in strangers:
        file.unlink()
    if strangers:
        sync(folder(root, table, column))
