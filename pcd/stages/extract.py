"""Extract: one pass of the frozen encoder over every view, into the cache.

dataset -> views -> encoder -> columns, shard by shard, in this process, in several, or on the workers of a cluster. What is
committed is never computed again; an interrupted extraction continues with the ranges of samples that lack a shard.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pcd.cache import Cache, provenance
from pcd.cache.compact import TokenForm
from pcd.cache.lock import sharing, writing
from pcd.datasets import create_dataset
from pcd.device import resolve_device
from pcd.encoders import key_of, request_of
from pcd.errors import RecipeError, UsageError
from pcd.overlap import ahead
from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.remote import AnyPath, any_path
from pcd.stages.checks import refuse_other_samples
from pcd.stages.extract_plan import How, Order, Ready, located_encoder, prepare, undisturbed
from pcd.stages.frames import located
from pcd.stages.needs import asked_by, columns_of_all, needs_of_all
from pcd.stages.parts import Part
from pcd.stages.plan import plan_manifest, plan_tables, refuse_other_form, view_plan
from pcd.stages.shard_results import Results, refuse_failures, unexplained
from pcd.stages.shard_task import Kit, Outcome, ShardTask, device_name, open_tasks, run_task, views_per_batch
from pcd.stages.texts import lacks_texts
from pcd.views import TRUTH

if TYPE_CHECKING:
    from pcd.stages.rows import OnError


AT_ONCE = 3
"""On a GPU one range is decoded, one encoded, one written; memory is that of three (see `pcd.stages.rows`)."""


@dataclass
class Extraction:
    """What an extraction did: the cache, how many samples were encoded now, and which were skipped and why.

    `left` is the number of samples that other parts have not written yet.
    """

    cache: Cache
    encoded: int
    skipped: dict[str, str]
    left: int = 0


def extract(
    recipe: Recipe,
    root: str | AnyPath,
    *,
    device: str = "auto",
    on_error: OnError = "stop",
    batch_views: int | None = None,
    tokens: TokenForm | None = None,
    also: Sequence[Recipe] = (),
    together: Sequence[Recipe] = (),
    workers: int = 1,
    dask: str | None = None,
    part: str | None = None,
    progress: Progress = SILENT,
) -> Extraction:
    """Fill the cache in folder `root`, or at such an address, with what `recipe` needs; returns at once if everything is there.

    That is what its encoders always make, the columns that its head reads beside those (layers), texts and ground truth; each
    encoder passes over the views by itself. What the recipes in `also` need beside tokens (texts to embed, other ways to resize
    the depth) is made in the pass of the first; those in `together` are served as `recipe` is, a pass for each encoder of all.
    `tokens` says how patch tokens are stored; absent: as the cache has them, float16 in a new one.

    It is done by so many `workers` (processes) on this machine, or by those of the scheduler at the address `dask`; `part`,
    such as `2/5`, leaves the rest to others. The cache is the same, bit for bit. Raises `DatasetError`, `WeightsError`,
    `SpaceError`, `FingerprintError` if the cache was made another way, and `IncompleteError` for shards that no worker could
    write.
    """
    how = How(device, on_error, batch_views, tokens, workers, dask, _share(workers, dask, part), progress)
    root = any_path(root)
    first, *others = _passes([recipe, *together])
    whole = _extract_one(first, root, how, also, last=not others)
    for number, served in enumerate(others, start=1):
        more = _extract_one(served, root, how, last=number == len(others))
        whole = Extraction(more.cache, whole.encoded + more.encoded, whole.skipped | more.skipped, max(whole.left, more.left))
    return whole


def _passes(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """The recipes that one encoder serves, each with that encoder, in the order in which encoders are first named.

    They share a canvas; ground truth and texts may differ. Raises `RecipeError` for another dataset or canvas.
    """
    for other in recipes[1:]:
        for part in ("dataset", "views"):
            mine, theirs = getattr(recipes[0], part), getattr(other, part)
            if part == "views":
                mine, theirs = (view.model_copy(update={"depth_resize": "nearest"}) for view in (mine, theirs))
            if mine != theirs:
                raise RecipeError(f"recipes {recipes[0].name} and {other.name} differ in [{part}]: they cannot share a cache.")
    found: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        for one in recipe.one_by_one():
            found.setdefault(repr(sorted(one.encoder.items())), []).append(one)
    return list(found.values())


def _extract_one(served: Sequence[Recipe], root: AnyPath, how: How, also: Sequence[Recipe] = (), *, last: bool) -> Extraction:
    """The pass of the encoder that the recipes `served` name; `last` if no other follows."""
    begun, recipe, recipes, progress = time.monotonic(), served[0], [*served, *also], how.progress
    columns = partial(columns_of_all, served)
    dataset = create_dataset(recipe.dataset["name"], recipe.options("dataset"), "dataset")
    tables = plan_tables(dataset)
    wanted = plan_manifest(dataset, view_plan(dataset, recipe.views), tables)
    key = key_of(recipe.encoder)
    request = request_of(recipe.encoder["name"], recipe.options("encoder"), "encoder")
    for note in dataset.notes:
        progress.say(note)
    if (root / "manifest.json").exists():
        cache = Cache.open(root)
        refuse_other_samples(cache, wanted)
        refuse_other_form(cache, how.tokens)
        noted = (root / provenance.PROVENANCE).is_file()  # not if the last extraction ended right behind its last commit
        if noted and _nothing_to_do(cache, key, request, recipes, columns):
            progress.say(f"{root} is complete: {describe_rows(cache)}. Nothing to do.")
            return Extraction(cache, 0, {})
    order = Order(
        recipes=recipes,
        columns=columns(),
        last=last,
        root=root,
        dataset=dataset,
        tables=tables,
        wanted=wanted,
        key=key,
        request=request,
        how=how,
    )
    with ExitStack() as held:
        held.enter_context(writing(root) if how.part is None else sharing(root))
        return _carry_out(order, prepare(order, held), begun)


def _share(workers: int, dask: str | None, part: str | None) -> Part | None:
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected at least 1.")
    if dask is not None and workers > 1:
        raise UsageError("--workers starts processes here, --dask uses those of a scheduler: give one of the two.")
    if dask is not None and part is not None:
        raise UsageError("--part is for machines without a scheduler, and --dask has one, which shares the work out: give one.")
    return None if part is None else Part.parse(part)


def _nothing_to_do(
    cache: Cache, key: str, request: dict[str, Any], recipes: Sequence[Recipe], columns: Callable[[], Collection[str]]
) -> bool:
    """Whether the cache holds all that is asked; the same question as last time is answered without importing torch.

    `columns` are those that heads read.
    """
    before = cache.manifest.encoders.get(key, {})
    if before.get("request") != request or not cache.complete:
        return False
    if before.get("asked") == asked_by(recipes):
        return True
    needs = needs_of_all(recipes)
    wanted = {*(f"{TRUTH[resize]}/canvas" for resize in needs.resizes), *columns()}
    return wanted <= set(cache.manifest.columns) and not lacks_texts(cache, key, needs.phrases)


def _carry_out(order: Order, ready: Ready, begun: float) -> Extraction:
    """Do what is to be done, and note down who did it."""
    results, cache, progress = Results(), ready.cache, order.how.progress
    todo = open_tasks(cache, ready.mine)
    total, missing = (sum(task.samples for task in tasks) for tasks in (ready.mine, todo))
    progress.start("encoding", total, "samples", done=total - missing)
    try:
        _run(order, ready, todo, results)
    except BaseException:
        if results.skipped:  # their shards are committed: nobody will meet the reasons again
            _record(order, ready, results, begun)
        raise
    finally:
        progress.stop()
        for table in cache.tables:
            for name in table.column_names():
                table.column(name).refresh()
    results.skipped |= unexplained(cache, order.dataset, order.tables, results.skipped)
    _record(order, ready, results, begun)
    refuse_failures(order.root, order.tables, results)
    skipped = f", {len(results.skipped)} skipped now" if results.skipped else ""
    progress.say(f"{order.root}: {describe_rows(cache)}{skipped}")
    left = sum(task.samples for task in open_tasks(cache, ready.all))
    if order.how.part:
        progress.say(f"part {order.how.part} is done; {left or 'no'} samples are left to other parts.")
    return Extraction(cache, results.encoded, results.skipped, left)


def _run(order: Order, ready: Ready, todo: list[ShardTask], results: Results) -> None:
    progress = order.how.progress
    if ready.kit is not None:
        if ranges_at_once(order.how.device) > 1:
            _overlapped(ready.kit, todo, results, progress, ranges_at_once(order.how.device))
            return
        for task in todo:
            results.take(task, run_task(ready.kit, task, progress.advance, progress.say))
    elif todo:
        from pcd.stages.extract_workers import run_on_workers  # distributed is imported by who uses it

        run_on_workers(ready.job, todo, results, progress, workers=order.how.workers, address=order.how.dask)


def ranges_at_once(device: str) -> int:
    """How many ranges of samples are under way in this process: a GPU encodes one faster than it is decoded or written.

    On a CPU there is nothing to be gained, and changes on the disk keep their order.
    """
    return 1 if resolve_device(device) == "cpu" else AT_ONCE


def _overlapped(kit: Kit, todo: list[ShardTask], results: Results, progress: Progress, number: int) -> None:
    """One range after the other is encoded, while those before it are written and those behind it decoded."""
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise InterruptedError

    def run(task: ShardTask) -> Outcome:
        check()
        return run_task(kit, task, progress.advance, progress.say, check)

    with closing(ahead(run, todo, number, number - 1)) as outcomes:
        try:
            for task, outcome in zip(todo, outcomes, strict=True):
                results.take(task, outcome)
        finally:
            stopped.set()  # what is under way ends after its batch


def _record(order: Order, ready: Ready, results: Results, begun: float) -> None:
    """By what, on what and from where."""
    facts: dict[str, Any] = {
        "device": results.device or device_name(order.how.device),
        "dataset": located(order.recipe.dataset),
        "encoder_table": located_encoder(order.recipe),
        "encoded": results.encoded,
        "skipped": results.skipped,
        "seconds": round(time.monotonic() - begun, 1),
        "batch_views": results.batch_views or order.how.batch_views or views_per_batch(order.how.device),
        **ready.facts,
    }
    how = order.how
    ways = {"part": how.part and str(how.part), "workers": how.workers if how.workers > 1 else None, "dask": how.dask}
    facts |= {name: value for name, value in ways.items() if value is not None}
    if results.failures:
        facts["failed"] = [str(failure.task) for failure in results.failures]
    with undisturbed(order):
        provenance.append(order.root, facts)


def describe_rows(cache: Cache) -> str:
    """For example `samples: train 9, val 1, test 4; views of each: 8`."""
    tables = ", ".join(f"{name} {table.samples}" for name, table in cache.manifest.tables.items())
    return f"samples: {tables}; views of each: {cache.manifest.plan.views}"
