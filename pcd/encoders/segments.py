"""From many overlapping masks of a view, as Segment Anything proposes them, to one segment number per pixel.

The steps are those of Segment Anything's automatic masks (Kirillov et al. 2023, appendix B): a grid of points asks for masks,
those the network is not sure of or that hang on the threshold go, and of several with almost one bounding box the surest
stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """Which masks stay."""

    min_score: float
    """Overlap with the true segment that the network expects of its mask."""
    min_stability: float
    """Share of the pixels above a threshold of -1 that are also above 1."""
    max_overlap: float
    """Intersection over union of bounding boxes from which on the less sure mask goes."""


@dataclass(frozen=True)
class Masks:
    """M masks of one view: `pixels` `(M, h, w)` bool and the network's `scores` `(M,)`."""

    pixels: Tensor
    scores: Tensor


def point_grid(points: int, size: tuple[int, int]) -> Tensor:
    """Centres `(points^2, 2)` of a grid of equal cells on `size` (height, width), as x and y in pixels, row by row."""
    height, width = size
    places = (torch.arange(points, dtype=torch.float32) + 0.5) / points
    y, x = torch.meshgrid(places * height, places * width, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def stable(logits: Tensor, scores: Tensor, rules: Rules) -> Masks:
    """The masks of logits `(M, h, w)` that are not empty and hang on no threshold."""
    inner, outer = ((logits > limit).flatten(1).sum(dim=1).double() for limit in (1.0, -1.0))
    pixels = logits > 0
    kept = (inner >= rules.min_stability * outer) & pixels.flatten(1).any(dim=1)
    return Masks(pixels[kept], scores[kept])


def boxes(pixels: Tensor) -> Tensor:
    """Bounding boxes `(M, 4)` of masks that are not empty: first and last column, first and last row, both within."""
    found = []
    for axis in (1, 2):  # over rows, which leaves columns; then the other way round
        there = pixels.any(dim=axis)
        last = there.shape[1] - 1
        found += [there.int().argmax(dim=1), last - there.flip(1).int().argmax(dim=1)]
    return torch.stack(found, dim=1)


def distinct(masks: Masks, max_overlap: float) -> Masks:
    """The surest of masks with almost one box: from the surest on, each goes whose box overlaps that of one which stays."""
    order = torch.argsort(masks.scores, descending=True, stable=True)
    x0, x1, y0, y1 = boxes(masks.pixels)[order].cpu().double().T
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    stays: list[int] = []
    for number in range(len(order)):
        wide = torch.minimum(x1[number], x1[stays]) - torch.maximum(x0[number], x0[stays]) + 1
        high = torch.minimum(y1[number], y1[stays]) - torch.maximum(y0[number], y0[stays]) + 1
        shared = wide.clamp(min=0) * high.clamp(min=0)
        if not bool((shared > max_overlap * (area[number] + area[stays] - shared)).any()):
            stays.append(number)
    kept = order[torch.tensor(stays, dtype=torch.int64, device=order.device)]
    return Masks(masks.pixels[kept], masks.scores[kept])


def numbered(pixels: Tensor) -> Tensor:
    """Segment numbers `(h, w)` uint16 of masks `(M, h, w)`: 1 is the largest, and smaller ones lie on top; 0 where none is.

    Of masks of one size the first comes first.
    """
    order = torch.argsort(pixels.flatten(1).sum(dim=1), descending=True, stable=True)
    found = torch.zeros(pixels.shape[1:], dtype=torch.int32, device=pixels.device)
    for number, place in enumerate(order.tolist(), start=1):
        found.masked_fill_(pixels[place], number)
    return found.to(torch.uint16)
