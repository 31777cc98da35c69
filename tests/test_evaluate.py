"""What an evaluation leaves behind: files that agree with each other and with the ground truth read by zarr's own reader."""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import zarr

import pcd
from pcd.stages.evaluate import evaluate
from pcd.stages.inference import Patches, beliefs
from pcd.stages.runs import Run
from pcd.views import ViewPlan
from tests.runs_support import runs, toy_runs
from tests.test_cli import Command
from tests.test_cli import pcd as command

__all__ = ["command", "runs"]


@pytest.fixture(scope="module")
def folder(runs: list[Run]) -> Path:
    return evaluate(runs[0], protocols=["eigen", "pureclip"], boundary=True, device="cpu").folder


def document(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_the_same_scores_in_every_file(folder: Path) -> None:
    metrics = document(folder, "metrics.json")["protocols"]
    with (folder / "samples.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    table = parquet.read_table(folder / "samples.parquet").to_pylist()
    assert [row["key"] for row in rows] == [row["key"] for row in table]
    for label, scores in metrics.items():
        for name, value in scores["metrics"].items():
            own = [float(row[name]) for row in rows if row["protocol"] == label]
            assert np.mean(own) == pytest.approx(value)
            assert own == [row[name] for row in table if row["protocol"] == label]
            low, high = scores["intervals"][name]
            assert low <= value <= high
            assert min(own) <= low
            assert high <= max(own)
    assert "boundary_f1" in metrics["eigen"]["metrics"]
    assert "boundary_f1" not in metrics["pureclip"]["metrics"]


def test_tables_by_depth_and_the_analysis_count_every_pixel(folder: Path, runs: list[Run]) -> None:
    """Against the ground truth as zarr reads it."""
    stored = np.asarray(zarr.open_group(runs[0].info["cache"], mode="r")["test/depth/native"])
    depth = (stored[stored > 0] / 1000).astype(np.float32)  # as pcd holds it, or depths on an edge change sides
    counted = int(((depth > 0.1) & (depth < 10)).sum())
    scores, analysis = document(folder, "metrics.json")["protocols"]["eigen"], document(folder, "analysis.json")
    assert scores["pixels"] == counted
    assert sum(row["pixels"] for row in scores["by_depth"]) == counted
    assert np.sum(analysis["joint"]) == counted
    assert sum(row["pixels"] for row in analysis["by_depth"]) == counted
    edges = [row["low"] for row in scores["by_depth"]] + [10.0]
    assert [row["pixels"] for row in scores["by_depth"]] == np.histogram(depth, edges)[0].tolist()
    with (folder / "depths.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["protocol"] == "eigen"]
    assert [int(row["pixels"]) for row in rows] == [row["pixels"] for row in scores["by_depth"]]
    assert analysis["protocol"] == "eigen"
    assert analysis["uncertainty"]["patches"] == 5 * 32


def test_the_pooled_bias_is_the_same_by_either_binning(folder: Path) -> None:
    scores, analysis = document(folder, "metrics.json")["protocols"]["eigen"], document(folder, "analysis.json")
    first, second = (
        sum(row["pixels"] * row["bias"] for row in rows if row["pixels"]) for rows in (scores["by_depth"], analysis["by_depth"])
    )
    assert first == pytest.approx(second)


def test_one_image_alone_has_no_interval(tmp_path: Path) -> None:
    run = toy_runs(tmp_path, {"test": 1})[0]
    scores = evaluate(run, protocols=["eigen"], device="cpu").result["protocols"]["eigen"]
    assert scores["images"] == 1
    assert set(map(tuple, scores["intervals"].values())) == {(None, None)}


def test_uncertainty_of_both_views_is_that_of_their_mixture() -> None:
    """Against the moments of numbers drawn from an even mixture of the two; the mirrored view is turned back."""
    plan = ViewPlan(canvas=(1, 2))
    depth, std = torch.tensor([[[[2.0, 5.0]], [[7.0, 3.0]]]]).double(), torch.tensor([[[[0.5, 1.0]], [[0.2, 2.0]]]]).double()
    entropy = torch.tensor([[[[0.1, 0.2]], [[0.4, 0.6]]]]).double()
    found = beliefs(Patches(depth, std, entropy), plan, tta=True)
    assert found is not None
    generator = np.random.default_rng(0)
    for column, (first, second) in enumerate((((2.0, 0.5), (3.0, 2.0)), ((5.0, 1.0), (7.0, 0.2)))):
        drawn = np.concatenate([generator.normal(*view, 400_000) for view in (first, second)])
        assert found.depth[0, 0, column].item() == pytest.approx(drawn.mean(), rel=5e-3)
        assert found.std[0, 0, column].item() == pytest.approx(drawn.std(), rel=5e-3)
    assert found.entropy[0, 0].tolist() == pytest.approx([0.35, 0.3])
    alone = beliefs(Patches(depth, std, entropy), plan, tta=False)
    assert alone is not None
    torch.testing.assert_close(alone.std[0, 0], std[0, 0, 0])
    assert beliefs(Patches(depth), plan, tta=True) is None


def test_every_metric_from_its_own_epoch_keeps_its_interval(runs: list[Run]) -> None:
    result = evaluate(runs[0], protocols=["eigen"], checkpoint="each", device="cpu").result["protocols"]["eigen"]
    assert set(result["intervals"]) == set(result["metrics"]) == set(runs[0].best)
    for name, value in result["metrics"].items():
        assert result["intervals"][name][0] <= value <= result["intervals"][name][1]


def test_the_command_shows_intervals_and_boundaries(runs: list[Run], command: Command) -> None:
    code, out, err = command("evaluate", "--run", str(runs[0].root), "--protocol", "eigen", "--boundary", "--device", "cpu")
    assert code == 0, err
    scores = document(runs[0].root / "evaluations" / "test-abs_rel", "metrics.json")["protocols"]["eigen"]
    low, high = scores["intervals"]["abs_rel"]
    assert f"{scores['metrics']['abs_rel']:.4f} ({low:.3f} to {high:.3f})" in out
    assert "Boundary F1" in out
    assert "95 % bootstrap limits" in out


def test_no_module_hides_a_name_of_the_python_interface() -> None:
    for module in pkgutil.iter_modules(pcd.__path__):
        if module.name != "__main__":
            importlib.import_module(f"pcd.{module.name}")
    for name in pcd.__all__:
        assert name == "__version__" or callable(getattr(pcd, name))
