"""What an extraction is going to make: samples, views, columns and their fingerprints. No image is opened here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pcd import depths
from pcd.cache import Cache, ColumnEntry, Manifest, TableEntry, compact
from pcd.cache.compact import TokenForm
from pcd.cache.manifest import SCHEMA
from pcd.cache.table import SAMPLE_OK
from pcd.columns import ColumnSpec
from pcd.datasets import Dataset, Split
from pcd.datasets.base import Grouped
from pcd.datasets.split import train_val
from pcd.encoders import output_of
from pcd.errors import DatasetError, FingerprintError, UsageError
from pcd.fingerprint import differences, digest
from pcd.patches import PixelRule
from pcd.recipe import ViewsSection
from pcd.views import TRUTH, DepthResize, ViewPlan

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder

MIN_SHARD_BYTES = 50_000_000
"""A shard holds the smallest power of two of samples that gives the widest column this many bytes: 50 to 100 MB."""
MAX_SHARD_ROWS = 1024
MIN_PATCH_PIXELS = 16
"""Statistics of smaller patches, 14 bytes each, would take more room than the depth they follow from."""
SPLIT_SEED = 0
VIEW_CAMERA = "view/intrinsics"
"""Column of the cameras of all views, made only when a head reads it."""
OUTPUT = "output"
"""The key of a column's fingerprint that says which output of its encoder it is, if not one that is always made."""
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class TablePlan:
    """A table to be: its sample keys, and the dataset's list they are loaded from."""

    name: str
    source: Split
    keys: tuple[str, ...]


def view_plan(dataset: Dataset, overrides: ViewsSection) -> ViewPlan:
    """The dataset's own view plan with the recipe's overrides."""
    values: dict[str, Any] = overrides.model_dump(exclude_none=True, exclude={"depth_resize"})
    if values.get("crop") == "none":
        values["crop"] = None
    return replace(dataset.view_plan(), **values)


def plan_tables(dataset: Dataset, seed: int = SPLIT_SEED) -> list[TablePlan]:
    """Train, val and test tables; val is drawn from the training list 9:1 unless the dataset has one of its own.

    Raises `DatasetError` if there is no sample at all.
    """
    train, val = dataset.keys("train"), dataset.keys("val")
    source: Split = "val"
    if not val:
        train, val = train_val(
            train, seed, VAL_FRACTION, groups=(isinstance(dataset, Grouped) and dataset.groups("train")) or None
        )
        source = "train"
    tables = [
        TablePlan("train", "train", train),
        TablePlan("val", source, val),
        TablePlan("test", "test", dataset.keys("test")),
    ]
    tables = [table for table in tables if table.keys]
    if not tables:
        raise DatasetError(f"dataset {dataset.name}: the lists name no sample with depth.")
    return tables


def plan_manifest(dataset: Dataset, plan: ViewPlan, tables: list[TablePlan], seed: int = SPLIT_SEED) -> Manifest:
    """The manifest of a cache without columns."""
    return Manifest(
        dataset={
            "name": dataset.name,
            "family": dataset.family,
            "synthetic": dataset.synthetic,
            "depth_range": list(dataset.depth_range),
            "units_per_metre": dataset.units_per_metre,
            "notes": list(dataset.notes),
            "identity": dataset.identity(),
        },
        plan=plan,
        split={
            "seed": seed,
            "val_fraction": VAL_FRACTION,
            "val": "drawn from train" if any(t.name == "val" and t.source == "train" for t in tables) else "as listed",
        },
        tables={table.name: TableEntry(len(table.keys), digest(list(table.keys))) for table in tables},
    )


def stored_form(manifest: Manifest) -> TokenForm | None:
    """How a cache stores its patch tokens: all its columns of them alike. None if it has none."""
    if any(compact.is_compact(entry) for entry in manifest.columns.values()):
        return "int8"
    return "float16" if any(compact.applies(entry.spec) for entry in manifest.columns.values()) else None


def refuse_other_form(cache: Cache, asked: TokenForm | None) -> None:
    """Raise `FingerprintError` if a cache stores its tokens in another form than the one asked for, if any."""
    root, found = cache.root, stored_form(cache.manifest)
    if asked and found and asked != found:
        raise FingerprintError(
            f"{root} stores its tokens as {found}, and {asked} was asked for. What is stored is not converted: give "
            f"--tokens {found} to go on with this cache, or another --cache for tokens as {asked}."
        )


def plan_columns(
    manifest: Manifest,
    encoder: Encoder,
    resizes: Sequence[DepthResize],
    native_size: tuple[int, int] | None,
    tokens: TokenForm | None = None,
    asked: Collection[str] = (),
) -> dict[str, ColumnEntry]:
    """Entries of all columns that this encoder and the ground truth, brought to the canvas in each of `resizes`, give.

    `native_size` (height, width) holds the largest stored frame of val and test, or None if there are neither. `tokens` is how
    patch tokens are stored; absent: as those that `manifest` has, float16 if it has none. `asked` may name `VIEW_CAMERA`, which
    is made for heads that read it. Raises `UsageError` if they are to be
    int8 and the encoder makes none that can be.
    """
    found = stored_form(manifest)
    coded = {spec.name for spec in encoder.columns if (tokens or found) == "int8" and compact.applies(spec)}
    if tokens == "int8" and not coded and found is None:
        names = ", ".join(spec.name for spec in encoder.columns)
        raise UsageError(f"--tokens int8: of the encoder's columns ({names}) none holds patch tokens in float16.")
    shared = {"schema": SCHEMA, "dataset": digest(manifest.dataset), "tables": digest(manifest.as_json()["tables"])}
    viewed = {**shared, "views": manifest.plan.as_json()}
    made_by_encoder = {
        spec: {**viewed, "column": spec.name, "encoder": encoder.fingerprint(), **_output(encoder, spec.name)}
        for spec in encoder.columns
    }
    grid = _grid_of_truth(manifest, encoder)
    rule = {**PixelRule(*manifest.dataset["depth_range"]).as_json(), "grid": list(grid)}
    fingerprints = made_by_encoder | {
        spec: {**viewed, "resize": resize, "rule": rule, "column": spec.name}
        for resize in resizes
        for spec in _truth_columns(manifest, grid, TRUTH[resize])
    }
    fingerprints |= {spec: {**shared, "column": spec.name} for spec in _sample_columns()}
    if VIEW_CAMERA in asked or VIEW_CAMERA in manifest.columns:
        spec = ColumnSpec(VIEW_CAMERA, (4,), "float32", ("parameter",), "fx, fy, cx, cy in pixels of the view, NaN = unknown")
        fingerprints[spec] = {**viewed, "column": spec.name}
    everywhere = tuple(manifest.tables)
    entries = {spec.name: ColumnEntry(spec, 0, everywhere, fingerprint) for spec, fingerprint in fingerprints.items()}
    entries |= {name: compact.compacted(entries[name]) for name in coded}
    shard = shard_samples(manifest, [entry.spec for entry in entries.values()])
    entries = {name: replace(entry, shard_samples=shard) for name, entry in entries.items()}
    scored = tuple(name for name in everywhere if name != "train")
    if native_size is not None and scored:
        spec = ColumnSpec(
            "depth/native",
            native_size,
            "uint16",
            ("y", "x"),
            "ground truth as stored, 0 = missing; the frame is the top left `sample/size` of the row",
            axis="sample",
            compress=True,
            units_per_metre=manifest.dataset["units_per_metre"],
        )
        entries[spec.name] = ColumnEntry(spec, shard, scored, {**shared, "column": spec.name})
    return entries


def _output(encoder: Encoder, column: str) -> dict[str, Any]:
    """The part of a fingerprint that only columns have that were asked for."""
    output = output_of(encoder, column)
    return {OUTPUT: output} if output else {}


def asked_before(manifest: Manifest, encoder: Encoder) -> list[str]:
    """Columns of the cache that this encoder made because a head reads them: whoever extracts next completes them."""
    return [
        name
        for name, entry in manifest.columns.items()
        if OUTPUT in entry.fingerprint and not differences(entry.fingerprint["encoder"], encoder.fingerprint())
    ]


def _grid_of_truth(manifest: Manifest, encoder: Encoder) -> tuple[int, int]:
    """The patches that statistics of the ground truth are stored for: those of the encoder that was first."""
    rules = [entry.fingerprint["rule"] for entry in manifest.columns.values() if "rule" in entry.fingerprint]
    rows, columns = rules[0]["grid"] if rules else encoder.grid
    return rows, columns


def _truth_columns(manifest: Manifest, grid: tuple[int, int], group: str) -> list[ColumnSpec]:
    """The canvas, and what its patches hold if they are large enough for that to save anything."""
    statistics, (height, width) = _statistics_columns(grid, group), manifest.plan.view_size
    if height * width < MIN_PATCH_PIXELS * grid[0] * grid[1]:
        statistics = []
    units = depths.units_for(manifest.dataset["depth_range"][1])
    canvas = ColumnSpec(
        f"{group}/canvas",
        manifest.plan.view_size,
        "uint16",
        ("y", "x"),
        "ground truth on the canvas, 0 = missing",
        compress=True,
        units_per_metre=units,
    )
    return [*statistics, canvas]


def _statistics_columns(grid: tuple[int, int], group: str) -> list[ColumnSpec]:
    patches = (grid[0] * grid[1],)
    return [
        ColumnSpec(f"{group}/present", patches, "uint16", ("patch",), "pixels of the patch that have any depth"),
        ColumnSpec(f"{group}/count", patches, "uint16", ("patch",), "pixels of the patch inside the depth range"),
        ColumnSpec(f"{group}/mean", patches, "float32", ("patch",), "their mean depth in metres (equation 1)"),
        ColumnSpec(f"{group}/var", patches, "float32", ("patch",), "their population variance in square metres"),
    ]


def _sample_columns() -> list[ColumnSpec]:
    return [
        ColumnSpec(SAMPLE_OK, (), "uint8", (), "1 if the sample was read, 0 if it was skipped", axis="sample"),
        ColumnSpec("sample/size", (2,), "int32", ("axis",), "height and width of the stored frame", axis="sample"),
        ColumnSpec(
            "sample/intrinsics", (4,), "float32", ("parameter",), "fx, fy, cx, cy in pixels, NaN = unknown", axis="sample"
        ),
    ]


def shard_samples(manifest: Manifest, specs: list[ColumnSpec]) -> int:
    """Samples per shard of every column made together: a power of two."""
    views = manifest.plan.views
    widest = max(spec.row_bytes * (views if spec.axis == "view" else 1) for spec in specs)
    samples = 1
    while samples * widest < MIN_SHARD_BYTES and samples * views < MAX_SHARD_ROWS:
        samples *= 2
    return samples


def sizes(manifest: Manifest, entries: dict[str, ColumnEntry]) -> dict[str, int]:
    """Bytes of each column before compression, over all its tables."""
    result = {}
    for name, entry in entries.items():
        per_sample = manifest.plan.views if entry.spec.axis == "view" else 1
        result[name] = sum(manifest.tables[table].samples for table in entry.tables) * per_sample * entry.spec.row_bytes
    return result
