"""KITTI, Eigen split: raw images and annotated depth (Uhrig et al. 2017) by the list files of BTS.

Under the root, or wherever the options say, with what is looked for in order:

    eigen_train_files_with_gt.txt, eigen_test_files_with_gt.txt     `train_list`, `test_list`
    2011_09_26/DRIVE/image_02/data/0000000005.png                   in `image_root` or the root, there or in raw/
    DRIVE/proj_depth/groundtruth/image_02/0000000005.png            in `depth_root` or the root, there or in
                                                                    data_depth_annotated/, with or without train/ or val/
    2011_09_26/calib_cam_to_cam.txt                                 beside the images; optional

A line of a list is `IMAGE DEPTH FOCAL`; DEPTH is `None` for a frame without ground truth, which is counted and left out
(697 lines, 652 frames in the official test list). Depth files hold 1/256 m. If an image is listed as PNG and only a JPEG of
that name exists, the JPEG is read: KITTI is often kept so to save space, though the pixels are not quite the same.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pcd.datasets.base import DatasetOptions, Intrinsics, Sample, Split
from pcd.datasets.files import (
    checked_sample,
    depth_size,
    find_file,
    first_existing,
    read_depth_png,
    read_rgb,
    read_text,
    require_root,
)
from pcd.datasets.lists import ListedFrame, ListOptions, SplitTable, find_list, read_list
from pcd.depths import KITTI_UNITS
from pcd.errors import DatasetError
from pcd.views import ViewPlan

TRAIN_LIST = "eigen_train_files_with_gt.txt"
TEST_LIST = "eigen_test_files_with_gt.txt"
CALIBRATION = "calib_cam_to_cam.txt"
EXAMPLE = (
    "2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png "
    "2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png 721.5377"
)
LAYOUT = f"the lists {TRAIN_LIST} and {TEST_LIST}, the raw drives (2011_09_26/...) and data_depth_annotated/"

IMAGE_FOLDERS = ("", "raw")
DEPTH_FOLDERS = ("", "data_depth_annotated", "data_depth_annotated/train", "data_depth_annotated/val", "train", "val")

_DRIVE = re.compile(r"(?P<date>\d{4}_\d\d_\d\d)_drive_\d{4}_(sync|extract)")
_CAMERA = re.compile(r"image_0\d")


class KittiOptions(ListOptions):
    """Options of `[dataset]` for KITTI."""

    image_root: Path | None = None
    """Folder of the raw drives, if it is not the root."""
    depth_root: Path | None = None
    """Folder of the annotated depth, if it is not the root."""


def frame_key(image: str) -> str | None:
    """`.../DRIVE/image_02/data/N.png` to `DRIVE/N`; another camera is part of the key: `DRIVE/image_03/N`."""
    path = PurePosixPath(image)
    drive = next((part for part in path.parts if _DRIVE.fullmatch(part)), None)
    lens = next((part for part in path.parts if _CAMERA.fullmatch(part)), None)
    if drive is None or lens is None or not path.suffix:
        return None
    return f"{drive}/{path.stem}" if lens == "image_02" else f"{drive}/{lens}/{path.stem}"


def read_calibration(path: Path) -> dict[str, Intrinsics]:
    """The rectified cameras of a `calib_cam_to_cam.txt`: `image_02` to fx, fy, cx, cy of its `P_rect_02`.

    Raises `DatasetError` naming the line for a matrix that is not 12 numbers.
    """
    cameras: dict[str, Intrinsics] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        name, _, text = line.partition(":")
        if not name.startswith("P_rect_"):
            continue
        try:
            fx, _, cx, _, _, fy, cy, *rest = [float(value) for value in text.split()]
        except ValueError:
            rest = []
        if len(rest) != 5:
            raise DatasetError(
                f"{path}, line {number}: {name} is not a 3x4 matrix of numbers; fetch the calibration file again."
            )
        cameras[f"image_{name[-2:]}"] = Intrinsics(fx=fx, fy=fy, cx=cx, cy=cy)
    return cameras


class KittiDataset:
    """KITTI with the Eigen lists. See the module's text for where files are looked for."""

    Options: ClassVar[type[DatasetOptions]] = KittiOptions

    name = "kitti"
    family = "kitti"
    synthetic = False
    units_per_metre = KITTI_UNITS

    def __init__(self, options: KittiOptions) -> None:
        root = _optional_root(options)
        train = read_list(find_list(options.train_list, "train_list", TRAIN_LIST, root), frame_key, EXAMPLE)
        test = read_list(find_list(options.test_list, "test_list", TEST_LIST, root), frame_key, EXAMPLE)
        self._table = SplitTable[ListedFrame]("kitti", {"train": train.frames, "test": test.frames}, options.limit)
        self._image_folders = _folders(root, options.image_root, "image_root", "the raw drives (2011_09_26/...)", IMAGE_FOLDERS)
        self._depth_folders = _folders(root, options.depth_root, "depth_root", "the annotated depth", DEPTH_FOLDERS)
        self._cameras, uncalibrated = self._read_cameras()
        self.depth_range: tuple[float, float] = options.depth_range or (1e-3, 80.0)
        self._jpeg = self._first_is_jpeg()
        self.notes: tuple[str, ...] = (*train.notes(), *test.notes(), *self._table.notes())
        if self._jpeg:
            self.notes += ("images are listed as PNG and stored as JPEG",)
        if uncalibrated:
            self.notes += (f"no {CALIBRATION} for {', '.join(uncalibrated)}: focal length from the list, centre of the image",)

    def keys(self, split: Split) -> tuple[str, ...]:
        """Keys of an official list; `val` is empty."""
        return self._table.keys(split)

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample. Raises `MissingFileError` or `SampleError`."""
        frame = self._table.row(split, key)
        image = find_file(self._image_places(frame), f"kitti: {frame.image}", self._advice(split, frame, "image_root"))
        depth = self._find_depth(split, frame)
        rgb, metres = read_rgb(image), read_depth_png(depth, KITTI_UNITS)
        return checked_sample(key, (image, rgb), (depth, metres), self._camera(frame, rgb.shape))

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of the stored depth map, from its header."""
        return depth_size(self._find_depth(split, self._table.row(split, key)))

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of every image or depth file of a list that is nowhere it is looked for."""
        missing: list[tuple[str, Path]] = []
        for frame in self._table.rows(split):
            for places in (self._image_places(frame), self._depth_places(frame)):
                if first_existing(places) is None:
                    missing.append((frame.key, places[0]))
        return missing

    def view_plan(self) -> ViewPlan:
        """The whole frame resized to 336x1344 and cut into four square tiles (paper: section 3.1)."""
        return ViewPlan(canvas=(336, 1344), grid=(1, 4))

    def identity(self) -> dict[str, Any]:
        """The rows of each list, and whether the images are JPEG copies."""
        return {"name": self.name, "jpeg_copies": self._jpeg, "lists": self._table.identity()}

    def _image_places(self, frame: ListedFrame) -> list[Path]:
        listed = [folder / frame.image for folder in self._image_folders]
        copies = [path.with_suffix(".jpg") for path in listed if path.suffix == ".png"]
        return listed + copies

    def _depth_places(self, frame: ListedFrame) -> list[Path]:
        return [folder / frame.depth for folder in self._depth_folders]

    def _find_depth(self, split: Split, frame: ListedFrame) -> Path:
        return find_file(self._depth_places(frame), f"kitti: {frame.depth}", self._advice(split, frame, "depth_root"))

    def _advice(self, split: Split, frame: ListedFrame, option: str) -> str:
        return f"The {split} list names it in line {frame.line}; set dataset.{option} to the folder it is in."

    def _first_is_jpeg(self) -> bool:
        """Whether the first image that exists under either list is a JPEG in place of a PNG."""
        for split in ("train", "test"):
            for frame in self._table.rows(split)[:1]:
                found = first_existing(self._image_places(frame))
                if found is not None:
                    return found.suffix != PurePosixPath(frame.image).suffix
        return False

    def _read_cameras(self) -> tuple[dict[str, dict[str, Intrinsics]], list[str]]:
        """Cameras by date, and the dates without a calibration file."""
        frames = (*self._table.rows("train"), *self._table.rows("test"))
        dates = sorted({_date(frame) for frame in frames})
        files = {date: first_existing([folder / date / CALIBRATION for folder in self._image_folders]) for date in dates}
        cameras = {date: read_calibration(path) for date, path in files.items() if path is not None}
        return cameras, [date for date, path in files.items() if path is None]

    def _camera(self, frame: ListedFrame, size: tuple[int, ...]) -> Intrinsics | None:
        calibrated = self._cameras.get(_date(frame))
        if calibrated is None:
            return Intrinsics(fx=frame.focal, fy=frame.focal, cx=(size[1] - 1) / 2, cy=(size[0] - 1) / 2)
        return calibrated.get(_lens(frame))


def _date(frame: ListedFrame) -> str:
    return frame.key[: len("2011_09_26")]


def _lens(frame: ListedFrame) -> str:
    return next(part for part in PurePosixPath(frame.image).parts if _CAMERA.fullmatch(part))


def _optional_root(options: KittiOptions) -> Path | None:
    """The root, which may be absent if everything else is given."""
    rest = (options.train_list, options.test_list, options.image_root, options.depth_root)
    if options.root is None and None not in rest:
        return None
    return require_root(options.root, "kitti", LAYOUT)


def _folders(root: Path | None, given: Path | None, option: str, what: str, usual: tuple[str, ...]) -> list[Path]:
    base = require_root(given, "kitti", what, option) if given is not None or root is None else root
    return [base / name for name in usual if (base / name).is_dir()]
