"""Depth as it is stored: unsigned 16-bit integers, 0 where there is none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pcd.errors import DatasetError, SampleError

MILLIMETRES = 1000
"""Units per metre up to 65.5 m."""
KITTI_UNITS = 256
"""Units per metre beyond: 1/256 m, up to 256 m, as KITTI's own files."""


def units_for(max_depth: float) -> int:
    """Units per metre that can hold `max_depth` metres. Raises `DatasetError` beyond 256 m."""
    for units in (MILLIMETRES, KITTI_UNITS):
        if max_depth * units <= np.iinfo(np.uint16).max:
            return units
    raise DatasetError(f"depths up to {max_depth} m do not fit 16 bits at 1/{KITTI_UNITS} m; limit the range to 255 m.")


def encode(metres: npt.NDArray[np.floating], units_per_metre: int) -> npt.NDArray[np.uint16]:
    """Metres (NaN: missing) to the nearest stored integer, 0 for missing.

    Raises `SampleError` if a depth does not fit: clipping would invent a value.
    """
    scaled = np.rint(np.nan_to_num(metres.astype(np.float64), nan=0.0) * units_per_metre)
    if scaled.size and (scaled.max() > np.iinfo(np.uint16).max or scaled.min() < 0):
        worst = scaled.max() / units_per_metre if scaled.max() > 0 else scaled.min() / units_per_metre
        raise SampleError(
            f"a depth of {worst:.3f} m cannot be stored at {units_per_metre} units per metre "
            f"(0 to {np.iinfo(np.uint16).max / units_per_metre:.3f} m); state the dataset's true depth range."
        )
    return scaled.astype(np.uint16)


def decode(stored: npt.NDArray[np.uint16], units_per_metre: int) -> npt.NDArray[np.float32]:
    """Stored integers to metres, NaN for 0."""
    metres = stored.astype(np.float32) / np.float32(units_per_metre)
    metres[stored == 0] = np.nan
    return metres
