"""A table: the columns of one split of one dataset under one view plan."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pcd.cache.column import Column
from pcd.cache.manifest import Manifest
from pcd.errors import CacheError, CorruptError, suggest
from pcd.fingerprint import digest
from pcd.remote import AnyPath
from pcd.views import ViewPlan

SAMPLES = "samples.json"
SAMPLE_OK = "sample/ok"
"""1 for a sample that was read, 0 for one that was skipped: its rows are filler and never handed out."""


class Table:
    """Samples and columns of one split.

    Row `sample * views + flip * tiles + tile` of a view column is one view; row `sample` of a sample column one frame.
    """

    def __init__(self, root: AnyPath, name: str, manifest: Manifest, *, verify: bool = True) -> None:
        self.root = root
        self.name = name
        self.manifest = manifest
        self._verify = verify
        self._columns: dict[str, Column] = {}

    @property
    def plan(self) -> ViewPlan:
        """How samples became views."""
        return self.manifest.plan

    @property
    def samples(self) -> int:
        """Number of samples, skipped ones included."""
        return self.manifest.tables[self.name].samples

    @property
    def views(self) -> int:
        """Views per sample."""
        return self.plan.views

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Sample keys in row order. Raises `CorruptError` if the list is not the one the manifest vouches for."""
        path = self.root / self.name / SAMPLES
        try:
            keys = tuple(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CorruptError(f"{path}: the sample list cannot be read ({error}).") from None
        entry = self.manifest.tables[self.name]
        if len(keys) != entry.samples or digest(list(keys)) != entry.digest:
            raise CorruptError(f"{path}: {len(keys)} keys that are not the {entry.samples} of the manifest.")
        return keys

    def column_names(self) -> list[str]:
        """Columns this table is supposed to have."""
        return [name for name, entry in self.manifest.columns.items() if self.name in entry.tables]

    def column(self, name: str) -> Column:
        """A column by name. Raises `CacheError` naming the nearest known one."""
        if name not in self._columns:
            if name not in self.column_names():
                raise CacheError(f"{self.root}: table {self.name} has no column {name!r}.{suggest(name, self.column_names())}")
            entry = self.manifest.columns[name]
            per_sample = self.views if entry.spec.axis == "view" else 1
            self._columns[name] = Column(
                self.root,
                self.name,
                entry,
                rows=self.samples * per_sample,
                shard_rows=entry.shard_samples * per_sample,
                verify=self._verify,
            )
        return self._columns[name]

    @property
    def complete(self) -> bool:
        """Whether every column has every row."""
        return all(self.column(name).complete for name in self.column_names())

    def usable(self) -> npt.NDArray[np.int64]:
        """Numbers of the samples that were not skipped, in order."""
        return np.flatnonzero(self.column(SAMPLE_OK).read(range(self.samples)))

    def view_rows(
        self, samples: npt.NDArray[np.int64], *, flips: bool = True, tile: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Rows `(len(samples), views)` of these samples; unmirrored ones only unless `flips`, one `tile` each if given."""
        views = np.arange(self.views if flips else self.plan.tiles)
        if tile is None:
            return samples[:, None] * self.views + views
        mirrored = np.arange(len(views) // self.plan.tiles) * self.plan.tiles
        return samples[:, None] * self.views + mirrored + tile[:, None]

    def close(self) -> None:
        """Close all open shard files."""
        for column in self._columns.values():
            column.close()
