"""`pcd demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import MAKE, app, output, print_notes, reporting


@app.command(rich_help_panel=MAKE, epilog="Example: pcd demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    set_: options.Set = None,
    device: options.Device = "auto",
) -> None:
    """Synthetic scenes through extract, train, evaluate and report, beside two baselines: a few minutes, no downloads."""
    from pcd.cli.train import EpochLines
    from pcd.recipe_files import load_recipe
    from pcd.stages.demo import demo as run_stage

    recipe = load_recipe("demo", set_ or ())
    with reporting() as progress:
        result = run_stage(recipe, out, device=device, progress=progress, on_epoch=EpochLines(recipe.train.epochs))
    table = Table(title="test scores", title_justify="left")
    table.add_column("what predicts")
    for name in ("abs_rel", "rmse", "delta1"):
        table.add_column(name, justify="right")
    for name, scores in result.scores.items():
        table.add_row(name, *(f"{scores[metric]:.3f}" for metric in ("abs_rel", "rmse", "delta1")))
    output.print(table)
    output.print(f"protocol: {result.protocol}", soft_wrap=True, markup=False)
    print_notes([f"{' and '.join(result.run.labels)}: these scores show that the machinery works, not how good CLIP is"])
    output.print(f"look at {result.picture} and {result.page}", soft_wrap=True)
