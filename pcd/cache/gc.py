"""Drop columns, and remove what belongs to nothing.

The manifest is written first, without the columns: from then on they do not exist, whatever becomes of their files. These are
then leftovers like those of a crash, and go the same way: commit records, then shards, then metadata. Interrupted anywhere, the
cache verifies, and a second `gc` removes the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcd.cache import commits
from pcd.cache.leftovers import Leftover, leftovers
from pcd.cache.lock import writing
from pcd.cache.manifest import Manifest
from pcd.cache.store import Cache
from pcd.cache.texts import METADATA
from pcd.errors import UsageError, suggest
from pcd.files import naming
from pcd.remote import AnyPath, RemotePath

ALWAYS = "sample/"
"""Columns of this group are needed to read any other: which samples were read, how large they are, which camera."""


@dataclass(frozen=True)
class Garbage:
    """What would go: columns of the manifest, and files. `left_alone` are files that belong to nothing and were not pcd's."""

    columns: tuple[str, ...]
    files: tuple[Leftover, ...]
    left_alone: tuple[Leftover, ...]

    @property
    def bytes(self) -> int:
        """What is won."""
        return sum(file.bytes for file in self.files)


def garbage(root: AnyPath, columns: Sequence[str] = ()) -> Garbage:
    """What dropping `columns` and removing leftovers would remove. Changes nothing.

    Raises `UsageError` for a column that is unknown, or that every recipe needs.
    """
    manifest = Manifest.read(root)
    files = leftovers(Cache(root, without(manifest, columns)))
    for name in columns:
        if name.startswith(ALWAYS):
            raise UsageError(f"column {name} of {root} is needed to read all others and cannot be dropped.")
        begun = any(f"/{name}/" in file.path for file in files)  # dropped by a gc that was interrupted
        if name not in manifest.columns and not begun:
            raise UsageError(f"{root} has no column {name!r}.{suggest(name, manifest.columns)}")
    there = tuple(name for name in dict.fromkeys(columns) if name in manifest.columns)
    return Garbage(there, tuple(f for f in files if f.ours), tuple(f for f in files if not f.ours))


def without(manifest: Manifest, columns: Sequence[str]) -> Manifest:
    """The manifest without these columns, and without encoders that then have none.

    What was asked of an encoder is no longer known to be there: the next extraction looks.
    """
    if not any(name in manifest.columns for name in columns):
        return manifest
    kept = {name: entry for name, entry in manifest.columns.items() if name not in columns}
    gone = {manifest.encoder_of(name) for name in manifest.columns} - {manifest.encoder_of(name) for name in kept}
    encoders = {key: {"table": known["table"]} for key, known in manifest.encoders.items() if key not in gone}
    return dataclasses.replace(manifest, columns=kept, encoders=encoders)


def collect(root: AnyPath, shown: Garbage, advance: Callable[[], None] = lambda: None) -> int:
    """Remove what was `shown` by `garbage`, and nothing else; returns the bytes won. `advance` is called per file.

    Raises `CacheError` if the cache is being written, `WriteError` for a file that cannot be removed.
    """
    with writing(root):
        manifest = Manifest.read(root)
        if shown.columns:
            manifest = without(manifest, shown.columns)
            manifest.write(root)
        still = {file.path: file for file in leftovers(Cache(root, manifest)) if file.ours}
        files = [still[file.path] for file in shown.files if file.path in still]
        for file in sorted(files, key=_order):
            with naming(root / file.path, "removed"):
                (root / file.path).unlink()
                _remove_empty_folders(root, (root / file.path).parent)
            advance()
        return sum(file.bytes for file in files)


def _order(file: Leftover) -> tuple[int, str]:
    """Commit records, data, then metadata with the deepest first: it says whose the files beside it are."""
    if file.path.startswith(f"{commits.FOLDER}/"):
        return 0, file.path
    return (1, file.path) if not file.path.endswith(METADATA) else (1000 - file.path.count("/"), file.path)


def _remove_empty_folders(root: AnyPath, folder: AnyPath) -> None:
    if isinstance(folder, RemotePath):
        return  # there are none
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
