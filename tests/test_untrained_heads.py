"""Heads without phases: validated once, kept, finished; alone, side by side with others, and in what a person reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from pcd.cache import Cache
from pcd.cli import train as command
from pcd.errors import TrainingError
from pcd.heads.base import Context
from pcd.heads.mean import MeanHead
from pcd.heads.pureclip import PureClipHead
from pcd.recipe import Recipe, parse_recipe
from pcd.reports.curves import curves
from pcd.reports.figures import Curve, training
from pcd.stages.cluster_plan import _epochs_left
from pcd.stages.evaluate import evaluate
from pcd.stages.facts import facts_of
from pcd.stages.history import curves_title
from pcd.stages.runs import Run, open_run
from pcd.stages.sweep import sweep
from pcd.stages.sweep_plan import Variant, plan_sweep
from pcd.stages.train import prepare, train
from pcd.training import checkpoints
from pcd.training.loop import EpochReport, Loop
from pcd.training.rows import TrainingRows
from pcd.training.sources import Placed, StreamedRows
from pcd.training.together import run_together
from tests.sweep_support import toy_cache, weights, write_sweep
from tests.test_extract import toy_recipe
from tests.test_sweep import assert_same
from tests.test_training import CPU, make_loop
from tests.toy import Said


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


def recipe(head: str = "mean", **settings: Any) -> Recipe:
    own = {"mean": {}, "pureclip": {"table_init": "random", "embedding": {"steps": 2}, "depth": {"steps": 2}}}[head]
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] = {"name": head, "min_depth": 0.1, "max_depth": 10.0, **own}
    table["train"] = {"epochs": 3, "batch_size": 4, **settings}
    return parse_recipe(table, "test")


@pytest.fixture(scope="module", name="run")
def mean_run(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe(), cache, tmp_path_factory.mktemp("runs") / "mean", device="cpu")


def no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a batch was read")

    monkeypatch.setattr(TrainingRows, "read", refuse)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9, "joint": True, "decay": "onecycle", "switch_warmup": 3, "grad_clip": 1.0},
        {"batch_size": 64, "drop_last": True},
        {"patience": 1, "epochs": 1},
    ],
    ids=["plain", "every option", "no whole batch", "one epoch"],
)
def test_one_validation_and_no_batch(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    no_batches(monkeypatch)
    said, reports = Said(), list[EpochReport]()
    found = train(recipe(**settings), cache, tmp_path / "run", device="cpu", progress=said, on_epoch=reports.append)
    assert len(reports) == len(found.history) == 1
    report = reports[0]
    assert (report.epoch, report.step, report.losses, report.rates, report.rows_per_second) == (1, 0, {}, {}, 0)
    assert report.factor == 1.0
    assert report.improved
    assert found.is_finished
    assert said[-1] == f"{found.root}: a new run; 22 rows, nothing to train: the head is validated once"
    tensors = weights(found.root)
    assert set(tensors) == {"weights.metres"}
    best = found.best["abs_rel"]
    assert best == {"epoch": 1, "value": report.metrics["abs_rel"]}
    head, epoch = found.load_head("abs_rel", CPU)
    assert epoch == 1
    assert torch.equal(head.state_dict()["metres"], tensors["weights.metres"])


def test_it_is_complete_and_stays_so(cache: Cache, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    monkeypatch.setattr(MeanHead, "initialise", lambda *_: pytest.fail("made anew"))
    for again in (recipe(), recipe(epochs=40)):
        assert train(again, cache, run.root, resume=True, device="cpu", progress=said).history == run.history
        assert said[-1] == f"{run.root} is complete: epoch 1."
    assert open_run(run.root).is_finished
    variant = Variant("mean", (), recipe(), {})
    assert _epochs_left(variant, run.root) == 0
    loop = mean_loop(cache, run.checkpoints)
    assert loop.resume()
    assert (loop.finished, loop.epoch) == (True, 1)


def mean_loop(cache: Cache, folder: Path, *extra: nn.Parameter) -> Loop:
    """A loop around a mean head, with `extra` parameters."""
    made = recipe()
    head = MeanHead(MeanHead.Options(min_depth=0.1, max_depth=10.0), {"clip/patch": (16, 6)}, (4, 4))
    head.extra = nn.ParameterList(extra)
    return Loop(head, TrainingRows(cache.table("train"), made.train), made.train, frozenset(), lambda head: {}, folder)


def test_checkpoints_of_trained_heads_say_nothing_of_it(cache: Cache, run: Run, tmp_path: Path) -> None:
    trained = train(recipe("pureclip", epochs=1), cache, tmp_path, device="cpu")
    states = [checkpoints.read_state(each.checkpoints / checkpoints.LAST) for each in (trained, run)]
    assert states[1].keys() - states[0].keys() == {"untrained"}


def test_validation_that_is_interrupted_is_done_again(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MeanHead, "depth", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), cache, tmp_path / "run", device="cpu")
    assert train(recipe(), cache, tmp_path / "run", device="cpu").is_finished


def test_parameters_that_no_phase_trains_are_an_error(cache: Cache, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"embedding": {"steps": 0}, "depth": {"steps": 0}}
    with pytest.raises(TrainingError, match=r"nothing is trained: every phase has 0 steps .* has parameters to train"):
        make_loop(cache, tmp_path, 1, **nothing)
    assert not mean_loop(cache, tmp_path, nn.Parameter(torch.zeros(1), requires_grad=False)).trains
    with pytest.raises(TrainingError, match="nothing is trained"):
        mean_loop(cache, tmp_path, nn.Parameter(torch.zeros(1)))


def test_attach_comes_before_initialise_and_before_every_resumed_training(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    initialise = PureClipHead.initialise

    def attach(self: PureClipHead, context: Context) -> None:
        calls.append("attach")
        assert next(iter(context.batches())).targets["depth"].valid.any()

    def first(self: PureClipHead, context: Context) -> None:
        calls.append("initialise")
        initialise(self, context)

    monkeypatch.setattr(PureClipHead, "attach", attach)
    monkeypatch.setattr(PureClipHead, "initialise", first)
    train(recipe("pureclip", epochs=1), cache, tmp_path / "run", device="cpu")
    assert calls == ["attach", "initialise"]
    train(recipe("pureclip", epochs=2), cache, tmp_path / "run", device="cpu")
    assert calls == ["attach", "initialise", "attach"]
    found = evaluate(open_run(tmp_path / "run"), cache, protocols=["eigen"], device="cpu")
    assert found.metrics("eigen")
    assert calls == ["attach", "initialise", "attach"]


def side_by_side(cache: Cache, loops: list[Loop]) -> list[tuple[int, int]]:
    """Which loop finished which epoch."""
    seen: list[tuple[int, int]] = []
    columns = ("clip/patch", "clip/cls")
    placed = Placed(StreamedRows(cache.table("train"), columns, CPU), "")

    def on_error(loop: Loop, error: Exception) -> None:
        raise error

    run_together(loops, placed, lambda loop, report: seen.append((loops.index(loop), report.epoch)), on_error)
    return seen


def loop_of(cache: Cache, root: Path, head: str) -> Loop:
    loop = prepare(recipe(head), cache, root, device="cpu").loop
    assert loop is not None
    return loop


def test_side_by_side_each_is_as_if_alone(cache: Cache, run: Run, tmp_path: Path) -> None:
    loops = [loop_of(cache, tmp_path / name, head) for name, head in (("a", "mean"), ("b", "pureclip"), ("c", "mean"))]
    assert side_by_side(cache, loops) == [(0, 1), (1, 1), (2, 1), (1, 2), (1, 3)]
    train(recipe("pureclip"), cache, tmp_path / "alone", device="cpu")
    assert_same(tmp_path / "b", tmp_path / "alone")
    assert torch.equal(weights(tmp_path / "a")["weights.metres"], weights(run.root)["weights.metres"])
    assert open_run(tmp_path / "c").is_finished


def test_side_by_side_without_any_to_train_nothing_is_read(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [loop_of(cache, tmp_path / name, "mean") for name in "ab"]
    no_batches(monkeypatch)
    assert side_by_side(cache, loops) == [(0, 1), (1, 1)]


BOTH = """
set = { "train.epochs" = 2, "train.batch_size" = 4 }
[variants.trained]
head.table_init = "random"
head.min_depth = 0.1
head.embedding.steps = 2
head.depth.steps = 2
[variants.constant]
head = { name = "mean", min_depth = 0.1, max_depth = 10.0 }
"""


def test_a_sweep_of_both_kinds(cache: Cache, tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "both.toml", BOTH)
    plan = plan_sweep(cache, file, seeds=[0, 1], overrides=['evaluate.protocols=["eigen"]'])
    found = sweep(plan, cache, tmp_path / "out", device="cpu")
    assert found.failures == []
    for seed in (0, 1):
        runs = [open_run(tmp_path / "out" / name / f"seed-{seed}") for name in ("trained", "constant")]
        assert [len(each.history) for each in runs] == [2, 1]
        assert (runs[1].root / "evaluations" / "test-abs_rel" / "metrics.json").is_file()
    before = (tmp_path / "out" / "constant" / "seed-1" / "checkpoints" / "last.safetensors").stat().st_mtime_ns
    assert sweep(plan, cache, tmp_path / "out", device="cpu").failures == []
    assert (tmp_path / "out" / "constant" / "seed-1" / "checkpoints" / "last.safetensors").stat().st_mtime_ns == before


def test_curves_facts_and_titles_say_so(cache: Cache, run: Run) -> None:
    figure = curves(run.history, curves_title(run, run.history))
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.axison]
    assert [title.partition(":")[0] for title in titles] == ["val AbsRel", "val RMSE", "val δ < 1.25"]
    assert "\nnothing to train, seed 0, validation protocol pureclip; random encoder weights" in figure.get_suptitle()
    document = {"split": "test", "cache": "x", "samples": 5, "skipped": 0, "epoch": 1, "checkpoint": "abs_rel", "weights": "0"}
    assert dict(facts_of(run, cache, document))["training"] == "nothing to train"
    losses, error, _ = training([Curve("mean", "#000000", run.history)]).axes
    assert losses.get_title(loc="left") == "nothing to train"
    assert len(error.get_lines()) == 2


def test_the_line_of_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report = EpochReport(**run.history[0])
    file = io.StringIO()
    monkeypatch.setattr(command, "errors", Console(file=file, width=80, highlight=False))
    lines = command.EpochLines(200)
    lines(report)
    lines(report, "mean", 200)
    metrics = "  ".join(f"{name} {report.metrics[name]:#.4g}" for name in ("abs_rel", "rmse", "delta1"))
    assert file.getvalue().splitlines() == [f"nothing to train | {metrics}", f"mean: nothing to train | {metrics}"]
