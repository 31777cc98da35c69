"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Suffix of a file that is still being written; a crash leaves at most such files behind."""


def sync(path: Path) -> None:
    """Make the bytes of a file, or the renames inside a folder, durable."""
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` durably: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    publish(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text durably (see `write_bytes`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON document durably; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """The same value with null where JSON has no number: NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
