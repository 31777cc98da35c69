"""`pcd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json, print_notes, reporting


@app.command(rich_help_panel=LOOK, epilog="Example: pcd report runs/nyu runs/nyu-no-cls --out report")
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders.", show_default="the newest under runs/")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page.", show_default="report in the run, or here for several")
    ] = None,
    cache: Annotated[str | None, options.cache("Cache to score on.", "the one of each run")] = None,
    split: Annotated[str, typer.Option(help="Table to score on.")] = "test",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Protocol by name, the main one first. Repeatable.", show_default="the recipe's, then all that fit"),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="A metric (its best epoch) or last.")] = "abs_rel",
    samples: Annotated[int, typer.Option(min=0, help="How many of the best, middle and worst samples are shown.")] = 3,
    root: Annotated[
        Path | None, typer.Option(help="Where the images are now.", show_default="where extract found them")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """One self-contained page about a run, or several compared: scores, analysis, samples; figures as PNG and SVG beside it."""
    from pcd.cache import Cache
    from pcd.stages.report import report as run_stage
    from pcd.stages.runs import newest_run, open_run

    with reporting() as progress:
        opened = [open_run(run) for run in runs] if runs else [newest_run()]
        made = run_stage(
            opened,
            out or (opened[0].root / "report" if len(opened) == 1 else Path("report")),
            cache=Cache.open(cache) if cache else None,
            split=split,
            protocols=protocol or (),
            checkpoint=checkpoint,
            samples=samples,
            images=root,
            device=device,
            progress=progress,
        )
    notes = [*made.contents.labels, *made.contents.notes]
    if json:
        print_json({"page": str(made.page), "protocols": made.contents.protocols, "notes": notes})
        return
    print_notes(notes)
    output.print(f"written to {made.page}", soft_wrap=True)
