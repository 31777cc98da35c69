"""Locks of files that the operating system releases when their holder ends, however it ends.

A file's text only says who holds its lock: what a killed process left there blocks nobody.
"""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import UTC, datetime
from typing import TextIO

ALONE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH


def locked(handle: TextIO, kind: int = ALONE) -> bool:
    """Take the lock of an open file, until it is closed; False if somebody else holds it.

    Raises `OSError` if the file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sign(handle: TextIO) -> None:
    """Say in the file that this process holds it, on which host and since when."""
    handle.truncate(0)
    handle.write(words_for())
    handle.flush()


def words_for() -> str:
    """This process, its host and the time."""
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat(' ', 'seconds')}"


def holder(handle: TextIO) -> str:
    """What the file says of who holds it."""
    handle.seek(0)
    return handle.read().strip() or "another process"
