"""One writer per run of a sweep that several processes work on; see `pcd.locks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pcd import locks
from pcd.errors import RunError

LOCK = ".lock"


@contextmanager
def writing(folder: Path, occupied: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder for writing; it is made if it is not there.

    `occupied` is called with the words for its holder as often as somebody else is found to hold it: it waits, or raises. The
    text in the lock file only says who that is. Raises `RunError` if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as handle:
        while not _locked(handle, folder):
            occupied(locks.holder(handle))
        locks.sign(handle)
        try:
            yield
        finally:
            handle.truncate(0)


def _locked(handle: TextIO, folder: Path) -> bool:
    try:
        return locks.locked(handle)
    except OSError as error:
        raise RunError(
            f"{folder / LOCK} cannot be locked ({error.strerror}): without locks two workers could write one run at once. "
            "Give an --out on a file system with flock."
        ) from None
