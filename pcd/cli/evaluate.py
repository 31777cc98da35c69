"""`pcd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import LOOK, app, errors, output, print_json, reporting

if TYPE_CHECKING:
    from pcd.stages.evaluate import Evaluation

COLUMNS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


@app.command(rich_help_panel=LOOK, epilog="Example: pcd evaluate --run runs/nyu --protocol eigen")
def evaluate(
    run: Annotated[Path | None, typer.Option(help="Run folder.", show_default="the newest under runs/")] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache to score on.", show_default="the one it was trained on")] = None,
    split: Annotated[str, typer.Option(help="Table to score on.")] = "test",
    protocol: Annotated[
        list[str] | None, typer.Option(help="Protocol by name. Repeatable.", show_default="the recipe's")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="A metric (its best epoch), last, or each (every metric from its own best epoch).")
    ] = "abs_rel",
    tta: Annotated[bool | None, typer.Option("--tta/--no-tta", help="Flip TTA.", show_default="the recipe's")] = None,
    upsample: Annotated[str | None, typer.Option(help="nearest or bilinear.", show_default="the protocol's")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Score a run under named protocols; every number says how it was made."""
    from pcd.cache import Cache
    from pcd.stages.evaluate import evaluate as run_stage
    from pcd.stages.runs import newest_run, open_run

    with reporting() as progress:
        opened = open_run(run) if run else newest_run()
        evaluation = run_stage(
            opened,
            Cache.open(cache) if cache else None,
            split=split,
            protocols=protocol or (),
            checkpoint=checkpoint,
            tta=tta,
            upsample=upsample,
            device=device,
            progress=progress,
        )
    if json:
        print_json(evaluation.result)
    else:
        print_scores(evaluation)


def print_scores(evaluation: Evaluation) -> None:
    """The scores as a table, one row per protocol, and each protocol in words."""
    result = evaluation.result
    table = Table(title=f"{result['run']} on {result['split']} of {result['cache']}", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("images", justify="right")
    for label, scores in result["protocols"].items():
        table.add_row(label, *(_number(scores["metrics"].get(name)) for name in COLUMNS), _images(scores))
    output.print(table)
    for label, scores in result["protocols"].items():
        output.print(f"{label}: {scores['description']}", soft_wrap=True)
    for label in result["labels"]:
        errors.print(f"note: {label}", style="yellow")
    output.print(f"written to {evaluation.folder}", soft_wrap=True)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _images(scores: dict[str, Any]) -> str:
    excluded = int(scores["excluded"])
    return f"{int(scores['images'])}" + (f" ({excluded} without valid pixels)" if excluded else "")
