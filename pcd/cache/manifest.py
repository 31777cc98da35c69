"""The manifest: what a cache is supposed to hold, in one JSON file at its root.

It says nothing of what is there already: that is the commit records' word. It holds no times and no host names, so that a
cache built twice is the same bytes; those go to `provenance.jsonl`. It carries its own digest, and a spare copy of it lies
beside the commit records: an edited or damaged manifest is noticed when the cache is opened and can be restored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pcd.columns import ColumnSpec
from pcd.errors import CacheError, CorruptError
from pcd.files import json_text, read_json, write_text
from pcd.fingerprint import digest
from pcd.remote import AnyPath
from pcd.views import ViewPlan

SCHEMA = 1
MANIFEST = "manifest.json"
SPARE = "commits/manifest.json"
"""The same bytes as the manifest. Written first, so that it is never behind it."""
FORMAT = "pcd-cache"


@dataclass(frozen=True)
class ColumnEntry:
    """A column of the cache: its spec, samples per shard, the tables that have it, and what determines its values."""

    spec: ColumnSpec
    shard_samples: int
    tables: tuple[str, ...]
    fingerprint: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ColumnEntry:
        """The inverse of `as_json`."""
        spec = dict(value["spec"], shape=tuple(value["spec"]["shape"]), dims=tuple(value["spec"]["dims"]))
        return ColumnEntry(**{**value, "spec": ColumnSpec(**spec), "tables": tuple(value["tables"])})


@dataclass(frozen=True)
class TableEntry:
    """A table: how many samples, and the digest of their keys in order."""

    samples: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a cache is supposed to hold.

    `dataset` describes the samples (name, family, synthetic, depth_range, identity, notes), `split` how train and val were
    drawn, `encoders` maps the key of an encoder (`encoder_key`) to the `[encoder]` table and the request its columns were made
    from.
    """

    dataset: dict[str, Any]
    plan: ViewPlan
    split: dict[str, Any]
    tables: dict[str, TableEntry]
    columns: dict[str, ColumnEntry] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "dataset": self.dataset,
            "views": self.plan.as_json(),
            "split": self.split,
            "tables": {name: dataclasses.asdict(table) for name, table in self.tables.items()},
            "columns": {name: column.as_json() for name, column in self.columns.items()},
            "encoders": self.encoders,
        }

    def encoder_of(self, column: str) -> str | None:
        """The key in `encoders` of the encoder that made a column, or None for one that no encoder made."""
        entry = self.columns.get(column)
        return None if entry is None else encoder_of(column, entry.fingerprint, self.encoders)

    def identity(self) -> dict[str, Any]:
        """What two extractions into one cache must agree on, whatever columns they add."""
        whole = self.as_json()
        return {key: whole[key] for key in ("schema", "dataset", "views", "split", "tables")}

    def text(self) -> str:
        """What is written: plain values and their digest."""
        value = self.as_json()
        return json_text({**value, "digest": digest(value)})

    def write(self, root: AnyPath) -> None:
        """Write durably to `root`, the spare copy first."""
        write_text(root / SPARE, self.text())
        write_text(root / MANIFEST, self.text())

    @staticmethod
    def read(root: AnyPath, name: str = MANIFEST) -> Manifest:
        """Read from `root`; `name` may be `SPARE`.

        Raises `CacheError` if there is none or it is of another schema version, `CorruptError` if it is damaged or was edited.
        """
        path = root / name
        if not path.is_file():
            root.is_dir()  # a store that has no such bucket says so
            raise CacheError(f"{root} is not a pcd cache: {name} is not there. `pcd extract --cache {root}` makes one.")
        try:
            value = read_json(path)
            schema = value["schema"] if value.get("format") == FORMAT else None
            if schema == SCHEMA:
                claimed = value.pop("digest", None)  # caches of earlier versions have none
                manifest = _from_json(value)
                if claimed not in (None, digest(value)):
                    raise ValueError("it does not agree with its own digest")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(
                f"{path} is damaged, or was edited: {error}. `pcd cache verify {root} --repair` restores it from {SPARE}."
            ) from None
        if schema != SCHEMA:
            raise CacheError(f"{path} has schema {schema!r}, this pcd reads schema {SCHEMA}; use the pcd that wrote it.")
        return manifest


def encoder_key(kind: str, prefix: str = "") -> str:
    """What tells the encoders of a cache apart: the kind, and the prefix of its columns if it was given one."""
    return f"{kind}:{prefix}" if prefix else kind


def encoder_of(column: str, fingerprint: Mapping[str, Any], keys: Collection[str]) -> str | None:
    """Which of the encoders with these keys made a column of that name and fingerprint; None if no encoder did."""
    if "encoder" not in fingerprint:
        return None
    kind = fingerprint["encoder"]["encoder"]
    own = encoder_key(kind, column.partition("/")[0])
    return own if own in keys else str(kind)


def _from_json(value: dict[str, Any]) -> Manifest:
    return Manifest(
        dataset=value["dataset"],
        plan=ViewPlan.from_json(value["views"]),
        split=value["split"],
        tables={name: TableEntry(**value["tables"][name]) for name in sorted(value["tables"], key=_in_order)},
        columns={name: ColumnEntry.from_json(column) for name, column in value["columns"].items()},
        encoders=value["encoders"],
    )


def _in_order(table: str) -> tuple[int, str]:
    """Train, val, test, then the others by name: JSON objects have no order."""
    first = ("train", "val", "test")
    return (first.index(table) if table in first else len(first), table)
