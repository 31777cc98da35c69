"""Facts about a cache, from its manifest, records, provenance and file sizes alone."""

from __future__ import annotations

import json
from typing import Any

from pcd.cache import Cache, commits, provenance
from pcd.cache.compact import as_read, is_compact
from pcd.cache.objects import each
from pcd.fingerprint import digest
from pcd.stages.extract import describe_rows
from pcd.stages.runs import labels

SHORT = 12
"""Digits of a digest that are shown."""
HISTORY = ("time", "command", "device", "seconds", "encoded", "repaired", "pcd", "torch", "open_clip", "zarr", "python")
"""What is shown of a line of the provenance, where it was noted."""


def inspect_cache(cache: Cache) -> dict[str, Any]:
    """What is in a cache, how big, how complete, from which weights, which samples were skipped, and its history."""
    dataset, plan = cache.manifest.dataset, cache.manifest.plan
    columns = [_column(cache, name) for name in cache.manifest.columns]
    encoders = _encoders(cache)
    facts = {
        "dataset": f"{dataset['name']}, {dataset['depth_range'][0]} to {dataset['depth_range'][1]} m",
        "views": f"canvas {plan.canvas[0]}x{plan.canvas[1]}, {plan.grid[0]}x{plan.grid[1]} tiles, "
        f"{'mirrored too' if plan.flips else 'not mirrored'}, crop {plan.crop or 'none'}",
        "split": f"val is {cache.manifest.split['val']} (seed {cache.manifest.split['seed']})",
        **{f"encoder {number}": text for number, text in enumerate((_describe(e) for e in encoders), start=1)},
        "texts": f"{len(cache.texts())} lists of phrases embedded",
        "fingerprints": f"samples {digest(cache.manifest.identity())[:SHORT]}, "
        + ", ".join(f"encoder {digest(encoder)[:SHORT]}" for encoder in encoders),
        "notes": "; ".join([*dataset["notes"], *labels(dataset, encoders)]) or "none",
    }
    return {
        "path": str(cache.root),
        "summary": f"{describe_rows(cache)}; {'complete' if cache.complete else 'INCOMPLETE'}; "
        f"{sum(column['bytes'] for column in columns) / 1e9:.3f} GB",
        "complete": cache.complete,
        "facts": facts,
        "columns": columns,
        "skipped": skipped(cache),
        "history": [{key: entry[key] for key in HISTORY if key in entry} for entry in provenance.records(cache.root)],
        "manifest": cache.manifest.as_json(),
    }


def _column(cache: Cache, name: str) -> dict[str, Any]:
    entry = cache.manifest.columns[name]
    tables = [cache.table(table).column(name) for table in entry.tables]
    places = [(column.table, shard) for column in tables for shard in commits.committed(cache.root, column.table, name)]
    records = each(lambda place: commits.read(cache.root, place[0], name, place[1]), places, cache.root)
    spec = as_read(entry).spec
    return {
        "name": name,
        "shape": list(spec.shape),
        "dtype": f"{spec.dtype} as {entry.spec.dtype}" if is_compact(entry) else spec.dtype,
        "meaning": entry.spec.meaning,
        "tables": list(entry.tables),
        "rows": sum(column.rows for column in tables),
        "committed_rows": sum(record.stop - record.start for record in records),
        "bytes": sum(record.bytes for record in records),
        "fingerprint": digest(entry.fingerprint)[:SHORT],
    }


def _encoders(cache: Cache) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in cache.manifest.columns.values():
        if "encoder" in entry.fingerprint:
            encoder = entry.fingerprint["encoder"]
            found[json.dumps(encoder, sort_keys=True)] = encoder
    return list(found.values())


def _describe(encoder: dict[str, Any]) -> str:
    weights = encoder["weights"]
    return (
        f"{encoder['encoder']}:{encoder['model']}, {weights['kind']} weights {str(weights['digest'])[:12]}, "
        f"{encoder['precision']}, {encoder['grid'][0]}x{encoder['grid'][1]} patches"
    )


def encoder_names(cache: Cache) -> list[str]:
    """The encoders that filled columns, such as `openclip:ViT-B-16`."""
    return [f"{encoder['encoder']}:{encoder['model']}" for encoder in _encoders(cache)]


def describe_step(entry: dict[str, Any]) -> str:
    """A line of the history in words."""
    versions = ", ".join(f"{name} {entry[name]}" for name in ("pcd", "torch", "open_clip", "zarr", "python") if entry.get(name))
    did = f"repaired {', '.join(entry['repaired'])}" if "repaired" in entry else f"{entry.get('encoded', '?')} samples"
    took = f" in {entry['seconds']} s" if "seconds" in entry else ""
    command = f": {entry['command']}" if "command" in entry else ""
    return f"{entry.get('time', 'some time')}: {did}{took} on {entry.get('device', 'an unknown device')} ({versions}){command}"


def skipped(cache: Cache) -> dict[str, str]:
    """Samples that were skipped, with the reason noted at the time."""
    return provenance.skipped(cache.root)
