"""The table of a sweep, recomputed by hand from what the runs left, and the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcd import cli
from pcd.cache import Cache
from pcd.stages.sweep import Sweep, sweep
from pcd.stages.sweep_plan import Printed, plan_sweep
from pcd.stages.sweep_table import FILES, markdown, remarks
from tests.sweep_support import METRICS, SHORT, image_scores, toy_cache, write_sweep

LABEL = "eigen"
SWEEP = """
[paper]
source = "a table"
metres_per_unit = { generic = 2.5 }
notes = { generic = "made up" }
[variants.with]
paper.generic = { rmse = 1.0, delta1 = 0.6 }
[variants.without]
head.cls = false
paper.generic = { rmse = 1.4, delta1 = 0.5 }
[variants.deep]
head.hidden = 1
[variants.again]
head.cls = true
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def done(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("sweep")
    plan = plan_sweep(cache, write_sweep(folder / "four.toml", SWEEP), seeds=[0, 1, 2], overrides=SHORT)
    return sweep(plan, cache, folder / "out", device="cpu")


def runs_of(done: Sweep, variant: str) -> list[Path]:
    return [done.root / variant / f"seed-{seed}" for seed in (0, 1, 2)]


def by_seed(done: Sweep, variant: str, metric: str) -> list[float]:
    """The mean over images of each seed's run."""
    return [
        sum(scores.values()) / len(scores) for run in runs_of(done, variant) for scores in [image_scores(run, LABEL, metric)]
    ]


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def differences_by_image(done: Sweep, variant: str, metric: str) -> list[float]:
    """Of each image, the mean score over seeds minus that of the first variant."""
    sides = [[image_scores(run, LABEL, metric) for run in runs_of(done, name)] for name in (variant, "with")]
    keys = sorted(sides[0][0])
    own, first = ([sum(run[key] for run in side) / 3 for key in keys] for side in sides)
    return [a - b for a, b in zip(own, first, strict=True)]


def sign_flip(differences: list[float]) -> float:
    """The p value by trying every pattern of signs."""
    observed = abs(sum(differences))
    totals = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= observed * (1 - 1e-9) for total in totals) / len(totals)


def test_means_and_deviations_are_those_of_the_runs(done: Sweep) -> None:
    for variant in done.document["variants"]:
        for metric in METRICS:
            values = by_seed(done, variant["name"], metric)
            summary = variant["summary"][metric]
            assert summary["mean"] == pytest.approx(sum(values) / 3)
            assert summary["std"] == pytest.approx(deviation(values))
            assert summary["seeds"] == 3
    assert len({variant["summary"]["rmse"]["mean"] for variant in done.document["variants"]}) == 3


def test_differences_are_paired_by_image_and_set_against_the_seeds(done: Sweep) -> None:
    names, found = ["without", "deep", "again"], []
    variants = {variant["name"]: variant for variant in done.document["variants"]}
    assert variants["with"]["differences"] == {}
    for name, metric in itertools.product(names, METRICS):
        result = variants[name]["differences"][metric]
        differences = differences_by_image(done, name, metric)
        assert len(differences) == result["images"] == 5
        assert result["difference"] == pytest.approx(sum(differences) / 5)
        assert result["low"] <= result["difference"] <= result["high"]
        assert result["p_value"] == pytest.approx(sign_flip(differences))
        spread = math.hypot(deviation(by_seed(done, name, metric)), deviation(by_seed(done, "with", metric)))
        assert result["spread"] == pytest.approx(spread)
        assert result["within_spread"] == (abs(sum(differences) / 5) < spread)
        found.append((result["p_value"], result["p_adjusted"]))
    reached = 0.0
    for rank, (p_value, adjusted) in enumerate(sorted(found)):  # Holm, step down
        reached = max(reached, min(1.0, (len(found) - rank) * p_value))
        assert adjusted == pytest.approx(reached)
    marks = {result["within_spread"] for name in names for result in variants[name]["differences"].values()}
    assert marks == {True, False}


def test_the_same_training_is_said_to_be_the_same(done: Sweep) -> None:
    again = done.document["variants"][3]
    assert again["same_as"] == "with"
    assert all(result["difference"] == 0 and result["p_value"] == 1 for result in again["differences"].values())
    assert "again is the same training as with." in remarks(done.document)


def test_numbers_in_print_stand_in_metres(done: Sweep) -> None:
    first, second, third, _ = (variant["printed"] for variant in done.document["variants"])
    assert first["rmse"] == {"as_printed": 1.0, "value": 2.5, "difference": None}
    assert second["rmse"] == {"as_printed": 1.4, "value": 3.5, "difference": pytest.approx(1.0)}
    assert second["delta1"] == {"as_printed": 0.5, "value": 0.5, "difference": pytest.approx(-0.1)}
    assert third is None
    assert "in print: a table: made up" in done.document["printed_notes"]
    assert Printed(source="x").metres_per_unit == {}


def test_files(done: Sweep) -> None:
    assert all((done.root / name).is_file() for name in FILES)
    assert json.loads((done.root / "sweep.json").read_text()) == json.loads(json.dumps(done.document))
    with (done.root / "sweep.csv").open(newline="") as handle:
        rows = {(row["variant"], row["metric"]): row for row in csv.DictReader(handle)}
    assert len(rows) == 4 * 6
    variants = {variant["name"]: variant for variant in done.document["variants"]}
    for (name, metric), row in rows.items():
        assert row["protocol"] == LABEL
        assert float(row["mean"]) == variants[name]["summary"][metric]["mean"]
        if name == "with":
            assert row["difference"] == row["p_adjusted"] == row["within_spread"] == ""
        else:
            assert float(row["difference"]) == variants[name]["differences"][metric]["difference"]
            assert row["within_spread"] == str(variants[name]["differences"][metric]["within_spread"])
    assert (rows["without", "rmse"]["printed"], rows["deep", "rmse"]["printed"]) == ("3.5", "")
    text = (done.root / "sweep.md").read_text()
    assert text == markdown(done.document)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in table if not line.startswith("|---")} == {6}
    assert f"| deep | {variants['deep']['summary']['abs_rel']['mean']:.4f} ±" in text
    assert "- note: random encoder weights" in text
    assert "- note: synthetic scenes" in text


def test_one_seed_has_no_spread(cache: Cache, tmp_path: Path) -> None:
    plan = plan_sweep(cache, "folder", vary=["head.cls=true,false"], seeds=[0], overrides=SHORT)
    document = sweep(plan, cache, tmp_path / "one", device="cpu").document
    result = document["variants"][1]["differences"]["rmse"]
    assert (result["spread"], result["within_spread"]) == (None, None)
    assert any(line.startswith("One seed:") for line in remarks(document))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pcd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `pcd sweep ARGS` in a scratch folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    short = [part for override in SHORT for part in ("--set", override)]

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pcd", "sweep", *args, *short, "--device", "cpu"])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_command(cache: Cache, pcd: Command, tmp_path: Path) -> None:
    arguments = ["folder", "--vary", "head.max_depth=10.0,0.05", "--seeds", "3"]
    code, out, err = pcd(*arguments, "--cache", str(cache.root))
    assert code == 1
    assert "max_depth=10.0" in out
    assert "failed: max_depth=0.05, seed 3: head: min_depth = 0.1, max_depth = 0.05" in out
    assert "note: synthetic scenes" in out
    assert "[1/1] seed 3: max_depth=10.0, max_depth=0.05" in err
    folder = next((tmp_path / "sweeps").iterdir())
    assert folder.name.startswith("cache-folder-")
    assert (folder / "max_depth=10.0" / "seed-3" / "run.json").is_file()
    code, out, err = pcd(*arguments, "--cache", str(cache.root), "--json", "--out", str(folder), "--protocol", "eigen")
    assert code == 1
    assert json.loads(out)["failures"][0]["variant"] == "max_depth=0.05"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "alone is nothing to compare"),
        (["nothing"], "neither a sweep nor a recipe"),
        (["demo", "--vary", "head.bins=3", "--seeds", "0,x"], "--seeds 0,x: expected whole numbers"),
        (["demo", "--vary", "head.bins=3", "--seeds", "-1"], "--seeds: seeds.0 = -1"),
        (["table4-cls", "--checkpoint", "each"], "not each"),
    ],
)
def test_what_the_command_refuses(cache: Cache, pcd: Command, arguments: list[str], message: str) -> None:
    code, _, err = pcd(*arguments, "--cache", str(cache.root))
    assert code == 2
    assert message in " ".join(err.split())
