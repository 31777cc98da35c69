"""Whether streamed rows should come in a random order, or shuffled in blocks, or as they lie: what each order reads per second.

    python benchmarks/row_order.py [--folder DIR] [--rows 1216] [--epochs 5] [--blocks 1 4] [--threads N]

Rows are (576, 768) float16, the tokens of one view by ViT-L/14@336, 885 kB, in shards of 64 (57 MB), crc32c verified. An epoch
reads every row once in batches of 8, one batch after the other, as `--residency stream` does. "Blocks of n": the order of
blocks of n shards is random, and that of the rows within each. Cold: before every epoch the files are dropped from the page
cache (posix_fadvise after fsync); the share that then came from storage is counted. What is below, the disk of this machine,
may have a cache of its own. Orders take turns, in a new one each round; printed are the median of epochs with lowest and
highest, and the median of the ratios to the random order, round by round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reading import BATCH, ROW_BYTES, SHARD, SPEC, begin_cache, blocks, from_storage

from pcd.cache import Cache, parallel
from pcd.cache.column import Column
from pcd.cache.writer import RangeWriter

Rows = npt.NDArray[np.int64]
Order = Callable[[np.random.Generator], Rows]


def sequential(rows: int, random: np.random.Generator) -> Rows:
    """As they lie."""
    return np.arange(rows)


def shuffled(rows: int, size: int, random: np.random.Generator) -> Rows:
    """Blocks of `size` rows in a random order, and the rows within each."""
    starts = random.permutation(np.arange(0, rows, size))
    return np.concatenate([random.permutation(np.arange(start, min(start + size, rows))) for start in starts])


def write(folder: Path, rows: int) -> Column:
    """The column on disk, durable."""
    cache = begin_cache(folder / "cache", rows, [SPEC])
    with RangeWriter(cache.table("train"), [SPEC.name], 0, rows) as writer:
        for block in blocks(rows):
            writer.append({SPEC.name: block})
    return Cache.open(folder / "cache").table("train").column(SPEC.name)


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget all shards."""
    for path in sorted((folder / "cache" / "train" / SPEC.name).glob("c/*/0/0")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are still to be written cannot be forgotten
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(column: Column, order: Rows, out: npt.NDArray[np.float16]) -> tuple[float, float, int]:
    """Seconds, processor seconds and bytes from storage of an epoch."""
    begin, used, stored = time.perf_counter(), time.process_time(), from_storage()
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        column.read(rows, out[: len(rows)])
    return time.perf_counter() - begin, time.process_time() - used, from_storage() - stored


def compare(column: Column, orders: dict[str, Order], epochs: int, before: Callable[[], None]) -> None:
    """Epochs in turns; the first round is not counted."""
    random, out = np.random.default_rng(0), np.zeros((BATCH, *column.spec.shape), np.float16)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in orders}
    for turn in range(epochs + 1):
        for name in random.permutation(list(orders)).tolist():
            before()
            times = read_all(column, orders[name](random), out)
            if turn:
                found[name].append(times)
    size, batches = column.rows * ROW_BYTES, column.rows / BATCH
    base = [wall for wall, _, _ in found["random"]]
    for name, epoch in found.items():
        walls, processor, stored = (list(values) for values in zip(*epoch, strict=True))
        speeds = sorted(size / wall / 1e9 for wall in walls)
        ratio = statistics.median(b / wall for b, wall in zip(base, walls, strict=True))
        speed = f"{statistics.median(speeds):6.2f} GB/s ({speeds[0]:.2f} to {speeds[-1]:.2f})"
        print(f"{name:14s}{speed}, {ratio:.2f} of random, ", end="")
        print(f"{1e3 * statistics.median(processor) / batches:.2f} ms of processor a batch, ", end="")
        print(f"{100 * statistics.median(stored) / size:.0f} % from storage")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the file system to measure")
    parser.add_argument("--rows", type=int, default=19 * SHARD)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4], help="shards in a block")
    parser.add_argument("--threads", type=int, default=parallel.THREADS)
    given = parser.parse_args()
    parallel.THREADS = given.threads
    machine = f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; {given.rows} rows, {given.threads} threads, {given.epochs} epochs of each order")
    orders: dict[str, Order] = {"sequential": partial(sequential, given.rows)}
    orders |= {f"blocks of {n}": partial(shuffled, given.rows, n * SHARD) for n in given.blocks}
    orders["random"] = partial(shuffled, given.rows, given.rows)
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as name:
        column = write(Path(name), given.rows)
        print("cold")
        compare(column, orders, given.epochs, partial(drop_pages, Path(name)))
        print("warm")
        compare(column, orders, given.epochs, lambda: None)


if __name__ == "__main__":
    main()
