"""Real processes, really interrupted: the same command continues to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcd.training.checkpoints import load
from tests.test_extract import files

EXTRACT = ["extract", "--dataset", "synthetic", "--encoder", "openclip:pcd-demo", "--weights", "random", "--device", "cpu"]
EXTRACT += ["--set", "dataset.train=10", "--set", "dataset.test=4", "--set", "views.canvas=[112,112]"]
TRAIN = ["train", "--cache", "cache", "--recipe", "demo", "--run", "run", "--device", "cpu", "--set", "train.epochs=6"]


def start(folder: Path, args: list[str]) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "pcd", *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder: Path, args: list[str]) -> str:
    process = start(folder, args)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, [*EXTRACT, "--cache", "cache"])
    finish(folder, TRAIN)
    return folder


@pytest.mark.parametrize(
    ("when", "how"), [("train/clip/patch", signal.SIGINT), ("test/clip", signal.SIGTERM), ("", signal.SIGKILL)]
)
def test_extract_is_continued_by_the_same_command(whole: Path, tmp_path: Path, when: str, how: signal.Signals) -> None:
    """Stopped when the first bytes of a column are on their way, by Ctrl-C, by a scheduler, or without any warning."""
    command = [*EXTRACT, "--cache", "cache"]
    process = start(tmp_path, command)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "cache" / when).rglob("*.partial")) or list((tmp_path / "cache" / when).rglob("c/*")):
            break
        time.sleep(0.01)
    os.kill(process.pid, how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL, 0), output
    if how != signal.SIGKILL and process.returncode:
        assert "the same command continues" in output
    finish(tmp_path, command)
    assert files(tmp_path / "cache") == files(whole / "cache")


def test_train_is_continued_by_the_same_command(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(whole / "cache")
    process = start(tmp_path, TRAIN)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "continuing after epoch" in finish(tmp_path, TRAIN)
    first, second = (load(folder / "run/checkpoints/last.safetensors")[0] for folder in (whole, tmp_path))
    assert first.keys() == second.keys()
    assert all(bool((first[name] == second[name]).all()) for name in first)
