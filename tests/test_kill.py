"""`kill -9` at any moment: what was killed is continued by the same command, and ends in the bytes of what nobody killed.

The processes are forked from this one, which has everything imported, and run `pcd` as the command line does: hundreds can be
killed while they work, not while Python starts. `tests/test_interrupt.py` kills processes that were started from scratch.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcd.cache import Cache
from pcd.cache.gc import collect, garbage
from pcd.cache.leftovers import leftovers
from pcd.cache.lock import LOCK
from pcd.errors import CacheError, CorruptError
from pcd.stages import plan
from pcd.stages.extract import extract
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from tests.cache_support import HERE
from tests.failpoints import begin_pcd, end_of, files_of, in_memory
from tests.test_corruption import Truth, assert_right_or_refused, shards, truth
from tests.test_extract import toy_recipe

RECIPE = toy_recipe(dataset={"train": 9, "test": 4})
EXTRACT = ["extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu", "--cache", "cache"]
EXTRACT += ["--set", "dataset.train=9", "--set", "dataset.test=4", "--set", "head.max_depth=10.0"]
REPAIR, GC = (
    ["cache", "verify", "cache", "--repair", "--device", "cpu"],
    ["cache", "gc", "cache", "--column", "clip/patch", "--yes"],
)
COPY = ["cache", "copy", "whole", "cache"]
TRIES = 4
"""Where kills come too early or too late, so many times the rounds are tried for those that are wanted."""
Check = Callable[[Path], None]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards per table: two samples each."""
    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)


class Killing:
    """Commands run in `folder`, where `whole` is a cache that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pace = 1.0
        """Less than 1 while commands end before they are killed: the machine was slower when they were timed."""
        assert self.run(EXTRACT) == 0, self.said
        (folder / "cache").rename(folder / "whole")
        self.whole = folder / "whole"
        self.files = files_of(self.whole)
        self.rows: Truth = truth(self.whole)

    @property
    def said(self) -> str:
        """What the last command printed."""
        return (self.folder / "said").read_text()

    def start(self, command: list[str]) -> int:
        """`pcd COMMAND` in a process of its own; its number."""
        return begin_pcd(command, self.folder)

    def run(self, command: list[str]) -> int:
        """Exit code of a command that nobody kills."""
        return end_of(self.start(command))

    def at_work(self, child: int) -> bool:
        """Whether a process has taken the cache's lock and not given it back; of one that was killed: when it was."""
        lock = self.folder / "cache" / LOCK
        return lock.exists() and f"process {child} on " in lock.read_text()

    def until_at_work(self, child: int) -> float:
        """Wait for that, or for its end; the moment."""
        while not self.at_work(child) and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        return time.monotonic()

    def kill(self, command: list[str], seconds: float, *, locked: bool = False) -> bool:
        """Kill a command after so many seconds, or, if `locked`, as long after it took the lock; whether it was at work."""
        child = self.start(command)
        if locked:
            self.until_at_work(child)
        time.sleep(self.pace * seconds)
        os.kill(child, signal.SIGKILL)
        killed = end_of(child) == -signal.SIGKILL
        self.pace = min(1.0, self.pace * (1.1 if killed else 0.7))
        return killed and self.at_work(child)

    def rounds(self, command: list[str], prepare: Check, sound: Check, number: int, wanted: int, seed: int) -> int:
        """Prepare, kill at a moment of all its time, look whether the rest is sound, and end it; how many were at work.

        That is done `number` times, and then on until `wanted` were killed at work. Three rounds of four wait for the lock.
        """
        rng, killed, turn, self.pace = np.random.default_rng(seed), 0, 0, 1.0
        root = self.folder / "cache"
        shutil.rmtree(root, ignore_errors=True)  # of a trial before that failed
        prepare(root)
        began, child = time.monotonic(), self.start(command)
        begun = self.until_at_work(child)
        assert end_of(child) == 0, self.said
        ended, done = time.monotonic(), files_of(root)
        assert command is GC or done == self.files
        while turn < number or (killed < wanted and turn < TRIES * number):
            shutil.rmtree(root)
            prepare(root)
            locked = turn % 4 > 0
            whole_time = ended - (begun if locked else began)
            killed += self.kill(command, float(whole_time * (turn % number + rng.random()) / number), locked=locked)
            sound(root)
            if turn % 2:  # what continues may be killed too
                killed += self.kill(command, float(whole_time * rng.random()), locked=locked)
                sound(root)
            code = self.run(command)
            assert code == 0 or (code, command) in ((1, REPAIR), (2, GC)), self.said  # something absent; all gone already
            self.complete(root, command)
            assert files_of(root) == done, f"{command}, seed {seed}, turn {turn}"
            if (root / "manifest.json").exists():
                assert leftovers(Cache.open(root)) == []
            turn += 1
        shutil.rmtree(root)
        return killed

    def complete(self, root: Path, command: list[str]) -> None:
        """What a repair was about to write when it was killed is absent then, and so left to `extract`."""
        if command is REPAIR and any(fault.kind == "absent" for fault in verify(root).faults):
            assert self.run(EXTRACT) == 0, self.said


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", 8)
        warm = tmp_path_factory.mktemp("warm") / "cache"
        extract(RECIPE, warm, device="cpu")  # everything is imported once, and by no child
        verify(warm)
        with in_memory() as folder:
            yield Killing(folder)


def only_absences(killing: Killing) -> Check:
    """What is there is right, what is not is absent, and until there is a manifest it is no cache."""

    def check(root: Path) -> None:
        try:
            cache = Cache.open(root)
        except CacheError as error:
            assert not isinstance(error, CorruptError)  # noqa: PT017
            return
        assert {fault.kind for fault in verify(root).faults} <= {"absent"}
        for table in cache.tables:
            for name in table.column_names():
                column, right = table.column(name), killing.rows[table.name, name]
                missing = {row for start, stop in column.missing() for row in range(start, stop)}
                there = [row for row in range(column.rows) if row not in missing]
                assert column.read(there).tobytes() == right[there].tobytes()

    return check


def nothing(_: Path) -> None:
    """Begin without a cache."""


def try_extract(killing: Killing, number: int, wanted: int, seed: int = 0) -> int:
    return killing.rounds(EXTRACT, nothing, only_absences(killing), number, wanted, seed)


def try_repair(killing: Killing, number: int, wanted: int, seed: int = 0) -> int:
    damaged: list[str] = []

    def spoil(root: Path) -> None:
        shutil.copytree(killing.whole, root)
        names = sorted(killing.files)
        damaged[:] = [*shards(names, "clip/patch")[:3], *shards(names, "depth/canvas")[:2], "train/clip/cls/zarr.json"]
        for name in [*damaged, "manifest.json", "train/samples.json"]:
            data = bytearray((root / name).read_bytes())
            data[len(data) // 3] ^= 1
            (root / name).write_bytes(data)

    def sound(root: Path) -> None:
        places = [(t, c, shard) for (t, c), rows in killing.rows.items() for shard in range(-(-len(rows) // 8))]
        small = [place for place in places if "native" not in place[1] and "sample" not in place[1]]
        assert_readable(root, killing.rows, small)

    return killing.rounds(REPAIR, spoil, sound, number, wanted, seed)


def assert_readable(root: Path, rows: Truth, places: list[Any]) -> None:
    """Right, refused as damaged, or absent."""
    try:
        cache = Cache.open(root)
    except CacheError:
        return
    with cache:
        there = [p for p in places if p[2] * 8 not in {low for low, _ in cache.table(p[0]).column(p[1]).missing()}]
        complete = [place for place in there if not cache.table(place[0]).column(place[1]).missing()]
    assert_right_or_refused(root, rows, complete)


def try_gc(killing: Killing, number: int, wanted: int, seed: int = 0) -> int:
    def prepare(root: Path) -> None:
        shutil.copytree(killing.whole, root)

    return killing.rounds(GC, prepare, assert_whole, number, wanted, seed)


def assert_whole(root: Path) -> None:
    assert verify(root).faults == []


def try_copy(killing: Killing, number: int, wanted: int, seed: int = 0) -> int:
    return killing.rounds(COPY, nothing, only_absences(killing), number, wanted, seed)


TRIALS = {"extract": try_extract, "repair": try_repair, "gc": try_gc, "copy": try_copy}


@pytest.mark.parametrize(("what", "number"), [("extract", 6), ("repair", 3), ("gc", 4), ("copy", 4)])
def test_killed_at_any_moment(killing: Killing, what: str, number: int) -> None:
    assert TRIALS[what](killing, number, wanted=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("what", "wanted"), [("extract", 50), ("repair", 20), ("gc", 20), ("copy", 20)])
def test_killed_hundreds_of_times(killing: Killing, what: str, wanted: int, seed: int) -> None:
    """Over all seeds 200 extractions at work, and as many of the other commands."""
    killed = TRIALS[what](killing, wanted, wanted, seed)
    print(f"{what}, seed {seed}: {killed} killed at work")
    assert killed >= wanted


def test_a_dropped_column_made_another_way_is_not_taken_from_what_a_killed_gc_left(killing: Killing, tmp_path: Path) -> None:
    """Records that a killed `gc` left of a column vouch for its old values: they must not vouch for new ones."""
    root, unlink = tmp_path / "cache", Path.unlink
    shutil.copytree(killing.whole, root)
    shown = garbage(root, ["clip/patch", "clip/cls"])

    def stop(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        collect(root, shown)
    assert Path.unlink is unlink
    doubled = toy_recipe(dataset={"train": 9, "test": 4}, encoder={"gain": 2.0})
    extract(doubled, root, device="cpu")
    assert verify(root).faults == []
    found, right = truth(root), killing.rows
    np.testing.assert_array_equal(found["train", "clip/patch"], right["train", "clip/patch"] * np.float16(2))
    collect(root, garbage(root, ["clip/patch", "clip/cls"]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        extract(RECIPE, root, device="cpu")
        patch.setattr(Path, "unlink", stop)
        collect(root, garbage(root, ["depth/var"]))
    extract(RECIPE, root, device="cpu")  # what was made the same way is taken over
    assert truth(root).keys() == right.keys()
    assert all(rows.tobytes() == right[key].tobytes() for key, rows in truth(root).items())
    assert repair(root, [], HERE).mended == []
