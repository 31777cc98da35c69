"""Report: one or several runs, scored alike, as a page one can send to somebody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pcd.cache import Cache
from pcd.device import resolve_device
from pcd.errors import RunError, SampleError, UsageError
from pcd.evaluation.analysis import choose_samples
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.protocols import usual_protocols
from pcd.evaluation.scoring import Scorer
from pcd.evaluation.statistics import compare, holm
from pcd.evaluation.tables import read_scores
from pcd.files import read_json
from pcd.fingerprint import file_digest
from pcd.progress import SILENT, Progress
from pcd.reports.contents import COMPARED, Contents, Difference, RunPart
from pcd.reports.drawing import SERIES
from pcd.reports.published import published
from pcd.reports.write import write_report
from pcd.stages.evaluate import ANALYSIS_FILE, EACH, EVALUATIONS, METRICS_FILE, choose_protocols, evaluate
from pcd.stages.facts import facts_of
from pcd.stages.gallery import gallery
from pcd.stages.runs import Run
from pcd.views import ViewPlan

NATIVE = "depth/native"


@dataclass(frozen=True)
class Report:
    """The page, and what it says: see `pcd.reports.contents.Contents`."""

    page: Path
    contents: Contents


def report(
    runs: Sequence[Run],
    out: Path,
    *,
    cache: Cache | None = None,
    split: str = "test",
    protocols: Sequence[str] = (),
    checkpoint: str = "abs_rel",
    samples: int = 3,
    images: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Report:
    """Score `runs` on table `split` (of `cache`, or of the cache each was trained on) and write the page into folder `out`.

    The first protocol named is the main one; none named means the recipe's, then all others that fit the data. `samples` of
    the best, middle and worst images are shown; `images` is where they are now, if they have moved. Runs after the first are
    compared with it. Raises `UsageError` for runs that cannot stand in one report, and what `evaluate` raises.
    """
    if checkpoint == EACH:
        raise UsageError("a report needs one set of weights per run: give a metric (its best epoch) or last, not each.")
    caches = [cache or run.open_cache() for run in runs]
    chosen, notes = _protocols(runs, caches, split, protocols)
    names = _names(runs)
    parts, scores = [], []
    for at, (run, held) in enumerate(zip(runs, caches, strict=True)):
        folder = evaluated(run, held, split, chosen, checkpoint, device, progress)
        parts.append(_part(run, held, folder, names[at], SERIES[at % len(SERIES)]))
        scores.append(read_scores(folder / "samples.csv"))
    found = choose_samples(scores[0][chosen[0]]["abs_rel"], samples) if samples else []
    progress.say(f"{len(found)} samples: predicting them again for the pictures")
    shown, missing = gallery(
        runs, names, caches, split, found, checkpoint, scores, chosen[0], images, torch.device(resolve_device(device))
    )
    contents = Contents(
        title=f"{names[0]}: depth report" if len(runs) == 1 else f"{names[0]} and {len(runs) - 1} more: depth report",
        split=split,
        dataset=caches[0].manifest.dataset["name"],
        runs=parts,
        protocols=chosen,
        samples=shown,
        differences=_differences(parts, scores, chosen[0]),
        published=published(caches[0].manifest.dataset["family"]),
        notes=notes + missing,
    )
    return Report(write_report(contents, out), contents)


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names, or more of the path where these are not enough to tell the runs apart."""
    names = [run.root.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.root) for run in runs]
    if len(set(names)) < len(names):
        raise UsageError("a run is named twice; give each once.")
    return names


def _protocols(runs: Sequence[Run], caches: Sequence[Cache], split: str, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels of the protocols all runs are scored under, and notes on those that do not fit the frames.

    Raises `UsageError` if the caches are of different kinds, or lack untouched ground truth.
    """
    families = {(held.manifest.dataset["family"], tuple(held.manifest.dataset["depth_range"])) for held in caches}
    if len(families) > 1:
        shown = "; ".join(f"{family}, {low:g} to {high:g} m" for family, (low, high) in sorted(families))
        raise UsageError(f"these runs belong to different data ({shown}) and cannot stand in one report; pass --cache.")
    for held in caches:
        if NATIVE not in held.table(split).column_names():
            raise UsageError(f"{held.root}: table {split} holds no untouched ground truth; report on val or test.")
    flips = all(held.manifest.plan.flips for held in caches)
    tta = None if flips else False
    if asked:
        return [p.label for p in choose_protocols(runs[0], caches[0], asked, tta, None)], []
    found = {p.label: p for p in choose_protocols(runs[0], caches[0], (), tta, None)}
    family, (low, high) = next(iter(families))
    fitting, notes = [], []
    for protocol in usual_protocols(family, (low, high)):
        fitted = choose_protocols(runs[0], caches[0], [protocol.name], tta, None)[0]
        reason = _misfit(fitted, caches[0].manifest.plan, runs[0].info["frame"])
        if reason is None:
            fitting.append(fitted.label)
        else:
            notes.append(f"Not scored under {fitted.name}: {reason}")
    return list(dict.fromkeys([*found, *fitting])), notes


def _misfit(protocol: Protocol, plan: ViewPlan, frame: Sequence[int]) -> str | None:
    """Why a protocol cannot be applied to these frames, if so."""
    try:
        Scorer([protocol], plan)
        if protocol.resolution == "native":
            protocol.region_in(frame[0], frame[1])
    except (UsageError, SampleError) as error:
        return str(error)
    return None


def evaluated(
    run: Run, cache: Cache, split: str, protocols: list[str], checkpoint: str, device: str, progress: Progress
) -> Path:
    """The folder of an evaluation that answers the question; made now unless it is there."""
    folder = run.root / EVALUATIONS / f"{split}-{checkpoint}"
    if (folder / METRICS_FILE).is_file() and (folder / ANALYSIS_FILE).is_file():
        stored = read_json(folder / METRICS_FILE)
        same = (
            stored["cache"] == str(cache.root)
            and stored.get("order") == protocols
            and stored.get("weights") == file_digest(run.checkpoint_file(checkpoint)[0])
        )
        if same:
            progress.say(f"{folder} is up to date")
            return folder
    progress.say(f"{run.root}: scoring under {len(protocols)} protocols")
    tta = None if cache.manifest.plan.flips else False
    evaluate(run, cache, split=split, protocols=protocols, checkpoint=checkpoint, tta=tta, device=device, progress=progress)
    return folder


def _part(run: Run, cache: Cache, folder: Path, name: str, colour: str) -> RunPart:
    document: dict[str, Any] = read_json(folder / METRICS_FILE)
    return RunPart(
        name=name,
        colour=colour,
        labels=run.labels,
        document=document,
        analysis=read_json(folder / ANALYSIS_FILE),
        history=[] if run.bundle else run.history,
        facts=facts_of(run, cache, document),
        recipe=run.recipe.as_toml(),
    )


def _differences(parts: list[RunPart], scores: list[dict[str, Any]], protocol: str) -> list[Difference]:
    """Every further run against the first; raises `RunError` if they were not scored on the same images."""
    found = []
    for part, own in zip(parts[1:], scores[1:], strict=True):
        for metric in COMPARED:
            try:
                found.append((part, metric, compare(own[protocol][metric], scores[0][protocol][metric])))
            except UsageError as error:
                raise RunError(f"{part.name} and {parts[0].name}: {error}") from None
    adjusted = holm([result.p_value for _, _, result in found])
    return [
        Difference(part.name, part.colour, metric, result, value)
        for (part, metric, result), value in zip(found, adjusted, strict=True)
    ]
