"""Samples as pictures: RGB, ground truth, prediction and error, for a figure on paper and for the page's slider."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pcd.evaluation.pictures import COLOURS, ERROR_COLOURS, UNSURE_COLOURS, depth_scale, is_wide, paint, resampled
from pcd.reports.drawing import style

Map = npt.NDArray[np.float32]
Rgb = npt.NDArray[np.uint8]
WIDTH = 640
"""Pixels of a picture in the page."""
QUALITY = 88
READOUT = 160
"""Columns of the maps whose values the page can tell."""
SPARSE = 1 / 3
"""Ground truth in a smaller share of the pixels is drawn thicker."""
INCHES, GAP, LINE, BARS = 10.4, 0.06, 0.24, 0.7
"""Width of the figure of samples, between its panels, of a line of text, and of the scales."""
_TITLES = {"rgb": "image", "truth": "ground truth", "prediction": "prediction", "error": "prediction - truth"}


@dataclass(frozen=True)
class Predicted:
    """One run's prediction of a sample, in metres `(H, W)`, with its standard deviation if there is one, and its scores."""

    depth: Map
    std: Map | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """A chosen sample: `rule` says how (best, median, worst), `rgb` is None if the image is not at hand."""

    key: str
    rule: str
    rgb: Rgb | None
    truth: Map
    predicted: dict[str, Predicted] = field(default_factory=dict)
    """By the name of the run."""


@dataclass(frozen=True)
class Scales:
    """One scale in metres for all depths of a report, one for all errors, one for all standard deviations."""

    depth: tuple[float, float]
    error: float
    std: float


def scales_of(samples: Sequence[Sample]) -> Scales:
    """2nd and 98th percentile of all depths; 98th percentile of the absolute error and of the standard deviation."""
    found = [p for sample in samples for p in sample.predicted.values()]
    depth = depth_scale([sample.truth for sample in samples] + [p.depth for p in found])
    errors = [np.abs(p.depth - s.truth) for s in samples for p in s.predicted.values()]
    stds = [p.std for p in found if p.std is not None]
    return Scales(depth, _high(errors), _high(stds))


def _high(maps: Sequence[Map]) -> float:
    values = np.concatenate([np.zeros(0, dtype=np.float32), *(part[np.isfinite(part)] for part in maps)])
    return max(float(np.percentile(values, 98)), 1e-3) if values.size else 1.0


def shrink(depth: Map, width: int) -> Map:
    """A map at most `width` wide: each cell is the mean of its valid pixels, so that sparse depth stays visible."""
    factor = -(-depth.shape[1] // width)
    return depth if factor <= 1 else np.asarray(resampled(depth, (-(-depth.shape[0] // factor), -(-depth.shape[1] // factor))))


def thicken(depth: Map) -> Map:
    """Depth spread to neighbours that have none, for the eye only: a LiDAR's points are too small to be seen."""
    filled = cv2.dilate(np.where(np.isfinite(depth), depth, 0).astype(np.float32), np.ones((3, 3), np.uint8))
    return np.where(np.isfinite(depth), depth, np.where(filled > 0, filled, np.nan)).astype(np.float32)


def layers(sample: Sample, predicted: Predicted, scales: Scales) -> dict[str, Rgb]:
    """The pictures of a sample at page size: `rgb` and `std` only if there are any."""
    width = sample.truth.shape[1]
    factor = -(-width // WIDTH)
    found: dict[str, Rgb] = {}
    if sample.rgb is not None:
        size = (-(-width // factor), -(-sample.truth.shape[0] // factor))
        found["rgb"] = np.asarray(cv2.resize(sample.rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    sparse = np.isfinite(sample.truth).mean() < SPARSE
    truth, error = shrink(sample.truth, WIDTH), shrink(predicted.depth - sample.truth, WIDTH)
    found["truth"] = paint(thicken(truth) if sparse else truth, scales.depth)
    found["prediction"] = paint(shrink(predicted.depth, WIDTH), scales.depth)
    found["error"] = paint(_thick_error(error) if sparse else error, (-scales.error, scales.error), ERROR_COLOURS)
    if predicted.std is not None:
        found["std"] = paint(shrink(predicted.std, WIDTH), (0, scales.std), UNSURE_COLOURS)
    return found


def _thick_error(error: Map) -> Map:
    """Signed, so both sides of zero are spread by themselves and the larger one wins."""
    far = np.nan_to_num(thicken(np.where(error > 0, error, np.nan).astype(np.float32)))
    near = np.nan_to_num(thicken(np.where(error <= 0, -error + 1e-6, np.nan).astype(np.float32)))
    joined = np.where(far >= near, far, -near)
    return np.where((far > 0) | (near > 0), joined, np.nan).astype(np.float32)


def data_uri(picture: Rgb) -> str:
    """A picture inside the page, as WebP."""
    written, data = cv2.imencode(".webp", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    assert written
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()


def readout(depth: Map) -> dict[str, object]:
    """A map for the page to read values from: at most `READOUT` wide, little-endian uint16 in base64, 0 for none.

    In millimetres, or centimetres if depths go beyond 65 m: `units` per metre.
    """
    small = shrink(depth, READOUT)
    units = 1000 if np.nanmax(small, initial=0) < 65 else 100
    stored = np.nan_to_num(small * units, nan=0).round().clip(0, 65535).astype("<u2")
    data = base64.b64encode(stored.tobytes()).decode()
    return {"width": small.shape[1], "height": small.shape[0], "units": units, "data": data}


def figure_of(samples: Sequence[Sample], run: str, scales: Scales) -> Figure:
    """Image, ground truth, prediction and error of each sample, one scale in metres for all depths (the paper's figures 3, 4).

    Four in a row, or two by two for wide images.
    """
    found = [layers(sample, sample.predicted[run], scales) for sample in samples]
    shown = [name for name in _TITLES if all(name in pictures for pictures in found)]
    height, width = found[0]["truth"].shape[:2]
    columns = 2 if is_wide((height, width)) else len(shown)
    lines = -(-len(shown) // columns)
    wide = (INCHES - GAP * (columns - 1)) / columns
    high = wide * height / width
    block = LINE + lines * (high + GAP)
    total = LINE + len(samples) * block + BARS
    with style():
        figure = Figure(figsize=(INCHES, total))
        FigureCanvasAgg(figure)
        for number, (sample, pictures) in enumerate(zip(samples, found, strict=True)):
            top = total - LINE - number * block
            score = sample.predicted[run].scores["abs_rel"]
            _write(figure, 0, top - 0.5 * LINE, f"{sample.rule}: {sample.key}, AbsRel {score:.3f}")
            for at, name in enumerate(shown):
                left, bottom = (at % columns) * (wide + GAP), top - LINE - (at // columns) * (high + GAP) - high
                axis = figure.add_axes((left / INCHES, bottom / total, wide / INCHES, high / total))
                axis.imshow(pictures[name], interpolation="nearest", aspect="auto")
                axis.set_axis_off()
        titles = [_TITLES[name] for name in shown]
        if lines == 1:
            for at, title in enumerate(titles):
                _write(figure, at * (wide + GAP), total - 0.5 * LINE, title)
        else:
            _write(figure, 0, total - 0.5 * LINE, "in reading order: " + ", ".join(titles))
        _bars(figure, scales, total)
    return figure


def _write(figure: Figure, left: float, bottom: float, text: str) -> None:
    """A line of text, placed in inches."""
    figure.text(left / INCHES, bottom / figure.get_figheight(), text, fontsize=9, va="center")


def _bars(figure: Figure, scales: Scales, total: float) -> None:
    """Both scales below the panels, side by side."""
    for left, label, low, high, colours in (
        (0.5, "depth in metres", *scales.depth, COLOURS),
        (0.5 + INCHES / 2, "error in metres (red: too near)", -scales.error, scales.error, ERROR_COLOURS),
    ):
        axis = figure.add_axes((left / INCHES, (BARS - 0.25) / total, (INCHES / 2 - 1) / INCHES, 0.12 / total))
        mappable = ScalarMappable(Normalize(low, high), colours)
        figure.colorbar(mappable, cax=axis, label=label, orientation="horizontal")
