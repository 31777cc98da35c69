"""When, by what and on what a cache was filled: a line of JSON per extraction or repair.

It is kept apart from the manifest, so that equal caches are equal bytes: it holds times, paths and names of devices.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pcd
from pcd.files import write_bytes
from pcd.remote import AnyPath

PROVENANCE = "provenance.jsonl"
PACKAGES = ("torch", "open_clip_torch", "zarr", "numpy")


def append(root: AnyPath, entry: dict[str, Any]) -> None:
    """Add a line, durably and whole or not at all: `entry` with the time, the command of this process, and versions."""
    whole = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "pcd": pcd.__version__,
        "python": platform.python_version(),
        **{name.removesuffix("_torch"): _version(name) for name in PACKAGES},
        **entry,
    }
    lines = b"".join(_lines(root))
    torn = b"\n" if lines and not lines.endswith(b"\n") else b""
    write_bytes(root / PROVENANCE, lines + torn + json.dumps(whole, sort_keys=True).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def records(root: AnyPath) -> list[dict[str, Any]]:
    """All lines that can be read, the oldest first; `pcd cache verify` reports the others."""
    return [value for line in _lines(root) if (value := _parse(line)) is not None]


def unreadable(root: AnyPath) -> list[int]:
    """Numbers, from 1, of the lines that cannot be read: a crash may cut one short."""
    return [number for number, line in enumerate(_lines(root), start=1) if _parse(line) is None]


def drop_unreadable(root: AnyPath) -> None:
    """Keep the lines that can be read, byte for byte."""
    write_bytes(root / PROVENANCE, b"".join(line for line in _lines(root) if _parse(line) is not None))


def skipped(root: AnyPath) -> dict[str, str]:
    """Samples that were skipped, with the reason noted at the time."""
    reasons: dict[str, str] = {}
    for entry in records(root):
        reasons |= entry.get("skipped", {})
    return reasons


def _lines(root: AnyPath) -> list[bytes]:
    path = root / PROVENANCE
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
