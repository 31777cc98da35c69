"""`pcd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json, print_notes, reporting

if TYPE_CHECKING:
    from pcd.stages.evaluate import Evaluation

SHOWN = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "bias", "delta1", "delta2", "delta3", "boundary_f1")


@app.command(rich_help_panel=LOOK, epilog="Example: pcd evaluate --run runs/nyu --protocol eigen")
def evaluate(
    run: Annotated[Path | None, typer.Option(help="Run folder.", show_default="the newest under runs/")] = None,
    cache: Annotated[str | None, options.cache("Cache to score on.", "the one it was trained on")] = None,
    split: Annotated[str, typer.Option(help="Table to score on.")] = "test",
    protocol: Annotated[
        list[str] | None, typer.Option(help="Protocol by name. Repeatable.", show_default="the recipe's")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="A metric (its best epoch), last, or each (every metric from its own best epoch).")
    ] = "abs_rel",
    tta: Annotated[bool | None, typer.Option("--tta/--no-tta", help="Flip TTA.", show_default="the recipe's")] = None,
    upsample: Annotated[
        options.Upsample | None, typer.Option(help="How patches become pixels.", show_default="the protocol's")
    ] = None,
    boundary: Annotated[bool, typer.Option("--boundary", help="Boundary F1 too: for dense ground truth, slow.")] = False,
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
            upsample=upsample.value if upsample else None,
            boundary=boundary,
            device=device,
            progress=progress,
        )
    if json:
        print_json(evaluation.result)
    else:
        print_scores(evaluation)


def print_scores(evaluation: Evaluation) -> None:
    """The scores as a table, one column per protocol, and each protocol in words."""
    from pcd.evaluation.metrics import METRICS

    result, protocols = evaluation.result, evaluation.result["protocols"]
    title = f"{result['run']} on {result['split']} of {result['cache']}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("metric")
    for label in protocols:
        table.add_column(escape(label), justify="right", overflow="fold")
    for name in SHOWN:
        if not any(name in scores["metrics"] for scores in protocols.values()):
            continue
        table.add_row(METRICS[name].heading, *(_score(scores, name) for scores in protocols.values()))
    table.add_row("images", *(_images(scores) for scores in protocols.values()))
    output.print(table)
    for label, scores in protocols.items():
        output.print(f"{label}: {scores['description']}", soft_wrap=True, markup=False)
    output.print("in brackets: 95 % bootstrap limits of the mean over images", style="dim")
    print_notes(result["labels"])
    output.print(f"written to {evaluation.folder}", soft_wrap=True)


def _score(scores: dict[str, Any], name: str) -> str:
    """The value, and its 95 % bootstrap limits over images where there are any."""
    value, limits = scores["metrics"].get(name), scores["intervals"].get(name)
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" [dim]({limits[0]:.3f} to {limits[1]:.3f})[/]" if limits and None not in limits else "")


def _images(scores: dict[str, Any]) -> str:
    excluded = int(scores["excluded"])
    return f"{int(scores['images'])}" + (f" ({excluded} without valid pixels)" if excluded else "")
