"""Tokens in half the bytes: an int8 code for every float16 value, and beside the codes the mean and scale of each channel.

A compact column is an int8 array `(rows, P + 8, D)`. Of each row, lines 0 to P - 1 are the codes of P patches, lines P to P + 3
the bytes of the view's means and lines P + 4 to P + 7 those of its scales, one little-endian float32 per channel. They are one
chunk: written, checked and committed together. In any Zarr reader, with numpy:

    mean, scale = row[P:].reshape(2, -1).view("<f4")
    tokens = (mean + scale * row[:P].astype("f4")).astype("f2")

Coding computes in float64 and rounds half to even. `mean` is that of the channel over the view's patches, as float32; `scale`
is max |x - mean| / 127, as float32, its significand rounded up to 16 bits; a code is (x - mean) / scale, or the nearest whose
token float16 can hold (65504). In a constant channel scale and codes are 0, and it comes back as it was. `scale * code` has 23
bits at most and is exact in float32: decoding gives the same bits with and without fused multiply-add, on any device.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pcd.cache.manifest import ColumnEntry
from pcd.cache.parallel import share
from pcd.columns import ColumnSpec
from pcd.errors import CacheError

if TYPE_CHECKING:
    import torch  # takes a second to import: only who codes or decodes waits for it

TokenForm = Literal["float16", "int8"]
"""How the tokens of a cache are stored."""
KEY = "compact"
"""Key of a compact column's attributes that says how to decode it, and of its fingerprint."""
LARGEST = 127
HIGHEST = 65504.0
"""Largest value of float16."""
LINES = 8
"""Lines of a row behind the codes: four bytes for the mean of each channel, four for its scale."""
SERIAL = 32767
"""Values that torch works on at once without starting threads of its own; they also stay in the processor's cache."""
CODING_COST = 20
"""Coding takes about this many times as long per byte as reading."""
DECODE = (
    "of a row r and P = shape[0]: mean, scale = r[P:].reshape(2, -1).view('<f4'); "
    "tokens = (mean + scale * r[:P].astype('f4')).astype('f2')"
)

Float16 = npt.NDArray[np.float16]


def applies(spec: ColumnSpec) -> bool:
    """Whether a column holds what can be stored as int8: float16 tokens `(patch, channel)` of a view."""
    return spec.dims == ("patch", "channel") and spec.dtype == "float16" and spec.axis == "view" and not spec.compress


def is_compact(entry: ColumnEntry) -> bool:
    """Whether a column of the manifest is stored in compact form."""
    return KEY in entry.attributes


def compacted(entry: ColumnEntry) -> ColumnEntry:
    """A float16 column's entry as it stands in the manifest of a cache that stores it as int8.

    Its spec is that of the array on disk; attributes say how to decode it, and the fingerprint has one field more.
    """
    patches, width = entry.spec.shape
    return replace(
        entry,
        spec=replace(entry.spec, shape=(patches + LINES, width), dtype="int8"),
        fingerprint={**entry.fingerprint, KEY: "int8"},
        attributes={
            **entry.attributes,
            KEY: {"form": "int8", "shape": [patches, width], "dtype": entry.spec.dtype, "decode": DECODE},
        },
    )


def as_read(entry: ColumnEntry) -> ColumnEntry:
    """The entry with the spec of what readers get: the same for a column that is not compact.

    Raises `CacheError` for a form that a later pcd wrote.
    """
    if not is_compact(entry):
        return entry
    form: dict[str, Any] = entry.attributes[KEY]
    if form["form"] != "int8":
        raise CacheError(
            f"column {entry.spec.name} is stored in the form {form['form']!r}, this pcd reads int8; use the one that wrote it."
        )
    return replace(entry, spec=replace(entry.spec, shape=tuple(form["shape"]), dtype=form["dtype"]))


def encode(rows: Float16, where: str, first: int = 0) -> npt.NDArray[np.int8]:
    """Tokens `(n, P, D)` as they are stored: `(n, P + 8, D)`. The same bits on every machine.

    Raises `CacheError` for values that are not finite; it names `where` and the row, counted from `first`.
    """
    number, patches, width = rows.shape
    stored = np.empty((number, patches + LINES, width), dtype=np.int8)
    finite = np.zeros(number, dtype=np.bool_)
    share(partial(_encode_row, np.ascontiguousarray(rows), stored, finite), number, CODING_COST * rows.nbytes)
    if not finite.all():
        raise CacheError(
            f"{where}, row {first + int(finite.argmin())}: tokens that are not finite have no int8 form. The encoder may have "
            "overflowed in half precision: try `--set encoder.precision=fp32`."
        )
    return stored


def _encode_row(rows: Float16, stored: npt.NDArray[np.int8], finite: npt.NDArray[np.bool_], row: int) -> None:
    """One row, some channels at a time. The sum of up to 8192 float16 values is exact in float64, in whatever order."""
    import torch

    patches, width = rows.shape[1:]
    tokens, codes = torch.from_numpy(rows[row]), torch.from_numpy(stored[row, :patches])
    vectors = torch.empty(2, width, dtype=torch.float32)
    step = max(1, SERIAL // patches)
    for start in range(0, width, step):
        here = slice(start, start + step)
        values = tokens[:, here].double()
        mean, scale = vectors[:, here]
        mean.copy_(values.sum(dim=0) / patches)
        values -= mean
        scale.copy_(values.abs().amax(dim=0) / LARGEST)
        scale.view(torch.int32).add_(255).bitwise_and_(-256)
        mean, divisor = mean.double(), scale.double().masked_fill_(scale == 0, 1)
        values.div_(divisor).round_()
        if bool((mean.abs() + (LARGEST + 1) * divisor).amax() > HIGHEST):  # rounded away from 0, a token might become infinite
            values.clamp_(((-HIGHEST - mean) / divisor).ceil_(), ((HIGHEST - mean) / divisor).floor_())
        codes[:, here] = values
    stored[row, patches:] = vectors.numpy().astype("<f4").view(np.int8).reshape(LINES, width)
    finite[row] = bool(vectors.isfinite().all())


def decode(stored: npt.NDArray[np.int8]) -> Float16:
    """Rows as they are stored, `(n, P + 8, D)`, as tokens `(n, P, D)`."""
    number, lines, width = stored.shape
    tokens, decoder = np.empty((number, lines - LINES, width), dtype=np.float16), Decoder((lines, width))
    for row, out in zip(stored, tokens, strict=True):
        decoder.buffer[:] = row.view(np.uint8).reshape(-1)
        decoder.decode(out)
    return tokens


class Decoder:
    """Turns stored rows into tokens. Several threads may use one: each has memory of its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """`shape` is that of a stored row, `(P + 8, D)`."""
        self._shape = shape
        self._local = threading.local()

    @property
    def buffer(self) -> npt.NDArray[np.uint8]:
        """This thread's memory for the bytes of one stored row, `((P + 8) * D,)`."""
        return self._workspace().stored

    def decode(self, out: Float16) -> None:
        """The row in `buffer` as tokens into `out` `(P, D)`."""
        self._workspace().decode(out)

    def _workspace(self) -> _Workspace:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = _Workspace(*self._shape)
        workspace: _Workspace = self._local.workspace
        return workspace


class _Workspace:
    """What one thread needs to decode, made once: a few patches at a time go through float32 in the processor's cache."""

    def __init__(self, lines: int, width: int) -> None:
        import torch

        patches = lines - LINES
        self.stored = np.empty(lines * width, dtype=np.uint8)
        self._tail = self.stored[patches * width :]
        vectors = np.empty((2, width), dtype="<f4")  # the tail itself need not be aligned
        self._vectors = vectors.view(np.uint8).reshape(-1)
        self._mean, self._scale = torch.from_numpy(vectors)
        self._step = max(1, SERIAL // width)
        codes = torch.from_numpy(self.stored[: patches * width].view(np.int8).reshape(patches, width))
        held = torch.empty(min(self._step, patches), width)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = [
            (part, held[: len(part)]) for part in torch.split(codes, self._step)
        ]

    def decode(self, out: Float16) -> None:
        """See `Decoder.decode`. A product that is exact lets `addcmul` fuse, or not, to the same bits."""
        import torch

        self._vectors[:] = self._tail
        targets = torch.split(torch.from_numpy(out), self._step)
        for (codes, held), target in zip(self._parts, targets, strict=True):
            held.copy_(codes)
            torch.addcmul(self._mean, held, self._scale, out=held)
            target.copy_(held)
