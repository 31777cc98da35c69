"""The unit of an extraction: a range of samples that begins a shard in every column. Read, encode, write, commit.

A task says what is to be done in plain values that can be sent anywhere. The same function does it in one process, in many, and
on other machines, and what it writes depends on the range alone: batches end where a range ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pcd.cache import Cache, ColumnEntry, Table, commits
from pcd.cache.lock import holding
from pcd.cache.objects import each
from pcd.cache.table import SAMPLE_OK
from pcd.cache.writer import RangeWriter
from pcd.datasets import Dataset, create_dataset
from pcd.encoders import create_encoder, with_columns
from pcd.errors import FingerprintError
from pcd.fingerprint import differences
from pcd.overlap import Behind
from pcd.progress import Progress
from pcd.recipe import Recipe
from pcd.stages.checks import refuse_other_samples
from pcd.stages.plan import TablePlan, plan_manifest, plan_tables, view_plan
from pcd.views import DepthResize

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder
    from pcd.stages.rows import OnError, RowMaker

BATCH_VIEWS = {"cuda": 64, "mps": 16, "cpu": 4}
PAUSE = 0.5
"""Seconds between two looks at a range that somebody else is writing."""


@dataclass(frozen=True)
class Job:
    """What all tasks of an extraction have in common; plain values that can be sent."""

    cache: str
    manifest: str
    """SHA-256 of the cache's manifest."""
    recipe: dict[str, Any]
    columns: tuple[str, ...]
    """The columns that the extraction makes."""
    outputs: tuple[str, ...]
    """Those of the encoder, also what it makes only when asked."""
    resizes: tuple[DepthResize, ...]
    on_error: OnError
    device: str
    batch_views: int | None
    """Views per encoder batch; None: by device."""


@dataclass(frozen=True)
class ShardTask:
    """Samples `start:stop` of a table, and the columns of which they are to be there afterwards."""

    table: str
    start: int
    stop: int
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the range is called, in the name of its lock as well."""
        return f"{self.table}-{self.start}"

    @property
    def samples(self) -> int:
        """How many."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.table}, samples {self.start}:{self.stop}"


@dataclass(frozen=True)
class Outcome:
    """What became of a task: skipped samples with the reason, and where and how it was done.

    `problem` says what keeps this process from doing any task of the job.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    device: str = ""
    batch_views: int = 0
    where: str = ""
    problem: str = ""


def shard_tasks(cache: Cache, columns: Collection[str]) -> list[ShardTask]:
    """The ranges of all tables in order, written or not. `columns` are those that the extraction makes."""
    tasks = []
    for table in cache.tables:
        wanted = tuple(name for name in table.column_names() if name in columns)
        if not wanted:
            continue
        unit = max(cache.manifest.columns[name].shard_samples for name in wanted)
        for start in range(0, table.samples, unit):
            tasks.append(ShardTask(table.name, start, min(start + unit, table.samples), wanted))
    return tasks


def open_tasks(cache: Cache, tasks: Iterable[ShardTask]) -> list[ShardTask]:
    """Those of the tasks that lack a shard, by the commit records that are there now."""
    columns, there = cache.manifest.columns, {}
    for table in cache.tables:
        there.update({(table.name, name): commits.committed(cache.root, table.name, name) for name in table.column_names()})
    return [
        task
        for task in tasks
        if not all(there[task.table, name].issuperset(_shards(columns[name], task.start, task.stop)) for name in task.columns)
    ]


def _shards(entry: ColumnEntry, start: int, stop: int) -> range:
    """The shards of a column that hold samples `start:stop`."""
    return range(start // entry.shard_samples, -(-stop // entry.shard_samples))


class Kit:
    """What a process needs for the tasks of a job, made once: cache, dataset, encoder."""

    def __init__(self, job: Job, cache: Cache, dataset: Dataset, tables: Sequence[TablePlan], encoder: Encoder) -> None:
        self.job = job
        self.cache = cache
        self.batch_views = job.batch_views or views_per_batch(job.device)
        self._dataset = dataset
        self._plans = {table.name: table for table in tables}
        self._encoder = encoder

    @staticmethod
    def make(job: Job) -> Kit:
        """Open everything anew. Raises what that raises, and `FingerprintError` if it gives anything but the cache's values."""
        recipe = Recipe.model_validate(job.recipe)
        dataset = create_dataset(recipe.dataset["name"], recipe.options("dataset"), "dataset")
        tables, cache = plan_tables(dataset), Cache.open(job.cache)
        refuse_other_samples(cache, plan_manifest(dataset, view_plan(dataset, recipe.views), tables))
        options = recipe.options("encoder")
        encoder = create_encoder(recipe.encoder["name"], options, cache.manifest.plan.view_size, job.device, "encoder")
        encoder = with_columns(encoder, job.outputs)
        _refuse_other_encoder(cache, encoder)
        return Kit(job, cache, dataset, tables, encoder)

    def maker(self) -> RowMaker:
        """What makes the rows of one task."""
        from pcd.stages.rows import RowMaker  # imports torch, for which who only plans need not wait

        manifest, job = self.cache.manifest, self.job
        entries = {name: manifest.columns[name] for name in job.columns}
        return RowMaker(self._dataset, manifest.plan, self._encoder, entries, job.resizes, job.on_error, self.batch_views)

    def plan(self, table: str) -> TablePlan:
        """Where the samples of a table come from."""
        return self._plans[table]


def _refuse_other_encoder(cache: Cache, encoder: Encoder) -> None:
    lines: dict[str, None] = {}
    for spec in encoder.columns:
        found = cache.manifest.columns[spec.name].fingerprint["encoder"] if spec.name in cache.manifest.columns else {}
        lines |= dict.fromkeys(differences({"encoder": found}, {"encoder": encoder.fingerprint()}))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise FingerprintError(
            f"the encoder made there is not the one that {cache.root} is for:\n{shown}\n"
            "Say what `auto` is to mean: weights by file, --set encoder.precision=fp16 for GPUs or fp32."
        )


_kept: dict[str, Kit] = {}
"""The kit of this process, kept between its tasks; one at most, since encoders are large."""


def kept_kit(job: Job) -> Kit:
    """The kit for a job, made when first asked for; that of another job is given up. Raises as `Kit.make` does."""
    there = _kept.get("kit")
    if there is None or there.job != job:
        forget()
        there = _kept["kit"] = Kit.make(job)
    return there


def forget() -> None:
    """Give up what is kept between tasks."""
    if "kit" in _kept:
        _kept.pop("kit").cache.close()


def run_task(
    kit: Kit,
    task: ShardTask,
    advance: Callable[[int], None] = lambda number: None,
    say: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> Outcome:
    """Write what the range lacks; `advance` is told of samples that are encoded.

    `check` is called after every batch, and while somebody else is writing the range: it may raise to give up. Raises
    `SampleError` and `MissingFileError` for a sample that cannot be read, unless it is skipped, and what the encoder raises.
    """
    told = False

    def wait(holder: str) -> None:
        nonlocal told
        if not told:
            say(f"{task} are being written by {holder}; waiting for it to end")
        told = True
        check()
        time.sleep(PAUSE)

    def done(number: int) -> None:
        advance(number)
        check()

    cache, maker = kit.cache, kit.maker()
    with holding(cache.root, task.name, wait):
        if wanted := _lacking(cache, task):
            fill_range(cache.table(task.table), kit.plan(task.table), task.start, task.stop, wanted, maker, done)
    return Outcome(maker.skipped, device_name(kit.job.device), kit.batch_views)


def _lacking(cache: Cache, task: ShardTask) -> set[str]:
    """Columns that lack a shard of the range now."""
    columns = cache.manifest.columns
    places = [(name, shard) for name in task.columns for shard in _shards(columns[name], task.start, task.stop)]
    there = each(lambda place: commits.path(cache.root, task.table, *place).is_file(), places, cache.root)
    return {name for (name, _), is_there in zip(places, there, strict=True) if not is_there}


def fill_range(
    table: Table, plan: TablePlan, start: int, stop: int, wanted: set[str], maker: RowMaker, advance: Callable[[int], None]
) -> None:
    """Write samples `start:stop` of the `wanted` columns; shards that are there already are passed over."""
    keys = plan.keys[start:stop]
    made = maker.rows(plan.source, keys, wanted, _read_before(table, keys, start, wanted))
    with RangeWriter(table, wanted, start, stop) as writer, Behind(depth=2) as queue, closing(made):
        for number, rows in made:
            queue.put(partial(writer.append, rows))
            advance(number)


def _read_before(table: Table, keys: tuple[str, ...], start: int, wanted: set[str]) -> set[str]:
    """Samples that columns which are there already hold as read."""
    if SAMPLE_OK in wanted:
        return set()
    column = table.column(SAMPLE_OK)
    column.refresh()
    marks = column.read(range(start, start + len(keys)))
    return {key for key, mark in zip(keys, marks, strict=True) if mark}


def fill_table(table: Table, plan: TablePlan, maker: RowMaker, progress: Progress, only: Collection[int]) -> int:
    """Write every range that lacks a shard and holds one of these sample numbers; returns how many samples were encoded."""
    cache = Cache(table.root, table.manifest)
    tasks = [task for task in shard_tasks(cache, table.column_names()) if task.table == table.name]
    tasks = open_tasks(cache, [task for task in tasks if any(task.start <= number < task.stop for number in only)])
    left = sum(task.samples for task in tasks)
    progress.start(f"{table.name}: encoding", table.samples, "samples", done=table.samples - left)
    for task in tasks:
        fill_range(table, plan, task.start, task.stop, _lacking(cache, task), maker, progress.advance)
    progress.stop()
    for name in table.column_names():
        table.column(name).refresh()
    return left


def views_per_batch(device: str) -> int:
    """How many views are encoded at once unless told otherwise."""
    return BATCH_VIEWS.get(_device_kind(device), BATCH_VIEWS["cpu"])


def device_name(device: str) -> str:
    """The GPU's name, or the number of CPU cores."""
    import torch

    if _device_kind(device) != "cuda":
        return f"cpu ({os.cpu_count()} cores)"
    return torch.cuda.get_device_name(None if device == "auto" else device)


def _device_kind(device: str) -> str:
    from pcd.device import resolve_device

    return resolve_device(device).split(":")[0]
