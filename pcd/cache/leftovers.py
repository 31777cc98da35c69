"""Files in a cache that belong to nothing: what crashes, dropped columns and people left there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pcd.cache import commits
from pcd.cache.column import chunk_path
from pcd.cache.lock import is_lock
from pcd.cache.manifest import MANIFEST, SPARE, Manifest
from pcd.cache.metadata import zarr_files
from pcd.cache.provenance import PROVENANCE
from pcd.cache.store import Cache
from pcd.cache.table import SAMPLES
from pcd.cache.texts import CHUNK, METADATA, TEXT
from pcd.files import PARTIAL, read_json
from pcd.remote import AnyPath, RemotePath


@dataclass(frozen=True)
class Leftover:
    """A file that belongs to nothing. `path` is relative to the cache, `ours` says that pcd wrote it: `gc` removes no other."""

    path: str
    bytes: int
    ours: bool


def leftovers(cache: Cache) -> list[Leftover]:
    """All files of the folder that no column, table or text accounts for, by name alone; links are not followed.

    A file counts as ours if it is a partial one, a commit record, a file of a text, or of a Zarr array that carries a
    fingerprint or commit records. Somebody else's arrays and notes are not.
    """
    wanted, found = _wanted(cache), []
    arrays: dict[str, bool] = {}
    for path, size in _walk(cache.root):
        name = path.as_posix()
        if name not in wanted and not is_lock(path) and not _of_a_text(cache.root, path):
            found.append(Leftover(name, size, _ours(cache.root, path, arrays)))
    return sorted(_with_empty_groups(cache.root, found, wanted), key=lambda item: item.path)


def _walk(root: AnyPath) -> Iterator[tuple[PurePosixPath, int]]:
    if isinstance(root, RemotePath):
        yield from ((path.relative_to(root), found.st_size) for path, found in root.walk())
        return
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            yield PurePosixPath(file.relative_to(root)), file.lstat().st_size


def _wanted(cache: Cache) -> set[str]:
    """Every file that the manifest accounts for, whether it is there or not."""
    manifest: Manifest = cache.manifest
    files = {MANIFEST, SPARE, PROVENANCE, *zarr_files(manifest), *(f"{name}/{SAMPLES}" for name in manifest.tables)}
    here = Path()
    for table in cache.tables:
        for name in table.column_names():
            column = table.column(name)
            for shard in range(column.shards):
                files.add(chunk_path(here, table.name, column.spec, shard).as_posix())
                files.add(commits.path(here, table.name, name, shard).as_posix())
    return files


def _of_a_text(root: AnyPath, path: PurePosixPath) -> bool:
    """Whether a file is of a text that is stored: one with its metadata."""
    if len(path.parts) < 4 or path.parts[0] != TEXT:
        return False
    folder, rest = PurePosixPath(*path.parts[:3]), "/".join(path.parts[3:])
    return rest == METADATA or (rest == CHUNK and (root / folder / METADATA).is_file())


def _ours(root: AnyPath, path: PurePosixPath, arrays: dict[str, bool]) -> bool:
    if path.name.endswith(PARTIAL) or path.parts[0] == TEXT:
        return True
    if path.parts[0] == commits.FOLDER:
        return path.suffix == ".json"
    array = _array_of(path)
    if array not in arrays:
        arrays[array] = bool(array) and ((root / commits.FOLDER / array).is_dir() or _fingerprinted(root / array / METADATA))
    return arrays[array]


def _array_of(path: PurePosixPath) -> str:
    """The folder of the Zarr array that a file is metadata or a chunk of, or nothing."""
    if path.name == METADATA:
        return path.parent.as_posix()
    parts = list(path.parts)
    while parts and parts[-1].isdigit():
        parts.pop()
    return "/".join(parts[:-1]) if len(parts) < len(path.parts) and parts and parts[-1] == "c" else ""


def _fingerprinted(metadata: AnyPath) -> bool:
    try:
        return "fingerprint" in read_json(metadata)["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _with_empty_groups(root: AnyPath, found: list[Leftover], wanted: set[str]) -> list[Leftover]:
    """The same; a bare Zarr group is ours if all that is below it is ours too."""
    others = [*wanted, *(item.path for item in found if not item.ours and not item.path.endswith(METADATA))]
    kept = []
    for item in found:
        folder = item.path.removesuffix(METADATA)
        bare = item.path.endswith(f"/{METADATA}") and not item.ours and _bare_group(root / item.path)
        kept.append(Leftover(item.path, item.bytes, True) if bare and not any(o.startswith(folder) for o in others) else item)
    return kept


def _bare_group(metadata: AnyPath) -> bool:
    try:
        value = read_json(metadata)
        return bool(value["node_type"] == "group" and not value.get("attributes"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
