"""A cache as a whole: a Zarr v3 group with a manifest and a table per split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from pcd.cache.manifest import ColumnEntry, Manifest
from pcd.cache.shards import ZSTD_LEVEL
from pcd.cache.table import SAMPLES, Table
from pcd.columns import ColumnSpec
from pcd.errors import CacheError, suggest
from pcd.files import write_bytes, write_json
from pcd.fingerprint import digest

TEXT = "text"


class Cache:
    """An opened cache. `Cache.open(path)` reads one, `Cache.create(path, manifest, keys)` begins one."""

    def __init__(self, root: Path, manifest: Manifest, *, verify: bool = True) -> None:
        """`verify` checks the crc32c of every row that is read."""
        self.root = root
        self.manifest = manifest
        self._verify = verify
        self._tables: dict[str, Table] = {}

    @staticmethod
    def open(root: str | Path, *, verify: bool = True) -> Cache:
        """Open the cache in folder `root`. Raises `CacheError` if there is none or it is damaged."""
        return Cache(Path(root), Manifest.read(Path(root)), verify=verify)

    @staticmethod
    def create(root: Path, manifest: Manifest, keys: Mapping[str, Sequence[str]]) -> Cache:
        """Begin a cache: groups, sample lists, then the manifest, which makes it one. Raises `CacheError` if one is there."""
        if (root / "manifest.json").exists():
            raise CacheError(f"{root} already holds a cache.")
        _write_group(root, {"pcd": "see manifest.json"})
        for name, names in keys.items():
            _write_group(root / name, {"samples": len(names)})
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
                self._write_array(table, entry)
            self.manifest.columns[name] = entry
        self.manifest.write(self.root)

    def _write_array(self, table: str, entry: ColumnEntry) -> None:
        spec, samples = entry.spec, self.manifest.tables[table].samples
        per_sample = self.manifest.plan.views if spec.axis == "view" else 1
        store = MemoryStore()
        zarr.create_array(
            store,
            name=spec.name,
            shape=(samples * per_sample, *spec.shape),
            chunks=(1, *spec.shape),
            shards=(entry.shard_samples * per_sample, *spec.shape),
            dtype=spec.dtype,
            serializer=BytesCodec(endian="little") if np.dtype(spec.dtype).itemsize > 1 else BytesCodec(endian=None),
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if spec.compress else [Crc32cCodec()],
            fill_value=0,
            dimension_names=(spec.axis, *spec.dims),
            attributes=_attributes(spec, entry),
        )
        for key, value in store._store_dict.items():
            if key != "zarr.json":  # the table's own group is there already
                write_bytes(self.root / table / key, value.to_bytes())

    def text(self, encoder: str, phrases: Sequence[str]) -> npt.NDArray[np.float32] | None:
        """Text embeddings `(len(phrases), D)` made by the encoder of that weights digest, or None if they are not stored."""
        folder = self._text_folder(encoder, phrases)
        if not (folder / "zarr.json").is_file():
            return None
        return np.asarray(zarr.open_array(folder, mode="r")[:], dtype=np.float32)

    def add_text(self, encoder: str, phrases: Sequence[str], embeddings: npt.NDArray[np.float32]) -> None:
        """Store text embeddings `(len(phrases), D)` beside the columns; the metadata is written last."""
        store = MemoryStore()
        array = zarr.create_array(
            store,
            shape=embeddings.shape,
            chunks=embeddings.shape,
            dtype="float32",
            compressors=[Crc32cCodec()],
            dimension_names=("phrase", "channel"),
            attributes={"encoder": encoder, "phrases": list(phrases)},
        )
        array[:] = embeddings
        folder = self._text_folder(encoder, phrases)
        for key in sorted(store._store_dict):  # "c/..." before "zarr.json"
            write_bytes(folder / key, store._store_dict[key].to_bytes())

    def texts(self) -> list[dict[str, Any]]:
        """What text embeddings are stored: encoder digest and phrases."""
        files = sorted((self.root / TEXT).glob("*/*/zarr.json"))
        return [json.loads(file.read_text(encoding="utf-8"))["attributes"] for file in files]

    def _text_folder(self, encoder: str, phrases: Sequence[str]) -> Path:
        return self.root / TEXT / encoder[:16] / digest(list(phrases))[:16]

    def close(self) -> None:
        """Close all open shard files."""
        for table in self._tables.values():
            table.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cache(root: str | Path, *, verify: bool = True) -> Cache:
    """Open the cache in folder `root`; the same as `Cache.open`."""
    return Cache.open(root, verify=verify)


def _attributes(spec: ColumnSpec, entry: ColumnEntry) -> dict[str, Any]:
    attributes: dict[str, Any] = {"meaning": spec.meaning, "fingerprint": digest(entry.fingerprint), **entry.attributes}
    if spec.units_per_metre is not None:
        attributes |= {"units": f"1/{spec.units_per_metre} m", "scale_factor": 1 / spec.units_per_metre, "missing_value": 0}
    return attributes


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes)
    write_bytes(folder / "zarr.json", store._store_dict["zarr.json"].to_bytes())
