"""`pcd show` as a person uses it: the terminal's pictures pixel by pixel, the file, and what is refused."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pytest
from rich.console import Console

from pcd.cli.picture import Picture, gallery, picture_layout, shows_pictures
from pcd.errors import DatasetError, RunError, UsageError
from pcd.evaluation.figures_sample import scales, small
from pcd.stages.show import show
from tests.test_cli import Command, pcd
from tests.test_show import folder, panel

__all__ = ["folder", "pcd"]

HALF = "\N{UPPER HALF BLOCK}"
CODE = re.compile(r"\x1b\[([\d;]*)m|(.)")
Cell = tuple[str, Any, Any]


def terminal(width: int = 120, **options: Any) -> Console:
    options = {"force_terminal": True, "color_system": "truecolor", **options}
    environment = {"TERM": "xterm-256color", **options.pop("_environ", {})}
    return Console(file=io.StringIO(), width=width, highlight=False, legacy_windows=False, _environ=environment, **options)


def cells(console: Console) -> list[list[Cell]]:
    """What a terminal would show: per line, each character with its colour and the one behind it, None for the default."""
    assert isinstance(console.file, io.StringIO)
    lines = []
    for text in console.file.getvalue().splitlines():
        line: list[Cell] = []
        front = behind = None
        for codes, character in CODE.findall(text):
            if character:
                line.append((character, front, behind))
                continue
            numbers = [int(code or 0) for code in codes.split(";")]
            while numbers:
                first = numbers.pop(0)
                if first == 0:
                    front = behind = None
                elif first in (38, 48):
                    assert numbers[0] == 2
                    colour, numbers = tuple(numbers[1:4]), numbers[4:]
                    front, behind = (colour, behind) if first == 38 else (front, colour)
        lines.append(line)
    return lines


def pixels(lines: list[list[Cell]], top: int, left: int, height: int, width: int) -> Any:
    """The pixels of a picture whose first character is in line `top`, column `left`."""
    found = np.zeros((height, width, 3), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            character, front, behind = lines[top + row // 2][left + column]
            assert character == HALF
            found[row, column] = behind if row % 2 else front
    return found


@pytest.mark.parametrize("height", [6, 7, 1])
def test_a_picture_is_drawn_pixel_by_pixel(height: int) -> None:
    wanted = np.random.default_rng(height).integers(0, 256, (height, 9, 3), dtype=np.uint8)
    console = terminal()
    console.print(Picture(wanted))
    lines = cells(console)
    assert len(lines) == (height + 1) // 2
    assert all(len(line) == 9 for line in lines)
    np.testing.assert_array_equal(pixels(lines, 0, 0, height, 9), wanted)
    if height % 2:
        assert all(behind is None for _, _, behind in lines[-1])


def test_pictures_stand_side_by_side_with_their_titles() -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (4, 10, 3), dtype=np.uint8) for _ in range(3)]
    console = terminal(width=40)
    console.print(gallery([(f"picture number {number}", Picture(each)) for number, each in enumerate(pictures)], 2))
    lines = cells(console)
    assert "".join(character for character, _, _ in lines[0]).rstrip() == "picture n…  picture n…"
    for number, (top, left) in enumerate([(1, 0), (1, 12), (4, 0)]):
        np.testing.assert_array_equal(pixels(lines, top, left, 4, 10), pictures[number])


def test_pictures_fit_the_terminal() -> None:
    assert picture_layout(4, 1.0, 120, (26, 56)) == (4, (28, 28))
    assert picture_layout(4, 1.0, 100, (26, 56)) == (2, (49, 49))
    assert picture_layout(3, 1.0, 300, (26, 56)) == (3, (56, 56))
    assert picture_layout(4, 4.0, 80, (44, 112)) == (1, (20, 80))
    assert picture_layout(1, 4.0, 10, (44, 112)) == (1, (2, 10))


def test_only_a_terminal_with_colours_gets_pictures() -> None:
    assert shows_pictures(terminal())
    assert shows_pictures(terminal(color_system="256"))
    assert not shows_pictures(terminal(color_system="standard"))
    assert not shows_pictures(terminal(color_system=None))
    assert not shows_pictures(terminal(no_color=True))
    assert not shows_pictures(terminal(force_terminal=False))
    assert not shows_pictures(terminal(_environ={"TERM": "dumb"}))


def test_the_terminal_shows_the_maps_in_their_scale(pcd: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(width=120)
    monkeypatch.setattr(importlib.import_module("pcd.cli.show"), "output", console)
    code, _, err = pcd("show", str(folder / "run"), "--sample", "2", "--device", "cpu")
    assert code == 0, err
    assert "note: synthetic scenes" in err
    lines, shown = cells(console), show(folder / "run", sample="2", device="cpu")
    text = ["".join(character for character, _, _ in line) for line in lines]
    top = next(number for number, line in enumerate(text) if line.split() == ["prediction", "error"])
    scale = scales(shown.panels)["depth"]
    depths = [panel.pixels[np.isfinite(panel.pixels)] for panel in shown.panels if panel.kind == "depth"]
    low, high = np.percentile(np.concatenate(depths), (2, 98))
    assert (scale.low, scale.high) == pytest.approx((low, high), rel=1e-5)
    prediction = panel(shown, "prediction")
    rows, columns = np.arange(30) * 16 // 30, np.arange(59) * 32 // 59
    colours = matplotlib.colormaps["turbo_r"](((prediction - low) / (high - low)).clip(0, 1), bytes=True)[..., :3]
    wanted = colours[rows[:, None], columns[None]].astype(int)
    assert np.abs(pixels(lines, top + 1, 0, 30, 59).astype(int) - wanted).max() <= 4  # limits differ by a rounding
    bar = next(number for number, line in enumerate(text) if line.rstrip().endswith("depth in metres"))
    assert text[bar].split()[0] == f"{low:.2f}"
    np.testing.assert_array_equal(lines[bar][len(text[bar].split(HALF)[0])][1], (122, 4, 2))  # turbo_r begins with this red


def test_without_a_terminal_there_is_a_line_and_every_number(pcd: Command, folder: Path) -> None:
    code, out, err = pcd("show", str(folder / "run"), "--sample", "test-2", "--device", "cpu")
    assert code == 0, err
    assert HALF not in out
    assert "\x1b" not in out
    assert "no pictures here: this is no terminal with colours; --out FILE.png writes them." in out
    facts = show(folder / "run", sample="2", device="cpu").facts
    truth, score = facts["truth"], facts["scores"]["eigen"]["metrics"]["abs_rel"]
    assert re.search(rf"true depth +{truth['min']:.2f} to {truth['max']:.2f} m, median {truth['median']:.2f} m", out)
    assert re.search(rf"count in depth loss +{facts['counting']['depth']} of 32 patches", out)
    assert f"eigen: abs_rel {score:.4f}" in out
    most = max(facts["bins"]["true"])
    for number, true in enumerate(facts["bins"]["true"]):
        line = next(line for line in out.splitlines() if f" {facts['bins']['edges'][number]:.2f} to " in line)
        assert line.count("█") == -(-true * 30 // most)
        assert [int(part) for part in re.findall(r"[│|] +(\d+) +[│|]", line)] == [true, facts["bins"]["likely"][number]]
    code, out, _ = pcd("show", str(folder / "cache"), "--view", "3")
    assert "views: 0 to 1 are the 1x2 tiles of the canvas, 2 to 3 those of the mirrored canvas; shown is view 3." in out


def test_json_and_a_file_with_every_panel(pcd: Command, folder: Path) -> None:
    code, out, err = pcd("show", str(folder / "run"), "--view", "2", "--out", "new/sample.png", "--json", "--device", "cpu")
    assert code == 0, err
    facts, shown = json.loads(out), show(folder / "run", view=2, device="cpu")
    assert facts == {**json.loads(json.dumps(shown.facts)), "file": "new/sample.png"}
    drawn = cv2.imread("new/sample.png")
    assert drawn is not None
    assert drawn.shape[1] > 1000
    seen = {tuple(colour) for colour in drawn[..., ::-1].reshape(-1, 3).tolist()}
    made = scales(shown.panels)
    for each in shown.panels:
        colours = small(each, made.get(each.kind), each.pixels.shape[:2]).reshape(-1, 3).tolist()
        assert sum(tuple(colour) in seen for colour in colours) > 0.95 * len(colours), each.name


def test_what_cannot_be_shown_is_refused(folder: Path, tmp_path: Path) -> None:
    refused: dict[str, tuple[Path, dict[str, Any]]] = {
        r"is neither a cache nor a run; .*manifest\.json .*run\.json": (tmp_path, {}),
        "is not there": (tmp_path / "none", {}),
        r"no sample 'tset-3'\. Did you mean 'test-3'\? Known: .*; or give a number from 0 to 4": (
            folder / "cache",
            {"sample": "tset-3"},
        ),
        r"no sample '5'\. .*number from 0 to 4": (folder / "cache", {"sample": "5"}),
        r"no sample 'rain-1'\. Did you mean 'train-1'\? Known: train-1, train-10, train-11 and 8 more": (
            folder / "cache",
            {"split": "train", "sample": "rain-1"},
        ),
        "views 0 to 3": (folder / "cache", {"view": 4}),
        "need a run": (folder / "cache", {"checkpoint": "rmse"}),
    }
    for message, (path, options) in refused.items():
        with pytest.raises(UsageError, match=message):
            show(path, **options)
    with pytest.raises(RunError, match="no best epoch for 'none'"):
        show(folder / "run", checkpoint="none", device="cpu")
    with pytest.raises(UsageError, match=r"sample\.doc: give the name of a picture"):
        show(folder / "cache").save(tmp_path / "sample.doc")


def test_a_skipped_sample_says_why_and_has_nothing_to_draw(pcd: Command, folder: Path) -> None:
    code, out, _ = pcd("show", str(folder / "cache"), "--sample", "1")
    assert code == 0
    assert "skipped at extraction: test-1.png is broken." in out
    code, _, err = pcd("show", str(folder / "run"), "--sample", "1", "--out", "sample.png", "--device", "cpu")
    assert code == 2
    assert "test-1 was skipped (test-1.png is broken.): there is nothing to draw" in err


def test_without_images_the_rest_is_shown(pcd: Command, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "moved")
    provenance = tmp_path / "moved" / "provenance.jsonl"
    entry = json.loads(provenance.read_text())
    entry["dataset"]["factor"] = 2.0
    provenance.write_text(json.dumps(entry) + "\n")
    code, out, err = pcd("show", "moved", "--out", "sample.png")
    assert code == 0, err
    assert "no image: the toy images there are not those moved was made from" in out
    assert "true depth" in out
    names = [panel.name for panel in show(tmp_path / "moved").panels]
    assert names == ["tokens clip/patch", "truth", "mean", "present"]
    with pytest.raises(DatasetError, match="are not those"):  # who says where they are is told that they are not there
        show(tmp_path / "moved", root=tmp_path)
