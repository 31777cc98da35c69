"""Learning rates in stairs and over one cycle: against torch's schedulers, through interruptions, and in recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pcd.cache import Cache
from pcd.errors import RecipeError, RunError
from pcd.fingerprint import digest
from pcd.recipe import OneCycle, Recipe, parse_recipe
from pcd.recipe_files import load_recipe
from pcd.stages.runs import open_run
from pcd.stages.train import train
from pcd.training.schedule import one_cycle, stairs
from tests.test_extract import run, toy_recipe
from tests.test_training import make_rows
from tests.training_support import interrupted, phase, plain_loop, rates_of, same, state

STEPS = 6
"""An epoch of the toy cache in batches of 4."""


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def torch_rates(steps: int, rate: float, **options: Any) -> list[float]:
    """What torch's OneCycleLR sets for each step."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, cycle_momentum=False, **options)
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(found) < steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("steps", [2, 7, 10, 60, 997])
@pytest.mark.parametrize(
    "shape",
    [
        {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 100.0},
        {"pct_start": 0.0, "div_factor": 10.0, "final_div_factor": 1e4},
        {"pct_start": 0.51, "div_factor": 1.0, "final_div_factor": 2.0},
        {"pct_start": 1.0, "div_factor": 3.0, "final_div_factor": 1.0},
    ],
    ids=["default", "down only", "from full", "up only"],
)
def test_one_cycle_against_torch(steps: int, shape: dict[str, float]) -> None:
    found = [0.02 * one_cycle(step, steps, OneCycle(**shape)) for step in range(steps)]
    assert found == pytest.approx(torch_rates(steps, 0.02, anneal_strategy="cos", **shape), rel=1e-9)


def test_one_cycle_where_torch_divides_by_zero_and_beyond_its_end() -> None:
    """10 steps, a tenth of them rising: the first step is the top. Later steps stay where it ends."""
    shape = OneCycle(pct_start=0.1, div_factor=10.0, final_div_factor=5.0)
    found = [one_cycle(step, 10, shape) for step in range(14)]
    assert found[0] == 1.0
    assert found[:10] == sorted(found[:10], reverse=True)
    assert found[9:] == pytest.approx([0.02] * 5)
    assert one_cycle(0, 1, shape) == pytest.approx(0.02)
    assert [one_cycle(step, 4, OneCycle(pct_start=1.0)) for step in (3, 4, 9)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("length", "factor"), [(1, 0.5), (3, 0.1), (4, 1.0), (50, 0.1)])
def test_stairs_against_torch(length: int, factor: float) -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, length, gamma=factor)
    for epoch in range(20):
        assert 0.02 * stairs(epoch, length, factor) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        optimiser.step()
        scheduler.step()


def test_the_loop_steps_down_by_epochs(cache: Cache, tmp_path: Path) -> None:
    loop = plain_loop(cache, tmp_path, [phase("depth", 0.4)], 5, decay="step", decay_step=2, decay_factor=0.5)
    assert [rate for _, rate in rates_of(loop)] == pytest.approx([0.4] * 12 + [0.2] * 12 + [0.1] * 6)
    assert [entry["rates"]["depth"] for entry in loop.history] == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1])


def test_the_loop_follows_one_cycle_step_by_step(cache: Cache, tmp_path: Path) -> None:
    """Of whichever phase a step is, it is at its place in the cycle; a warm-up of switches comes on top."""
    phases = [phase("embedding", 1.0), phase("depth", 0.1, optimiser="sgd", momentum=0.9)]
    loop = plain_loop(cache, tmp_path / "a", phases, 4, decay="onecycle")
    expected = torch_rates(4 * STEPS, 1.0, pct_start=0.3, div_factor=25.0, final_div_factor=100.0)
    turns = [("embedding", 1.0), ("embedding", 1.0), ("depth", 0.1), ("depth", 0.1)] * 6
    seen = rates_of(loop)
    assert [name for name, _ in seen] == [name for name, _ in turns]
    assert [rate for _, rate in seen] == pytest.approx([rate * at for (_, rate), at in zip(turns, expected, strict=True)])
    ends = [expected[STEPS * epoch + STEPS - 1] for epoch in range(4)]
    assert [entry["factor"] for entry in loop.history] == pytest.approx(ends), "at the end of the epoch"
    assert [entry["rates"]["depth"] for entry in loop.history] == pytest.approx([0.1 * end for end in ends])
    groups = [optimiser.param_groups[0] for optimiser in loop._optimisers.values()]
    assert (groups[0]["betas"], groups[1]["momentum"]) == ((0.9, 0.999), 0.9), "momentum is not cycled"
    warmed = rates_of(plain_loop(cache, tmp_path / "b", phases, 4, decay="onecycle", switch_warmup=2))
    assert [rate for _, rate in warmed] == pytest.approx([rate * (0.5, 1)[at % 2] for at, (_, rate) in enumerate(seen)])


def test_one_cycle_of_fewer_epochs_stays_at_its_end(cache: Cache, tmp_path: Path) -> None:
    shape = {"pct_start": 0.5, "div_factor": 4.0, "final_div_factor": 10.0}
    loop = plain_loop(cache, tmp_path, [phase("depth", 1.0)], 4, decay="onecycle", decay_epochs=2, onecycle=OneCycle(**shape))
    assert [rate for _, rate in rates_of(loop)] == pytest.approx(torch_rates(2 * STEPS, 1.0, **shape) + [0.025] * 12)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("tiles", ["all", "random"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_steps_of_an_epoch_are_counted_without_drawing_its_order(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, flips: bool, tiles: str, drop_last: bool
) -> None:
    rows = make_rows(cache, batch_size=4, flips=flips, tiles=tiles, drop_last=drop_last)
    batches = [len(batch.columns["clip/cls"]) for batch in rows.epoch(0)]
    assert sum(batches) == len(rows.order(0)) - (len(rows.order(0)) % 4 if drop_last else 0)
    monkeypatch.setattr(rows, "order", lambda epoch: pytest.fail("drawn"))
    assert rows.steps() == len(batches)


@pytest.mark.parametrize("decay", [{"decay": "onecycle"}, {"decay": "step", "decay_step": 1, "decay_factor": 0.5}])
def test_resumed_is_uninterrupted(cache: Cache, tmp_path: Path, decay: dict[str, Any]) -> None:
    phases = [phase("embedding"), phase("depth", 0.01, optimiser="sgd", momentum=0.9)]
    first, second = (plain_loop(cache, tmp_path / name, phases, 5, **decay) for name in "ab")
    whole = rates_of(first)
    interrupted(second, 3)
    resumed = plain_loop(cache, tmp_path / "b", phases, 5, **decay)
    assert resumed.resume()
    assert rates_of(resumed) == whole[3 * STEPS :]
    assert same(state(resumed), state(first))
    assert [entry["factor"] for entry in resumed.history] == [entry["factor"] for entry in first.history]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.decay=step"], 'decay = "step" needs decay_step'),
        (["train.decay_step=3"], 'decay_step belongs to decay = "step"'),
        (["train.decay=cosine", "train.decay_factor=0.3"], 'decay_factor belongs to decay = "step"'),
        (["train.decay=step", "train.decay_step=3", "train.decay_epochs=3"], 'belongs to decay = "cosine" or "onecycle"'),
        (["train.onecycle.pct_start=0.2"], 'onecycle belongs to decay = "onecycle"'),
        (["train.decay=onecycle", "train.onecycle.pct_start=1.2"], "less than or equal to 1"),
        (["train.decay=onecycle", "train.onecycle.div_factor=0.5"], "greater than or equal to 1"),
        (["train.decay=onecycle", "train.onecycle.pct_strat=0.2"], "Did you mean 'pct_start'"),
        (["train.decay=step", "train.decay_step=0"], "greater than 0"),
        (["train.decay=step", "train.decay_step=2", "train.decay_factor=0.0"], "greater than 0"),
    ],
)
def test_impossible_values_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("nyu", overrides)
    assert words in str(error.value)
    assert f"--set {overrides[-1]}" in str(error.value)


def test_what_is_absent_is_written_down() -> None:
    found = load_recipe("nyu", ["train.decay=onecycle", "train.epochs=9"])
    assert (found.train.decay_epochs, found.train.onecycle) == (9, OneCycle(pct_start=0.3, div_factor=25, final_div_factor=100))
    assert parse_recipe(found.model_dump(), "again") == found
    steps = load_recipe("nyu", ["train.decay=step", "train.decay_step=4"]).train
    assert (steps.decay_step, steps.decay_factor, steps.decay_epochs) == (4, 0.1, None)


OLD = {
    *("epochs", "batch_size", "drop_last", "seed", "tiles", "flips", "patience", "decay_start", "decay_floor", "decay"),
    *("decay_epochs", "switch_warmup", "grad_clip", "ema", "joint", "monitor", "protocol", "precision", "residency"),
}
"""Keys of `[train]` before there were stairs and cycles."""


def test_recipes_without_them_are_digested_as_before() -> None:
    for overrides in ([], ["train.decay=cosine"]):
        assert set(load_recipe("nyu", overrides).train.model_dump(mode="json")) == OLD
    dump = load_recipe("demo", ["train.decay=step", "train.decay_step=2"]).train.model_dump()
    assert set(dump) == OLD | {"decay_step", "decay_factor"}
    assert digest(load_recipe("nyu").train.model_dump(mode="json")) != digest(dump)


def recipe(**train_: Any) -> Recipe:
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] |= {"table_init": "random", "embedding": {"steps": 3}, "depth": {"steps": 3}}
    table["train"] = {"epochs": 2, "batch_size": 4, **train_}
    return parse_recipe(table, "test")


def test_a_run_of_before_goes_on_and_no_other_curve_takes_its_place(cache: Cache, tmp_path: Path) -> None:
    trained = train(recipe(), cache, tmp_path / "run", device="cpu")
    text = (trained.root / "recipe.toml").read_text()
    assert not any(key in text for key in ("decay_step", "decay_factor", "onecycle"))
    assert len(train(recipe(epochs=3), cache, trained.root, device="cpu").history) == 3
    with pytest.raises(RunError, match=r"train\.decay: found 'plateau', wanted 'step'"):
        train(recipe(epochs=3, decay="step", decay_step=1), cache, trained.root, device="cpu")


def test_a_cycle_is_not_bent_when_a_run_goes_on(cache: Cache, tmp_path: Path) -> None:
    trained = train(recipe(decay="onecycle"), cache, tmp_path / "run", device="cpu")
    assert open_run(trained.root).recipe.train.decay_epochs == 2
    with pytest.raises(RunError, match=r"train\.decay_epochs: found 2, wanted 4"):
        train(recipe(decay="onecycle", epochs=4), cache, trained.root, device="cpu")
    with pytest.raises(RunError, match=r"train\.onecycle\.pct_start: found 0\.3, wanted 0\.4"):
        train(recipe(decay="onecycle", onecycle={"pct_start": 0.4}), cache, trained.root, device="cpu")
    longer = train(recipe(decay="onecycle", epochs=3, decay_epochs=2), cache, trained.root, device="cpu")
    end = 1 / 25 / 100
    assert [entry["factor"] for entry in longer.history][1:] == pytest.approx([end, end])
    assert math.isclose(longer.history[0]["factor"], one_cycle(STEPS - 1, 2 * STEPS, OneCycle()))
