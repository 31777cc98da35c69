"""Extract: one pass of the frozen encoder over every view, into the cache.

dataset -> views -> encoder -> columns, shard by shard. What is committed is never computed again; an interrupted extraction
continues with the first range of samples that lacks a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pcd
from pcd.cache import Cache, Manifest, Table
from pcd.cache.lock import writing
from pcd.cache.table import SAMPLE_OK
from pcd.cache.writer import RangeWriter
from pcd.datasets import Dataset, create_dataset
from pcd.encoders import create_encoder, request_of, split_name
from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.stages.checks import (
    native_size,
    refuse_missing_files,
    refuse_other_columns,
    refuse_other_samples,
    refuse_small_disk,
)
from pcd.stages.frames import PROVENANCE, located
from pcd.stages.needs import asked_by, needs_of_all
from pcd.stages.pipeline import Behind
from pcd.stages.plan import TablePlan, plan_columns, plan_manifest, plan_tables, view_plan
from pcd.stages.texts import embed_texts, lacks_texts
from pcd.views import TRUTH

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder
    from pcd.stages.rows import Arrays, OnError, RowMaker

BATCH_VIEWS = {"cuda": 64, "mps": 16, "cpu": 4}


@dataclass
class Extraction:
    """What an extraction did: the cache, how many samples were encoded now, and which were skipped and why."""

    cache: Cache
    encoded: int
    skipped: dict[str, str]


def extract(
    recipe: Recipe,
    root: Path,
    *,
    device: str = "auto",
    on_error: OnError = "stop",
    batch_views: int | None = None,
    also: Sequence[Recipe] = (),
    progress: Progress = SILENT,
) -> Extraction:
    """Fill the cache in folder `root` with what `recipe` needs; returns at once if everything is there.

    What the recipes in `also` need beside the tokens (texts to embed, other ways to resize the depth) is made in the same pass.
    Raises `DatasetError`, `WeightsError`, `SpaceError`, and `FingerprintError` if the cache was made another way.
    """
    dataset = create_dataset(recipe.dataset["name"], recipe.options("dataset"), "dataset")
    tables = plan_tables(dataset)
    wanted = plan_manifest(dataset, view_plan(dataset, recipe.views), tables)
    kind = split_name(recipe.encoder["name"])[0]
    request = request_of(recipe.encoder["name"], recipe.options("encoder"), "encoder")
    for note in dataset.notes:
        progress.say(note)
    if (root / "manifest.json").exists():
        cache = Cache.open(root)
        refuse_other_samples(cache, wanted)
        if _nothing_to_do(cache, kind, request, [recipe, *also]):
            progress.say(f"{root} is complete: {describe_rows(cache)}. Nothing to do.")
            return Extraction(cache, 0, {})
    with writing(root):
        return _extract(recipe, root, dataset, tables, wanted, request, device, on_error, batch_views, also, progress)


def _extract(
    recipe: Recipe,
    root: Path,
    dataset: Dataset,
    tables: list[TablePlan],
    wanted: Manifest,
    request: dict[str, Any],
    device: str,
    on_error: OnError,
    batch_views: int | None,
    also: Sequence[Recipe],
    progress: Progress,
) -> Extraction:
    from pcd.stages.rows import RowMaker  # imports torch, which a complete cache does not wait for

    needs, kind = needs_of_all([recipe, *also]), split_name(recipe.encoder["name"])[0]
    if on_error == "stop":
        refuse_missing_files(dataset, tables)
    encoder = create_encoder(recipe.encoder["name"], recipe.options("encoder"), wanted.plan.view_size, device, "encoder")
    entries = plan_columns(wanted, encoder, needs.resizes, native_size(dataset, tables))
    cache = _open_or_create(root, wanted, tables)
    refuse_other_columns(cache, entries)
    refuse_small_disk(cache, entries, progress)
    cache.manifest.encoders[kind] = {"table": recipe.encoder, "request": request}
    cache.add_columns(entries)
    entries = {name: cache.manifest.columns[name] for name in entries}
    embed_texts(cache, encoder, needs.phrases, progress)
    batch = batch_views or BATCH_VIEWS.get(_device_kind(device), BATCH_VIEWS["cpu"])
    maker = RowMaker(dataset, wanted.plan, encoder, entries, needs.resizes, on_error, batch)
    encoded = sum(_fill_table(cache.table(table.name), table, maker, progress) for table in tables)
    cache.manifest.encoders[kind]["asked"] = asked_by([recipe, *also])
    cache.manifest.write(root)
    _record(root, recipe, encoder, device, encoded, maker.skipped)
    progress.say(f"{root}: {describe_rows(cache)}" + (f", {len(maker.skipped)} skipped now" if maker.skipped else ""))
    return Extraction(cache, encoded, maker.skipped)


def _nothing_to_do(cache: Cache, kind: str, request: dict[str, Any], recipes: Sequence[Recipe]) -> bool:
    """Whether the cache holds all that is asked; the same question as last time is answered without importing torch."""
    before = cache.manifest.encoders.get(kind, {})
    if before.get("request") != request or not cache.complete:
        return False
    if before.get("asked") == asked_by(recipes):
        return True
    needs = needs_of_all(recipes)
    truths = {f"{TRUTH[resize]}/canvas" for resize in needs.resizes}
    return truths <= set(cache.manifest.columns) and not lacks_texts(cache, needs.phrases)


def _fill_table(table: Table, plan: TablePlan, maker: RowMaker, progress: Progress) -> int:
    """Write every range of samples that lacks a shard; returns how many samples were encoded."""
    columns = {name: table.column(name) for name in table.column_names()}
    unit = max(column.entry.shard_samples for column in columns.values())
    ranges = [(start, min(start + unit, table.samples)) for start in range(0, table.samples, unit)]
    per_sample = {name: column.rows // table.samples for name, column in columns.items()}
    gaps = {name: column.missing() for name, column in columns.items()}

    def lacking(start: int, stop: int) -> set[str]:
        return {
            name
            for name in columns
            if any(low < stop * per_sample[name] and high > start * per_sample[name] for low, high in gaps[name])
        }

    open_ranges = [(start, stop, wanted) for start, stop in ranges if (wanted := lacking(start, stop))]
    left = sum(stop - start for start, stop, _ in open_ranges)
    progress.start(f"{table.name}: encoding", table.samples, "samples", done=table.samples - left)
    for start, stop, wanted in open_ranges:
        with RangeWriter(table, wanted, start, stop) as writer, Behind(depth=2) as queue:
            keys = plan.keys[start:stop]
            for number, rows in maker.rows(plan.source, keys, wanted, _read_before(table, keys, start, wanted)):
                queue.put(_later(writer.append, rows))
                progress.advance(number)
    progress.stop()
    for column in columns.values():
        column.refresh()
    return left


def _read_before(table: Table, keys: tuple[str, ...], start: int, wanted: set[str]) -> set[str]:
    """Samples that columns which are there already hold as read."""
    if SAMPLE_OK in wanted:
        return set()
    marks = table.column(SAMPLE_OK).read(range(start, start + len(keys)))
    return {key for key, mark in zip(keys, marks, strict=True) if mark}


def _later(function: Callable[[Arrays], None], rows: Arrays) -> Callable[[], None]:
    return lambda: function(rows)


def _open_or_create(root: Path, wanted: Manifest, tables: list[TablePlan]) -> Cache:
    if (root / "manifest.json").exists():
        return Cache.open(root)
    return Cache.create(root, wanted, {table.name: table.keys for table in tables})


def _device_kind(device: str) -> str:
    from pcd.device import resolve_device

    return resolve_device(device).split(":")[0]


def _record(root: Path, recipe: Recipe, encoder: Encoder, device: str, encoded: int, skipped: dict[str, str]) -> None:
    """When, by what and on what; kept apart from the manifest so that equal caches are equal bytes."""
    import torch

    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "pcd": pcd.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if _device_kind(device) == "cuda" else f"cpu ({os.cpu_count()} cores)",
        "dataset": located(recipe.dataset),
        "encoder": encoder.fingerprint(),
        "encoded": encoded,
        "skipped": skipped,
    }
    with (root / PROVENANCE).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry, sort_keys=True) + "\n")


def describe_rows(cache: Cache) -> str:
    """For example `samples: train 9, val 1, test 4; views of each: 8`."""
    tables = ", ".join(f"{name} {table.samples}" for name, table in cache.manifest.tables.items())
    return f"samples: {tables}; views of each: {cache.manifest.plan.views}"
