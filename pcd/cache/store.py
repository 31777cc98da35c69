"""A cache as a whole: a Zarr v3 group with a manifest and a table per split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from pcd.cache import commits
from pcd.cache.column import chunk_path
from pcd.cache.manifest import ColumnEntry, Manifest
from pcd.cache.shards import ZSTD_LEVEL
from pcd.cache.table import SAMPLES, Table
from pcd.cache.texts import METADATA, read_attributes, read_text, text_files, text_folder, text_folders
from pcd.columns import ColumnSpec
from pcd.errors import CacheError, suggest
from pcd.files import write_bytes, write_json
from pcd.fingerprint import digest
from pcd.remote import AnyPath, any_path


class Cache:
    """An opened cache. `Cache.open(path)` reads one, `Cache.create(path, manifest, keys)` begins one."""

    def __init__(self, root: AnyPath, manifest: Manifest, *, verify: bool = True) -> None:
        """`verify` checks the crc32c of every row that is read."""
        self.root = root
        self.manifest = manifest
        self._verify = verify
        self._tables: dict[str, Table] = {}

    @staticmethod
    def open(root: str | AnyPath, *, verify: bool = True) -> Cache:
        """Open the cache in folder `root`, or at an address such as `s3://BUCKET/PREFIX`.

        Raises `CacheError` if there is none or it is damaged.
        """
        root = any_path(root)
        return Cache(root, Manifest.read(root), verify=verify)

    @staticmethod
    def create(root: AnyPath, manifest: Manifest, keys: Mapping[str, Sequence[str]]) -> Cache:
        """Begin a cache: groups, sample lists, then the manifest, which makes it one. Raises `CacheError` if one is there."""
        if (root / "manifest.json").exists():
            raise CacheError(f"{root} already holds a cache.")
        for path, data in group_files(manifest).items():
            write_bytes(root / path, data)
        for name, names in keys.items():
            write_json(root / name / SAMPLES, list(names))
        manifest.write(root)
        return Cache(root, manifest)

    def table(self, name: str) -> Table:
        """A table by name (`train`, `val`, `test`). Raises `CacheError` naming the known ones."""
        if name not in self._tables:
            if name not in self.manifest.tables:
                raise CacheError(f"{self.root} has no table {name!r}.{suggest(name, self.manifest.tables)}")
            self._tables[name] = Table(self.root, name, self.manifest, verify=self._verify)
        return self._tables[name]

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        return [self.table(name) for name in self.manifest.tables]

    @property
    def complete(self) -> bool:
        """Whether every table has every row of every column."""
        return bool(self.manifest.columns) and all(table.complete for table in self.tables)

    def add_columns(self, entries: Mapping[str, ColumnEntry]) -> None:
        """Add columns (Zarr metadata first, then the manifest). What is already there stays as it is."""
        for name, entry in entries.items():
            if name in self.manifest.columns:
                continue
            for table in entry.tables:
                self._forget_strangers(table, entry)
                self._write_array(table, entry)
            self.manifest.columns[name] = entry
        self.manifest.write(self.root)

    def _forget_strangers(self, table: str, entry: ColumnEntry) -> None:
        """Of records that are there already keep those that vouch for this very column: same fingerprint, rows and file."""
        per_sample = self.manifest.plan.views if entry.spec.axis == "view" else 1
        rows, unit = self.manifest.tables[table].samples * per_sample, entry.shard_samples * per_sample
        fingerprint = digest(entry.fingerprint)

        def belongs(commit: commits.Commit) -> bool:
            file, start = chunk_path(self.root, table, entry.spec, commit.shard), commit.shard * unit
            same = (commit.start, commit.stop, commit.fingerprint) == (start, min(start + unit, rows), fingerprint)
            return same and file.is_file() and file.stat().st_size == commit.bytes

        commits.forget_strangers(self.root, table, entry.spec.name, belongs)

    def _write_array(self, table: str, entry: ColumnEntry) -> None:
        for key, data in array_files(self.manifest, table, entry).items():
            write_bytes(self.root / table / key, data)

    def text(self, encoder: str, phrases: Sequence[str]) -> npt.NDArray[np.float32] | None:
        """Text embeddings `(len(phrases), D)` made by the encoder of that weights digest, or None if they are not stored.

        Raises `CorruptError` for a damaged file.
        """
        folder = text_folder(self.root, encoder, phrases)
        if not (folder / METADATA).is_file():
            return None
        return read_text(folder)[2]

    def add_text(self, encoder: str, phrases: Sequence[str], embeddings: npt.NDArray[np.float32]) -> None:
        """Store text embeddings `(len(phrases), D)` beside the columns; the metadata is written last."""
        for key, data in text_files(encoder, phrases, embeddings).items():
            write_bytes(text_folder(self.root, encoder, phrases) / key, data)

    def texts(self) -> list[dict[str, Any]]:
        """What text embeddings are stored: encoder digest and phrases."""
        stored = (read_attributes(folder) for folder in text_folders(self.root))
        return [{"encoder": attributes["encoder"], "phrases": attributes["phrases"]} for attributes in stored]

    def close(self) -> None:
        """Close all open shard files."""
        for table in self._tables.values():
            table.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cache(root: str | AnyPath, *, verify: bool = True) -> Cache:
    """Open the cache in folder `root`, or at an address such as `s3://BUCKET/PREFIX`; the same as `Cache.open`."""
    return Cache.open(root, verify=verify)


def _attributes(spec: ColumnSpec, entry: ColumnEntry) -> dict[str, Any]:
    attributes: dict[str, Any] = {"meaning": spec.meaning, "fingerprint": digest(entry.fingerprint), **entry.attributes}
    if spec.units_per_metre is not None:
        attributes |= {"units": f"1/{spec.units_per_metre} m", "scale_factor": 1 / spec.units_per_metre, "missing_value": 0}
    return attributes


def array_files(manifest: Manifest, table: str, entry: ColumnEntry) -> dict[str, bytes]:
    """Zarr metadata of a column in `table` and of the groups above it, by path inside the table's folder."""
    per_sample = manifest.plan.views if entry.spec.axis == "view" else 1
    rows, shard_rows = manifest.tables[table].samples * per_sample, entry.shard_samples * per_sample
    return dict(_array_files(entry.spec, rows, shard_rows, json.dumps(_attributes(entry.spec, entry))))


@lru_cache(maxsize=1024)
def _array_files(spec: ColumnSpec, rows: int, shard_rows: int, attributes: str) -> tuple[tuple[str, bytes], ...]:
    store = MemoryStore()
    zarr.create_array(
        store,
        name=spec.name,
        shape=(rows, *spec.shape),
        chunks=(1, *spec.shape),
        shards=(shard_rows, *spec.shape),
        dtype=spec.dtype,
        serializer=BytesCodec(endian="little") if np.dtype(spec.dtype).itemsize > 1 else BytesCodec(endian=None),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if spec.compress else [Crc32cCodec()],
        fill_value=0,
        dimension_names=(spec.axis, *spec.dims),
        attributes=json.loads(attributes),
    )
    # the table's own group is there already
    return tuple((key, value.to_bytes()) for key, value in store._store_dict.items() if key != "zarr.json")


def group_files(manifest: Manifest) -> dict[str, bytes]:
    """Zarr metadata of the cache itself and of its tables, by path."""
    tables = {f"{name}/zarr.json": _group("samples", table.samples) for name, table in manifest.tables.items()}
    return {"zarr.json": _group("pcd", "see manifest.json"), **tables}


@lru_cache
def _group(attribute: str, value: Any) -> bytes:
    store = MemoryStore()
    zarr.create_group(store, attributes={attribute: value})
    return store._store_dict["zarr.json"].to_bytes()
