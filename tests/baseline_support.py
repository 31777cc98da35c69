"""Small columns and targets for the baseline heads, their loss in plain float64, and a training step that must not wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcd.heads import head_options
from pcd.heads.base import Batch, Context, Head, PatchTargets
from pcd.heads.linear import LinearHead

Floats = npt.NDArray[np.float64]
B, D, GRID = 3, 6, (2, 3)
P = GRID[0] * GRID[1]
SHAPES: dict[str, tuple[int, ...]] = {"clip/patch": (P, D), "clip/patch@2": (P, 4), "clip/cls": (5,)}
RANGE = {"min_depth": 0.1, "max_depth": 10.0}


def make_head(
    name: str,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    grid: tuple[int, int] = GRID,
    *,
    stir: float = 0.2,
    **options: Any,
) -> Any:
    """A head on the CPU with every parameter away from where it starts, by `stir` times normal noise."""
    torch.manual_seed(0)
    cls, parsed = head_options({"name": name, **RANGE, **options})
    head = cls(parsed, shapes, grid)
    with torch.no_grad():
        for value in head.parameters() if stir else ():
            value.add_(torch.randn_like(value) * stir)
    return head


def make_targets(grid: tuple[int, int], seed: int = 2, share: float = 0.6) -> PatchTargets:
    """Some patches that count and some that do not, in the first two views; the third has none."""
    generator = np.random.default_rng(seed)
    cells = grid[0] * grid[1]
    valid = generator.random((B, cells)) < share
    valid[0, 0] = valid[1, -1] = True
    valid[2] = False
    count = (generator.integers(1, 25, (B, cells)) * valid).astype(np.float32)
    mean = generator.uniform(0.5, 9, (B, cells)).astype(np.float32)
    var = generator.uniform(0, 1, (B, cells)).astype(np.float32)
    return PatchTargets.from_host(count, mean, var, valid, device=torch.device("cpu"))


def make_batch(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, grid: tuple[int, int] = GRID, scale: int = 1, share: float = 0.6
) -> Batch:
    """Columns as they are stored: vectors in float32, everything else in float16. Targets on `scale` times the grid."""
    generator = torch.Generator().manual_seed(1)
    columns = {name: torch.randn(B, *shape, generator=generator) for name, shape in shapes.items()}
    columns = {name: value if value.dim() == 2 else value.half() for name, value in columns.items()}
    return Batch(columns, {"depth": make_targets((grid[0] * scale, grid[1] * scale), share=share)})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For the modules that import it: thousands of tiny products, for which threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Once:
    """A context that has training rows and nothing else."""

    def __init__(self, *batches: Batch) -> None:
        self._batches = batches

    def batches(self) -> Iterator[Batch]:
        return iter(self._batches)


def once(*batches: Batch) -> Context:
    return cast(Context, Once(*batches))


def counted(target: PatchTargets) -> tuple[list[float], ...]:
    """Mean, count and variance of the patches that count, as plain floats."""
    valid = target.valid.reshape(-1)
    return tuple(values.double().reshape(-1)[valid].tolist() for values in (target.mean, target.count, target.var))


def slow_silog(depth: Sequence[float], truth: Sequence[float], weight: Sequence[float], focus: float = 0.85) -> float:
    """`sqrt(mean(g^2) - focus * mean(g)^2)`, as it is printed."""
    errors = [math.log(p) - math.log(t) for p, t in zip(depth, truth, strict=True)]
    total = math.fsum(weight)
    mean = math.fsum(w * g for w, g in zip(weight, errors, strict=True)) / total
    square = math.fsum(w * g * g for w, g in zip(weight, errors, strict=True)) / total
    return math.sqrt(square - focus * mean**2)


def as_arrays(head: torch.nn.Module) -> dict[str, Floats]:
    """The state of a head in float64."""
    return {name: value.double().numpy() for name, value in head.state_dict().items()}


def slow_output(head: LinearHead, raw: Floats) -> Floats:
    """Metres `(M,)` of what the last layer gives `(M, K)`, from the definitions."""
    options = head.options
    if options.output == "log-depth":
        return cast(Floats, np.exp(raw[:, 0]))
    if options.output == "depth":
        return options.min_depth + np.log1p(np.exp(raw[:, 0]))
    ends = np.geomspace if options.spacing == "log" else np.linspace
    edges = ends(options.min_depth, options.max_depth, options.bins + 1)
    centres = np.sqrt(edges[1:] * edges[:-1]) if options.spacing == "log" else (edges[1:] + edges[:-1]) / 2
    scores = np.exp(raw) if options.normalisation == "softmax" else np.maximum(raw, 0) + options.floor
    expected: Floats = (scores * centres).sum(axis=1) / scores.sum(axis=1)
    return expected


def taught(head: Head, batch: Batch, steps: int) -> float:
    """Steps of AdamW on one batch, at the head's own rate; then the mean relative error of the patches that count."""
    head.initialise(once(batch))
    (phase,) = head.phases()
    parameters = [value for _, value in phase.parameters]
    assert {id(value) for value in parameters} == {id(value) for value in head.parameters()}
    optimiser = torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay)
    head.train()
    for _ in range(steps):
        optimiser.zero_grad()
        head.losses(batch, phase.name)["total"].backward()
        optimiser.step()
    with torch.no_grad():
        target, depth = batch.targets["depth"], head.eval().depth(batch.columns)
    valid = target.valid
    return float(((depth[valid] - target.mean[valid]).abs() / target.mean[valid]).mean())
