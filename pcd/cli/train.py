"""`pcd train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcd.cli import options
from pcd.cli.app import MAKE, app, errors, output, print_notes, reporting

if TYPE_CHECKING:
    from pcd.stages.runs import Run
    from pcd.training.loop import EpochReport


@app.command(rich_help_panel=MAKE, epilog="Example: pcd train --cache cache/nyu --set head.dropout=0.1")
def train(
    cache: Annotated[Path, typer.Option(help="Cache to learn from.")],
    run: options.Run = None,
    recipe: options.Recipe = None,
    set_: options.Set = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and dropout.", show_default="0")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="There must be an interrupted run to continue.")] = False,
    device: options.Device = "auto",
) -> None:
    """Train a head on cached columns; no image is opened. The same command continues an interrupted run."""
    from pcd.cache import Cache
    from pcd.stages.recipes import training_recipe
    from pcd.stages.train import train as run_stage

    overrides = [*(set_ or ()), *([f"train.seed={seed}"] if seed is not None else [])]
    with reporting() as progress, Cache.open(cache) as opened:
        resolved = training_recipe(opened, recipe, overrides)
        finished = run_stage(resolved, opened, run, resume=resume, device=device, progress=progress, on_epoch=print_epoch)
    print_best(finished)


def print_epoch(report: EpochReport) -> None:
    """One line per epoch: losses by phase, the main metrics, what improved, speed."""
    losses = "  ".join(f"{name.removesuffix('/total')} {value:.4f}" for name, value in report.losses.items() if "total" in name)
    metrics = "  ".join(f"{name} {report.metrics[name]:.4f}" for name in ("abs_rel", "rmse", "delta1"))
    improved = f"  better: {', '.join(report.improved)}" if report.improved else f"  no better for {report.wait}"
    errors.print(
        f"epoch {report.epoch:3d}  {losses}  |  {metrics}  |  {report.rows_per_second:.0f} rows/s{improved}", soft_wrap=True
    )


def print_best(run: Run) -> None:
    """Where the run is and its best validation values."""
    print_notes(run.labels)
    best = "  ".join(f"{name} {value['value']:.4f} (epoch {value['epoch']})" for name, value in sorted(run.best.items()))
    output.print(f"{run.root}: best validation values: {best}", soft_wrap=True)
