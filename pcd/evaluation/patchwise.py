"""Sums over the pixels of patches that are predicted as one number each, without visiting the pixels.

Under nearest upsampling a prediction p is constant over its patch. Once the pixels g of every patch are sorted, all of
`metrics.SUMS` follow from what is known of the patch beforehand and a few binary searches:

    squares     sum (p - g)^2 = n (p - m)^2 + sum (g - m)^2, m = mean g; the same for logarithms and with weights 1 / g
    magnitudes  sum |p - g| = (k p - sum of the k nearer ones) + (sum of the n - k farther ones - (n - k) p); the same for
                logarithms and with weights 1 / g
    thresholds  the number of pixels between p / t and t p

Counts are those of `metrics` to the pixel; the other sums agree to rounding, some 1e-15 of what the depths themselves sum to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd import depths
from pcd.evaluation.metrics import THRESHOLDS, Floats

BLOCK = 16
"""Pixels of a patch between two of the running sums that are held."""
OFFSET = 1 << 15
"""What is subtracted from stored depths to hold them as int16, the only 16-bit integers that devices compute with."""
LAST = (1 << 16) - 1
"""The largest stored depth."""

Stored = npt.NDArray[np.uint16]
_FEATURES = 3
"""Depth g, 1 / g and ln g: what is summed over the nearer pixels of a patch."""
_MOMENTS = 8
"""Of each patch: n, mean g, sum (g - mean)^2, W = sum 1/g, m = n / W, sum (g - m)^2 / g, mean l = ln g, sum (l - mean)^2."""


def shifted(stored: Stored) -> npt.NDArray[np.int16]:
    """Stored depths less `OFFSET`, in the same order."""
    return (stored ^ np.uint16(OFFSET)).view(np.int16)


def metres_of_stored(units_per_metre: int) -> Floats:
    """Metres `(65536,)` of every stored depth as `depths.decode` rounds them; 0 for 0."""
    metres = depths.decode(np.arange(LAST + 1, dtype=np.uint16), units_per_metre).astype(np.float64)
    metres[0] = 0.0
    return metres


class SortedPatches:
    """The pixels of N canvases of P patches, sorted within each patch; about 4 bytes a pixel on the device.

    `pixels` per patch. Canvases are put in by `hold`, in any order, before anything is summed.
    """

    def __init__(self, canvases: int, patches: int, pixels: int, units_per_metre: int, device: torch.device) -> None:
        self._units = units_per_metre
        self._blocks = -(-pixels // BLOCK)
        metres = metres_of_stored(units_per_metre)
        positive = np.where(metres > 0, metres, 1.0)
        self._features = np.stack([metres, 1 / positive, np.log(positive)], axis=-1)
        self._device_features = torch.from_numpy(self._features).to(device)
        self._metres = self._device_features[:, 0].contiguous()
        self._thresholds = torch.tensor(list(THRESHOLDS.values()), dtype=torch.float64, device=device)
        self._lanes = torch.arange(BLOCK, device=device)
        shape = (canvases, patches)
        self._values = torch.zeros((*shape, self._blocks * BLOCK), dtype=torch.int16, device=device)
        self._before = torch.zeros((*shape, self._blocks, _FEATURES), dtype=torch.float64, device=device)
        self._moments = torch.zeros((*shape, _MOMENTS), dtype=torch.float64, device=device)

    @staticmethod
    def bytes_per_patch(pixels: int) -> int:
        """What is held of a patch."""
        blocks = -(-pixels // BLOCK)
        return 2 * blocks * BLOCK + 8 * (_FEATURES * blocks + _MOMENTS)

    def hold(self, first: int, stored: Stored) -> None:
        """Put in canvases from number `first` on: stored depths `(n, P, pixels)`, 0 for pixels that do not count.

        Takes some 100 bytes of host memory a pixel in passing.
        """
        counts = stored != 0
        padding = self._blocks * BLOCK - stored.shape[-1]
        values = np.sort(np.where(counts, stored, np.uint16(LAST)), axis=-1)  # what does not count comes last
        values = np.pad(values, ((0, 0), (0, 0), (0, padding)), constant_values=LAST)
        valid = np.arange(values.shape[-1]) < counts.sum(axis=-1)[..., None]
        features = np.where(valid[..., None], self._features[values], 0.0)
        in_block = features.reshape(*stored.shape[:2], self._blocks, BLOCK, _FEATURES).sum(axis=3)
        part = slice(first, first + len(stored))
        self._values[part] = torch.from_numpy(shifted(values)).to(self._values.device)
        self._before[part] = torch.from_numpy(in_block.cumsum(axis=2) - in_block).to(self._before.device)
        self._moments[part] = torch.from_numpy(_moments(features, valid)).to(self._moments.device)

    def sums(self, part: slice, pred: Tensor) -> Tensor:
        """Sums of the canvases `part` predicted as `pred` `(n, P)` positive float64 metres: `(n, P, len(SUMS))`."""
        low, high, nearer = self._search(self._values[part], pred, self._moments[part, :, :1])
        log = pred.log()
        number, mean, square, weight, middle, weighted_square, log_mean, log_square = self._moments[part].unbind(-1)
        near, far = nearer.double(), number - nearer
        near_sum, near_weight, near_log = self._nearer(part, nearer).unbind(-1)
        abs_rel = (pred * near_weight - near) + (far - pred * (weight - near_weight))
        abs_diff = (near * pred - near_sum) + (number * mean - near_sum - far * pred)
        log_abs = (near * log - near_log) + (number * log_mean - near_log - far * log)
        terms = [
            number,
            abs_rel.clamp_min(0.0),  # rounding may leave -1e-16
            weight * (pred - middle).square() + weighted_square,
            number * (pred - mean).square() + square,
            number * (log - log_mean).square() + log_square,
            log_abs.clamp_min(0.0),
            number * (log - log_mean),
            abs_diff.clamp_min(0.0),
            number * (pred - mean),
        ]
        return torch.cat([torch.stack(terms, dim=-1), (high - low).double()], dim=-1)

    def _search(self, values: Tensor, pred: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many pixels are too near and how many are not too far `(n, P, thresholds)`, how many nearer than `pred` `(n, P)`.

        Next to a limit only the stored depth nearest to it is in doubt; its own metres decide, as they would pixel by pixel.
        """
        p, t, units = pred.unsqueeze(-1), self._thresholds, self._units
        low, high, here = ((depth * units).round().clamp(0, LAST).int() for depth in (p / t, p * t, p))
        low = low - (p / self._metres[low] < t).int()
        high = high - (self._metres[high] / p >= t).int()
        here = here - (self._metres[here] > p).int()
        wanted = (torch.cat([low, high, here], dim=-1) - OFFSET).to(torch.int16)
        found = torch.minimum(torch.searchsorted(values, wanted, right=True), number.long())
        return found[..., : len(t)], found[..., len(t) : -1], found[..., -1]

    def _nearer(self, part: slice, nearer: Tensor) -> Tensor:
        """Sums of g, 1 / g and ln g over the `nearer` `(n, P)` first pixels: `(n, P, 3)`."""
        block = (nearer // BLOCK).clamp_max(self._blocks - 1)
        shape = (*block.shape, self._blocks, BLOCK)
        lanes = torch.gather(self._values[part].reshape(shape), 2, block[..., None, None].expand(*block.shape, 1, BLOCK))
        features = self._device_features[lanes.squeeze(2).int() + OFFSET]
        inside = self._lanes < (nearer - block * BLOCK).unsqueeze(-1)
        before = torch.gather(self._before[part], 2, block[..., None, None].expand(*block.shape, 1, _FEATURES))
        return before.squeeze(2) + (features * inside.unsqueeze(-1)).sum(dim=-2)


def _moments(features: Floats, valid: npt.NDArray[np.bool_]) -> Floats:
    """`_MOMENTS` of the pixels `(n, P, L, 3)` that are `valid`, features of the others 0: `(n, P, 8)`."""
    number = valid.sum(axis=-1).astype(np.float64)
    total, safe = features.sum(axis=2), np.maximum(number, 1)
    mean, weight, log_mean = total[..., 0] / safe, total[..., 1], total[..., 2] / safe
    middle = number / np.where(weight > 0, weight, 1.0)
    from_mean, from_middle, log_from_mean = (
        np.where(valid, features[..., at] - centre[..., None], 0.0) for at, centre in ((0, mean), (0, middle), (2, log_mean))
    )
    squares = [np.square(from_mean), np.square(from_middle) * features[..., 1], np.square(log_from_mean)]
    square, weighted_square, log_square = (values.sum(axis=-1) for values in squares)
    return np.stack([number, mean, square, weight, middle, weighted_square, log_mean, log_square], axis=-1)
