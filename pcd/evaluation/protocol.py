"""How predictions are scored, as data: crop, range, resolution, averaging, TTA, alignment.

Published depth numbers differ silently in all of these. Here a number is only ever shown with its protocol: `Protocol.label`
is the name, followed by whatever was changed from what the name stands for; `Protocol.describe()` says all of it in words.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pcd import regions
from pcd.errors import SampleError, UsageError
from pcd.regions import Region

Family = Literal["nyu", "kitti", "generic"]
Resolution = Literal["canvas", "native"]
RegionName = Literal["none", "garg", "eigen-kitti", "eigen-nyu", "depthclip-nyu"]
Averaging = Literal["image", "tile", "pixels"]
Upsample = Literal["nearest", "bilinear", "bilinear-align-corners"]
Outside = Literal["edge", "zero"]
Alignment = Literal["none", "median", "lsq-depth", "lsq-disparity", "lsq-sqrt-disparity"]

_WORDS: dict[str, str] = {
    "garg": "the Garg crop",
    "eigen-kitti": "the Eigen crop of KITTI",
    "eigen-nyu": "rows 45:471, columns 41:601",
    "depthclip-nyu": "rows 56:471, columns 60:601",
    "image": "metrics per image, then their mean",
    "tile": "metrics per tile, then their mean over all tiles of all images",
    "pixels": "metrics over the pixels of all images pooled",
    "median": "each prediction scaled to the median of its ground truth",
    "lsq-depth": "scale and shift of each prediction fitted in depth",
    "lsq-disparity": "scale and shift of each prediction fitted in disparity",
    "lsq-sqrt-disparity": "scale and shift of each prediction fitted in square-root disparity",
    "nearest": "patches upsampled by nearest neighbour",
    "bilinear": "patches upsampled bilinearly",
    "bilinear-align-corners": "patches upsampled bilinearly with aligned corners",
    "edge": "pixels outside the view crop take the nearest predicted one",
    "zero": "pixels outside the view crop are predicted as 0",
}
_DEPTHCLIP_NYU: Region = (56, 471, 60, 601)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to turn predictions into numbers. Depths in metres.

    A pixel counts if it has ground truth with `min_depth < gt < max_depth` (`<=` on the sides that are inclusive), lies in
    `region` of the frame (after `gt_crop`), and is predicted above `min_prediction` and at most `max_prediction`, where given.
    Limits are compared in float32, as depths are stored: 1 mm is not more than 1e-3 m. Copies with other values
    (`dataclasses.replace`) show every change in their `label`. Raises `UsageError` for values that contradict each other.
    """

    name: str
    words: str
    family: Family
    resolution: Resolution = "native"
    frame: tuple[int, int] | None = None
    """(height, width) that stored frames must have for the region to mean anything, or None."""
    gt_crop: Literal["none", "kb"] = "none"
    region: RegionName = "none"
    min_depth: float = math.nan
    max_depth: float = math.nan
    min_inclusive: bool = False
    max_inclusive: bool = False
    min_prediction: float | None = None
    max_prediction: float | None = None
    clamp: bool = True
    """Whether predictions are limited to `[min_depth, max_depth]` before they are compared."""
    upsample: Upsample = "bilinear"
    tta: bool = True
    """Whether the prediction is the mean of those of the image and of its mirror image."""
    alignment: Alignment = "none"
    averaging: Averaging = "image"
    outside: Outside = "edge"
    unit: Literal["m"] = "m"
    declared: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), repr=False)
    """What the name stands for; filled in on creation and kept by copies."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed = get_args(_TYPES.get(field.name))
            if allowed and getattr(self, field.name) not in allowed:
                raise UsageError(
                    f"protocol {self.name}: {field.name} = {getattr(self, field.name)!r}; known: {', '.join(allowed)}."
                )
        if self.resolution == "canvas" and (self.gt_crop != "none" or self.region not in ("none", "garg", "eigen-kitti")):
            raise UsageError(
                f"protocol {self.name}: region {self.region!r} is in pixels of the stored frame, not of the canvas."
            )
        if self.averaging == "tile" and self.resolution != "canvas":
            raise UsageError(f"protocol {self.name}: tiles exist on the canvas only; average per image or over pixels.")
        if not self.clamp and self.min_prediction is None:
            raise UsageError(
                f"protocol {self.name}: predictions must be clamped or masked from below, or logarithms may not exist."
            )
        if not self.declared:
            object.__setattr__(self, "declared", tuple(self._values().items()))

    def _values(self) -> dict[str, Any]:
        hidden = ("name", "words", "declared")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in hidden}

    @property
    def changes(self) -> dict[str, Any]:
        """The values that are not what the name stands for."""
        declared = dict(self.declared)
        return {key: value for key, value in self._values().items() if value != declared[key]}

    @property
    def label(self) -> str:
        """The name with its changes, e.g. `eigen-nyu[upsample=nearest,tta=no]`; `protocols.get_protocol` reads it back."""
        if not self.changes:
            return self.name
        return f"{self.name}[{','.join(f'{key}={_plain(value)}' for key, value in self.changes.items())}]"

    def describe(self) -> str:
        """All of it in words, one sentence."""
        low, high = ("<=" if side else "<" for side in (self.min_inclusive, self.max_inclusive))
        where = [{"none": "", "kb": "the KITTI benchmark crop (352x1216)"}[self.gt_crop], _WORDS.get(self.region, "")]
        predicted = [f"above {self.min_prediction:g} m" if self.min_prediction is not None else ""]
        predicted += [f"at most {self.max_prediction:g} m" if self.max_prediction is not None else ""]
        parts = [
            self.words,
            f"ground truth {'on the canvas' if self.resolution == 'canvas' else 'as stored'}"
            + "".join(f", {place}" for place in where if place),
            f"{self.min_depth:g} {low} depth {high} {self.max_depth:g} m",
            "only pixels predicted " + " and ".join(filter(None, predicted)) if any(predicted) else "",
            "predictions clamped to that range" if self.clamp else "predictions not clamped",
            _WORDS[self.upsample],
            _WORDS[self.outside] if self.resolution == "native" else "",
            "flip TTA" if self.tta else "no TTA",
            _WORDS.get(self.alignment, "no alignment"),
            _WORDS[self.averaging],
            "in metres",
        ]
        return "; ".join(filter(None, parts)) + "."

    def as_json(self) -> dict[str, Any]:
        """Plain values, the label and the description included."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in self._values().items()}
        return {"name": self.name, "label": self.label, "description": self.describe(), **values}

    def region_in(self, height: int, width: int) -> Region:
        """The scored region of a `height x width` frame or canvas. Raises `SampleError` if the frame has the wrong size."""
        if self.frame is not None and (height, width) != self.frame:
            raise SampleError(
                f"a frame of {height}x{width} cannot be scored under {self.name}, which is defined on "
                f"{self.frame[0]}x{self.frame[1]} frames; use `eigen` of the generic family (a `folder` dataset) instead."
            )
        top, left = 0, 0
        if self.gt_crop == "kb":
            if height < regions.KB_SIZE[0] or width < regions.KB_SIZE[1]:
                raise SampleError(
                    f"a frame of {height}x{width} is smaller than the 352x1216 crop of {self.name}; use eigen-kitti-garg."
                )
            top, bottom, left, right = regions.kb(height, width)
            height, width = bottom - top, right - left
        inner = _region(self.region, height, width)
        return top + inner[0], top + inner[1], left + inner[2], left + inner[3]


_TYPES: dict[str, Any] = {
    "family": Family,
    "resolution": Resolution,
    "region": RegionName,
    "upsample": Upsample,
    "alignment": Alignment,
    "averaging": Averaging,
    "outside": Outside,
}


def _region(name: str, height: int, width: int) -> Region:
    """Rows and columns; those in pixels end where the frame ends, as slices do."""
    if name == "garg":
        return regions.garg(height, width)
    if name == "eigen-kitti":
        return regions.eigen_kitti(height, width)
    boxes: dict[str, Region] = {"eigen-nyu": regions.EIGEN_NYU, "depthclip-nyu": _DEPTHCLIP_NYU}
    top, bottom, left, right = boxes.get(name, (0, height, 0, width))
    return min(top, height), min(bottom, height), min(left, width), min(right, width)


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
