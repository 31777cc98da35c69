"""The validation of each epoch: what it scores, how it says so, and that nothing in it waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pcd.cache import Cache, Table
from pcd.errors import PredictionError, RecipeError, UsageError
from pcd.evaluation.held_scoring import held_bytes
from pcd.evaluation.scoring import Scorer
from pcd.heads.base import Head
from pcd.stages import validation as stage
from pcd.stages.inference import VIEWS_AT_ONCE, head_predictor, score
from pcd.stages.runs import Run, create_or_continue
from pcd.training.sources import HeldRows
from tests.runs_support import runs
from tests.test_extract import run as extracted
from tests.test_extract import toy_recipe
from tests.test_held_scoring import NoWaiting, assert_close

__all__ = ["runs"]

CPU = torch.device("cpu")


class Views(Head):
    """Depth from the mean of a patch's token and a number of its own; notes how many views it is given at once."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.scale = torch.nn.Parameter(torch.tensor(6.0))
        self.given: list[int] = []

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        assert not self.training
        tokens = columns["clip/patch"].float()
        self.given.append(len(tokens))
        return self.scale * tokens.mean(dim=-1).abs() + 0.5


class Watched:
    """Notes which rows are read."""

    def __init__(self, table: Table) -> None:
        self._source = HeldRows(table, ["clip/patch"], np.arange(table.samples * table.views), CPU)
        self.rows: list[int] = []

    def read(self, rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        self.rows += rows.tolist()
        return self._source.read(rows)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    dataset = {"test": 12, "broken": ["test-3"]}
    return extracted(tmp_path_factory.mktemp("toy") / "cache", toy_recipe(dataset=dataset), on_error="skip").cache


def open_stage(cache: Cache, folder: Path, protocol: str, **settings: Any) -> tuple[Run, list[str], Watched, stage.Validate]:
    """Validation on the test table, of which one of twelve samples was skipped."""
    made, _ = create_or_continue(folder, toy_recipe(train={"protocol": protocol, **settings}), cache)
    said: list[str] = []
    source = Watched(cache.table("test"))
    return made, said, source, stage.validation(made, cache.table("test"), source, CPU, said.append)


PLAIN = ("pureclip", "pureclip-paper", "pureclip[tta=no]", "pureclip[averaging=tile]", "pureclip[averaging=pixels]")


@pytest.mark.parametrize("protocol", PLAIN)
def test_a_head_gets_the_scores_it_would_get_map_by_map(cache: Cache, tmp_path: Path, protocol: str) -> None:
    made, said, source, validate = open_stage(cache, tmp_path, protocol)
    head, table = Views(made.grid), cache.table("test")
    assert len(said) == 1
    assert f"scored on cpu under {protocol}; ground truth" in said[0]
    scored = stage.validation_protocol(made.recipe, table)
    for scale in (6.0, 2.0):
        torch.nn.init.constant_(head.scale, scale)
        scorer = Scorer([scored], table.plan)
        score(head_predictor(head.eval(), table, source, made.grid), table, scorer, "depth")
        source.rows.clear()
        assert_close(validate(head.train()), scorer.scores[scored.label].means())
        assert source.rows == table.view_rows(table.usable(), flips=scored.tta).reshape(-1).tolist()
        assert len(source.rows) == 11 * (4 if scored.tta else 2)
    assert max(head.given) <= VIEWS_AT_ONCE


REFUSED = {
    "eigen": "eigen scores frames as stored",
    "pureclip[alignment=median]": "aligns each prediction",
    "pureclip[upsample=bilinear]": "needs every pixel",
}


@pytest.mark.parametrize("protocol", REFUSED)
def test_other_protocols_go_through_the_scorer_and_it_is_said(cache: Cache, tmp_path: Path, protocol: str) -> None:
    made, said, source, validate = open_stage(cache, tmp_path, protocol)
    assert len(said) == 1
    assert REFUSED[protocol] in said[0]
    assert "test: scored map by map in each epoch" in said[0]
    head, table = Views(made.grid), cache.table("test")
    scorer = Scorer([stage.validation_protocol(made.recipe, table)], table.plan)
    score(head_predictor(head.eval(), table, source, made.grid), table, scorer, "depth")
    assert_close(validate(head.train()), next(iter(scorer.scores.values())).means(), 0.0)


def test_ground_truth_that_does_not_fit_is_not_held(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cache.table("test")
    made, _, _, _ = open_stage(cache, tmp_path, "pureclip")
    size = held_bytes(stage.validation_protocol(made.recipe, table), table.plan, made.grid, 11)
    for free, fits in ((4 * size - 1, False), (4 * size, True)):
        monkeypatch.setattr(stage, "free_memory", lambda device, free=free: free)
        line = open_stage(cache, tmp_path, "pureclip")[1][0]
        assert ("25% of the memory free on cpu" in line) != fits


def test_an_epoch_of_validation_never_waits_for_the_device(cache: Cache, tmp_path: Path) -> None:
    made, _, _, validate = open_stage(cache, tmp_path, "pureclip")
    head = Views(made.grid)
    with NoWaiting():
        validate(head)


def test_without_mirrored_views_there_is_no_tta(tmp_path: Path) -> None:
    plain = extracted(tmp_path / "cache", toy_recipe(views={"flips": False})).cache
    made, said, source, validate = open_stage(plain, tmp_path / "run", "pureclip")
    assert "pureclip[tta=no]" in said[0]
    head, table = Views(made.grid), plain.table("test")
    scorer = Scorer([stage.validation_protocol(made.recipe, table)], table.plan)
    score(head_predictor(head.eval(), table, source, made.grid), table, scorer, "depth")
    assert_close(validate(head), scorer.scores["pureclip[tta=no]"].means())


def test_a_head_that_diverged_is_named_by_its_sample(cache: Cache, tmp_path: Path) -> None:
    """The fourth of the samples that were not skipped is the fifth of the table."""
    made, _, _, validate = open_stage(cache, tmp_path, "pureclip")
    table = cache.table("test")
    views = table.view_rows(table.usable()).reshape(-1)
    assert table.keys[table.usable()[3]] == "test-4"

    class Diverging(Views):
        def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
            depth = super().depth(columns)
            number = torch.arange(sum(self.given) - len(depth), sum(self.given))
            return torch.where((number == 4 * 3 + 1)[:, None], math.nan, depth)

    assert len(views) == 44
    with pytest.raises(PredictionError, match="test-4 is not finite"):
        validate(Diverging(made.grid))


def test_an_unknown_metric_is_refused_before_training(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown metric 'abs_rle'.*abs_rel"):
        open_stage(cache, tmp_path, "pureclip", monitor=["abs_rle"])
    with pytest.raises(UsageError, match="Unknown protocol"):
        open_stage(cache, tmp_path, "purclip")


def test_a_training_was_monitored_by_the_same_values(runs: list[Run]) -> None:
    """What the history says of the last epoch is what the scorer says of its weights, and what validation says again."""
    for made in runs:
        table = made.open_cache().table("val")
        head, epoch = made.load_head("last", CPU)
        source = HeldRows(table, ["clip/patch", "clip/cls"], np.arange(table.samples * table.views), CPU)
        scorer = Scorer([stage.validation_protocol(made.recipe, table)], table.plan)
        score(head_predictor(head, table, source, made.grid), table, scorer, "depth")
        expected = next(iter(scorer.scores.values())).means()
        assert_close(stage.validation(made, table, source, CPU, lambda line: None)(head), expected)
        monitored = made.history[epoch - 1]["metrics"]
        assert_close({name: monitored[name] for name in expected}, expected, 1e-6)
        assert set(made.recipe.train.monitor) <= set(expected)
