"""What a run keeps of its training for a person: history files, curves, TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import google_crc32c
import numpy as np
import pytest
import safetensors
from matplotlib.lines import Line2D

from pcd.errors import UsageError
from pcd.reports.curves import curves
from pcd.stages.events import EventWriter, event_files
from pcd.stages.history import curves_title, draw_curves, recording, write_history
from pcd.stages.runs import Run
from tests.runs_support import runs

__all__ = ["runs"]

OLD = {"epoch", "step", "losses", "metrics", "improved", "wait", "factor", "rows_per_second", "seconds"}
"""What an epoch of a checkpoint of the first pcd holds."""


def made_up(epochs: int, *, old: bool = False) -> list[dict[str, Any]]:
    """A training whose phases are two epochs long; rmse is best in the middle, abs_rel and delta1 at the end."""
    history = []
    for epoch in range(1, epochs + 1):
        phase = "embedding" if (epoch - 1) // 2 % 2 == 0 else "depth"
        losses = {"embedding/total": 40.0 / epoch, "embedding/info_nce": 30.0 / epoch, "embedding/alignment": 10.0 / epoch}
        entry = {
            "epoch": epoch,
            "step": 10 * epoch,
            "losses": losses if phase == "embedding" else {"depth/total": 2.0 + 0.1 / epoch},
            "metrics": {
                "delta1": 0.9 - 0.5 / epoch,
                "rmse": 0.5 + abs(epoch - (epochs + 1) // 2) / 100,
                "abs_rel": 0.1 + 0.01 / epoch,
            },
            "improved": ["rmse", "abs_rel"] if epoch == 1 else [],
            "wait": epoch - 1,
            "factor": 1.0,
            "rates": {"embedding": 1e-4, "depth": 5e-5},
            "rows_per_second": 100.0,
            "seconds": 2.0 + epoch,
            "validation_seconds": 0.5,
        }
        history.append({name: value for name, value in entry.items() if not old or name in OLD})
    return history


def read_table(root: Path) -> tuple[list[str], list[dict[str, str]]]:
    with (root / "history.csv").open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
        return list(reader.fieldnames or ()), rows


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def read_lines(root: Path) -> list[dict[str, Any]]:
    text = (root / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


def test_the_files_say_what_the_checkpoint_holds(runs: list[Run], tmp_path: Path) -> None:
    with safetensors.safe_open(runs[0].root / "checkpoints" / "last.safetensors", framework="pt") as file:
        truth = json.loads(file.metadata()["state"])["history"]
    write_history(tmp_path, runs[0].history)
    assert read_lines(tmp_path) == truth
    columns, rows = read_table(tmp_path)
    assert columns[:2] == ["epoch", "step"]
    assert columns[7] == "improved"
    assert len(rows) == len(truth) == 3
    for row, entry in zip(rows, truth, strict=True):
        assert (int(row["epoch"]), int(row["wait"]), row["improved"].split()) == (
            entry["epoch"],
            entry["wait"],
            entry["improved"],
        )
        for prefix, table in (("", "losses"), ("val_", "metrics"), ("rate_", "rates")):
            for name, value in entry[table].items():
                assert row[prefix + name] == ("" if math.isnan(value) else repr(value))


def test_columns_depend_neither_on_which_loss_came_first_nor_on_the_order_of_keys(tmp_path: Path) -> None:
    history = made_up(5)
    write_history(tmp_path / "a", history)
    columns, rows = read_table(tmp_path / "a")
    assert columns == [
        *("epoch", "step", "seconds", "validation_seconds", "rows_per_second", "factor", "wait", "improved"),
        *("rate_depth", "rate_embedding", "depth/total", "embedding/alignment", "embedding/info_nce", "embedding/total"),
        *("val_abs_rel", "val_rmse", "val_delta1"),
    ]
    assert [row["depth/total"] == "" for row in rows] == [True, True, False, False, True]
    assert [row["embedding/total"] == "" for row in rows] == [False, False, True, True, False]
    assert float(rows[2]["rate_depth"]) == 5e-5
    # a resumed training reads its history from JSON with sorted keys
    shuffled = json.loads(json.dumps(history, sort_keys=True))
    write_history(tmp_path / "b", shuffled)
    for name in ("history.csv", "history.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_history(tmp_path / "c", list(reversed(history)))
    assert read_table(tmp_path / "c")[0] == columns


def test_numbers_that_are_not_finite_and_fields_of_an_older_or_newer_pcd(tmp_path: Path) -> None:
    history = [*made_up(2, old=True), made_up(3)[2] | {"memory": 17}]
    history[0]["metrics"] |= {"rmse": math.nan, "abs_rel": math.inf}
    write_history(tmp_path, history)
    lines = read_lines(tmp_path)
    assert lines[0]["metrics"] == {"abs_rel": None, "rmse": None, "delta1": 0.4}
    assert [line["validation_seconds"] for line in lines] == [None, None, 0.5]
    assert [line["rates"] for line in lines] == [{}, {}, {"depth": 5e-5, "embedding": 1e-4}]
    assert lines[2]["memory"] == 17
    _, rows = read_table(tmp_path)
    assert (rows[0]["val_rmse"], rows[0]["val_abs_rel"]) == ("", "inf")
    assert [row["rate_depth"] for row in rows] == ["", "", "5e-05"]


def test_a_crash_leaves_the_earlier_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_history(tmp_path, made_up(2))
    before = {name: (tmp_path / name).read_bytes() for name in ("history.csv", "history.jsonl")}

    def fail(descriptor: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_history(tmp_path, made_up(3))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def svg_words(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_of_a_run_says_whose_it_is_and_which_epochs_were_best(runs: list[Run], tmp_path: Path) -> None:
    run = replace(runs[0], root=tmp_path / "toy-run")
    png, svg = draw_curves(run, runs[0].history)
    assert (png, svg) == (tmp_path / "toy-run" / "curves.png", tmp_path / "toy-run" / "curves.svg")
    picture = cv2.imread(str(png))
    assert picture is not None
    assert picture.shape == (1080, 2080, 3)
    words = svg_words(svg)
    assert "toy-run: toy, toy toy" in words
    assert any(line.endswith("random encoder weights; synthetic scenes") for line in words)
    assert any(line.startswith("epoch 3 of at most 3, seed 0, validation protocol pureclip") for line in words)
    for name, title, better in (("abs_rel", "AbsRel", min), ("rmse", "RMSE", min), ("delta1", "δ < 1.25", max)):
        pairs = [(entry["metrics"][name], -entry["epoch"]) for entry in runs[0].history]
        value, epoch = better(pairs) if better is max else min((value, -minus) for value, minus in pairs)
        assert f"val {title}: best {value:.4g}, epoch {abs(epoch)}" in words
    assert {"embedding losses", "depth losses", "alignment", "info_nce"} <= set(words)
    assert not list(png.parent.glob("*.partial"))


def points(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_without_an_epoch_nothing_is_drawn(runs: list[Run], tmp_path: Path) -> None:
    assert draw_curves(replace(runs[0], root=tmp_path / "run"), []) == ()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epochs", [1, 3, 200])
def test_curves_of_few_and_of_many_epochs(epochs: int) -> None:
    history = made_up(epochs)
    figure = curves(history, "title")
    panels = {axis.get_title(loc="left").partition(":")[0]: axis for axis in figure.axes if axis.axison}
    phases = ["embedding losses"] if epochs == 1 else ["embedding losses", "depth losses"]
    assert list(panels) == [
        *("val AbsRel", "val RMSE", "val δ < 1.25"),
        *phases,
        "learning rates at the end of the epoch",
    ]
    assert points(panels["val RMSE"].lines[0])[1] == [entry["metrics"]["rmse"] for entry in history]
    ring = panels["val RMSE"].lines[-1]
    assert points(ring)[0] == [(epochs + 1) // 2]
    low, high = panels["val RMSE"].get_xlim()
    assert low < 1 <= epochs < high
    assert all(tick == round(tick) for tick in panels["val RMSE"].get_xticks())
    assert panels["val RMSE"].lines[0].get_marker() == ("None" if epochs == 200 else "o")
    # 40 / 1 beside 10 / 200 needs a logarithmic axis, 2.0 beside 2.1 does not
    assert panels["embedding losses"].get_yscale() == ("log" if epochs != 1 else "linear")
    if epochs > 1:
        assert panels["depth losses"].get_yscale() == "linear"
    rates = panels["learning rates at the end of the epoch"]
    assert {line.get_label(): set(points(line)[1]) for line in rates.lines} == {"depth": {5e-5}, "embedding": {1e-4}}


def test_curves_break_where_a_phase_rests_and_miss_what_is_not_finite() -> None:
    history = made_up(6)
    history[1]["metrics"]["abs_rel"] = math.nan
    for entry in history:
        entry["metrics"]["rmse"] = math.nan
    panels = {axis.get_title(loc="left").partition(":")[0]: axis for axis in curves(history, "").axes}
    totals = [line for line in panels["embedding losses"].lines if line.get_label() == "total"]
    epochs, values = points(totals[0])
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert [math.isnan(value) for value in values] == [False, False, True, True, False, False]
    assert points(panels["val AbsRel"].lines[0])[0] == [1, 3, 4, 5, 6]
    assert panels["val RMSE"].get_title(loc="left") == "val RMSE: not a number"
    old = {axis.get_title(loc="left"): axis for axis in curves(made_up(3, old=True), "").axes}
    assert points(old["learning rates"].lines[0])[1] == [1.0, 1.0, 1.0]


def test_the_title_of_a_run_that_has_no_labels(runs: list[Run]) -> None:
    run = replace(runs[0], info=runs[0].info | {"labels": []})
    assert curves_title(run, runs[0].history).endswith(f"validation protocol {run.recipe.train.protocol}")


@pytest.mark.parametrize("tensorboard", [False, True])
def test_an_interrupted_training_leaves_everything_up_to_its_last_epoch(
    runs: list[Run], tmp_path: Path, tensorboard: bool
) -> None:
    class Stop(BaseException):
        pass

    run, history = replace(runs[0], root=tmp_path), made_up(1)
    with pytest.raises(Stop), recording(run, history, tensorboard=tensorboard) as record:
        for entry in made_up(3)[1:]:
            history.append(entry)
            record()
        raise Stop
    assert [line["epoch"] for line in read_lines(tmp_path)] == [1, 2, 3]
    assert any(line.startswith("epoch 3 of at most 3") for line in svg_words(tmp_path / "curves.svg"))
    assert bool(event_files(tmp_path)) == tensorboard
    if tensorboard:
        assert [step for step, _ in read_scalars(tmp_path)["validation/rmse"]] == [1, 2, 3]


def masked(data: bytes) -> int:
    """The checksum of TFRecord files, from another CRC-32C than the writer's."""
    crc = google_crc32c.value(data)
    return int((((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF)


def read_events(root: Path) -> list[Any]:
    """Every event of a run, in order: length, checksum, record, checksum."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in event_files(root):
        stream = io.BytesIO(path.read_bytes())
        while head := stream.read(8):
            assert struct.unpack("<I", stream.read(4)) == (masked(head),)
            record = stream.read(struct.unpack("<Q", head)[0])
            assert struct.unpack("<I", stream.read(4)) == (masked(record),)
            events.append(event_pb2.Event.FromString(record))
    return events


def read_scalars(root: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_events(root):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_events_of_a_resumed_training_hold_every_epoch_once(runs: list[Run], tmp_path: Path) -> None:
    run, history = replace(runs[0], root=tmp_path), made_up(6)
    with EventWriter(run, []) as events:
        for entry in history[:4]:
            events.write(entry)
            assert max(event.step for event in read_events(tmp_path)) == entry["epoch"]  # on disk before the next begins
    with EventWriter(run, history[:3]) as events:  # killed after the events of the fourth epoch, before its checkpoint
        for entry in history[3:]:
            events.write(entry)
    scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars["validation/rmse"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["loss/depth/total"]] == [3, 4]
    for tag, values in {
        "validation/abs_rel": [entry["metrics"]["abs_rel"] for entry in history],
        "rate/depth": [5e-5] * 6,
        "speed/seconds": [entry["seconds"] for entry in history],
    }.items():
        assert [value for _, value in scalars[tag]] == pytest.approx(values, rel=1e-6)
    events_read = read_events(tmp_path)
    assert events_read[0].file_version == "brain.Event:2"
    assert (events_read[1].step, events_read[1].session_log.status) == (1, 1)  # START: forget what was read before
    times = [event.wall_time for event in events_read[2:]]
    assert times == sorted(times)
    assert times[1] - times[0] == pytest.approx(history[1]["seconds"])
    described = [value.metadata.summary_description for event in events_read[2:3] for value in event.summary.value]
    assert set(described) == {f"validation: {run.recipe.train.protocol}; random encoder weights; synthetic scenes"}


def test_events_leave_out_what_is_absent_or_not_finite(runs: list[Run], tmp_path: Path) -> None:
    history = made_up(2, old=True)
    history[0]["metrics"]["rmse"] = math.nan
    EventWriter(replace(runs[0], root=tmp_path), history).close()
    scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars["validation/rmse"]] == [2]
    assert not [tag for tag in scalars if tag.startswith("rate/") or "validation_seconds" in tag]


def test_without_tensorboardx_the_extra_is_named(runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"tensorboardX, which is not installed: pip install .pcd-depth\[tensorboard\]"):
        EventWriter(replace(runs[0], root=tmp_path), [])
    assert not list(tmp_path.iterdir())


def test_neither_tensorboardx_nor_matplotlib_is_loaded_before_it_is_needed() -> None:
    imports = "import sys, pcd.stages.events, pcd.stages.history, pcd.cli.train"
    code = f"{imports}; print({{'tensorboardX', 'matplotlib'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"
