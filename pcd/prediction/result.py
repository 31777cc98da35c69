"""The prediction for one image: patch maps, and the depth of any of its rows at the image's own size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pcd.errors import UsageError
from pcd.evaluation.pixels import native_prediction
from pcd.evaluation.protocol import Upsample
from pcd.views import ViewPlan

FloatArray = npt.NDArray[np.float32]
STRIP_PIXELS = 2**20
"""Pixels per strip of rows: 4 MB of float32."""


def strips(height: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Rows `top:bottom` of an image, strip by strip; `top` is always a multiple of `multiple`."""
    rows = max(1, STRIP_PIXELS // (width * multiple)) * multiple
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


@dataclass(frozen=True)
class Prediction:
    """What a run says about one image of `size` (height, width).

    `patches` are maps of patch depths `(1, Gh, Gw)` in metres, one per scale, and `variances` those of the depth distribution
    in square metres, or None. Each map is upsampled to the image and the maps are averaged. Pixels are made when they are
    asked for: a strip of rows at a time by `depth_rows` and `std_rows`, or all at once by `depth` and `std`.
    """

    patches: Sequence[Tensor]
    plan: ViewPlan
    size: tuple[int, int]
    upsample: Upsample
    variances: Sequence[Tensor] | None = None

    def _rows(self, patches: Tensor, top: int, bottom: int) -> FloatArray:
        window = (top, bottom, 0, self.size[1])
        pixels = native_prediction(patches, self.plan, self.size, self.upsample, "edge", window)[0]
        return np.asarray(pixels.numpy(), dtype=np.float32)

    def depth_rows(self, top: int, bottom: int) -> FloatArray:
        """Depth of rows `top:bottom`: float32 `(bottom - top, W)` in metres."""
        total = self._rows(self.patches[0], top, bottom)
        for patches in self.patches[1:]:
            total += self._rows(patches, top, bottom)
        return total if len(self.patches) == 1 else total / np.float32(len(self.patches))

    def std_rows(self, top: int, bottom: int) -> FloatArray:
        """Standard deviation of the depth of rows `top:bottom`: float32 `(bottom - top, W)` in metres.

        Law of total variance over the scales: the mean of their variances plus the variance of their depths.
        Raises `UsageError` if the prediction was made without uncertainty.
        """
        if self.variances is None:
            raise UsageError("this prediction holds no uncertainty: make it with Predictor(..., uncertainty=True).")
        means = np.stack([self._rows(patches, top, bottom) for patches in self.patches])
        within = np.stack([self._rows(variances, top, bottom) for variances in self.variances])
        return np.asarray(np.sqrt(within.mean(axis=0) + means.var(axis=0)), dtype=np.float32)

    def _whole(self, deviation: bool) -> FloatArray:
        pixels = np.empty(self.size, dtype=np.float32)
        for top, bottom in strips(*self.size):
            pixels[top:bottom] = self.std_rows(top, bottom) if deviation else self.depth_rows(top, bottom)
        return pixels

    @cached_property
    def depth(self) -> FloatArray:
        """Depth at the image's own size: float32 `(H, W)` in metres."""
        return self._whole(deviation=False)

    @cached_property
    def std(self) -> FloatArray:
        """Standard deviation of the depth: float32 `(H, W)` in metres. Raises `UsageError` if there is none."""
        return self._whole(deviation=True)
