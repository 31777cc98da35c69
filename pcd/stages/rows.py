"""Samples become rows: decode and plan views in threads, encode in batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pcd import depths
from pcd.cache import ColumnEntry
from pcd.cache.table import SAMPLE_OK
from pcd.datasets import Dataset, Sample, Split
from pcd.encoders.base import Encoder
from pcd.errors import MissingFileError, SampleError
from pcd.overlap import ahead
from pcd.patches import PixelRule, patch_statistics
from pcd.views import TRUTH, DepthResize, ViewPlan, depth_canvas, image_canvas, to_views

Arrays = dict[str, npt.NDArray[Any]]
Views = npt.NDArray[np.float32]
OnError = Literal["stop", "skip"]
DECODE_THREADS = 4
NATIVE = "depth/native"


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

    def rows(
        self, source: Split, keys: Sequence[str], columns: set[str], read_before: set[str]
    ) -> Generator[tuple[int, Arrays]]:
        """Rows of a few samples at a time, and how many samples they are; a batch never goes on beyond the last of `keys`.

        Samples that were `read_before`, into columns that are there already, cannot be skipped any more.
        """
        group = max(1, self._batch_views // self._plan.views)

        def load(key: str) -> tuple[Arrays, Views]:
            return self._load(source, key, columns, skippable=self._on_error == "skip" and key not in read_before)

        held: list[tuple[Arrays, Views]] = []
        with closing(ahead(load, keys, DECODE_THREADS, 2 * group + DECODE_THREADS)) as loaded:
            for number, item in enumerate(loaded, start=1):
                held.append(item)
                if len(held) == group or number == len(keys):
                    yield len(held), self._encode(held, columns)
                    held = []

    def _load(self, source: Split, key: str, columns: set[str], *, skippable: bool) -> tuple[Arrays, Views]:
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

    def _prepare(self, sample: Sample, columns: set[str]) -> tuple[Arrays, Views]:
        arrays: Arrays = {}
        for resize in self._resizes:
            arrays |= self._truth(sample, resize)
        camera = sample.intrinsics
        parameters = [np.nan] * 4 if camera is None else [camera.fx, camera.fy, camera.cx, camera.cy]
        arrays[SAMPLE_OK] = np.ones(1, dtype=np.uint8)
        arrays["sample/size"] = np.array([sample.depth.shape], dtype=np.int32)
        arrays["sample/intrinsics"] = np.array([parameters], dtype=np.float32)
        if NATIVE in columns:
            arrays[NATIVE] = self._native(sample.depth)
        if not columns & self._from_encoder:
            return arrays, np.zeros((0, *self._plan.view_size, 3), dtype=np.float32)
        return arrays, to_views(image_canvas(sample.rgb, self._plan), self._plan)

    def _truth(self, sample: Sample, resize: DepthResize) -> Arrays:
        """Canvas depth and patch statistics of all views."""
        group = TRUTH[resize]
        units = self._units(f"{group}/canvas")
        stored = depths.encode(depth_canvas(sample.depth, self._plan, resize), units)
        if not stored.any():
            raise SampleError("no pixel of the canvas has depth: the stored map is empty, or the crop leaves nothing.")
        canvas = to_views(stored, self._plan)
        statistics = patch_statistics(canvas, units, self._encoder.grid, self._rule)
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

    def _encode(self, held: list[tuple[Arrays, Views]], columns: set[str]) -> Arrays:
        """Rows of the samples held, the encoder's columns among them if any of those is wanted."""
        rows = {name: np.concatenate([arrays[name] for arrays, _ in held]) for name in held[0][0] if name in columns}
        if columns & self._from_encoder:
            views = np.concatenate([views for _, views in held]).transpose(0, 3, 1, 2)
            rows |= self._encode_views(views)
        return rows

    def _encode_views(self, views: npt.NDArray[np.float32]) -> Arrays:
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._from_encoder}
        for start in range(0, len(views), self._batch_views):
            batch = torch.from_numpy(np.ascontiguousarray(views[start : start + self._batch_views]))
            for name, values in self._encoder.encode(batch).items():
                parts[name].append(values.cpu().numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _units(self, column: str) -> int:
        units = self._entries[column].spec.units_per_metre
        assert units is not None
        return units
