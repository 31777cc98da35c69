"""A run as one differentiable network: an image in, metres out, everything between done by tensors.

What `pcd.views` and `pcd.evaluation.pixels` do with NumPy for images of a known size is written here with tensor operations
alone, so that an exporter sees it all and the image may have any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcd.errors import UsageError
from pcd.evaluation.pixels import UPSAMPLE, combine_views
from pcd.evaluation.protocol import Upsample
from pcd.heads.base import Head
from pcd.views import ViewPlan


class _Taps(NamedTuple):
    """Resizing one axis: output cell k is `1 - share[k]` times input cell `low[k]` plus `share[k]` times cell `high[k]`."""

    low: Tensor
    high: Tensor
    share: Tensor


class _Span(NamedTuple):
    """Rows or columns `start` to `start + length` of an image, int64 scalars."""

    start: Tensor
    length: Tensor


class DepthNetwork(nn.Module):
    """Encoder and head of a run as one network, with the views before and the pixels after them.

    Takes RGB float32 in [0, 1], `(N, 3, H, W)` of any size, and gives depth `(N, 1, H, W)` in metres, followed by its standard
    deviation if the head has a distribution. The dataset's crop is taken of images that have the size of its frames, others are
    used whole: what `pcd predict` does.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        plan: ViewPlan,
        frame: tuple[int, int],
        *,
        tta: bool = True,
        upsample: Upsample = "bilinear",
    ) -> None:
        """`encoder` maps views `(B, 3, h, w)` to columns; `frame` is the (height, width) of the dataset's stored frames.

        Raises `UsageError` for another way of upsampling than those of `pcd.evaluation.pixels`.
        """
        super().__init__()
        if upsample not in UPSAMPLE:
            raise UsageError(f"upsample = {upsample!r}: known are {', '.join(UPSAMPLE)}.")
        self.encoder, self.head = encoder, head
        self.plan, self.frame, self.upsample = replace(plan, flips=tta), frame, upsample
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Depth, and its standard deviation where there is one, `(N, 1, H, W)` each, in metres."""
        spans = self._spans(image)
        columns = self.encoder(self._views(_resize_image(image, spans, self.plan.canvas)))
        size = image.shape[2], image.shape[3]
        depth, *variance = (_place(patches, spans, size, self.upsample)[:, None] for patches in self._maps(columns))
        return depth, *(pixels.sqrt() for pixels in variance)

    def _spans(self, image: Tensor) -> tuple[_Span, _Span]:
        """The rows and columns that are used: a crop chosen by tensors, since the graph must not depend on one size."""
        height, width = (_scalar(image, side) for side in (image.shape[2], image.shape[3]))
        zero = torch.zeros_like(height)
        if self.plan.crop is None:
            return _Span(zero, height), _Span(zero, width)
        top, bottom, left, right = self.plan.crop
        is_frame = (height == self.frame[0]) & (width == self.frame[1])
        rows = _Span(torch.where(is_frame, top, zero), torch.where(is_frame, bottom - top, height))
        return rows, _Span(torch.where(is_frame, left, zero), torch.where(is_frame, right - left, width))

    def _views(self, canvas: Tensor) -> Tensor:
        """Views `(N * views, 3, h, w)` of canvases `(N, 3, H, W)`, flip-major within each image: `views.to_views`."""
        both = torch.stack([canvas, canvas.flip(-1)], dim=1) if self.plan.flips else canvas[:, None]
        (rows, columns), (height, width) = self.plan.grid, self.plan.view_size
        cut = both.reshape(-1, both.shape[1], 3, rows, height, columns, width)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 3, height, width)

    def _maps(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Merged patch depths `(N, Gh, Gw)`, and their variance: that of the even mixture of an image and its mirror image."""
        found = self.head.distribution(columns)
        depth = self._views_of(self.head.depth(columns) if found is None else found.mean)
        merged = combine_views(depth, self.plan, self.plan.flips)
        if found is None:
            return (merged,)
        within = combine_views(self._views_of(found.std) ** 2, self.plan, self.plan.flips)
        away = combine_views(depth, self.plan, tta=False) - merged  # the mirrored view is as far away on the other side
        return merged, within + away**2

    def _views_of(self, patches: Tensor) -> Tensor:
        return patches.float().reshape(-1, self.plan.views, *self.head.grid)


def _scalar(like: Tensor, value: int) -> Tensor:
    """A side of an image as an int64 scalar of the graph."""
    return torch.full((), value, dtype=torch.int64, device=like.device)


def _between(position: Tensor, last: Tensor) -> _Taps:
    """Taps at fractional positions on an axis whose last cell is `last`.

    Positions are float64 as in `pcd.views`: in float32 the pixels of wide images move by 1e-4 of their values.
    """
    position = torch.minimum(position.clamp(min=0), last.double())
    low = position.floor().long()
    return _Taps(low, torch.minimum(low + 1, last), (position - low).float())


def _resize_image(image: Tensor, spans: tuple[_Span, _Span], size: tuple[int, int]) -> Tensor:
    """The spans of an image `(N, 3, H, W)`, bilinear with half-pixel centres to `size`: `views.resize_image`."""
    for axis, span, target in ((3, spans[1], size[1]), (2, spans[0], size[0])):
        centres = torch.arange(target, dtype=torch.float64, device=image.device) + 0.5
        low, high, share = _between(centres * (span.length.double() / target) - 0.5, span.length - 1)
        image = _mix(image, axis, _Taps(low + span.start, high + span.start, share))
    return image


def _place(patches: Tensor, spans: tuple[_Span, _Span], size: tuple[int, int], mode: Upsample) -> Tensor:
    """Patches `(N, Gh, Gw)` on the spans of frames of `size`, edges repeated beyond them: `pixels.native_prediction`."""
    for axis, span, side in ((1, spans[0], size[0]), (2, spans[1], size[1])):
        cells, last = patches.shape[axis], _scalar(patches, patches.shape[axis] - 1)
        places = torch.arange(side, device=patches.device) - span.start
        places = torch.minimum(places.clamp(min=0), span.length - 1)
        if mode == "nearest":
            patches = patches.index_select(axis, torch.div(places * cells, span.length, rounding_mode="floor"))
        elif mode == "bilinear":
            patches = _mix(patches, axis, _between((places.double() + 0.5) * cells / span.length.double() - 0.5, last))
        else:
            step = last.double() / (span.length - 1).clamp(min=1).double()
            patches = _mix(patches, axis, _between(places.double() * step, last))
    return patches


def _mix(values: Tensor, axis: int, taps: _Taps) -> Tensor:
    """Two cells of an axis, weighed."""
    share = taps.share.reshape([-1 if dim == axis else 1 for dim in range(values.ndim)])
    return values.index_select(axis, taps.low) * (1 - share) + values.index_select(axis, taps.high) * share
