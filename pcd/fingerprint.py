"""What determines a value, as plain JSON, and how two such descriptions differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pcd.remote import AnyPath


def canonical(value: Any) -> str:
    """One spelling of a JSON value: sorted keys, no white space, shortest floats. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 of the canonical spelling, in hex (64 characters)."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, in hex, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two fingerprints differ, one line each: `field: found X, wanted Y`."""
    lines: list[str] = []
    for key in sorted({*found, *wanted}):
        name = f"{prefix}{key}"
        left, right = found.get(key, "nothing"), wanted.get(key, "nothing")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{name}.")
        elif canonical(left) != canonical(right):
            lines.append(f"{name}: found {left!r}, wanted {right!r}")
    return lines
