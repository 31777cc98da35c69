"""`pcd sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import MAKE, app, output, print_json, reporting
from pcd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pcd.stages.sweep import Sweep


@app.command(rich_help_panel=MAKE, epilog="Example: pcd sweep table4-cls --cache cache/nyu")
def sweep(
    cache: Annotated[str, options.cache("Cache that all variants learn from.")],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SWEEP",
            help="A name in pipelines/ablations/ or pipelines/comparisons/, a TOML file of variants, or a recipe.",
            show_default=False,
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a recipe key; several make a grid. Repeatable.", show_default=False),
    ] = None,
    recipe: options.Recipe = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Seeds of each variant.", show_default="the file's, else 0,1,2")
    ] = None,
    set_: options.Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep.", show_default="sweeps/CACHE-SWEEP-DIGEST")] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Protocol by name, the main one first. Repeatable.", show_default="the recipe's"),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="A metric (its best epoch) or last.")] = "abs_rel",
    device: options.Device = "auto",
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread the runs over the workers of this dask scheduler, e.g. tcp://HOST:8786.",
            show_default="train here",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train variants of a recipe on one read of a cache, and compare them. The same command continues an interrupted sweep."""
    from pcd.cache import Cache
    from pcd.stages.sweep import sweep as run_stage
    from pcd.stages.sweep_plan import plan_sweep

    with reporting() as progress, Cache.open(cache) as opened:
        plan = plan_sweep(opened, name, recipe=recipe, vary=vary or (), seeds=_seeds(seeds), overrides=set_ or ())
        done = run_stage(
            plan,
            opened,
            out,
            protocols=protocol or (),
            checkpoint=checkpoint,
            device=device,
            dask=dask,
            progress=progress,
        )
    if json:
        print_json(done.document)
    else:
        print_sweep(done)
    if done.failures:
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text}: expected whole numbers, for example --seeds 0,1,2") from None


def print_sweep(done: Sweep) -> None:
    """The table, the numbers in print if there are any, and what must be read with them."""
    from pcd.stages.sweep_table import printed_lines, printed_title, remarks, score_lines

    document = done.document
    title = f"{document['sweep']}: {document['split']} of {document['cache']}, {document['protocol']}"
    output.print(_table(title, document, score_lines))
    if any(variant["printed"] for variant in document["variants"]):
        output.print(_table(printed_title(document), document, printed_lines))
    for line in remarks(document):
        alarming = line.startswith(("note: ", "failed: "))
        output.print(line, soft_wrap=True, markup=False, style="yellow" if alarming else None)
    output.print(f"written to {done.root}", soft_wrap=True, markup=False)


def _table(title: str, document: dict[str, Any], cell: Callable[[dict[str, Any], str], tuple[str, str]]) -> Table:
    from pcd.stages.sweep_table import SHOWN, headings

    table = Table(title=escape(title), title_justify="left", show_lines=True)
    longest = max(len(variant["name"]) for variant in document["variants"])
    table.add_column("variant", overflow="fold", min_width=min(longest, 20))
    for heading in headings():
        table.add_column(heading, justify="right", overflow="fold")
    for variant in document["variants"]:
        table.add_row(escape(variant["name"]), *(_cell(variant, metric, cell) for metric in SHOWN))
    return table


def _cell(variant: dict[str, Any], metric: str, cell: Callable[[dict[str, Any], str], tuple[str, str]]) -> str:
    from pcd.evaluation.metrics import METRICS
    from pcd.stages.sweep_table import counts

    above, below = cell(variant, metric)
    difference = variant["differences"].get(metric)
    style = "dim"
    if difference is not None and counts(difference):
        style = "green" if (difference["difference"] > 0) == (METRICS[metric].better == "higher") else "red"
    return escape(above) + (f"\n[{style}]{escape(below)}[/]" if below else "")
