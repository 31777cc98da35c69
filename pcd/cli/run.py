"""`pcd run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcd.cli import options
from pcd.cli.app import MAKE, app, reporting


@app.command(rich_help_panel=MAKE, epilog="Example: pcd run pipelines/nyu.toml --root /data/nyu")
def run(
    recipe: Annotated[str, typer.Argument(help="A name in pipelines/ or a TOML file.", show_default=False)],
    root: Annotated[Path | None, typer.Option(help="Folder of the dataset.", show_default=False)] = None,
    cache: Annotated[str | None, options.cache("Folder of the cache, or s3://..., gs://..., az://...", "cache/DATASET")] = None,
    run: options.Run = None,
    weights: options.Weights = None,
    set_: options.Set = None,
    device: options.Device = "auto",
) -> None:
    """Extract, train and evaluate as a recipe says, skipping what is done."""
    from pcd.cli.evaluate import print_scores
    from pcd.cli.train import EpochLines, print_best
    from pcd.recipe_files import load_recipe
    from pcd.stages.recipes import extraction_recipe
    from pcd.stages.run import run_recipe

    dataset = load_recipe(recipe, set_ or ()).dataset["name"]
    resolved = extraction_recipe(dataset, recipe, set_ or (), root=root, weights=weights)
    with reporting() as progress:
        outcome = run_recipe(
            resolved,
            cache or Path("cache") / dataset,
            run,
            device=device,
            progress=progress,
            on_epoch=EpochLines(resolved.train.epochs),
        )
    print_best(outcome.run)
    print_scores(outcome.evaluation)
