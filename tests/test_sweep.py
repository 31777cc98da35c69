"""A sweep: one read, runs as they would be alone, and going on after an interruption or an error."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcd.cache import Cache
from pcd.cache.column import Column
from pcd.errors import RunError, UsageError
from pcd.stages.extract import extract
from pcd.stages.reading import SharedReading
from pcd.stages.recipes import training_recipe
from pcd.stages.sweep import default_sweep_folder, sweep
from pcd.stages.sweep_files import find_sweep, known_sweeps
from pcd.stages.sweep_plan import plan_sweep
from pcd.stages.train import train
from pcd.training.loop import EpochReport
from pcd.training.sources import HeldRows, StreamedRows
from tests.sweep_support import SHORT, cls_plan, toy_cache, weights
from tests.test_extract import toy_recipe
from tests.toy import Said


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


class Stop(BaseException):
    """Somebody pressed Ctrl-C."""


class Epochs(list[int]):
    """Collects the epochs that are trained; raises `Stop` after so many."""

    def __init__(self, until: int = 10**6) -> None:
        super().__init__()
        self.until = until

    def __call__(self, report: EpochReport) -> None:
        self.append(report.epoch)
        if len(self) == self.until:
            raise Stop


def count_reads(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[tuple[str, int]]:
    """How often each row of each column is read from disk; columns are told apart by table and name."""
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    read = Column.read

    def counted(self: Column, rows: Any, out: Any = None) -> Any:
        seen.update((f"{self.table}/{self.spec.name}", int(row)) for row in rows)
        return read(self, rows, out)

    monkeypatch.setattr(Column, "read", counted)
    return seen


def assert_same(first: Path, second: Path) -> None:
    """The last checkpoints agree in every bit of weights and moments."""
    own, other = weights(first), weights(second)
    assert own.keys() == other.keys()
    assert any(name.startswith("optimiser.") for name in own)
    for name, value in own.items():
        assert torch.equal(value, other[name]), name


def test_every_row_of_a_column_is_read_once_for_all_runs(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cls_plan(cache, tmp_path, seeds=[0], text="[variants.mirrored]\ntrain.flips = true\n")
    seen = count_reads(monkeypatch)
    sweep(plan, cache, tmp_path / "out", device="cpu")
    for table, rows in (("train", 11 * 4), ("val", 4)):  # 2 tiles x mirrored or not: one variant looks at mirrored views
        for column in ("clip/patch", "clip/cls"):
            counts = [count for (name, _), count in seen.items() if name == f"{table}/{column}"]
            assert counts == [1] * rows, f"{table}/{column}"


def test_runs_are_what_train_makes_of_the_same_recipe(cache: Cache, tmp_path: Path) -> None:
    done = sweep(cls_plan(cache, tmp_path), cache, tmp_path / "out", device="cpu")
    assert done.failures == []
    for variant, changes in (("with", []), ("without", ["head.cls=false"])):
        for seed in (0, 1):
            own, alone = tmp_path / "out" / variant / f"seed-{seed}", tmp_path / "alone" / variant / f"seed-{seed}"
            train(training_recipe(cache, None, [*SHORT, *changes, f"train.seed={seed}"]), cache, alone, device="cpu")
            assert_same(own, alone)
            assert (own / "recipe.toml").read_text() == (alone / "recipe.toml").read_text()
            made = {str(path.relative_to(alone)) for path in alone.rglob("*")}
            extra = {str(path.relative_to(own)) for path in own.rglob("*")} - made
            assert all(name.startswith("evaluations") for name in extra)
    first, second = (weights(tmp_path / "out" / "with" / f"seed-{seed}") for seed in (0, 1))
    assert not torch.equal(first["weights.table"], second["weights.table"])


def test_variants_whose_rows_have_another_order_are_what_they_are_alone(cache: Cache, tmp_path: Path) -> None:
    changes = {"mirrored": "train.flips=true", "small": "train.batch_size=3", "drawn": "train.tiles=random"}
    tables = "".join(f"[variants.{name}]\n{change}\n" for name, change in changes.items()).replace("random", '"random"')
    assert sweep(cls_plan(cache, tmp_path, seeds=[1], text=tables), cache, tmp_path / "out", device="cpu").failures == []
    for name, change in changes.items():
        train(training_recipe(cache, None, [*SHORT, change, "train.seed=1"]), cache, tmp_path / name, device="cpu")
        assert_same(tmp_path / "out" / name / "seed-1", tmp_path / name)


def test_an_interrupted_sweep_goes_on_where_it_was(cache: Cache, tmp_path: Path) -> None:
    plan, root = cls_plan(cache, tmp_path), tmp_path / "out"
    first = Epochs(until=5)
    with pytest.raises(Stop):
        sweep(plan, cache, root, device="cpu", on_epoch=first)
    finished = root / "with" / "seed-0" / "checkpoints" / "last.safetensors"
    before = finished.stat().st_mtime_ns
    second = Epochs()
    done = sweep(plan, cache, root, device="cpu", on_epoch=second)
    assert first == [1, 1, 2, 2, 3]  # side by side
    assert second == [3, 1, 1, 2, 2, 3, 3]
    assert finished.stat().st_mtime_ns == before
    sweep(plan, cache, tmp_path / "whole", device="cpu")
    for folder in ("with/seed-0", "with/seed-1", "without/seed-0", "without/seed-1"):
        assert_same(root / folder, tmp_path / "whole" / folder)
    third = Epochs()
    again = sweep(plan, cache, root, device="cpu", on_epoch=third)
    assert third == []
    assert again.document == done.document


def test_more_seeds_train_only_those(cache: Cache, tmp_path: Path) -> None:
    sweep(cls_plan(cache, tmp_path, seeds=[0]), cache, tmp_path / "out", device="cpu")
    epochs = Epochs()
    done = sweep(cls_plan(cache, tmp_path, seeds=[0, 3]), cache, tmp_path / "out", device="cpu", on_epoch=epochs)
    assert epochs == [1, 1, 2, 2, 3, 3]
    assert [run["seed"] for run in done.document["variants"][1]["runs"]] == [0, 3]


def test_an_error_in_a_variant_does_not_stop_the_others(cache: Cache, tmp_path: Path) -> None:
    nothing = "[variants.blind.targets]\nembedding.min_mean = 99.0\ndepth.min_mean = 99.0\n"
    plan = cls_plan(cache, tmp_path, text=nothing + "[variants.last]\nhead.dropout = 0.0\n")
    done = sweep(plan, cache, tmp_path / "out", device="cpu")
    assert [(item["variant"], item["seed"], item["error"]) for item in done.failures] == [
        ("blind", 0, "TrainingError"),
        ("blind", 1, "TrainingError"),
    ]
    assert "no training patch has valid depth" in done.failures[0]["message"]
    variants = {variant["name"]: variant for variant in done.document["variants"]}
    assert [len(variants[name]["runs"]) for name in ("with", "without", "blind", "last")] == [2, 2, 0, 2]
    assert variants["blind"]["summary"]["rmse"]["mean"] is None
    assert variants["last"]["differences"].keys() == {"abs_rel", "rmse", "log10", "delta1", "delta2", "delta3"}
    assert "failed: blind, seed 1: no training patch" in (tmp_path / "out" / "sweep.md").read_text()


def test_without_its_reference_a_sweep_has_scores_and_no_differences(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[variants.first]\ntargets.embedding.min_mean = 99.0\ntargets.depth.min_mean = 99.0\n[variants.second]\n")
    plan = plan_sweep(cache, str(file), seeds=[0], overrides=SHORT)
    done = sweep(plan, cache, tmp_path / "out", device="cpu")
    assert done.document["variants"][1]["differences"] == {}
    assert done.document["variants"][1]["summary"]["rmse"]["mean"] > 0


def test_columns_that_do_not_fit_stream_to_the_same_weights(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, said = cls_plan(cache, tmp_path, seeds=[0]), Said()
    sweep(plan, cache, tmp_path / "held", device="cpu", progress=said)
    assert any("held in memory" in line for line in said)
    monkeypatch.setattr("pcd.training.sources.SHARE_OF_MEMORY", 0.0)
    monkeypatch.setattr(HeldRows, "__init__", None)
    streamed: list[str] = []
    made = StreamedRows.__init__

    def watched(self: StreamedRows, table: Any, columns: Any, device: Any) -> None:
        streamed.append(table.name)
        made(self, table, columns, device)

    monkeypatch.setattr(StreamedRows, "__init__", watched)
    said.clear()
    sweep(plan, cache, tmp_path / "streamed", device="cpu", progress=said)
    assert {"train", "val"} <= set(streamed)
    assert any("read from the cache batch by batch" in line for line in said)
    assert_same(tmp_path / "held" / "with" / "seed-0", tmp_path / "streamed" / "with" / "seed-0")


def test_what_does_not_apply_is_refused_before_any_training(cache: Cache, tmp_path: Path) -> None:
    plan, epochs = cls_plan(cache, tmp_path, seeds=[0]), Epochs()
    with pytest.raises(UsageError, match="not each"):
        sweep(plan, cache, tmp_path / "out", device="cpu", checkpoint="each", on_epoch=epochs)
    with pytest.raises(UsageError, match="egien"):
        sweep(plan, cache, tmp_path / "out", device="cpu", protocols=["egien"], on_epoch=epochs)
    with pytest.raises(UsageError, match="eigen-kitti"):
        sweep(plan, cache, tmp_path / "out", device="cpu", protocols=["eigen-kitti-garg-kb"], on_epoch=epochs)
    assert epochs == []
    sweep(plan, cache, tmp_path / "out", device="cpu")
    other = plan_sweep(cache, str(tmp_path / "toy-cls.toml"), seeds=[0], overrides=[*SHORT, "head.dropout=0.3"])
    with pytest.raises(RunError, match=r"holds another sweep.*--out"):
        sweep(other, cache, tmp_path / "out", device="cpu")
    assert default_sweep_folder(other, cache) != default_sweep_folder(plan, cache)
    more = plan_sweep(cache, str(tmp_path / "toy-cls.toml"), seeds=[0, 1], overrides=[*SHORT, "train.epochs=9"])
    assert default_sweep_folder(more, cache) == default_sweep_folder(plan, cache)  # more of the same


def test_rows_that_nobody_foresaw_are_read_for_themselves(cache: Cache) -> None:
    table = cache.table("train")
    reading = SharedReading({"train": np.array([0, 1])})
    for rows in (np.array([1, 0]), np.array([8, 1])):
        source = reading.columns(table, ("clip/cls",), rows, "host", torch.device("cpu")).source
        np.testing.assert_array_equal(source.read(rows)["clip/cls"], table.column("clip/cls").read(rows))


def alone(name: str) -> bool:
    """Whether a sweep that comes with pcd needs one encoder without layers; the others: test_layers.py, test_prior_art.py."""
    path = find_sweep(name)
    return path is not None and path.parent.name == "ablations" and name != "layers"


@pytest.mark.parametrize("name", sorted(each for each in known_sweeps() if alone(each)))
def test_every_variant_that_comes_with_pcd_trains(cache: Cache, tmp_path: Path, name: str) -> None:
    needed = [toy_recipe(head={**toy_recipe().head, **prompt}) for prompt in _prompts(cache, name)]
    extract(toy_recipe(), cache.root, device="cpu", also=needed)
    overrides = ["head.min_depth=0.1", "train.epochs=1", 'evaluate.protocols=["eigen"]']
    plan = plan_sweep(cache, name, seeds=[0], overrides=overrides)
    done = sweep(plan, cache, tmp_path / "out", device="cpu")
    assert done.failures == []
    assert all(variant["same_as"] is None and len(variant["runs"]) == 1 for variant in done.document["variants"])


def _prompts(cache: Cache, name: str) -> list[dict[str, str]]:
    """The prompts of a sweep's variants as entries of a `[head]` table."""
    variants = plan_sweep(cache, name, seeds=[0]).variants
    return [{"prompt": variant.recipe.head["prompt"]} for variant in variants if "prompt" in variant.recipe.head]
