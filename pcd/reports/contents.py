"""What a report is made of, as plain data, and its tables as rows of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcd.evaluation.metrics import METRICS
from pcd.evaluation.statistics import Comparison
from pcd.reports.panels import Sample
from pcd.reports.published import Published

SHOWN = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "bias", "delta1", "delta2", "delta3")
COMPARED = ("abs_rel", "rmse", "log10", "delta1")
DIGITS = {"silog": 1}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class RunPart:
    """One run in a report: its scores (`metrics.json`), analysis, history, and facts (heading, value) about how it was made."""

    name: str
    colour: str
    labels: list[str]
    document: dict[str, Any]
    analysis: dict[str, Any]
    history: list[dict[str, Any]]
    facts: list[tuple[str, str]]
    recipe: str


@dataclass(frozen=True)
class Difference:
    """A metric of a run against the reference run, with its p value adjusted for the number of comparisons (Holm)."""

    run: str
    colour: str
    metric: str
    found: Comparison
    adjusted: float


@dataclass(frozen=True)
class Contents:
    """All that a page shows. `protocols` are labels, the main one first; `notes` what a reader must know beside the scores."""

    title: str
    split: str
    dataset: str
    runs: list[RunPart]
    protocols: list[str]
    samples: list[Sample]
    differences: list[Difference]
    published: list[Published]
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """What must stand beside every number."""
        return list(dict.fromkeys(label for run in self.runs for label in run.labels))


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a smaller line below it, and classes."""

    text: str
    small: str = ""
    kind: str = ""


Table = tuple[list[Cell], list[list[Cell]]]
"""Heading and rows."""


def heading(name: str) -> Cell:
    """A metric with unit and the direction that is better."""
    return Cell(f"{METRICS[name].heading} {METRICS[name].arrow}")


def number(value: Any, digits: int = 3) -> str:
    """A number as it is shown; a dash for what does not exist."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def span(low: float, high: float, digits: int) -> str:
    """A range as it is shown."""
    return f"{number(low, digits)}{' to ' if low < 0 else '–'}{number(high, digits)}"


def _score(scores: Mapping[str, Any], name: str, kind: str = "") -> Cell:
    value, limits, digits = scores["metrics"].get(name), scores["intervals"].get(name), DIGITS.get(name, 3)
    small = (
        f"{number(limits[0], digits)}–{number(limits[1], digits)}"
        if limits and None not in limits and value is not None
        else ""
    )
    return Cell(number(value, digits), small, kind)


def best_of(name: str, values: Sequence[Any]) -> set[int]:
    """Positions of the best values of a metric; none if there is nothing to choose from."""
    known = {at: value for at, value in enumerate(values) if value is not None}
    if len(known) < 2:
        return set()
    better = METRICS[name].better
    target = max(known.values()) if better == "higher" else min(known.values(), key=abs if better == "zero" else float)
    return {at for at, value in known.items() if value == target}


def scores_table(contents: Contents, protocol: str) -> Table:
    """One protocol: a row per run with 95 % intervals, then the published rows that belong beside them."""
    documents = [run.document["protocols"][protocol] for run in contents.runs]
    best = {name: best_of(name, [scores["metrics"].get(name) for scores in documents]) for name in SHOWN}
    rows = []
    for at, (run, scores) in enumerate(zip(contents.runs, documents, strict=True)):
        cells = [_score(scores, name, "best" if at in best[name] else "") for name in SHOWN]
        rows.append([Cell(run.name, _images(scores), f"run:{run.colour}"), *cells])
    return [Cell(""), *(heading(name) for name in SHOWN)], rows


def _images(scores: Mapping[str, Any]) -> str:
    tiles = f", {scores['tiles']} tiles" if "tiles" in scores else ""
    excluded = f", {scores['excluded']} without valid pixels left out" if scores["excluded"] else ""
    return f"{scores['images']} image{'' if scores['images'] == 1 else 's'}{tiles}{excluded}"


PRINTED = ("abs_rel", "rmse", "log10", "rmse_log", "delta1", "delta2", "delta3")


def published_table(contents: Contents) -> Table:
    """Numbers in print, beside each run's under the protocol that comes nearest, and what makes them differ."""
    rows = []
    for row in contents.published:
        kind = {"yes": "good", "nearly": "", "no": "bad"}[row.comparable]
        method = Cell(row.method, f"{row.source}: {row.note}", "words")
        values = [Cell(number(row.values.get(name))) for name in PRINTED]
        rows.append([method, *values, Cell(row.protocol or "none of ours"), Cell(row.comparable, kind=kind)])
    for run in contents.runs:
        for protocol in dict.fromkeys(row.protocol for row in contents.published if row.protocol in run.document["protocols"]):
            metrics = run.document["protocols"][protocol]["metrics"]
            values = [Cell(number(metrics.get(name)), kind="best") for name in PRINTED]
            rows.append([Cell(run.name, "this report", f"run:{run.colour}"), *values, Cell(protocol), Cell("")])
    return [Cell("method"), *(heading(name) for name in PRINTED), Cell("protocol"), Cell("comparable?")], rows


def protocols_table(contents: Contents, run: RunPart) -> Table:
    """The same predictions under every protocol, and how far the protocols move each metric."""
    found = {label: run.document["protocols"][label] for label in contents.protocols}
    rows = [[Cell(label), *(_score(scores, name) for name in SHOWN)] for label, scores in found.items()]
    spread = []
    for name in SHOWN:
        values = [s["metrics"][name] for s in found.values() if s["metrics"].get(name) is not None]
        spread.append(Cell(_span(name, values) if values else "–", kind="best"))
    return [Cell("protocol"), *(heading(name) for name in SHOWN)], [*rows, [Cell("range over protocols"), *spread]]


def _span(name: str, values: Sequence[float]) -> str:
    return span(min(values), max(values), DIGITS.get(name, 3))


def differences_table(contents: Contents) -> Table:
    """Every run against the first: mean paired difference, interval, p value, and on how many images it is better."""
    rows = []
    for item in contents.differences:
        found, better = item.found, METRICS[item.metric].better
        wins = found.higher if better == "higher" else found.lower
        good = (found.difference > 0) == (better == "higher")
        decided = item.adjusted < SIGNIFICANT
        verdict = ("better" if good else "worse") if decided else "not distinguishable"
        rows.append(
            [
                Cell(item.run, kind=f"run:{item.colour}"),
                heading(item.metric),
                Cell(number(found.second)),
                Cell(number(found.first)),
                Cell(f"{found.difference:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}"),
                Cell(_p(found.p_value), f"adjusted {_p(item.adjusted)}"),
                Cell(f"{wins} of {found.images}"),
                Cell(verdict, kind=("good" if good else "bad") if decided else ""),
            ]
        )
    reference = contents.runs[0].name
    titles = ["run", "metric", reference, "this run", "mean difference", "p", "better on", "verdict"]
    return [Cell(title) for title in titles], rows


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def depth_table(run: RunPart, protocol: str) -> Table:
    """Metrics by true depth under a protocol, pooled over pixels."""
    shown = ("abs_rel", "rmse", "bias", "log10", "delta1")
    rows = [
        [Cell(f"{row['low']:.1f} to {row['high']:.1f} m"), Cell(f"{row['pixels']:,}"), *(Cell(number(row[n])) for n in shown)]
        for row in run.document["protocols"][protocol]["by_depth"]
    ]
    return [Cell("true depth"), Cell("pixels"), *(heading(name) for name in shown)], rows
