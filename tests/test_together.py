"""Trainings side by side: each as if alone, one read for all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pcd.cache import Cache
from pcd.errors import PcdError, TrainingError
from pcd.heads.base import Batch
from pcd.heads.pureclip import PureClipHead
from pcd.stages import validation
from pcd.stages.recipes import training_recipe
from pcd.stages.sweep import sweep
from pcd.stages.sweep_plan import plan_sweep
from pcd.stages.train import prepare, train
from pcd.training.loop import EpochReport, Loop
from pcd.training.sources import Placed, StreamedRows
from pcd.training.together import run_together
from tests.sweep_support import SHORT, cls_plan, toy_cache, weights
from tests.test_sweep import assert_same, count_reads
from tests.test_training import COLUMNS, CPU


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


def loop_of(cache: Cache, root: Path, *changes: str) -> Loop:
    loop = prepare(training_recipe(cache, None, [*SHORT, *changes]), cache, root, device="cpu").loop
    assert loop is not None
    return loop


def together(cache: Cache, loops: list[Loop]) -> tuple[list[tuple[int, int]], list[str]]:
    """Train; which loop finished which epoch, and errors."""
    epochs: list[tuple[int, int]] = []
    errors: list[str] = []

    def on_epoch(loop: Loop, report: EpochReport) -> None:
        epochs.append((loops.index(loop), report.epoch))

    def on_error(loop: Loop, error: PcdError) -> None:
        errors.append(f"{loops.index(loop)}: {error}")

    run_together(loops, Placed(StreamedRows(cache.table("train"), COLUMNS, CPU), ""), on_epoch, on_error)
    return epochs, errors


def test_each_is_as_if_alone_though_they_end_at_different_epochs(cache: Cache, tmp_path: Path) -> None:
    changes = [("train.epochs=2",), ("head.dropout=0.5",), ("head.cls=false", "train.epochs=4", "train.ema=0.5")]
    loops = [loop_of(cache, tmp_path / f"own-{number}", *change) for number, change in enumerate(changes)]
    epochs, errors = together(cache, loops)
    assert errors == []
    assert epochs == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (1, 3), (2, 3), (2, 4)]
    for number, change in enumerate(changes):
        train(training_recipe(cache, None, [*SHORT, *change]), cache, tmp_path / f"alone-{number}", device="cpu")
        assert_same(tmp_path / f"own-{number}", tmp_path / f"alone-{number}")


def test_one_that_was_interrupted_earlier_catches_up(cache: Cache, tmp_path: Path) -> None:
    ahead = loop_of(cache, tmp_path / "ahead")
    ahead.begin()
    with ahead.randomness():
        for batch in ahead.rows.epoch(0):
            ahead.learn(batch)
    ahead.end()
    epochs, _ = together(cache, [loop_of(cache, tmp_path / "ahead"), loop_of(cache, tmp_path / "late")])
    assert epochs == [(1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    assert_same(tmp_path / "ahead", tmp_path / "late")


def test_one_that_breaks_in_the_middle_leaves_the_others_alone(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second epoch gives a loss that is no number; then an error in the midst of a step."""
    loops = [loop_of(cache, tmp_path / str(number)) for number in range(4)]
    losses = PureClipHead.losses

    def spoiled(self: PureClipHead, batch: Batch, phase: str) -> dict[str, torch.Tensor]:
        found = losses(self, batch, phase)
        if self is loops[1].head and loops[1].epoch == 1:
            return {name: value * math.nan for name, value in found.items()}
        if self is loops[2].head and loops[2].step == 3:
            raise TrainingError("no more")
        return found

    monkeypatch.setattr(PureClipHead, "losses", spoiled)
    epochs, errors = together(cache, loops)
    assert errors[0] == "2: no more"
    assert errors[1].startswith("1: epoch 2: the mean of ")
    assert [number for number, _ in epochs] == [0, 1, 3, 0, 3, 0, 3]
    monkeypatch.undo()
    train(training_recipe(cache, None, SHORT), cache, tmp_path / "alone", device="cpu")
    assert_same(tmp_path / "0", tmp_path / "alone")
    assert_same(tmp_path / "3", tmp_path / "alone")
    kept = weights(tmp_path / "1")
    assert all(value.isfinite().all() for value in kept.values()), "the last good checkpoint stays"


def test_an_epoch_reports_the_means_over_its_steps(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each phase over the steps that were its turn, and the rates of the phases with the decay of that epoch."""
    seen: dict[str, list[float]] = {}
    losses = PureClipHead.losses

    def noted(self: PureClipHead, batch: Batch, phase: str) -> dict[str, torch.Tensor]:
        found = losses(self, batch, phase)
        for name, value in found.items():
            seen.setdefault(f"{phase}/{name}", []).append(value.item())
        return found

    monkeypatch.setattr(PureClipHead, "losses", noted)
    reports: list[EpochReport] = []
    loop = loop_of(cache, tmp_path / "run", "train.epochs=1", "train.decay=cosine", "head.depth.lr=0.5")
    loop.run(reports.append)
    assert (
        reports[0].losses.keys()
        == seen.keys()
        == {f"embedding/{n}" for n in ("total", "alignment", "info_nce")} | {"depth/total"}
    )
    assert len(seen["embedding/total"]) + len(seen["depth/total"]) == reports[0].step
    for name, values in seen.items():
        assert reports[0].losses[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert reports[0].rates == {"embedding": 3e-4, "depth": 0.5}


def test_a_sweep_that_streams_reads_every_batch_once_for_all_variants(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cls_plan(cache, tmp_path, seeds=[0], text="[variants.dry]\nhead.dropout = 0.0\n")
    prepared, make = [], validation._prepared

    def counted(*options: Any) -> Any:
        prepared.append(options)
        return make(*options)

    monkeypatch.setattr(validation, "_prepared", counted)
    streamed = plan_sweep(cache, str(tmp_path / "toy-cls.toml"), seeds=[0], overrides=[*SHORT, "train.residency=stream"])
    sweep(plan, cache, tmp_path / "held", device="cpu")
    seen = count_reads(monkeypatch)
    sweep(streamed, cache, tmp_path / "streamed", device="cpu")
    for column in ("clip/patch", "clip/cls"):
        assert {count for (name, _), count in seen.items() if name == f"train/{column}"} == {3}, "three epochs"
    assert len(prepared) == 2, "ground truth of validation, once in each of the sweeps"
    for variant in ("with", "without", "dry"):
        assert_same(tmp_path / "held" / variant / "seed-0", tmp_path / "streamed" / variant / "seed-0")
