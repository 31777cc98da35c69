"""Train: a head on cached columns. No image is opened and no encoder is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.cache import Cache, Table
from pcd.device import resolve_device
from pcd.errors import CacheError, RecipeError, RunError, TextTowerError, suggest
from pcd.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from pcd.evaluation.protocols import get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.files import plain, write_json
from pcd.heads import head_options
from pcd.heads.base import Batch, Head
from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.stages.inference import head_predictor, score
from pcd.stages.reading import OWN, Reading
from pcd.stages.runs import HISTORY_FILE, Run, create_or_continue, default_run_folder
from pcd.stages.texts import encoder_digest
from pcd.training.loop import EpochReport, Loop
from pcd.training.rows import RowSource, TrainingRows
from pcd.views import TRUTH


def train(
    recipe: Recipe,
    cache: Cache,
    root: Path | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    through: Callable[[RowSource], RowSource] = lambda source: source,
    reading: Reading = OWN,
) -> Run:
    """Train the head of `recipe` on the cache's train table, validating on its val table; returns the finished run.

    The run in `root` (default: a name made of cache and recipe) is continued if it was interrupted; with `resume` there must be
    one. All columns are read `through` a filter (for baselines that spoil them); trainings that are given one `reading` share
    what they read. Raises `IncompleteError` for missing rows, `RunError`, `RecipeError`, `TextTowerError` or `TrainingError`.
    """
    where = torch.device(resolve_device(device))
    _require(cache, recipe)
    root = root or default_run_folder(cache, recipe)
    if resume and not (root / "run.json").is_file():
        raise RunError(f"--resume: {root} holds no run to continue.")
    run, found = create_or_continue(root, recipe, cache)
    if found and run.is_finished:
        progress.say(f"{root} is complete: epoch {len(run.history)}.")
        return run
    learn, check = cache.table("train"), cache.table("val")
    head, rows = run.new_head().to(where), TrainingRows(learn, recipe.train)
    _attach(rows, learn, run, reading, through(_source(learn, rows.rows, run, reading, where, progress)), where)
    held_out = check.view_rows(check.usable()).reshape(-1)
    validate = _validation(run, check, through(_source(check, held_out, run, reading, where, progress)))
    loop = Loop(head, rows, recipe.train, HIGHER_IS_BETTER, validate, run.checkpoints)
    if loop.resume():
        progress.say(f"{root}: continuing after epoch {loop.epoch}")
    else:
        head.initialise(_Context(cache, rows))
        progress.say(f"{root}: a new run; {len(rows.rows)} rows, {rows.steps()} steps an epoch")
    progress.start("training", recipe.train.epochs, "epochs", done=loop.epoch)

    def after_epoch(report: EpochReport) -> None:
        write_json(root / HISTORY_FILE, plain(loop.history))
        progress.advance()
        on_epoch(report)

    loop.run(after_epoch)
    progress.stop()
    return run


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
        for column in dict.fromkeys((*cls.reads(options), *table.column_names())):
            table.column(column).require()


def _attach(rows: TrainingRows, table: Table, run: Run, reading: Reading, source: RowSource, device: torch.device) -> None:
    """Targets by the recipe's rules, columns from `source`."""
    _, options = head_options(run.recipe.head)
    settings = {"embedding": run.recipe.targets.embedding, "depth": run.recipe.targets.depth}
    depth_range = (options.min_depth, options.max_depth)
    group = TRUTH[run.recipe.views.depth_resize]
    rows.attach(source, reading.targets(table, rows.rows, run.grid, settings, depth_range, group), device)


def _source(
    table: Table, rows: npt.NDArray[np.int64], run: Run, reading: Reading, device: torch.device, progress: Progress
) -> RowSource:
    cls, options = head_options(run.recipe.head)
    source, words = reading.columns(table, cls.reads(options), rows, run.recipe.train.residency, device)
    progress.say(f"{table.name}: {words}")
    return source


def _validation(run: Run, table: Table, source: RowSource) -> Callable[[Head], Mapping[str, float]]:
    """Scores a head on the val table under the recipe's validation protocol, with flip TTA if there are mirrored views."""
    low, high = table.manifest.dataset["depth_range"]
    protocol = get_protocol(run.recipe.train.protocol, table.manifest.dataset["family"], (low, high))
    protocol = replace(protocol, tta=protocol.tta and table.plan.flips)
    if unknown := [name for name in run.recipe.train.monitor if name not in METRICS]:
        raise RecipeError(f"train.monitor: unknown metric {unknown[0]!r}.{suggest(unknown[0], METRICS)}")

    def validate(head: Head) -> Mapping[str, float]:
        scorer = Scorer([protocol], table.plan)
        score(head_predictor(head.eval(), table, source, run.grid), table, scorer, TRUTH[run.recipe.views.depth_resize])
        return scorer.scores[protocol.label].means()

    return validate


class _Context:
    """What a head may look at before training."""

    def __init__(self, cache: Cache, rows: TrainingRows) -> None:
        self._cache = cache
        self._rows = rows

    def text(self, phrases: Sequence[str]) -> Tensor:
        """Text embeddings stored beside the columns."""
        encoder = encoder_digest(self._cache)
        if encoder is None:
            raise TextTowerError(
                f'{self._cache.root} was made with weights that have no text tower, and head.table_init = "text" needs text '
                'embeddings. Use head.table_init = "tokens" or "random", or extract with weights that have one.'
            )
        stored = self._cache.text(encoder, phrases)
        if stored is None:
            raise CacheError(
                f"{self._cache.root} lacks the text embeddings of {phrases[0]!r} ... {phrases[-1]!r}. "
                "`pcd extract` with this recipe (--recipe NAME) adds them in seconds; no view is encoded again."
            )
        return torch.from_numpy(stored)

    def batches(self) -> Iterator[Batch]:
        """The training rows once."""
        return self._rows.once()
