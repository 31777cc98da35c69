"""One writer per run: a lock that the operating system releases when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        while not _locked(handle.fileno(), folder):
            handle.seek(0)
            occupied(handle.read().strip() or "another process")
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def _locked(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(
            f"{folder / LOCK} cannot be locked ({error.strerror}): without locks two workers could write one run at once. "
            "Give an --out on a file system with flock."
        ) from None
    return True
