"""The rectangles that depth benchmarks are scored in.

A region is `(top, bottom, left, right)`: rows `top:bottom`, columns `left:right`, as in NumPy slices. The fractions and
pixel numbers are those of the published evaluation codes (Garg et al. 2016, Eigen et al. 2014, BTS).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Region = tuple[int, int, int, int]

GARG_FRACTIONS = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
EIGEN_KITTI_FRACTIONS = (0.3324324, 0.91351351, 0.0359477, 0.96405229)
EIGEN_NYU = (45, 471, 41, 601)
NYU_SIZE = (480, 640)
KB_SIZE = (352, 1216)


def _fractional(fractions: tuple[float, float, float, float], height: int, width: int) -> Region:
    top, bottom, left, right = fractions
    return int(top * height), int(bottom * height), int(left * width), int(right * width)


def garg(height: int, width: int) -> Region:
    """Garg crop of a KITTI frame: 375x1242 gives rows 153:371, columns 44:1197."""
    return _fractional(GARG_FRACTIONS, height, width)


def eigen_kitti(height: int, width: int) -> Region:
    """Eigen crop of a KITTI frame: 375x1242 gives rows 124:342, columns 44:1197."""
    return _fractional(EIGEN_KITTI_FRACTIONS, height, width)


def kb(height: int, width: int) -> Region:
    """KITTI-benchmark crop, 352x1216, bottom aligned and centred.

    Raises `ValueError` for a frame that is smaller.
    """
    if height < KB_SIZE[0] or width < KB_SIZE[1]:
        raise ValueError(f"the kb crop is {KB_SIZE[0]}x{KB_SIZE[1]}, the frame only {height}x{width}")
    top, left = height - KB_SIZE[0], int((width - KB_SIZE[1]) / 2)
    return top, height, left, left + KB_SIZE[1]


def inside(region: Region, height: int, width: int) -> npt.NDArray[np.bool_]:
    """A mask `(height, width)`, true inside the region."""
    mask = np.zeros((height, width), dtype=np.bool_)
    top, bottom, left, right = region
    mask[top:bottom, left:right] = True
    return mask
