"""The picture of one training: validation above, losses of each phase and learning rates below."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from pcd.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from pcd.reports.drawing import INK, SERIES, new_figure, style
from pcd.wording import brief_rate

MAIN = ("abs_rel", "rmse", "delta1")
"""The validation metrics that are drawn."""
LOG_FROM = 5.0
"""Errors and losses whose largest value is this many times their smallest get a logarithmic axis."""
_DOTTED = 40
"""Up to so many epochs each is a dot on its line."""
_COLUMNS = 3
_RATE_LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 2, 1, 2)))

Entry = Mapping[str, Any]
Panel = Callable[[Axes, Sequence[Entry]], None]


def curves(history: Sequence[Entry], title: str) -> Figure:
    """Main validation metrics with their best epoch, losses by phase, learning rates; `history` has at least one epoch.

    Phases may be longer than an epoch: over epochs that did not compute a loss its line is thin and dotted. A head that
    has nothing to train has neither losses nor rates.
    """
    phases = list(dict.fromkeys(name.partition("/")[0] for entry in history for name in sorted(entry["losses"])))
    metrics = [name for name in MAIN if any(name in entry["metrics"] for entry in history)]
    above: list[Panel] = [partial(_metric, name=name) for name in metrics]
    below: list[Panel] = [*(partial(_losses, phase=phase) for phase in phases), _rates] if phases else []
    panels = [*_whole_rows(above), *_whole_rows(below)]
    with style():
        figure, axes = new_figure(_COLUMNS, len(panels) // _COLUMNS, width=10.4, height=2.7)
        for axis, draw in zip(axes, panels, strict=True):
            if draw is None:
                axis.set_axis_off()
            else:
                draw(axis, history)
                _epochs(axis, history)
        figure.suptitle(title, x=0.008, ha="left", fontsize=10)
    return figure


def _whole_rows(panels: Sequence[Panel]) -> list[Panel | None]:
    return [*panels, *[None] * (-len(panels) % _COLUMNS)]


def _series(history: Sequence[Entry], value: Callable[[Entry], float | None]) -> tuple[list[int], list[float]]:
    """Epochs that have a finite value, and the values."""
    found = [(entry["epoch"], number) for entry in history if (number := value(entry)) is not None and math.isfinite(number)]
    return [epoch for epoch, _ in found], [number for _, number in found]


def _with_gaps(epochs: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The same with NaN at epochs in between that have no value, where a line then ends."""
    known = dict(zip(epochs, values, strict=True))
    every = list(range(epochs[0], epochs[-1] + 1)) if epochs else []
    return every, [known.get(epoch, math.nan) for epoch in every]


def _metric(axis: Axes, history: Sequence[Entry], name: str) -> None:
    metric = METRICS[name]
    epochs, values = _series(history, lambda entry: entry["metrics"].get(name))
    axis.plot(epochs, values, color=SERIES[0], **_dots(history))
    axis.set(title=f"val {metric.title}: not a number", ylabel=f"{metric.heading} {metric.arrow}")
    if not values:
        axis.set_yticks([])
        return
    best = (max if name in HIGHER_IS_BETTER else min)(values)
    at = epochs[values.index(best)]
    axis.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.plot(at, best, "o", markersize=8, markerfacecolor="none", markeredgewidth=1.4, color=SERIES[1], clip_on=False)
    axis.set_title(f"val {metric.title}: best {best:.4g}, epoch {at}")
    if name not in HIGHER_IS_BETTER:
        _scale(axis, values)


def _losses(axis: Axes, history: Sequence[Entry], phase: str) -> None:
    names = sorted({name for entry in history for name in entry["losses"] if name.partition("/")[0] == phase})
    names.sort(key=lambda name: not name.endswith("/total"))
    drawn: list[float] = []
    for at, name in enumerate(names):
        epochs, values = _series(history, lambda entry, name=name: entry["losses"].get(name))  # type: ignore[misc]
        total = name.endswith("/total")
        # The total is broad and pale: a part that is all of it stays visible on top.
        look: dict[str, Any] = {"linewidth": 3.2, "alpha": 0.55} if total else {"linewidth": 1.3}
        look |= {"color": SERIES[at % len(SERIES)], "label": name.partition("/")[2], **_dots(history)}
        axis.plot(*_with_gaps(epochs, values), **look)
        if epochs and epochs[-1] - epochs[0] >= len(epochs):
            axis.plot(epochs, values, color=look["color"], linewidth=0.8, linestyle=":", zorder=1)
        drawn += values
    axis.set(title=f"{phase} losses", ylabel="loss")
    _legend(axis)
    _scale(axis, drawn)


def _rates(axis: Axes, history: Sequence[Entry]) -> None:
    phases = sorted({name for entry in history for name in entry.get("rates", {})})
    drawn: list[float] = []
    for at, phase in enumerate(phases):
        epochs, values = _series(history, lambda entry, phase=phase: entry.get("rates", {}).get(phase))  # type: ignore[misc]
        look: dict[str, Any] = {"color": SERIES[at % len(SERIES)], "linestyle": _RATE_LINES[at % len(_RATE_LINES)]}
        axis.plot(epochs, values, label=phase, **look, **_dots(history))
        drawn += values
    if phases:
        axis.set(title="learning rates at the end of the epoch", ylabel="learning rate")
        _legend(axis)
        _scale(axis, drawn)
        axis.yaxis.set_major_formatter(lambda rate, _: brief_rate(rate))
    else:  # trained by a pcd that did not record them
        axis.plot(*_series(history, lambda entry: entry["factor"]), color=SERIES[0], **_dots(history))
        axis.set(title="learning rates", ylabel="factor on every rate")
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)


def _legend(axis: Axes) -> None:
    axis.legend(frameon=True, framealpha=0.75, facecolor="white", edgecolor="none")


def _dots(history: Sequence[Entry]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.0} if len(history) <= _DOTTED else {}


def _scale(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values differ by much, with plain numbers."""
    if values and min(values) > 0 and max(values) >= LOG_FROM * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if max(values) < 30 * min(values) else (1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _epochs(axis: Axes, history: Sequence[Entry]) -> None:
    first, last = history[0]["epoch"], history[-1]["epoch"]
    pad = max(0.02 * (last - first), 0.5 if first == last else 0.1)
    axis.set(xlabel="epoch", xlim=(first - pad, last + pad))
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
