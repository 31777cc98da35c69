"""Scores of many predictions under many protocols in one pass, without keeping a single pixel map.

What is kept is a row of sums (`metrics.SUMS`) per image, or per tile, and protocol; `scores.Scores` makes every table and mean
from these. Protocols that look at the same pixels share the upsampled prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.errors import PredictionError, SampleError, UsageError
from pcd.evaluation.alignment import align
from pcd.evaluation.boundary import boundary_f1
from pcd.evaluation.metrics import Floats, binned_sums, gathered_sums, masked_sums
from pcd.evaluation.pixels import canvas_prediction, combine_views, native_prediction, on_cpu
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.scores import Scores, depth_edges
from pcd.regions import Region, inside
from pcd.views import ViewPlan

Frame = npt.NDArray[np.float32]
_Shared = dict[Any, tuple[Tensor, Tensor]]
"""Prediction and ground truth `(B, h, w)` by what determines them."""
Watch = Callable[[str, Floats, Floats], None]
"""Told the key of an image (or of the image a tile is of), its pixels as predicted and as they are: float64 metres `(n,)`."""


def counted(protocol: Protocol, gt: Any) -> Any:
    """Mask of the pixels whose ground truth (float32 metres, NaN for none) lies in the range; arrays and tensors alike."""
    low, high = float(np.float32(protocol.min_depth)), float(np.float32(protocol.max_depth))
    above = gt >= low if protocol.min_inclusive else gt > low
    return above & (gt <= high if protocol.max_inclusive else gt < high)


def admitted(protocol: Protocol, pred: Any) -> Any:
    """Mask of the pixels whose prediction (metres) lets them count; arrays and tensors alike."""
    mask = pred == pred
    if protocol.min_prediction is not None:
        mask = mask & (pred > float(np.float32(protocol.min_prediction)))
    if protocol.max_prediction is not None:
        mask = mask & (pred <= float(np.float32(protocol.max_prediction)))
    return mask


def compared(protocol: Protocol, pred: Any) -> Any:
    """The prediction as it is compared, clamped if the protocol says so; arrays and tensors alike."""
    return pred.clip(protocol.min_depth, protocol.max_depth) if protocol.clamp else pred


def _aligned(protocol: Protocol, pred: Any, gt: Any, mask: Any = None) -> Any:
    """Alignment over the pixels of the mask: of one array of any shape, or of each of a batch of tensors."""
    if protocol.alignment == "none":
        return pred
    if isinstance(pred, np.ndarray):
        chosen = None if mask is None else torch.from_numpy(mask)
        return align(torch.from_numpy(pred), torch.from_numpy(gt), protocol.alignment, chosen).numpy()
    return torch.stack([align(p, g, protocol.alignment, m) for p, g, m in zip(pred, gt, mask, strict=True)])


def _on_maps(protocol: Protocol, pred: Any, gt: Any) -> tuple[Any, Any]:
    """Whole maps as they are compared, and the mask of the pixels that count: a batch of tensors, or one array.

    In this order: pixels by ground truth, alignment over them, pixels by prediction, clamping.
    """
    mask = counted(protocol, gt)
    pred = _aligned(protocol, pred, gt, mask)
    return compared(protocol, pred), mask & admitted(protocol, pred)


def _gathered(protocol: Protocol, pred: Floats, gt: Frame) -> tuple[Floats, Floats]:
    """What `_on_maps` and its mask would select from one map, `(n,)` each, touching only pixels with ground truth."""
    chosen = np.flatnonzero(counted(protocol, gt))
    p, g = pred.take(chosen), gt.take(chosen).astype(np.float64)
    p = _aligned(protocol, p, g)
    if protocol.min_prediction is not None or protocol.max_prediction is not None:
        kept = admitted(protocol, p)
        p, g = p[kept], g[kept]
    return compared(protocol, p), g


class Scorer:
    """Gathers the scores of predictions under several protocols.

    `depth_bins` (0 for none) asks for `Scores.depth_table`; `boundary` for boundary F1 under the protocols at native
    resolution, which is meant for dense ground truth and takes several times as long as everything else; `watch` is shown the
    pixels that count under the first protocol. Raises `UsageError` for protocols that cannot be applied to the view plan, and
    for two of one label.
    """

    def __init__(
        self,
        protocols: Sequence[Protocol],
        plan: ViewPlan,
        *,
        depth_bins: int = 0,
        boundary: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.protocols = tuple(protocols)
        self.plan = plan
        self.scores: dict[str, Scores] = {protocol.label: Scores(protocol) for protocol in self.protocols}
        """By protocol label."""
        self._depth_bins = depth_bins
        self._boundary = boundary
        self._watch = watch
        if len(self.scores) != len(self.protocols):
            raise UsageError(f"a protocol is named twice: {', '.join(p.label for p in self.protocols)}.")
        for protocol in self.protocols:
            self._refuse(protocol)

    def _refuse(self, protocol: Protocol) -> None:
        if protocol.tta and not self.plan.flips:
            raise UsageError(
                f"protocol {protocol.label} averages over mirrored views, and there are none: extract with flips, or score "
                "without TTA."
            )
        if protocol.resolution == "canvas" and protocol.region != "none" and self.plan.crop is not None:
            raise UsageError(
                f"protocol {protocol.label}: its region is a fraction of the whole frame, but the canvas holds the crop "
                f"{self.plan.crop} only; use a protocol at native resolution, such as eigen, or views without crop."
            )

    @property
    def needs_native(self) -> bool:
        """Whether any protocol looks at the untouched ground truth."""
        return any(protocol.resolution == "native" for protocol in self.protocols)

    def add(self, keys: Sequence[str], patches: Tensor, canvas_gt: Tensor, native_gt: Sequence[Frame] | None = None) -> None:
        """Score N samples: patch depths `(N, views, gh, gw)` as the views saw them, ground truth `(N, H, W)` on the canvas and,
        if `needs_native`, `(h, w)` each as stored; all in metres, NaN where there is no depth.

        Computes where `patches` lie. Raises `PredictionError` for a prediction that is not finite, `SampleError` for a frame
        that a protocol is not defined on, `UsageError` for shapes that do not fit; nothing of the samples is then kept.
        """
        native = self._checked(keys, patches, canvas_gt, native_gt)
        if patches.device.type == "mps":  # has no float64
            patches = patches.cpu()
        patches = patches.detach().double()
        combined = {tta: combine_views(patches, self.plan, tta) for tta in {p.tta for p in self.protocols}}
        truth = canvas_gt.to(patches.device).float()
        frames = [torch.from_numpy(np.ascontiguousarray(frame, dtype=np.float32)).to(patches.device) for frame in native]
        shared: _Shared = {}
        found = []
        for protocol in self.protocols:
            if protocol.resolution == "canvas":
                found.append(self._on_canvas(protocol, keys, combined[protocol.tta], truth, shared))
            else:
                found.append(self._on_frames(protocol, keys, combined[protocol.tta], frames, shared))
        for scores in found:
            self.scores[scores.protocol.label].extend(scores)

    def _checked(
        self, keys: Sequence[str], patches: Tensor, canvas_gt: Tensor, native_gt: Sequence[Frame] | None
    ) -> Sequence[Frame]:
        if native_gt is None and self.needs_native:
            names = ", ".join(p.label for p in self.protocols if p.resolution == "native")
            raise UsageError(f"{names}: native ground truth is needed, and none was given.")
        native = (native_gt if self.needs_native else None) or []
        expected = (len(keys), *self.plan.canvas)
        lengths = {len(keys), len(patches)} | ({len(native)} if self.needs_native else set())
        if len(lengths) > 1 or tuple(canvas_gt.shape) != expected:
            raise UsageError(
                f"{len(keys)} keys, predictions {tuple(patches.shape)}, ground truth {tuple(canvas_gt.shape)} on the canvas "
                f"(expected {expected}) and {len(native)} native frames do not belong together."
            )
        finite = patches.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            raise PredictionError(
                f"the prediction of {keys[int(finite.long().argmin())]} is not finite; the head has diverged."
            )
        return native

    def _on_canvas(self, protocol: Protocol, keys: Sequence[str], combined: Tensor, truth: Tensor, shared: _Shared) -> Scores:
        """All samples at once; pixels outside the region lose their ground truth."""
        name = (protocol.upsample, protocol.tta, protocol.region)
        if name not in shared:
            gt = truth
            if protocol.region != "none":
                mask = inside(protocol.region_in(*self.plan.canvas), *self.plan.canvas)
                gt = torch.where(torch.from_numpy(mask).to(gt.device), gt, torch.nan)
            shared[name] = canvas_prediction(combined, self.plan, protocol.upsample), gt
        pred, gt = shared[name]
        if protocol.averaging != "tile":
            return self._scored(protocol, list(keys), [None] * len(keys), pred, gt)
        tiles = list(range(self.plan.tiles)) * len(keys)
        each = [key for key in keys for _ in range(self.plan.tiles)]
        return self._scored(protocol, each, tiles, self._tiled(pred), self._tiled(gt))

    def _tiled(self, canvas: Tensor) -> Tensor:
        """`(N, H, W)` to `(N * tiles, h, w)`, tiles in reading order."""
        (rows, columns), (height, width) = self.plan.grid, self.plan.view_size
        return canvas.reshape(-1, rows, height, columns, width).transpose(2, 3).reshape(-1, height, width)

    def _on_frames(
        self, protocol: Protocol, keys: Sequence[str], combined: Tensor, frames: Sequence[Tensor], shared: _Shared
    ) -> Scores:
        """Frame by frame, since frames differ in size; only the scored region is ever predicted."""
        scores = Scores(protocol)
        for at, (key, frame) in enumerate(zip(keys, frames, strict=True)):
            height, width = frame.shape
            try:
                window = protocol.region_in(height, width)
                name = (at, protocol.upsample, protocol.tta, protocol.outside, window)
                if name not in shared:
                    patches, size = combined[at : at + 1], (height, width)
                    pred = native_prediction(patches, self.plan, size, protocol.upsample, protocol.outside, window)
                    shared[name] = pred, _window(frame, window)
                scores.extend(self._scored(protocol, [key], [None], *shared[name]))
            except (SampleError, PredictionError) as error:
                raise type(error)(f"{key}: {error}") from None
        return scores

    def _scored(self, protocol: Protocol, keys: list[str], tiles: Sequence[int | None], pred: Tensor, gt: Tensor) -> Scores:
        """Units `(B, h, w)`: one after the other on the CPU, all at once on an accelerator."""
        scores = Scores(protocol, keys, list(tiles))
        edges = depth_edges(protocol, self._depth_bins) if self._depth_bins else None
        boundary = self._boundary and protocol.resolution == "native"
        watch = self._watch if protocol is self.protocols[0] else None
        if on_cpu(pred):
            for key, p, g in zip(keys, pred.numpy(), gt.numpy(), strict=True):
                pair = _gathered(protocol, p, g)
                if watch is not None:
                    watch(key, *pair)
                bins = None if edges is None else binned_sums(*pair, edges)
                scores.sums.append(gathered_sums(*pair) if bins is None else bins.sum(axis=0))
                scores.add_bins(bins)
                if boundary:
                    final, mask = _on_maps(protocol, p, g)
                    scores.boundary.append(boundary_f1(final, g, mask))
            return scores
        final, mask = _on_maps(protocol, pred, gt)
        scores.sums += list(masked_sums(final, gt, mask).cpu().numpy())
        if watch is not None:
            for key, p, g, m in zip(keys, final, gt, mask, strict=True):
                watch(key, p[m].double().cpu().numpy(), g[m].double().cpu().numpy())
        if edges is not None:
            scores.add_bins(binned_sums(final[mask].cpu().numpy(), gt[mask].double().cpu().numpy(), edges))
        if boundary:
            maps = zip(final.cpu().numpy(), gt.cpu().numpy(), mask.cpu().numpy(), strict=True)
            scores.boundary += [boundary_f1(p, g, m) for p, g, m in maps]
        return scores

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The per-sample table of all protocols: `key`, `protocol`, `tile` (None for whole images), `pixels` and every metric.

        Images and tiles without valid pixels are in it with 0 pixels and NaN.
        """
        return [row for scores in self.scores.values() for row in scores.rows()]

    def summary(self) -> dict[str, dict[str, Any]]:
        """By protocol label: `metrics`, `images`, `excluded` and more; see `Scores.summary`."""
        return {label: scores.summary() for label, scores in self.scores.items()}


def _window(frame: Tensor, window: Region) -> Tensor:
    """A region of a frame `(h, w)` as a contiguous batch of one."""
    top, bottom, left, right = window
    part = frame[None, top:bottom, left:right]
    return torch.from_numpy(np.ascontiguousarray(part.numpy())) if on_cpu(part) else part.contiguous()
