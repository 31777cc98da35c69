"""Every single write, fsync, rename and folder of an extraction fails once, or is the last thing its process does.

After each, nothing uncommitted can be read, nothing is damaged, and the same extraction ends in the bytes of one that nothing
disturbed.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcd.cache import Cache, ColumnEntry
from pcd.cache.leftovers import leftovers
from pcd.cache.verify import verify_cache
from pcd.errors import CacheError, CorruptError, IncompleteError, SpaceError, WriteError
from pcd.stages import extract_plan, plan
from pcd.stages.extract import extract
from pcd.stages.plan import plan_columns
from tests.failpoints import (
    KILLED,
    LOCKS,
    LOSSES,
    Disk,
    Fault,
    Step,
    begin_child,
    end_of,
    files_of,
    in_memory,
    lay_out,
    watched,
)
from tests.test_corruption import Truth, truth
from tests.test_extract import toy_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors are named through /proc")
RECIPE = toy_recipe(dataset={"train": 3, "test": 0})
"""Two tables: two samples to train on, one to validate."""
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
FEW = ("clip/patch", "depth/canvas", "depth/native", "sample/ok")
"""One column of each sort: tokens, compressed, in one table only, a number per sample."""
MODES = ("EIO", "ENOSPC", "kill before", "kill after", "torn", *LOSSES)


@pytest.fixture(scope="module", params=[FEW, pytest.param((), marks=pytest.mark.slow)], ids=["few columns", "all columns"])
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    """A sample per shard, and few columns so that every point can be tried in seconds."""

    def planned(*args: Any) -> dict[str, ColumnEntry]:
        entries = plan_columns(*args)
        return {name: entry for name, entry in entries.items() if not request.param or name in request.param}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", 4)
        patch.setattr(extract_plan, "plan_columns", planned)
        yield


class Whole:
    """An undisturbed extraction: the changes it made, its files, its rows."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        with watched(root) as watch:
            extract(RECIPE, root, device="cpu")
        self.steps, self.root, self.files = watch.steps, root, files_of(root)
        self.rows: Truth = truth(root)
        self.shards = sum(table.column(n).shards for table in Cache.open(root).tables for n in table.column_names())
        records = [number for number, step in enumerate(self.steps) if step.kind == "rename" and "commits/" in step.path]
        self.end = max(number for number in records if not self.steps[number].path.endswith("manifest.json"))
        """The point that makes the last commit record: what follows is the line in the provenance."""


@pytest.fixture(scope="module")
def whole(small: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def fast() -> Iterator[Path]:
    """Where hundreds of caches are written, one after the other."""
    with in_memory() as folder:
        yield folder


def fails_at(point: int, mode: str) -> Fault:
    """The fault of one mode at one point: an error of the system, or the end of the process."""

    def fault(number: int, step: Step, do: Callable[[bytes | None], Any]) -> Any:
        if number != point:
            return do(None)
        if mode in ERRORS:
            raise OSError(ERRORS[mode], os.strerror(ERRORS[mode]))
        if mode != "kill before":
            do(step.data[: len(step.data) // 2] if mode == "torn" and step.kind == "write" else None)
        os._exit(KILLED)

    return fault


def disturb(whole: Whole, point: int, mode: str, root: Path) -> None:
    """Leave in `root` what an extraction leaves that meets this fault."""
    if mode in LOSSES:
        disk = Disk()
        for step in whole.steps[: point + 1]:
            disk.apply(step)
        lay_out(disk.after(mode), root)
        return
    root.mkdir()

    def run() -> None:
        with watched(root, fails_at(point, mode)):
            extract(RECIPE, root, device="cpu")

    if mode in ERRORS:
        with pytest.raises(SpaceError if mode == "ENOSPC" else WriteError, match="the same command again") as error:
            run()
        assert str(root) in str(error.value)
        assert not list(root.rglob("*.partial"))
        return
    assert end_of(begin_child(run)) == KILLED
    if mode != "torn":  # the model of a disk agrees with the real one
        disk = Disk()
        for step in whole.steps[: point + (mode == "kill after")]:
            disk.apply(step)
        left, modelled = files_of(root), disk.after("nothing")
        assert without_notes(left) == without_notes(modelled)


def without_notes(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but locks and provenance, which hold times."""
    return {name: data for name, data in files.items() if not name.startswith((LOCKS, "provenance"))}


def assert_sound(whole: Whole, root: Path) -> None:
    """What can be read is right, what is missing is an error, nothing is damaged."""
    try:
        cache = Cache.open(root)
    except CacheError as error:
        assert not isinstance(error, CorruptError)  # noqa: PT017  there is no manifest yet
        return
    with cache:
        assert {fault.kind for fault in verify_cache(cache)} <= {"absent"}
        for table in cache.tables:
            for name in table.column_names():
                column, right = table.column(name), whole.rows[table.name, name]
                missing = {row for start, stop in column.missing() for row in range(start, stop)}
                there = [row for row in range(column.rows) if row not in missing]
                assert column.read(there).tobytes() == right[there].tobytes()
                if missing:
                    with pytest.raises(IncompleteError):
                        column.read([min(missing)])


def assert_recovers(whole: Whole, root: Path) -> None:
    """Sound, and the same extraction completes it to the same bytes without a trace."""
    assert_sound(whole, root)
    cache = extract(RECIPE, root, device="cpu").cache
    assert files_of(root) == whole.files
    assert leftovers(cache) == []
    assert (root / "provenance.jsonl").read_text().count('"dataset"') >= 1


def sweep(whole: Whole, folder: Path, cases: list[tuple[int, str]]) -> None:
    for point, mode in cases:
        root = folder / "cache"
        try:
            disturb(whole, point, mode, root)
            assert_recovers(whole, root)
        except BaseException as error:
            error.add_note(f"point {point}, {mode}: {whole.steps[point].kind} {whole.steps[point].path}")
            raise
        shutil.rmtree(root)


def test_every_change_is_watched(whole: Whole, tmp_path: Path) -> None:
    """The changes listed, made again from nothing, give every file byte for byte: none passed by unseen."""
    disk = Disk()
    for step in whole.steps:
        disk.apply(step)
    provenance = {"provenance.jsonl": (whole.root / "provenance.jsonl").read_bytes()}
    assert disk.after("nothing") == disk.after("all") == whole.files | provenance  # and all of it is durable at the end
    kinds = Counter(step.kind for step in whole.steps)
    number = len(whole.files) + 1
    assert whole.shards >= 3 * len(FEW) - 2
    assert all(kinds[kind] >= number for kind in ("open", "write", "sync", "rename", "sync-folder")), kinds
    assert kinds["mkdir"] > whole.shards // 2
    assert len(whole.steps) > 8 * whole.shards
    assert {step.path for step in whole.steps if step.kind == "rename"} == {*whole.files, "provenance.jsonl"}


def test_every_point_fails_once(whole: Whole, fast: Path) -> None:
    """Each point in one of the modes; `pytest -m slow` tries all of them."""
    sweep(whole, fast, [(point, MODES[point % len(MODES)]) for point in range(whole.end)])


def test_every_point_at_the_end_fails_once(whole: Whole, fast: Path) -> None:
    """Behind the last commit record: the line in the provenance, which says where the images are if a repair needs them."""
    sweep(whole, fast, [(point, MODES[point % len(MODES)]) for point in range(whole.end, len(whole.steps))])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_point_fails_in_every_way(whole: Whole, fast: Path, mode: str) -> None:
    sweep(whole, fast, [(point, mode) for point in range(whole.end)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_takes_anything(whole: Whole, fast: Path, seed: int) -> None:
    """Any selection of what was not fsynced, at every point."""
    rng, disk = np.random.default_rng(seed), Disk()
    for step in whole.steps[: whole.end]:
        disk.apply(step)
        root = fast / "cache"
        lay_out(disk.after_any(rng), root)
        assert_recovers(whole, root)
        shutil.rmtree(root)
