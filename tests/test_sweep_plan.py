"""What a sweep file means, the grid, the sweeps that come with pcd, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcd.cache import Cache
from pcd.errors import RecipeError, UsageError
from pcd.reports.published import published
from pcd.stages.extract import extract
from pcd.stages.sweep_files import find_sweep, known_sweeps
from pcd.stages.sweep_plan import plan_sweep
from tests.sweep_support import METRICS, toy_cache, write_sweep
from tests.test_extract import toy_recipe


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


def test_variants_change_the_recipe_of_the_file(cache: Cache, tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path / "mine.toml",
        'recipe = "demo"\nseeds = [4, 5]\n[set]\nhead.bins = 9\ntrain.epochs = 8\n[variants.plain]\n'
        '[variants.other]\nhead.dropout = 0.1\n"head.bins" = 12\n[variants.other.targets.depth]\nmax_depth = inf\n',
    )
    plan = plan_sweep(cache, file, overrides=["train.epochs=3", "head.dropout=0.5"])
    assert (plan.name, plan.seeds, [variant.name for variant in plan.variants]) == ("mine", (4, 5), ["plain", "other"])
    plain, other = (variant.recipe for variant in plan.variants)
    assert (plain.name, plain.head["bins"], plain.head["dropout"], plain.train.epochs) == ("demo", 9, 0.5, 3)
    assert (other.head["bins"], other.head["dropout"], other.train.epochs) == (12, 0.1, 3)
    assert other.targets.depth.max_depth == float("inf")
    assert plain.targets.depth.max_depth is None
    assert other.head["embedding"] == plain.head["embedding"] == {"steps": 20, "lr": 1e-3}
    assert plan.variants[1].seeded(5).train.seed == 5
    assert plan_sweep(cache, file, seeds=[7]).seeds == (7,)
    assert plan_sweep(cache, file, recipe="folder").variants[0].recipe.name == "folder"


def test_a_grid_is_every_combination(cache: Cache, tmp_path: Path) -> None:
    plan = plan_sweep(cache, "demo", vary=["head.dropout=0,0.1,0.2", "head.hidden=1,4"])
    names = [f"dropout={dropout},hidden={hidden}" for dropout in ("0", "0.1", "0.2") for hidden in (1, 4)]
    assert [variant.name for variant in plan.variants] == names
    assert [(v.recipe.head["dropout"], v.recipe.head["hidden"]) for v in plan.variants] == [
        *((0, 1), (0, 4), (0.1, 1), (0.1, 4), (0.2, 1), (0.2, 4))
    ]
    assert plan.seeds == (0, 1, 2)
    words = plan_sweep(cache, "demo", vary=["head.table_init=random,tokens", "train.monitor=['rmse','delta1'],['rmse']"])
    assert [v.recipe.head["table_init"] for v in words.variants] == ["random", "random", "tokens", "tokens"]
    assert [v.recipe.train.monitor for v in words.variants[:2]] == [("rmse", "delta1"), ("rmse",)]
    rates = plan_sweep(cache, vary=["head.embedding.lr=1e-3", "head.depth.lr=1e-3,1e-4"])
    assert [v.name for v in rates.variants] == [f"head.embedding.lr=1e-3,head.depth.lr={lr}" for lr in ("1e-3", "1e-4")]
    file = write_sweep(tmp_path / "x.toml", '[variants.first]\n[grid]\nhead.bins = [5, 6]\n"head.prompt" = ["{centre} m/s"]\n')
    both = plan_sweep(cache, file)
    assert [v.name for v in both.variants] == ["first", "bins=5,prompt=_centre_m_s", "bins=6,prompt=_centre_m_s"]
    assert both.variants[2].recipe.head["prompt"] == "{centre} m/s"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[variants.a]\nhead.dropuot = 0.1", r"x\.toml: variants\.a: .*dropuot.*Did you mean 'dropout'"),
        ("[variants.a]\nhaed.dropout = 0.1", r"x\.toml: variants\.a: .*'haed'.*Did you mean 'head'"),
        ("[variants.a]\nhead.dropout = 2", r"variants\.a: .*dropout = 2"),
        ("[variants.a]\ntrain.epochs = 'x'", r"variants\.a: .*train\.epochs"),
        ("[variants.a]\ntrain.seed = 1", r"variants\.a: train\.seed cannot be set here: .*--seeds"),
        ("[variants.a]\ntrain.residency = 'host'", "read once for all"),
        ("[variants.a]\nviews.canvas = [8, 8]", r"views\.canvas cannot vary: all variants read one cache"),
        ("[variants.a]\nencoder.name = 'toy:x'", r"encoder\.name cannot vary"),
        ("[variants.a]\nevaluate.tta = false", r"evaluate\.tta cannot vary"),
        ("[variants.a]\nhead.dropout = 2020-01-01", "no value of a recipe"),
        ("[variants.'a b']", "a variant is a folder"),
        ("[variants.a.paper]\nnyu = { rsme = 1.0 }", r"variants\.a: paper\.nyu: unknown metric 'rsme'.*'rmse'"),
        ("[grid]\nhead.bins = 3", r"grid\.head\.bins = 3: expected a list"),
        ("[grid]\nhead.bins = []", r"head\.bins has no values"),
        ("[variants.'bins=3']\n[grid]\nhead.bins = [3]", "two variants have one name"),
        ("variants = {}", "no variants"),
        ("seed = [1]\n[variants.a]", "unknown key 'seed'.*'seeds'"),
        ("seeds = [-1]\n[variants.a]", "greater than or equal to 0"),
        ("seeds = []\n[variants.a]", "seeds"),
        ("seeds = [1, 1]\n[variants.a]", "a seed is named twice"),
        ("[set]\ntrain.seed = 1\n[variants.a]", r"train\.seed cannot be set here"),
        ("[variants.a", "not valid TOML"),
    ],
)
def test_what_a_file_may_not_say(cache: Cache, tmp_path: Path, text: str, message: str) -> None:
    file = write_sweep(tmp_path / "x.toml", text)
    with pytest.raises(UsageError, match=message):
        plan_sweep(cache, file)


@pytest.mark.parametrize("vary", ["head.bins", "=3", "head.bins=", "head.bins=3,,4", "head.bins=3,", "head.bins= ,3"])
def test_what_vary_may_not_say(cache: Cache, vary: str) -> None:
    with pytest.raises(UsageError, match=r"--vary .*expected KEY=VALUE,VALUE"):
        plan_sweep(cache, "demo", vary=[vary])


def test_a_sweep_needs_something_to_compare(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"demo\.toml is a recipe.*--vary"):
        plan_sweep(cache, "demo")
    with pytest.raises(UsageError, match=r"give a sweep \(known: .*table3-mlps.*--vary"):
        plan_sweep(cache)
    with pytest.raises(RecipeError, match=r"neither a sweep nor a recipe.*Did you mean 'table4-cls'"):
        plan_sweep(cache, "table4-csl")
    assert find_sweep(write_sweep(tmp_path / "recipe.toml", 'extends = "demo"')) is None


def test_a_cache_without_mirrored_views_is_scored_without_them(cache: Cache, tmp_path: Path) -> None:
    assert plan_sweep(cache, "table4-cls").variants[0].recipe.evaluate.tta
    plain = extract(toy_recipe(views={"flips": False}), tmp_path / "plain", device="cpu").cache
    assert not plan_sweep(plain, "table4-cls").variants[0].recipe.evaluate.tta


@pytest.mark.parametrize("name", known_sweeps())
@pytest.mark.parametrize("recipe", [None, "nyu", "kitti", "nyu-released", "kitti-released", "demo"])
def test_the_sweeps_of_pcd_fit_every_recipe(cache: Cache, name: str, recipe: str | None) -> None:
    plan, path = plan_sweep(cache, name, recipe=recipe), find_sweep(name)
    assert path is not None
    assert plan.seeds == ((0, 1, 2) if path.parent.name == "ablations" else (0,))
    assert len(plan.variants) > 1
    assert plan_sweep(cache, str(path), recipe=recipe) == plan


def test_the_sweeps_of_the_paper_change_what_it_says(cache: Cache) -> None:
    heads = {
        name: {variant.name: variant.recipe.head for variant in plan_sweep(cache, name, recipe="nyu").variants}
        for name in ("table3-mlps", "table4-cls", "table5-losses")
    }
    assert heads["table3-mlps"]["frozen-mlps"] == {**heads["table3-mlps"]["baseline"], "train_mlps": False}
    assert heads["table4-cls"]["no-cls"] == {**heads["table4-cls"]["baseline"], "cls": False}
    losses = heads["table5-losses"]
    assert list(losses) == ["all-three", "infonce-alignment", "infonce"]
    assert [head["depth"].get("steps", 100) for head in losses.values()] == [100, 0, 0]  # no depth phase: no alternation
    assert [head["embedding"].get("alignment", 1.0) for head in losses.values()] == [1.0, 1.0, 0.0]


def test_printed_numbers_agree_with_those_of_the_report(cache: Cache) -> None:
    methods = {
        ("table3-mlps", "baseline"): "PureCLIP-Depth (ViT-L/14@336)",
        ("table3-mlps", "frozen-mlps"): "PureCLIP-Depth with frozen random MLPs",
        ("table4-cls", "no-cls"): "PureCLIP-Depth without CLS",
        ("table5-losses", "all-three"): "PureCLIP-Depth (ViT-L/14@336)",
    }
    for family in ("nyu", "kitti"):
        rows = {row.method: row.values for row in published(family)}
        for (name, variant), method in methods.items():
            found = {v.name: v.paper for v in plan_sweep(cache, name).variants}[variant]
            assert found[family] == rows[method]
            assert tuple(found[family]) == METRICS
