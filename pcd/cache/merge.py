"""Several caches of the same samples become one: parts of an extraction, other columns, other tables.

What must agree is compared first, from manifests and commit records alone; only then is anything written. Shards are copied as
`pcd.cache.copy` does it, verified on the way, and the same call continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pcd.cache import commits
from pcd.cache.column import Column, chunk_path
from pcd.cache.copy import Copied, copy_shard, copy_texts, has_shard, refuse_small_disk, refuse_target, with_columns
from pcd.cache.lock import writing
from pcd.cache.manifest import MANIFEST, ColumnEntry, Manifest
from pcd.cache.provenance import PROVENANCE
from pcd.cache.store import Cache
from pcd.errors import CacheError, CorruptError, FingerprintError
from pcd.files import write_bytes
from pcd.fingerprint import differences
from pcd.remote import AnyPath

SHOWN = 5
"""Conflicts that are named."""

Place = tuple[str, str, int]
"""Table, column, shard."""
Origins = dict[Place, list[tuple[Column, commits.Commit]]]
"""Who has a shard; all of them have the same."""


def merge_caches(
    sources: Sequence[Cache],
    target: AnyPath,
    *,
    start: Callable[[int, int], None] = lambda total, done: None,
    advance: Callable[[], None] = lambda: None,
) -> Copied:
    """Make the folder `target`, which may hold a cache of the same samples, hold all that the `sources` hold.

    `start` is told how many shards they have together and how many are in the target already; `advance` is called per shard. A
    damaged shard is taken from another source that has it, or reported. Raises `FingerprintError` for caches of other samples,
    views or columns, `CacheError` for shards that two of them hold with different content, `SpaceError` if the disk is full.
    """
    for source in sources:
        refuse_target(source, target)
    with writing(target):
        there = [Cache.open(target)] if (target / MANIFEST).exists() else []
        caches, result = [*there, *sources], Copied()
        whole = _united(caches)
        origins = _origins(caches, result)
        result.absent = _shards(whole, sources[0]) - len(origins) - len(result.damaged)
        merged = _begin(sources[0], target, whole, fresh=not there)
        _copy(origins, merged, result, start, advance)
        for source in sources:
            copy_texts(source, target, result)
        _join_provenance(sources, target)
        return result


def _united(caches: Sequence[Cache]) -> Manifest:
    """The manifest of all of them together. Raises `FingerprintError` naming two that do not fit, and the fields."""
    first = caches[0]
    columns: dict[str, ColumnEntry] = {}
    encoders: dict[str, dict[str, Any]] = {}
    origin: dict[str, Cache] = {}
    for cache in caches:
        _refuse(first, cache, differences(first.manifest.identity(), cache.manifest.identity()))
        for name, entry in cache.manifest.columns.items():
            known = columns.setdefault(name, entry)
            found, wanted = ({**each.as_json(), "tables": None} for each in (known, entry))
            _refuse(origin.setdefault(name, cache), cache, differences(found, wanted, f"{name}."))
            into = tuple(table for table in first.manifest.tables if table in (*known.tables, *entry.tables))
            columns[name] = dataclasses.replace(entry, tables=into)
        for kind, made in cache.manifest.encoders.items():
            before = encoders.setdefault(kind, dict(made))
            if before.get("asked") != made.get("asked"):  # the next extraction looks what is there
                before.pop("asked", None)
    return dataclasses.replace(first.manifest, columns=columns, encoders=encoders)


def _refuse(first: Cache, second: Cache, lines: list[str]) -> None:
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[:SHOWN])
        raise FingerprintError(
            f"{first.root} and {second.root} were made in different ways (found in the first, wanted by the second):\n{shown}\n"
            "Only caches of the same samples, views and columns become one."
        )


def _origins(caches: Sequence[Cache], result: Copied) -> Origins:
    """All shards by place, from the commit records. Raises `CacheError` for places where two caches differ, by name."""
    found: Origins = {}
    conflicts: list[str] = []
    unreadable: dict[Place, str] = {}
    for cache in caches:
        for table in cache.tables:
            for column in map(table.column, table.column_names()):
                for shard in sorted(commits.committed(cache.root, table.name, column.spec.name)):
                    try:
                        commit = commits.read(cache.root, table.name, column.spec.name, shard)
                    except CorruptError as error:
                        unreadable[table.name, column.spec.name, shard] = str(error)
                        continue
                    others = found.setdefault((table.name, column.spec.name, shard), [])
                    if others and others[0][1] != commit:
                        conflicts.append(f"{table.name}/{column.spec.name}, shard {shard}: {others[0][0].root}, {cache.root}")
                    others.append((column, commit))
    result.damaged += [detail for place, detail in unreadable.items() if place not in found]
    if conflicts:
        shown = "\n".join(f"  {line}" for line in conflicts[:SHOWN])
        raise CacheError(
            f"{len(conflicts)} shards have different content in two caches:\n{shown}\nWhich one is right? Drop the other: "
            "leave its cache out, or remove its column with `pcd cache gc --column`."
        )
    return found


def _shards(whole: Manifest, cache: Cache) -> int:
    """Shards of a complete cache."""
    every = Cache(cache.root, whole)
    return sum(table.column(name).shards for table in every.tables for name in table.column_names())


def _begin(source: Cache, target: AnyPath, whole: Manifest, *, fresh: bool) -> Cache:
    bare = dataclasses.replace(whole, columns={})
    cache = Cache.create(target, bare, {table.name: table.keys for table in source.tables}) if fresh else Cache.open(target)
    return with_columns(cache, whole)


def _copy(
    origins: Origins, target: Cache, result: Copied, start: Callable[[int, int], None], advance: Callable[[], None]
) -> None:
    root = target.root
    jobs = [having for having in origins.values() if not has_shard(root, *having[0])]
    result.present = len(origins) - len(jobs)
    refuse_small_disk(root, sum(having[0][1].bytes for having in jobs))
    start(len(origins), result.present)
    for having in jobs:
        _copy_one(having, root, result)
        advance()


def _copy_one(having: list[tuple[Column, commits.Commit]], root: AnyPath, result: Copied) -> None:
    """A shard from the first source in which it is whole."""
    damaged = []
    for column, commit in having:
        if column.root == root:
            path = chunk_path(root, column.table, column.spec, commit.shard)
            damaged.append(f"{path}: the shard is committed but its file is gone or cut short.")
            continue
        try:
            copy_shard(column, commit, root)
        except CorruptError as error:
            damaged.append(str(error))
            continue
        result.shards += 1
        result.bytes += commit.bytes
        return
    result.damaged += damaged


def _join_provenance(sources: Sequence[Cache], target: AnyPath) -> None:
    """What was noted of any of them, each line once."""
    files = [target / PROVENANCE, *(source.root / PROVENANCE for source in sources)]
    lines = [line for file in files if file.is_file() for line in file.read_bytes().splitlines()]
    if lines:
        write_bytes(target / PROVENANCE, b"".join(line + b"\n" for line in dict.fromkeys(lines)))
