"""`pcd show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json, print_notes

if TYPE_CHECKING:
    from pcd.stages.show import Shown

RUN_PICTURES = ("image", "truth", "prediction", "error")
CACHE_PICTURES = ("image", "truth", "tokens")
"""What is shown in the terminal; all other panels are in the file."""
SHOWN = ("abs_rel", "rmse", "delta1")
BAR = 30
"""Characters of the longest bar of the histogram."""
LIMITS, WIDE_LIMITS = (26, 56), (44, 112)
"""The fewest and the most columns of a picture about as wide as high, and of a wide one."""


@app.command(rich_help_panel=LOOK, epilog="Example: pcd show runs/nyu --sample 3 --out sample.png")
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a cache or of a run.", show_default=False)],
    split: Annotated[str, typer.Option(help="Table: train, val or test.")] = "test",
    sample: Annotated[str, typer.Option(help="Key or number of the sample.")] = "0",
    view: Annotated[int | None, typer.Option(help="Show this view alone, as the encoder sees it.", show_default="all")] = None,
    out: Annotated[Path | None, typer.Option(help="Picture file for all panels.", show_default=False)] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the images.", show_default="where they were")] = None,
    cache: Annotated[str | None, options.cache("The run's cache.", "the one it was trained on")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: a metric (its best epoch) or last.", show_default="abs_rel")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """One sample: its views, ground truth, patches and tokens; of a run also bins, prediction, error and uncertainty."""
    from pcd.cache import Cache
    from pcd.stages.show import show as run_stage

    opened = Cache.open(cache) if cache else None
    shown = run_stage(
        path, split=split, sample=sample, view=view, root=root, cache=opened, checkpoint=checkpoint, device=device
    )
    if out is not None:
        shown.save(out)
    if json:
        print_json({**shown.facts, "file": None if out is None else str(out)})
        return
    _print_identity(shown.facts)
    print_notes(shown.facts["labels"])
    if shown.panels:
        _print_pictures(shown)
        _print_numbers(shown.facts)
    if out is not None:
        output.print(f"written to {out}", soft_wrap=True, markup=False)


def _print_identity(facts: dict[str, Any]) -> None:
    """Which sample it is, and how its views lie."""
    sample, views = facts["sample"], facts["views"]
    size = "" if sample["size"] is None else f", {sample['size'][0]}x{sample['size'][1]}"
    where = f"{sample['table']} sample {sample['number']} of {sample['of']} in {facts['cache']}"
    output.print(f"[bold]{escape(sample['key'])}[/bold]{size}: {escape(where)}", soft_wrap=True)
    if sample["skipped"] is not None:
        output.print(f"skipped at extraction: {sample['skipped']}", soft_wrap=True, markup=False)
        return
    tiles = sum(not view["mirrored"] for view in views)
    grid = "x".join(str(1 + max(view["tile"][axis] for view in views)) for axis in (0, 1))
    words = f"views: 0 to {tiles - 1} are the {grid} tiles of the canvas" if tiles > 1 else "views: 0 is the canvas"
    if len(views) > tiles:
        mirrored = f"{tiles} to {len(views) - 1} those" if tiles > 1 else "1 that"
        words += f", {mirrored} of the mirrored canvas"
    shown = "" if facts["view"] is None else f"; shown is view {facts['view']}"
    output.print(f"{words}{shown}.", soft_wrap=True)


def _print_pictures(shown: Shown) -> None:
    """Pictures where they can be seen, else a line that says where they can."""
    from pcd.cli.picture import Picture, gallery, picture_layout, scale_bars, shows_pictures
    from pcd.evaluation.figures_sample import ramp, scales, small
    from pcd.evaluation.pictures import is_wide

    if shown.facts["no_image"] is not None:
        output.print(f"no image: {shown.facts['no_image']}", soft_wrap=True, markup=False)
    if not shows_pictures(output):
        output.print("no pictures here: this is no terminal with colours; --out FILE.png writes them.", soft_wrap=True)
        return
    names = RUN_PICTURES if "prediction" in shown.facts else CACHE_PICTURES
    panels = [panel for name in names for panel in shown.panels if panel.name.split()[0] == name]
    made = scales(shown.panels)
    height, width = next(panel.pixels.shape for panel in panels if panel.name == "truth")[:2]
    limits = WIDE_LIMITS if is_wide((height, width)) else LIMITS
    beside, size = picture_layout(len(panels), width / height, output.width, limits)
    drawn = [(panel.name, Picture(small(panel, made.get(panel.kind), size))) for panel in panels]
    output.print(gallery(drawn, beside))
    used = [made[kind] for kind in dict.fromkeys(panel.kind for panel in panels if panel.kind in made)]
    signs = ["+.2f" if scale.low < 0 else ".2f" for scale in used]
    bars = [
        (format(scale.low, sign), ramp(scale, BAR), format(scale.high, sign), scale.words)
        for scale, sign in zip(used, signs, strict=True)
    ]
    output.print(scale_bars(bars))


def _print_numbers(facts: dict[str, Any]) -> None:
    """Ranges and shares, the histogram over bins, and the scores."""
    truth, patches = facts["truth"], facts["patches"]
    table = Table.grid(padding=(0, 2, 0, 0))
    if truth["min"] is not None:
        table.add_row("true depth", f"{truth['min']:.2f} to {truth['max']:.2f} m, median {truth['median']:.2f} m")
    table.add_row("pixels with depth", f"{100 * truth['valid']:.1f} %")
    words = f"{patches['with_depth']} of {patches['number']} with depth in range, {patches['half_valid']} at least half full"
    table.add_row("patches", words)
    for name, found in facts["tokens"].items():
        words = f"{100 * found['variance_in_3_components']:.0f} % of the variance in 3 of {found['width']} components"
        table.add_row(f"tokens {name}", words)
    if "prediction" in facts:
        for name, number in facts["counting"].items():
            table.add_row(f"count in {name} loss", f"{number} of {patches['number']} patches")
        found = facts["prediction"]
        table.add_row(f"predicted, epoch {found['epoch']}", f"{found['min']:.2f} to {found['max']:.2f} m")
        if found["mean_std"] is not None:
            table.add_row("uncertainty", f"{found['mean_std']:.2f} m, mean standard deviation of the patches")
    output.print(table)
    _print_histogram(facts["bins"])
    for label, scores in facts.get("scores", {}).items():
        _print_scores(label, scores)


def _print_histogram(bins: dict[str, Any]) -> None:
    table = Table(title=f"bins: {bins['of']}", title_justify="left")
    table.add_column("metres", justify="right", no_wrap=True)
    table.add_column("true", justify="right")
    table.add_column("", min_width=BAR, no_wrap=True)
    if bins["likely"] is not None:
        table.add_column("most likely", justify="right")
    most = max(*bins["true"], 1)
    for number, true in enumerate(bins["true"]):
        low, high = bins["edges"][number : number + 2]
        likely = [] if bins["likely"] is None else [str(bins["likely"][number])]
        table.add_row(f"{low:.2f} to {high:.2f}", str(true), "█" * -(-true * BAR // most), *likely)
    output.print(table)


def _print_scores(label: str, scores: dict[str, Any]) -> None:
    if scores["not_scored"] is not None:
        text = f"not scored: {scores['not_scored']}"
    elif scores["metrics"]["abs_rel"] is None:
        text = "no pixel counts"
    else:
        values = [f"{name} {scores['metrics'][name]:.4f}" for name in SHOWN]
        text = f"{', '.join(values)}, over {scores['pixels']} pixels. {scores['description']}"
    output.print(f"{label}: {text}", soft_wrap=True, markup=False)
