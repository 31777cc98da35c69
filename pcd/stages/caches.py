"""All caches under a folder, at a glance: from manifests, commit records and file sizes alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pcd.cache import Cache, Table, commits, provenance
from pcd.cache.manifest import MANIFEST
from pcd.errors import CacheError, MissingFileError
from pcd.files import read_json
from pcd.remote import AnyPath, RemotePath
from pcd.stages.inspect import encoder_names


def list_caches(folder: AnyPath) -> list[dict[str, Any]]:
    """One entry per cache under `folder` (itself included; links are followed), sorted by path.

    `seconds` is the age of the last extraction or repair. A cache that cannot be opened has an `error` and is otherwise empty.
    Raises `MissingFileError` if there is no such folder.
    """
    if isinstance(folder, RemotePath):
        return _remote_entries(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; `pcd cache ls FOLDER` lists the caches under one.")
    sizes = {
        root: sum(Path(name, file).lstat().st_size for name, _, files in os.walk(root) for file in files)
        for root in _roots(folder)
    }
    return [_entry(root, size) for root, size in sorted(sizes.items())]


def _remote_entries(folder: RemotePath) -> list[dict[str, Any]]:
    """The same of an object store, whose objects are all listed once."""
    sizes: dict[RemotePath, int] = {}
    found = dict(folder.walk())
    for path in sorted(found, key=lambda path: (len(path.parents), path)):
        if path.name == MANIFEST and not any(parent in sizes for parent in path.parent.parents) and _is_ours(path):
            sizes[path.parent] = 0
    for path, stat in found.items():
        for root in path.parents:
            if root in sizes:
                sizes[root] += stat.st_size
    return [_entry(root, size) for root, size in sorted(sizes.items())]


def _roots(folder: Path) -> Iterator[Path]:
    """Folders with a manifest of ours; nothing inside of a cache is looked at, and no folder twice."""
    seen: set[Path] = set()
    for name, inner, files in os.walk(folder, followlinks=True):
        here = Path(name)
        if here.resolve() in seen:
            inner.clear()
            continue
        seen.add(here.resolve())
        if MANIFEST in files and _is_ours(here / MANIFEST):
            inner.clear()
            yield here


def _is_ours(manifest: AnyPath) -> bool:
    try:
        value = read_json(manifest)
    except (OSError, ValueError):
        return (manifest.parent / commits.FOLDER).is_dir()
    return isinstance(value, dict) and value.get("format") == "pcd-cache"


def _entry(root: AnyPath, size: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(root), "bytes": size}
    try:
        cache = Cache.open(root)
    except CacheError as error:
        return {**entry, "error": str(error)}
    shards = [_shards(table, name) for table in cache.tables for name in table.column_names()]
    done, whole = (sum(pair[n] for pair in shards) for n in (0, 1))
    return {
        **entry,
        "dataset": cache.manifest.dataset["name"],
        "encoders": encoder_names(cache),
        "tables": {table.name: table.samples for table in cache.tables},
        "columns": len(cache.manifest.columns),
        "complete": cache.complete,
        "shards": {"committed": done, "of": whole},
        "seconds": _age(root),
    }


def _shards(table: Table, name: str) -> tuple[int, int]:
    column = table.column(name)
    numbers = commits.committed(table.root, table.name, name)
    return len(numbers & set(range(column.shards))), column.shards


def _age(root: AnyPath) -> float:
    """Seconds since something was extracted or repaired, or since the manifest was written if nobody noted that."""
    times = [entry["time"] for entry in provenance.records(root) if "time" in entry]
    stamp = datetime.fromisoformat(times[-1]).timestamp() if times else (root / MANIFEST).stat().st_mtime
    return max(0.0, datetime.now(UTC).timestamp() - stamp)
