"""An encoder and a head from a package outside pcd, installed as pip installs it, through the real commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "tests" / "example_package"
LIMIT = 40
"""Lines that an encoder or a head may take."""
COMMANDS = """
import sys
from pcd.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["pcd", *line.split()]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def pcd(folder: Path, *lines: str, plugins: str = "plugins") -> subprocess.CompletedProcess[str]:
    """Run commands one after the other in one process, which is where importing torch takes its time."""
    environment = {**os.environ, "PYTHONPATH": str(folder / plugins), "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "160"}
    script = [sys.executable, "-c", COMMANDS]
    return subprocess.run(script, input="\n".join(lines), cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the package's source and, under `plugins`, what pip makes of it."""
    folder: Path = tmp_path_factory.mktemp("third")
    shutil.copytree(PACKAGE, folder / "toy-depth")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    where = ["--no-build-isolation", "--target", "plugins", "./toy-depth"]
    subprocess.run([*pip, *where], cwd=folder, check=True, capture_output=True)
    return folder


def test_the_package_is_installed_with_entry_points(workplace):
    (told,) = (workplace / "plugins").glob("*.dist-info/entry_points.txt")
    assert "[pcd.encoders]\ncolours = toy_encoder:ColourEncoder" in told.read_text()
    assert not list(PACKAGE.glob("build")) + list(PACKAGE.glob("*.egg-info"))


def test_from_images_to_metrics_and_predictions(workplace):
    np.save(workplace / "frame.npy", np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    done = pcd(
        workplace,
        "extract --dataset synthetic --recipe toy-depth/toy.toml --cache cache --set dataset.train=24 --set dataset.test=4",
        "train --cache cache --recipe toy-depth/toy.toml --run run --set train.epochs=6",
        "evaluate --run run --protocol eigen",
        "predict frame.npy --run run --out depth --save npy",
        "cache inspect cache",
    )
    assert done.returncode == 0, done.stderr
    info = json.loads((workplace / "run" / "run.json").read_text())
    assert info["encoders"]["colours"]["table"] == {"name": "colours"}
    assert (info["grid"], info["labels"]) == ([12, 16], ["synthetic scenes"])
    losses = [json.loads(line)["losses"] for line in (workplace / "run" / "history.jsonl").read_text().splitlines()]
    totals = [next(iter(epoch.values())) for epoch in losses]
    assert totals[-1] < 0.8 * totals[0]
    (metrics,) = (workplace / "run" / "evaluations").glob("*/metrics.json")
    assert "synthetic scenes" in metrics.read_text()
    depth = np.load(next((workplace / "depth").rglob("*.npy")))
    assert depth.shape == (60, 80)
    assert ((depth > 0.1) & (depth < 10)).all()
    assert "colours:mean-std" in done.stdout


def test_without_the_package_its_names_are_unknown(workplace):
    done = pcd(workplace, "extract --dataset synthetic --encoder colours --cache other", plugins="nothing")
    assert done.returncode == 2
    assert "Unknown encoder 'colours'" in done.stderr
    assert "openclip" in done.stderr


def test_an_encoder_and_a_head_take_under_40_lines():
    assert all(len((PACKAGE / name).read_text().splitlines()) < LIMIT for name in ("toy_encoder.py", "toy_head.py"))


def test_the_readme_shows_the_package_as_it_is():
    shown = re.findall(r"^cat > toy-depth/(\S+) <<'END'\n(.*?)^END$", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    for name, text in shown:
        assert (PACKAGE / name).read_text() == text, f"README shows another {name}"
