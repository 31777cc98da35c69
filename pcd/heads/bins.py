"""Depth bins: equal intervals of the depth range, their edges and centres."""

from __future__ import annotations

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
