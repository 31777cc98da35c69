"""Demo: synthetic scenes through every stage, beside two baselines, to a picture and a report one can look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pcd.cache import Table
from pcd.datasets import Dataset, create_dataset
from pcd.device import resolve_device
from pcd.evaluation.pictures import Panel, save_panels
from pcd.evaluation.pixels import combine_views, native_prediction
from pcd.evaluation.protocols import get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.files import write_json
from pcd.progress import SILENT, Progress
from pcd.recipe import Recipe
from pcd.stages.extract import extract
from pcd.stages.inference import Predict, constant_predictor, head_predictor, native_truth, score
from pcd.stages.needs import shipped_recipes
from pcd.stages.report import report
from pcd.stages.runs import Run
from pcd.stages.train import train
from pcd.training.rows import random_stream
from pcd.training.sources import RowSource, StreamedRows
from pcd.views import TRUTH

if TYPE_CHECKING:
    from pcd.training.loop import EpochReport

PROTOCOL = "eigen"
SHOWN = 4
HEAD, SHUFFLED, MEAN = "head", "same head, shuffled tokens", "mean training depth"


@dataclass(frozen=True)
class Demo:
    """Scores under one protocol by what was scored, the protocol in words, the run, the picture and the report's page."""

    run: Run
    protocol: str
    scores: dict[str, dict[str, float]]
    picture: Path
    page: Path


class ShuffledTokens:
    """Patch tokens of other rows at other places: what remains of the features says nothing about depth."""

    def __init__(self, source: RowSource, seed: int = 0) -> None:
        self._source = source
        self._seed = seed

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The columns of some rows, tokens permuted over all rows and patches of the batch."""
        columns = self._source.read(rows)
        order = random_stream(self._seed, *(int(row) for row in rows))
        for name, values in columns.items():
            flat = values.flatten(0, 1) if values.dim() == 3 else values
            columns[name] = flat[torch.from_numpy(order.permutation(len(flat)))].reshape(values.shape)
        return columns


def demo(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> Demo:
    """Extract, train and score the demo recipe in folder `out`, then its baselines; draw test samples and report on the run."""
    cache = extract(recipe, out / "cache", device=device, also=shipped_recipes(recipe.dataset["name"]), progress=progress).cache
    run = train(recipe, cache, out / "run", device=device, progress=progress, on_epoch=on_epoch)
    progress.say("the same head on shuffled tokens: what is learned when features say nothing about depth")
    blind = train(recipe, cache, out / "run-shuffled", device=device, progress=progress, through=ShuffledTokens)
    table, where = cache.table("test"), torch.device(resolve_device(device))
    predictors = {
        HEAD: _predictor(run, table, where, lambda source: source),
        SHUFFLED: _predictor(blind, table, where, ShuffledTokens),
        MEAN: constant_predictor(mean_depth(cache.table("train")), table, run.grid),
    }
    low, high = cache.manifest.dataset["depth_range"]
    protocol = get_protocol(PROTOCOL, cache.manifest.dataset["family"], (low, high))
    group = TRUTH[recipe.views.depth_resize]
    scores = {}
    for name, predict in predictors.items():
        scorer = Scorer([protocol], table.plan)
        score(predict, table, scorer, group)
        scores[name] = scorer.scores[protocol.label].means()
    write_json(out / "scores.json", {"protocol": protocol.as_json(), "labels": run.labels, "scores": scores})
    dataset = create_dataset(recipe.dataset["name"], recipe.options("dataset"))
    picture = out / "demo.png"
    draw(picture, table, dataset, predictors[HEAD], run)
    page = report([run], out / "report", cache=cache, device=device, progress=progress).page
    return Demo(run, protocol.describe(), scores, picture, page)


def _predictor(run: Run, table: Table, device: torch.device, through: Callable[[RowSource], RowSource]) -> Predict:
    head, _ = run.load_head("abs_rel", device)
    source = through(StreamedRows(table, head.reads(head.options), device))
    return head_predictor(head, table, source, run.grid)


def mean_depth(table: Table) -> float:
    """Mean depth of all training pixels in metres, from the patch statistics."""
    rows = table.view_rows(table.usable(), flips=False).reshape(-1)
    count = table.column("depth/count").read(rows).astype(np.float64)
    return float((count * table.column("depth/mean").read(rows)).sum() / count.sum())


def draw(path: Path, table: Table, dataset: Dataset, predict: Predict, run: Run) -> None:
    """Evenly spaced test samples: image, ground truth, prediction, one scale in metres."""
    usable = table.usable()
    samples = usable[np.linspace(0, len(usable) - 1, min(SHOWN, len(usable))).round().astype(int)]
    patches = combine_views(predict(samples).depth, table.plan, tta=table.plan.flips)
    rows = []
    for number, truth, patch in zip(samples, native_truth(table, samples), patches, strict=True):
        depth = native_prediction(patch[None], table.plan, (truth.shape[0], truth.shape[1]), "bilinear", "edge")[0]
        image = dataset.load("test", table.keys[number]).rgb
        prediction = depth.cpu().numpy().astype(np.float32)
        rows.append([Panel(table.keys[number], image), Panel("ground truth", truth), Panel("prediction", prediction)])
    save_panels(path, rows, f"{run.recipe.name}: " + ", ".join(run.labels or ["test samples"]))
