"""Does an uncertainty know where the errors are? Rank correlation and sparsification."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STEPS = 20
"""Points of a sparsification curve: 0 %, 5 %, ... 95 % removed."""


def ranks(values: Floats) -> Floats:
    """Ranks from 0 of `(n,)`, equal values sharing the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[index]


def spearman(first: Floats, second: Floats) -> float | None:
    """Spearman's rank correlation of two `(n,)`; None if one of them is constant."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else None


def sparsification(uncertainty: Floats, error: Floats) -> dict[str, Any]:
    """Mean error `(n,)` of what is left when the most uncertain share is removed, step by step.

    `removed` shares; `error` when sorted by uncertainty, `oracle` when sorted by the error itself; `all` the mean over
    everything, which removing at random leaves; `ause` the area between the first two in units of `all`: 0 is perfect. Of
    equally uncertain patches each is removed in part, so their order does not matter.
    """
    removed = np.arange(STEPS) / STEPS
    whole = float(error.mean())
    left = _left(uncertainty, error, removed)
    oracle = _left(error, error, removed)
    ause = float((left - oracle).mean() / whole) if whole > 0 else 0.0
    return {"removed": removed.tolist(), "error": left.tolist(), "oracle": oracle.tolist(), "all": whole, "ause": ause}


def _left(signal: Floats, error: Floats, removed: Floats) -> Floats:
    """Mean error of the `1 - removed` share with the lowest signal; ties share their mean error."""
    _, index, counts = np.unique(signal, return_inverse=True, return_counts=True)
    tied = np.bincount(index, weights=error) / counts
    ordered = np.sort(index)
    total = np.concatenate([[0.0], np.cumsum(tied[ordered])])
    kept = np.maximum(1, np.round((1 - removed) * len(error))).astype(np.int64)
    mean: Floats = total[kept] / kept
    return mean
