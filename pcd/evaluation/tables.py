"""Tables of scores as files: CSV for people, Parquet for data frames."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcd.evaluation.metrics import METRICS
from pcd.files import write_bytes, write_text

Rows = Sequence[Mapping[str, Any]]
_TYPES = {"key": "string", "protocol": "string", "tile": "int32", "pixels": "int64"}
"""Arrow types; every other column is float64."""


def used_columns(rows: Rows, order: Sequence[str]) -> list[str]:
    """The columns of `order` that occur in the rows; all of them if there are no rows."""
    used = set().union(*rows)
    return [name for name in order if not rows or name in used]


def write_csv(path: Path, rows: Rows, order: Sequence[str]) -> None:
    """Write rows as CSV, columns in `order`; what does not exist (NaN, the tile of a whole image) is left empty."""
    columns = used_columns(rows, order)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    write_text(path, text.getvalue())


def write_parquet(path: Path, rows: Rows, order: Sequence[str]) -> None:
    """Write the same as Parquet; what does not exist is null, and each field's metadata holds title and unit of its metric."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns = used_columns(rows, order)
    fields = [pa.field(name, pa.type_for_alias(_TYPES.get(name, "float64")), metadata=_meaning(name)) for name in columns]
    arrays = [pa.array([_absent(row.get(field.name)) for row in rows], type=field.type) for field in fields]
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), sink)
    write_bytes(path, sink.getvalue())


def _meaning(name: str) -> dict[str, str]:
    metric = METRICS.get(name)
    return {"title": metric.title, "unit": metric.unit, "definition": metric.definition} if metric else {}


def _absent(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(value: Any) -> Any:
    found = _absent(value)
    return "" if found is None else found


def read_scores(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """A per-sample table of `write_csv` as protocol -> metric -> key -> score.

    Of an image in tiles, the mean over the tiles that were scored; NaN where none was.
    """
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    parts: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        for name in METRICS.keys() & row.keys():
            scores = parts.setdefault(row["protocol"], {}).setdefault(name, {}).setdefault(row["key"], [])
            if row[name]:
                scores.append(float(row[name]))
    return {
        protocol: {
            name: {key: math.fsum(part) / len(part) if part else math.nan for key, part in keys.items()}
            for name, keys in metrics.items()
        }
        for protocol, metrics in parts.items()
    }
