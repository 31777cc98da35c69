"""The scores of one protocol: a row of sums per image or tile, and every table and mean that follows from them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pcd.errors import UsageError, suggest
from pcd.evaluation.metrics import METRICS, SUMS, Floats, metrics_from_sums
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.statistics import RESAMPLES, Interval, intervals, pooled_intervals

COLUMNS: tuple[str, ...] = ("key", "protocol", "tile", "pixels", *METRICS)
"""Columns of the per-sample table."""


def _metrics(sums: Floats) -> dict[str, Floats]:
    return {name: value.numpy() for name, value in metrics_from_sums(torch.from_numpy(sums)).items()}


@dataclass
class Scores:
    """What was gathered under `protocol`: one entry per unit (image, or tile of an image), in the order of arrival.

    `tiles` holds tile numbers in reading order, None for whole images; `sums` the rows of `metrics.SUMS`; `boundary` the
    boundary F1 of each unit, empty if not asked for; `bins` sums by true depth `(bins, len(SUMS))` over all units.
    """

    protocol: Protocol
    keys: list[str] = field(default_factory=list)
    tiles: list[int | None] = field(default_factory=list)
    sums: list[Floats] = field(default_factory=list)
    boundary: list[float] = field(default_factory=list)
    bins: Floats | None = None

    def extend(self, other: Scores) -> None:
        """Append the entries of another."""
        self.keys += other.keys
        self.tiles += other.tiles
        self.sums += other.sums
        self.boundary += other.boundary
        self.add_bins(other.bins)

    def add_bins(self, sums: Floats | None) -> None:
        """Add sums by true depth `(bins, len(SUMS))`, if there are any."""
        if sums is not None:
            self.bins = sums if self.bins is None else self.bins + sums

    def table(self) -> Floats:
        """All sums `(units, len(SUMS))`."""
        return np.stack(self.sums) if self.sums else np.zeros((0, len(SUMS)))

    def metrics(self) -> dict[str, Floats]:
        """Every metric of each unit `(units,)`, NaN where no pixel counted."""
        values = _metrics(self.table())
        return {**values, "boundary_f1": np.array(self.boundary)} if self.boundary else values

    def rows(self) -> list[dict[str, Any]]:
        """The per-sample table: key, protocol, tile, pixels and every metric of each unit."""
        values = self.metrics()
        pixels = self.table()[:, 0]
        return [
            {
                "key": key,
                "protocol": self.protocol.label,
                "tile": tile,
                "pixels": int(pixels[at]),
                **{name: float(column[at]) for name, column in values.items()},
            }
            for at, (key, tile) in enumerate(zip(self.keys, self.tiles, strict=True))
        ]

    def means(self) -> dict[str, float]:
        """Every metric by the protocol's averaging, over the units in which any pixel counted; NaN if there are none.

        Boundary F1 is always the mean over images.
        """
        table, values = self.table(), self.metrics()
        if self.protocol.averaging == "pixels":
            values |= {name: value[None] for name, value in _metrics(table.sum(axis=0)).items()}
        return {name: _mean(column) for name, column in values.items()}

    def summary(self) -> dict[str, Any]:
        """`metrics` (null where nothing counted), `images` and `tiles` that were scored, `excluded` units, `pixels` in all."""
        counted = self.table()[:, 0] > 0
        images = {key for key, good in zip(self.keys, counted, strict=True) if good}
        return {
            "metrics": {name: None if math.isnan(value) else value for name, value in self.means().items()},
            "images": len(images),
            **({"tiles": int(counted.sum())} if self.protocol.averaging == "tile" else {}),
            "excluded": int((~counted).sum()),
            "pixels": int(self.table()[:, 0].sum()),
        }

    def intervals(
        self, groups: Mapping[str, Hashable] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[str, Interval]:
        """95 % bootstrap intervals of `means` over images; tiles of an image stay together.

        `groups` (image key to scene) resamples whole scenes instead. Boundary F1 has none under pooled pixels.
        """
        names = [groups[key] if groups is not None else key for key in self.keys]
        if self.protocol.averaging == "pixels":
            return pooled_intervals(self.table(), names, resamples=resamples, seed=seed)
        return intervals(self.metrics(), names, resamples=resamples, seed=seed)

    def by_image(self, metric: str) -> dict[str, float]:
        """One metric by image key, for `statistics.compare`; of an image in tiles, the mean over those that were scored.

        Raises `UsageError` for a metric that was not computed.
        """
        values = self.metrics()
        if metric not in values:
            raise UsageError(f"Unknown metric {metric!r}.{suggest(metric, values)}")
        parts: dict[str, list[float]] = {}
        for key, value in zip(self.keys, values[metric], strict=True):
            parts.setdefault(key, []).append(float(value))
        return {key: _mean(np.array(part)) for key, part in parts.items()}

    def depth_table(self) -> list[dict[str, float]]:
        """Metrics by true depth, pooled over all pixels: `low` and `high` in metres, `pixels`, every metric (NaN if empty).

        Raises `UsageError` if the scorer was not asked for depth bins.
        """
        if self.bins is None:
            raise UsageError("no depth bins were gathered; create the Scorer with depth_bins.")
        edges = depth_edges(self.protocol, len(self.bins))
        values = _metrics(self.bins)
        return [
            {
                "low": float(edges[at]),
                "high": float(edges[at + 1]),
                "pixels": int(self.bins[at, 0]),
                **{name: float(column[at]) for name, column in values.items()},
            }
            for at in range(len(self.bins))
        ]


def depth_edges(protocol: Protocol, bins: int) -> Floats:
    """Edges of equally wide depth bins over the protocol's range, in metres."""
    return np.linspace(protocol.min_depth, protocol.max_depth, bins + 1)


def _mean(values: Floats) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan
