"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; must be set before torch is imported
os.environ.pop("COLUMNS", None)  # a console that finds it when it is made keeps to it; tests that care set their own
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real frames and weights; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PCD_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real frames here: set PCD_TEST_DATA to a folder with official/, rgbd/ and weights/")
    return folder


@pytest.fixture(scope="session")
def clip_weights(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CLIP ViT-B/16 visual weights as a plain safetensors file."""
    out = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, str(shared_data / "unpack_weights.py"), str(out)], check=True, capture_output=True)
    return out / "clip-vit-b-16-visual.safetensors"


@pytest.fixture(autouse=True, scope="session")
def toys() -> None:
    """Register the toy dataset, encoders and head."""
    from pcd.datasets import registry as datasets
    from pcd.encoders import registry as encoders
    from pcd.heads import registry as heads

    datasets.add("toy", "tests.toy:ToyDataset")
    encoders.add("toy", "tests.toy:ToyEncoder")
    encoders.add("toy-maps", "tests.toy:MapEncoder")
    heads.add("toy-fine", "tests.toy:FineHead")


@pytest.fixture(autouse=True, scope="module")
def no_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures of the curves take most of the time of a tiny training: they are drawn only where they are looked at."""
    if request.module.__name__.endswith("test_history"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcd.stages.history.draw_curves", lambda run, history: ())
        yield
