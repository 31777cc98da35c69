"""Toy frames with trouble in them, installed as a third party's package so that worker processes know them too."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcd.datasets import Sample, Split, registry
from pcd.recipe import Recipe
from pcd.remote import AnyPath
from pcd.stages import plan
from pcd.stages.extract import Extraction, extract
from pcd.stages.recipes import extraction_recipe
from tests.conftest import REPOSITORY
from tests.toy import ToyDataset

PACKAGE = """
from pcd.stages import plan
from tests.toy import ToyEncoder
from tests.workers_support import TroubledDataset
plan.MAX_SHARD_ROWS = 8
"""
RANGE = ("head.min_depth=0.1", "head.max_depth=10.0")
POINTS = "[pcd.datasets]\ntroubled = troubled_frames:TroubledDataset\n[pcd.encoders]\ntoy = troubled_frames:ToyEncoder\n"


class TroubledDataset(ToyDataset):
    """The frames of the toy dataset, to whoever lives to see them."""

    class Options(ToyDataset.Options):
        gate: Path | None = None
        """While this file is there nothing is read."""
        deadly: tuple[str, ...] = ()
        """Frames that kill the process that reads them."""
        once: Path | None = None
        """With this file they do so only until it is there, and make it."""
        faulty: tuple[str, ...] = ()
        """Frames on which the reader fails, as a defect of it would."""
        slow: float = 0.0
        """Seconds that reading takes."""
        talk: bool = False
        """Whether reading prints something."""

    def load(self, split: Split, key: str) -> Sample:
        options: Any = self.options
        while options.gate is not None and options.gate.exists():
            time.sleep(0.02)
        time.sleep(options.slow)
        if options.talk:
            os.write(2, f"reading {key}\n".encode())
        if key in options.deadly and not (options.once and options.once.exists()):
            if options.once:
                options.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if key in options.faulty:
            raise RuntimeError(f"a defect of the reader at {key}")
        return super().load(split, key)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install it, for this process and those it starts; shards of two samples each."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "troubled_frames.py").write_text(PACKAGE)
    about = folder / "troubled_frames-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: troubled-frames\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    registry.add("troubled", "tests.workers_support:TroubledDataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", 8)
        patch.setattr(sys, "path", [str(folder), str(REPOSITORY), *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
        yield folder


def troubled(**options: Any) -> Recipe:
    """A recipe of troubled frames, the one that `command` gives."""
    sets = [f"dataset.{key}={_toml(value)}" for key, value in options.items()]
    return extraction_recipe("troubled", None, [*sets, *RANGE], encoder="toy:toy", weights="random")


def command(root: AnyPath, *args: str, **options: Any) -> list[str]:
    """The arguments of an extraction of troubled frames into folder `root`."""
    sets = [f"--set=dataset.{key}={_toml(value)}" for key, value in options.items()] + [f"--set={item}" for item in RANGE]
    start = ["extract", "--dataset", "troubled", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu"]
    return [*start, "--cache", str(root), *sets, *args]


def _toml(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


def run(root: AnyPath, *, work: dict[str, Any] | None = None, **options: Any) -> Extraction:
    """Extract in this process, or as `work` says; `options` are those of the dataset."""
    return extract(troubled(**options), root, device="cpu", **(work or {}))


def whole_files(root: Path) -> dict[str, bytes]:
    """Every file of a cache but its provenance and the empty lock."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    assert found.pop(".lock") == b""
    found.pop("provenance.jsonl")
    return found


def records(root: Path) -> list[Path]:
    """The commit records that are there."""
    return sorted(root.glob("commits/*/*/*/*.json"))


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
