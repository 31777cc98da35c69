"""The table of a sweep: every variant's scores over its seeds, and its difference to the first, with two kinds of doubt.

A paired test over test images says whether a difference would be found on other images of the kind; the spread over seeds says
whether another seed would have made as large a difference. A difference counts if it survives both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcd.evaluation.metrics import METRICS
from pcd.evaluation.statistics import Comparison, compare, holm
from pcd.evaluation.tables import read_scores, write_csv
from pcd.files import plain, write_json, write_text
from pcd.reports.published import Published, published
from pcd.stages.sweep_plan import Printed, Variant

SHOWN = ("abs_rel", "rmse", "log10", "delta1", "delta2", "delta3")
FILES = ("sweep.json", "sweep.csv", "sweep.md")
CSV_COLUMNS = (
    *("variant", "protocol", "metric", "seeds", "mean", "std", "difference", "low", "high", "p_value", "p_adjusted"),
    *("images", "spread", "within_spread", "printed", "printed_difference"),
)
LEGEND = (
    "mean ± standard deviation over seeds; below it the mean difference to the first variant over test images (scores averaged "
    "over seeds) and its p value in a paired sign-flip test, adjusted for the number of comparisons (Holm). ≈: smaller than "
    "the spread over seeds"
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """One finished and evaluated run of a sweep: `metrics` by protocol label, `scores` the per-sample table's file."""

    seed: int
    root: Path
    epoch: int
    metrics: dict[str, dict[str, float | None]]
    scores: Path


def variant_documents(
    variants: Sequence[Variant], runs: Mapping[str, Sequence[Trained]], protocol: str, family: str, paper: Printed | None
) -> list[Document]:
    """What `sweep.json` says of each variant under the main `protocol`; `runs` by variant name, in the order of the seeds."""
    documents = [_summary(variant, runs[variant.name], protocol) for variant in variants]
    reference = runs[variants[0].name]
    found: list[tuple[Document, str, Comparison]] = []
    for document, variant in zip(documents[1:], variants[1:], strict=True):
        seeds = {run.seed for run in reference} & {run.seed for run in runs[variant.name]}
        if not seeds:
            continue
        own, first = (_per_image(part, seeds, protocol) for part in (runs[variant.name], reference))
        found += [(document, metric, compare(own[metric], first[metric])) for metric in SHOWN]
    for (document, metric, result), adjusted in zip(found, holm([result.p_value for *_, result in found]), strict=True):
        spread = _spread(document["summary"][metric]["std"], documents[0]["summary"][metric]["std"])
        document["differences"][metric] = {
            **asdict(result),
            "p_adjusted": adjusted,
            "spread": spread,
            "within_spread": None if spread is None else abs(result.difference) < spread,
        }
    for document, variant in zip(documents, variants, strict=True):
        document["printed"] = _printed(variant, variants[0], family, paper)
        row = _row_in_print(variant, family)
        document["printed_row"] = None if row is None else _origin_of(row)
    return documents


def _origin_of(row: Published) -> Document:
    return {name: getattr(row, name) for name in ("source", "protocol", "comparable", "note")}


def _summary(variant: Variant, runs: Sequence[Trained], protocol: str) -> Document:
    values = {metric: [value for run in runs if (value := run.metrics[protocol].get(metric)) is not None] for metric in SHOWN}
    return {
        "name": variant.name,
        "changes": list(variant.overrides),
        "runs": [{"seed": run.seed, "root": str(run.root), "epoch": run.epoch, "metrics": run.metrics} for run in runs],
        "summary": {
            metric: {
                "mean": statistics.fmean(found) if found else None,
                "std": statistics.stdev(found) if len(found) > 1 else None,
                "seeds": len(found),
            }
            for metric, found in values.items()
        },
        "differences": {},
    }


def _per_image(runs: Sequence[Trained], seeds: set[int], protocol: str) -> dict[str, dict[str, float]]:
    """Each metric of each image, averaged over the seeds; NaN where one of them has no score."""
    tables = [read_scores(run.scores)[protocol] for run in runs if run.seed in seeds]
    return {
        metric: {key: math.fsum(table[metric][key] for table in tables) / len(tables) for key in tables[0][metric]}
        for metric in SHOWN
    }


def _spread(own: float | None, first: float | None) -> float | None:
    """Standard deviation of the difference between two trainings with seeds of their own; None with one seed."""
    return None if own is None or first is None else math.hypot(own, first)


def _row_in_print(variant: Variant, family: str) -> Published | None:
    """The row of `pcd/reports/published.toml` that the variant names, for a family of datasets."""
    return next((row for row in published(family) if row.method == variant.published), None)


def _printed(variant: Variant, reference: Variant, family: str, paper: Printed | None) -> dict[str, Any] | None:
    """The numbers in print, lengths in metres: `as_printed`, `value`, and `difference` to the reference's.

    Those of a row of its own stand alone: another paper, another protocol.
    """
    if (row := _row_in_print(variant, family)) is not None:
        return {
            metric: {"as_printed": value, "value": value, "difference": None}
            for metric, value in row.values.items()
            if metric in METRICS
        }
    values = variant.paper.get(family)
    if paper is None or not values:
        return None
    scale = {m: paper.metres_per_unit.get(family, 1.0) if METRICS[m].unit == "m" else 1.0 for m in METRICS}
    first = reference.paper.get(family, {})
    return {
        metric: {
            "as_printed": value,
            "value": value * scale[metric],
            "difference": (value - first[metric]) * scale[metric] if metric in first and variant is not reference else None,
        }
        for metric, value in values.items()
    }


def write_tables(root: Path, document: Document) -> None:
    """`sweep.json`, `sweep.csv` (a row per variant and metric) and `sweep.md` (the table as it is printed)."""
    json_file, csv_file, md_file = (root / name for name in FILES)
    write_json(json_file, plain(document))
    write_csv(csv_file, [row for variant in document["variants"] for row in _csv_rows(variant, document)], CSV_COLUMNS)
    write_text(md_file, markdown(document))


def _csv_rows(variant: Document, document: Document) -> list[Document]:
    rows = []
    for metric, summary in variant["summary"].items():
        difference = variant["differences"].get(metric, {})
        printed = (variant["printed"] or {}).get(metric, {})
        rows.append(
            {
                "variant": variant["name"],
                "protocol": document["protocol"],
                "metric": metric,
                **summary,
                **difference,
                "printed": printed.get("value"),
                "printed_difference": printed.get("difference"),
            }
        )
    return [{name: row.get(name) for name in CSV_COLUMNS} for row in rows]


def printed_title(document: Document) -> str:
    """What stands above the numbers in print."""
    return f"In print: {document['printed_source'] or 'each row under a protocol of its own, see below'}"


def headings() -> list[str]:
    """The columns of metrics, with unit and the better direction."""
    return [f"{METRICS[name].heading} {METRICS[name].arrow}" for name in SHOWN]


def score_lines(variant: Document, metric: str) -> tuple[str, str]:
    """A cell: mean and standard deviation, and the difference with its p value ("" for the reference)."""
    summary, difference = variant["summary"][metric], variant["differences"].get(metric)
    if summary["mean"] is None:
        return "-", ""
    spread = f" ±{summary['std']:.4f}" if summary["std"] is not None else ""
    mark = " ≈" if difference and difference["within_spread"] else ""
    below = f"{difference['difference']:+.4f} {p_words(difference['p_adjusted'])}{mark}" if difference else ""
    return f"{summary['mean']:.4f}{spread}", below


def p_words(value: float) -> str:
    """A p value in few characters."""
    return "p<.001" if value < 0.001 else f"p={value:.3f}".replace("=0.", "=.")


def counts(difference: Document | None) -> bool:
    """Whether a difference survives the test over images and is not smaller than the spread over seeds."""
    return difference is not None and difference["p_adjusted"] < 0.05 and not difference["within_spread"]


def printed_lines(variant: Document, metric: str) -> tuple[str, str]:
    """A cell of the table in print: value in metres where it is a length, and difference to the reference's."""
    printed = (variant["printed"] or {}).get(metric)
    if printed is None:
        return "-", ""
    below = "" if printed["difference"] is None else f"{printed['difference']:+.3f}"
    return f"{printed['value']:.3f}", below


def remarks(document: Document) -> list[str]:
    """What must be read with the table: protocol, legend, seeds, labels, repeated variants, failures, numbers in print."""
    lines = [f"{document['protocol']}: {document['description_of_protocol']} {document['samples']} images.", f"{LEGEND}."]
    if len(document["seeds"]) == 1:
        lines.append("One seed: how much another seed changes is not known, and no difference here can be told from its noise.")
    for variant in document["variants"]:
        if variant["same_as"]:
            lines.append(f"{variant['name']} is the same training as {variant['same_as']}.")
        if 0 < len(variant["runs"]) < len(document["seeds"]):
            lines.append(f"{variant['name']}: {len(variant['runs'])} of {len(document['seeds'])} seeds.")
    lines += [f"note: {label}" for label in document["labels"]]
    for variant in document["variants"]:
        lines += [f"note: {variant['name']}: {label}" for label in variant["labels"] if label not in document["labels"]]
    lines += [f"failed: {item['variant']}, seed {item['seed']}: {item['message']}" for item in document["failures"]]
    for variant in document["variants"]:
        if row := variant["printed_row"]:
            near = f", nearest to protocol {row['protocol']}" if row["protocol"] else ""
            lines.append(f"in print, {variant['name']}: {row['source']}{near}; comparable: {row['comparable']}; {row['note']}")
    return lines + (document["printed_notes"] if any(variant["printed"] for variant in document["variants"]) else [])


def markdown(document: Document) -> str:
    """The tables and remarks as Markdown."""
    lines = [f"# {document['sweep']} on {document['cache']}", ""]
    lines += [f"{document['description']}.", ""] if document["description"] else []
    lines += _markdown_table(document, score_lines)
    if any(variant["printed"] for variant in document["variants"]):
        lines += ["", f"{printed_title(document)}:", "", *_markdown_table(document, printed_lines)]
    return "\n".join([*lines, "", *(f"- {_escaped(line)}" for line in remarks(document)), ""])


def _markdown_table(document: Document, cell: Any) -> list[str]:
    lines = [f"| variant | {' | '.join(headings())} |", f"|---|{'---|' * len(SHOWN)}"]
    for variant in document["variants"]:
        cells = ("<br>".join(part for part in cell(variant, metric) if part) for metric in SHOWN)
        lines.append(f"| {_escaped(variant['name'])} | {' | '.join(cells)} |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
