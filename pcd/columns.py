"""What a column of the cache looks like: one array, one row per view or per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Axis = Literal["view", "sample"]
"""What a row is: a view (what an encoder sees) or a sample (a frame as the dataset stores it)."""


@dataclass(frozen=True)
class ColumnSpec:
    """Name, per-row shape, dtype and meaning of a column.

    `dims` names the axes of one row, e.g. `("patch", "channel")`; `units_per_metre` says how stored integers become
    metres (0 means missing); `compress` asks for zstd, which pays for sparse maps and not for tokens.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    meaning: str
    axis: Axis = "view"
    compress: bool = False
    units_per_metre: int | None = None

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(f"column {self.name}: {len(self.dims)} dimension names for shape {self.shape}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one uncompressed row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize
