"""The images behind a cache: for pictures and reports only; training and scores never open them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pcd.cache import Cache
from pcd.cache.provenance import PROVENANCE, records
from pcd.datasets import Dataset, Sample, Split, create_dataset
from pcd.errors import DatasetError
from pcd.stages.plan import plan_tables


class Frames:
    """Samples of a cache, loaded from the dataset it was made from."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._sources: dict[str, Split] = {table.name: table.source for table in plan_tables(dataset)}

    def load(self, table: str, key: str) -> Sample:
        """A sample of a table. Raises what the dataset raises: `MissingFileError`, `SampleError`."""
        return self._dataset.load(self._sources[table], key)


def open_frames(cache: Cache, root: Path | None = None) -> Frames:
    """The images of `cache`; see `open_dataset`."""
    return Frames(open_dataset(cache, root))


def open_dataset(cache: Cache, root: Path | None = None) -> Dataset:
    """The dataset of `cache`, where the last extraction found it or, if it has moved, under `root`.

    Raises `DatasetError` if the cache does not know where its images are, or if those there are not the cache's.
    """
    table = _dataset_table(cache)
    if root is not None:
        table["root"] = str(root)
    if not table:
        raise DatasetError(f"{cache.root} does not say where its images are ({PROVENANCE}); give --root DIR.")
    name = cache.manifest.dataset["name"]
    dataset = create_dataset(name, {key: value for key, value in table.items() if key != "name"}, "dataset")
    if json.loads(json.dumps(dataset.identity())) != cache.manifest.dataset["identity"]:
        raise DatasetError(f"the {name} images there are not those {cache.root} was made from; give --root DIR.")
    return dataset


def _dataset_table(cache: Cache) -> dict[str, Any]:
    """The `[dataset]` table of the last extraction that recorded one."""
    tables = [entry["dataset"] for entry in records(cache.root) if "dataset" in entry]
    return dict(tables[-1]) if tables else {}


def located(table: dict[str, Any]) -> dict[str, Any]:
    """A `[dataset]` table with its root as an absolute path, so that it is found again from elsewhere."""
    return {**table, "root": str(Path(table["root"]).resolve())} if "root" in table else dict(table)
