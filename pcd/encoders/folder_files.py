"""Columns that somebody else's code has computed, as files: `columns.json` and arrays by sample key.

    from pcd.encoders.folder_files import describe_column, write_column

    describe_column("sam", "sam/segments", model="mobile-sam", grid=(24, 32), shape=(240, 320), dtype="uint8", dims=("y", "x"),
                    meaning="segment numbers, 0 = none", fingerprint={"points": 32, "weights": "..."}, views="canvas")
    write_column("sam", "sam/segments", key, array)       # once per sample, key as the dataset has it

`columns.json` says, for each column, shape, dtype, axes and meaning of one row, the `fingerprint` (any JSON object that is not
empty: what determines the values; it becomes part of the cache's), and where its arrays are, relative to itself (`files`):

    a folder          KEY.npy per sample; a key with slashes is a path
    NAME.npy          one array, whose first axis is that of the list `keys`
    NAME.safetensors  one tensor per sample, named by its key

The array of a sample holds all its views, `(views, *shape)` in the order of `pcd.views` (`"views": "each"`), or it is one map
of the canvas, which pcd cuts into tiles and mirrors (`"views": "canvas"`): for rows `(y, x, ...)` of shape (h, w, ...) it has
(tile rows * h, tile columns * w, ...), for rows `(patch, channel)` on `grid` the same with the grid in place of h and w.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pcd.errors import DatasetError, MissingFileError, RecipeError, UsageError, suggest
from pcd.files import read_json, write_bytes, write_json
from pcd.fingerprint import digest
from pcd.recipe import parse_table
from pcd.views import TRUTH

INDEX = "columns.json"
Array = npt.NDArray[Any]
Side = Annotated[int, Field(gt=0)]
DType = Literal["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32"]
NAME = r"[a-z][a-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9@._-]*"
TAKEN = {*TRUTH.values(), "sample"}
"""Groups of columns that pcd makes itself."""


class StoredColumn(BaseModel):
    """A column of `columns.json`; see the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[Side, ...]
    dtype: DType
    dims: tuple[str, ...]
    meaning: Annotated[str, Field(min_length=1)]
    fingerprint: Annotated[dict[str, Any], Field(min_length=1)]
    views: Literal["each", "canvas"] = "each"
    compress: bool = False
    files: Annotated[str, Field(min_length=1)]
    keys: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> StoredColumn:
        if len(self.dims) != len(self.shape):
            raise ValueError(f"{len(self.dims)} dims for a shape of {len(self.shape)} axes")
        if self.views == "canvas" and not (self.has_places or self.has_patches):
            raise ValueError('views "canvas" needs dims that begin with y, x or with patch')
        if (self.keys is not None) != self.files.endswith(".npy"):
            raise ValueError("keys are for one .npy file, and it needs them")
        return self

    @property
    def has_places(self) -> bool:
        """Whether a row is a map."""
        return self.dims[:2] == ("y", "x")

    @property
    def has_patches(self) -> bool:
        """Whether a row holds something for each patch."""
        return self.dims[:1] == ("patch",)


class Index(BaseModel):
    """What `columns.json` holds: `model` names what made the columns, `grid` is (rows, columns) of patches of a view."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: Annotated[str, Field(min_length=1)]
    grid: tuple[Side, Side]
    columns: Annotated[dict[Annotated[str, Field(pattern=f"^{NAME}$")], StoredColumn], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_the_grid(self) -> Index:
        patches = self.grid[0] * self.grid[1]
        for name, column in self.columns.items():
            if name.partition("/")[0] in TAKEN:
                raise ValueError(f"column {name}: pcd itself makes the columns of {name.partition('/')[0]}/")
            if column.has_patches and column.shape[0] != patches:
                raise ValueError(f"column {name} has {column.shape[0]} patches, the grid {patches}")
        return self


def read_index(file: Path, only: Sequence[str] = ()) -> Index:
    """What `columns.json` says, of the columns `only` if any are named.

    Raises `MissingFileError` if it is not there, `DatasetError` naming the wrong key, `UsageError` for an unknown column.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} is not there; a folder of columns has one (pcd.encoders.folder_files).")
    try:
        index = parse_table(Index, read_json(file), str(file))
    except (RecipeError, ValueError, TypeError) as error:
        raise DatasetError(str(error) if isinstance(error, RecipeError) else f"{file} is no JSON object: {error}.") from error
    for name in only:
        if name not in index.columns:
            raise UsageError(f"{file} has no column {name!r}.{suggest(name, index.columns)}")
    return index.model_copy(update={"columns": {name: index.columns[name] for name in only}}) if only else index


def digest_of(index: Index, folder: Path) -> str:
    """SHA-256 over what the index says and name and size of every file of its columns.

    Not over their contents, which may be terabytes: who changes values without a file changing its size must change the
    `fingerprint` of the column. Raises `MissingFileError` if there are none.
    """
    files = {name: _listing(folder / column.files) for name, column in index.columns.items()}
    return digest({"index": index.model_dump(mode="json"), "files": files})


def _listing(place: Path) -> list[tuple[str, int]]:
    if place.is_file():
        return [(place.name, place.stat().st_size)]
    if not place.is_dir():
        raise MissingFileError(f"{place} is not there; it is to hold the arrays of a column ({INDEX}, key files).")
    return sorted(_walk(place, ""))


def _walk(folder: Path, above: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{above}{entry.name}/")
            elif entry.name.endswith(".npy"):
                yield f"{above}{entry.name}", entry.stat().st_size


class StoredArrays:
    """The arrays of one column, by sample key."""

    def __init__(self, folder: Path, name: str, column: StoredColumn) -> None:
        """Opens a single file. Raises `MissingFileError` and `DatasetError` for one that cannot be used."""
        self.place, self.name, self.column = folder / column.files, name, column
        self._whole: Array | None = None
        self._tensors: Any = None
        if column.keys is not None:
            self._whole, self._numbers = _read(self.place, mapped=True), {key: at for at, key in enumerate(column.keys)}
            if len(self._whole) != len(column.keys):
                raise DatasetError(f"{self.place} has {len(self._whole)} samples, {INDEX} {len(column.keys)} keys of {name}.")
        elif column.files.endswith(".safetensors"):
            self._tensors = _open_safetensors(self.place)
            self._numbers = {key: at for at, key in enumerate(self._tensors.keys())}

    def load(self, key: str) -> Array:
        """The array of a sample, as it is stored. Raises `MissingFileError` for a key that is not there."""
        if self._whole is None and self._tensors is None:
            return _read(file_of(self.place, key), mapped=False)
        if key not in self._numbers:
            raise MissingFileError(
                f"{self.place} has nothing for sample {key!r} (column {self.name}).{_near(key, self._numbers)}"
            )
        return self._tensors.get_tensor(key) if self._whole is None else np.asarray(self._whole[self._numbers[key]])


def _near(key: str, known: Mapping[str, int]) -> str:
    return f" It has {len(known)} samples, the first is {next(iter(known))!r}." if known else " It is empty."


def file_of(folder: Path, key: str) -> Path:
    """The file of a sample. Raises `DatasetError` for a key that leads out of the folder."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not key:
        raise DatasetError(
            f"sample key {key!r} is no file name inside {folder}; use one .npy or .safetensors file (key files)."
        )
    return folder / f"{key}.npy"


def _read(file: Path, *, mapped: bool) -> Array:
    try:
        array: Array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise MissingFileError(f"{file} is not there.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{file} cannot be read as a .npy array: {error}.") from error
    if not isinstance(array, np.ndarray):
        raise DatasetError(f"{file} is no .npy array.")
    return array


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise MissingFileError(f"{file} is not there.")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise DatasetError(f"{file} cannot be read as safetensors: {error}.") from error


def describe_column(
    folder: str | Path,
    name: str,
    *,
    model: str,
    grid: tuple[int, int],
    shape: Sequence[int],
    dtype: str,
    dims: Sequence[str],
    meaning: str,
    fingerprint: Mapping[str, Any],
    views: str = "each",
    compress: bool = False,
) -> Path:
    """Put a column into `columns.json` of `folder` (made if need be), its arrays to be in a subfolder; returns the file.

    See the module for the arguments. Raises `UsageError` if the folder has columns of another `model` or `grid`, and
    `DatasetError` for what cannot be.
    """
    file = Path(folder) / INDEX
    there: dict[str, Any] = {"model": model, "grid": list(grid), "columns": {}}
    if file.is_file():
        there = read_index(file).model_dump(mode="json")
    if (there["model"], there["grid"]) != (model, list(grid)):
        raise UsageError(
            f"{file} holds columns of {there['model']!r} on grid {there['grid']}; take another folder for {model!r}."
        )
    column = {"shape": list(shape), "dtype": dtype, "dims": list(dims), "meaning": meaning, "fingerprint": dict(fingerprint)}
    there["columns"][name] = {**column, "views": views, "compress": compress, "files": name.replace("/", "-")}
    try:
        index = parse_table(Index, {"format": 1, **there}, str(file))
    except RecipeError as error:
        raise DatasetError(str(error)) from None
    write_json(file, index.model_dump(mode="json", exclude_none=True))
    return file


def write_column(folder: str | Path, name: str, key: str, array: Array) -> Path:
    """Write the array of one sample of a described column to its file, whole or not at all; returns the file.

    Raises `UsageError` for another dtype or shape than described, or NaN; the number of views is checked when pcd reads it.
    """
    index = read_index(Path(folder) / INDEX, [name])
    column = index.columns[name]
    fault = fault_of(array, column, index.grid, None)
    if fault:
        raise UsageError(f"column {name}, sample {key!r}: {fault}")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    file = file_of(Path(folder) / column.files, key)
    write_bytes(file, buffer.getvalue())
    return file


def fault_of(array: Array, column: StoredColumn, grid: tuple[int, int], expected: tuple[int, ...] | None) -> str:
    """What is wrong with the array of a sample, or nothing; without `expected` its number of views or tiles is free."""
    if array.dtype != np.dtype(column.dtype):
        return f"it is {array.dtype}; expected {column.dtype}."
    if expected is None:
        expected = _free(array, column, grid)
    if array.shape != expected:
        return f"its shape is {array.shape}; expected {expected} (views {column.views!r})."
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "it holds values that are not finite."
    return ""


def cell_of(column: StoredColumn, grid: tuple[int, int]) -> tuple[int, ...]:
    """What one view is of an array of the whole canvas: `(h, w, ...)`."""
    return (*grid, *column.shape[1:]) if column.has_patches else column.shape


def _free(array: Array, column: StoredColumn, grid: tuple[int, int]) -> tuple[int, ...]:
    """The shape nearest to that of the array which would be right for some number of views or tiles."""
    if column.views == "each":
        return (max(1, array.shape[0] if array.ndim else 1), *column.shape)
    height, width, *rest = cell_of(column, grid)
    rows, columns = (array.shape[at] // side if array.ndim > at else 1 for at, side in ((0, height), (1, width)))
    return (max(1, rows) * height, max(1, columns) * width, *rest)
