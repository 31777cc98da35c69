"""What int8 tokens cost: how far they are from float16, what becomes of a head's scores, how many bytes and how fast they are.

    python benchmarks/compact_tokens.py CACHE [--epochs 8] [--seeds 3] [--rows 512] [--batches 120] [--set KEY=VALUE]

CACHE holds float16 tokens. A twin is made of it in a temporary folder whose tokens are the same ones coded as int8; nothing is
encoded again. Heads (hidden width D) train on both with the same seeds; their epoch is the one that was best on val.
Reading: batches of 8 rows from columns of real tokens repeated to `--rows`, float16 and int8 in turns, batch by batch, each
round with rows of its own and in another order. Warm is out of the page cache; for cold the files are dropped from it before
every batch (posix_fadvise), so that they come from storage or from what lies below it. Printed are medians and middle halves.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does: a thread that spins costs time

import numpy as np
import numpy.typing as npt
import torch

from pcd.cache import Cache, ColumnEntry, Manifest, Table, TableEntry, compact, parallel
from pcd.cache.column import Column
from pcd.cache.writer import RangeWriter
from pcd.fingerprint import digest
from pcd.stages.evaluate import evaluate
from pcd.stages.recipes import training_recipe
from pcd.stages.runs import labels
from pcd.stages.train import train
from pcd.views import ViewPlan

BATCH = 8
METRICS = ("abs_rel", "rmse", "delta1")
PROTOCOL = "eigen"
Rows = npt.NDArray[np.int64]


def twin(source: Cache, root: Path) -> Cache:
    """The same cache, its float16 tokens coded as int8."""
    manifest = replace(source.manifest, columns={})
    cache = Cache.create(root, manifest, {table.name: table.keys for table in source.tables})
    entries = source.manifest.columns
    cache.add_columns({n: compact.compacted(e) if compact.applies(e.spec) else e for n, e in entries.items()})
    for table in source.tables:
        copy_rows(table, cache.table(table.name))
    for text in source.texts():
        if (found := source.text(text["encoder"], text["phrases"])) is not None:
            cache.add_text(text["encoder"], text["phrases"], found)
    return Cache.open(root)


def copy_rows(source: Table, target: Table) -> None:
    """All rows of all columns; the writer codes those that are to be coded."""
    for name in source.column_names():
        column, views = source.column(name), source.column(name).rows // source.samples
        step = column.entry.shard_samples
        for start in range(0, source.samples, step):
            stop = min(start + step, source.samples)
            with RangeWriter(target, [name], start, stop) as writer:
                writer.append({name: column.read(np.arange(start * views, stop * views))})


def token_columns(cache: Cache) -> list[str]:
    """Names of the columns that are coded."""
    return [name for name, entry in cache.manifest.columns.items() if compact.applies(entry.spec)]


def errors_of(plain: Cache, small: Cache, name: str) -> None:
    """How far each token of each view is from what it was."""
    relative, centred, cosines, largest, reach = [], [], [], 0.0, 0.0
    for table in plain.tables:
        rows = table.view_rows(table.usable()).reshape(-1)
        for row in rows.tolist():
            before, after = (c.table(table.name).column(name).read([row])[0].astype(np.float64) for c in (plain, small))
            error = np.linalg.norm(after - before, axis=1)
            relative.append(error / np.linalg.norm(before, axis=1))
            centred.append(error / np.linalg.norm(before - before.mean(axis=0), axis=1))
            products = (before * after).sum(axis=1)
            cosines.append(products / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1))
            largest, reach = max(largest, float(np.abs(after - before).max())), max(reach, float(np.abs(before).max()))
    per_token, own, cosine = np.concatenate(relative), np.concatenate(centred), np.concatenate(cosines)
    print(f"\n{name}: {len(per_token)} tokens of {len(relative)} views, {before.shape[1]} channels")
    for word, values in (("relative RMS error of a token", per_token), ("the same, relative to token - mean of its view", own)):
        high = ", ".join(f"{q} % {np.percentile(values, q):.5f}" for q in (95, 99))
        print(f"{word:50} mean {values.mean():.5f}, {high}, largest {values.max():.5f}")
    low = np.percentile(cosine, 1)
    print(f"{'cosine with the original':50} mean {cosine.mean():.7f}, 1 % {low:.7f}, least {cosine.min():.7f}")
    print(f"{'largest error of a value':50} {largest:.4f} (largest value {reach:.2f})")


def scores_of(plain: Cache, small: Cache, folder: Path, epochs: int, seeds: int, changes: list[str]) -> None:
    """Heads trained on each, and those of float16 scored on int8."""
    found: dict[str, list[dict[str, float]]] = {"float16": [], "int8": [], "float16 on int8": []}
    split = "test" if "test" in plain.manifest.tables else "val"
    for seed in range(seeds):
        keys = ["head.hidden=1", "head.table_init=tokens", f"train.epochs={epochs}", f"train.seed={seed}", *changes]
        for form, cache in (("float16", plain), ("int8", small)):
            run = train(training_recipe(cache, None, keys), cache, folder / f"{form}-{seed}")
            for other in (plain, small) if form == "float16" else (small,):
                label = form if other is cache else "float16 on int8"
                found[label].append(evaluate(run, other, split=split, protocols=[PROTOCOL]).metrics(PROTOCOL))
    samples = plain.manifest.tables[split].samples
    print(
        f"\n{epochs} epochs, hidden width D, {seeds} seeds, {split} ({samples} samples), {PROTOCOL}; mean and spread over seeds"
    )
    for metric in METRICS:
        values = {form: [scores[metric] for scores in each] for form, each in found.items()}
        base, spread = values["float16"], statistics.stdev(values["float16"])
        print(f"{metric:8} float16 {statistics.mean(base):.4f} +- {spread:.4f}", end="")
        for form in ("int8", "float16 on int8"):
            gaps = [value - own for value, own in zip(values[form], base, strict=True)]
            each = ", ".join(f"{gap:+.5f}" for gap in gaps)
            print(f" | {form} {statistics.mean(values[form]):.4f}, {statistics.mean(gaps):+.5f} ({each})", end="")
        print()


def speed_cache(source: Column, root: Path, rows: int) -> tuple[Column, Column]:
    """Columns of the source's rows, repeated, as float16 and as int8."""
    spec = replace(source.spec, name="plain/patch")
    keys = [str(number) for number in range(rows)]
    manifest = Manifest({"name": "speed"}, ViewPlan((336, 336), flips=False), {}, {"train": TableEntry(rows, digest(keys))})
    cache = Cache.create(root, manifest, {"train": keys})
    plain = ColumnEntry(spec, 64, ("train",), {})
    small = compact.compacted(replace(plain, spec=replace(spec, name="small/patch")))
    cache.add_columns({entry.spec.name: entry for entry in (plain, small)})
    table = cache.table("train")
    with RangeWriter(table, table.column_names(), 0, rows) as writer:
        for start in range(0, rows, 64):
            part = source.read(np.arange(start, min(start + 64, rows)) % source.rows)
            writer.append({"plain/patch": part, "small/patch": part})
    opened = Cache.open(root).table("train")
    return opened.column("plain/patch"), opened.column("small/patch")


def read_speed(source: Column, root: Path, rows: int, batches: int) -> None:
    """Batches in turns: float16, int8, and the int8 codes without decoding."""
    plain, small = speed_cache(source, root, rows)
    codes = Column(small.root, small.table, replace(small.entry, spec=small.stored, attributes={}), rows, small.shard_rows)
    files = {column.stored.name: sorted((root / "train" / column.stored.name).glob("c/*/0/0")) for column in (plain, small)}
    size = {name: sum(file.stat().st_size for file in paths) for name, paths in files.items()}
    print(f"\n{rows} rows of {'x'.join(map(str, plain.spec.shape))}: float16 {size['plain/patch'] / 1e6:.1f} MB, ", end="")
    print(f"int8 {size['small/patch'] / 1e6:.1f} MB, {size['small/patch'] / size['plain/patch']:.3f} of it")
    contestants = {"float16": plain, "int8": small, "int8, not decoded": codes}
    paths = [path for each in files.values() for path in each]
    for number in dict.fromkeys((parallel.THREADS, 1)):
        parallel.THREADS = number
        for temperature in ("warm", "cold"):
            drop = (lambda: drop_pages(paths)) if temperature == "cold" else (lambda: None)
            report(f"{temperature}, {number} threads", *turns(contestants, rows, batches, drop), plain.spec.row_bytes)


def drop_pages(paths: list[Path]) -> None:
    """Ask the kernel to forget these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def turns(
    contestants: dict[str, Column], rows: int, batches: int, before: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and processor seconds of each batch."""
    random = np.random.default_rng(0)
    wall, busy = ({name: list[float]() for name in contestants} for _ in range(2))
    memory = {name: np.empty((BATCH, *c.spec.shape), dtype=c.spec.dtype) for name, c in contestants.items()}
    for turn in range(batches + 5):
        numbers = random.permutation(rows)[: BATCH * len(contestants)].reshape(-1, BATCH)
        for place in random.permutation(len(contestants)).tolist():
            name = list(contestants)[place]
            before()
            begin, used = time.perf_counter(), time.process_time()
            contestants[name].read(numbers[place], memory[name])
            if turn >= 5:
                wall[name].append(time.perf_counter() - begin)
                busy[name].append(time.process_time() - used)
    return wall, busy


def report(title: str, wall: dict[str, list[float]], busy: dict[str, list[float]], row_bytes: int) -> None:
    """Batches as GB/s of the float16 they stand for."""
    for name, times in wall.items():
        speed = [BATCH * row_bytes / seconds / 1e9 for seconds in times]
        low, middle, high = statistics.quantiles(speed, n=4)
        ratio = statistics.median(a / b for a, b in zip(wall["float16"], times, strict=True))
        print(
            f"{title:16} {name:18} {middle:5.2f} GB/s ({low:.2f} to {high:.2f}), {ratio:.2f} times float16's speed, "
            f"{1e3 * statistics.median(times):6.2f} ms, {1e3 * statistics.median(busy[name]):5.2f} ms of processors"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where the temporary caches go")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name, Cache.open(given.cache) as plain:
        print(f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
        encoders = [e.fingerprint["encoder"] for e in plain.manifest.columns.values() if "encoder" in e.fingerprint]
        names = ", ".join(dict.fromkeys(f"{e['encoder']}:{e['model']}" for e in encoders))
        print(f"{given.cache}: {names}; {'; '.join(labels(plain.manifest.dataset, encoders)) or 'no labels'}")
        small = twin(plain, Path(name) / "twin")
        for column in token_columns(plain):
            errors_of(plain, small, column)
        read_speed(plain.table("train").column(token_columns(plain)[0]), Path(name) / "speed", given.rows, given.batches)
        if given.seeds > 1:
            scores_of(plain, small, Path(name), given.epochs, given.seeds, given.set)


if __name__ == "__main__":
    main()
