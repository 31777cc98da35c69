"""Datasets by name. A new one is a module here and a line below, or an entry point in the group `pcd.datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcd.datasets.base import SPLITS, Dataset, DatasetOptions, Grouped, Intrinsics, Sample, Split
from pcd.recipe import parse_table
from pcd.registry import Registry

__all__ = ["SPLITS", "Dataset", "DatasetOptions", "Grouped", "Intrinsics", "Sample", "Split", "create_dataset", "registry"]

registry = Registry(
    "dataset",
    "pcd.datasets",
    {
        "nyu": "pcd.datasets.nyu:NyuDataset",
        "kitti": "pcd.datasets.kitti:KittiDataset",
        "folder": "pcd.datasets.folder:FolderDataset",
        "synthetic": "pcd.datasets.synthetic:SyntheticDataset",
    },
)


def create_dataset(name: str, options: Mapping[str, Any], where: str = "dataset") -> Dataset:
    """Open dataset `name` with the keys of its `[dataset]` table.

    Raises `UsageError` for an unknown name, `RecipeError` for unknown or wrong keys (`where` names their origin) and
    `DatasetError` for what is wrong on disk.
    """
    cls = registry.get(name)
    dataset: Dataset = cls(parse_table(cls.Options, options, where))
    return dataset
