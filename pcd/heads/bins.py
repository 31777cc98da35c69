"""Depth bins: intervals of the depth range, their edges and centres, and distributions over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.device import without_autocast

Spacing = Literal["even", "log"]


@dataclass(frozen=True)
class DepthBins:
    """`count` bins of `min_depth` to `max_depth` metres (paper, section 3.1: 15 of them).

    With `spacing` "even" all are equally wide; with "log" each is the same factor wider than the one before it, which needs a
    `min_depth` above 0.
    """

    min_depth: float
    max_depth: float
    count: int
    spacing: Spacing = "even"

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The `count + 1` edges, in metres."""
        spread = np.geomspace if self.spacing == "log" else np.linspace
        return spread(self.min_depth, self.max_depth, self.count + 1)

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The `count` centres `c_j` of equation 5, in metres: arithmetic means of the edges, geometric ones with "log".

        Either is the middle of the axis on which the bins are equally wide. The geometric mean has both edges the same factor
        away, so that no depth of the bin is further from it, as a share of its depth, than it must be.
        """
        edges = self.edges
        return np.sqrt(edges[:-1] * edges[1:]) if self.spacing == "log" else (edges[:-1] + edges[1:]) / 2

    def edge_tensor(self, device: torch.device | None = None) -> Tensor:
        """The edges as `index` compares them: float32 `(count + 1,)`."""
        return torch.as_tensor(self.edges, dtype=torch.float32, device=device)

    def index(self, depth: Tensor, edges: Tensor | None = None) -> Tensor:
        """The bin `y` of each depth, `edges[y] < depth <= edges[y + 1]`; depths outside the range go to the nearest bin.

        `edges` is what `edge_tensor` gives. Whoever asks at every step keeps it: to make it anew on a GPU, the host waits.
        """
        edges = self.edge_tensor(depth.device) if edges is None else edges
        return (torch.bucketize(depth, edges) - 1).clamp(0, self.count - 1)

    def describe(self) -> str:
        """For example `15 bins of 0.67 m`, or `15 bins, each 1.85 times as wide as the one before`."""
        edges = self.edges
        if self.spacing == "log":
            return f"{self.count} bins, each {edges[1] / edges[0]:.2f} times as wide as the one before"
        return f"{self.count} bins of {edges[1] - edges[0]:.2f} m"


@dataclass(frozen=True)
class Distribution:
    """What a head believes about each patch: `probabilities` `(B, P, K)` over bins with `centres` `(K,)` in metres."""

    probabilities: Tensor
    centres: Tensor

    @property
    def mean(self) -> Tensor:
        """Expected depth `(B, P)` in metres (equation 5)."""
        with without_autocast(self.probabilities):
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
