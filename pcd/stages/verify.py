"""Verify: is a cache whole, and are its samples still those of the dataset?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pcd.cache import Cache
from pcd.cache.fault import Fault, file_fault
from pcd.cache.leftovers import Leftover, leftovers
from pcd.cache.metadata import open_damaged
from pcd.cache.table import SAMPLES
from pcd.cache.verify import shard_count, verify_cache
from pcd.errors import CorruptError, DatasetError, UsageError
from pcd.progress import SILENT, Progress
from pcd.remote import AnyPath
from pcd.stages.frames import open_dataset
from pcd.stages.plan import plan_tables


@dataclass(frozen=True)
class Findings:
    """What was found: faults, files that belong to nothing (harmless), and notes on what could not be looked at."""

    shards: int
    faults: list[Fault]
    leftovers: list[Leftover]
    notes: list[str] = field(default_factory=list)


def verify(root: AnyPath, *, fast: bool = False, dataset_root: Path | None = None, progress: Progress = SILENT) -> Findings:
    """Look at everything in the cache of folder `root`; see `verify_cache`.

    `dataset_root` says where the images are, if not where they were. Raises `CacheError` if there is no manifest that can be
    read.
    """
    cache, faults = open_damaged(root)
    with cache:
        progress.start("verifying", shard_count(cache), "shards")
        faults += verify_cache(cache, progress.advance, fast=fast)
        progress.stop()
        more, notes = _compare_samples(cache, dataset_root)
        return Findings(shard_count(cache), [*faults, *more], leftovers(cache), notes)


def _compare_samples(cache: Cache, dataset_root: Path | None) -> tuple[list[Fault], list[str]]:
    """Faults of lists that are not the dataset's, or a note that it is not at hand: a cache does not need its images."""
    try:
        plans = plan_tables(open_dataset(cache, dataset_root))
    except (DatasetError, UsageError, OSError) as error:
        return [], [f"samples not compared with the dataset: {error}"]
    faults = []
    for plan in plans:
        try:
            same = plan.name in cache.manifest.tables and cache.table(plan.name).keys == plan.keys
        except CorruptError:
            continue  # reported already
        if not same:
            detail = f"{cache.root / plan.name / SAMPLES}: the samples are not those of the dataset's list, in its order"
            faults.append(file_fault(f"{plan.name}/{SAMPLES}", detail, table=plan.name, column="samples"))
    return faults, []
