# mypy: untyped-calls-exclude="distributed"
"""Several processes on a cache in an object store, killed and side by side: what is there is what one process makes on disk."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from pcd.cache.lock import LOCK
from pcd.errors import CacheError
from pcd.remote import RemotePath
from tests.store_support import objects_of, server, store
from tests.test_parts import at_once
from tests.workers_support import command, package, run, until, whole_files

__all__ = ["package", "server", "store"]


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that one process made on disk."""
    root = tmp_path_factory.mktemp("whole")
    run(root)
    return whole_files(root)


def records(root: RemotePath) -> int:
    return sum(path.name.endswith(".json") for path, _ in (root / "commits").walk())


def process_in(text: str) -> int:
    found = re.search(r"by process (\d+) on", text)
    assert found
    return int(found[1])


def test_killed_at_work_and_nobody_beside_it(store: RemotePath, whole: dict[str, bytes], tmp_path: Path) -> None:
    with at_once(tmp_path, command(store, slow=0.2)) as codes:
        until(lambda: records(store) > 12)
        with pytest.raises(CacheError, match=rf"{store} is being written by process (\d+) on \S+ since 20") as refused:
            run(store)
        os.kill(process_in(str(refused.value)), signal.SIGKILL)
    assert codes == [-signal.SIGKILL]
    assert (store / LOCK).is_file()
    assert run(store).encoded < 17
    assert objects_of(store) == whole


def test_parts_at_once(store: RemotePath, whole: dict[str, bytes], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    commands = [command(store, "--part", f"{number}/2", gate=gate) for number in (1, 2)]
    with at_once(tmp_path, *commands) as codes:
        until(lambda: len(list(store.glob(f"{LOCK}.part-*"))) == 2 and not (store / f"{LOCK}.planning").is_file())
        with pytest.raises(CacheError, match=f"part 2/2 of {store} is being written by process"):
            run(store, work={"part": "2/2"})
        with pytest.raises(CacheError, match="is being written in parts: part 1-of-2 by process"):
            run(store)
        gate.unlink()
    assert codes == [0, 0]
    assert objects_of(store) == whole


@pytest.mark.slow
def test_the_workers_of_a_scheduler(store: RemotePath, tmp_path: Path, package: Path) -> None:
    few: dict[str, Any] = {"train": 3, "test": 1}
    run(tmp_path, **few)
    with LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0", silence_logs=50) as cluster:
        run(store, work={"dask": cluster.scheduler_address}, **few)
    assert objects_of(store) == whole_files(tmp_path)


@pytest.mark.slow
def test_workers(store: RemotePath, tmp_path: Path, package: Path) -> None:
    few: dict[str, Any] = {"train": 3, "test": 1}
    run(store, work={"workers": 2}, **few)
    run(tmp_path, **few)
    assert objects_of(store) == whole_files(tmp_path)
