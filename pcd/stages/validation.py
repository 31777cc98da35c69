"""Validation: what a head scores on the val table after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from pcd.cache import Table
from pcd.errors import RecipeError, suggest
from pcd.evaluation.held_scoring import HeldScorer, constant_over_patches, held_bytes, why_not_held
from pcd.evaluation.metrics import METRICS
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.protocols import get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.heads.base import Head
from pcd.recipe import Recipe
from pcd.stages.inference import VIEWS_AT_ONCE, Samples, groups_of, head_predictor, score
from pcd.stages.reading import OWN, Reading
from pcd.stages.runs import Run
from pcd.training.sources import RowSource
from pcd.views import TRUTH, ViewPlan, from_views

SHARE_OF_MEMORY = 0.25
"""Ground truth is held on the device up to this share of what is free there."""
PREPARED_AT_ONCE = 8
"""Samples prepared together: 0.2 GB of host memory at 336x336."""

Validate = Callable[[Head], Mapping[str, float]]
"""A head as it stands to the mean of every metric; leaves the head in evaluation mode."""


def validation(
    run: Run,
    table: Table,
    source: RowSource,
    device: torch.device,
    say: Callable[[str], None],
    reading: Reading = OWN,
) -> Validate:
    """Scores a head on `table` under the recipe's validation protocol, with flip TTA if there are mirrored views.

    If `why_not` has no reason against it, ground truth is prepared here, once, and an epoch runs on `device`, where the head
    is: nothing in it waits for the device but what `source` and the head themselves do, and one read of the means. Beside the
    ground truth (`held_bytes`) it takes the predictions (4 bytes a patch), the activations of `VIEWS_AT_ONCE` views and what
    `HeldScorer` states. Else every epoch goes through `Scorer`. `say` gets a line with the choice and its reason.

    Ground truth is shared by trainings with one `reading`. Skipped samples are left out; images and tiles without a valid pixel
    do not enter the means. Raises `RecipeError` for an unknown metric to monitor, `UsageError` for an unknown protocol or one
    that does not fit the views.
    """
    protocol = validation_protocol(run.recipe, table)
    samples, group = table.usable(), TRUTH[run.recipe.views.depth_resize]
    size = held_bytes(protocol, table.plan, run.grid, len(samples))
    if reason := why_not(protocol, table.plan, run.grid, size, device):
        say(f"{table.name}: scored map by map in each epoch: {reason}")
        return _by_scorer(protocol, run, table, source, group)
    say(f"{table.name}: scored on {device} under {protocol.label}; ground truth, {size / 1e6:.0f} MB, is prepared once")
    key = (protocol, run.grid, table.name, group, device)
    scorer = reading.prepared(key, lambda: _prepared(protocol, run.grid, table, samples, group, device))
    rows = table.view_rows(samples, flips=protocol.tta)

    @torch.inference_mode()
    def validate(head: Head) -> Mapping[str, float]:
        return scorer.means(_predictions(head.eval(), source, rows, run.grid, device))

    return validate


def why_not(protocol: Protocol, plan: ViewPlan, grid: tuple[int, int], size: int, device: torch.device) -> str | None:
    """Why `size` bytes of ground truth should not be held on a device for validation; None if they should."""
    if reason := why_not_held(protocol, device):
        return reason
    if device.type == "cpu" and not constant_over_patches(protocol, plan, grid):
        return f"{protocol.label} needs every pixel, and on a CPU `Scorer` passes over them faster"
    if size > SHARE_OF_MEMORY * free_memory(device):
        return f"{size / 1e9:.2f} GB of ground truth are more than {SHARE_OF_MEMORY:.0%} of the memory free on {device}"
    return None


def validation_protocol(recipe: Recipe, table: Table) -> Protocol:
    """The protocol that `[train]` names, for the data of a table. Raises as `validation` does."""
    if unknown := [name for name in recipe.train.monitor if name not in METRICS]:
        raise RecipeError(f"train.monitor: unknown metric {unknown[0]!r}.{suggest(unknown[0], METRICS)}")
    low, high = table.manifest.dataset["depth_range"]
    protocol = get_protocol(recipe.train.protocol, table.manifest.dataset["family"], (low, high))
    return replace(protocol, tta=protocol.tta and table.plan.flips)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: those of the GPU, or of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _prepared(
    protocol: Protocol, grid: tuple[int, int], table: Table, samples: Samples, group: str, device: torch.device
) -> HeldScorer:
    """A scorer that holds the ground truth of `samples`, in their order."""
    column = table.column(f"{group}/canvas")
    assert column.spec.units_per_metre is not None
    keys = [table.keys[sample] for sample in samples]
    scorer = HeldScorer(protocol, table.plan, grid, keys, column.spec.units_per_metre, device)
    for numbers in groups_of(np.arange(len(samples)), PREPARED_AT_ONCE):
        scorer.hold(int(numbers[0]), stored_canvases(table, samples[numbers], group))
    return scorer


def stored_canvases(table: Table, samples: Samples, group: str) -> npt.NDArray[np.uint16]:
    """Ground truth on the whole canvas `(n, H, W)` as it is stored, 0 where there is none."""
    views = table.column(f"{group}/canvas").read(table.view_rows(samples, flips=False).reshape(-1))
    tiles = views.reshape(len(samples), table.plan.tiles, *table.plan.view_size)
    return np.stack([from_views(sample, table.plan)[0] for sample in tiles])


def _predictions(
    head: Head, source: RowSource, rows: npt.NDArray[np.int64], grid: tuple[int, int], device: torch.device
) -> Tensor:
    """Depths `(n, views, rows, columns)` of the views in `rows` `(n, views)`."""
    parts = [head.depth(source.read(some)) for some in groups_of(rows.reshape(-1), VIEWS_AT_ONCE)]
    return torch.cat([torch.empty(0, grid[0] * grid[1], device=device), *parts]).reshape(*rows.shape, *grid)


def _by_scorer(protocol: Protocol, run: Run, table: Table, source: RowSource, group: str) -> Validate:
    """Validation that reads ground truth in every epoch and looks at every pixel, for whatever protocol."""
    Scorer([protocol], table.plan)  # refuses now what would be refused after the first epoch

    def validate(head: Head) -> Mapping[str, float]:
        scorer = Scorer([protocol], table.plan)
        score(head_predictor(head.eval(), table, source, run.grid), table, scorer, group)
        return scorer.scores[protocol.label].means()

    return validate
