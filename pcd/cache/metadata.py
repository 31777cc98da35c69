"""Everything of a cache that is no shard: is it what the manifest says, and does the manifest agree with itself?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pcd.cache.fault import Fault, file_fault
from pcd.cache.manifest import MANIFEST, SCHEMA, SPARE, Manifest
from pcd.cache.provenance import PROVENANCE, unreadable
from pcd.cache.store import Cache, array_files, group_files
from pcd.cache.table import SAMPLES
from pcd.cache.texts import METADATA, TEXT, metadata_of, read_text, text_folders
from pcd.errors import CacheError, CorruptError, StoreError
from pcd.files import json_text, read_json
from pcd.fingerprint import differences, digest
from pcd.remote import AnyPath

SHOWN = 3
"""Differing fields that a fault names."""
OPTIONAL = ("attributes", "configuration", "consolidated_metadata", "storage_transformers")
"""Keys of Zarr metadata that a version of the library may leave out or write empty."""


def open_damaged(root: AnyPath) -> tuple[Cache, list[Fault]]:
    """The cache in folder `root` by its manifest or, with a fault, by the spare copy of one that is damaged, edited or gone.

    Raises `CacheError` if neither can be read.
    """
    try:
        cache = Cache.open(root)
        if sealed(root) or not (root / SPARE).is_file():
            return cache, []
        raise CorruptError(f"{root / MANIFEST} has lost its digest.")  # every manifest with a spare copy has one
    except StoreError:
        raise
    except CacheError as error:
        try:
            manifest = Manifest.read(root, SPARE)
        except CacheError:
            raise error from None
        return Cache(root, manifest), [file_fault(MANIFEST, str(error), column="manifest")]


def sealed(root: AnyPath) -> bool:
    """Whether the manifest carries its own digest; those of earlier versions do not, nor do damaged ones."""
    try:
        return "digest" in read_json(root / MANIFEST)
    except (OSError, ValueError):
        return False


def zarr_files(manifest: Manifest) -> dict[str, bytes]:
    """The Zarr metadata of all groups and columns as the manifest wants them, by path relative to the cache."""
    files = group_files(manifest)
    for entry in manifest.columns.values():
        for table in entry.tables:
            files |= {f"{table}/{key}": data for key, data in array_files(manifest, table, entry).items()}
    return files


def verify_metadata(cache: Cache) -> list[Fault]:
    """Check the manifest and its copy, Zarr metadata, sample lists, text embeddings and provenance; all of it is small."""
    faults = [*_manifest(cache), *_zarr(cache), *_samples(cache), *_texts(cache), *_provenance(cache.root)]
    if not cache.manifest.columns:
        faults.append(Fault("-", "-", None, "all", "absent", "the cache has no columns yet"))
    return faults


def _manifest(cache: Cache) -> Iterator[Fault]:
    root, spare = cache.root, cache.root / SPARE
    if spare.is_file():
        try:
            if Manifest.read(root, SPARE).text() != _text(spare):
                raise CorruptError(f"{spare} is spelled otherwise than it was written.")
        except StoreError:
            raise
        except CacheError as error:
            yield file_fault(SPARE, str(error), column="manifest")
    text = cache.manifest.text()
    if sealed(root) and read_json(root / MANIFEST) == json.loads(text) and _text(root / MANIFEST) != text:
        yield file_fault(MANIFEST, f"{root / MANIFEST} is spelled otherwise than it was written", column="manifest")
    tables = cache.manifest.as_json()["tables"]
    truth = {"schema": SCHEMA, "dataset": digest(cache.manifest.dataset), "tables": digest(tables)}
    truth["views"] = cache.manifest.plan.as_json()
    for name, entry in cache.manifest.columns.items():
        wanted = {key: value for key, value in {**truth, "column": name}.items() if key in entry.fingerprint}
        found = {key: entry.fingerprint[key] for key in wanted}
        if lines := [*differences(found, wanted), *([] if entry.spec.name == name else [f"name: {entry.spec.name}"])]:
            detail = "its fingerprint does not belong to the rest of the manifest: " + "; ".join(lines[:SHOWN])
            yield file_fault(MANIFEST, detail, column=name)


def _text(path: AnyPath) -> str:
    return path.read_bytes().decode(errors="replace")


def _zarr(cache: Cache) -> Iterator[Fault]:
    for key, data in zarr_files(cache.manifest).items():
        table, _, column = key.removesuffix(METADATA).rstrip("/").partition("/")
        column = column if column in cache.manifest.columns else "group"
        file = cache.root / key
        try:
            found, wanted = _bare(read_json(file)), _bare(json.loads(data))
            lines = differences(found, wanted) if isinstance(found, dict) else ["it holds no JSON object"]
        except FileNotFoundError:
            lines = ["it is gone"]
        except (OSError, ValueError) as error:
            lines = [str(error)]
        if lines:
            detail = f"{file} is not what the manifest says: " + "; ".join(lines[:SHOWN])
            yield file_fault(key, detail, table=table or "-", column=column)


def _bare(value: Any) -> Any:
    """Without what says nothing: `{"name": "crc32c", "configuration": {}}` is `{"name": "crc32c"}` to every reader."""
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if key not in OPTIONAL or item not in (None, {}, [])}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _samples(cache: Cache) -> Iterator[Fault]:
    for table in cache.tables:
        path = f"{table.name}/{SAMPLES}"
        try:
            if _text(cache.root / path) != json_text(list(table.keys)):
                raise CorruptError(f"{cache.root / path} is spelled otherwise than it was written.")
        except (CorruptError, FileNotFoundError) as error:
            yield file_fault(path, str(error), table=table.name, column="samples")


def _texts(cache: Cache) -> Iterator[Fault]:
    for folder in text_folders(cache.root):
        path = f"{TEXT}/{folder.parent.name}/{folder.name}/{METADATA}"
        try:
            encoder, phrases, embeddings = read_text(folder)
            found = read_json(folder / METADATA)
            wanted = metadata_of(encoder, phrases, embeddings, digested="sha256" in found["attributes"])
            if lines := differences(_bare(found), _bare(wanted)):
                raise CorruptError(f"{folder / METADATA} is not what was written: {'; '.join(lines[:SHOWN])}")
        except CorruptError as error:
            yield file_fault(path, str(error), column="texts")


def _provenance(root: AnyPath) -> Iterator[Fault]:
    if bad := unreadable(root):
        detail = f"{root / PROVENANCE}: line {', '.join(map(str, bad))} cannot be read"
        yield file_fault(PROVENANCE, detail, column="provenance")
