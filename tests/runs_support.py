"""Two small runs on toy frames, trained once for all tests that look at runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcd.recipe import parse_recipe
from pcd.stages.extract import extract
from pcd.stages.runs import Run
from pcd.stages.train import train
from tests.test_extract import toy_recipe


def toy_runs(root: Path, dataset: dict[str, Any] | None = None) -> list[Run]:
    """Runs `first` and `second` (without CLS) on one toy cache, three epochs each."""
    cache = extract(toy_recipe(dataset=dataset or {}), root / "cache", device="cpu").cache
    runs = []
    for name, cls in (("first", True), ("second", False)):
        table = toy_recipe().model_dump(exclude_none=True)
        table["head"] |= {"table_init": "random", "cls": cls, "embedding": {"steps": 3}, "depth": {"steps": 3}}
        table["train"] |= {"epochs": 3, "batch_size": 4}
        runs.append(train(parse_recipe(table, "test"), cache, root / name, device="cpu"))
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The toy runs, in a folder of the module's own."""
    return toy_runs(tmp_path_factory.mktemp("runs"))
