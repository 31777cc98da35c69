"""The figures of a report: errors against depth (the paper's figure 2), against uncertainty, and along the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from pcd.evaluation.analysis import RARE
from pcd.reports.drawing import INK, SERIES, new_figure, style

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A run in a figure with several: name, colour and its analysis or history."""

    name: str
    colour: str
    data: Any


def curves_of(names: Sequence[str], data: Sequence[Any]) -> list[Curve]:
    """Runs with the colours they have throughout a report."""
    return [Curve(name, SERIES[at % len(SERIES)], item) for at, (name, item) in enumerate(zip(names, data, strict=True))]


def kept_bins(analysis: Document) -> list[Document]:
    """The depth bins with enough pixels to say anything; the paper leaves out its rare ones as well."""
    total = sum(row["pixels"] for row in analysis["by_depth"])
    return [row for row in analysis["by_depth"] if row["pixels"] > RARE * total]


def _centres(rows: Sequence[Document]) -> list[float]:
    return [(row["low"] + row["high"]) / 2 for row in rows]


def by_distance(analysis: Document, colour: str = SERIES[0]) -> Figure:
    """Figure 2 of the paper: joint distribution, standard deviation against depth, histogram of depths."""
    with style():
        figure, (joint, spread, histogram) = new_figure(3, width=10.4, height=3.3)
        rows = kept_bins(analysis)
        limit = _reach(analysis, rows)
        _joint(figure, joint, analysis, limit)
        _band(spread, rows, "std", colour)
        spread.set(xlabel="true depth (m)", ylabel="σ of the error (m)", title="(b) spread", xlim=(0, limit))
        spread.set_ylim(bottom=0)
        edges = np.asarray(analysis["edges"])
        counts = np.asarray(analysis["joint"], dtype=np.float64)
        for axis, name, shade in ((1, "true", colour), (0, "predicted", INK)):
            histogram.stairs(
                counts.sum(axis=axis) / 1e6, edges, label=name, color=shade, linewidth=1.4, fill=axis == 1, alpha=0.75
            )
        histogram.set(xlabel="depth (m)", ylabel="million pixels", title="(c) histogram", xlim=(0, limit))
        histogram.legend()
    return figure


def _reach(analysis: Document, rows: Sequence[Document]) -> float:
    """Where the axes end: behind the last bin that is drawn."""
    return float(rows[-1]["high"] if rows else analysis["edges"][-1])


def _joint(figure: Figure, axis: Axes, analysis: Document, limit: float) -> None:
    edges = np.asarray(analysis["edges"])
    counts = np.asarray(analysis["joint"], dtype=np.float64)
    shown = np.ma.masked_less_equal(counts.T, 0)
    extent = (edges[0], edges[-1], edges[0], edges[-1])
    norm = LogNorm(vmin=1, vmax=max(counts.max(), 2.0))
    image = axis.imshow(shown, origin="lower", extent=extent, cmap="viridis", norm=norm, interpolation="nearest", aspect="auto")
    axis.plot((0, limit), (0, limit), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    rows = kept_bins(analysis)
    means = [centre + row["bias"] for centre, row in zip(_centres(rows), rows, strict=True)]
    axis.plot(_centres(rows), means, color="#e4572e", marker="o", markersize=2.5, linewidth=1.2, label="mean prediction")
    axis.set(
        xlabel="true depth (m)", ylabel="predicted depth (m)", title="(a) joint distribution", xlim=(0, limit), ylim=(0, limit)
    )
    axis.grid(visible=False)
    axis.legend(loc="upper left")
    figure.colorbar(image, ax=axis, label="pixels", fraction=0.05, pad=0.02)


def _band(axis: Axes, rows: Sequence[Document], name: str, colour: str, label: str | None = None) -> None:
    """A curve over true depth with its 95 % band."""
    centres = _centres(rows)
    axis.fill_between(
        centres,
        [row[f"{name}_low"] for row in rows],
        [row[f"{name}_high"] for row in rows],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    axis.plot(centres, [row[name] for row in rows], color=colour, marker="o", markersize=3, label=label)


def bias_and_error(runs: Sequence[Curve]) -> Figure:
    """Bias, spread and AbsRel against true depth, all runs in one figure."""
    with style():
        figure, (bias, spread, relative) = new_figure(3, width=10.4, height=3.2)
        for run in runs:
            rows = kept_bins(run.data)
            _band(bias, rows, "bias", run.colour, run.name)
            _band(spread, rows, "std", run.colour)
            relative.plot(_centres(rows), [row["abs_rel"] for row in rows], color=run.colour, marker="o", markersize=3)
        bias.axhline(0, color=INK, linewidth=0.8)
        bias.set(xlabel="true depth (m)", ylabel="mean error (m)", title="bias: above 0 is too far")
        spread.set(xlabel="true depth (m)", ylabel="σ of the error (m)", title="spread")
        relative.set(xlabel="true depth (m)", ylabel="AbsRel", title="relative error")
        for axis in (spread, relative):
            axis.set_ylim(bottom=0)
        if len(runs) > 1:
            bias.legend()
    return figure


def calibration(uncertainty: Document, colour: str = SERIES[0]) -> Figure:
    """Does the model know where it is wrong? Error by entropy, error by predicted spread, and sparsification."""
    with style():
        figure, (entropy, spread, sparse) = new_figure(3, width=10.4, height=3.2)
        groups = uncertainty["entropy"]["groups"]
        entropy.plot([g["signal"] for g in groups], [g["abs_rel"] for g in groups], color=colour, marker="o", markersize=4)
        entropy.set(xlabel="entropy of the bin distribution", ylabel="AbsRel", title=_correlation(uncertainty["entropy"]))
        entropy.set_ylim(bottom=0)
        groups = uncertainty["std"]["groups"]
        points = [g["std"] for g in groups], [g["rmse"] for g in groups]
        top = 1.08 * max(*points[0], *points[1])
        spread.plot((0, top), (0, top), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="calibrated")
        spread.plot(*points, color=colour, marker="o", markersize=4)
        spread.set(
            xlabel="predicted σ (m)", ylabel="RMSE (m)", title=_correlation(uncertainty["std"]), xlim=(0, top), ylim=(0, top)
        )
        spread.legend()
        curve = uncertainty["entropy"]["sparsification"]
        share = [100 * value for value in curve["removed"]]
        sparse.plot(share, curve["error"], color=colour, label="by entropy")
        sparse.plot(share, curve["oracle"], color=INK, linewidth=1, label="by the error itself")
        sparse.axhline(curve["all"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="at random")
        sparse.set(
            xlabel="most uncertain removed (%)", ylabel="AbsRel of the rest", title=f"sparsification, AUSE {curve['ause']:.2f}"
        )
        sparse.set_ylim(bottom=0)
        sparse.legend(loc="lower left")
    return figure


def _correlation(found: Document) -> str:
    value = found["spearman"]
    return "rank correlation: none" if value is None else f"rank correlation with the error {value:+.2f}"


def training(runs: Sequence[Curve]) -> Figure:
    """Losses of every phase and validation AbsRel and δ < 1.25 by epoch; a ring marks the best epoch of a metric."""
    with style():
        figure, (losses, error, share) = new_figure(3, width=10.4, height=3.2)
        for run in runs:
            epochs = [epoch["epoch"] for epoch in run.data]
            names = sorted({name for epoch in run.data for name in epoch["losses"] if name.endswith("/total")})
            for name, line in zip(names, ("-", "--", ":", "-.")[: len(names)], strict=True):
                label = (f"{run.name}: " if len(runs) > 1 else "") + name.removesuffix("/total")
                losses.plot(epochs, [epoch["losses"].get(name) for epoch in run.data], line, color=run.colour, label=label)
            for axis, metric, best in ((error, "abs_rel", min), (share, "delta1", max)):
                values = [epoch["metrics"][metric] for epoch in run.data]
                axis.plot(epochs, values, color=run.colour, label=run.name)
                at = values.index(best(values))
                axis.plot(epochs[at], values[at], "o", markersize=7, markerfacecolor="none", color=run.colour)
        losses.set(xlabel="epoch", ylabel="loss", title="losses", yscale="log")
        for which in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        error.set(xlabel="epoch", ylabel="AbsRel", title="validation AbsRel")
        share.set(xlabel="epoch", ylabel="δ < 1.25", title="validation δ < 1.25")
        if losses.get_lines():
            losses.legend()
        else:
            losses.set(title="nothing to train", yscale="linear", yticks=[])
        if len(runs) > 1:
            error.legend()
    return figure


def differences(rows: Sequence[Mapping[str, Any]], reference: str) -> Figure:
    """Paired differences from the reference run in percent of its mean, with 95 % intervals: a row per run and metric."""
    with style():
        figure, (axis,) = new_figure(1, width=8.0, height=0.6 + 0.3 * len(rows))
        for at, row in enumerate(rows):
            scale = 100 / abs(row["reference"]) if row["reference"] else 0.0
            low, middle, high = (scale * row[name] for name in ("low", "difference", "high"))
            axis.plot((low, high), (at, at), color=row["colour"], linewidth=2.2, solid_capstyle="butt")
            axis.plot(middle, at, "o", color=row["colour"], markersize=5)
        axis.axvline(0, color=INK, linewidth=0.9)
        axis.set_yticks(range(len(rows)), [f"{row['run']}: {row['title']} ({row['arrow']})" for row in rows])
        axis.invert_yaxis()
        axis.set(xlabel=f"difference from {reference} in % of its mean")
    return figure
