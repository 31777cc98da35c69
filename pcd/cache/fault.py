"""What can be wrong with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """Something wrong: where, in which column and rows, and whether it is absent (never committed) or damaged.

    `shard` is None for what is no shard: the manifest, a sample list, Zarr metadata, texts. `path` then names the file,
    relative to the cache.
    """

    table: str
    column: str
    shard: int | None
    rows: str
    kind: Literal["absent", "damaged"]
    detail: str
    path: str = ""


def file_fault(path: str, detail: str, *, table: str = "-", column: str = "-") -> Fault:
    """A damaged file that is no shard."""
    return Fault(table, column, None, "all", "damaged", detail, path)
