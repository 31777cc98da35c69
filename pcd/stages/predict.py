"""Predict: images through encoder and head to depth maps that a person can look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcd.device import resolve_device
from pcd.errors import UsageError
from pcd.evaluation.protocol import Upsample
from pcd.heads.base import has_distribution
from pcd.prediction.canvas import canvas_of
from pcd.prediction.result import Prediction
from pcd.prediction.saves import Save
from pcd.prediction.sources import Source, batched, read_frames
from pcd.prediction.windows import Layout, Windows, lay_out
from pcd.prediction.writers import Output, Writer
from pcd.progress import SILENT, Progress
from pcd.stages.run_encoder import RunEncoders
from pcd.stages.runs import Run
from pcd.views import FloatArray, ViewPlan

__all__ = ["Prediction", "Predictor", "predict_files"]

VIEWS_AT_ONCE = {"cpu": 16, "cuda": 128}
"""Views per forward pass; more gain nothing. ViT-L/14 at 336 needs 0.1 GB of memory for each at most."""


class Predictor:
    """A run with its encoder, ready for images of any size and aspect."""

    def __init__(
        self,
        run: Run,
        *,
        checkpoint: str = "abs_rel",
        weights: str | None = None,
        device: str = "auto",
        tta: bool = True,
        upsample: Upsample = "bilinear",
        overlap: float = 0.0,
        scales: Sequence[float] = (1.0,),
        uncertainty: bool = False,
        batch: int | None = None,
    ) -> None:
        """Loads the head and the encoder it was trained on.

        `weights` says where the encoder's weights are now, if not where they were. `overlap` and `scales` lay overlapping
        windows over enlarged canvases (`pcd.prediction.windows`); the depths of all scales are averaged. `uncertainty` keeps
        the variance of the head's distribution. `batch` is how many images go through the encoder together.
        Raises `WeightsError`, `FingerprintError` if they are not the weights the run was trained on, and `UsageError` for
        options that cannot be used, among them uncertainty of a head without a distribution.
        """
        self.run = run
        self._device = torch.device(resolve_device(device))
        self._upsample, self._tta, self.uncertainty = upsample, tta, uncertainty
        self._layouts = self._lay_out(scales, overlap)
        self._views_at_once, self.batch = self._batches(batch)
        self._head, self.epoch = run.load_head(checkpoint, self._device)
        if uncertainty and not has_distribution(self._head, run.info["shapes"]):
            raise UsageError(self._no_distribution())
        self._encoder = RunEncoders(run, weights, device)

    def _lay_out(self, scales: Sequence[float], overlap: float) -> list[Layout]:
        if not scales:
            raise UsageError("scales: none given; 1 is the canvas of training.")
        plan = replace(self.run.plan, flips=self._tta)
        return [lay_out(plan, self.run.grid, scale, overlap) for scale in scales]

    @property
    def views(self) -> int:
        """Views per image, of all scales, mirrored ones included."""
        return sum(layout.views for layout in self._layouts)

    @property
    def notes(self) -> list[str]:
        """What a person who chose the options should know."""
        if len(self._layouts) == 1 and isinstance(self._layouts[0], Windows) and self._layouts[0].is_single:
            return ["--overlap changes nothing here: one view covers the whole canvas of this run; --scales lays several."]
        return []

    def _batches(self, batch: int | None) -> tuple[int, int]:
        """Views per forward pass, and images whose views are collected for one."""
        if batch is None:
            at_once = VIEWS_AT_ONCE.get(self._device.type, VIEWS_AT_ONCE["cpu"])
            return at_once, max(1, at_once // self.views)
        if batch < 1:
            raise UsageError(f"batch {batch}: expected 1 image or more.")
        return batch * self.run.plan.tiles * (2 if self._tta else 1), batch

    def _no_distribution(self) -> str:
        name = self.run.recipe.head["name"]
        return f"uncertainty: the head {name!r} of {self.run.root} gives no distribution over depths, so no spread is known."

    def plan_for(self, height: int, width: int) -> ViewPlan:
        """The view plan for an image: the dataset's crop if it has the size of the dataset's frames, else all of it."""
        plan = self.run.plan
        whole = [height, width] != self.run.info["frame"]
        return replace(plan, crop=None if whole else plan.crop, flips=self._tta)

    def predict(self, rgb: npt.NDArray[np.uint8]) -> Prediction:
        """Depth of an RGB uint8 image `(H, W, 3)`. Raises `UsageError` for another shape or dtype."""
        return self.predict_batch([rgb])[0]

    def predict_batch(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Prediction]:
        """Depth of RGB uint8 images `(H, W, 3)` of any sizes, whose views go through the encoder together.

        The same as `predict` on each, up to the rounding of another batch size. Raises `UsageError` as that does.
        """
        for rgb in images:
            if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
                raise UsageError(f"predict takes RGB uint8 (H, W, 3); got {rgb.dtype} {rgb.shape}.")
        if not images:
            return []
        plans = [self.plan_for(rgb.shape[0], rgb.shape[1]) for rgb in images]
        maps = [self._maps(layout, images, plans) for layout in self._layouts]
        predictions = []
        for number, (rgb, plan) in enumerate(zip(images, plans, strict=True)):
            patches = [means[number : number + 1] for means, _ in maps]
            variances = [part[number : number + 1] for _, part in maps if part is not None]
            size = (rgb.shape[0], rgb.shape[1])
            predictions.append(Prediction(patches, plan, size, self._upsample, variances if self.uncertainty else None))
        return predictions

    def _maps(
        self, layout: Layout, images: Sequence[npt.NDArray[np.uint8]], plans: Sequence[ViewPlan]
    ) -> tuple[Tensor, Tensor | None]:
        """Patch depths on the canvas `(N, Gh, Gw)` and, if asked for, their variance.

        The law of total variance over the views that share a patch, mirrored ones included: their weights are those with which
        their depths are averaged.
        """

        def views() -> Iterator[FloatArray]:
            for rgb, plan in zip(images, plans, strict=True):
                yield from layout.cut(canvas_of(rgb, replace(layout.plan, crop=plan.crop)))

        shape = (len(images), layout.views, *self.run.grid)
        means, variances = (None if part is None else part.reshape(shape) for part in self._encode(views()))
        assert means is not None
        combined = layout.combine(means)
        if variances is None:
            return combined, None
        means = means.double()
        second = layout.combine(variances + means * means) - layout.combine(means).square()
        return combined, second.clamp_min(0.0).float()

    def _encode(self, views: Iterable[FloatArray]) -> tuple[Tensor, Tensor | None]:
        """Patch depths of all views `(V, P)` and their variance or None, on the CPU; so many views at once as fit."""
        parts: list[tuple[Tensor, Tensor | None]] = []
        waiting: list[FloatArray] = []
        for view in views:
            waiting.append(view)
            if len(waiting) == self._views_at_once:
                parts.append(self._patches(np.stack(waiting)))
                waiting = []
        if waiting:
            parts.append(self._patches(np.stack(waiting)))
        variances = [variance for _, variance in parts if variance is not None]
        return torch.cat([depth for depth, _ in parts]), torch.cat(variances) if variances else None

    @torch.inference_mode()
    def _patches(self, views: FloatArray) -> tuple[Tensor, Tensor | None]:
        columns = self._encoder.encode(torch.from_numpy(np.ascontiguousarray(views.transpose(0, 3, 1, 2))))
        read = {name: columns[name].to(self._device) for name in self._head.reads(self._head.options)}
        if not self.uncertainty:
            return self._head.depth(read).float().cpu(), None
        distribution = self._head.distribution(read)
        if distribution is None:
            raise UsageError(self._no_distribution())
        return distribution.mean.float().cpu(), distribution.std.cpu().double().square()


def predict_files(
    predictor: Predictor, sources: Sequence[Source], output: Output, progress: Progress = SILENT
) -> Iterator[dict[str, Any]]:
    """Predict images, videos and stacks frame by frame, and write `output`; yields what was written for each frame.

    Frames are read when their turn comes and forgotten once they are written. Two sources of one name get numbers, so that
    nothing is overwritten. Raises `UsageError` before anything is read if the output asks for what there is not.
    """
    if Save.video in output.saves and not any(source.several for source in sources):
        raise UsageError("--save video: none of the inputs is a video or an array of several frames; use --save side-by-side.")
    if Save.uncertainty in output.saves and not predictor.uncertainty:
        raise UsageError("--save uncertainty needs Predictor(..., uncertainty=True).")
    return _predict_frames(predictor, sources, output, progress)


def _predict_frames(
    predictor: Predictor, sources: Sequence[Source], output: Output, progress: Progress
) -> Iterator[dict[str, Any]]:
    with Writer(output, tuple(predictor.run.labels)) as writer:
        for batch in batched(read_frames(sources, progress.say), predictor.batch):
            predictions = predictor.predict_batch([frame.rgb for frame in batch])
            for frame, prediction in zip(batch, predictions, strict=True):
                yield writer.write(frame, prediction)
                progress.advance()
            del batch, predictions, frame, prediction  # before the next images are read: they may be large
