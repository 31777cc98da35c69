"""Who writes a cache: locks that the operating system releases when their holder ends, however it ends.

Either one writer holds the whole cache (`writing`), or parts of it are written side by side (`sharing`), each by one process
(`holding`). Whoever writes a range of samples holds that range too: a worker that is believed to be dead may still be at work
on it. All are `flock`s of files at the root of the cache, whose text only says who holds them: what a killed process left
there blocks nobody. On an object store they are leases (see `pcd.cache.lease`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TextIO

from pcd import locks
from pcd.cache import lease
from pcd.cache.lease import LOCK, PART
from pcd.errors import CacheError
from pcd.remote import AnyPath, RemotePath

__all__ = ["LOCK", "PART", "holding", "is_lock", "parts", "sharing", "writing"]


def is_lock(path: PurePath) -> bool:
    """Whether a path relative to a cache is that of a lock."""
    return len(path.parts) == 1 and (path.name == LOCK or path.name.startswith(f"{LOCK}."))


@contextmanager
def writing(root: AnyPath) -> Iterator[None]:
    """Hold the cache for writing, alone.

    Raises `CacheError` naming process, host and since when if it is held, whole or in part, and if the folder cannot be written
    to or its file system has no locks.
    """
    if isinstance(root, RemotePath):
        with lease.writing(root):
            yield
        return
    with _open(root / LOCK) as handle:
        _take(root, handle, locks.ALONE)
        locks.sign(handle)
        try:
            yield
        finally:
            _tidy(root)
            handle.truncate(0)


@contextmanager
def sharing(root: AnyPath) -> Iterator[None]:
    """Hold the cache so that others may write parts of it meanwhile, but nobody the whole. Raises as `writing` does."""
    if isinstance(root, RemotePath):
        with lease.sharing(root):
            yield
        return
    with _open(root / LOCK) as handle:
        _take(root, handle, locks.SHARED)
        handle.truncate(0)
        try:
            yield
        finally:
            _tidy(root, leave=PART)  # others may be about to take parts, and would find this process there


@contextmanager
def holding(root: AnyPath, name: str, occupied: Callable[[str], None]) -> Iterator[None]:
    """Hold what is called `name`: a part, a range of samples.

    `occupied` is called with the words for its holder as often as somebody else is found to hold it: it waits, or raises. The
    lock's file is removed by who holds it, so one that was replaced meanwhile counts for nothing.
    """
    if isinstance(root, RemotePath):
        with lease.holding(root, name, occupied):
            yield
        return
    path = root / f"{LOCK}.{name}"
    while True:
        with _open(path) as handle:
            if not _locked(handle, locks.ALONE):
                holder = locks.holder(handle)
            elif _is_there(path, handle):
                locks.sign(handle)
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
            else:
                continue
        occupied(holder)


def parts(root: AnyPath) -> dict[str, str]:
    """Parts that are being written and the words for their holders.

    Only to be called by who keeps others from taking parts meanwhile: looking takes the lock for an instant.
    """
    if isinstance(root, RemotePath):
        return lease.parts(root)
    return {path.name.removeprefix(f"{LOCK}.{PART}"): words for path in _part_files(root) if (words := _holder(path))}


def _tidy(root: Path, leave: str = "") -> None:
    """Remove the lock files that killed processes left, but for those whose names `leave` begins; those that are held stay."""
    for path in root.glob(f"{LOCK}.*"):
        if not leave or not path.name.startswith(f"{LOCK}.{leave}"):
            _holder(path, remove=True)


def _holder(path: Path, *, remove: bool = False) -> str:
    """The words for who holds a lock, or nothing if nobody does; its file may then be removed."""
    try:
        with path.open("r+", encoding="utf-8") as handle:
            if not _locked(handle, locks.ALONE):
                return locks.holder(handle)
            if remove and _is_there(path, handle):
                path.unlink()
    except FileNotFoundError:
        pass
    return ""


def _part_files(root: Path) -> list[Path]:
    return sorted(root.glob(f"{LOCK}.{PART}*"))


def _open(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise CacheError(
            f"{path.parent} cannot be written to ({error.strerror}): its {path.name} is needed to keep other writers away. "
            "Make the folder writable, or copy the cache to one that is: `pcd cache copy SRC DST`."
        ) from None


def _take(root: Path, handle: TextIO, kind: int) -> None:
    if not _locked(handle, kind):
        texts = {path.name.removeprefix(f"{LOCK}.{PART}"): path.read_text(encoding="utf-8") for path in _part_files(root)}
        holders = [f"part {name} by {text.strip()}" for name, text in texts.items() if text.strip()]
        holder = f"in parts: {'; '.join(holders)}" if holders else f"by {locks.holder(handle)}"
        raise CacheError(f"{root} is being written {holder}; wait for it to end.")


def _locked(handle: TextIO, kind: int) -> bool:
    try:
        return locks.locked(handle, kind)
    except OSError as error:
        raise CacheError(
            f"{handle.name} cannot be locked ({error.strerror}): without locks two writers could not be kept apart. "
            "Write to another disk and copy the finished cache here: `pcd cache copy SRC DST`."
        ) from None


def _is_there(path: Path, handle: TextIO) -> bool:
    """Whether the file that was locked is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
