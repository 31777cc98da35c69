"""From cached columns to scored predictions, a few samples at a time: shared by validation, evaluation and baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd import depths
from pcd.cache import Table
from pcd.evaluation.scoring import Scorer
from pcd.heads.base import Head
from pcd.training.rows import RowSource
from pcd.views import from_views

VIEWS_AT_ONCE = 16
"""Views per forward pass: 0.2 GB of activations at 576 patches and hidden width 3072."""

Samples = npt.NDArray[np.int64]
Predict = Callable[[Samples], Tensor]
"""Sample numbers `(n,)` to patch depths `(n, views, rows, columns)` in metres, mirrored views as the encoder saw them."""


def head_predictor(head: Head, table: Table, source: RowSource, grid: tuple[int, int]) -> Predict:
    """Predictions of a head in evaluation mode from the columns of `source`."""

    @torch.inference_mode()
    def predict(samples: Samples) -> Tensor:
        rows = table.view_rows(samples).reshape(-1)
        parts = [head.depth(source.read(rows[at : at + VIEWS_AT_ONCE])) for at in range(0, len(rows), VIEWS_AT_ONCE)]
        return torch.cat(parts).reshape(len(samples), table.views, *grid)

    return predict


def constant_predictor(depth: float, table: Table, grid: tuple[int, int]) -> Predict:
    """The same depth everywhere: what any head must beat."""
    return lambda samples: torch.full((len(samples), table.views, *grid), depth)


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
) -> None:
    """Give every usable sample of a table and its ground truth in column group `group` to the scorer."""
    keys = table.keys
    for samples in groups_of(table.usable(), max(1, VIEWS_AT_ONCE // table.views)):
        native = native_truth(table, samples) if scorer.needs_native else None
        truth = torch.from_numpy(canvas_truth(table, samples, group))
        scorer.add([keys[sample] for sample in samples], predict(samples), truth, native)
        advance(len(samples))
