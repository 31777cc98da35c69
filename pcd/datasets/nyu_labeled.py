"""NYU Depth v2, the official labelled file: 1449 frames, 795 for training and 654 for testing.

`nyu_depth_v2_labeled.mat` is HDF5 (MATLAB 7.3) with reversed axes: `images` (1449, 3, 640, 480) uint8, `rawDepths` and
`depths` (1449, 640, 480) float32 metres, 0 where the sensor saw nothing (`depths` is in-painted and has no holes).
`splits.mat` is MATLAB 5 with the 1-based indices `trainNdxs` and `testNdxs`. Both readers are optional dependencies.

The images have a white frame a few pixels wide, as published; the usual crop removes it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pcd.datasets.base import Intrinsics, Sample, Split
from pcd.datasets.files import checked_sample
from pcd.datasets.lists import SplitTable
from pcd.errors import DatasetError, MissingFileError, SampleError, UsageError
from pcd.regions import NYU_SIZE

LABELED_FILE = "nyu_depth_v2_labeled.mat"
DEPTHS = {"raw": "rawDepths", "filled": "depths"}
INDICES: dict[Split, str] = {"train": "trainNdxs", "test": "testNdxs"}

CAMERA = Intrinsics(fx=518.857901, fy=519.469611, cx=325.582449, cy=253.736166)
"""Colour camera of the 480x640 frames, from the dataset's own toolbox."""


@dataclass(frozen=True)
class LabeledFrame:
    """A frame by its 1-based index in the file, as `splits.mat` counts."""

    index: int

    @property
    def key(self) -> str:
        """`labeled/0001` to `labeled/1449`."""
        return f"labeled/{self.index:04d}"

    def facts(self) -> list[Any]:
        """The index: the file is the same for everybody."""
        return [self.index]


class LabeledSource:
    """Frames of the labelled file. Creating one reads the split file and the shapes of the arrays."""

    layout = "labeled"

    def __init__(self, mat: Path, splits: Path, depth: Literal["raw", "filled"], limit: int | None) -> None:
        self._mat = mat
        self._depths = DEPTHS[depth]
        self._shape = self._read_shape()
        frames = {split: read_indices(splits, name, self._shape[0]) for split, name in INDICES.items()}
        self.table = SplitTable[LabeledFrame]("nyu", frames, limit)
        self.notes = self.table.notes()

    def load(self, split: Split, key: str) -> Sample:
        """Read one frame. Raises `MissingFileError` if the file has gone, `SampleError` if it cannot be read."""
        index = self.table.row(split, key).index - 1
        try:
            with _open(self._mat) as file:
                rgb = np.ascontiguousarray(file["images"][index].transpose(2, 1, 0))
                stored = np.ascontiguousarray(file[self._depths][index].T).astype(np.float32)
        except DatasetError:
            raise
        except OSError as error:
            raise SampleError(f"{self._mat}: frame {index + 1} cannot be read: {error}.") from error
        metres = np.where(np.isfinite(stored) & (stored > 0), stored, np.float32(np.nan))
        place = self._mat.with_name(f"{self._mat.name} ({self._depths}, frame {index + 1})")
        return checked_sample(key, (place, rgb), (place, metres), camera(CAMERA.fx, rgb.shape))

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of the frames."""
        self.table.row(split, key)
        return self._shape[3], self._shape[2]

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """Every key with the labelled file if that has gone, else nothing."""
        return [] if self._mat.is_file() else [(key, self._mat) for key in self.table.keys(split)]

    def _read_shape(self) -> tuple[int, int, int, int]:
        """(frames, 3, width, height) of `images`, after checking that the depth maps agree with it."""
        with _open(self._mat) as file:
            found = {name: file[name].shape if name in file else None for name in ("images", self._depths)}
        images, depths = found["images"], found[self._depths]
        if images is None or depths is None or len(images) != 4 or images[1] != 3 or depths != (images[0], *images[2:]):
            raise DatasetError(
                f"{self._mat}: found arrays {found}; expected images (1449, 3, 640, 480) and {self._depths} (1449, 640, 480), "
                f"as in the official {LABELED_FILE}."
            )
        return images[0], images[1], images[2], images[3]


def camera(focal: float, size: tuple[int, ...]) -> Intrinsics | None:
    """The colour camera of an NYU frame of `size` (height, width) with a focal length in pixels.

    None for a frame of another size than 480x640: the principal point is known for that one only.
    """
    if size[:2] != NYU_SIZE:
        return None
    return Intrinsics(fx=focal, fy=focal * CAMERA.fy / CAMERA.fx, cx=CAMERA.cx, cy=CAMERA.cy)


def read_indices(path: Path, name: str, frames: int) -> list[LabeledFrame]:
    """The frames of one variable of `splits.mat`. Raises `DatasetError` unless it holds distinct numbers from 1 to `frames`."""
    loader = _library("scipy.io")
    try:
        content = loader.loadmat(path, variable_names=[name])
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise DatasetError(f"{path} is not a MATLAB 5 file: {error}. Expected the splits.mat of the NYU page.") from error
    if name not in content:
        raise DatasetError(f"{path} has no variable {name}; expected the splits.mat of the NYU page.")
    indices: list[int] = np.asarray(content[name]).ravel().astype(np.int64).tolist()
    wrong = [index for index in indices if not 1 <= index <= frames]
    if wrong or len(set(indices)) != len(indices):
        what = f"index {wrong[0]}" if wrong else "an index twice"
        raise DatasetError(
            f"{path}: {name} holds {what}; expected distinct numbers from 1 to {frames}, the frames of the .mat."
        )
    return [LabeledFrame(index) for index in indices]


def _open(path: Path) -> Any:
    h5py = _library("h5py")
    if not path.is_file():
        raise MissingFileError(f"{path} is not there; set dataset.mat to the labelled NYU file, or dataset.root to its folder.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(
            f"{path} is not a whole HDF5 file ({error}); expected the official {LABELED_FILE}, 2.8 GB."
        ) from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UsageError(
            f'the labelled NYU files need {package}, which is not installed ({error}): pip install "pcd-depth[nyu-mat]"'
        ) from error
