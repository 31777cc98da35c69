"""From a sample to the views an encoder sees, and back.

A view plan is crop -> bilinear resize to the canvas -> optional horizontal flip -> tiles. Everything here is a pure function
on NumPy arrays. Axes: images are `(H, W, 3)`, depth maps `(H, W)`, tiles `(T, h, w, ...)` in reading order.

The views of a sample are numbered flip-major: view `flip * tiles + tile`; the flipped views are the tiles of the flipped
canvas, so merging comes first and un-flipping second on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from pcd.errors import SampleError, UsageError
from pcd.regions import Region

DepthResize = Literal["masked-bilinear", "nearest"]
FloatArray = npt.NDArray[np.float32]

TRUTH: dict[DepthResize, str] = {"masked-bilinear": "depth", "nearest": "depth-nearest"}
"""The group of columns that holds the ground truth brought to the canvas by each method: both fit beside the same tokens."""

HALF = 0.5
"""Half-valid rule: a resized depth counts if at least this share of its bilinear weight was valid."""


@dataclass(frozen=True)
class ViewPlan:
    """How samples become views.

    `canvas` is (height, width) after the resize; `grid` (rows, columns) of tiles; `crop` the region of the stored frame that
    is used, or None for all of it; `flips` whether every view also exists mirrored.
    Raises `UsageError` if the tiles do not divide the canvas.
    """

    canvas: tuple[int, int]
    grid: tuple[int, int] = (1, 1)
    crop: Region | None = None
    flips: bool = True

    def __post_init__(self) -> None:
        (height, width), (rows, columns) = self.canvas, self.grid
        if min(height, width, rows, columns) < 1 or height % rows or width % columns:
            raise UsageError(f"views: a {height}x{width} canvas does not divide into {rows}x{columns} tiles.")
        if self.crop is not None:
            top, bottom, left, right = self.crop
            if not (0 <= top < bottom and 0 <= left < right):
                raise UsageError(f"views: crop {self.crop} is empty; give (top, bottom, left, right).")

    @property
    def tiles(self) -> int:
        """Tiles per canvas."""
        return self.grid[0] * self.grid[1]

    @property
    def views(self) -> int:
        """Views (rows of the table) per sample."""
        return self.tiles * (2 if self.flips else 1)

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) of one view."""
        return self.canvas[0] // self.grid[0], self.canvas[1] // self.grid[1]

    def as_json(self) -> dict[str, Any]:
        """Plain values for manifests and fingerprints."""
        return {
            "canvas": list(self.canvas),
            "grid": list(self.grid),
            "crop": None if self.crop is None else list(self.crop),
            "flips": self.flips,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> ViewPlan:
        """The inverse of `as_json`."""
        crop = value["crop"]
        return ViewPlan(
            canvas=(value["canvas"][0], value["canvas"][1]),
            grid=(value["grid"][0], value["grid"][1]),
            crop=None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
            flips=value["flips"],
        )


def crop_region(plan: ViewPlan, height: int, width: int) -> Region:
    """The region of an `height x width` frame that the plan uses.

    Raises `SampleError` if the frame is smaller than the crop.
    """
    if plan.crop is None:
        return 0, height, 0, width
    if plan.crop[1] > height or plan.crop[3] > width:
        raise SampleError(
            f"a frame of {height}x{width} is smaller than the crop rows {plan.crop[0]}:{plan.crop[1]}, "
            f"columns {plan.crop[2]}:{plan.crop[3]}; the crop is meant for 480x640 NYU frames: set views.crop."
        )
    return plan.crop


def _cropped(array: npt.NDArray[Any], plan: ViewPlan) -> npt.NDArray[Any]:
    top, bottom, left, right = crop_region(plan, array.shape[0], array.shape[1])
    return array[top:bottom, left:right]


def resize_image(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Bilinear resize of `(H, W)` or `(H, W, C)` to `size` (height, width): half-pixel centres, no antialiasing."""
    resized = cv2.resize(np.ascontiguousarray(image), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.float32)


def resize_nearest(array: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Nearest resize of `(H, W, ...)` to `size` (height, width): source index `floor(i * source / target)`."""
    rows = np.arange(size[0]) * array.shape[0] // size[0]
    columns = np.arange(size[1]) * array.shape[1] // size[1]
    return np.ascontiguousarray(array[rows[:, None], columns[None, :]])


def resize_depth(depth: FloatArray, size: tuple[int, int], method: DepthResize) -> FloatArray:
    """Resize a depth map in metres with NaN holes to `size` (height, width).

    `masked-bilinear`: bilinear over valid pixels only, `resize(depth * valid) / resize(valid)`, and NaN where less than half
    of the weight was valid. `nearest`: the nearest stored pixel.
    """
    if method == "nearest":
        return np.asarray(resize_nearest(depth, size), dtype=np.float32)
    valid = np.isfinite(depth)
    weight = resize_image(valid.astype(np.float32), size)
    total = resize_image(np.where(valid, depth, np.float32(0)).astype(np.float32), size)
    resized = np.full(size, np.nan, dtype=np.float32)
    np.divide(total, weight, out=resized, where=weight >= HALF)
    return resized


def flip(array: npt.NDArray[Any], axis: int = 1) -> npt.NDArray[Any]:
    """Mirror left and right; `axis` is the column axis."""
    return np.flip(array, axis=axis)


def split_tiles(canvas: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
    """Cut `(H, W, ...)` into `(T, h, w, ...)` tiles in reading order."""
    rows, columns = grid
    height, width = canvas.shape[0] // rows, canvas.shape[1] // columns
    cut = canvas.reshape(rows, height, columns, width, *canvas.shape[2:])
    return np.ascontiguousarray(np.moveaxis(cut, 2, 1).reshape(rows * columns, height, width, *canvas.shape[2:]))


def merge_tiles(tiles: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
    """Put `(T, h, w, ...)` tiles back together: the inverse of `split_tiles`."""
    rows, columns = grid
    _, height, width, *rest = tiles.shape
    placed = np.moveaxis(tiles.reshape(rows, columns, height, width, *rest), 1, 2)
    return np.ascontiguousarray(placed.reshape(rows * height, columns * width, *rest))


def image_canvas(rgb: npt.NDArray[np.uint8], plan: ViewPlan) -> FloatArray:
    """RGB uint8 `(H, W, 3)` to the canvas: cropped, scaled to [0, 1], resized. Float32 `(canvas H, canvas W, 3)`."""
    return resize_image(_cropped(rgb, plan).astype(np.float32) / np.float32(255), plan.canvas)


def depth_canvas(depth: FloatArray, plan: ViewPlan, method: DepthResize) -> FloatArray:
    """Depth in metres `(H, W)` to the canvas by `resize_depth`, NaN where there is none."""
    return resize_depth(_cropped(depth, plan), plan.canvas, method)


def to_views(canvas: npt.NDArray[Any], plan: ViewPlan) -> npt.NDArray[Any]:
    """All views of a canvas `(H, W, ...)`: `(views, h, w, ...)`, flip-major."""
    tiles = split_tiles(canvas, plan.grid)
    if not plan.flips:
        return tiles
    return np.concatenate([tiles, split_tiles(flip(canvas), plan.grid)])


def view_cameras(camera: Sequence[float], height: int, width: int, plan: ViewPlan) -> FloatArray:
    """Pinhole cameras `(views, 4)` of all views: fx, fy, cx, cy in pixels of the view, from those of the frame.

    Centres of pixels have whole coordinates. A mirrored view is what a camera sees whose x axis points the other way.
    """
    fx, fy, cx, cy = camera
    top, bottom, left, right = crop_region(plan, height, width)
    x, y = plan.canvas[1] / (right - left), plan.canvas[0] / (bottom - top)
    cx, cy = (cx - left + 0.5) * x - 0.5, (cy - top + 0.5) * y - 0.5
    cameras = []
    for mirrored in range(2 if plan.flips else 1):
        across = plan.canvas[1] - 1 - cx if mirrored else cx
        for tile in range(plan.tiles):
            row, column = divmod(tile, plan.grid[1])
            cameras.append((fx * x, fy * y, across - column * plan.view_size[1], cy - row * plan.view_size[0]))
    return np.array(cameras, dtype=np.float32)


def from_views(views: npt.NDArray[Any], plan: ViewPlan) -> npt.NDArray[Any]:
    """Views `(views, h, w, ...)` back to un-flipped canvases `(flips, H, W, ...)`, one or two of them.

    Works for anything laid out as the views are, patch grids included: only the order of tiles and the mirror count.
    """
    canvases = [merge_tiles(views[start : start + plan.tiles], plan.grid) for start in range(0, len(views), plan.tiles)]
    return np.stack([flip(canvas) if mirrored else canvas for mirrored, canvas in enumerate(canvases)])
