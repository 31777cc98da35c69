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
from pcd.evaluation.protocol import Upsample
from pcd.evaluation.protocols import Protocol, get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.files import write_json
from pcd.progress import SILENT, Progress
from pcd.stages.inference import head_predictor, score
from pcd.stages.runs import Run
from pcd.training.rows import StreamedRows
from pcd.views import TRUTH

EVALUATIONS = "evaluations"
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
    device: str = "auto",
    progress: Progress = SILENT,
) -> Evaluation:
    """Score `run` on table `split` of `cache` (default: the one it was trained on) and write the result into the run.

    `checkpoint` is a watched metric (the epoch that was best for it), `last`, or `each`. Options left out are the recipe's.
    Raises `FingerprintError` for a cache of another encoder, `CacheError` for a missing table, `UsageError` for a protocol or
    option that does not apply.
    """
    cache = cache or run.open_cache()
    run.check_columns(cache, same_data=False)
    table = _require(cache, split)
    chosen = choose_protocols(run, cache, protocols, tta, upsample)
    where = torch.device(resolve_device(device))
    if checkpoint == EACH:
        result = _score_each(run, table, chosen, where, progress)
    else:
        result, scorer = _score_one(run, table, chosen, checkpoint, where, progress)
    document = {
        "run": str(run.root),
        "cache": str(cache.root),
        "split": split,
        "samples": len(table.usable()),
        "skipped": table.samples - len(table.usable()),
        "labels": run.labels,
        **result,
    }
    folder = run.root / EVALUATIONS / f"{split}-{checkpoint}"
    write_json(folder / "metrics.json", document)
    if checkpoint != EACH:
        scorer.write_csv(folder / "samples.csv")
    return Evaluation(folder, document)


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
    run: Run, table: Table, protocols: list[Protocol], checkpoint: str, device: torch.device, progress: Progress
) -> tuple[dict[str, Any], Scorer]:
    head, epoch = run.load_head(checkpoint, device)
    scorer = Scorer(protocols, table.plan)
    source = StreamedRows(table, head.reads(head.options), device)
    progress.start(f"{table.name}: scoring epoch {epoch}", len(table.usable()), "samples")
    group = TRUTH[run.recipe.views.depth_resize]
    score(head_predictor(head, table, source, run.grid), table, scorer, group, progress.advance)
    progress.stop()
    summary = scorer.summary()
    scores = {p.label: {"protocol": p.as_json(), "description": p.describe(), **summary[p.label]} for p in protocols}
    return {"checkpoint": checkpoint, "epoch": epoch, "protocols": scores}, scorer


def _score_each(run: Run, table: Table, protocols: list[Protocol], device: torch.device, progress: Progress) -> dict[str, Any]:
    """Each watched metric from its own best epoch (paper, section 3.3); epochs shared by metrics are scored once."""
    best = {metric: value["epoch"] for metric, value in run.best.items()}
    by_epoch: dict[int, dict[str, Any]] = {}
    for metric, epoch in best.items():
        if epoch not in by_epoch:
            by_epoch[epoch] = _score_one(run, table, protocols, metric, device, progress)[0]["protocols"]
    scores = {}
    for protocol in protocols:
        chosen = {m: by_epoch[e][protocol.label]["metrics"][m] for m, e in best.items()}
        scores[protocol.label] = {**next(iter(by_epoch.values()))[protocol.label], "metrics": chosen}
    return {"checkpoint": EACH, "epoch": best, "protocols": scores}
