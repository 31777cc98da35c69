"""Depth bins: equal intervals of the depth range, their edges and centres, and distributions over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class DepthBins:
    """`count` equal bins of `min_depth` to `max_depth` metres (paper, section 3.1: 15 of them)."""

    min_depth: float
    max_depth: float
    count: int

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The `count + 1` edges, in metres."""
        return np.linspace(self.min_depth, self.max_depth, self.count + 1)

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The `count` centres `c_j` of equation 5, in metres."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2

    def index(self, depth: Tensor) -> Tensor:
        """The bin `y` of each depth, `edges[y] < depth <= edges[y + 1]`; depths outside the range go to the nearest bin."""
        edges = torch.as_tensor(self.edges, dtype=torch.float32, device=depth.device)
        return (torch.bucketize(depth, edges) - 1).clamp(0, self.count - 1)


@dataclass(frozen=True)
class Distribution:
    """What a head believes about each patch: `probabilities` `(B, P, K)` over bins with `centres` `(K,)` in metres."""

    probabilities: Tensor
    centres: Tensor

    @property
    def mean(self) -> Tensor:
        """Expected depth `(B, P)` in metres (equation 5)."""
        return (self.probabilities.flatten(0, 1) @ self.centres).reshape(self.probabilities.shape[:2])

    @property
    def std(self) -> Tensor:
        """Standard deviation of the depth `(B, P)` in metres."""
        away = self.centres - self.mean[..., None]
        return (self.probabilities * away * away).sum(dim=-1).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Entropy `(B, P)` as a share of the largest possible one: 0 for a single bin, 1 if all are equally likely."""
        nats: Tensor = torch.special.entr(self.probabilities).sum(dim=-1)
        return nats / math.log(self.probabilities.shape[-1])
