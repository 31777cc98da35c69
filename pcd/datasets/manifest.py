"""Manifests: a table with a row per frame, as CSV with a header or as JSON lines.

Columns: `image`, `depth` (required), `split` (train, val or test), `key`, `units_per_metre` or `unit`, `invalid`, `min_depth`,
`max_depth`, and the camera `fx`, `fy`, `cx`, `cy`. An empty cell is an absent value. Other columns may be selected and
grouped by, and are ignored otherwise.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pcd.datasets.base import Intrinsics, Split
from pcd.datasets.files import read_text
from pcd.errors import DatasetError, suggest

UNITS = {"m": 1.0, "cm": 100.0, "mm": 1000.0}
"""Units per metre of the units that have a name; `1/N` is also one, N to the metre."""

CAMERA = ("fx", "fy", "cx", "cy")


def unit_value(unit: str) -> float:
    """Units per metre of `mm`, `cm`, `m` or `1/N` metres. Raises `ValueError` naming them."""
    part = re.fullmatch(r"1/(\d+(?:\.\d+)?)", unit)
    value = float(part[1]) if part else UNITS.get(unit, 0.0)
    if value <= 0:
        raise ValueError(
            f"unit {unit!r} is not known; give one of {', '.join(UNITS)}, or 1/N for N units to the metre, as 1/256"
        )
    return value


def cell_text(value: Any) -> str:
    """A value as the cell of a CSV file spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _known_unit(unit: str) -> str:
    unit_value(unit)
    return unit


def _numbers(value: Any) -> Any:
    """One number, a list, or the text `0;65535` as a list of numbers."""
    if isinstance(value, str):
        return [part for part in value.split(";") if part.strip()]
    return [value] if isinstance(value, int | float) else value


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Annotated[str, AfterValidator(_known_unit)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_numbers)]
Text = Annotated[str, Field(min_length=1)]


class ManifestRow(BaseModel):
    """What pcd reads of a row."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    image: Text
    depth: Text
    split: Split | None = None
    key: str | None = None
    units_per_metre: Positive | None = None
    unit: Unit | None = None
    invalid: Numbers | None = None
    min_depth: Positive | None = None
    max_depth: Positive | None = None
    fx: Positive | None = None
    fy: Positive | None = None
    cx: Number | None = None
    cy: Number | None = None

    def intrinsics(self) -> Intrinsics | None:
        """The camera, None if the row has none. Raises `ValueError` if only a part of it is there."""
        if None in (self.fx, self.fy, self.cx, self.cy):
            if any(getattr(self, name) is not None for name in CAMERA):
                raise ValueError("the camera is incomplete; give all of fx, fy, cx and cy, or none")
            return None
        return Intrinsics(**{name: getattr(self, name) for name in CAMERA})


@dataclass(frozen=True)
class Line:
    """A row of the file: its line number, its non-empty cells as text, and what pcd reads of it."""

    number: int
    cells: dict[str, str]
    row: ManifestRow


def read_manifest(path: Path) -> list[Line]:
    """Read a `.csv` or `.jsonl` manifest.

    Raises `DatasetError` naming the line for a row that cannot be read, and for missing columns or an empty table.
    """
    rows = list(_csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path))
    if not rows:
        raise DatasetError(f"{path} has no rows; expected one per frame, with at least the columns image and depth.")
    return [_line(path, number, cells) for number, cells in rows]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in ("image", "depth") if name not in header]
        if missing:
            raise DatasetError(
                f"{path}, line 1: no column {missing[0]!r}.{suggest(missing[0], header)} "
                "Expected a header with comma-separated names, among them image and depth."
            )
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DatasetError(
                    f"{path}, line {reader.line_num}: found {len(cells)} cells, expected {len(header)} as in line 1."
                )
            if cells:
                yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: {error}; expected comma-separated cells.") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}: not JSON: {error}; expected one object per line.") from error
        if not isinstance(value, dict):
            raise DatasetError(f"{path}, line {number}: found {type(value).__name__}, expected an object such as {{...}}.")
        yield number, {name: item for name, item in value.items() if item not in (None, "")}


def _line(path: Path, number: int, cells: dict[str, Any]) -> Line:
    try:
        row = ManifestRow.model_validate(cells)
        row.intrinsics()
    except ValidationError as error:
        detail = error.errors()[0]
        name = detail["loc"][0]
        value = f" = {cells[str(name)]!r}" if str(name) in cells else ""
        raise DatasetError(f"{path}, line {number}: {name}{value}: {detail['msg']}.") from None
    except ValueError as error:
        raise DatasetError(f"{path}, line {number}: {error}.") from None
    if row.unit is not None and row.units_per_metre is not None:
        raise DatasetError(f"{path}, line {number}: both unit and units_per_metre are given; keep one of them.")
    return Line(number, {name: cell_text(item) for name, item in cells.items()}, row)
