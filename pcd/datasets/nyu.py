"""NYU Depth v2: the "sync" layout of BTS (Lee et al. 2019), and the official labelled file (see `nyu_labeled`).

The sync layout under the root, with what is looked for in order:

    nyudepthv2_train_files_with_gt.txt      lists; `train_list` and `test_list` name others
    nyudepthv2_test_files_with_gt.txt
    SCENE/rgb_00045.jpg, SCENE/sync_depth_00045.png
        train: in ROOT, ROOT/sync, ROOT/official_splits/train, or in `train_root` alone
        test:  in ROOT, ROOT/official_splits/test, ROOT/test, or in `test_root` alone

A line of a list is `/SCENE/rgb_00045.jpg /SCENE/sync_depth_00045.png 518.8579` (the leading slash is optional); depth files
hold millimetres.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Protocol

from pcd.datasets.base import DatasetOptions, Sample, Split
from pcd.datasets.files import checked_sample, depth_size, find_file, first_existing, read_depth_png, read_rgb, require_root
from pcd.datasets.lists import ListedFrame, ListOptions, SplitTable, find_list, read_list
from pcd.datasets.nyu_labeled import LABELED_FILE, LabeledSource, camera
from pcd.depths import MILLIMETRES
from pcd.errors import MissingFileError, UsageError
from pcd.views import ViewPlan

TRAIN_LIST = "nyudepthv2_train_files_with_gt.txt"
TEST_LIST = "nyudepthv2_test_files_with_gt.txt"
EXAMPLE = "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579"
LAYOUT = f"the lists {TRAIN_LIST} and {TEST_LIST} and the scenes they name, or with {LABELED_FILE} and splits.mat"


class NyuOptions(ListOptions):
    """Options of `[dataset]` for NYU Depth v2."""

    layout: Literal["auto", "sync", "labeled"] = "auto"
    """`auto`: sync if a list is there, else labelled."""
    train_root: Path | None = None
    test_root: Path | None = None
    mat: Path | None = None
    """The labelled file, if it is not in the root under its own name."""
    splits: Path | None = None
    """The `splits.mat` of the labelled file, if it is not in the root."""
    depth: Literal["raw", "filled"] = "raw"
    """Sensor depth with holes, or the labelled file's in-painted depth."""


class Source(Protocol):
    """Where the samples come from: one of the two layouts."""

    layout: str
    notes: tuple[str, ...]
    table: SplitTable[Any]

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample."""
        ...

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of a depth map."""
        ...

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of what is not there."""
        ...


def frame_key(image: str) -> str | None:
    """`SCENE/rgb_00045.jpg` to `SCENE/00045`."""
    path = PurePosixPath(image)
    return str(path.parent / path.stem.removeprefix("rgb_")) if path.suffix else None


class SyncSource:
    """Frames named by the two list files."""

    layout = "sync"

    def __init__(self, options: NyuOptions) -> None:
        root = _optional_root(options)
        if options.depth != "raw":
            raise UsageError(
                f"nyu: dataset.depth = {options.depth!r} is only in the labelled file; set dataset.layout to labeled."
            )
        train = read_list(find_list(options.train_list, "train_list", TRAIN_LIST, root), frame_key, EXAMPLE)
        test = read_list(find_list(options.test_list, "test_list", TEST_LIST, root), frame_key, EXAMPLE)
        self.table = SplitTable[ListedFrame]("nyu", {"train": train.frames, "test": test.frames}, options.limit)
        self.notes: tuple[str, ...] = (*train.notes(), *test.notes(), *self.table.notes())
        self._folders: dict[Split, list[Path]] = {
            "train": _folders(root, options.train_root, "train_root", ("", "sync", "official_splits/train")),
            "test": _folders(root, options.test_root, "test_root", ("", "official_splits/test", "test")),
        }

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample. Raises `MissingFileError` or `SampleError`."""
        frame = self.table.row(split, key)
        image, depth = self._find(split, frame, frame.image), self._find(split, frame, frame.depth)
        rgb, metres = read_rgb(image), read_depth_png(depth, MILLIMETRES)
        return checked_sample(key, (image, rgb), (depth, metres), camera(frame.focal, rgb.shape))

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of a depth map, from its header."""
        frame = self.table.row(split, key)
        return depth_size(self._find(split, frame, frame.depth))

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of what is not there."""
        wanted = [(row.key, self._places(split, name)) for row in self.table.rows(split) for name in (row.image, row.depth)]
        return [(key, places[0]) for key, places in wanted if first_existing(places) is None]

    def _places(self, split: Split, name: str) -> list[Path]:
        return [folder / name for folder in self._folders[split]]

    def _find(self, split: Split, frame: ListedFrame, name: str) -> Path:
        advice = f"The {split} list names it in line {frame.line}; set dataset.{split}_root to the folder it is in."
        return find_file(self._places(split, name), f"nyu: {name}", advice)


def _optional_root(options: NyuOptions) -> Path | None:
    """The root, which may be absent if everything else is given."""
    rest = (options.train_list, options.test_list, options.train_root, options.test_root)
    if options.root is None and None not in rest:
        return None
    return require_root(options.root, "nyu", LAYOUT)


def _folders(root: Path | None, given: Path | None, option: str, usual: tuple[str, ...]) -> list[Path]:
    if given is not None or root is None:
        return [require_root(given, "nyu", "the scenes that the list names", option)]
    folders = [root / name for name in usual]
    return [folder for folder in folders if folder.is_dir()]


def _source(options: NyuOptions) -> Source:
    layout = options.layout
    if layout == "auto":
        root = options.root or Path()
        lists = options.train_list or options.test_list or first_existing([root / TRAIN_LIST, root / TEST_LIST])
        layout = "sync" if lists else "labeled"
        if not lists and not options.mat and not (root / LABELED_FILE).is_file():
            require_root(options.root, "nyu", LAYOUT)
            raise MissingFileError(
                f"nyu: {root} holds neither layout; expected a folder (--root, dataset.root) with {LAYOUT}. "
                "Lists and files elsewhere are named by dataset.train_list, dataset.test_list, dataset.mat and dataset.splits."
            )
    _refuse_unused(options, layout)
    if layout == "sync":
        return SyncSource(options)
    return LabeledSource(_labeled_file(options, options.mat, LABELED_FILE), _splits_file(options), options.depth, options.limit)


def _refuse_unused(options: NyuOptions, layout: str) -> None:
    """Options of the other layout would be ignored: say so instead."""
    other = ("mat", "splits") if layout == "sync" else ("train_list", "test_list", "train_root", "test_root")
    for option in other:
        if getattr(options, option) is not None:
            raise UsageError(f"nyu: dataset.{option} has no meaning for the {layout} layout; remove it or set dataset.layout.")


def _splits_file(options: NyuOptions) -> Path:
    return _labeled_file(options, options.splits, "splits.mat")


def _labeled_file(options: NyuOptions, given: Path | None, usual_name: str) -> Path:
    option = "splits" if usual_name == "splits.mat" else "mat"
    path = given or require_root(options.root, "nyu", LAYOUT) / usual_name
    return find_file([path], f"nyu: {usual_name}", f"Set dataset.{option}, or --root (dataset.root) to its folder.")


class NyuDataset:
    """NYU Depth v2 in either layout. See the module's text for where files are looked for."""

    Options: ClassVar[type[DatasetOptions]] = NyuOptions

    name = "nyu"
    family = "nyu"
    synthetic = False
    units_per_metre = MILLIMETRES

    def __init__(self, options: NyuOptions) -> None:
        self._source = _source(options)
        self._depth = options.depth
        self.depth_range: tuple[float, float] = options.depth_range or (1e-3, 10.0)
        self.notes: tuple[str, ...] = (f"{self._source.layout} layout", *self._source.notes)

    def keys(self, split: Split) -> tuple[str, ...]:
        """Keys of an official list; `val` is empty."""
        return self._source.table.keys(split)

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample."""
        return self._source.load(split, key)

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of the stored depth map."""
        return self._source.size(split, key)

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of every file of a list that is not there."""
        return self._source.missing_files(split)

    def view_plan(self) -> ViewPlan:
        """Rows 40:470, columns 38:603, resized to 336x336 (paper: section 3.1; the crop is that of the released code)."""
        return ViewPlan(canvas=(336, 336), grid=(1, 1), crop=(40, 470, 38, 603))

    def identity(self) -> dict[str, Any]:
        """Layout, kind of depth, and the rows of each list."""
        lists = self._source.table.identity()
        return {"name": self.name, "layout": self._source.layout, "depth": self._depth, "lists": lists}
