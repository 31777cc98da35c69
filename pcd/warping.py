"""Between two views of one scene: where pixels go when the camera moves, what it sees there, and how alike two images are.

Cameras are `(B, 4)`: fx, fy, cx, cy in pixels, and centres of pixels have whole coordinates, as in `pcd.views.view_cameras`.
Both views have the same camera. Depths `(B, h, w)` are metres along the axis of the camera, images `(B, C, h, w)`. Nothing here
waits for the device, and nothing depends on the order in which a GPU adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 1e-3
"""Metres: what is not farther in front of a camera is not seen by it."""
SAME_SURFACE = 0.05
"""Points that land on one pixel belong to one surface if their depths differ by less than this share."""
HOLDS = 0.2
"""A point hides what is behind it on the pixels of which it covers this share; it always has one of a quarter at least."""
FILLED = 0.5
"""A pixel is seen if points cover this share of it."""
ONE = 1 << 12
"""A whole pixel in the integers that shares of pixels are added in."""
C1, C2 = 0.01**2, 0.03**2
"""Of SSIM, for values in [0, 1]."""


@dataclass(frozen=True)
class Motion:
    """From the axes of one camera to those of another, `x' = R x + t`: `rotation` `(B, 3, 3)`, `translation` `(B, 3)` in m."""

    rotation: Tensor
    translation: Tensor

    def inverse(self) -> Motion:
        """The way back."""
        back = self.rotation.transpose(1, 2)
        return Motion(back, -(back * self.translation[:, None]).sum(dim=2))


def turns(angles: Tensor) -> Tensor:
    """Rotations `(B, 3, 3)` about the axes x, then y, then z, by `angles` `(B, 3)` in radians."""
    cos, sin = angles.cos().unbind(dim=1), angles.sin().unbind(dim=1)
    one, zero = torch.ones_like(cos[0]), torch.zeros_like(cos[0])
    about_x = [one, zero, zero, zero, cos[0], -sin[0], zero, sin[0], cos[0]]
    about_y = [cos[1], zero, sin[1], zero, one, zero, -sin[1], zero, cos[1]]
    about_z = [cos[2], -sin[2], zero, sin[2], cos[2], zero, zero, zero, one]
    x, y, z = (torch.stack(about, dim=1).reshape(-1, 3, 3) for about in (about_x, about_y, about_z))
    return _product(z, _product(y, x))


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Of matrices `(B, 3, 3)`, in full precision wherever products of matrices are not."""
    return (one[:, :, :, None] * other[:, None]).sum(dim=2)


def project(depth: Tensor, cameras: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """Where pixels of a view lie in that of the moved camera: `(B, 2, h, w)` x and y, and their depths there `(B, h, w)`."""
    fx, fy, cx, cy = (value[:, None, None] for value in cameras.to(depth).unbind(dim=1))
    height, width = depth.shape[1:]
    across = (torch.arange(width, dtype=depth.dtype, device=depth.device) - cx) / fx * depth
    down = (torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None] - cy) / fy * depth
    r, t = motion.rotation.to(depth)[..., None, None], motion.translation.to(depth)[..., None, None]
    x, y, z = (r[:, row, 0] * across + r[:, row, 1] * down + r[:, row, 2] * depth + t[:, row] for row in range(3))
    before = z.clamp(min=NEAR)
    return torch.stack([fx * x / before + cx, fy * y / before + cy], dim=1), z


def sample(image: Tensor, pixels: Tensor) -> Tensor:
    """Bilinear values `(B, C, h, w)` of an image at `pixels` `(B, 2, h, w)`; beyond its border those of the border."""
    height, width = image.shape[2:]
    x, y = pixels.unbind(dim=1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)  # 1: outer edge of the last pixel
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inside(pixels: Tensor, z: Tensor) -> Tensor:
    """Which of the places that `project` gives are in front of the camera and between pixels of its view: bool `(B, h, w)`."""
    (x, y), (height, width) = pixels.unbind(dim=1), pixels.shape[2:]
    return (z > NEAR) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def inverse_warp(image: Tensor, depth: Tensor, cameras: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """A view rebuilt from the image of the moved camera by the depths of the view, and which of its pixels that shows.

    (Equation 5 of paper 001.) Differentiable in the depths.
    """
    pixels, z = project(depth, cameras, motion)
    return sample(image, pixels), inside(pixels, z)


@dataclass(frozen=True)
class Splatted:
    """What a moved camera sees: `image` `(B, C, h, w)` in [0, 1], 0 in holes, and `filled` `(B, h, w)`, false in holes.

    `visible` `(B, h, w)` are the pixels of the first view that the second shows: in its frame and hidden by nothing.
    """

    image: Tensor
    filled: Tensor
    visible: Tensor


@torch.no_grad()
def splat(image: Tensor, depth: Tensor, known: Tensor, cameras: Tensor, motion: Motion) -> Splatted:
    """The image that a moved camera takes of the surfaces that a view shows, by their true depths where those are `known`.

    `image` is uint8. Each pixel goes to the four next to where it lands, with bilinear shares; of those that meet, the nearest
    surface remains. Shares are added as integers: the order in which they come does not matter.
    """
    views, channels, height, width = image.shape
    pixels, z = project(depth, cameras, motion)
    z, colours = z.reshape(-1), image.permute(0, 2, 3, 1).reshape(-1, channels).to(torch.int32)
    corners = list(_corners(pixels, known & (z.reshape(depth.shape) > NEAR)))
    cells = views * height * width
    nearest = z.new_full((cells + 1,), float("inf"))  # the last cell takes what lands nowhere
    for cell, share in corners:
        nearest.scatter_reduce_(0, torch.where(share >= HOLDS, cell, cells), z, "amin")
    total, weight = colours.new_zeros((cells + 1, channels)), colours.new_zeros(cells + 1)
    visible = known.reshape(-1)
    for cell, share in corners:
        front = nearest[cell]
        kept = (cell < cells) & (z >= (1 - SAME_SURFACE) * front) & (z <= (1 + SAME_SURFACE) * front)
        part = torch.where(kept, share * ONE, 0).round().to(torch.int32)
        total.index_add_(0, cell, colours * part[:, None])
        weight.index_add_(0, cell, part)
        visible = visible & (kept | (share < 1 / ONE))
    filled = (weight >= FILLED * ONE)[:cells]
    seen = torch.where(filled[:, None], total[:cells] / (weight[:cells, None].clamp(min=1) * 255.0), 0.0)
    back = seen.to(depth.dtype).reshape(views, height, width, channels).permute(0, 3, 1, 2)
    return Splatted(back, filled.reshape(views, height, width), visible.reshape(views, height, width))


def _corners(pixels: Tensor, usable: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels around each place: their numbers, or the number of pixels if outside, and bilinear shares, `(B h w,)`."""
    (views, _, height, width), (x, y) = pixels.shape, pixels.unbind(dim=1)
    first = torch.arange(views, device=pixels.device)[:, None, None] * height * width
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            there = usable & (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
            place = torch.where(there, row, 0).long() * width + torch.where(there, column, 0).long()
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            yield torch.where(there, first + place, views * height * width).reshape(-1), share.reshape(-1)


def dissimilarity(one: Tensor, other: Tensor) -> Tensor:
    """`clamp((1 - SSIM) / 2, 0, 1)` of windows of 3x3 pixels: `(B, C, h - 2, w - 2)`, 0 where they are equal."""
    mean, means = F.avg_pool2d(one, 3, 1), F.avg_pool2d(other, 3, 1)
    var = F.avg_pool2d(one * one, 3, 1) - mean * mean
    variance = F.avg_pool2d(other * other, 3, 1) - means * means
    covariance = F.avg_pool2d(one * other, 3, 1) - mean * means
    ssim = (2 * mean * means + C1) * (2 * covariance + C2) / ((mean**2 + means**2 + C1) * (var + variance + C2))
    return ((1 - ssim) / 2).clamp(0, 1)


def differences(view: Tensor, rebuilt: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `dissimilarity` and mean absolute difference of a view and what was rebuilt of it, where `shown` `(B, h, w)`.

    Pixels that are not shown count as equal in the windows of others, and do not count themselves.
    """
    rebuilt = torch.where(shown[:, None], rebuilt, view)
    unlike, weight = dissimilarity(view, rebuilt).mean(dim=1), shown[:, 1:-1, 1:-1].to(view)
    away, number = (view - rebuilt).abs().mean(dim=1), shown.to(view).sum()
    return (unlike * weight).sum() / weight.sum().clamp(min=1), away.sum() / number.clamp(min=1)
