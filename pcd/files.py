"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pcd.errors import PcdError, SpaceError, WriteError
from pcd.remote import AnyPath, RemotePath

PARTIAL = ".partial"
"""Suffix of a file that is still being written; a crash leaves at most such files behind."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk, a quota or a limit on the size of files is used up."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def sync(path: AnyPath) -> None:
    """Make the bytes of a file, or the renames inside a folder, durable. Objects of a store are, once they are there."""
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished, fsynced `partial` to `final` and make the rename durable."""
    partial.replace(final)
    sync(final.parent)


def partial_of(final: Path) -> Path:
    """Where the bytes of `final` are collected until they are complete."""
    return final.with_name(final.name + PARTIAL)


@contextmanager
def naming(path: AnyPath, done: str = "written") -> Iterator[None]:
    """Give errors of the system met while `path` is being written (or whatever is `done` with it) its name and a remedy.

    Raises `SpaceError` for a full disk, `WriteError` for any other `OSError`.
    """
    try:
        yield
    except PcdError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise SpaceError(
                f"{path} cannot be {done}: {reason}. Free some space there (or raise the quota, or `ulimit -f`), "
                "then give the same command again: what is finished is kept."
            ) from error
        remedy = "Make its folder writable, or choose another" if error.errno in DENIED else "Look after the disk"
        raise WriteError(
            f"{path} cannot be {done}: {reason}. {remedy}, then give the same command again: what is finished is kept."
        ) from error


def make_folder(path: AnyPath) -> None:
    """Make a folder and those above it that are missing, durably: not only the folder, also its name in the one above.

    Object stores have no folders.
    """
    if isinstance(path, RemotePath):
        return
    missing = []
    while not path.is_dir() and path != path.parent:
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write `path` durably: temporary name, fsync, rename, fsync of the folder; an object of a store at once.

    Raises `SpaceError`, `WriteError` or `StoreError`, naming `path`, if that cannot be done; the file is then whole, as before
    or as now.
    """
    if isinstance(path, RemotePath):
        path.put(data)
        return
    partial = partial_of(path)
    with naming(path):
        make_folder(path.parent)
        try:
            with partial.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            publish(partial, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell; a disk that fails may keep the partial file
                partial.unlink(missing_ok=True)
            raise


def write_text(path: AnyPath, text: str) -> None:
    """Write UTF-8 text durably (see `write_bytes`)."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """The one spelling of an indented JSON document; NaN and infinity are refused."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: AnyPath, value: Any) -> None:
    """Write an indented JSON document durably; NaN and infinity are refused."""
    write_text(path, json_text(value))


def read_json(path: AnyPath) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """The same value with null where JSON has no number: NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
