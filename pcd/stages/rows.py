"""Samples become rows: decode and plan views in threads, encode in batches.

Threads decode ahead of the encoder and put each view where its batch will need it, so that the encoding thread does nothing but
encode; `fill_range` writes behind it. Queues bound what is in memory, whatever the size of the dataset. With g samples to a
batch of the encoder (at least one) and T decoding threads there are at most

    3 g + T + 1     samples decoded and not yet encoded: float32 views, 12 bytes a pixel, and ground truth, 2 to 4 bytes a pixel
    4               batches of rows: one being made, two waiting, one being written

in whole batches: 4 + T/g of views. That is 35 MB of views for 336x336 views mirrored on a CPU (g = 2, T = 4), and 0.4 GB of
them with 64 views to a batch on a GPU (g = 32, T = 16). What the encoder itself needs comes on top.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pcd import depths
from pcd.cache import ColumnEntry
from pcd.cache.table import SAMPLE_OK
from pcd.datasets import Dataset, Sample, Split
from pcd.encoders.base import Encoder, Keyed, RowKey
from pcd.errors import MissingFileError, SampleError
from pcd.overlap import ahead
from pcd.patches import PixelRule, patch_statistics
from pcd.stages.plan import VIEW_CAMERA
from pcd.views import TRUTH, DepthResize, ViewPlan, depth_canvas, image_canvas, to_views, view_cameras

Arrays = dict[str, npt.NDArray[Any]]
Views = npt.NDArray[np.float32]
OnError = Literal["stop", "skip"]
DECODE_THREADS = 4
"""At least so many decode. Beside an encoder on a GPU, which leaves the cores alone, as many as torch may use."""
NATIVE = "depth/native"
_TURN = threading.Lock()
"""Held by the range of samples that is being encoded: others are decoded or written meanwhile."""


class _Group:
    """Samples that are encoded together. Each is loaded by one of several threads, into a place of its own."""

    def __init__(self, keys: Sequence[str], plan: ViewPlan, *, pin: bool) -> None:
        """Views go to pinned memory if `pin`: from there a GPU takes them several times as fast."""
        self.keys = keys
        self.arrays: list[Arrays] = [{} for _ in keys]
        self.views = torch.empty((len(keys) * plan.views, 3, *plan.view_size), dtype=torch.float32, pin_memory=pin)
        """All views `(views, 3, h, w)`, those of one sample after those of the other."""
        self._places = self.views.numpy().reshape(len(keys), plan.views, 3, *plan.view_size)

    def place(self, number: int, arrays: Arrays, views: Views | None) -> None:
        """Everything of sample `number`; `views` `(views, h, w, 3)`, if there are any."""
        self.arrays[number] = arrays
        if views is not None:
            self._places[number] = views.transpose(0, 3, 1, 2)


class RowMaker:
    """Turns a range of samples of a table into rows."""

    def __init__(
        self,
        dataset: Dataset,
        plan: ViewPlan,
        encoder: Encoder,
        entries: dict[str, ColumnEntry],
        resizes: Sequence[DepthResize],
        on_error: OnError,
        batch_views: int,
    ) -> None:
        self.skipped: dict[str, str] = {}
        self._dataset = dataset
        self._plan = plan
        self._encoder = encoder
        self._entries = entries
        self._resizes = resizes
        self._on_error = on_error
        self._batch_views = batch_views
        self._rule = PixelRule(*dataset.depth_range)
        self._from_encoder = {spec.name for spec in encoder.columns}
        self._on_gpu = str(getattr(encoder, "device", "cpu")).startswith("cuda")  # an encoder need not say where it computes

    def rows(
        self, source: Split, keys: Sequence[str], columns: set[str], read_before: set[str]
    ) -> Generator[tuple[int, Arrays]]:
        """Rows of a few samples at a time, and how many samples they are; a batch never goes on beyond the last of `keys`.

        Samples that were `read_before`, into columns that are there already, cannot be skipped any more.
        """
        size = max(1, self._batch_views // self._plan.views)
        threads = max(DECODE_THREADS, torch.get_num_threads()) if self._on_gpu else DECODE_THREADS
        pin = self._on_gpu and bool(columns & self._from_encoder)

        def places() -> Iterator[tuple[_Group, int]]:
            for start in range(0, len(keys), size):
                group = _Group(keys[start : start + size], self._plan, pin=pin)
                yield from ((group, number) for number in range(len(group.keys)))

        def load(place: tuple[_Group, int]) -> _Group | None:
            """The group, from its last sample on, which is the last to be handed out."""
            group, number = place
            key = group.keys[number]
            skippable = self._on_error == "skip" and key not in read_before
            group.place(number, *self._load(source, key, columns, skippable=skippable))
            return group if number == len(group.keys) - 1 else None

        with closing(ahead(load, places(), threads, 2 * size + threads)) as loaded:
            first = next(loaded, None)  # decoding has begun, whoever is encoding
            with _TURN:
                for group in itertools.chain([first], loaded):
                    if group is not None:
                        yield len(group.keys), self._encode(group, columns, source)

    def _load(self, source: Split, key: str, columns: set[str], *, skippable: bool) -> tuple[Arrays, Views | None]:
        """Everything of a sample but the encoder's columns, and its views `(views, h, w, 3)` if those are wanted."""
        try:
            return self._prepare(self._dataset.load(source, key), columns)
        except (SampleError, MissingFileError) as error:
            if not skippable:
                hint = "`--on-error skip` records such samples and goes on; what is done is kept."
                if self._on_error == "skip":
                    hint = "It could be read when the cache was begun, so it cannot be skipped now: restore the file."
                raise type(error)(f"sample {key}: {error} {hint}") from error
            self.skipped[key] = str(error)
            return self._filler()

    def _prepare(self, sample: Sample, columns: set[str]) -> tuple[Arrays, Views | None]:
        arrays: Arrays = {}
        for resize in self._resizes:
            arrays |= self._truth(sample, resize)
        camera = sample.intrinsics
        parameters = [np.nan] * 4 if camera is None else [camera.fx, camera.fy, camera.cx, camera.cy]
        arrays[SAMPLE_OK] = np.ones(1, dtype=np.uint8)
        arrays["sample/size"] = np.array([sample.depth.shape], dtype=np.int32)
        arrays["sample/intrinsics"] = np.array([parameters], dtype=np.float32)
        if VIEW_CAMERA in columns:
            arrays[VIEW_CAMERA] = view_cameras(parameters, sample.depth.shape[0], sample.depth.shape[1], self._plan)
        if NATIVE in columns:
            arrays[NATIVE] = self._native(sample.depth)
        if not columns & self._from_encoder:
            return arrays, None
        return arrays, to_views(image_canvas(sample.rgb, self._plan), self._plan)

    def _truth(self, sample: Sample, resize: DepthResize) -> Arrays:
        """Canvas depth and patch statistics of all views."""
        group = TRUTH[resize]
        units = self._units(f"{group}/canvas")
        stored = depths.encode(depth_canvas(sample.depth, self._plan, resize), units)
        if not stored.any():
            raise SampleError("no pixel of the canvas has depth: the stored map is empty, or the crop leaves nothing.")
        canvas = to_views(stored, self._plan)
        if f"{group}/count" not in self._entries:
            return {f"{group}/canvas": canvas}
        rows, columns = self._entries[f"{group}/count"].fingerprint["rule"]["grid"]
        statistics = patch_statistics(canvas, units, (rows, columns), self._rule)
        return {
            f"{group}/canvas": canvas,
            f"{group}/present": statistics.present,
            f"{group}/count": statistics.count,
            f"{group}/mean": statistics.mean,
            f"{group}/var": statistics.var,
        }

    def _native(self, depth: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        """The stored ground truth in the top left corner of a frame that holds the largest."""
        height, width = self._entries[NATIVE].spec.shape
        if depth.shape[0] > height or depth.shape[1] > width:
            raise SampleError(
                f"its frame of {depth.shape[0]}x{depth.shape[1]} is larger than any that could be read when the cache was "
                f"begun ({height}x{width}); extract into a new cache."
            )
        padded = np.zeros((1, height, width), dtype=np.uint16)
        padded[0, : depth.shape[0], : depth.shape[1]] = depths.encode(depth, self._units(NATIVE))
        return padded

    def _filler(self) -> tuple[Arrays, Views]:
        """Rows of a skipped sample: `sample/ok` is 0 and readers never hand them out."""
        arrays: Arrays = {}
        for name, entry in self._entries.items():
            if name not in self._from_encoder:
                number = self._plan.views if entry.spec.axis == "view" else 1
                arrays[name] = np.zeros((number, *entry.spec.shape), dtype=entry.spec.dtype)
        return arrays, np.zeros((self._plan.views, *self._plan.view_size, 3), dtype=np.float32)

    def _encode(self, group: _Group, columns: set[str], source: Split) -> Arrays:
        """Rows of a group, the encoder's columns among them if any of those is wanted."""
        held = group.arrays
        rows = {name: np.concatenate([arrays[name] for arrays in held]) for name in held[0] if name in columns}
        if columns & self._from_encoder:
            names = [RowKey(source, key, number, self._plan) for key in group.keys for number in range(self._plan.views)]
            rows |= self._encode_views(group.views, names)
        return rows

    def _encode_views(self, views: torch.Tensor, rows: Sequence[RowKey]) -> Arrays:
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._from_encoder}
        keyed = isinstance(self._encoder, Keyed)
        for start in range(0, len(views), self._batch_views):
            batch, names = views[start : start + self._batch_views], rows[start : start + self._batch_views]
            for name, values in (self._encode_rows(batch, names) if keyed else self._encode_batch(batch)).items():
                parts[name].append(values)
        copied = self._on_gpu and len(views) <= self._batch_views  # else the encoder may use its memory again
        return {name: arrays[0] if copied else np.concatenate(arrays) for name, arrays in parts.items()}

    def _encode_batch(self, views: torch.Tensor) -> Arrays:
        return {name: _to_host(values) for name, values in self._encoder.encode(views).items()}

    def _encode_rows(self, views: torch.Tensor, rows: Sequence[RowKey]) -> Arrays:
        """Of an encoder that is told which rows they are; those of skipped samples, which it may not know, are zeros."""
        assert isinstance(self._encoder, Keyed)
        read = [at for at, row in enumerate(rows) if row.sample not in self.skipped]
        made = {spec.name: np.zeros((len(rows), *spec.shape), dtype=spec.dtype) for spec in self._encoder.columns}
        if read:
            for name, values in self._encoder.encode_rows(views[read], [rows[at] for at in read]).items():
                made[name][read] = _to_host(values)
        return made

    def _units(self, column: str) -> int:
        units = self._entries[column].spec.units_per_metre
        assert units is not None
        return units


def _to_host(values: torch.Tensor) -> npt.NDArray[Any]:
    """An encoder's column as it is in host memory; from a GPU through pinned memory, which it fills several times as fast."""
    if not values.is_cuda:
        return np.asarray(values.cpu().numpy())
    return np.asarray(torch.empty_like(values, device="cpu", pin_memory=True).copy_(values).numpy())
