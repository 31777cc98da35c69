"""What must hold before hours of work begin: same samples, same fingerprints, files that exist, a disk that is large enough."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from pcd.cache import Cache, ColumnEntry, Manifest
from pcd.datasets import Dataset, Split
from pcd.errors import DatasetError, FingerprintError, MissingFileError, SpaceError
from pcd.fingerprint import differences
from pcd.progress import Progress
from pcd.remote import AnyPath, RemotePath
from pcd.stages.plan import TablePlan, sizes


def _refuse(root: AnyPath, lines: list[str]) -> None:
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise FingerprintError(
            f"{root} was made another way:\n{shown}\nGive the same options again, or another --cache for the new ones."
        )


def refuse_other_samples(cache: Cache, wanted: Manifest) -> None:
    """Raise `FingerprintError` if the cache holds other samples, another split or another view plan."""
    _refuse(cache.root, differences(cache.manifest.identity(), wanted.identity()))


def refuse_other_columns(cache: Cache, entries: dict[str, ColumnEntry]) -> None:
    """Raise `FingerprintError` if a column that is there was made by another encoder, rule or precision."""
    lines: dict[str, None] = {}
    for name, entry in entries.items():
        if name in cache.manifest.columns:
            found = cache.manifest.columns[name].fingerprint
            lines |= dict.fromkeys(differences(found, entry.fingerprint))
    _refuse(cache.root, list(lines))


def refuse_missing_files(dataset: Dataset, tables: list[TablePlan]) -> None:
    """Look for every file before hours of work begin."""
    sources: dict[Split, None] = dict.fromkeys(table.source for table in tables)
    missing = [(key, path) for source in sources for key, path in dataset.missing_files(source)]
    if missing:
        shown = "\n".join(f"  {key}: {path}" for key, path in missing[:5])
        raise MissingFileError(
            f"dataset {dataset.name}: {len(missing)} files that the lists name are not there, the first ones:\n{shown}\n"
            "Complete the dataset, correct --root, or use `--on-error skip` to record and leave out these samples."
        )


def native_size(dataset: Dataset, tables: list[TablePlan]) -> tuple[int, int] | None:
    """The largest stored frame of the tables that are scored; files that cannot be read are met again when they are loaded."""
    sizes = []
    for table in tables:
        for key in table.keys if table.name != "train" else ():
            try:
                sizes.append(dataset.size(table.source, key))
            except DatasetError:
                continue
    return (max(h for h, _ in sizes), max(w for _, w in sizes)) if sizes else None


def refuse_small_disk(cache: Cache, entries: dict[str, ColumnEntry], progress: Progress) -> None:
    """Compare what is still to be written with what is free; compressed columns are not counted against it."""
    whole = sizes(cache.manifest, entries)
    surely = sum(size for name, size in whole.items() if not entries[name].spec.compress)
    if isinstance(cache.root, RemotePath):
        progress.say(f"{cache.root}: {surely / 1e9:.2f} GB of tokens and statistics")
        return  # nobody knows how large a store is
    existing = sum(map(_size, cache.root.rglob("*")))
    free = shutil.disk_usage(cache.root).free
    progress.say(f"{cache.root}: {surely / 1e9:.2f} GB of tokens and statistics, {free / 1e9:.1f} GB free")
    if surely - existing > free:
        raise SpaceError(
            f"{cache.root}: {surely / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free. "
            "Free some space, choose another --cache, extract fewer samples (--limit) or no mirrored views (--no-flips)."
        )


def _size(path: Path) -> int:
    """Bytes of a file; 0 for what is none, or no longer one: other parts of the extraction may be at work."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
