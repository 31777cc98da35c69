"""What a cache was made from: its dataset and its encoders, opened again as they were then."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pcd.cache import Cache, ColumnEntry, provenance
from pcd.datasets import Dataset, Sample, Split
from pcd.encoders import create_encoder, key_of, with_columns
from pcd.encoders.base import NO_WEIGHTS
from pcd.errors import CacheError, MissingFileError, SampleError, UsageError
from pcd.stages.checks import native_size
from pcd.stages.frames import open_dataset
from pcd.stages.plan import TablePlan, asked_before, plan_columns, plan_tables
from pcd.views import TRUTH, DepthResize

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder


@dataclass(frozen=True)
class Place:
    """Where images and weights are now, if not where the extraction found them, and what to compute on."""

    root: Path | None = None
    weights: str | None = None
    device: str = "auto"


class Origin:
    """Dataset and encoders of a cache, each opened when it is first asked for.

    They raise what opening them raises: `DatasetError`, `WeightsError`, `UsageError`.
    """

    def __init__(self, cache: Cache, place: Place) -> None:
        self.cache = cache
        self.place = place

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset; samples that were skipped then are skipped again, all others must be readable."""
        dataset = open_dataset(self.cache, self.place.root)
        return cast(Dataset, AsBefore(dataset, provenance.skipped(self.cache.root)))

    @cached_property
    def tables(self) -> list[TablePlan]:
        """The tables as the dataset gives them."""
        return plan_tables(self.dataset)

    @cached_property
    def encoders(self) -> list[Encoder]:
        """Every encoder that filled columns, in the precision of then, making all the columns it made."""
        return [self.encoder(key) for key in self.cache.manifest.encoders]

    @property
    def resizes(self) -> list[DepthResize]:
        """The ways in which the cache's ground truth was brought to the canvas."""
        return [resize for resize, group in TRUTH.items() if f"{group}/canvas" in self.cache.manifest.columns]

    @property
    def batch_views(self) -> int | None:
        """Views per encoder batch of the last extraction: another number may round differently."""
        return next((e["batch_views"] for e in reversed(provenance.records(self.cache.root)) if "batch_views" in e), None)

    def planned(self, encoder: Encoder) -> dict[str, ColumnEntry]:
        """What an extraction with this encoder would make."""
        return plan_columns(self.cache.manifest, encoder, self.resizes, native_size(self.dataset, self.tables))

    def encoder(self, key: str) -> Encoder:
        """The encoder of that key, see `Manifest.encoders`."""
        manifest, place = self.cache.manifest, self.place
        table: dict[str, Any] = dict(manifest.encoders[key]["table"])
        placed = [entry["encoder_table"] for entry in provenance.records(self.cache.root) if "encoder_table" in entry]
        table |= next((known for known in reversed(placed) if known["name"] == table["name"] and key_of(known) == key), {})
        if place.weights is not None and key in (weighty := self._with_weights()):
            if len(weighty) > 1:
                raise UsageError(
                    f"--weights: {self.cache.root} was filled by several encoders with weights ({', '.join(weighty)}); their "
                    "files are looked for where the extraction found them."
                )
            table["weights"] = place.weights
        for name, column in manifest.columns.items():
            if manifest.encoder_of(name) == key and "precision" in column.fingerprint["encoder"]:
                table["precision"] = column.fingerprint["encoder"]["precision"]
        encoder = create_encoder(table.pop("name"), table, manifest.plan.view_size, place.device, "encoder")
        return with_columns(encoder, asked_before(manifest, encoder))

    def _with_weights(self) -> list[str]:
        """Keys of the encoders that have weights at all."""
        manifest = self.cache.manifest
        kinds = {
            manifest.encoder_of(name): column.fingerprint["encoder"]["weights"]["kind"]
            for name, column in manifest.columns.items()
            if "encoder" in column.fingerprint
        }
        return [key for key in manifest.encoders if kinds.get(key, NO_WEIGHTS) != NO_WEIGHTS]


class AsBefore:
    """A dataset of which the same samples can be read as when the cache was made."""

    def __init__(self, dataset: Dataset, skipped: dict[str, str]) -> None:
        self._dataset = dataset
        self._skipped = skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample. Raises `SampleError` for one that was skipped then, `CacheError` for another that cannot be read."""
        if key in self._skipped:
            raise SampleError(self._skipped[key])
        try:
            return self._dataset.load(split, key)
        except (SampleError, MissingFileError) as error:
            raise CacheError(f"sample {key}: {error} It could be read when the cache was made: restore the file.") from error
