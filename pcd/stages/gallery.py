"""The samples a report shows: chosen keys predicted again by every run, with the images if they are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.cache import Cache
from pcd.errors import DatasetError
from pcd.evaluation.pixels import combine_views, native_prediction
from pcd.reports.panels import Predicted, Rgb, Sample
from pcd.stages.frames import open_frames
from pcd.stages.inference import beliefs, head_predictor, native_truth
from pcd.stages.runs import Run
from pcd.training.sources import StreamedRows
from pcd.views import ViewPlan

Map = npt.NDArray[np.float32]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Protocol, metric, key."""


def gallery(
    runs: Sequence[Run],
    names: Sequence[str],
    caches: Sequence[Cache],
    split: str,
    chosen: Sequence[tuple[str, str]],
    checkpoint: str,
    scores: Sequence[Scores],
    protocol: str,
    images: Path | None,
    device: torch.device,
) -> tuple[list[Sample], list[str]]:
    """Samples for `chosen` (rule, key) with the predictions of every run, and a note if the images are not at hand."""
    if not chosen:
        return [], []
    keys = [key for _, key in chosen]
    table = caches[0].table(split)
    truths = native_truth(table, _numbers(table.keys, keys))
    pictures, notes = _images(caches[0], split, keys, images)
    found: list[dict[str, Predicted]] = [{} for _ in keys]
    for run, name, cache, own in zip(runs, names, caches, scores, strict=True):
        sizes = [(truth.shape[0], truth.shape[1]) for truth in truths]
        for at, (depth, std) in enumerate(_predict(run, cache, split, keys, sizes, checkpoint, device)):
            values = {metric: own[protocol][metric][keys[at]] for metric in ("abs_rel", "rmse", "delta1")}
            found[at][name] = Predicted(depth, std, values)
    samples = [
        Sample(key, rule, picture, truth, predicted)
        for (rule, key), picture, truth, predicted in zip(chosen, pictures, truths, found, strict=True)
    ]
    return samples, notes


def _numbers(table_keys: Sequence[str], keys: Sequence[str]) -> npt.NDArray[np.int64]:
    place = {key: number for number, key in enumerate(table_keys)}
    return np.array([place[key] for key in keys], dtype=np.int64)


def _images(cache: Cache, split: str, keys: Sequence[str], root: Path | None) -> tuple[list[Rgb | None], list[str]]:
    """The images, or None for each and a note that says why; an image root that was given must be right."""
    try:
        frames = open_frames(cache, root)
        return [frames.load(split, key).rgb for key in keys], []
    except DatasetError as error:
        if root is not None:
            raise
        return [None] * len(keys), [f"Samples are shown without their images: {error}"]


def _predict(
    run: Run,
    cache: Cache,
    split: str,
    keys: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    checkpoint: str,
    device: torch.device,
) -> list[tuple[Map, Map | None]]:
    """Depth and standard deviation of samples at the size of their frames, upsampled bilinearly."""
    table = cache.table(split)
    head, _ = run.load_head(checkpoint, device)
    source = StreamedRows(table, head.reads(head.options), device)
    predict = head_predictor(head, table, source, run.grid, uncertainty=True)
    found = []
    for number, size in zip(_numbers(table.keys, keys), sizes, strict=True):
        patches, tta = predict(np.array([number])), table.plan.flips
        belief = beliefs(patches, table.plan, tta)
        depth = combine_views(patches.depth, table.plan, tta)
        std = None if belief is None else _map(belief.std, table.plan, size)
        found.append((_map(depth, table.plan, size), std))
    return found


def _map(patches: Tensor, plan: ViewPlan, size: tuple[int, int]) -> Map:
    pixels: Any = native_prediction(patches.float(), plan, size, "bilinear", "edge")[0].cpu().numpy()
    return np.asarray(pixels, dtype=np.float32)
