"""A sweep on the workers of a dask scheduler: the runs of a sweep without it, whatever happens to workers and to the sweep."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import LocalCluster
from typer.testing import CliRunner

import pcd
from pcd.cache import Cache
from pcd.cli.app import app
from pcd.errors import RunError, UsageError
from pcd.files import read_json, write_text
from pcd.fingerprint import file_digest
from pcd.stages import cluster
from pcd.stages.cluster_check import MANIFEST, TOKEN, Place, problem, versions
from pcd.stages.cluster_plan import spread
from pcd.stages.run_lock import LOCK, writing
from pcd.stages.runs import open_run
from pcd.stages.sweep import Sweep, sweep
from pcd.stages.sweep_plan import SweepPlan, plan_sweep
from tests.sweep_support import SHORT, cls_plan, toy_cache, weights

LONG = [*SHORT, "train.epochs=20", "train.patience=1000"]
BLIND = "[variants.blind.targets]\nembedding.min_mean = 99.0\ndepth.min_mean = 99.0\n"


QUICK = "import pcd.stages.history\npcd.stages.history.draw_curves = lambda run, history: ()\n"
"""What `no_curves` does here, in the workers."""


@pytest.fixture(autouse=True, scope="module")
def as_a_worker() -> Iterator[None]:
    """As many threads here as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two worker processes of one thread each."""
    preload = tmp_path_factory.mktemp("preload") / "quick.py"
    preload.write_text(QUICK)
    options: dict[str, Any] = {"memory_limit": 0, "dashboard_address": ":0", "silence_logs": 50, "preload": str(preload)}
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as running:
        yield running


def long_plan(cache: Cache, folder: Path) -> SweepPlan:
    """Two variants of 20 epochs: time enough to interfere."""
    file = folder / "long.toml"
    file.write_text("[variants.with]\n[variants.without]\nhead.cls = false\n")
    return plan_sweep(cache, str(file), seeds=[0], overrides=LONG)


@pytest.fixture(scope="module")
def undisturbed(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long sweep in this process."""
    root = tmp_path_factory.mktemp("long")
    sweep(long_plan(cache, root), cache, root / "out", device="cpu")
    return root / "out"


def on(workers: LocalCluster, plan: SweepPlan, cache: Cache, root: Path, **options: Any) -> Sweep:
    return sweep(plan, cache, root, device="cpu", dask=workers.scheduler_address, **options)


def assert_same_runs(first: Path, second: Path, runs: list[str]) -> None:
    for run in runs:
        own, other = weights(first / run), weights(second / run)
        assert own.keys() == other.keys()
        assert any(name.startswith("optimiser.") for name in own)
        assert all(torch.equal(value, other[name]) for name, value in own.items()), run


def when(condition: Callable[[], Any], act: Callable[[], Any]) -> threading.Thread:
    """Do something as soon as something is so."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def epochs(run: Path) -> int:
    return len(open_run(run).history) if (run / "checkpoints" / "last.safetensors").is_file() else 0


def kill_worker_of(run: Path) -> None:
    """As the kernel does when memory is short."""
    found = re.match(r"process (\d+) on ", (run / LOCK).read_text())
    assert found
    os.kill(int(found[1]), signal.SIGKILL)


class Said(list[str]):
    """A progress that keeps its lines and counts."""

    def __init__(self, hear: Callable[[str], None] = lambda text: None) -> None:
        super().__init__()
        self.hear = hear
        self.bar = (0, 0)

    def say(self, text: str) -> None:
        self.append(text)
        self.hear(text)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.bar = (done, total)

    def advance(self, number: int = 1) -> None:
        self.bar = (self.bar[0] + number, self.bar[1])

    def stop(self) -> None: ...


def test_what_workers_make_is_what_this_process_makes(cache: Cache, workers: LocalCluster, tmp_path: Path) -> None:
    plan, said = cls_plan(cache, tmp_path, text=BLIND), Said()
    sweep(plan, cache, tmp_path / "here", device="cpu")
    done = on(workers, plan, cache, tmp_path / "there", progress=said)
    runs = [f"{name}/seed-{seed}" for name in ("with", "without") for seed in (0, 1)]
    assert_same_runs(tmp_path / "there", tmp_path / "here", runs)
    for file in ("sweep.json", "sweep.csv", "sweep.md", *(f"{run}/recipe.toml" for run in runs)):
        own, other = ((tmp_path / place / file).read_text().replace(f"/{place}", "") for place in ("there", "here"))
        assert own == other, file
    assert [(item["variant"], item["seed"], item["error"]) for item in done.failures] == [
        ("blind", 0, "TrainingError"),
        ("blind", 1, "TrainingError"),
    ]
    assert said.bar == (18, 18)
    hosts = {re.sub(r".* done by ", "", line) for line in said if " done by " in line}
    assert len(hosts) == 2  # both workers had something to do
    assert any(line.startswith("[6/6] seed ") for line in said)
    assert not (tmp_path / "there" / TOKEN).exists()

    folder, released = tmp_path / "there" / "with" / "seed-0", threading.Event()

    def hear(text: str) -> None:
        if "is being written by process" in text and str(folder) in text:
            released.set()

    def hold() -> None:
        with writing(folder, lambda holder: None):
            held.set()
            released.wait(30)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    again = on(workers, plan, cache, tmp_path / "there", progress=Said(hear))  # ends, since the lock is given back
    holder.join()
    assert released.is_set()
    assert again.document == done.document


def test_a_worker_that_is_killed_costs_time_and_one_too_many_a_run_that_can_go_on(
    cache: Cache, workers: LocalCluster, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = tmp_path / "out" / "with" / "seed-0", long_plan(cache, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(workers.scheduler, "allowed_failures", 0)
        killer = when(lambda: epochs(run) >= 2, lambda: kill_worker_of(run))
        done = on(workers, plan, cache, tmp_path / "out")
        killer.join()
    assert [(item["variant"], item["seed"], item["error"]) for item in done.failures] == [("with", 0, "KilledWorker")]
    assert "died, 1 of them" in done.failures[0]["message"]
    assert [len(variant["runs"]) for variant in done.document["variants"]] == [0, 1]
    reached = epochs(run)
    assert 2 <= reached < 20
    killer = when(lambda: epochs(run) >= reached + 2, lambda: kill_worker_of(run))
    assert on(workers, plan, cache, tmp_path / "out").failures == []
    killer.join()
    assert_same_runs(tmp_path / "out", undisturbed, ["with/seed-0", "without/seed-0"])
    assert [entry["epoch"] for entry in open_run(run).history] == list(range(1, 21))


class Stop(BaseException):
    """Somebody pressed Ctrl-C."""


def test_a_sweep_that_is_stopped_leaves_no_work_behind_and_goes_on(
    cache: Cache, workers: LocalCluster, undisturbed: Path, tmp_path: Path
) -> None:
    def stop(*_: object) -> None:
        raise Stop

    run, plan = tmp_path / "out" / "without" / "seed-0", long_plan(cache, tmp_path)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        presser = when(lambda: epochs(run) >= 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stop):
            on(workers, plan, cache, tmp_path / "out")
        presser.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    with writing(run, lambda holder: time.sleep(0.01)):  # the worker has let go of it
        assert 3 <= epochs(run) < 20
    assert not (tmp_path / "out" / "sweep.json").exists()
    assert on(workers, plan, cache, tmp_path / "out").failures == []
    assert_same_runs(tmp_path / "out", undisturbed, ["with/seed-0", "without/seed-0"])
    assert [entry["epoch"] for entry in open_run(run).history] == list(range(1, 21))


def test_what_cannot_work_is_said_before_any_training(
    cache: Cache, workers: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, root = cls_plan(cache, tmp_path, seeds=[0]), tmp_path / "out"
    monkeypatch.setattr(cluster, "CONNECT", 1.0)
    monkeypatch.setattr(cluster, "LOOK_AGAIN", 1)
    with monkeypatch.context() as patch:
        patch.setattr(pcd, "__version__", "9.9.9")
        own = "|".join(re.escape(f"{name} {number}") for name, number in versions().items())
        with pytest.raises(
            UsageError, match=rf"2 of 2 workers.*\n.*worker tcp://.* on host .* has pcd 0.*(started with {own})"
        ):
            on(workers, plan, cache, root)
    with writing(root, lambda holder: None), pytest.raises(RunError, match=r"another sweep is at work there \(process \d+ on "):
        on(workers, plan, cache, root)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        worker = next(iter(workers.scheduler_info["workers"]))
        for address, reason in (
            ("nonsense://x", "unknown address scheme"),
            (worker, "but a Worker"),
            (f"tcp://127.0.0.1:{mute.getsockname()[1]}", ""),
        ):
            with pytest.raises(UsageError, match=rf"--dask {address}: no scheduler answers there \({reason}.*`dask scheduler`"):
                sweep(plan, cache, root, device="cpu", dask=address)
    with LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as empty, pytest.raises(UsageError) as error:
        on(empty, plan, cache, root)
    assert re.search(rf"no workers.*`dask worker {empty.scheduler_address}`", str(error.value))
    assert not any(root.glob("*/"))


def test_an_address_where_nobody_answers_is_named(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT", 1.0)
    cls_plan(cache, tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        command = ["sweep", str(tmp_path / "toy-cls.toml"), "--cache", str(cache.root), "--out", str(tmp_path / "out")]
        begin = time.monotonic()
        result = CliRunner().invoke(app, [*command, "--dask", address, *(f"--set={item}" for item in SHORT)])
    assert time.monotonic() - begin < 10
    assert isinstance(result.exception, UsageError)
    assert f"--dask {address}: no scheduler answers there" in str(result.exception)
    assert "`dask scheduler`" in str(result.exception)


def test_a_worker_says_what_it_lacks(cache: Cache, tmp_path: Path) -> None:
    place = Place(str(cache.root), file_digest(cache.root / MANIFEST), str(tmp_path), "word", versions())
    write_text(tmp_path / TOKEN, "word")
    before = sorted(tmp_path.iterdir())
    assert problem(place) == ""
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "file").touch()
    for changed, words in (
        (
            {"versions": {**versions(), "torch": "1.0"}},
            f"has pcd {pcd.__version__}, torch {versions()['torch']}; the sweep was",
        ),
        ({"cache": "/not/there"}, "does not find the cache /not/there"),
        ({"manifest": "0"}, f"finds another cache than the sweep's at {cache.root}"),
        ({"token": "other"}, f"finds another folder than the sweep's at {tmp_path}"),
        ({"root": f"{tmp_path}/none"}, f"does not find the sweep's folder {tmp_path}/none"),
        ({"root": f"{tmp_path}/file"}, f"cannot write in the sweep's folder {tmp_path}/file (Not a directory)"),
    ):
        assert problem(replace(place, **changed)).startswith(words)


@pytest.mark.parametrize("sizes", [[1], [2, 2, 2], [5], [7, 1], [3, 3, 3, 3], [12, 12, 12], [1] * 9, []])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 16])
def test_runs_are_spread_evenly_with_as_few_cuts_as_that_takes(sizes: list[int], workers: int) -> None:
    groups = [[(number, member) for member in range(size)] for number, size in enumerate(sizes)]
    tasks = spread(groups, workers)
    assert sorted(member for task in tasks for member in task) == [member for group in groups for member in group]
    assert all(len({number for number, _ in task}) == 1 for task in tasks)
    total, loads = sum(sizes), [0] * workers
    for task in tasks:
        loads[loads.index(min(loads))] += len(task)
    assert max(loads) == -(-total // workers)
    assert sum(load > 0 for load in loads) == min(workers, total)
    if workers == 1:
        assert len(tasks) == len(sizes)


def test_without_the_option_nothing_of_dask_is_imported(cache: Cache, tmp_path: Path) -> None:
    cls_plan(cache, tmp_path)
    code = f"""
{QUICK}
import sys
from pathlib import Path
from typer.testing import CliRunner
from pcd.cache import Cache
from pcd.cli.app import app
from pcd.stages.sweep import sweep
from pcd.stages.sweep_plan import plan_sweep
assert "--dask" in CliRunner().invoke(app, ["sweep", "--help"], env={{"COLUMNS": "200"}}).output
cache = Cache.open({str(cache.root)!r})
plan = plan_sweep(cache, {str(tmp_path / "toy-cls.toml")!r}, seeds=[0], overrides={[*SHORT, "train.epochs=1"]!r})
assert sweep(plan, cache, Path({str(tmp_path / "out")!r}), device="cpu").failures == []
print(sorted(name for name in sys.modules if name.split(".")[0] in ("dask", "distributed", "tornado")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert read_json(tmp_path / "out" / "sweep.json")["variants"][1]["runs"][0]["seed"] == 0
