"""Where columns come from while training: held on the device, held in host memory, or read from the cache batch by batch.

What is read is the same, bit for bit; only where it lies differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from pcd.cache import Column, Table
from pcd.remote import RemotePath

Rows = npt.NDArray[np.int64]
Residency = Literal["auto", "device", "host", "stream"]
SHARE_OF_MEMORY = 0.5
"""`auto` holds columns in host memory up to this share of what is free."""
SHARE_OF_DEVICE = 0.7
"""The same for the memory of a GPU: the head, its optimisers and a batch's activations need the rest."""
LOAD_ROWS = 512
FETCHED_AHEAD = 8
"""Batches that are on their way from an object store."""
WORTH_LEAVING_OUT = 0.8
"""Patches that never count are left out of what is held if less than this share of the patches remains."""


class RowSource(Protocol):
    """Where columns come from: `read(rows)` gives a tensor `(len(rows), *shape)` per column."""

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        ...


@dataclass(frozen=True)
class Placed:
    """A source, a line that says what was chosen and why, and how many batches are worth reading ahead."""

    source: RowSource
    words: str
    ahead: int = 0
    threads: int = 1
    """How many of these batches are read at once: more than one where it is answers that take their time."""


def place_rows(
    table: Table,
    columns: Sequence[str],
    rows: Rows,
    residency: Residency,
    device: torch.device,
    keep: npt.NDArray[np.bool_] | None = None,
) -> Placed:
    """Where columns of `rows` come from. `keep` `(len(rows), P)` names the patches that are looked at, if not all are.

    `auto` takes the device if it is a GPU that they fit on, else host memory if they fit there, else the cache.
    """
    if keep is not None and keep.mean() > WORTH_LEAVING_OUT:
        keep = None
    size = sum(held_bytes(table.column(name), len(rows), keep) for name in columns)
    free = psutil.virtual_memory().available
    words = f"{size / 1e9:.2f} GB of columns"
    if keep is not None:
        words += f" without the {100 * (1 - keep.mean()):.0f} % of patches that never count"
    words += f", {free / 1e9:.1f} GB of memory free"
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if room:
        words += f", {room / 1e9:.1f} GB on {device}"
    chosen = _chosen(residency, size, free, room)
    if chosen == "stream":
        streamed, words = StreamedRows(table, columns, device), f"{words}: read from the cache batch by batch"
        if isinstance(table.root, RemotePath):
            return Placed(streamed, words, FETCHED_AHEAD, FETCHED_AHEAD)
        return Placed(streamed, words, 8 if room else 2)
    where = device if chosen == "device" else torch.device("cpu")
    held = HeldRows(table, columns, rows, device, where, keep)
    return Placed(held, f"{words}: held {f'on {device}' if chosen == 'device' else 'in memory'}", 4 if held.crosses else 0)


def _chosen(residency: Residency, size: int, free: int, room: int) -> Residency:
    if residency != "auto":
        return residency
    if size < SHARE_OF_DEVICE * room:
        return "device"
    return "host" if size < SHARE_OF_MEMORY * free else "stream"


def held_bytes(column: Column, rows: int, keep: npt.NDArray[np.bool_] | None) -> int:
    """Bytes that `rows` rows of a column take, those of its patches alone that are kept."""
    if keep is None or not _by_patch(column):
        return column.spec.row_bytes * rows
    return column.spec.row_bytes // column.spec.shape[0] * int(keep.sum())


def _by_patch(column: Column) -> bool:
    return column.spec.dims[:1] == ("patch",)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; a pinned one is copied while the host goes on."""
    return tensor.to(device, non_blocking=True)


class StreamedRows:
    """Each batch is read from the cache."""

    def __init__(self, table: Table, columns: Sequence[str], device: torch.device) -> None:
        self._columns = {name: table.column(name) for name in columns}
        self._device = device

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        return {name: to_device(self._read(column, rows), self._device) for name, column in self._columns.items()}

    def _read(self, column: Column, rows: Rows) -> Tensor:
        if self._device.type != "cuda":
            return torch.from_numpy(column.read(rows))
        like = torch.from_numpy(np.empty(0, dtype=column.spec.dtype))
        buffer = torch.empty((len(rows), *column.spec.shape), dtype=like.dtype, pin_memory=True)
        column.read(rows, buffer.numpy())
        return buffer


class HeldRows:
    """The columns of `rows` are read once and held, in host memory or on the device."""

    def __init__(
        self,
        table: Table,
        columns: Sequence[str],
        rows: Rows,
        device: torch.device,
        where: torch.device | None = None,
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """`device` is where batches are wanted, `where` (default: the host) where the columns lie until then.

        Of columns by patch only the patches of `keep` `(len(rows), P)` are held; a batch has zeros at the others.
        """
        where = where or torch.device("cpu")
        self.crosses = where != device
        """Whether a batch is copied from the host to the device."""
        self._device = device
        self._position = np.full(table.samples * table.views, -1, dtype=np.int64)
        self._position[rows] = np.arange(len(rows))
        kept = None if keep is None else _Kept(keep)
        self._held = {name: _Held(table.column(name), rows, where, kept) for name in columns}

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        positions = self._position[rows]
        pin = self.crosses and self._device.type == "cuda"
        return {name: to_device(held.batch(positions, pin=pin), self._device) for name, held in self._held.items()}


class _Kept:
    """Which patches `(N, P)` of the held rows are there, one after the other."""

    def __init__(self, keep: npt.NDArray[np.bool_]) -> None:
        self.keep = keep
        self._stops = np.cumsum(keep.sum(axis=1))

    def find(self, positions: Rows) -> tuple[Rows, Rows]:
        """Where the patches of some rows lie among those held, and where they belong in the flattened batch `(B * P,)`."""
        keep = self.keep[positions]
        numbers = keep.sum(axis=1)
        first = self._stops[positions] - numbers
        within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        return np.repeat(first, numbers) + within, np.flatnonzero(keep)


class _Held:
    """One column."""

    def __init__(self, column: Column, rows: Rows, where: torch.device, kept: _Kept | None) -> None:
        self._kept = kept if _by_patch(column) else None
        self._shape = column.spec.shape
        like = torch.from_numpy(np.empty(0, dtype=column.spec.dtype))
        inner = self._shape if self._kept is None else self._shape[1:]
        number = len(rows) if self._kept is None else int(self._kept.keep.sum())
        self._values = torch.empty((number, *inner), dtype=like.dtype, device=where)
        filled = 0
        for start in range(0, len(rows), LOAD_ROWS):
            part = torch.from_numpy(column.read(rows[start : start + LOAD_ROWS]))
            if self._kept is not None:
                part = part[torch.from_numpy(self._kept.keep[start : start + LOAD_ROWS])]
            self._values[filled : filled + len(part)] = part
            filled += len(part)

    def batch(self, positions: Rows, *, pin: bool) -> Tensor:
        """Rows by their place among those held, where they lie; in pinned memory if asked for."""
        if self._kept is None:
            out = self._empty((len(positions), *self._shape), pin=pin)
            return torch.index_select(self._values, 0, self._index(positions), out=out)
        source, target = self._kept.find(positions)
        whole = self._empty((len(positions) * self._shape[0], *self._shape[1:]), pin=pin).zero_()
        whole.index_copy_(0, self._index(target), self._values[self._index(source)])
        return whole.reshape(len(positions), *self._shape)

    def _empty(self, shape: tuple[int, ...], *, pin: bool) -> Tensor:
        return torch.empty(shape, dtype=self._values.dtype, device=self._values.device, pin_memory=pin)

    def _index(self, numbers: Rows) -> Tensor:
        return to_device(torch.from_numpy(numbers), self._values.device)


class JoinedRows:
    """Columns that come from a source each."""

    def __init__(self, sources: Mapping[str, RowSource]) -> None:
        self._sources = sources

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of some rows of the table."""
        return {name: source.read(rows)[name] for name, source in self._sources.items()}
