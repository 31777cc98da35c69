"""Recipes: merging, overriding, validating."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.recipe_files import find_recipe, load_recipe, merge

SHIPPED = sorted(path.stem for path in Path("pipelines").glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid_and_survives_its_own_toml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    head_options(recipe.head)
    path = tmp_path / f"{name}.toml"
    path.write_text(recipe.as_toml())
    assert load_recipe(path) == recipe


def test_released_recipes_differ_from_the_papers_where_the_reference_says() -> None:
    paper, code = load_recipe("kitti"), load_recipe("kitti-released")
    assert (paper.views.depth_resize, code.views.depth_resize) == ("nearest", "masked-bilinear")
    assert code.head["max_depth"] == 30 * 1000 / 256 == 117.1875
    assert code.head["min_depth"] == pytest.approx(0.001 * 1000 / 256)
    assert (paper.head["depth"]["train_table"], code.head["depth"]["train_table"]) == (False, True)
    assert (paper.train.tiles, code.train.tiles) == ("all", "random")
    assert (paper.train.patience, paper.train.decay_start) == (50, 20)
    assert (code.train.patience, code.train.decay_start) == (200, 10)
    assert code.targets.embedding.max_depth == math.inf
    assert (code.targets.embedding.mask, code.targets.depth.mask) == ("garg", "none")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["nyu.toml --set train.epoch=3", "'train.epoch'", "Did you mean 'epochs'"]),
        ("train.epochs=0", ["train.epochs = 0", "greater than 0"]),
        ("train.epochs=2.5", ["train.epochs = 2.5", "integer"]),
        ("train.epochs=true", ["train.epochs = True", "integer"]),
        ('train.tiles="som"', ["train.tiles = 'som'", "'all' or 'random'"]),
        ("views.canvas=[1,2,3]", ["views.canvas"]),
        ("dataset.name=3", ["'dataset.name' is missing"]),
        ("nonsense", ["--set nonsense", "KEY=VALUE"]),
    ],
)
def test_errors_name_file_and_key(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("nyu", [override])
    for word in words:
        assert word in str(error.value)


def test_head_errors_name_the_key() -> None:
    recipe = load_recipe("nyu", ["head.dropot=0.1"])
    with pytest.raises(RecipeError, match=r"head: unknown key 'dropot'\. Did you mean 'dropout'"):
        head_options(recipe.head)
    with pytest.raises(RecipeError, match=r"head: dropout = 1\.5"):
        head_options(load_recipe("nyu", ["head.dropout=1.5"]).head)
    with pytest.raises(RecipeError, match=r"head: depth\.lr = 0"):
        head_options(load_recipe("nyu", ["head.depth.lr=0"]).head)


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = load_recipe("nyu", ["head.table_init=tokens", "train.seed = 7", 'train.monitor=["rmse"]', "head.depth.lr=1e-2"])
    assert recipe.head["table_init"] == "tokens"
    assert recipe.train.seed == 7
    assert recipe.train.monitor == ("rmse",)
    assert recipe.head["depth"] == {"lr": 0.01, "train_table": False, "rmse_over": "map"}


def test_unknown_names_are_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Unknown recipe 'kiti'\. Did you mean 'kitti'"):
        find_recipe("kiti")
    with pytest.raises(RecipeError, match=r"nowhere\.toml is not there"):
        find_recipe(tmp_path / "nowhere.toml")


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[head\n")
    with pytest.raises(RecipeError, match=r"broken\.toml: not valid TOML"):
        load_recipe(path)
    (tmp_path / "a.toml").write_text('extends = "b"')
    (tmp_path / "b.toml").write_text('extends = "a"')
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "a.toml")


def test_merge_replaces_a_table_of_another_name() -> None:
    base = {"head": {"name": "pureclip", "dropout": 0.2}, "train": {"epochs": 1, "seed": 2}}
    assert merge(base, {"train": {"epochs": 5}})["train"] == {"epochs": 5, "seed": 2}
    assert merge(base, {"head": {"name": "linear"}})["head"] == {"name": "linear"}
