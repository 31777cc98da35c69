"""How sure a mean over images is: bootstrap intervals, and the paired comparison of two runs.

What is resampled are whole groups of scores: an image with all its tiles, or, if the caller says so, a scene with all its
frames, since scores of neighbouring frames are not independent. All randomness comes from a seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from pcd.errors import UsageError
from pcd.evaluation.metrics import metrics_from_sums

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 4_000_000
"""Random numbers in memory at once: 32 MB."""
_KEPT_CELLS = 10_000_000
"""And at most so many are kept for the next question."""


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval; `groups` is how many independent groups it rests on."""

    mean: float
    low: float
    high: float
    groups: int


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same images: means, mean difference (first minus second) with its bootstrap interval, and a p value.

    `p_value` is two-sided, from a randomisation test that flips the signs of the differences: the chance of a mean difference
    at least this large if it did not matter which run a score came from. `lower`, `higher` and `equal` count the images on
    which the first run's value is so; `excluded` those that have no score in one of the runs.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    images: int
    lower: int
    higher: int
    equal: int
    excluded: int


def _chunks(resamples: int, width: int) -> Iterator[int]:
    step = max(1, _CELLS // max(width, 1))
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def resampled(groups: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each group is drawn, `(chunk, groups)` at a time: each row is one bootstrap sample with replacement."""
    draws = _kept(groups, resamples, seed) if groups * resamples <= _KEPT_CELLS else _draws(groups, resamples, seed)
    for draw in draws:
        yield draw.astype(np.float64)


def _draws(groups: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.uint32]]:
    generator = np.random.default_rng(seed)
    for rows in _chunks(resamples, groups):
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=rows).astype(np.uint32)


@lru_cache(maxsize=1)
def _kept(groups: int, resamples: int, seed: int) -> tuple[npt.NDArray[np.uint32], ...]:
    """All of them: drawing takes longer than using them, and all protocols use the same. 26 MB for NYU's 654 images."""
    return tuple(_draws(groups, resamples, seed))


def _group_totals(table: Floats, groups: Sequence[Hashable] | None) -> Floats:
    """Rows `(n, M)` summed by group: `(G, M)`, groups in order of appearance."""
    if groups is None:
        return table
    if len(groups) != len(table):
        raise UsageError(f"{len(table)} scores but {len(groups)} group names; give one for each score.")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    totals = np.zeros((len(numbers), table.shape[1]))
    np.add.at(totals, index, table)
    return totals


def _limits(samples: Floats, level: float) -> tuple[Floats, Floats]:
    """The two percentiles of each column; a resample that happens to hold no score of a column is left out."""
    tail = (1 - level) / 2
    empty = np.isnan(samples).all(axis=0)
    low, high = np.nanquantile(np.where(empty, 0.0, samples), (tail, 1 - tail), axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    ratio = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio


def intervals(
    values: Mapping[str, npt.ArrayLike],
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Mean and bootstrap interval of each metric over its scores `(n,)`; NaN scores (no valid pixels) do not count.

    `groups` names the group of each score, and groups are drawn whole; without it every score stands alone. All metrics share
    their resamples. NaN throughout for a metric without any score. Raises `UsageError` for lists of different lengths.
    """
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
    if len({column.shape for column in columns.values()}) > 1:
        raise UsageError(f"metrics have different numbers of scores: { {n: len(c) for n, c in columns.items()} }.")
    table = np.stack(list(columns.values()), axis=1)
    present = ~np.isnan(table)
    sums = _group_totals(np.where(present, table, 0.0), groups)
    counts = _group_totals(present.astype(np.float64), groups)
    used = counts.any(axis=1)
    sums, counts = sums[used], counts[used]
    if not len(sums):
        return {name: Interval(np.nan, np.nan, np.nan, 0) for name in columns}
    means = np.concatenate([_ratio(draw @ sums, draw @ counts) for draw in resampled(len(sums), resamples, seed)])
    low, high = _limits(means, level)
    centre = _ratio(sums.sum(axis=0), counts.sum(axis=0))
    number = (counts > 0).sum(axis=0)
    return {
        name: Interval(float(centre[at]), float(low[at]), float(high[at]), int(number[at])) for at, name in enumerate(columns)
    }


def pooled_intervals(
    sums: npt.ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Metrics of pooled pixels from per-image sums `(n, len(SUMS))`, with bootstrap intervals over groups of images."""
    table = _group_totals(np.asarray(sums, dtype=np.float64), groups)
    table = table[table[:, 0] > 0]
    centre = {name: float(value) for name, value in metrics_from_sums(torch.from_numpy(table.sum(axis=0))).items()}
    if not len(table):
        return {name: Interval(np.nan, np.nan, np.nan, 0) for name in centre}
    drawn = np.concatenate([draw @ table for draw in resampled(len(table), resamples, seed)])
    samples = {name: value.numpy() for name, value in metrics_from_sums(torch.from_numpy(drawn)).items()}
    low, high = _limits(np.stack(list(samples.values()), axis=1), level)
    return {name: Interval(centre[name], float(low[at]), float(high[at]), len(table)) for at, name in enumerate(samples)}


def _sign_flip(differences: Floats, resamples: int, seed: int) -> float:
    """Two-sided p value; every sign pattern if there are no more of them than `resamples`, else random ones."""
    number = len(differences)
    limit = abs(differences.sum()) * (1 - 1e-12)
    if 2**number <= resamples:
        patterns = (np.arange(2**number)[:, None] >> np.arange(number)) & 1
        return float((np.abs((1 - 2 * patterns) @ differences) >= limit).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    for rows in _chunks(resamples, number):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(rows, number))
        reached += int((np.abs(signs @ differences) >= limit).sum())
    return (reached + 1) / (resamples + 1)


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Comparison:
    """Paired comparison of one metric of two runs, given by image key; images without a score (NaN) in either are excluded.

    Raises `UsageError` if the runs were not scored on the same images, or share no image with a score.
    """
    if first.keys() != second.keys():
        only = sorted(first.keys() ^ second.keys())
        raise UsageError(
            f"the two runs were not scored on the same images: {len(only)} of {len(first.keys() | second.keys())} are in one "
            f"only, for example {only[0]!r}. Score both on the same table."
        )
    pairs = np.array([(first[key], second[key]) for key in first], dtype=np.float64).reshape(-1, 2)
    kept = pairs[~np.isnan(pairs).any(axis=1)]
    if not len(kept):
        raise UsageError(f"none of the {len(pairs)} images has a score in both runs; there is nothing to compare.")
    differences = kept[:, 0] - kept[:, 1]
    interval = intervals({"difference": differences}, resamples=resamples, seed=seed, level=level)["difference"]
    return Comparison(
        first=float(kept[:, 0].mean()),
        second=float(kept[:, 1].mean()),
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        p_value=_sign_flip(differences, resamples, seed),
        images=len(kept),
        lower=int((differences < 0).sum()),
        higher=int((differences > 0).sum()),
        equal=int((differences == 0).sum()),
        excluded=len(pairs) - len(kept),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = reached
    return adjusted
