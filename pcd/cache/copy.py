"""Copy a cache, or some of its columns and tables, shard by shard and verified.

The manifest is written first: the target is a cache from then on, incomplete until the last shard is there. A shard's bytes are
checked against its commit record on the way, made durable under a temporary name, and committed. The same call continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from pcd.cache import commits
from pcd.cache.column import Column, chunk_path
from pcd.cache.gc import ALWAYS
from pcd.cache.leftovers import leftovers
from pcd.cache.lock import writing
from pcd.cache.manifest import MANIFEST, Manifest
from pcd.cache.objects import each
from pcd.cache.provenance import PROVENANCE
from pcd.cache.shards import upload
from pcd.cache.store import Cache
from pcd.cache.texts import read_text, text_folder, text_folders
from pcd.errors import CacheError, CorruptError, SpaceError, UsageError, suggest
from pcd.files import make_folder, naming, partial_of, publish, sync, write_bytes
from pcd.fingerprint import differences
from pcd.overlap import ahead
from pcd.remote import AnyPath, RemotePath

A = TypeVar("A")
B = TypeVar("B")

SIDE_BY_SIDE = 4
"""Shards copied from or to an object store at once."""
PIECE = 1 << 22
"""Bytes read, digested and written at a time."""


@dataclass
class Copied:
    """What a copy did: shards and bytes written now, shards that were there already, and what could not be copied and why."""

    shards: int = 0
    bytes: int = 0
    present: int = 0
    absent: int = 0
    damaged: list[str] = field(default_factory=list)


def part_of(manifest: Manifest, columns: Sequence[str] | None, tables: Sequence[str] | None) -> Manifest:
    """The manifest of a copy of these columns and tables (None: all of them); columns that all others need are always there.

    Samples and splits stay as they are, so that a part is still the same cache to whoever asks. Raises `UsageError` for
    unknown names.
    """
    for names, known, word in ((columns, manifest.columns, "column"), (tables, manifest.tables, "table")):
        for name in names or ():
            if name not in known:
                raise UsageError(f"no {word} {name!r} to copy.{suggest(name, known)}")
    kept = {}
    for name, entry in manifest.columns.items():
        into = tuple(table for table in entry.tables if tables is None or table in tables)
        if into and (columns is None or name in columns or name.startswith(ALWAYS)):
            kept[name] = dataclasses.replace(entry, tables=into)
    return dataclasses.replace(manifest, columns=kept)


def copy_cache(
    source: Cache,
    target: AnyPath,
    *,
    columns: Sequence[str] | None = None,
    tables: Sequence[str] | None = None,
    start: Callable[[int, int], None] = lambda total, done: None,
    advance: Callable[[], None] = lambda: None,
) -> Copied:
    """Copy `source` to the folder `target`, which may hold an unfinished or partial copy of it.

    `start` is told how many shards there are and how many are there already; `advance` is called per shard. Damaged shards of
    the source are not copied but reported. Raises `CacheError` if the target holds anything else, `SpaceError` if it is full.
    """
    part = part_of(source.manifest, columns, tables)
    refuse_target(source, target)
    with writing(target):
        copied = _begin(source, target, part)
        _copy_shards(source, copied, part, result := Copied(), start, advance)
        copy_texts(source, target, result)
        if (source.root / PROVENANCE).is_file():
            write_bytes(target / PROVENANCE, (source.root / PROVENANCE).read_bytes())
        return result


def refuse_target(source: Cache, target: AnyPath) -> None:
    """Raise `UsageError` if one folder lies in the other, and `CacheError` if the target holds what is no cache."""
    resolved, other = source.root.resolve(), target.resolve()
    if resolved == other or resolved in other.parents or other in resolved.parents:
        raise UsageError(f"{target} is {source.root} or inside of it (or the other way round); choose another folder.")
    empty = dataclasses.replace(source.manifest, columns={})
    strangers = [] if (target / MANIFEST).exists() else leftovers(Cache(target, empty))
    if foreign := [file.path for file in strangers if not file.ours]:
        raise CacheError(f"{target} holds other files ({foreign[0]}) and no cache; choose an empty or a new folder.")


def _begin(source: Cache, target: AnyPath, part: Manifest) -> Cache:
    """The target as a cache with the manifest of what it will hold: what is asked for now and what it holds already."""
    keys = {table.name: table.keys for table in source.tables}
    if not (target / MANIFEST).exists():
        cache = Cache.create(target, dataclasses.replace(part, columns={}), keys)
    else:
        cache = Cache.open(target)
        lines = differences(cache.manifest.identity(), source.manifest.identity())
        for name, entry in cache.manifest.columns.items():
            known = part.columns.get(name) or source.manifest.columns.get(name)
            found, wanted = ({**e.as_json(), "tables": None} if e else {} for e in (entry, known))
            lines += differences(found, wanted, f"{name}.")
        if lines:
            shown = "\n".join(f"  {line}" for line in lines[:5])
            raise CacheError(f"{target} holds another cache than {source.root}:\n{shown}\nChoose another folder.")
    return with_columns(cache, part)


def with_columns(cache: Cache, part: Manifest) -> Cache:
    """The cache, holding these columns in these tables too."""
    union = {}
    for name, entry in part.columns.items():
        there = cache.manifest.columns[name].tables if name in cache.manifest.columns else ()
        into = tuple(table for table in part.tables if table in entry.tables or table in there)
        union[name] = dataclasses.replace(entry, tables=into)
    others = {name: entry for name, entry in cache.manifest.columns.items() if name not in union}
    grown = Cache(cache.root, dataclasses.replace(cache.manifest, columns=others, encoders=part.encoders))
    grown.add_columns(union)
    return grown


def _copy_shards(
    source: Cache,
    target: Cache,
    part: Manifest,
    result: Copied,
    start: Callable[[int, int], None],
    advance: Callable[[], None],
) -> None:
    wanted = [
        (source.table(table).column(name), part.columns[name].tables)
        for name in part.columns
        for table in part.columns[name].tables
    ]
    jobs: list[tuple[Column, commits.Commit]] = []

    def look(place: tuple[Column, int]) -> Copied | commits.Commit:
        """The record of a shard that is to be copied, or what else is to be said of it."""
        commit = _commit(source.root, *place, found := Copied())
        if commit is None:
            return found
        return Copied(present=1) if has_shard(target.root, place[0], commit) else commit

    places = [(column, shard) for column, _ in wanted for shard in range(column.shards)]
    for (column, _), found in zip(places, each(look, places, source.root, target.root), strict=True):
        if isinstance(found, commits.Commit):
            jobs.append((column, found))
        else:
            result.present, result.absent = result.present + found.present, result.absent + found.absent
            result.damaged += found.damaged
    refuse_small_disk(target.root, sum(commit.bytes for _, commit in jobs))
    start(len(jobs) + result.present, result.present)

    def copy(job: tuple[Column, commits.Commit]) -> str:
        try:
            copy_shard(*job, target.root)
        except CorruptError as error:
            return str(error)
        return ""

    for (_, commit), problem in zip(jobs, in_order(copy, jobs, source.root, target.root), strict=True):
        if problem:
            result.damaged.append(problem)
        else:
            result.shards += 1
            result.bytes += commit.bytes
        advance()


def in_order(function: Callable[[A], B], jobs: Sequence[A], *places: AnyPath) -> Iterator[B]:
    """`map(function, jobs)`; several at once where something lies in an object store, each with a shard in memory."""
    if not any(isinstance(place, RemotePath) for place in places):
        yield from map(function, jobs)
        return
    with closing(ahead(function, jobs, SIDE_BY_SIDE, SIDE_BY_SIDE)) as results:
        yield from results


def _commit(root: AnyPath, column: Column, shard: int, result: Copied) -> commits.Commit | None:
    """The record of a shard; one that is absent or damaged is counted."""
    try:
        return commits.read(root, column.table, column.spec.name, shard)
    except FileNotFoundError:
        result.absent += 1
    except CorruptError as error:
        result.damaged.append(str(error))
    return None


def has_shard(root: AnyPath, column: Column, commit: commits.Commit) -> bool:
    """Whether the cache in `root` holds this very shard, by its record and the length of its file."""
    path = chunk_path(root, column.table, column.spec, commit.shard)
    try:
        same = commits.read(root, column.table, column.spec.name, commit.shard) == commit
    except (FileNotFoundError, CorruptError):
        return False
    return same and path.is_file() and path.stat().st_size == commit.bytes


def copy_shard(column: Column, commit: commits.Commit, root: AnyPath) -> None:
    """Copy a shard of a column into the cache in `root`, verified, and commit it.

    Raises `CorruptError` if the source's bytes are not those that were committed; nothing is left of them then.
    """
    origin = chunk_path(column.root, column.table, column.spec, commit.shard)
    path = chunk_path(root, column.table, column.spec, commit.shard)
    if isinstance(path, RemotePath):
        _send_shard(origin, path, root, commit)
        return
    digest, partial = hashlib.sha256(), partial_of(path)
    try:
        with _reading(origin) as reading, naming(path):
            make_folder(path.parent)
            with partial.open("wb") as writing_to:
                while piece := reading.read(PIECE):
                    digest.update(piece)
                    writing_to.write(piece)
                writing_to.flush()
                os.fsync(writing_to.fileno())
        if digest.hexdigest() != commit.sha256:
            raise _other_bytes(origin)
        with naming(path):
            _forget(commits.path(root, commit.table, commit.column, commit.shard))  # of other bytes, if any
            publish(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    commits.write(root, commit)


def _send_shard(origin: AnyPath, path: RemotePath, root: AnyPath, commit: commits.Commit) -> None:
    """The same into an object store: the shard is held in memory meanwhile."""
    with _reading(origin) as reading:
        data = reading.read()
    if hashlib.sha256(data).hexdigest() != commit.sha256:
        raise _other_bytes(origin)
    _forget(commits.path(root, commit.table, commit.column, commit.shard))
    upload(path, data)
    commits.write(root, commit)


def _other_bytes(origin: AnyPath) -> CorruptError:
    return CorruptError(f"{origin}: the bytes are not those that were committed; `pcd cache verify --repair` mends them.")


def _reading(path: AnyPath) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise CorruptError(f"{path}: the shard is committed but its file is gone.") from None


def _forget(record: AnyPath) -> None:
    """Remove a commit record, durably: it must not come back and vouch for bytes that it does not speak of."""
    if record.is_file():
        record.unlink()
        sync(record.parent)


def copy_texts(source: Cache, target: AnyPath, result: Copied) -> None:
    """Copy text embeddings that are not there yet."""
    for folder in text_folders(source.root):
        try:
            encoder, phrases, embeddings = read_text(folder)
        except CorruptError as error:
            result.damaged.append(str(error))
            continue
        if not (text_folder(target, encoder, phrases) / "zarr.json").is_file():
            Cache(target, source.manifest).add_text(encoder, phrases, embeddings)


def refuse_small_disk(root: AnyPath, needed: int) -> None:
    """Raise `SpaceError` if so many bytes do not fit."""
    if isinstance(root, RemotePath):
        return  # nobody knows how large a store is
    free = shutil.disk_usage(root).free
    if needed > free:
        raise SpaceError(
            f"{root}: {needed / 1e9:.1f} GB are to be copied and {free / 1e9:.1f} GB are free. "
            "Free some space, choose another folder, or take a part: --columns, --tables."
        )
