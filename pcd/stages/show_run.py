"""What a run says about one sample: which patches it learns from, what it predicts, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.cache import Cache
from pcd.errors import SampleError
from pcd.evaluation.figures_sample import Map, SamplePanel
from pcd.evaluation.pixels import combine_views, upsample
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.scoring import Scorer
from pcd.heads import head_options
from pcd.heads.base import Head
from pcd.heads.bins import DepthBins
from pcd.stages.evaluate import choose_protocols
from pcd.stages.inference import Patches, beliefs, canvas_truth, head_predictor, native_truth
from pcd.stages.runs import Run
from pcd.stages.selection import Selection
from pcd.training.sources import StreamedRows
from pcd.training.targets import RowTargets, row_targets

BINS = 10
"""Bins of the histogram for a head that has none: of equal width, over its depth range."""


@dataclass(frozen=True)
class Part:
    """Some facts about a sample, in plain values, and the panels that go with them."""

    facts: dict[str, Any]
    panels: list[SamplePanel] = field(default_factory=list)


def run_part(run: Run, cache: Cache, chosen: Selection, group: str, checkpoint: str, device: torch.device) -> Part:
    """Supervision, prediction, error, uncertainty, bins and scores; ground truth from column group `group`.

    Raises `RunError` for a checkpoint that is not there, `PredictionError` for a prediction that is not finite.
    """
    head, epoch = run.load_head(checkpoint, device)
    protocols = choose_protocols(run, cache, (), None if chosen.plan.flips else False, None)
    tta, mode = protocols[0].tta and chosen.view is None, protocols[0].upsample
    source = StreamedRows(chosen.table, head.reads(head.options), device)
    patches = _on_cpu(head_predictor(head, chosen.table, source, run.grid, uncertainty=True)(chosen.samples))
    truth = canvas_truth(chosen.table, chosen.samples, group)
    scored = _scores(protocols, chosen, patches, truth)
    depth = combine_views(patches.depth, chosen.plan, tta) if chosen.view is None else patches.depth[:, chosen.view]
    shown = chosen.pixels(truth[0])
    pixels = upsample(depth, (shown.shape[0], shown.shape[1]), mode)[0].numpy().astype(np.float32)
    how = f"{mode}, {'flip TTA' if tta else 'no TTA'}"
    facts = {"checkpoint": checkpoint, "epoch": epoch, "tta": tta, "upsample": mode, **_range(depth.numpy())}
    panels = [
        SamplePanel("prediction", f"predicted depth, epoch {epoch} ({how})", "depth", pixels),
        SamplePanel("error", "error of the prediction", "error", pixels - shown),
    ]
    spread = _spread(chosen, patches, tta)
    panels += [] if spread is None else [SamplePanel("std", "uncertainty of the prediction", "spread", spread)]
    facts["mean_std"] = None if spread is None else float(spread.mean())
    probabilities = _probabilities(head, source.read(chosen.rows), chosen, run.grid, tta)
    learnt = _supervision(run, head, chosen, group, probabilities)
    return Part({"prediction": facts, "scores": scored, **learnt.facts}, [*panels, *learnt.panels])


def _on_cpu(patches: Patches) -> Patches:
    std, entropy = (None if value is None else value.float().cpu() for value in (patches.std, patches.entropy))
    return Patches(patches.depth.float().cpu(), std, entropy)


def _range(depth: npt.NDArray[np.float32]) -> dict[str, float]:
    return {"min": float(depth.min()), "max": float(depth.max())}


def _spread(chosen: Selection, patches: Patches, tta: bool) -> Map | None:
    """Standard deviation `(rows, columns)` in metres, or None from a head without a distribution."""
    if patches.std is None:
        return None
    if chosen.view is not None:
        return patches.std[0, chosen.view].numpy()
    found = beliefs(patches, chosen.plan, tta)
    return None if found is None else found.std[0].numpy()


@torch.inference_mode()
def _probabilities(
    head: Head, columns: Mapping[str, Tensor], chosen: Selection, grid: tuple[int, int], tta: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Probabilities of the bins `(rows, columns, K)` and their centres `(K,)` in metres; with `tta` the mean of both views."""
    found = head.distribution(columns)
    if found is None:
        return None
    each = found.probabilities.float().cpu().reshape(len(chosen.rows), *grid, -1)
    if chosen.view is not None:
        return each[chosen.view].numpy(), found.centres.cpu().numpy()
    combined = combine_views(each.permute(3, 0, 1, 2), chosen.plan, tta)
    return combined.permute(1, 2, 0).numpy(), found.centres.cpu().numpy()


def _supervision(
    run: Run,
    head: Head,
    chosen: Selection,
    group: str,
    probabilities: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
) -> Part:
    """Which patches count in which loss, and the bins that their true depth and the prediction fall in."""
    (_, options), settings = head_options(run.recipe.head), run.recipe.targets
    limits = (options.min_depth, options.max_depth)
    named = {"embedding": settings.embedding, "depth": settings.depth}
    targets = row_targets(chosen.table, chosen.rows, run.grid, named, limits, group)
    masks = {name: chosen.patches(target.valid, run.grid) for name, target in targets.items()}
    panels = _masks(masks, targets)
    own = getattr(head, "bins", None)
    bins = own if isinstance(own, DepthBins) else DepthBins(*limits, BINS)
    valid, mean = masks["embedding"], chosen.patches(targets["embedding"].mean, run.grid)
    index = bins.index(torch.from_numpy(np.ascontiguousarray(mean))).numpy()
    true = np.where(valid, bins.centres[index], np.nan).astype(np.float32)
    panels.append(SamplePanel("true bin", f"bin of the true depth ({bins.describe()}), where it counts", "depth", true))
    histogram = {
        "of": "patches that count in the embedding loss",
        "edges": bins.edges.tolist(),
        "true": np.bincount(index[valid], minlength=bins.count).tolist(),
        "likely": None,
    }
    if probabilities is not None:
        likely = probabilities[0].argmax(axis=-1)
        panels.append(SamplePanel("likely bin", "most likely bin", "depth", probabilities[1][likely]))
        if bins is own:
            histogram["likely"] = np.bincount(likely[valid], minlength=bins.count).tolist()
    return Part({"counting": {name: int(mask.sum()) for name, mask in masks.items()}, "bins": histogram}, panels)


def _masks(masks: Mapping[str, npt.NDArray[np.bool_]], targets: Mapping[str, RowTargets]) -> list[SamplePanel]:
    """A panel for each loss, or one for both if they look at the same patches."""
    same: dict[bytes, list[str]] = {}
    for name, mask in masks.items():
        same.setdefault(mask.tobytes(), []).append(name)
    panels = []
    for names in same.values():
        mask = masks[names[0]]
        title = f"{mask.sum()} of {mask.size} patches (white) count in the {' and '.join(names)} loss"
        panels.append(SamplePanel(f"counts in {' and '.join(names)}", title, "mask", mask.astype(np.float32)))
    return panels


def _scores(
    protocols: list[Protocol], chosen: Selection, patches: Patches, truth: npt.NDArray[np.float32]
) -> dict[str, dict[str, Any]]:
    """The sample's scores under each protocol by label, always of all its views; `not_scored` says why there are none."""
    table, found = chosen.table, {}
    for protocol in protocols:
        scorer, entry = Scorer([protocol], chosen.plan), {"description": protocol.describe(), "not_scored": None}
        if scorer.needs_native and "depth/native" not in table.column_names():
            entry["not_scored"] = f"table {table.name} holds no ground truth as stored"
        else:
            native = native_truth(table, chosen.samples) if scorer.needs_native else None
            try:
                scorer.add([table.keys[chosen.number]], patches.depth, torch.from_numpy(truth), native)
                entry |= scorer.scores[protocol.label].summary()
            except SampleError as error:
                entry["not_scored"] = str(error)
        found[protocol.label] = entry
    return found
