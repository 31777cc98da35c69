"""Commit records: the only proof that a shard exists.

A record is a small JSON file written after the shard's bytes are durable. Its digest covers column, table, row range,
fingerprint and content, so that a shard that was swapped or comes from elsewhere is caught.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pcd.cache import lease
from pcd.errors import CacheError, CorruptError
from pcd.files import json_text, sync, write_json
from pcd.fingerprint import digest
from pcd.remote import AnyPath, RemotePath

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


def folder(root: AnyPath, table: str, column: str) -> AnyPath:
    """Where the commit records of a column lie."""
    return root / FOLDER / table / column


def path(root: AnyPath, table: str, column: str, shard: int) -> AnyPath:
    """The record of one shard."""
    return folder(root, table, column) / f"{shard:06d}.json"


def write(root: AnyPath, commit: Commit) -> None:
    """Write durably.

    On an object store raises `CacheError` if this process no longer holds the cache, or there is another record already.
    """
    file, value = path(root, commit.table, commit.column, commit.shard), {**asdict(commit), "digest": commit.digest}
    if not isinstance(file, RemotePath):
        write_json(file, value)
        return
    assert isinstance(root, RemotePath)
    lease.confirm(root)
    data = json_text(value).encode()
    try:
        file.put_new(data)
    except FileExistsError:
        if file.read_bytes() != data:  # the same one is ours: an answer got lost, and the request was repeated
            raise CacheError(f"{file}: somebody else has committed this shard meanwhile, with other bytes.") from None


def read(root: AnyPath, table: str, column: str, shard: int) -> Commit:
    """Read and check one record. Raises `CorruptError` if it is damaged or speaks of another shard."""
    file = path(root, table, column, shard)
    return parsed(file, file.read_bytes(), table, column, shard)


def parsed(file: AnyPath, data: bytes, table: str, column: str, shard: int) -> Commit:
    """The record in `file`, which holds these bytes. Raises `CorruptError` if it is damaged or speaks of another shard."""
    try:
        value = json.loads(data.decode())
        claimed = value.pop("digest")
        commit = Commit(**value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{file}: the commit record is damaged ({error}).") from None
    if commit.digest != claimed or (commit.table, commit.column, commit.shard) != (table, column, shard):
        raise CorruptError(f"{file}: the commit record does not agree with its own digest or place.")
    return commit


def committed(root: AnyPath, table: str, column: str) -> set[int]:
    """Shards that have a record, from the file names alone."""
    where = folder(root, table, column)
    if isinstance(where, RemotePath):
        names = [path.name for path in where.iterdir()]
    elif where.is_dir():
        with os.scandir(where) as entries:
            names = [entry.name for entry in entries]
    else:
        names = []
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}


def forget_strangers(root: AnyPath, table: str, column: str, belongs: Callable[[Commit], bool]) -> None:
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
