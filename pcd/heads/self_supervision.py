"""The self-supervised setting of paper 001 (equations 5 to 7): depths that rebuild a view from a second one by a known motion.

Right (`second_view = "parallax"`): a second camera is simulated. The view is seen from a camera that moved and turned a little,
by its ground truth depth, with true intrinsics; holes and hidden pixels are known and do not count. The predicted depths say
where to look in the second image for each pixel of the first, and learn from what looks different there. They come out metric,
since the motion is known in metres. It needs ground truth in most pixels of the view (cells of the head's grid; between them it
is interpolated), because the simulator draws with it; the loss never compares with it. A depth that puts a pixel more than a
few pixels off finds no way back: translations are drawn from 0 up, so that small ones show the way and large ones settle it.

As published (`second_view = "image-motion"`): the image itself is turned and shifted in its plane, and the homography taken
apart into a rotation and a translation. That is the view of a poster that hangs at right angles to the camera at distance 1. A
pixel p of a view with principal point c then lands at `R (p - c) + shift / D(p) + c`: right for every pixel of every image if
D = 1 everywhere. So the loss does not depend on the scene's depth, its best answer is one and the same constant, whose unit is
the distance of the poster, and a turn without a shift says nothing about D at all. The focal length cancels, which is why 0.015
(pixels, in an image 544 wide; `focal = "published"`) does no further harm. The sign of the structural term does: what the code
calls SSIM is the dissimilarity already, and minimising `alpha (1 - SSIM) / 2` of it (`ssim_sign = "published"`), with 85 % of
the weight, asks for images that differ, and takes depths away even from that constant. So a network that learns from this alone
ends below CLIP's depth without training (delta1 0.394): 0.101 and 0.161 in the paper's table 3; where CLIP's depth is added and
can change by 1 m at most, 0.385.

In the released code the network sees the moved image and rebuilds it from the original; here columns are of the image as it is,
so the original is rebuilt from the moved one, which is the same by symmetry. Pixels that the second image does not show do not
count; there they do. The code forgets that it cropped the images between motion and loss; here the camera is that of the view.
The motion of a view is drawn anew each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.errors import RecipeError
from pcd.heads.base import Context, HeadOptions, PatchTargets
from pcd.recipe import Positive, Section
from pcd.smoothness import smoothness
from pcd.warping import Motion, differences, inverse_warp, project, sample, splat, turns
from pcd.warping import inside as inside_view

CAMERA = "view/intrinsics"
PUBLISHED_FOCAL = 0.015
"""Pixels."""
CLOSEST = 0.1
"""Metres: a nearer pixel would leave the second view altogether, and could learn nothing more."""
KNOWN = 0.5
"""A pixel has ground truth if cells that have it make up this share of its interpolation."""
WHOLE = 0.999
"""A rebuilt pixel counts if this share of it comes from pixels that the second view has."""

Weight = Annotated[float, Field(ge=0)]


class SelfSupervision(Section):
    """`[head.self_supervision]`, for `supervision = "self"`. The defaults are the method done right."""

    second_view: Literal["parallax", "image-motion"] = "parallax"
    """A second camera, simulated by ground truth depth; or the image turned and shifted in its plane, as published."""
    translation: Weight = 0.1
    """Of parallax: metres along each axis, at most, either way."""
    rotation: Annotated[float, Field(ge=0, le=45)] = 2.0
    """Of parallax: degrees about each axis, at most, either way."""
    image_rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Of image-motion: degrees, at most, either way."""
    image_shift: Weight = 10.0
    """Of image-motion: pixels along each axis, at most, either way."""
    focal: Literal["true", "published"] = "true"
    """The camera of the view, or one of 0.015 pixels with its axis through the middle."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.85
    """Share of the structural term."""
    ssim_sign: Literal["right", "published"] = "right"
    """Published: (1 - dissimilarity) / 2 is minimised, so that unlike images are better."""
    smoothness: Weight = 1e-3
    """Weight of the smoothness of the depths, see `pcd.smoothness`."""
    smoothness_sign: Literal["minus", "paper"] = "minus"
    """Minus, as in the released code: less of it is asked for at edges. As equation 7 is printed: more."""
    start: Positive = 2.5
    """Metres at which the depths of a network begin that would begin at 0: nothing could be rebuilt from there."""
    rgb: str = "pixels/rgb"
    """The view itself: of the encoder `pixels` without a stride."""

    @field_validator("focal")
    @classmethod
    def _of_image_motion(cls, value: str, info: ValidationInfo) -> str:
        if value == "published" and info.data.get("second_view") == "parallax":
            raise PydanticCustomError(
                "focal", 'a second camera of 0.015 pixels sees no parallax; use it with second_view = "image-motion"'
            )
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """What the loss looks at: the view, and its camera unless that is the published one."""
        return (self.rgb, CAMERA) if self.focal == "true" else (self.rgb,)


class PhotometricLoss(nn.Module):
    """Equation 6 of a head's depths. It has no parameters, and nothing that a checkpoint holds."""

    _rows: Tensor
    _columns: Tensor
    _published: Tensor

    def __init__(
        self, settings: SelfSupervision, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int], options: HeadOptions
    ) -> None:
        """`grid` is that of the depths, `options` give their range. Raises `RecipeError` if `rgb` is no image of three pixels
        a side or more, or smaller than the grid."""
        super().__init__()
        self.settings = settings
        self._grid, self._range = grid, (max(options.min_depth, CLOSEST), options.max_depth)
        shape = shapes[settings.rgb]
        if len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < 3 or shape[0] < grid[0] or shape[1] < grid[1]:
            raise RecipeError(
                f"head.self_supervision: {settings.rgb} is {shape}; expected the view (h, w, 3), no smaller than the depths' "
                f"grid of {grid[0]}x{grid[1]}."
            )
        self._size = height, width = shape[0], shape[1]
        published = torch.tensor([PUBLISHED_FOCAL, PUBLISHED_FOCAL, width / 2, height / 2])
        self.register_buffer("_published", published, persistent=False)
        for name, own, fine in zip(("_rows", "_columns"), grid, self._size, strict=True):
            self.register_buffer(name, between(own, fine), persistent=False)

    def check(self, context: Context) -> None:
        """Raises `RecipeError` if the camera of a training view is not known."""
        if CAMERA not in self.settings.columns:
            return
        views = unknown = 0
        for batch in context.batches():
            lost = ~batch.columns[CAMERA].isfinite().all(dim=1)
            views, unknown = views + len(lost), unknown + int(lost.sum())
        if unknown:
            raise RecipeError(
                f'head.supervision = "self" needs the camera of every view, and {CAMERA} is unknown (NaN) in {unknown} of '
                f"{views} training views: the dataset does not give its intrinsics. Add them (fx, fy, cx, cy of a manifest or "
                'of intrinsics.txt), or use supervision = "depth".'
            )

    def losses(self, depth: Tensor, columns: Mapping[str, Tensor], target: PatchTargets) -> dict[str, Tensor]:
        """Losses of depths `(B, P)` in metres: `total`, `photometric` and its parts `ssim` (unlikeness) and `l1`, `smoothness`.

        Depths may lie outside the range; they count as its ends, and still learn. Without any ground truth to simulate a second
        camera with, `total` requires no gradient.
        """
        settings, rgb = self.settings, columns[self.settings.rgb].permute(0, 3, 1, 2)
        if settings.second_view == "parallax" and not len(target.flat):
            return {"total": target.mean.new_zeros(())}
        with without_autocast(depth):
            depth = depth.float().reshape(-1, *self._grid)
            metres = self.on_view(depth + (depth.clamp(*self._range) - depth).detach())
            view, cameras = rgb.float() / 255, self.cameras(columns, metres)
            rebuilt, shown = self._rebuilt(rgb, metres, cameras, target)
            unlike, away = differences(view, rebuilt, shown)
            structure = unlike if settings.ssim_sign == "right" else (1 - unlike) / 2
            photometric = settings.alpha * structure + (1 - settings.alpha) * away
            rough = smoothness(metres, view, sign=-1 if settings.smoothness_sign == "minus" else 1)
            total = photometric + settings.smoothness * rough
        return {"total": total, "photometric": photometric, "ssim": unlike, "l1": away, "smoothness": rough}

    def _rebuilt(self, rgb: Tensor, metres: Tensor, cameras: Tensor, target: PatchTargets) -> tuple[Tensor, Tensor]:
        """The view as the depths find it in a second one, and which of its pixels count."""
        draws = 2 * torch.rand(len(rgb), 6, device=metres.device) - 1
        with torch.no_grad():
            if self.settings.second_view == "parallax":
                motion = self.camera_motion(draws)
                truth, known = self.truth(target)
                second = splat(rgb, truth, known, cameras, motion)
                image, there, visible = second.image, second.filled, second.visible
            else:
                motion = self.image_motion(draws, cameras)
                image, there = inverse_warp(rgb.float() / 255, torch.ones_like(metres), cameras, motion.inverse())
                visible = torch.ones_like(there)
        pixels, z = project(metres, cameras, motion)
        found = sample(torch.cat([image, there[:, None].to(image)], dim=1), pixels)
        return found[:, :3], visible & inside_view(pixels, z) & (found[:, 3] >= WHOLE).detach()

    def camera_motion(self, draws: Tensor) -> Motion:
        """Small motions of a camera from `draws` `(B, 6)` in [-1, 1]."""
        return Motion(turns(draws[:, 3:] * math.radians(self.settings.rotation)), draws[:, :3] * self.settings.translation)

    def image_motion(self, draws: Tensor, cameras: Tensor) -> Motion:
        """What the decomposition of a turn about the axis of the camera and a shift gives: the plane z = 1 moves so."""
        shift, zero = draws[:, :2] * self.settings.image_shift / cameras[:, :2], torch.zeros_like(draws[:, :1])
        angle = draws[:, 2:3] * math.radians(self.settings.image_rotation)
        return Motion(turns(torch.cat([zero, zero, angle], dim=1)), torch.cat([shift, zero], dim=1))

    def cameras(self, columns: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The cameras `(B, 4)` of the views, or the published one."""
        if self.settings.focal == "true":
            return columns[CAMERA].to(like)
        return self._published.expand(len(like), -1)

    def on_view(self, maps: Tensor) -> Tensor:
        """Maps `(B, *grid)` at every pixel of the view, bilinear by the centres of cells."""
        return maps if self._grid == self._size else self._rows @ maps @ self._columns.T

    def truth(self, target: PatchTargets) -> tuple[Tensor, Tensor]:
        """Ground truth depth `(B, h, w)` at every pixel of the view and where it is known, interpolated as predictions are."""
        valid = target.valid.float().reshape(-1, *self._grid)
        share = self.on_view(valid)
        depth = self.on_view(target.mean.reshape(valid.shape) * valid) / share.clamp(min=torch.finfo(share.dtype).tiny)
        return depth, share >= KNOWN


def between(count: int, fine: int) -> Tensor:
    """Linear interpolation from `count` cells to `fine` by their centres, flat beyond the outer ones: a matrix `(fine, count)`.

    Products with it are summed in a fixed order backward; the interpolation of a GPU is not.
    """
    position = ((torch.arange(fine, dtype=torch.float64) + 0.5) * count / fine - 0.5).clamp(0, count - 1)
    return (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0).float()
