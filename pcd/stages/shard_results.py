"""What has become of the shards of an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pcd.cache import Cache, provenance
from pcd.cache.table import SAMPLE_OK
from pcd.datasets import Dataset
from pcd.errors import IncompleteError, MissingFileError, SampleError
from pcd.remote import AnyPath
from pcd.stages.plan import TablePlan
from pcd.stages.shard_task import Outcome, ShardTask

SHOWN = 8
"""Keys of a shard that are named."""


@dataclass(frozen=True)
class Failure:
    """A range of samples that could not be written, and why."""

    task: ShardTask
    reason: str


@dataclass
class Results:
    """What was encoded and skipped so far, what could not be written, and how it was computed."""

    encoded: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    given_up: str = ""
    """Why not even all was tried, if so."""
    device: str = ""
    batch_views: int = 0

    def take(self, task: ShardTask, outcome: Outcome) -> None:
        """A range is written."""
        self.encoded += task.samples
        self.skipped |= outcome.skipped
        self.device, self.batch_views = outcome.device, outcome.batch_views


def refuse_failures(root: AnyPath, tables: Sequence[TablePlan], results: Results) -> None:
    """Raise `IncompleteError` if some ranges could not be written, naming tables, samples, keys and reasons."""
    if not results.failures:
        return
    keys = {table.name: table.keys for table in tables}
    lines = [
        f"  {failure.task} ({_named(keys[failure.task.table][failure.task.start : failure.task.stop])}): {failure.reason}"
        for failure in sorted(results.failures, key=lambda failure: (failure.task.table, failure.task.start))
    ]
    number = f"{len(lines)} shard{'s' * (len(lines) != 1)}"
    rest = results.given_up or "All others are there."
    shown = "\n".join(lines)
    raise IncompleteError(
        f"{root}: {number} could not be written:\n{shown}\n{rest} Once the cause is gone, the same command continues."
    )


def _named(keys: Sequence[str]) -> str:
    if len(keys) <= SHOWN:
        return ", ".join(keys)
    return f"{', '.join(keys[: SHOWN - 1])}, ... {keys[-1]}: {len(keys)} keys"


def unexplained(cache: Cache, dataset: Dataset, tables: Sequence[TablePlan], known: dict[str, str]) -> dict[str, str]:
    """Samples marked as skipped of which nobody noted why: a process that is killed notes nothing. With the reason of today."""
    known, found = {**provenance.skipped(cache.root), **known}, {}
    for plan in tables:
        table = cache.table(plan.name)
        if SAMPLE_OK not in table.column_names() or not (marks := table.column(SAMPLE_OK)).complete:
            continue
        for key, mark in zip(plan.keys, marks.read(range(table.samples)), strict=True):
            if not mark and key not in known:
                found[key] = _reason(dataset, plan, key)
    return found


def _reason(dataset: Dataset, plan: TablePlan, key: str) -> str:
    try:
        dataset.load(plan.source, key)
    except (SampleError, MissingFileError) as error:
        return str(error)
    return "it could not be used when it was extracted, by a process that did not live to say why; now it can be read."
