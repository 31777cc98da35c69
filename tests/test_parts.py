"""Parts of an extraction, one after the other and at once, are the whole; nobody writes what somebody else is writing."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pcd.cache import Cache, provenance
from pcd.cache.leftovers import leftovers
from pcd.cache.lock import LOCK, holding, sharing, writing
from pcd.cache.verify import verify_cache
from pcd.errors import CacheError, SampleError, UsageError
from pcd.stages.parts import Part
from tests.workers_support import command, package, records, run, troubled, until, whole_files

__all__ = ["package"]

FORK = """
import json, os, sys
import pcd.stages.rows, pcd.stages.texts
from pcd import cli
children = []
for args in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        log = os.open(args[0], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["pcd", *args[1:]]
        cli.main()
        sys.exit(0)
    children.append(child)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""
"""Several commands at once, each a process of its own; what takes seconds to import is imported once."""


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that one process made."""
    root = tmp_path_factory.mktemp("whole")
    run(root)
    return whole_files(root)


@pytest.fixture(autouse=True)
def installed(package: Path) -> None: ...


@contextmanager
def at_once(folder: Path, *commands: list[str]) -> Iterator[list[int]]:
    """Run commands at once; afterwards their exit codes are there, and `folder/N.log` is what they said."""
    lines = [[str(folder / f"{number}.log"), *args] for number, args in enumerate(commands)]
    codes: list[int] = []
    with subprocess.Popen([sys.executable, "-c", FORK, json.dumps(lines)], stdout=subprocess.PIPE, text=True) as process:
        yield codes
        out, _ = process.communicate(timeout=120)
        codes += json.loads(out)


def test_a_part_is_every_nth_range() -> None:
    assert (Part.parse("2/5"), str(Part(2, 5)), Part(2, 5).name) == (Part(2, 5), "2/5", "2-of-5")
    shares = [Part(number, 3).of(range(8)) for number in (1, 2, 3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for text in ("0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5"):
        with pytest.raises(UsageError, match=f"--part {text}: expected I/N"):
            Part.parse(text)


def test_one_after_the_other(tmp_path: Path, whole: dict[str, bytes]) -> None:
    left = []
    for number in (3, 1, 2):
        part = f"{number}/3"
        done = run(tmp_path, work={"part": part})
        left.append(done.left)
        assert run(tmp_path, work={"part": part}).encoded == 0
    assert left == [12, 6, 0]  # ten ranges: six of train, one of val, three of test; the last of each holds one sample
    assert whole_files(tmp_path) == whole
    assert [entry["part"] for entry in provenance.records(tmp_path) if entry["encoded"]] == ["3/3", "1/3", "2/3"]
    assert sum(entry["encoded"] for entry in provenance.records(tmp_path)) == 17


def test_at_once_and_nobody_beside_them(tmp_path: Path, whole: dict[str, bytes]) -> None:
    root, gate = tmp_path / "cache", tmp_path / "gate"
    gate.touch()
    commands = [command(root, "--part", f"{number}/3", gate=gate) for number in (1, 2, 3)]
    with at_once(tmp_path, *commands) as codes:
        until(lambda: len([path for path in root.glob(f"{LOCK}.part-*") if path.read_text()]) == 3)
        until(lambda: not (root / f"{LOCK}.planning").exists())
        with pytest.raises(CacheError) as again:
            run(root, work={"part": "2/3"})
        with pytest.raises(CacheError) as everything:
            run(root)
        holders = {part: (root / f"{LOCK}.part-{part}-of-3").read_text() for part in (1, 2, 3)}
        assert not records(root)
        assert [file.path for file in leftovers(Cache.open(root)) if not file.path.endswith(".partial")] == []
        gate.unlink()
    assert codes == [0, 0, 0]
    assert re.fullmatch(r"process \d+ on \S+ since [\d-]+ [\d:+]+", holders[2])
    assert f"part 2/3 of {root} is being written by {holders[2]}" in str(again.value)
    assert all(f"part {part}-of-3 by {holder}" in str(everything.value) for part, holder in holders.items())
    assert whole_files(root) == whole
    assert len(provenance.records(root)) == 3
    assert provenance.unreadable(root) == []
    said = [(tmp_path / f"{number}.log").read_text() for number in range(3)]
    assert all(f"part {number}/3 is done" in text for number, text in enumerate(said, start=1))
    assert any("no samples are left to other parts" in text for text in said)


def test_the_whole_is_not_written_beside_parts_nor_parts_beside_it(tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(CacheError, match=r"is being written by process \d+ on .* since"):
        run(tmp_path, work={"part": "1/2"})
    with sharing(tmp_path), pytest.raises(CacheError, match="is being written by another process"):
        run(tmp_path)
    run(tmp_path, work={"part": "1/2"})
    with sharing(tmp_path):
        assert run(tmp_path, work={"part": "2/2"}).left == 0


def test_two_parts_of_other_counts_share_a_range(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """1/1 and 2/2 both have the second range: who comes later waits, and finds it written."""

    class Listener:
        def say(self, text: str) -> None:
            if "are being written by process" in text:
                heard.append(text)
                released.set()

        def start(self, label: str, total: int, unit: str, done: int = 0) -> None: ...
        def advance(self, number: int = 1) -> None: ...
        def stop(self) -> None: ...

    heard: list[str] = []
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with holding(tmp_path, "train-2", lambda holder: None):
            held.set()
            released.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    run(tmp_path, work={"part": "1/1", "progress": Listener()})
    thread.join()
    assert len(heard) == 1
    assert heard[0].startswith("train, samples 2:4 are being written by process")
    assert whole_files(tmp_path) == whole


def test_skipped_samples_are_recorded_by_every_part(tmp_path: Path) -> None:
    keys = run(tmp_path / "sound").cache.table("train").keys
    broken = [keys[0], keys[2], keys[4], "test-4"]  # of parts 1, 2, 3 and 1
    run(tmp_path / "whole", work={"on_error": "skip"}, broken=broken)
    root = tmp_path / "parts"
    found: dict[str, str] = {}
    with pytest.raises(SampleError, match=rf"sample {keys[0]}: .*--on-error skip"):
        run(root, work={"part": "1/2"}, broken=broken)
    for number in (1, 2, 3):
        done = run(root, work={"part": f"{number}/3", "on_error": "skip"}, broken=broken)
        assert 0 < len(done.skipped) < 4
        found |= done.skipped
    assert found == provenance.skipped(root) == {key: f"{key}.png is broken." for key in broken}
    assert whole_files(root) == whole_files(tmp_path / "whole")
    cache = Cache.open(root)
    assert sorted(key for table in cache.tables for key in table.keys) == sorted(set(found) | set(_usable(cache)))
    assert not set(found) & set(_usable(cache))


def _usable(cache: Cache) -> list[str]:
    return [table.keys[number] for table in cache.tables for number in table.usable()]


def test_a_reason_that_a_killed_process_kept_to_itself_is_found_again(tmp_path: Path) -> None:
    run(tmp_path, work={"on_error": "skip"}, broken=["train-0", "test-4"])
    (tmp_path / "provenance.jsonl").unlink()
    for path in records(tmp_path)[-1:]:
        path.unlink()
    run(tmp_path, work={"on_error": "skip"}, broken=["train-0"])
    skipped = provenance.skipped(tmp_path)
    assert skipped["train-0"] == "train-0.png is broken."
    assert skipped["test-4"].endswith("now it can be read.")
    assert skipped.keys() == {"train-0", "test-4"}


def test_a_part_may_not_add_columns_beside_others(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(tmp_path, work={"part": "1/3"})
    nearest = troubled()
    nearest = nearest.model_copy(update={"views": nearest.views.model_copy(update={"depth_resize": "nearest"})})
    other: dict[str, Any] = {"part": "2/3", "also": [nearest]}
    with holding(tmp_path, "part-3-of-3", lambda holder: None), pytest.raises(CacheError) as error:
        run(tmp_path, work=other)
    assert re.search(r"column depth-nearest/\w+ cannot be added while parts .*part 3-of-3 by process \d+", str(error.value))
    assert "depth-nearest/canvas" not in Cache.open(tmp_path).manifest.columns
    assert not list(tmp_path.glob(f"{LOCK}.*"))
    run(tmp_path, work=other)
    assert "depth-nearest/canvas" in Cache.open(tmp_path).manifest.columns
    assert run(tmp_path, work={"also": [nearest]}).left == 0
    assert verify_cache(Cache.open(tmp_path)) == []


def test_a_lock_that_its_holder_removed_in_the_meantime_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it: who holds a file without a name holds nothing."""
    path, original, calls = tmp_path / f"{LOCK}.train-0", fcntl.flock, itertools.count()

    def flock(*args: Any) -> None:
        if next(calls) == 0:
            path.unlink()
        original(*args)

    def refuse(holder: str) -> None:
        raise CacheError(holder)

    monkeypatch.setattr(fcntl, "flock", flock)
    again = holding(tmp_path, "train-0", refuse)
    with holding(tmp_path, "train-0", refuse), pytest.raises(CacheError, match=f"process {os.getpid()} on"), again:
        pass
    assert not path.exists()


def test_locks_of_killed_processes_block_nobody_and_are_removed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for name in ("part-1-of-2", "train-0", "planning"):
        (tmp_path / f"{LOCK}.{name}").write_text("process 1 on nowhere")
    run(tmp_path, work={"part": "1/2"})
    (tmp_path / f"{LOCK}.part-1-of-2").write_text("process 1 on nowhere")
    (tmp_path / f"{LOCK}.val-0").write_text("process 1 on nowhere")
    run(tmp_path)
    assert whole_files(tmp_path) == whole
