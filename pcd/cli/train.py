"""`pcd train`."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pcd.cli import options
from pcd.cli.app import MAKE, app, errors, output, print_notes, reporting
from pcd.wording import brief_rate, duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pcd.stages.runs import Run
    from pcd.training.loop import EpochReport

MAIN = ("abs_rel", "rmse", "delta1")
"""The validation metrics of the line of an epoch."""
RECENT = 5
"""The time that is left follows from the mean of so many epochs."""


@app.command(rich_help_panel=MAKE, epilog="Example: pcd train --cache cache/nyu --set head.dropout=0.1")
def train(
    cache: Annotated[str, options.cache("Cache to learn from: a folder, or s3://..., gs://..., az://...")],
    run: options.Run = None,
    recipe: options.Recipe = None,
    set_: options.Set = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and dropout.", show_default="0")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="There must be an interrupted run to continue.")] = False,
    device: options.Device = "auto",
    residency: options.Residency = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard to RUN/tensorboard (extra: tensorboard).")
    ] = False,
) -> None:
    """Train a head on cached columns; no image is opened. The same command continues an interrupted run."""
    from pcd.cache import Cache
    from pcd.stages.recipes import training_recipe
    from pcd.stages.train import train as run_stage

    overrides = [*(set_ or ()), *([f"train.seed={seed}"] if seed is not None else [])]
    with reporting() as progress, Cache.open(cache) as opened:
        resolved = training_recipe(opened, recipe, overrides)
        finished = run_stage(
            resolved,
            opened,
            run,
            resume=resume,
            device=device,
            residency=residency.value if residency else None,
            tensorboard=tensorboard,
            progress=progress,
            on_epoch=EpochLines(resolved.train.epochs),
        )
    print_best(finished)


class EpochLines:
    """Prints a line for every epoch; it remembers how long the last ones took, to tell how much time is left."""

    def __init__(self, epochs: int) -> None:
        """`epochs` is how many there are at most, for a training that does not say it itself."""
        self._epochs = epochs
        self._recent: dict[str, deque[float]] = {}

    def __call__(self, report: EpochReport, name: str = "", epochs: int | None = None) -> None:
        """Print the line; `name` says which of several trainings this is, `epochs` how many that one has."""
        recent = self._recent.setdefault(name, deque(maxlen=RECENT))
        recent.append(report.seconds)
        width = errors.width if errors.is_terminal else None
        errors.print(epoch_line(report, epochs or self._epochs, recent, name, width), soft_wrap=True)


def epoch_line(report: EpochReport, epochs: int, recent: Sequence[float], name: str = "", width: int | None = None) -> Text:
    """Losses by phase, main metrics, what improved, learning rates, speed, and the time that is left at most.

    Of a head that has nothing to train: that, and the metrics.

    `recent` are the seconds of the last epochs. If `width` columns are too few, what improved becomes a number, then speed,
    learning rates and losses are left out.
    """
    head = Text(f"{name}: epoch {report.epoch:3d}/{epochs}" if name else f"epoch {report.epoch:3d}/{epochs}")
    metrics = Text("  ").join(_metric(report, metric) for metric in MAIN)
    if not report.step:
        return Text(" | ").join([Text(f"{name}: nothing to train" if name else "nothing to train"), metrics])
    losses, rates, speed = Text(_losses(report)), Text(_rates(report)), Text(f"{report.rows_per_second:.0f} rows/s")
    mean = sum(recent) / len(recent)
    left = [Text(f"at most {duration(mean * (epochs - report.epoch))} left")] if epochs > report.epoch else []
    brief = [head, metrics, _better(report, brief=True), *left]
    choices = (
        [head, losses, metrics, _better(report), rates, speed, *left],
        [head, losses, metrics, _better(report, brief=True), rates, speed, *left],
        [head, losses, metrics, _better(report, brief=True), rates, *left],
        [head, losses, *brief[1:]],
        brief,
    )
    lines = [Text(" | ").join(parts) for parts in choices]
    return next((line for line in lines if width is None or line.cell_len <= width), lines[-1])


def _losses(report: EpochReport) -> str:
    """What each phase minimises; a dash for a phase whose turn did not come in this epoch."""
    totals = {name.removesuffix("/total"): value for name, value in report.losses.items() if name.endswith("/total")}
    phases = dict.fromkeys([*(report.rates if len(report.rates) > 1 else ()), *totals])  # one rate may be that of all phases
    return "  ".join(f"{phase} {totals[phase]:#.4g}" if phase in totals else f"{phase} -" for phase in phases)


def _metric(report: EpochReport, name: str) -> Text:
    return Text(f"{name} {report.metrics[name]:#.4g}", style="green" if name in report.improved else "")


def _better(report: EpochReport, *, brief: bool = False) -> Text:
    if not report.improved:
        return Text(f"no better for {report.wait}")
    if brief:
        return Text(f"{len(report.improved)} better", style="green")
    names = sorted(report.improved, key=lambda name: name not in MAIN)
    more = f" +{len(names) - 3}" if len(names) > 3 else ""
    return Text(f"better: {' '.join(names[:3])}{more}", style="green")


def _rates(report: EpochReport) -> str:
    rates = [brief_rate(rate) for rate in report.rates.values()]
    return f"lr {' '.join(rates[:1] if len(set(rates)) == 1 else rates)}"


def print_best(run: Run) -> None:
    """Where the run is and its best validation values."""
    print_notes(run.labels)
    best = "  ".join(f"{name} {value['value']:.4f} (epoch {value['epoch']})" for name, value in sorted(run.best.items()))
    output.print(f"{run.root}: best validation values: {best}", soft_wrap=True)
