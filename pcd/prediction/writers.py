"""The files of a prediction: each kind in one function, in strips of rows wherever the format allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenEXR

from pcd import depths
from pcd.datasets.base import Intrinsics
from pcd.errors import PredictionError, UsageError
from pcd.evaluation.pictures import Panel, depth_scale, is_wide, save_panels
from pcd.prediction.colours import MARGIN, Span, Survey, save_spread, shrink, side_by_side, survey
from pcd.prediction.png import write_png
from pcd.prediction.pointcloud import intrinsics_from_fov, write_ply
from pcd.prediction.result import FloatArray, Prediction, strips
from pcd.prediction.saves import DEFAULT, Save
from pcd.prediction.sources import Frame, Source
from pcd.prediction.video import VideoWriter


@dataclass(frozen=True)
class Output:
    """What is written where.

    Point clouds need the camera, either `intrinsics` in pixels or `fov`, the horizontal field of view in degrees, and hold
    every `stride`-th pixel. `span` fixes the colours of pictures in metres; by default each picture takes the 2nd to 98th
    percentile of its depths. Raises `UsageError` for values that cannot be used or that nothing asks for.
    """

    folder: Path
    saves: tuple[Save, ...] = DEFAULT
    intrinsics: Intrinsics | None = None
    fov: float | None = None
    stride: int = 1
    span: Span | None = None

    def __post_init__(self) -> None:
        cameras = [camera for camera in (self.intrinsics, self.fov) if camera is not None]
        if len(cameras) > 1:
            raise UsageError("--intrinsics and --fov both say what the camera is: give one of them.")
        if Save.ply in self.saves and not cameras:
            raise UsageError(
                "--save ply needs the camera: --intrinsics FX,FY,CX,CY in pixels, or --fov, the horizontal field of view in "
                "degrees."
            )
        if Save.ply not in self.saves and (cameras or self.stride != 1):
            raise UsageError("--intrinsics, --fov and --stride are for point clouds: add --save ply.")
        if self.fov is not None:
            intrinsics_from_fov(self.fov, (1, 1))
        if self.stride < 1:
            raise UsageError(f"stride {self.stride}: expected 1 (every pixel) or more.")
        if self.span is not None and not (0 <= self.span[0] < self.span[1] < math.inf):
            raise UsageError(f"range {self.span[0]:g},{self.span[1]:g}: expected NEAR,FAR in metres with 0 <= NEAR < FAR.")

    def camera(self, size: tuple[int, int]) -> Intrinsics:
        """The camera of an image of `size` (height, width)."""
        return self.intrinsics or intrinsics_from_fov(self.fov or math.nan, size)


@dataclass(frozen=True)
class Job:
    """One frame with its prediction, on the way to its files. `span` is that of the video it belongs to, if any."""

    frame: Frame
    prediction: Prediction
    output: Output
    labels: tuple[str, ...]
    video_span: Span | None = None

    def path(self, ending: str) -> Path:
        """Where a file of this frame goes."""
        return self.output.folder / f"{self.frame.name}{ending}"

    @cached_property
    def found(self) -> Survey:
        """Range of the depths, and a small map. Raises `PredictionError` unless all are finite."""
        found = survey(self.prediction.depth_rows, self.prediction.size)
        if not found.is_finite:
            raise PredictionError(f"{self.frame.source.path}: the prediction holds values that are not finite.")
        return found

    @cached_property
    def span(self) -> Span:
        """Metres of the first and last colour."""
        return self.output.span or self.video_span or depth_scale([self.found.small])

    @property
    def title(self) -> str:
        """Name, range and what must be said beside it."""
        notes = "".join(f" ({label})" for label in self.labels)
        return f"{self.frame.name}: {self.found.low:.2f} to {self.found.high:.2f} m{notes}"

    def rows(self) -> Iterator[FloatArray]:
        """The depth, strip by strip."""
        for top, bottom in strips(*self.prediction.size):
            yield self.prediction.depth_rows(top, bottom)


def _png(job: Job) -> dict[str, Any]:
    units, path = depths.units_for(job.found.high), job.path(".depth.png")
    write_png(path, job.prediction.size, 1, 16, (depths.encode(rows, units) for rows in job.rows()))
    return {"png": path, "units_per_metre": units}


def _write_npy(path: Path, size: tuple[int, int], rows: Iterator[FloatArray]) -> Path:
    with path.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": size})
        for strip in rows:
            handle.write(strip.astype("<f4", copy=False).tobytes())
    return path


def _npy(job: Job) -> dict[str, Any]:
    return {"npy": _write_npy(job.path(".npy"), job.prediction.size, job.rows())}


def _tiff(job: Job) -> dict[str, Any]:
    path = job.path(".depth.tiff")
    if not cv2.imwrite(str(path), job.prediction.depth):
        raise OSError(f"{path} could not be written")
    return {"tiff": path}


def _exr(job: Job) -> dict[str, Any]:
    path = job.path(".depth.exr")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Z": job.prediction.depth}).write(str(path))
    return {"exr": path}


def _picture(job: Job) -> dict[str, Any]:
    small = job.found.small
    panels = [Panel("image", shrink(job.frame.rgb, (small.shape[0], small.shape[1]))), Panel("predicted depth", small)]
    rows = [[panel] for panel in panels] if is_wide(job.prediction.size) else [panels]
    path = job.path(".picture.png")
    save_panels(path, rows, job.title, job.span)
    return {"picture": path}


def _side_by_side(job: Job) -> dict[str, Any]:
    path = job.path(".side-by-side.png")
    size, rows = side_by_side(job.frame.rgb, job.prediction.depth_rows, job.span)
    write_png(path, size, 3, 8, rows)
    return {"side-by-side": path}


def _ply(job: Job) -> dict[str, Any]:
    path, size = job.path(".ply"), job.prediction.size
    camera = job.output.camera(size)
    number = write_ply(path, job.frame.rgb, job.prediction, camera, job.output.stride, job.labels)
    return {"ply": path, "points": number}


def _uncertainty(job: Job) -> dict[str, Any]:
    prediction, size = job.prediction, job.prediction.size
    found = survey(prediction.std_rows, size)
    rows = (prediction.std_rows(top, bottom) for top, bottom in strips(*size))
    array = _write_npy(job.path(".uncertainty.npy"), size, rows)
    picture = job.path(".uncertainty.png")
    small = shrink(job.frame.rgb, (found.small.shape[0], found.small.shape[1]))
    notes = "".join(f" ({label})" for label in job.labels)
    save_spread(
        picture, small, found.small, f"{job.frame.name}: standard deviation {found.low:.2f} to {found.high:.2f} m{notes}"
    )
    return {"uncertainty": array, "uncertainty-picture": picture}


_WRITERS: dict[Save, Callable[[Job], dict[str, Any]]] = {
    Save.png: _png,
    Save.npy: _npy,
    Save.tiff: _tiff,
    Save.exr: _exr,
    Save.picture: _picture,
    Save.side_by_side: _side_by_side,
    Save.ply: _ply,
    Save.uncertainty: _uncertainty,
}


class Writer:
    """Writes predictions in the order of their frames. A context manager: a video is closed with it."""

    def __init__(self, output: Output, labels: tuple[str, ...] = ()) -> None:
        """`labels` are what must be said beside every depth of the run."""
        self._output, self._labels = output, labels
        self._source: Source | None = None
        self._span: Span | None = None
        self._video: VideoWriter | None = None
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()

    def write(self, frame: Frame, prediction: Prediction) -> dict[str, Any]:
        """Write everything asked for; returns image, frame number in a video, range in metres, and the paths by kind.

        Raises `UsageError` for intrinsics in pixels if the image is not of the first one's size, and `PredictionError` for a
        prediction that is not finite.
        """
        self._refuse_other_size(frame, prediction.size)
        if frame.source is not self._source:
            self._close_video()
            self._source, self._span = frame.source, None
        job = Job(frame, prediction, self._output, self._labels, self._span)
        if frame.source.several and self._span is None:
            self._span = self._video_span(job)
            job = Job(frame, prediction, self._output, self._labels, self._span)
        self._output.folder.mkdir(parents=True, exist_ok=True)
        written: dict[str, Any] = {"image": str(frame.source.path), "min": job.found.low, "max": job.found.high}
        if frame.source.several:
            written["frame"] = frame.number
        for save in dict.fromkeys(self._output.saves):
            files = _WRITERS[save](job) if save is not Save.video else self._add_to_video(job)
            written |= {kind: str(value) if isinstance(value, Path) else value for kind, value in files.items()}
        return written

    def _refuse_other_size(self, frame: Frame, size: tuple[int, int]) -> None:
        self._size = self._size or size
        if self._output.intrinsics is not None and size != self._size:
            raise UsageError(
                f"{frame.source.path} is {size[0]}x{size[1]} (height x width), the first image "
                f"{self._size[0]}x{self._size[1]}: intrinsics in pixels hold for one size. Predict them apart, or give --fov."
            )

    @staticmethod
    def _video_span(job: Job) -> Span:
        """Colours that stay the same through a video: the range of its first frame, and somewhat more."""
        low, high = depth_scale([job.found.small])
        reach = MARGIN * (high - low)
        return max(low - reach, 0.0), high + reach

    def _add_to_video(self, job: Job) -> dict[str, Any]:
        if not job.frame.source.several:
            return {}
        size, rows = side_by_side(job.frame.rgb, job.prediction.depth_rows, job.span)
        if self._video is None:
            path = self._output.folder / f"{job.frame.group}.side-by-side.mp4"
            self._video = VideoWriter(path, job.frame.source.rate, size)
        self._video.add(np.concatenate(list(rows)))
        return {"video": self._video.path}

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None
