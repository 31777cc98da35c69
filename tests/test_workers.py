"""Extraction by several processes: the same bytes as by one, whatever happens to workers and to the extraction."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import LocalCluster
from typer.testing import CliRunner

from pcd.cache import Cache, provenance
from pcd.cache.lock import LOCK
from pcd.cli.app import app
from pcd.errors import IncompleteError, RunError, UsageError
from pcd.stages import extract_workers
from pcd.stages.extract_worker import device_of
from pcd.stages.shard_task import Job, ShardTask
from tests.workers_support import command, package, records, run, until, whole_files

__all__ = ["package"]


class Said(list[str]):
    """A progress that keeps its lines and counts."""

    def __init__(self, at: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.bar = (0, 0)
        self._at = at

    def say(self, text: str) -> None:
        self.append(text)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.bar = (done, total)

    def advance(self, number: int = 1) -> None:
        self.bar = (self.bar[0] + number, self.bar[1])
        self._at(self.bar[0])

    def stop(self) -> None: ...


@pytest.fixture(autouse=True)
def installed(package: Path) -> None: ...


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that one process made."""
    root = tmp_path_factory.mktemp("whole")
    run(root)
    return whole_files(root)


@pytest.fixture(scope="module")
def cluster(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A scheduler with two worker processes, which live elsewhere."""
    options: dict[str, Any] = {"memory_limit": 0, "dashboard_address": ":0", "silence_logs": 50}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        running = LocalCluster(n_workers=2, threads_per_worker=2, **options)
    with running:
        yield running


def at(cluster: LocalCluster, **work: Any) -> dict[str, Any]:
    return {"dask": cluster.scheduler_address, **work}


def pids(cluster: LocalCluster) -> list[int]:
    return [worker.pid for worker in cluster.workers.values() if worker.pid]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_workers_make_is_what_one_process_makes(tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    said = Said()
    done = run(tmp_path, work={"workers": workers, "progress": said}, talk=True)
    assert whole_files(tmp_path) == whole
    assert (done.encoded, said.bar, done.left) == (17, (17, 17), 0)
    assert done.cache.complete
    (entry,) = provenance.records(tmp_path)
    assert (entry["workers"], entry["encoded"], entry["batch_views"]) == (workers, 17, 4)
    printed = [re.fullmatch(r"worker (\d): reading (\w+-\d+)", line) for line in said]
    assert sorted(match[2] for match in printed if match) == sorted(key for table in done.cache.tables for key in table.keys)
    assert {match[1] for match in printed if match} <= {str(number) for number in range(workers)}
    assert not psutil.Process().children(recursive=True) or all(
        "resource_tracker" in " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)
    )


def test_the_workers_of_a_scheduler_do_the_same_and_skip_the_same(
    cluster: LocalCluster, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = Said()
    assert run(Path("cache"), work=at(cluster, progress=said)).encoded == 17
    assert whole_files(tmp_path / "cache") == whole
    assert said.bar == (17, 17)
    assert any(re.fullmatch(r"10 shards for 2 workers of tcp://\S+", line) for line in said)
    assert provenance.records(tmp_path / "cache")[0]["dask"] == cluster.scheduler_address
    broken = ["train-1", "test-0"]
    run(tmp_path / "one", work={"on_error": "skip"}, broken=broken)
    skipped = run(tmp_path / "many", work=at(cluster, on_error="skip"), broken=broken).skipped
    assert skipped == provenance.skipped(tmp_path / "many") == {key: f"{key}.png is broken." for key in broken}
    assert whole_files(tmp_path / "many") == whole_files(tmp_path / "one")
    (tmp_path / "cache" / "commits/test/clip/patch/000001.json").unlink()
    assert run(tmp_path / "cache", work=at(cluster)).encoded == 2
    assert whole_files(tmp_path / "cache") == whole


def test_workers_that_are_killed_cost_time(cluster: LocalCluster, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """One dies of a frame, the first time it is read; the other is killed from outside, with a shard half done."""
    gate, once = tmp_path / "gate", tmp_path / "once"
    gate.touch()

    def kill() -> None:
        until(lambda: list((tmp_path / "cache").glob("*/*/*/c/*/**/*.partial")) or list((tmp_path / "cache").glob(".lock.t*")))
        os.kill(pids(cluster)[0], signal.SIGKILL)
        gate.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    done = run(tmp_path / "cache", work=at(cluster), gate=gate, deadly=["train-4"], once=once)
    killer.join()
    assert once.exists()
    assert done.cache.complete
    assert whole_files(tmp_path / "cache") == whole


def test_what_always_fails_is_reported_and_the_rest_is_written(
    cluster: LocalCluster, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    said = Said()
    with pytest.raises(IncompleteError) as error:
        run(tmp_path, work=at(cluster, progress=said), deadly=["train-0"], faulty=["test-0", "test-1"])
    assert error.value.exit_code == 1
    text = str(error.value)
    assert re.search(r"2 shards could not be written:\n  test, samples 0:2 \(test-0, test-1\): RuntimeError: a defect", text)
    assert re.search(
        r" at test-0 \(3 tries\)\n  train, samples 0:2 \(train-0, train-1\): 1 workers that had nothing else", text
    )
    assert text.endswith("All others are there. Once the cause is gone, the same command continues.")
    assert said.bar == (17, 17)
    cache = Cache.open(tmp_path)
    gaps = {table.name: table.column("clip/patch").missing() for table in cache.tables}
    assert gaps == {"train": [(0, 8)], "val": [], "test": [(0, 8)]}
    (entry,) = provenance.records(tmp_path)
    assert sorted(entry["failed"]) == ["test, samples 0:2", "train, samples 0:2"]
    assert run(tmp_path, work=at(cluster)).encoded == 4
    assert whole_files(tmp_path) == whole


def test_a_dead_end_is_not_walked_to_its_end(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_workers, "IN_A_ROW", 2)
    faulty = [f"{table}-{number}" for table in ("train", "test") for number in range(12)]
    with pytest.raises(IncompleteError, match=r"After [6789] failures in a row the others were not tried any more\."):
        run(tmp_path, work=at(cluster), faulty=faulty)
    assert not records(tmp_path)


class Stop(BaseException):
    """Somebody pressed Ctrl-C."""


def test_an_extraction_that_is_stopped_leaves_no_work_behind_and_goes_on(
    cluster: LocalCluster, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    def stop(number: int) -> None:
        if number >= 6:
            os.kill(os.getpid(), signal.SIGUSR1)

    def pressed(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, pressed)
    try:
        with pytest.raises(Stop):
            run(tmp_path, work=at(cluster, progress=Said(stop)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    until(lambda: not list(tmp_path.glob(f"{LOCK}.*")), 20)  # the workers have let go
    assert not list(tmp_path.rglob("*.partial"))
    assert len(records(tmp_path)) >= 10
    run(tmp_path, work=at(cluster))
    assert whole_files(tmp_path) == whole


def test_a_worker_that_makes_another_encoder_is_refused(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.toy import ToyEncoder

    original = ToyEncoder.fingerprint
    monkeypatch.setattr(ToyEncoder, "fingerprint", lambda self: {**original(self), "precision": "fp16"})  # only here
    with pytest.raises(RunError) as error:
        run(tmp_path, work=at(cluster))
    assert re.search(r"worker tcp://\S+ on host .*\n  encoder\.precision: found 'fp16', wanted 'fp32'\n", str(error.value))
    assert not records(tmp_path)


def test_what_cannot_go_together_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcd.stages.cluster.CONNECT", 1.0)
    for work, words in (
        ({"workers": 0}, "--workers 0: expected at least 1"),
        ({"workers": 2, "dask": "tcp://x:1"}, "--workers starts processes here, --dask uses those of a scheduler"),
        ({"part": "1/2", "dask": "tcp://x:1"}, "--part is for machines without a scheduler"),
        ({"dask": "nonsense://x"}, "--dask nonsense://x: no scheduler answers"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path, work=work)
    assert not records(tmp_path)


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device_of("auto", number) for number in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert [device_of(name, 1) for name in ("cuda", "cuda:2", "cpu")] == ["cuda:1", "cuda:2", "cpu"]


def test_tasks_are_plain_values() -> None:
    import pickle

    job = Job("/cache", "digest", {"name": "toy"}, ("clip/patch",), ("clip/patch",), ("nearest",), "stop", "cpu", None)
    task = ShardTask("train", 4, 6, ("clip/patch",))
    assert pickle.loads(pickle.dumps((job, task))) == (job, task)
    assert (task.name, str(task), task.samples) == ("train-4", "train, samples 4:6", 2)


def test_ctrl_c_stops_all_processes_within_seconds(tmp_path: Path) -> None:
    """As a terminal sends it: to the command and its workers at once. The same command then ends what was begun."""
    root, gate = tmp_path / "cache", tmp_path / "gate"
    gate.touch()
    start = [sys.executable, "-m", "pcd", *command(root, "--workers", "2", gate=gate)]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until(lambda: len(list(root.glob(f"{LOCK}.t*"))) == 2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        gate.unlink()
        until(lambda: len(records(root)) > 8)
        gate.touch()
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    took = time.monotonic() - begin
    assert process.returncode == 130, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert took < 20
    assert not psutil.wait_procs(family, timeout=5)[1]
    gate.unlink()
    before = len(records(root))
    assert before > 8
    run(root)
    run(tmp_path / "whole")
    assert whole_files(root) == whole_files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_of_this_machine_killed_at_random(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    """One part of two with two workers, of which one is shot again and again; then the other part."""
    draw, ended = random.Random(seed), threading.Event()
    root, shot = tmp_path / "cache", list[int]()

    def shoot() -> None:
        for _ in range(4):
            until(lambda: ended.is_set() or list(root.glob(f"{LOCK}.t*")))
            time.sleep(draw.uniform(0, 0.3))
            family = [child for child in psutil.Process().children() if "--multiprocessing-fork" in child.cmdline()]
            if family and not ended.is_set():
                shot.append((victim := draw.choice(family)).pid)
                victim.kill()
            time.sleep(draw.uniform(0, 4))

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        run(root, work={"workers": 2, "part": "1/2"}, slow=0.5)
        run(root, work={"workers": 2, "part": "2/2"}, slow=0.5)
    finally:
        ended.set()
        shooter.join()
    assert whole_files(root) == whole
    assert [entry["part"] for entry in provenance.records(root)] == ["1/2", "2/2"]
    assert shot


@pytest.mark.slow
def test_a_frame_that_kills_every_worker_of_this_machine(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(
        IncompleteError, match=r"1 shard could not .*\n  test, samples 0:2 .*: 2 workers that had nothing else to do"
    ):
        run(tmp_path, work={"workers": 2}, deadly=["test-0"])
    assert run(tmp_path, work={"workers": 2}).encoded == 2
    assert whole_files(tmp_path) == whole


def test_nothing_of_dask_is_imported_unless_asked_for(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["extract", "--help"], env={"COLUMNS": "200"}).output
    assert all(option in shown for option in ("--workers", "--dask", "--part"))
    code = "import sys; from pathlib import Path; from tests.workers_support import *; import troubled_frames\n"
    code += f"run(Path({str(tmp_path)!r}))\n"
    code += "print(sorted(name for name in sys.modules if name.split('.')[0] in ('dask', 'distributed', 'tornado')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
