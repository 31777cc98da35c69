"""Hypothesis plays with a cache: extract, crash, damage, verify, repair, add and drop columns, copy, in any order.

Beside it a model in memory says which rows can be read and which bytes they are. After every step, every row is what the model
says, or the error that the documentation names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pcd.cache import Cache, commits
from pcd.cache.column import chunk_path
from pcd.cache.copy import copy_cache
from pcd.cache.gc import collect, garbage
from pcd.cache.leftovers import leftovers
from pcd.cache.lock import writing
from pcd.cache.table import SAMPLE_OK
from pcd.encoders import registry
from pcd.errors import CacheError, CorruptError, IncompleteError, WriteError
from pcd.recipe import Recipe
from pcd.stages import plan
from pcd.stages.extract import extract
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from tests.cache_support import HERE, local
from tests.failpoints import KILLED, begin_child, end_of, in_memory, watched
from tests.test_corruption import Truth, truth
from tests.test_extract import toy_recipe
from tests.test_failpoints import fails_at

Place = tuple[str, str, int]
ROWS = 8
"""Of a shard of views; a shard of samples holds two."""
LAYERS = [(), (2,), (3,), (2, 3)]
DROPPABLE = ["clip/patch@2", "clip/patch@3", "clip/patch", "clip/cls", "depth/canvas", "depth/var", "depth/native"]
WAYS = ["whole", "whole", "EIO", "kill before", "kill after", "torn"]


def recipe_for(layers: tuple[int, ...]) -> Recipe:
    head = {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0, "layers": list(layers)}
    recipe = toy_recipe(head=head, dataset={"train": 4, "test": 2})
    return recipe.model_copy(update={"encoder": {"name": "layered:toy", "weights": "random"}})


class Oracle:
    """All rows of all columns that any step may make, from one undisturbed extraction."""

    def __init__(self, root: Path) -> None:
        cache = extract(recipe_for((2, 3)), root, device="cpu").cache
        self.rows: Truth = truth(root)
        self.columns = set(cache.manifest.columns)
        self.base = {name for name in self.columns if "@" not in name}
        self.places = {
            (table.name, name, shard)
            for table in cache.tables
            for name in table.column_names()
            for shard in range(table.column(name).shards)
        }
        self.rows_of = {(table, name): cache.table(table).column(name).shard_rows for table, name, _ in self.places}

    def of(self, columns: set[str]) -> set[Place]:
        """The shards of these columns."""
        return {place for place in self.places if place[1] in columns}


ORACLE: list[Oracle] = []


class CacheMachine(RuleBasedStateMachine):
    """A cache and its model: columns, shards that are there, and shards that are damaged with how."""

    def __init__(self) -> None:
        super().__init__()
        self.held = in_memory()
        self.folder = self.held.__enter__()
        self.root = self.folder / "0"
        self.oracle = ORACLE[0]
        self.columns: set[str] = set()
        self.there: set[Place] = set()
        self.damaged: dict[Place, str] = {}
        self.copies = 0

    def teardown(self) -> None:
        self.held.__exit__(None, None, None)

    @property
    def begun(self) -> bool:
        return (self.root / "manifest.json").exists()

    @property
    def known(self) -> bool:
        """Whether the cache knows where its images are."""
        return (self.root / "provenance.jsonl").exists()

    def file(self, place: Place) -> Path:
        with Cache.open(self.root) as cache:
            return local(chunk_path(self.root, place[0], cache.manifest.columns[place[1]].spec, place[2]))

    def on_disk(self) -> tuple[set[str], set[Place]]:
        """Columns by the manifest, shards by the names of the records."""
        columns = set(Cache.open(self.root).manifest.columns) if self.begun else set()
        found = {(t, c, s) for t, c, _ in self.oracle.of(columns) for s in commits.committed(self.root, t, c)}
        return columns, found

    def disturbed(self, work: Callable[[], object], how: str, point: int) -> bool:
        """Whether `work` came to its end although it was disturbed at this point; it may have fewer."""
        if how == "whole":
            work()
            return True

        def run() -> None:
            with watched(self.root, fails_at(point, how)):
                work()

        if how.startswith(("kill", "torn")):
            code = end_of(begin_child(run))
            assert code in (0, KILLED)
            return code == 0
        try:
            run()
        except WriteError as error:
            assert str(self.root) in str(error)  # noqa: PT017
            return False
        return True

    @initialize(layers=st.sampled_from(LAYERS))
    def begin(self, layers: tuple[int, ...]) -> None:
        self.extract_some(layers, "whole", 0)

    @rule(layers=st.sampled_from(LAYERS), how=st.sampled_from(WAYS), point=st.integers(0, 250))
    def extract_some(self, layers: tuple[int, ...], how: str, point: int) -> None:
        wanted = self.columns | self.oracle.base | {f"clip/patch@{layer}" for layer in layers}
        unread = any(place[1] == SAMPLE_OK for place in self.damaged)
        self.root.mkdir(exist_ok=True)
        try:
            ended = self.disturbed(lambda: extract(recipe_for(layers), self.root, device="cpu"), how, point)
        except CorruptError:  # it must know which samples were read
            assert unread
            ended = False
        columns, there = self.on_disk()
        assert self.there <= there <= self.oracle.of(wanted)
        assert columns == wanted if ended else columns in (self.columns, wanted)
        assert not ended or there == self.oracle.of(wanted)
        self.columns, self.there = columns, there

    @precondition(lambda self: self.there - self.damaged.keys())
    @rule(data=st.data(), kind=st.sampled_from(["flip", "flip", "truncate", "delete", "swap"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        whole = sorted(self.there - self.damaged.keys())
        place = data.draw(st.sampled_from(whole))
        file = self.file(place)
        content = bytearray(file.read_bytes())
        where = data.draw(st.integers(0, len(content) - 1))
        if kind == "flip":
            content[where] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        elif kind == "truncate":
            file.write_bytes(content[:where])
        elif kind == "delete":
            file.unlink()
        else:
            others = [p for p in whole if self.file(p).stat().st_size == len(content) and self.file(p).read_bytes() != content]
            assume(others)
            other = data.draw(st.sampled_from(others))
            file.write_bytes(self.file(other).read_bytes())
            self.file(other).write_bytes(content)
            self.damaged[other] = kind
        self.damaged[place] = kind

    @precondition(lambda self: self.begun)
    @rule()
    def look(self) -> None:
        faults = verify(self.root).faults
        assert [fault for fault in faults if fault.shard is None and self.columns] == []
        found = {(f.table, f.column, f.shard): f.kind for f in faults if f.shard is not None}
        absent = self.oracle.of(self.columns) - self.there
        assert found == {**dict.fromkeys(absent, "absent"), **dict.fromkeys(self.damaged, "damaged")}

    @precondition(lambda self: self.damaged and self.known)
    @rule(how=st.sampled_from(WAYS), point=st.integers(0, 60))
    def mend(self, how: str, point: int) -> None:
        before = self.there | set()
        faults = verify(self.root).faults
        try:
            ended = self.disturbed(lambda: repair(self.root, faults, HERE), how, point)
        except CorruptError:
            assert any(place[1] == SAMPLE_OK for place in self.damaged)
            ended = False
        _, self.there = self.on_disk()
        still = {(f.table, f.column, f.shard) for f in verify(self.root).faults if f.kind == "damaged"}
        assert before - self.damaged.keys() <= self.there  # nothing good is lost
        assert still <= self.damaged.keys()
        self.damaged = {place: kind for place, kind in self.damaged.items() if place in still}
        if ended and how == "whole":
            assert self.damaged == {}
            assert before <= self.there

    @precondition(lambda self: self.columns)
    @rule(name=st.sampled_from(DROPPABLE), how=st.sampled_from(WAYS), point=st.integers(0, 25))
    def drop(self, name: str, how: str, point: int) -> None:
        assume(name in self.columns)
        how = "whole" if any(place[1] == name for place in self.damaged) else how  # damaged leftovers may be taken over again
        shown = garbage(self.root, [name])
        self.disturbed(lambda: collect(self.root, shown), how, point)
        columns, there = self.on_disk()
        assert columns in (self.columns, self.columns - {name})
        self.columns, self.there = columns, {place for place in self.there if place[1] in columns}
        assert self.there == there
        self.damaged = {place: kind for place, kind in self.damaged.items() if place[1] in columns}

    @precondition(lambda self: self.columns)
    @rule(how=st.sampled_from(WAYS), point=st.integers(0, 200), stay=st.booleans())
    def duplicate(self, how: str, point: int, stay: bool) -> None:
        self.copies += 1
        target, original = self.folder / str(self.copies), self.root
        target.mkdir()
        with Cache.open(original) as source:
            self.root = target
            if not self.disturbed(lambda: copy_cache(source, target), how, point):
                copy_cache(source, target)
        columns, there = self.on_disk()
        assert columns == self.columns
        assert there == self.there - self.damaged.keys()
        assert leftovers(Cache.open(target)) == []
        if stay:
            self.root = original
            shutil.rmtree(target)
        else:
            self.there, self.damaged = there, {}

    @precondition(lambda self: self.begun)
    @rule(layers=st.sampled_from(LAYERS))
    def come_second(self, layers: tuple[int, ...]) -> None:
        before, complete = self.on_disk(), Cache.open(self.root).complete
        with writing(self.root):
            try:
                assert extract(recipe_for(layers), self.root, device="cpu").encoded == 0
            except CacheError as error:
                assert f"is being written by process {os.getpid()} " in str(error)  # noqa: PT017
            else:
                assert complete
        assert self.on_disk() == before

    @invariant()
    def every_row_is_right_or_an_error(self) -> None:
        if not self.begun:
            with pytest.raises(CacheError, match="is not a pcd cache"):
                Cache.open(self.root)
            return
        with Cache.open(self.root) as cache:
            assert set(cache.manifest.columns) == self.columns
            for place in self.oracle.of(self.columns):
                self.check(cache, place)

    def check(self, cache: Cache, place: Place) -> None:
        """Rows of one shard, read together."""
        table, name, shard = place
        column, right = cache.table(table).column(name), self.oracle.rows[table, name]
        rows = list(range(shard * column.shard_rows, min((shard + 1) * column.shard_rows, column.rows)))
        if place not in self.there:
            with pytest.raises(IncompleteError, match="The same `pcd extract"):
                column.read(rows[-1:])
            return
        try:
            found: Any = column.read(rows)
        except CorruptError as error:
            assert place in self.damaged
            assert "pcd cache verify" in str(error)  # noqa: PT017
            return
        if self.damaged.get(place) != "swap":  # only `verify` can see that a whole shard lies in another's place
            assert found.tobytes() == right[rows].tobytes()


@pytest.fixture(scope="module", autouse=True)
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    registry.add("layered", "tests.test_layers:LayeredToy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MAX_SHARD_ROWS", ROWS)
        ORACLE[:] = [Oracle(tmp_path_factory.mktemp("oracle") / "cache")]
        yield


def play(examples: int, steps: int, *, derandomize: bool) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            suppress_health_check=quiet,
        ),
    )


def test_the_cache_agrees_with_its_model() -> None:
    play(10, 10, derandomize=True)


@pytest.mark.slow
def test_the_cache_agrees_with_its_model_for_long() -> None:
    play(100, 30, derandomize=False)
