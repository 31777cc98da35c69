"""What an extraction is asked for, and how that becomes a cache that says what it is to hold and tasks that fill it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcd.cache import Cache, ColumnEntry, Manifest
from pcd.cache.compact import TokenForm
from pcd.cache.lock import PART, holding, parts
from pcd.cache.manifest import MANIFEST
from pcd.datasets import Dataset, registry
from pcd.encoders import create_encoder, with_columns
from pcd.errors import CacheError
from pcd.fingerprint import file_digest
from pcd.progress import Progress
from pcd.recipe import Recipe, parse_table
from pcd.remote import AnyPath
from pcd.stages.checks import (
    native_size,
    refuse_missing_files,
    refuse_other_columns,
    refuse_other_samples,
    refuse_small_disk,
)
from pcd.stages.frames import located
from pcd.stages.needs import Needs, asked_by, needs_of_all
from pcd.stages.parts import Part
from pcd.stages.plan import VIEW_CAMERA, TablePlan, asked_before, plan_columns
from pcd.stages.shard_task import Job, Kit, ShardTask, shard_tasks
from pcd.stages.texts import embed_texts

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder
    from pcd.stages.rows import OnError

PLANNING = "planning"
PAUSE = 0.1
"""Seconds between two looks at whether another part has done planning."""


@dataclass(frozen=True)
class How:
    """What is the same for all encoders of an extraction."""

    device: str
    on_error: OnError
    batch_views: int | None
    tokens: TokenForm | None
    workers: int
    dask: str | None
    part: Part | None
    progress: Progress


@dataclass(frozen=True)
class Order:
    """What is asked for, and what follows from it without opening an image."""

    recipes: Sequence[Recipe]
    columns: Sequence[str]
    """Those that heads read."""
    last: bool
    """Whether no other encoder follows."""
    root: AnyPath
    dataset: Dataset
    tables: list[TablePlan]
    wanted: Manifest
    key: str
    request: dict[str, Any]
    how: How

    @property
    def recipe(self) -> Recipe:
        """One that names the encoder whose tokens are wanted."""
        return self.recipes[0]


@dataclass(frozen=True)
class Ready:
    """A cache that says what it is to hold, and what is to be done so that it does."""

    cache: Cache
    job: Job
    kit: Kit | None
    """None if workers make their own."""
    all: list[ShardTask]
    mine: list[ShardTask]
    facts: dict[str, Any]
    """For the provenance."""


def prepare(order: Order, held: ExitStack) -> Ready:
    """Plan, and write the plan down; what `held` locks stays locked."""
    if order.how.on_error == "stop":
        refuse_missing_files(order.dataset, order.tables)
    recipe, needs = order.recipe, needs_of_all(order.recipes)
    size = order.wanted.plan.view_size
    encoder = create_encoder(recipe.encoder["name"], recipe.options("encoder"), size, order.how.device, "encoder")
    native = native_size(order.dataset, order.tables)
    with undisturbed(order):
        if order.how.part is not None:
            held.enter_context(holding(order.root, f"{PART}{order.how.part.name}", _Taken(order.root, order.how.part)))
        there = Manifest.read(order.root) if (order.root / MANIFEST).exists() else order.wanted
        encoder = _with_asked_columns(encoder, order, there)
        entries = plan_columns(there, encoder, needs.resizes, native, order.how.tokens, order.columns)
        cache = _write_plan(order, encoder, entries, needs)
    job = Job(
        cache=str(order.root.absolute()),
        manifest=file_digest(order.root / MANIFEST),
        recipe=_sendable(recipe),
        columns=tuple(entries),
        outputs=tuple(spec.name for spec in encoder.columns),
        resizes=needs.resizes,
        on_error=order.how.on_error,
        device=order.how.device,
        batch_views=order.how.batch_views,
    )
    alone = order.how.workers == 1 and order.how.dask is None
    kit = Kit(job, cache, order.dataset, order.tables, encoder) if alone else None
    tasks = shard_tasks(cache, entries)
    facts = {"encoder": encoder.fingerprint(), "texts": needs.phrases if encoder.has_text else []}
    return Ready(cache, job, kit, tasks, order.how.part.of(tasks) if order.how.part else tasks, facts)


class _Taken:
    """Refuses a part that somebody else is writing."""

    def __init__(self, root: AnyPath, part: Part) -> None:
        self._root, self._part = root, part

    def __call__(self, holder: str) -> None:
        raise CacheError(f"part {self._part} of {self._root} is being written by {holder}; wait for it, or take another part.")


@contextmanager
def undisturbed(order: Order) -> Iterator[None]:
    """While no other part plans or records what it did."""
    told = False

    def wait(holder: str) -> None:
        nonlocal told
        if not told:
            order.how.progress.say(f"{order.root} is being planned by {holder}; waiting for it")
        told = True
        time.sleep(PAUSE)

    if order.how.part is None:  # the whole cache is held
        yield
        return
    with holding(order.root, PLANNING, wait):
        yield


def _with_asked_columns(encoder: Encoder, order: Order, there: Manifest) -> Encoder:
    """The encoder with the columns that heads read, and those that a head before asked this cache for."""
    encoder = with_columns(encoder, [*order.columns, *asked_before(there, encoder)])
    known = {spec.name for spec in encoder.columns} | there.columns.keys() | {VIEW_CAMERA}
    missing = [name for name in order.columns if name not in known]
    if missing and order.last:  # else one that comes later may make them
        made = order.recipe.encoder["name"]
        order.how.progress.say(f"The head reads {', '.join(missing)}, which {made} does not make; it cannot train so.")
    return encoder


def _write_plan(order: Order, encoder: Encoder, entries: dict[str, ColumnEntry], needs: Needs) -> Cache:
    """The cache, which now says that it is to hold these columns, with the texts that are asked for."""
    cache = _open_or_create(order.root, order.wanted, order.tables)
    refuse_other_columns(cache, entries)
    manifest, new = cache.manifest, [name for name in entries if name not in cache.manifest.columns]
    part = order.how.part
    others = parts(order.root) if new and part else {}
    if busy := [
        f"part {name} by {holder}" for name, holder in others.items() if order.how.part and name != order.how.part.name
    ]:
        raise CacheError(
            f"{order.root}: column {new[0]} cannot be added while parts without it are being written ({'; '.join(busy)}); "
            "wait for them to end."
        )
    refuse_small_disk(cache, entries, order.how.progress)
    known: dict[str, Any] = {"table": order.recipe.encoder, "request": order.request}
    whole = {**known, "asked": asked_by(order.recipes)}
    if new or manifest.encoders.get(order.key) != whole:
        manifest.encoders[order.key] = known
        cache.add_columns(entries)
    embed_texts(cache, encoder, needs.phrases, order.how.progress, last=order.last)
    if manifest.encoders[order.key] != whole:
        manifest.encoders[order.key] = whole
        manifest.write(order.root)
    return cache


def _open_or_create(root: AnyPath, wanted: Manifest, tables: list[TablePlan]) -> Cache:
    if not (root / MANIFEST).exists():
        return Cache.create(root, wanted, {table.name: table.keys for table in tables})
    cache = Cache.open(root)
    refuse_other_samples(cache, wanted)  # it may have come into being a moment ago
    return cache


def _sendable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values that mean the same in another working folder."""
    table = located(recipe.dataset)
    options = parse_table(registry.get(recipe.dataset["name"]).Options, recipe.options("dataset"), "dataset")
    for key in recipe.options("dataset"):
        value = getattr(options, key)
        in_root = options.root is not None and (options.root / str(value)).exists()  # where datasets look first
        if isinstance(value, Path) and value.exists() and not in_root:
            table[key] = str(value.resolve())
    return {**recipe.model_dump(), "dataset": table, "encoder": located_encoder(recipe)}


def located_encoder(recipe: Recipe) -> dict[str, Any]:
    """The `[encoder]` table with the path of a weights file made absolute."""
    weights = Path(recipe.encoder.get("weights", ""))
    return {**recipe.encoder, "weights": str(weights.resolve())} if weights.is_file() else dict(recipe.encoder)
