"""Where a model is right and wrong: errors against depth (the paper's figure 2) and against the model's own uncertainty.

Gathered while predictions are scored, without keeping a pixel map: counts and sums by depth, and three numbers per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pcd.evaluation.protocol import Protocol
from pcd.evaluation.ranks import sparsification, spearman
from pcd.evaluation.statistics import resampled

Floats = npt.NDArray[np.float64]
BINS = 15
"""Depth bins of the curves: the paper's number, halved in width until `ENOUGH` of them hold pixels."""
FINE = 8
"""Cells of the joint distribution along each of these bins, and how often they can be split."""
CELLS = BINS * FINE
ENOUGH = 8
RARE = 5e-4
"""A bin with a smaller share of the pixels does not count as holding any."""
GROUPS = 10
"""Groups of equally many patches by uncertainty."""
RESAMPLES = 2_000
BLOCK = 32_768
"""Pixels at a time, so that they stay in the processor's cache: twice as fast as whole images."""
SUMS = ("pixels", "error", "square", "relative")


@dataclass(frozen=True)
class PatchBeliefs:
    """Patches of canvases `(N, Gh, Gw)`: depth in metres, its standard deviation in metres and its entropy (0 to 1)."""

    depth: Tensor
    std: Tensor
    entropy: Tensor


class Analysis:
    """Gathers under one protocol, over its depth range; hand `pixels` to a `Scorer` as `watch`."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._edges = np.linspace(protocol.min_depth, protocol.max_depth, CELLS + 1)
        self._joint = np.zeros((CELLS, CELLS), dtype=np.int64)
        self._sums: dict[str, Floats] = {}
        self._patches: list[npt.NDArray[np.float32]] = []

    def pixels(self, key: str, pred: Floats, gt: Floats) -> None:
        """Pixels of an image `(n,)` in metres, as they are compared."""
        sums = np.zeros((CELLS, len(SUMS)))
        for start in range(0, len(gt), BLOCK):
            sums += self._block(pred[start : start + BLOCK], gt[start : start + BLOCK])
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def _block(self, pred: Floats, gt: Floats) -> Floats:
        """Count some pixels into the joint distribution; returns their sums by cell of true depth `(CELLS, len(SUMS))`."""
        truth, found = self._cell(gt), self._cell(pred)
        self._joint += np.bincount(truth * CELLS + found, minlength=CELLS * CELLS).reshape(CELLS, CELLS)
        error = pred - gt
        terms = (None, error, error * error, np.abs(error) / gt)
        return np.stack([np.bincount(truth, weights=term, minlength=CELLS) for term in terms], axis=1).astype(np.float64)

    def _cell(self, depth: Floats) -> npt.NDArray[np.int64]:
        """Cells of the joint distribution; what an unclamped protocol lets lie beyond the range goes to the outer ones."""
        low, high = self._edges[0], self._edges[-1]
        share = depth - low
        share *= CELLS / (high - low)
        np.clip(share, 0, CELLS - 1, out=share)
        cell: npt.NDArray[np.int64] = share.astype(np.int64)
        return cell

    def patches(self, beliefs: PatchBeliefs, canvas: npt.NDArray[np.float32]) -> None:
        """Predictions and ground truth `(N, H, W)` (NaN for none) on the canvas: a patch counts if it has true depth in range.

        Its truth is the mean of its pixels inside the protocol's depth range; regions and alignment do not apply here.
        """
        rows, columns = beliefs.depth.shape[1:]
        number, height, width = canvas.shape
        cut = canvas.reshape(number, rows, height // rows, columns, width // columns).astype(np.float64)
        inside = (cut >= self.protocol.min_depth) & (cut <= self.protocol.max_depth)
        count = inside.sum(axis=(2, 4))
        total = np.where(inside, cut, 0.0).sum(axis=(2, 4))
        there = count > 0
        truth = total[there] / count[there]
        depth, std, entropy = (value.double().cpu().numpy()[there] for value in (beliefs.depth, beliefs.std, beliefs.entropy))
        self._patches.append(np.stack([depth - truth, truth, std, entropy]).astype(np.float32))

    def as_json(self) -> dict[str, Any]:
        """Plain values: `protocol`, `edges` and `joint` (truth by prediction), `by_depth`, and `uncertainty` or null."""
        return {
            "protocol": self.protocol.label,
            "edges": self._edges.tolist(),
            "joint": self._joint.tolist(),
            "by_depth": self._by_depth(),
            "uncertainty": self._uncertainty(),
        }

    def _by_depth(self) -> list[dict[str, Any]]:
        """Per bin of true depth: pixels, images, bias, standard deviation of the error, RMSE and AbsRel, pooled over pixels.

        `low` and `high` of bias and spread are 95 % bootstrap limits over images; all null in a bin without pixels.
        """
        table = np.stack(list(self._sums.values())) if self._sums else np.zeros((1, CELLS, len(SUMS)))
        pixels = table[:, :, 0].sum(axis=0)
        width = next((w for w in (FINE, FINE // 2, FINE // 4) if _populated(pixels, w) >= ENOUGH), 1)
        folded = table.reshape(len(table), CELLS // width, width, len(SUMS)).sum(axis=2)
        drawn = np.concatenate([np.tensordot(d, folded, 1) for d in resampled(len(folded), RESAMPLES, seed=0)])
        edges = self._edges[::width]
        return [
            {"low": float(edges[at]), "high": float(edges[at + 1]), **_depth_bin(folded[:, at], drawn[:, at])}
            for at in range(len(edges) - 1)
        ]

    def _uncertainty(self) -> dict[str, Any] | None:
        """How well the spread of the bin distribution tells the error; None if the head has no distribution."""
        if not self._patches:
            return None
        error, truth, std, entropy = np.concatenate(self._patches, axis=1).astype(np.float64)
        relative = np.abs(error) / truth
        return {
            "patches": len(error),
            "mean_std": float(std.mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "within_1_std": float((np.abs(error) <= std).mean()),
            "within_2_std": float((np.abs(error) <= 2 * std).mean()),
            "entropy": {**_knowledge(entropy, relative), "groups": _groups(entropy, std, error, relative)},
            "std": {**_knowledge(std, np.abs(error)), "groups": _groups(std, std, error, relative)},
        }


def _populated(pixels: Floats, width: int) -> int:
    """How many bins of `width` cells hold more than a rare share of the pixels."""
    return int((pixels.reshape(-1, width).sum(axis=1) > RARE * pixels.sum()).sum())


def _knowledge(signal: Floats, error: Floats) -> dict[str, Any]:
    """Rank correlation of an uncertainty with an error, and the mean error left when the most uncertain are removed."""
    return {"spearman": spearman(signal, error), "sparsification": sparsification(signal, error)}


def _groups(signal: Floats, std: Floats, error: Floats, relative: Floats) -> list[dict[str, float]]:
    """Patches in groups of equal size by a signal: its mean, the mean predicted variance as std, RMSE and AbsRel."""
    order = np.argsort(signal, kind="stable")
    return [
        {
            "signal": float(signal[part].mean()),
            "std": float(np.sqrt((std[part] ** 2).mean())),
            "rmse": float(np.sqrt((error[part] ** 2).mean())),
            "abs_rel": float(relative[part].mean()),
        }
        for part in np.array_split(order, GROUPS)
        if len(part)
    ]


def _depth_bin(sums: Floats, drawn: Floats) -> dict[str, Any]:
    """One bin from its sums per image `(images, len(SUMS))` and those of resampled images `(resamples, len(SUMS))`."""
    total, names = sums.sum(axis=0), ("bias", "bias_low", "bias_high", "std", "std_low", "std_high", "rmse", "abs_rel")
    if not total[0]:
        return {"pixels": 0, "images": 0, **dict.fromkeys(names)}
    (bias, std), samples = _moments(total), _moments(drawn[drawn[:, 0] > 0])
    limits = [np.quantile(values, (0.025, 0.975)) for values in samples]
    values = (bias, *limits[0], std, *limits[1], np.sqrt(total[2] / total[0]), total[3] / total[0])
    images = int((sums[:, 0] > 0).sum())
    return {"pixels": int(total[0]), "images": images, **{n: float(v) for n, v in zip(names, values, strict=True)}}


def _moments(sums: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the error from sums `(..., len(SUMS))`."""
    mean = sums[..., 1] / sums[..., 0]
    return mean, np.sqrt(np.maximum(sums[..., 2] / sums[..., 0] - mean**2, 0.0))


def choose_samples(scores: dict[str, float], each: int) -> list[tuple[str, str]]:
    """The `each` best, middle and worst images by a score that is better when lower: (`best`, `median` or `worst`, key).

    Sorted by score, then key, so the choice is a rule and not a taste; images without a score (NaN) are left out, and no image
    is chosen twice.
    """
    ranked: Sequence[str] = sorted((k for k, v in scores.items() if not np.isnan(v)), key=lambda key: (scores[key], key))
    number = len(ranked)
    middle = max(0, (number - each) // 2)
    spans = {"best": range(each), "worst": range(number - each, number), "median": range(middle, middle + each)}
    chosen: dict[int, str] = {}
    for rule, span in spans.items():
        for at in span:
            if 0 <= at < number:
                chosen.setdefault(at, rule)
    return [(chosen[at], ranked[at]) for at in sorted(chosen)]
