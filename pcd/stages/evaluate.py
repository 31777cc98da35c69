"""Evaluate: a run's predictions on a cached table, scored under named protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pcd.cache import Cache, Table
from pcd.device import resolve_device
from pcd.errors import CacheError, UsageError
from pcd.evaluation.analysis import Analysis
from pcd.evaluation.metrics import METRICS
from pcd.evaluation.protocol import Upsample
from pcd.evaluation.protocols import Protocol, get_protocol
from pcd.evaluation.scores import COLUMNS
from pcd.evaluation.scoring import Scorer
from pcd.evaluation.tables import write_csv, write_parquet
from pcd.files import plain, write_json
from pcd.fingerprint import file_digest
from pcd.progress import SILENT, Progress
from pcd.stages.inference import head_predictor, score
from pcd.stages.runs import Run
from pcd.training.sources import StreamedRows
from pcd.views import TRUTH

EVALUATIONS = "evaluations"
METRICS_FILE, ANALYSIS_FILE = "metrics.json", "analysis.json"
DEPTH_BINS = 10
DEPTH_COLUMNS = ("protocol", "low", "high", "pixels", *METRICS)
EACH = "each"
"""Checkpoint choice: every metric from the epoch that was best for it in validation, as the paper reports."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one run on one table. `result` is the JSON document that was written to `folder`."""

    folder: Path
    result: dict[str, Any]

    def metrics(self, protocol: str) -> dict[str, float]:
        """The metrics under a protocol, by its label."""
        metrics: dict[str, float] = self.result["protocols"][protocol]["metrics"]
        return metrics


def evaluate(
    run: Run,
    cache: Cache | None = None,
    *,
    split: str = "test",
    protocols: Sequence[str] = (),
    checkpoint: str = "abs_rel",
    tta: bool | None = None,
    upsample: Upsample | None = None,
    boundary: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Evaluation:
    """Score `run` on table `split` of `cache` (default: the one it was trained on) and write the result into the run.

    `checkpoint` is a watched metric (the epoch that was best for it), `last`, or `each`. Options left out are the recipe's.
    `boundary` asks for boundary F1 under the protocols at native resolution: for dense ground truth, and slow.
    Raises `FingerprintError` for a cache of another encoder, `CacheError` for a missing table, `UsageError` for a protocol or
    option that does not apply.
    """
    cache = cache or run.open_cache()
    run.check_columns(cache, same_data=False)
    table = _require(cache, split)
    chosen = choose_protocols(run, cache, protocols, tta, upsample)
    where = torch.device(resolve_device(device))
    if checkpoint == EACH:
        result, files = _score_each(run, table, chosen, boundary, where, progress), None
    else:
        result, files = _score_one(run, table, chosen, checkpoint, boundary, where, progress)
    document = {
        "run": str(run.root),
        "cache": str(cache.root),
        "split": split,
        "samples": len(table.usable()),
        "skipped": table.samples - len(table.usable()),
        "labels": run.labels,
        "order": [protocol.label for protocol in chosen],
        **result,
    }
    folder = run.root / EVALUATIONS / f"{split}-{checkpoint}"
    if files is not None:
        files.write(folder)
    write_json(folder / METRICS_FILE, document)
    return Evaluation(folder, document)


@dataclass(frozen=True)
class _Files:
    """What an evaluation of one checkpoint leaves beside its metrics."""

    scorer: Scorer
    analysis: Analysis

    def write(self, folder: Path) -> None:
        """Scores by sample (CSV and Parquet), by true depth (CSV), and the analysis."""
        write_csv(folder / "samples.csv", self.scorer.rows, COLUMNS)
        write_parquet(folder / "samples.parquet", self.scorer.rows, COLUMNS)
        by_depth = [{"protocol": label, **row} for label, scores in self.scorer.scores.items() for row in scores.depth_table()]
        write_csv(folder / "depths.csv", by_depth, DEPTH_COLUMNS)
        write_json(folder / ANALYSIS_FILE, plain(self.analysis.as_json()))


def choose_protocols(
    run: Run, cache: Cache, names: Sequence[str], tta: bool | None, upsample: Upsample | None
) -> list[Protocol]:
    """The protocols by name, fitted to the dataset's family, with the overrides marked in their labels.

    Raises `UsageError` if test-time augmentation is asked for and the cache has no mirrored views.
    """
    dataset, settings = cache.manifest.dataset, run.recipe.evaluate
    low, high = dataset["depth_range"]
    chosen = [get_protocol(name, dataset["family"], (low, high)) for name in names or settings.protocols]
    upsample = upsample or settings.upsample
    tta = settings.tta if tta is None else tta
    if tta and not cache.manifest.plan.flips:
        raise UsageError(
            f"{cache.root} has no mirrored views for flip TTA; give --no-tta (evaluate.tta=false in a recipe), "
            "or extract with flips."
        )
    return [replace(p, tta=p.tta and tta, upsample=upsample or p.upsample) for p in chosen]


def _require(cache: Cache, split: str) -> Table:
    table = cache.table(split)
    for name in table.column_names():
        table.column(name).require()
    if not len(table.usable()):
        raise CacheError(f"{cache.root}: every sample of table {split} was skipped; there is nothing to score.")
    return table


def _score_one(
    run: Run,
    table: Table,
    protocols: list[Protocol],
    checkpoint: str,
    boundary: bool,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, Any], _Files]:
    head, epoch = run.load_head(checkpoint, device)
    analysis = Analysis(protocols[0])
    scorer = Scorer(protocols, table.plan, depth_bins=DEPTH_BINS, boundary=boundary, watch=analysis.pixels)
    source = StreamedRows(table, head.reads(head.options), device)
    progress.start(f"{table.name}: scoring epoch {epoch}", len(table.usable()), "samples")
    group = TRUTH[run.recipe.views.depth_resize]
    predict = head_predictor(head, table, source, run.grid, uncertainty=True)
    score(predict, table, scorer, group, progress.advance, analysis)
    progress.stop()
    scores = {protocol.label: _document(protocol, scorer) for protocol in protocols}
    weights = file_digest(run.checkpoint_file(checkpoint)[0])
    return {"checkpoint": checkpoint, "epoch": epoch, "weights": weights, "protocols": scores}, _Files(scorer, analysis)


def _document(protocol: Protocol, scorer: Scorer) -> dict[str, Any]:
    """The scores under one protocol with their 95 % bootstrap limits over images, the protocol as data and in words.

    One image alone has no limits: resampling it says nothing.
    """
    scores = scorer.scores[protocol.label]
    found = scores.intervals()
    limits = {name: [each.low, each.high] if each.groups > 1 else [None, None] for name, each in found.items()}
    document: dict[str, Any] = plain(
        {
            "protocol": protocol.as_json(),
            "description": protocol.describe(),
            **scores.summary(),
            "intervals": limits,
            "by_depth": scores.depth_table(),
        }
    )
    return document


def _score_each(
    run: Run, table: Table, protocols: list[Protocol], boundary: bool, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Each watched metric from its own best epoch (paper, section 3.3); epochs shared by metrics are scored once."""
    best = {metric: value["epoch"] for metric, value in run.best.items()}
    by_epoch: dict[int, dict[str, Any]] = {}
    for metric, epoch in best.items():
        if epoch not in by_epoch:
            by_epoch[epoch] = _score_one(run, table, protocols, metric, boundary, device, progress)[0]["protocols"]
    scores = {}
    for protocol in protocols:
        found = {m: by_epoch[e][protocol.label] for m, e in best.items()}
        shared = {k: v for k, v in next(iter(found.values())).items() if k != "by_depth"}
        chosen = {kind: {m: scores_of[kind][m] for m, scores_of in found.items()} for kind in ("metrics", "intervals")}
        scores[protocol.label] = {**shared, **chosen}
    return {"checkpoint": EACH, "epoch": best, "protocols": scores}
