"""Train: a head on cached columns. No image is opened and no encoder is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pcd.cache import Cache, Table
from pcd.device import resolve_device
from pcd.errors import CacheError, RunError, suggest
from pcd.evaluation.metrics import HIGHER_IS_BETTER
from pcd.heads import head_options
from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.stages.context import TrainingContext
from pcd.stages.events import EventWriter, require_tensorboard
from pcd.stages.history import recording
from pcd.stages.reading import OWN, Reading
from pcd.stages.runs import Run, create_or_continue, default_run_folder
from pcd.stages.validation import validation
from pcd.training.loop import EpochReport, Loop
from pcd.training.rows import TrainingRows
from pcd.training.sources import Placed, Residency, Rows, RowSource
from pcd.training.steps import Products
from pcd.training.targets import RowTargets, Targets
from pcd.views import TRUTH


@dataclass(frozen=True)
class Training:
    """A training that is ready to go on. `loop` is None if nothing is left to do."""

    run: Run
    loop: Loop | None


def train(
    recipe: Recipe,
    cache: Cache,
    root: Path | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    residency: Residency | None = None,
    tensorboard: bool = False,
    progress: Progress = SILENT,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    through: Callable[[RowSource], RowSource] | None = None,
    reading: Reading = OWN,
) -> Run:
    """Train the head of `recipe` on the cache's train table, validating on its val table; returns the finished run.

    The run in `root` (default: a name made of cache and recipe) is continued if it was interrupted; with `resume` there must be
    one. `residency` takes the place of the recipe's; `tensorboard` writes events besides. All columns are read `through` a
    filter (for baselines that spoil them); trainings that are given one `reading` share what they read. Raises
    `IncompleteError` for missing rows, `UsageError`, `RunError`, `RecipeError`, `TextTowerError` or `TrainingError`.
    """
    if tensorboard:
        require_tensorboard()
    training = prepare(
        recipe,
        cache,
        root,
        resume=resume,
        device=device,
        residency=residency,
        progress=progress,
        through=through,
        reading=reading,
    )
    run, loop = training.run, training.loop
    if loop is None:
        if tensorboard:
            EventWriter(run, run.history).close()
        return run
    progress.start("training", loop.epochs, "epochs", done=loop.epoch)
    with recording(run, loop.history, tensorboard=tensorboard) as record:

        def after_epoch(report: EpochReport) -> None:
            record()
            progress.advance()
            on_epoch(report)

        loop.run(after_epoch)
    progress.stop()
    return run


def prepare(
    recipe: Recipe,
    cache: Cache,
    root: Path | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    residency: Residency | None = None,
    progress: Progress = SILENT,
    through: Callable[[RowSource], RowSource] | None = None,
    reading: Reading = OWN,
) -> Training:
    """Everything `train` does before the first epoch: the run found or made, columns and targets in place, the head."""
    where = torch.device(resolve_device(device))
    Products(recipe.train.precision, where)  # refuses what the device cannot do before hours of reading
    _require(cache, recipe)
    root = root or default_run_folder(cache, recipe)
    if resume and not (root / "run.json").is_file():
        raise RunError(f"--resume: {root} holds no run to continue.")
    run, found = create_or_continue(root, recipe, cache)
    if found and run.is_finished:
        progress.say(f"{root} is complete: epoch {len(run.history)}.")
        return Training(run, None)
    table = cache.table("train")
    head, rows = run.new_head().to(where), TrainingRows(table, recipe.train)
    columns = _Columns(run, reading, residency or recipe.train.residency, where, through, progress)
    targets = _targets(table, rows, run, reading, hold=head.sees_valid_patches_only or None)
    keep = _looked_at(targets) if head.sees_valid_patches_only else None
    rows.attach(columns.place(table, head.learns_from(head.options), rows.rows, keep), targets, where)
    if rows.streamed:
        progress.say(f"{table.name}: targets would take too much memory: made for each batch from the stored depth")
    val = cache.table("val")
    held_out = columns.place(val, head.reads(head.options), val.view_rows(val.usable()).reshape(-1)).source
    validate = validation(run, val, held_out, where, progress.say, reading)
    context = TrainingContext(cache, rows, head.reads(head.options))
    head.attach(context)
    loop = Loop(head, rows, recipe.train, HIGHER_IS_BETTER, validate, run.checkpoints)
    if loop.resume():
        progress.say(f"{root}: continuing after epoch {loop.epoch}")
    else:
        head.initialise(context)
        what = f"{rows.steps()} steps an epoch" if loop.trains else "nothing to train: the head is validated once"
        progress.say(f"{root}: a new run; {len(rows.rows)} rows, {what}")
    return Training(run, loop)


@dataclass(frozen=True)
class _Columns:
    """How the columns that the head reads are placed."""

    run: Run
    reading: Reading
    residency: Residency
    device: torch.device
    through: Callable[[RowSource], RowSource] | None
    progress: Progress

    def place(self, table: Table, names: Sequence[str], rows: Rows, keep: npt.NDArray[np.bool_] | None = None) -> Placed:
        """The columns `names` of `rows`; through a filter nothing is left out, since it may move patches."""
        keep = None if self.through else keep
        placed = self.reading.columns(table, names, rows, self.residency, self.device, keep)
        self.progress.say(f"{table.name}: {placed.words}")
        return replace(placed, source=self.through(placed.source)) if self.through else placed


def _require(cache: Cache, recipe: Recipe) -> None:
    """Everything that training reads must be there before it begins."""
    cls, options = head_options(recipe.head)
    truth = f"{TRUTH[recipe.views.depth_resize]}/canvas"
    for name in ("train", "val"):
        if name not in cache.manifest.tables:
            raise CacheError(
                f"{cache.root} has no {name} table; training needs samples to learn from and others to validate on."
            )
        table = cache.table(name)
        if truth not in table.column_names():
            raise CacheError(
                f"{cache.root} holds no ground truth resized by views.depth_resize = {recipe.views.depth_resize!r}. "
                "`pcd extract` with this recipe (--recipe NAME) adds it; no view is encoded again."
            )
        if absent := [column for column in cls.learns_from(options) if column not in table.column_names()]:
            raise CacheError(
                f"{cache.root}: table {name} has no column {absent[0]!r}.{suggest(absent[0], table.column_names())} "
                "If the encoder can make it, `pcd extract` with the same --set adds it; what is there stays."
            )
        for column in table.column_names():
            table.column(column).require()


def _targets(table: Table, rows: TrainingRows, run: Run, reading: Reading, *, hold: bool | None) -> Mapping[str, Targets]:
    """Targets of all rows by the recipe's rules."""
    _, options = head_options(run.recipe.head)
    settings = {"embedding": run.recipe.targets.embedding, "depth": run.recipe.targets.depth}
    depth_range = (options.min_depth, options.max_depth)
    return reading.targets(table, rows.rows, run.grid, settings, depth_range, TRUTH[run.recipe.views.depth_resize], hold)


def _looked_at(targets: Mapping[str, Targets]) -> npt.NDArray[np.bool_]:
    """The patches `(N, P)` that some loss counts, of targets that are held."""
    valid: npt.NDArray[np.bool_] = np.any([each.valid for each in targets.values() if isinstance(each, RowTargets)], axis=0)
    return valid
