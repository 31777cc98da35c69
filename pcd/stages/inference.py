"""From cached columns to scored predictions, a few samples at a time: shared by validation, evaluation and baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd import depths
from pcd.cache import Table
from pcd.evaluation.analysis import Analysis, PatchBeliefs
from pcd.evaluation.pixels import combine_views
from pcd.evaluation.scoring import Scorer
from pcd.heads.base import Head
from pcd.training.sources import RowSource
from pcd.views import ViewPlan, from_views

VIEWS_AT_ONCE = 16
"""Views per forward pass: 0.2 GB of activations at 576 patches and hidden width 3072."""

Samples = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Patches:
    """Predictions for the patches of views `(n, views, rows, columns)`, mirrored views as the encoder saw them.

    `depth` and its standard deviation `std` in metres, `entropy` from 0 to 1; the last two only from heads that have a
    distribution, and if they were asked for.
    """

    depth: Tensor
    std: Tensor | None = None
    entropy: Tensor | None = None


Predict = Callable[[Samples], Patches]
"""Sample numbers `(n,)` to the predictions of their views."""


def head_predictor(head: Head, table: Table, source: RowSource, grid: tuple[int, int], *, uncertainty: bool = False) -> Predict:
    """Predictions of a head in evaluation mode from the columns of `source`, with `uncertainty` if asked for and there."""

    @torch.inference_mode()
    def predict(samples: Samples) -> Patches:
        rows = table.view_rows(samples).reshape(-1)
        starts = range(0, len(rows), VIEWS_AT_ONCE)
        parts = [patch_values(head, source.read(rows[at : at + VIEWS_AT_ONCE]), uncertainty) for at in starts]
        shape = (len(samples), table.views, *grid)
        return Patches(*(torch.cat(values).reshape(shape) for values in zip(*parts, strict=True)))

    return predict


def patch_values(head: Head, columns: Mapping[str, Tensor], uncertainty: bool) -> tuple[Tensor, ...]:
    """Depth `(B, P)`, followed by its standard deviation and entropy if asked for and the head has a distribution."""
    found = head.distribution(columns) if uncertainty else None
    return (head.depth(columns),) if found is None else (found.mean, found.std, found.entropy)


def beliefs(patches: Patches, plan: ViewPlan, tta: bool) -> PatchBeliefs | None:
    """Merged, un-flipped predictions with their uncertainty; None without one.

    With `tta` the variance is that of the even mixture of both views: mean variance plus variance of the means.
    """
    if patches.std is None or patches.entropy is None:
        return None
    depth = combine_views(patches.depth, plan, tta)
    square = combine_views(patches.std**2 + patches.depth**2, plan, tta)
    std = (square - depth**2).clamp_min(0).sqrt()
    return PatchBeliefs(depth, std, combine_views(patches.entropy, plan, tta))


def constant_predictor(depth: float, table: Table, grid: tuple[int, int]) -> Predict:
    """The same depth everywhere: what any head must beat."""
    return lambda samples: Patches(torch.full((len(samples), table.views, *grid), depth))


def groups_of(samples: Samples, size: int) -> Iterator[Samples]:
    """Cut sample numbers into groups."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def canvas_truth(table: Table, samples: Samples, group: str) -> npt.NDArray[np.float32]:
    """Ground truth on the whole canvas `(n, H, W)` in metres, NaN where there is none."""
    column = table.column(f"{group}/canvas")
    assert column.spec.units_per_metre is not None
    tiles = column.read(table.view_rows(samples, flips=False).reshape(-1))
    views = depths.decode(tiles, column.spec.units_per_metre).reshape(len(samples), table.plan.tiles, *table.plan.view_size)
    return np.stack([from_views(sample, table.plan)[0] for sample in views])


def native_truth(table: Table, samples: Samples) -> list[npt.NDArray[np.float32]]:
    """Ground truth as the dataset stores it, `(h, w)` each, in metres, NaN where there is none."""
    column = table.column("depth/native")
    assert column.spec.units_per_metre is not None
    sizes = table.column("sample/size").read(samples)
    frames = depths.decode(column.read(samples), column.spec.units_per_metre)
    return [frame[:height, :width] for frame, (height, width) in zip(frames, sizes, strict=True)]


def score(
    predict: Predict,
    table: Table,
    scorer: Scorer,
    group: str,
    advance: Callable[[int], None] = lambda number: None,
    analysis: Analysis | None = None,
) -> None:
    """Give every usable sample of a table and its ground truth in column group `group` to the scorer.

    `analysis` sees the uncertainty of the predictions, if they have one.
    """
    keys = table.keys
    for samples in groups_of(table.usable(), max(1, VIEWS_AT_ONCE // table.views)):
        native = native_truth(table, samples) if scorer.needs_native else None
        truth, patches = canvas_truth(table, samples, group), predict(samples)
        scorer.add([keys[sample] for sample in samples], patches.depth, torch.from_numpy(truth), native)
        if analysis is not None and (found := beliefs(patches, table.plan, analysis.protocol.tta)) is not None:
            analysis.patches(found, truth)
        advance(len(samples))
