"""Anybody's RGB-D frames, named by a manifest (see `pcd.datasets.manifest` for its columns).

    [dataset]
    name = "folder"
    root = "frames"                 # paths in the manifest are relative to it
    manifest = "frames.csv"         # default: manifest.csv or manifest.jsonl in the root
    unit = "mm"                     # of depth files whose row states none; or units_per_metre = 5000
    where = { scene = ["kitchen"] } # only rows with these values
    group = "scene"                 # rows that a seeded split must keep together
    test_fraction = 0.2             # if the manifest has no column `split`

Depth files are 16-bit PNG, NumPy or TIFF. Floats are metres unless a unit is given; integers always need one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from pcd.datasets.base import DatasetOptions, Intrinsics, Sample, Split
from pcd.datasets.files import (
    DEPTH_SUFFIXES,
    checked_sample,
    depth_size,
    find_file,
    first_existing,
    read_depth,
    read_rgb,
    require_root,
)
from pcd.datasets.lists import DepthRange, SplitTable
from pcd.datasets.manifest import Line, Numbers, Positive, Unit, cell_text, read_manifest, unit_value
from pcd.datasets.split import last_part, train_val
from pcd.depths import KITTI_UNITS, MILLIMETRES, units_for
from pcd.errors import DatasetError, MissingFileError, UsageError, suggest
from pcd.views import ViewPlan

MANIFESTS = ("manifest.csv", "manifest.jsonl")
SUFFIXES = (".csv", ".jsonl", ".ndjson")
LAYOUT = "a manifest.csv or manifest.jsonl and the files it names"
INDOOR, OUTDOOR = 10.0, 80.0
"""Metres; largest depth of the usual range for files in millimetres or finer, and for coarser ones."""
MOST = 65535
"""Largest value of a 16-bit file."""


def _texts(value: Any) -> Any:
    """`{scene = "a", level = [1, 2]}` to tuples of text, as the cells of a CSV file are."""
    if not isinstance(value, Mapping):
        return value
    lists = {name: item if isinstance(item, list | tuple) else [item] for name, item in value.items()}
    return {name: tuple(cell_text(item) for item in items) for name, items in lists.items()}


class FolderOptions(DatasetOptions):
    """Options of `[dataset]` for a manifest."""

    manifest: Path | None = None
    """Looked for in the root first, then as given. Without a root, paths are relative to the manifest's folder."""
    units_per_metre: Positive | None = None
    unit: Unit | None = None
    invalid: Numbers = ()
    """Stored values that mean "no depth", besides 0, for rows that state none."""
    min_depth: Positive | None = None
    max_depth: Positive | None = None
    """Metres; depth outside is taken as missing, for rows that state none."""
    depth_range: DepthRange | None = None
    """[smallest, largest] in metres to train and score in; default 10 m for fine depth files, 80 m for coarse ones."""
    where: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_texts)] = Field(default_factory=dict)
    group: str | None = None
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    order: Literal["seeded", "sequence"] = "seeded"
    """The test set: a seeded choice of rows or groups, or the end of the table (of each group)."""
    split_seed: int = 0


@dataclass(frozen=True)
class FolderFrame:
    """A row with the dataset's options applied; `units` is None for metres in floats."""

    key: str
    image: str
    depth: str
    units: float | None
    invalid: tuple[float, ...]
    limits: tuple[float, float]
    intrinsics: Intrinsics | None
    split: Split | None
    group: str | None
    line: int

    def facts(self) -> list[Any]:
        """What determines the sample. Of an absolute path only the name counts."""
        names = [PurePath(name).name if PurePath(name).is_absolute() else name for name in (self.image, self.depth)]
        largest = self.limits[1] if math.isfinite(self.limits[1]) else None
        return [self.key, *names, self.units, list(self.invalid), self.limits[0], largest]


class FolderDataset:
    """Frames of a manifest, as an official train, val and test list or split by the options."""

    Options: ClassVar[type[DatasetOptions]] = FolderOptions

    name = "folder"
    family = "generic"
    synthetic = False

    def __init__(self, options: FolderOptions) -> None:
        if options.unit is not None and options.units_per_metre is not None:
            raise UsageError("folder: both dataset.unit and dataset.units_per_metre are given; keep one of them.")
        path = _find_manifest(options)
        self._base = options.root or path.parent
        frames = [_frame(path, line, options) for line in _selected(path, read_manifest(path), options)]
        _check_keys(path, frames)
        self._table = SplitTable[FolderFrame]("folder", _splits(path, frames, options), options.limit)
        self.units_per_metre = _resolution(frames)
        self.depth_range = options.depth_range or _usual_range(self.units_per_metre, options)
        self.notes: tuple[str, ...] = self._table.notes()
        if not (options.depth_range or options.max_depth):
            self.notes += (f"no depth_range given: trained and scored up to {self.depth_range[1]:g} m",)

    def keys(self, split: Split) -> tuple[str, ...]:
        """Keys of a list, in the order of the manifest."""
        return self._table.keys(split)

    def groups(self, split: Split) -> dict[str, str]:
        """Group of each key, by the column of the option `group`; empty without that option."""
        return {frame.key: frame.group for frame in self._table.rows(split) if frame.group is not None}

    def load(self, split: Split, key: str) -> Sample:
        """Read one sample. Raises `MissingFileError` or `SampleError`."""
        frame = self._table.row(split, key)
        image, depth = self._find(frame, frame.image), self._find(frame, frame.depth)
        rgb, metres = read_rgb(image), read_depth(depth, frame.units, frame.invalid)
        with np.errstate(invalid="ignore"):
            metres[(metres < frame.limits[0]) | (metres > frame.limits[1])] = np.nan
        return checked_sample(key, (image, rgb), (depth, metres), frame.intrinsics)

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width) of the stored depth map."""
        frame = self._table.row(split, key)
        return depth_size(self._find(frame, frame.depth))

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """(key, file) of every image or depth file of a list that is not there."""
        wanted = [(row.key, self._base / name) for row in self._table.rows(split) for name in (row.image, row.depth)]
        return [(key, path) for key, path in wanted if not path.is_file()]

    def view_plan(self) -> ViewPlan:
        """The whole frame resized to 336x336; a recipe's `[views]` says otherwise."""
        return ViewPlan(canvas=(336, 336), grid=(1, 1))

    def identity(self) -> dict[str, Any]:
        """The rows of each list with their units, invalid values and limits."""
        return {"name": self.name, "lists": self._table.identity()}

    def _find(self, frame: FolderFrame, name: str) -> Path:
        advice = f"The manifest names it in line {frame.line}; paths are relative to {self._base} (--root, dataset.root)."
        return find_file([self._base / name], f"folder: {name}", advice)


def _find_manifest(options: FolderOptions) -> Path:
    given = options.manifest
    if given is None:
        root = require_root(options.root, "folder", LAYOUT)
        there = [root / name for name in MANIFESTS if (root / name).is_file()]
        if len(there) > 1:
            raise UsageError(f"folder: {root} has {' and '.join(MANIFESTS)}; choose one with dataset.manifest.")
        return find_file(there or [root / name for name in MANIFESTS], "folder: the manifest", "Name it with dataset.manifest.")
    if options.root is not None:
        require_root(options.root, "folder", LAYOUT)
    if given.suffix.lower() not in SUFFIXES:
        raise UsageError(f"folder: dataset.manifest = {given}: expected a file that ends in {', '.join(SUFFIXES)}.")
    places = [options.root / given, given] if options.root is not None else [given]
    found = first_existing(places)
    if found is None:
        raise MissingFileError(f"folder: no manifest {' or '.join(map(str, dict.fromkeys(places)))}; set dataset.manifest.")
    return found


def _selected(path: Path, lines: Sequence[Line], options: FolderOptions) -> list[Line]:
    """The rows that `where` selects."""
    columns = {name for line in lines for name in line.cells}
    for name in [*options.where, *([options.group] if options.group else [])]:
        if name not in columns:
            raise DatasetError(f"{path} has no column {name!r} (dataset.where, dataset.group).{suggest(name, columns)}")
    chosen = list(lines)
    for name, values in options.where.items():
        found = sorted({line.cells.get(name, "") for line in chosen})
        chosen = [line for line in chosen if line.cells.get(name, "") in values]
        if not chosen:
            raise DatasetError(
                f"{path}: no row has {name} = {' or '.join(values)}.{suggest(values[0] if values else '', found)}"
            )
    return chosen


def _frame(path: Path, line: Line, options: FolderOptions) -> FolderFrame:
    row, where = line.row, f"{path}, line {line.number}"
    for name in (row.image, row.depth):
        if row.key is None and PurePath(name).is_absolute():
            raise DatasetError(f"{where}: {name} is an absolute path, which makes no lasting key; add a column key.")
    if PurePath(row.depth).suffix.lower() not in DEPTH_SUFFIXES:
        raise DatasetError(f"{where}: depth = {row.depth}: expected a file that ends in {', '.join(DEPTH_SUFFIXES)}.")
    units = _units(row.unit, row.units_per_metre) or _units(options.unit, options.units_per_metre)
    if units is None and PurePath(row.depth).suffix.lower() == ".png":
        raise DatasetError(
            f"{where}: the unit of {row.depth} is not known; add a column units_per_metre (1000 for millimetres) or unit "
            "(mm, 1/256), or set dataset.unit for all rows."
        )
    smallest = row.min_depth or options.min_depth or 0.0
    largest = row.max_depth or options.max_depth or math.inf
    if not smallest < largest:
        raise DatasetError(f"{where}: min_depth {smallest:g} is not below max_depth {largest:g}.")
    group = line.cells.get(options.group) if options.group else None
    if options.group and group is None:
        raise DatasetError(f"{where}: column {options.group!r} is empty, but dataset.group needs it; fill it in.")
    return FolderFrame(
        key=row.key or PurePath(row.image).with_suffix("").as_posix(),
        image=row.image,
        depth=row.depth,
        units=units,
        invalid=options.invalid if row.invalid is None else row.invalid,
        limits=(smallest, largest),
        intrinsics=row.intrinsics(),
        split=row.split,
        group=group,
        line=line.number,
    )


def _units(unit: str | None, units_per_metre: float | None) -> float | None:
    return unit_value(unit) if unit is not None else units_per_metre


def _check_keys(path: Path, frames: Sequence[FolderFrame]) -> None:
    lines: dict[str, int] = {}
    for frame in frames:
        if frame.key in lines:
            both = f"{path}: lines {lines[frame.key]} and {frame.line}"
            raise DatasetError(f"{both} are both frame {frame.key!r}; remove one, or add a column key.")
        lines[frame.key] = frame.line


def _splits(path: Path, frames: Sequence[FolderFrame], options: FolderOptions) -> dict[Split, list[FolderFrame]]:
    """The lists: by the column `split` if there is one, else by `test_fraction`."""
    unnamed = [frame for frame in frames if frame.split is None]
    if len(unnamed) < len(frames):
        if unnamed:
            raise DatasetError(f"{path}, line {unnamed[0].line}: no split, but other rows have one; give train, val or test.")
        if options.test_fraction:
            raise UsageError(f"folder: {path} has a column split, so dataset.test_fraction has no use; remove one of them.")
        return {split: [frame for frame in frames if frame.split == split] for split in ("train", "val", "test")}
    keys = [frame.key for frame in frames]
    groups = {frame.key: frame.group for frame in frames if frame.group is not None} or None
    if options.order == "sequence":
        _, test = last_part(keys, options.test_fraction, groups)
    else:
        _, test = train_val(keys, options.split_seed, options.test_fraction, groups)
    held = set(test)
    return {"train": [f for f in frames if f.key not in held], "test": [f for f in frames if f.key in held]}


def _usual_range(units_per_metre: int, options: FolderOptions) -> tuple[float, float]:
    largest = options.max_depth or (INDOOR if units_per_metre >= MILLIMETRES else OUTDOOR)
    smallest = options.min_depth or 1e-3
    if not smallest < largest:
        raise UsageError(
            f"folder: min_depth {smallest:g} is not below the largest depth of {largest:g} m; set dataset.depth_range."
        )
    return smallest, largest


def _resolution(frames: Sequence[FolderFrame]) -> int:
    """Units per metre to keep depth with: that of the PNG files if they agree on a whole number, else what fits their reach."""
    found = {frame.units if PurePath(frame.depth).suffix.lower() == ".png" else None for frame in frames}
    units = [value for value in found if value is not None]
    if None not in found and len(units) == 1 and units[0].is_integer():
        return int(units[0])
    reach = MOST / min(units) if None not in found else math.inf
    reach = min(reach, max(frame.limits[1] for frame in frames))
    return units_for(reach) if math.isfinite(reach) else KITTI_UNITS
