"""Numbers in print, to stand beside ours: each with its source, the protocol it was made under, and what makes it differ."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Published:
    """One row of a paper's table. `protocol` is the one of ours that comes nearest, empty if none does."""

    dataset: str
    method: str
    source: str
    protocol: str
    comparable: Literal["yes", "nearly", "no"]
    note: str
    values: dict[str, float]


def published(family: str) -> list[Published]:
    """The rows for a family of datasets, `nyu` or `kitti`; none for others."""
    return [Published(**row) for row in _rows() if row["dataset"] == family]


def known_in_print() -> list[str]:
    """The methods of all rows, each once."""
    return list(dict.fromkeys(row["method"] for row in _rows()))


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))["row"]
    return rows
