"""List files of the form `image depth focal`, and the rows that a dataset makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

from pydantic import AfterValidator

from pcd.datasets.base import SPLITS, DatasetOptions, Split
from pcd.datasets.files import find_file, read_text
from pcd.errors import DatasetError, UsageError
from pcd.fingerprint import digest

NO_DEPTH = "None"
"""What a list says in place of a depth file that does not exist."""


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not (0 < value[0] < value[1] < math.inf):
        raise ValueError("give [smallest, largest] in metres, both above 0")
    return value


DepthRange = Annotated[tuple[float, float], AfterValidator(_ordered)]


class ListOptions(DatasetOptions):
    """Options of the datasets that are read from two list files."""

    train_list: Path | None = None
    """Another training list; looked for in the root first, then as given."""
    test_list: Path | None = None
    depth_range: DepthRange | None = None
    """[smallest, largest] in metres, in place of the usual range. Depth outside it is kept."""


@dataclass(frozen=True)
class ListedFrame:
    """One line of a list: the files as it names them, without a leading slash, and the focal length in pixels."""

    key: str
    image: str
    depth: str
    focal: float
    line: int

    def facts(self) -> list[Any]:
        """What determines the sample, for the identity of the dataset."""
        return [self.key, self.image, self.depth]


@dataclass(frozen=True)
class FrameList:
    """The frames of a list file and the number of lines that were left out because they name no depth file."""

    path: Path
    frames: tuple[ListedFrame, ...]
    without_depth: int

    def notes(self) -> tuple[str, ...]:
        """One sentence if lines were left out, else nothing."""
        if not self.without_depth:
            return ()
        total = len(self.frames) + self.without_depth
        return (f"{self.path.name}: {self.without_depth} of {total} lines have no depth map and are left out",)


def find_list(given: Path | None, option: str, usual_name: str, root: Path | None) -> Path:
    """The list file of an option, or `usual_name` in the root.

    A relative path is looked for in the root, then in the working folder. Raises `MissingFileError` naming the option.
    """
    wanted = given or Path(usual_name)
    candidates = [root / wanted] if root is not None else []
    if given is not None or root is None:
        candidates.append(wanted)
    return find_file(
        list(dict.fromkeys(candidates)),
        f"list {wanted.name}",
        f"Expected one line per frame, `image depth focal`; set dataset.{option}, or --root (dataset.root) to its folder.",
    )


def read_list(path: Path, key_of: Callable[[str], str | None], example: str) -> FrameList:
    """Read a list file. `key_of` names a frame from its image path, or returns None if that has not the expected form.

    Raises `DatasetError` with file and line for a malformed line, a frame that is listed twice, or an empty list; `example`
    is a good line, shown in messages.
    """
    frames: list[ListedFrame] = []
    lines: dict[str, int] = {}
    without_depth = 0
    for number, fields in _fields(path, example):
        image, depth = (field.lstrip("/") for field in fields[:2])
        key = key_of(image)
        if key is None:
            raise DatasetError(f"{path}, line {number}: the image path {image!r} has not the form of {example.split()[0]!r}.")
        focal = _focal(fields[2], f"{path}, line {number}")
        if depth == NO_DEPTH:
            without_depth += 1
            continue
        if key in lines:
            raise DatasetError(f"{path}: lines {lines[key]} and {number} are both frame {key!r}; remove one of them.")
        lines[key] = number
        frames.append(ListedFrame(key, image, depth, focal, number))
    if not frames:
        raise DatasetError(f"{path} names no frame with depth; expected lines like `{example}`.")
    return FrameList(path, tuple(frames), without_depth)


def _fields(path: Path, example: str) -> list[tuple[int, list[str]]]:
    rows = [(number, line.split()) for number, line in enumerate(read_text(path).split("\n"), start=1)]
    for number, fields in rows:
        if len(fields) not in (0, 3):
            raise DatasetError(
                f"{path}, line {number}: found {len(fields)} fields, expected 3: image, depth, focal length, as in `{example}`"
            )
    return [(number, fields) for number, fields in rows if fields]


def _focal(text: str, where: str) -> float:
    try:
        focal = float(text)
    except ValueError:
        focal = math.nan
    if not (0 < focal < math.inf):
        raise DatasetError(f"{where}: focal length {text!r}: expected a number of pixels above 0, such as 518.8579.")
    return focal


class Row(Protocol):
    """A sample as a list names it."""

    @property
    def key(self) -> str:
        """Stable name of the sample."""
        ...

    def facts(self) -> list[Any]:
        """What determines the sample, as plain JSON values without absolute paths."""
        ...


R = TypeVar("R", bound=Row)


class SplitTable(Generic[R]):
    """The rows of each list by key, cut to the first `limit` of each. `name` is the dataset's, for messages."""

    def __init__(self, name: str, rows: Mapping[Split, Sequence[R]], limit: int | None) -> None:
        self._name = name
        self._rows: dict[Split, dict[str, R]] = {
            split: {row.key: row for row in tuple(rows.get(split, ()))[:limit]} for split in SPLITS
        }

    def keys(self, split: Split) -> tuple[str, ...]:
        """Keys in the order of the list."""
        return tuple(self._rows[split])

    def rows(self, split: Split) -> tuple[R, ...]:
        """Rows in the order of the list."""
        return tuple(self._rows[split].values())

    def row(self, split: Split, key: str) -> R:
        """The row of a key. Raises `UsageError` if the list has no such key."""
        try:
            return self._rows[split][key]
        except KeyError:
            count = len(self._rows[split])
            raise UsageError(f"{self._name}: no sample {key!r} among the {count} of the {split} list.") from None

    def identity(self) -> dict[str, Any]:
        """Number of samples and digest of the rows of each list."""
        return {
            split: {"samples": len(rows), "digest": digest([row.facts() for row in rows.values()])}
            for split, rows in self._rows.items()
        }

    def notes(self) -> tuple[str, ...]:
        """A warning if a sample is in more than one list."""
        train = self._rows["train"].keys()
        shared = {split: len(train & self._rows[split].keys()) for split in SPLITS[1:]}
        return tuple(f"{count} samples are in the train and in the {split} list" for split, count in shared.items() if count)
