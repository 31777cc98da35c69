"""A whole toy cache of several shards per table, and a copy of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pcd.remote import AnyPath
from pcd.stages import plan
from pcd.stages.extract import extract
from pcd.stages.origin import Place
from tests.test_cli import pcd
from tests.test_extract import toy_recipe

__all__ = ["FAR", "HERE", "SHARD", "SMALL", "cache", "pcd", "small_shards", "spoil", "whole"]
HERE = Place(device="cpu")
SMALL = {"train": 6, "test": 3}
FAR = toy_recipe(head={"name": "pureclip", "min_depth": 0.0, "max_depth": 8.0, "bins": 3})
"""Another recipe, with texts of its own."""
SHARD = "train/clip/patch/c/1/0/0"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards per table: two samples each."""
    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged cache with two lists of texts; not to be changed."""
    root = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", 8)
        extract(toy_recipe(dataset=SMALL), root, device="cpu", also=[FAR])
    return root


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    root = tmp_path / "cache"
    shutil.copytree(whole, root)
    return root


def spoil(path: Path) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)


def local(path: AnyPath) -> Path:
    """A path on this disk, as one."""
    assert isinstance(path, Path)
    return path
