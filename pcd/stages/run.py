"""Run: a recipe through extract, train and evaluate, skipping what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.remote import AnyPath
from pcd.stages.evaluate import Evaluation, evaluate
from pcd.stages.extract import extract
from pcd.stages.needs import shipped_recipes
from pcd.stages.runs import Run
from pcd.stages.train import train

if TYPE_CHECKING:
    from pcd.training.loop import EpochReport


@dataclass(frozen=True)
class Outcome:
    """What a recipe led to."""

    run: Run
    evaluation: Evaluation


def run_recipe(
    recipe: Recipe,
    cache: str | AnyPath,
    root: Path | None = None,
    *,
    device: str = "auto",
    checkpoint: str = "abs_rel",
    progress: Progress = SILENT,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> Outcome:
    """All stages of `recipe`; the cache goes to folder `cache`, the run to `root` or a folder named after both."""
    extraction = extract(recipe, cache, device=device, also=shipped_recipes(recipe.dataset["name"]), progress=progress)
    with extraction.cache as opened:
        run = train(recipe, opened, root, device=device, progress=progress, on_epoch=on_epoch)
        split = "test" if "test" in opened.manifest.tables else "val"
        evaluation = evaluate(run, opened, split=split, checkpoint=checkpoint, device=device, progress=progress)
    return Outcome(run, evaluation)
