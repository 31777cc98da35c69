"""The line that a training prints for every epoch, and the options that `pcd train` hands on."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pcd.cli import train as command
from pcd.cli.app import app
from pcd.stages import train as stage
from pcd.stages.runs import Run
from pcd.training.loop import EpochReport
from pcd.wording import brief_rate, duration
from tests.runs_support import runs

__all__ = ["runs"]

REPORT = EpochReport(
    epoch=12,
    step=1200,
    losses={"embedding/total": 2.32144, "embedding/info_nce": 2.0, "depth/total": 0.451239},
    metrics={"abs_rel": 0.12341, "rmse": 0.54321, "delta1": 0.8765},
    improved=["delta1", "delta2", "delta3", "log10", "rmse"],
    wait=0,
    factor=1.0,
    rates={"embedding": 1e-4, "depth": 5e-5},
    rows_per_second=12345.6,
    seconds=4.0,
    validation_seconds=0.5,
)


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *reports: EpochReport, colours: bool = False) -> list[str]:
    """The lines of a terminal of so many columns."""
    file = io.StringIO()
    system: Any = "standard" if colours else None
    console = Console(file=file, width=width, force_terminal=True, color_system=system, highlight=False)
    monkeypatch.setattr(command, "errors", console)
    lines = command.EpochLines(200)
    for report in reports:
        lines(report)
    return file.getvalue().splitlines()


def test_the_line_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, metrics = "embedding 2.321  depth 0.4512", "abs_rel 0.1234  rmse 0.5432  delta1 0.8765"
    begin, end = f"epoch  12/200 | {losses} | {metrics}", "at most 13 min left"  # 188 * 4 s
    wide = f"{begin} | better: delta1 rmse delta2 +2 | lr 1e-4 5e-5 | 12346 rows/s | {end}"
    assert printed(monkeypatch, 180, REPORT) == [wide]
    assert printed(monkeypatch, 160, REPORT) == [wide.replace("better: delta1 rmse delta2 +2", "5 better")]
    narrow = f"{begin} | 5 better | lr 1e-4 5e-5 | {end}"
    assert printed(monkeypatch, 140, REPORT) == [narrow]
    assert len(narrow) <= 140
    for width in (95, 100, 120):
        (line,) = printed(monkeypatch, width, REPORT)
        assert len(line) <= width
        assert line.endswith(f"{metrics} | 5 better | at most 13 min left")


def test_the_line_of_an_epoch_without_anything_better(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = replace(REPORT, improved=[], wait=17, rates=dict.fromkeys(REPORT.rates, 1e-4))
    stale.losses.pop("depth/total")
    (line,) = printed(monkeypatch, 140, stale)
    assert " | embedding 2.321  depth - | " in line
    assert " | no better for 17 | lr 1e-4 | " in line
    (line,) = printed(monkeypatch, 140, replace(stale, rates={"joint": 1e-4}))
    assert " | embedding 2.321 | " in line  # one rate for all phases: nobody's turn


def test_what_is_better_is_green_and_nothing_else_has_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = printed(monkeypatch, 180, REPORT, colours=True)
    green = [part.partition("\x1b[0m")[0] for part in line.split("\x1b[32m")[1:]]
    assert green == ["rmse 0.5432", "delta1 0.8765", "better: delta1 rmse delta2 +2"]
    assert line.count("\x1b[") == 2 * len(green)


def test_the_time_that_is_left_follows_from_the_last_five_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [1000.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    lines = printed(monkeypatch, 200, *(replace(REPORT, epoch=at + 1, seconds=s) for at, s in enumerate(seconds)))
    assert lines[0].endswith("at most 55.3 h left")  # 199 * 1000 s
    assert lines[5].endswith("at most 1.6 h left")  # 194 * 30 s = 97 min
    (last,) = printed(monkeypatch, 200, replace(REPORT, epoch=200))
    assert last.endswith("rows/s")


def test_several_trainings_have_a_name_and_a_time_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(command, "errors", Console(file=file, width=80, highlight=False))
    lines = command.EpochLines(200)
    for name, epochs, seconds in (("with[cls]", 22, 1.0), ("without", 32, 4.0)):
        lines(replace(REPORT, seconds=seconds), name, epochs)
    first, second = file.getvalue().splitlines()  # no terminal: whole lines, however long
    assert first.startswith("with[cls]: epoch  12/22 | ")
    assert first.endswith("| 12346 rows/s | at most 10 s left")
    assert second.endswith("| 12346 rows/s | at most 80 s left")


def test_numbers_as_a_person_reads_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 40, 89, 90, 720, 5399, 5400, 100_000)] == [
        *("0 s", "40 s", "89 s", "2 min", "12 min", "90 min", "1.5 h", "27.8 h")
    ]
    assert [brief_rate(rate) for rate in (1e-4, 2.5e-5, 1.234e-3, 1.0, 0.0)] == ["1e-4", "2.5e-5", "1.23e-3", "1e0", "0"]
    generator = random.Random(0)
    for _ in range(200):
        rate = 10 ** generator.uniform(-8, 0)
        assert float(brief_rate(rate)) == pytest.approx(rate, rel=6e-3)


@pytest.mark.parametrize(
    ("options", "residency", "tensorboard"),
    [
        ([], None, False),
        (["--residency", "stream"], "stream", False),
        (["--residency", "device", "--tensorboard"], "device", True),
    ],
)
def test_train_hands_its_options_on(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, options: list[str], residency: str | None, tensorboard: bool
) -> None:
    handed: dict[str, Any] = {}

    def record(recipe: Any, cache: Any, root: Path | None, **rest: Any) -> Run:
        handed.update(rest)
        return runs[0]

    monkeypatch.setattr(stage, "train", record)
    cache = str(runs[0].root.parent / "cache")
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["train", "--cache", cache, *options])
    assert result.exit_code == 0, result.output
    assert (handed["residency"], handed["tensorboard"]) == (residency, tensorboard)


def test_train_refuses_another_residency(runs: list[Run]) -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["train", "--cache", str(runs[0].root.parent / "cache"), "--residency", "nowhere"]
    )
    assert result.exit_code == 2
    assert "'auto', 'device', 'host', 'stream'" in result.output
