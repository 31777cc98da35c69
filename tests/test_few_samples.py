"""Training with few samples of each scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pcd.cache import Cache
from pcd.errors import RecipeError
from pcd.recipe import Recipe
from pcd.stages.extract import extract
from pcd.stages.together import row_order
from pcd.stages.train import train
from pcd.training.rows import TrainingRows, spread_over_scenes
from tests.test_extract import toy_recipe

HEAD = {"name": "mean", "min_depth": 0.1, "max_depth": 10.0}


def few(number: int | None, **more: object) -> Recipe:
    return toy_recipe(head=HEAD, train={"samples_per_scene": number, **more})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(toy_recipe(), tmp_path_factory.mktemp("few") / "cache", device="cpu").cache


def test_samples_are_spread_over_each_scene() -> None:
    keys = [*(f"hall/{n}" for n in range(10)), "attic/0", *(f"yard/deep/{n}" for n in range(3)), "loose"]
    every = np.arange(len(keys), dtype=np.int64)
    for number, expected in {1: [5, 10, 12, 14], 2: [2, 7, 10, 11, 13, 14], 99: list(range(15))}.items():
        assert spread_over_scenes(every, keys, number).tolist() == expected
    assert spread_over_scenes(every[3:], keys, 1).tolist() == [6, 10, 12, 14]  # of those that were read


def test_only_they_are_trained_on_and_all_are_scored(cache: Cache, tmp_path: Path) -> None:
    table = cache.table("train")
    assert {key.rpartition("/")[0] for key in table.keys} == {""}  # one scene
    rows = TrainingRows(table, few(3).train)
    assert len(rows.rows) == 3 * table.plan.tiles
    assert set(rows.order(5)) == set(rows.rows)
    run = train(few(1), cache, tmp_path / "one", device="cpu")
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    (sample,) = spread_over_scenes(table.usable(), table.keys, 1)
    chosen = table.view_rows(np.array([sample]), flips=False).reshape(-1)
    count, mean = (table.column(f"depth/{name}").read(chosen).astype(np.float64) for name in ("count", "mean"))
    present = table.column("depth/present").read(chosen) >= 8  # half of a patch of 4x4 pixels
    expected = (count * mean)[present].sum() / count[present].sum()
    tokens = torch.zeros(1, 16, 6)
    assert float(head.depth({"clip/patch": tokens})[0, 0]) == pytest.approx(expected, rel=1e-6)


def test_it_is_part_of_the_recipe_only_if_it_is_used() -> None:
    assert "samples_per_scene" not in toy_recipe().train.model_dump()
    assert few(2).train.model_dump()["samples_per_scene"] == 2
    assert row_order(few(2)) != row_order(few(None))
    with pytest.raises(RecipeError, match="samples_per_scene"):
        few(0)
