"""What a dataset is to pcd: named samples in metres, NaN where there is no depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pcd.views import ViewPlan

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Intrinsics:
    """Pinhole camera of the stored frame, in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Sample:
    """One frame: `rgb` uint8 `(H, W, 3)`, `depth` float32 `(H, W)` in metres, NaN where there is none."""

    key: str
    rgb: npt.NDArray[np.uint8]
    depth: npt.NDArray[np.float32]
    intrinsics: Intrinsics | None = None


class DatasetOptions(BaseModel):
    """Keys of the `[dataset]` table that every dataset understands; a dataset adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    """At most this many samples of each list, the first ones."""


class Dataset(Protocol):
    """A dataset on disk (or made from a seed). Creating one reads lists, never images.

    Construction raises `MissingFileError` for a missing root or list and `DatasetError` for a malformed one, naming file and
    line; `load` raises `MissingFileError` or `SampleError` naming the file.
    """

    Options: ClassVar[type[DatasetOptions]]

    name: str
    family: str
    """Which protocol variants apply: `nyu`, `kitti` or `generic`."""
    synthetic: bool
    """True if the scenes are rendered: then every result says so."""
    depth_range: tuple[float, float]
    """Metres; the range in which this dataset is usually trained and scored."""
    units_per_metre: int
    """Resolution of the stored depth files, kept for the untouched ground truth."""
    notes: tuple[str, ...]
    """What a person should know about the lists, e.g. how many lines had no depth."""

    def keys(self, split: Split) -> tuple[str, ...]:
        """Stable names of the samples of an official list. `val` is empty unless the dataset defines one itself."""
        ...

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample."""
        ...

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of the stored depth map, from the file's header."""
        ...

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of every image or depth file of a list that is not there, by name only: nothing is opened.

        Empty if the dataset has no files.
        """
        ...

    def view_plan(self) -> ViewPlan:
        """The view plan of the literature for this dataset."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the samples, in plain JSON values and without absolute paths (a moved root is the same data)."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A dataset that knows which samples belong together (a scene, a drive) and must not be torn apart by a split."""

    def groups(self, split: Split) -> dict[str, str]:
        """Group of each key of an official list; empty if samples stand alone."""
        ...
