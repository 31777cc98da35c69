"""Seeded random damage to a whole cache: all of it is found, none of it is read as if it were right, and repair undoes it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
import pytest

from pcd.cache import Cache, commits
from pcd.errors import CacheError, CorruptError
from pcd.files import json_text
from pcd.fingerprint import digest
from pcd.stages.extract import extract
from pcd.stages.repair import repair
from pcd.stages.verify import verify
from tests.cache_support import HERE, SMALL, small_shards, whole
from tests.test_extract import files, toy_recipe

Random = np.random.Generator
Damage = Callable[[Random, Path, list[str]], list[str]]
__all__ = ["small_shards", "whole"]
ROUNDS = 40
MANIFESTS = ("manifest.json", "commits/manifest.json")
Truth = dict[tuple[str, str], np.ndarray]


def shards(names: list[str], column: str = "") -> list[str]:
    return [name for name in names if "/c/" in name and not name.startswith("text/") and f"{column}/c/" in name]


def records(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("commits/") and name not in MANIFESTS]


def pick(rng: Random, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def flip(rng: Random, root: Path, names: list[str]) -> list[str]:
    name = pick(rng, names)
    data = bytearray((root / name).read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    (root / name).write_bytes(data)
    return [name]


def flip_in_a_shard(rng: Random, root: Path, names: list[str]) -> list[str]:
    return flip(rng, root, shards(names))


def truncate(rng: Random, root: Path, names: list[str]) -> list[str]:
    name = pick(rng, names)
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: int(rng.integers(len(data)))])
    return [name]


def lengthen(rng: Random, root: Path, names: list[str]) -> list[str]:
    name = pick(rng, names)
    (root / name).write_bytes((root / name).read_bytes() + b"x")
    return [name]


def delete(rng: Random, root: Path, names: list[str]) -> list[str]:
    """But for commit records, the metadata of texts and the spare manifest: without them a thing was never there."""
    kept = set(records(names)) | {n for n in names if n == MANIFESTS[1] or (n.startswith("text/") and n.endswith("zarr.json"))}
    name = pick(rng, [name for name in names if name not in kept])
    (root / name).unlink()
    return [name]


def swap(root: Path, first: str, second: str) -> list[str]:
    one, other = (root / first).read_bytes(), (root / second).read_bytes()
    if one == other:
        return []
    (root / first).write_bytes(other)
    (root / second).write_bytes(one)
    return [first, second]


def swap_files(rng: Random, root: Path, names: list[str]) -> list[str]:
    """Of equal size, if there is one: shards of a column or of two, records, texts."""
    first = pick(rng, [*shards(names), *records(names), *(n for n in names if n.startswith("text/") and "/c/" in n)])
    size = (root / first).stat().st_size
    alike = [n for n in names if n != first and (root / n).stat().st_size == size]
    return swap(root, first, pick(rng, alike)) if alike else []


def swap_rows(rng: Random, root: Path, names: list[str]) -> list[str]:
    """Rows with their checksums, in place: the shard agrees with itself in everything."""
    name = pick(rng, shards(names, "clip/patch"))
    data = bytearray((root / name).read_bytes())
    length = struct.unpack_from("<Q", data, len(data) - 4 - 8 * 16 + 8)[0]
    data[:length], data[length : 2 * length] = data[length : 2 * length], data[:length]
    (root / name).write_bytes(data)
    return [name]


def swap_index_entries(rng: Random, root: Path, names: list[str]) -> list[str]:
    """And the index's checksum made to agree."""
    name = pick(rng, shards(names, "depth/canvas"))
    data = (root / name).read_bytes()
    index = data[-(8 * 16 + 4) : -4]
    index = index[16:32] + index[:16] + index[32:]
    (root / name).write_bytes(data[: -(8 * 16 + 4)] + index + struct.pack("<I", google_crc32c.value(index)))
    return [name]


def edit(rng: Random, root: Path, names: list[str]) -> list[str]:
    """One leaf of a JSON file of metadata is another."""
    name = pick(rng, [name for name in names if name.endswith(".json")])
    value = json.loads((root / name).read_text())
    holder: Any = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(holder[key], dict | list) and holder[key]:
            holder = holder[key]
            continue
        old = holder[key]
        if isinstance(old, bool) or old is None or isinstance(old, dict | list):
            holder[key] = not old
        else:
            holder[key] = f"{old}x" if isinstance(old, str) else old + 1
        break
    (root / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return [name]


def forge_record(rng: Random, root: Path, names: list[str]) -> list[str]:
    """A record that agrees with its own digest, but not with cache or shard."""
    name = pick(rng, records(names))
    value = json.loads((root / name).read_text())
    del value["digest"]
    key = pick(rng, ["start", "stop", "bytes", "shard", "sha256", "fingerprint", "table", "column"])
    value[key] = value[key] + 1 if isinstance(value[key], int) else value[key][::-1]
    (root / name).write_text(json_text({**value, "digest": digest(value)}))
    return [name] if value["table"] != value["table"][::-1] or key != "table" else []


DAMAGES: list[Damage] = [flip, flip_in_a_shard, truncate, lengthen, delete, swap_files, swap_rows, swap_index_entries, edit]
DAMAGES += [forge_record]
WELL_FORMED = (swap_files, swap_rows, swap_index_entries)
"""Whole pieces in another place: every checksum that a reader sees agrees. Only verify looks at the SHA-256."""


def key_of(name: str) -> Any:
    """What a fault says of a file: its place if it belongs to a shard, else its path."""
    parts = PurePosixPath(name).parts
    if parts[0] == "text":
        return "/".join([*parts[:3], "zarr.json"])
    if parts[0] == "commits" and name not in MANIFESTS:
        return parts[1], "/".join(parts[2:-1]), int(parts[-1][:-5])
    if "c" in parts:
        at = parts.index("c")
        return parts[0], "/".join(parts[1:at]), int(parts[at + 1])
    return name


def damage(rng: Random, root: Path, names: list[str]) -> dict[Any, Damage]:
    """Three to eight pieces of damage, in different places; at most one of the manifest and its copy."""
    done: dict[Any, Damage] = {}
    free = list(names)
    for _ in range(int(rng.integers(3, 9))):
        kind = DAMAGES[int(rng.integers(len(DAMAGES)))]
        touched = kind(rng, root, free)
        done |= {key_of(name): kind for name in touched}
        shut = {key_of(name) for name in touched} | (set(MANIFESTS) if set(touched) & set(MANIFESTS) else set())
        free = [name for name in free if key_of(name) not in shut]
    return done


def truth(root: Path) -> Truth:
    with Cache.open(root) as cache:
        return {
            (table.name, name): table.column(name).read(range(table.column(name).rows))
            for table in cache.tables
            for name in table.column_names()
        }


def assert_right_or_refused(root: Path, right: Truth, places: list[tuple[str, str, int]]) -> None:
    """Every row of these shards is what was written, or an error of ours."""
    try:
        cache = Cache.open(root)
    except CacheError:
        return
    with cache:
        for table, name, shard in places:
            column = cache.table(table).column(name)
            for row in range(shard * column.shard_rows, min((shard + 1) * column.shard_rows, column.rows)):
                try:
                    value = column.read([row])
                except CorruptError:
                    continue
                assert value.tobytes() == right[table, name][[row]].tobytes(), (table, name, row)


def run_rounds(whole: Path, root: Path, seed: int, rounds: int) -> int:
    """Damage, find, read, repair; the number of damaged places."""
    shutil.copytree(whole, root)
    before, right, rng, cases = files(whole), truth(whole), np.random.default_rng(seed), 0
    names = sorted(before)
    for number in range(rounds):
        done = damage(rng, root, names)
        cases += len(done)
        said = f"seed {seed}, round {number}: { {str(key): kind.__name__ for key, kind in done.items()} }"
        faults = verify(root).faults
        found = {(f.table, f.column, f.shard) if f.shard is not None else f.path for f in faults}
        assert set(done) <= found, said
        shaken = [key for key, kind in done.items() if isinstance(key, tuple) and kind not in WELL_FORMED]
        assert_right_or_refused(root, right, shaken)
        outcome = repair(root, faults, HERE)
        after = files(root)
        assert after.keys() == before.keys(), said
        assert [name for name in names if after[name] != before[name]] == [], (said, outcome.notes)
        assert verify(root, fast=True).faults == []
    return cases


def test_damage_is_found_never_read_as_right_and_undone(whole: Path, tmp_path: Path) -> None:
    assert run_rounds(whole, tmp_path / "cache", seed=0, rounds=ROUNDS) > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_much_damage_is_found_and_undone(whole: Path, tmp_path: Path, seed: int) -> None:
    assert run_rounds(whole, tmp_path / "cache", seed, 100) > 500


def test_deleted_records_are_absent_and_extracted_again(whole: Path, tmp_path: Path) -> None:
    """Nothing vouches for the shard any more: it does not exist, and repair leaves that to extract."""
    root = tmp_path / "cache"
    shutil.copytree(whole, root)
    for table, column, shard in (("train", "clip/patch", 1), ("test", "sample/ok", 0)):
        commits.path(root, table, column, shard).unlink()
    faults = verify(root).faults
    assert [(f.kind, f.table, f.column, f.shard) for f in faults] == [
        ("absent", "train", "clip/patch", 1),
        ("absent", "test", "sample/ok", 0),
    ]
    repair(root, faults, HERE)
    assert verify(root).faults == faults
    extract(toy_recipe(dataset=SMALL), root, device="cpu")
    assert files(root).keys() == files(whole).keys()
    assert verify(root).faults == []


def test_every_bit_of_small_files_matters(whole: Path, tmp_path: Path) -> None:
    """Each byte of a record, of metadata, of the manifest, of a sample list and of a text, one after the other."""
    root = tmp_path / "cache"
    shutil.copytree(whole, root)
    text = next(name for name in files(root) if name.startswith("text/") and "/c/" in name)
    for name in ("commits/test/clip/cls/000000.json", "test/clip/cls/zarr.json", "manifest.json", "test/samples.json", text):
        good = (root / name).read_bytes()
        for position in range(0, len(good), max(1, len(good) // 10)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            (root / name).write_bytes(bad)
            assert key_of(name) in {
                (f.table, f.column, f.shard) if f.shard is not None else f.path for f in verify(root).faults
            }
        (root / name).write_bytes(good)
    assert verify(root).faults == []
