"""One writer per cache: a lock that the operating system releases when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pcd.errors import CacheError

LOCK = ".lock"


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the cache for writing. Raises `CacheError` naming host and process of whoever holds it already."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise CacheError(
                f"{root} is being written by {handle.read().strip() or 'another process'}; wait for it to end."
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)
