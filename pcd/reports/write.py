"""Puts a report together: figures as files, and one page that holds everything it shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pcd
from pcd.evaluation.metrics import METRICS
from pcd.evaluation.pictures import COLOURS, ERROR_COLOURS, UNSURE_COLOURS, is_wide
from pcd.files import write_text
from pcd.reports import contents as tables
from pcd.reports.contents import Contents
from pcd.reports.drawing import inline, save
from pcd.reports.figures import bias_and_error, by_distance, calibration, curves_of, differences, training
from pcd.reports.panels import Sample, Scales, data_uri, figure_of, layers, readout, scales_of

PAGE, FIGURES = "index.html", "figures"
_FOLDER = Path(__file__).with_name("page")
_LAYERS = (("prediction", "prediction"), ("truth", "ground truth"), ("error", "error"), ("std", "uncertainty"))
_JOINT = (
    "joint distribution of true and predicted depth, standard deviation of the error against true depth, and histogram of "
    "depths (the paper's figure 2)."
)
_UNSURE = (
    "patches in ten equal groups, their error against the entropy of the bin distribution and against its standard deviation; "
    "and the error of what is left when the most uncertain patches are removed."
)


@dataclass(frozen=True)
class Drawn:
    """A figure in the page: the stem of its files, its `<svg>` element, and its caption."""

    name: str
    svg: str
    words: str


def write_report(contents: Contents, out: Path) -> Path:
    """Write `OUT/index.html` and `OUT/figures/*.{png,svg}`; returns the page. The page needs none of the other files."""
    drawn = {}
    for name, figure, words in _figures(contents):
        save(figure, out / FIGURES / name)
        drawn[name] = Drawn(name, inline(figure, name, words), words)
    scales = scales_of(contents.samples)
    for at, run in enumerate(contents.runs if contents.samples else [], start=1):
        save(figure_of(contents.samples, run.name, scales), out / FIGURES / f"samples-{at}")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        c=contents,
        version=pcd.__version__,
        css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        js=(_FOLDER / "report.js").read_text(encoding="utf-8"),
        words={label: contents.runs[0].document["protocols"][label]["description"] for label in contents.protocols},
        tables=_tables(contents),
        figures=drawn,
        gallery=[_gallery(sample, scales) for sample in contents.samples],
        layers=[entry for entry in _LAYERS if entry[0] != "std" or _has_std(contents)],
        scales=_scales(scales),
        wide=any(is_wide((sample.truth.shape[0], sample.truth.shape[1])) for sample in contents.samples),
    )
    write_text(out / PAGE, page)
    return out / PAGE


def _has_std(contents: Contents) -> bool:
    return any(found.std is not None for sample in contents.samples for found in sample.predicted.values())


def _figures(contents: Contents) -> Iterator[tuple[str, Figure, str]]:
    """Every figure with its name and caption."""
    names = [run.name for run in contents.runs]
    analyses = curves_of(names, [run.analysis for run in contents.runs])
    yield "by-distance", bias_and_error(analyses), "Bias, spread and relative error against true depth."
    for at, curve in enumerate(analyses, start=1):
        yield f"joint-{at}", by_distance(curve.data, curve.colour), f"{curve.name}: {_JOINT}"
        if curve.data["uncertainty"]:
            yield f"uncertainty-{at}", calibration(curve.data["uncertainty"], curve.colour), f"{curve.name}: {_UNSURE}"
    histories = [curve for curve in curves_of(names, [run.history for run in contents.runs]) if curve.data]
    if histories:
        yield "training", training(histories), "Losses and validation by epoch; a ring marks the best epoch."
    if contents.differences:
        words = f"Paired differences from {names[0]} with 95 % intervals."
        yield "differences", differences(_difference_rows(contents), names[0]), words


def _difference_rows(contents: Contents) -> list[dict[str, Any]]:
    return [
        {
            "run": item.run,
            "colour": item.colour,
            "title": METRICS[item.metric].title,
            "arrow": METRICS[item.metric].arrow,
            "reference": item.found.second,
            "low": item.found.low,
            "difference": item.found.difference,
            "high": item.found.high,
        }
        for item in contents.differences
    ]


def _tables(contents: Contents) -> dict[str, Any]:
    return {
        "scores": {label: tables.scores_table(contents, label) for label in contents.protocols},
        "protocols": {run.name: tables.protocols_table(contents, run) for run in contents.runs},
        "published": tables.published_table(contents),
        "differences": tables.differences_table(contents),
        "depth": {run.name: tables.depth_table(run, contents.protocols[0]) for run in contents.runs},
    }


def _gallery(sample: Sample, scales: Scales) -> dict[str, Any]:
    """A sample's pictures as data URIs; what does not depend on the run is there once."""
    pictures: list[dict[str, str]] = []
    rgb = None
    for name, predicted in sample.predicted.items():
        found = layers(sample, predicted, scales)
        if "rgb" in found:
            rgb = rgb or data_uri(found["rgb"])
        for layer, words in _LAYERS:
            if layer not in found or (layer == "truth" and any(p["layer"] == "truth" for p in pictures)):
                continue
            run = "" if layer == "truth" else name
            pictures.append({"layer": layer, "run": run, "uri": data_uri(found[layer]), "words": f"{words} of {sample.key}"})
    blank = data_uri(np.full_like(found["truth"], 128)) if rgb is None else ""
    scores = [(name, _line(predicted.scores)) for name, predicted in sample.predicted.items()]
    maps = {"": readout(sample.truth)} | {name: readout(p.depth) for name, p in sample.predicted.items()}
    return {
        "key": sample.key,
        "rule": sample.rule,
        "maps": maps,
        "rgb": rgb,
        "blank": blank,
        "pictures": pictures,
        "scores": scores,
    }


def _line(scores: dict[str, float]) -> str:
    return ", ".join(f"{METRICS[name].title} {scores[name]:.3f}" for name in ("abs_rel", "rmse", "delta1"))


def _scales(scales: Scales) -> list[dict[str, str]]:
    """The colour bars of the gallery."""
    return [
        {
            "layers": layers_shown,
            "low": f"{low:.1f} m",
            "high": f"{high:.1f} m",
            "words": words,
            "colours": ",".join(to_hex(mpl.colormaps[colours](share)) for share in np.linspace(0, 1, 12)),
        }
        for layers_shown, low, high, colours, words in (
            ("prediction truth", *scales.depth, COLOURS, "depth"),
            ("error", -scales.error, scales.error, ERROR_COLOURS, "error, red: too near"),
            ("std", 0.0, scales.std, UNSURE_COLOURS, "standard deviation"),
        )
    ]
