"""Tokens as int8, written by several processes, in parts, or after a crash: the same bytes as by one process at a stretch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from pcd.cache import Cache
from pcd.cache.verify import verify_cache
from pcd.errors import FingerprintError
from tests.test_parts import at_once
from tests.workers_support import command, package, records, run, whole_files

__all__ = ["package"]
INT8 = {"tokens": "int8"}


@pytest.fixture(autouse=True)
def installed(package: Path) -> None: ...


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an int8 cache that one process made at a stretch."""
    root = tmp_path_factory.mktemp("whole")
    run(root, work=INT8)
    return whole_files(root)


def assert_same(root: Path, whole: dict[str, bytes]) -> None:
    """Every byte, and that it is int8 indeed, as any Zarr reader sees."""
    assert whole_files(root) == whole
    for table in Cache.open(root).tables:
        array = zarr.open_array(root / table.name / "clip/patch", mode="r")
        assert (array.dtype, array.shape) == (np.dtype(np.int8), (table.samples * table.views, 16 + 8, 6))
        assert bool(np.asarray(array[:]).any(axis=(1, 2)).all())  # no row is missing
    assert verify_cache(Cache.open(root)) == []


def test_two_workers(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert run(tmp_path, work={**INT8, "workers": 2}).encoded == 17
    assert_same(tmp_path, whole)


def test_parts_one_after_the_other_the_later_without_naming_the_form(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert run(tmp_path, work={**INT8, "part": "2/2"}).left > 0
    with pytest.raises(FingerprintError, match="stores its tokens as int8, and float16 was asked"):
        run(tmp_path, work={"tokens": "float16", "part": "1/2"})
    assert run(tmp_path, work={"part": "1/2"}).left == 0
    assert_same(tmp_path, whole)


def test_parts_at_once_and_a_killed_process_whose_cache_is_ended_by_a_part_and_another(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    both, killed = tmp_path / "both", tmp_path / "killed"
    parts = [command(both, "--tokens", "int8", "--part", part) for part in ("1/2", "2/2")]
    with at_once(tmp_path, *parts, command(killed, "--tokens", "int8", deadly=["train-4"])) as codes:
        pass
    assert codes == [0, 0, -9], [(tmp_path / f"{number}.log").read_text() for number in range(3)]
    assert_same(both, whole)
    counts = [0, len(records(killed))]
    with pytest.raises(RuntimeError, match="a defect of the reader at train-8"):
        run(killed, faulty=["train-8"])
    counts.append(len(records(killed)))
    assert run(killed, work={"part": "2/2"}).left > 0
    counts += [len(records(killed)), len(records(both))]
    assert counts == sorted(set(counts))  # each left off somewhere else
    run(killed)
    assert_same(killed, whole)
