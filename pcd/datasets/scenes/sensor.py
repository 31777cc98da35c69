"""What a camera and a depth sensor make of a rendered frame: noise, missing depth, scan lines."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pcd.datasets.scenes.materials import Floats, noise
from pcd.datasets.scenes.raycast import Camera

SCAN_TOP, SCAN_BOTTOM = 2.0, -24.8
"""Degrees above and below the optical axis between which the laser scans."""
SCAN_RINGS = 64
SCAN_STEP = 0.2
"""Degrees between two shots of one ring."""
SCAN_LOSS = 0.05
"""Share of shots that do not come back."""
JUMP = 0.05
"""Relative change of depth from pixel to pixel that counts as an edge."""


def photograph(image: Floats, sigma: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Display values `(H, W, 3)` in [0, 1] to uint8, with normal noise of standard deviation `sigma` (of full scale)."""
    grainy = image * np.float32(255)
    if sigma > 0:
        grainy += np.float32(255 * sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    shown: npt.NDArray[np.uint8] = np.rint(np.clip(grainy, 0, 255)).astype(np.uint8)
    return shown


def punch_holes(depth: Floats, share: float, rng: np.random.Generator) -> Floats:
    """Depth `(H, W)` in which the given share of the measured pixels is NaN: along edges first, and in a few blobs."""
    measured = np.flatnonzero(np.isfinite(depth))
    count = round(share * measured.size)
    if count == 0:
        return depth
    height, width = depth.shape
    scale = np.float32(1.3 / max(height, width))
    rows, columns = np.divmod(measured, width)
    at = rng.random(2, dtype=np.float32)
    u, v = columns.astype(np.float32) * scale + at[0], rows.astype(np.float32) * scale + at[1]
    cloud = noise(u, v, np.full_like(u, scale))
    score = cloud + np.float32(0.15) * rng.standard_normal(measured.size, dtype=np.float32)
    score += np.float32(2.5) * _edges(depth).ravel()[measured]
    holed = depth.copy()
    holed.ravel()[measured[np.argpartition(score, -count)[-count:]]] = np.nan
    return holed


def _edges(depth: Floats) -> npt.NDArray[np.bool_]:
    """Pixels `(H, W)` whose right or lower neighbour is much nearer or farther."""
    edge = np.zeros(depth.shape, dtype=np.bool_)
    across, down = np.abs(np.diff(depth, axis=1)), np.abs(np.diff(depth, axis=0))
    edge[:, :-1] |= across > np.float32(JUMP) * depth[:, :-1]
    edge[:-1] |= down > np.float32(JUMP) * depth[:-1]
    return edge


def scan(depth: Floats, camera: Camera, rng: np.random.Generator) -> Floats:
    """Depth `(H, W)` where a level laser scanner at the camera would have measured it, NaN elsewhere.

    A pixel is kept if the beam of a ring crosses it on its way down and a shot of that ring falls into its column.
    """
    x, y = camera.axes()
    half_x, half_y = 0.5 / camera.intrinsics.fx, 0.5 / camera.intrinsics.fy
    flat = np.sqrt(1 + x * x)[None, :]
    rings = [
        np.floor((SCAN_TOP - np.degrees(np.arctan2(-(y + side * half_y)[:, None], flat))) * _per_degree()) for side in (-1, 1)
    ]
    shots = [np.floor(np.degrees(np.arctan(x + side * half_x)) / SCAN_STEP) for side in (-1, 1)]
    hit = (rings[0] != rings[1]) & (rings[1] >= 0) & (rings[1] < SCAN_RINGS) & (shots[0] != shots[1])[None, :]
    hit &= rng.random(depth.shape, dtype=np.float32) >= SCAN_LOSS
    return np.where(hit, depth, np.float32(np.nan))


def _per_degree() -> float:
    return (SCAN_RINGS - 1) / (SCAN_TOP - SCAN_BOTTOM)
