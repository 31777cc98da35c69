"""How fast rows come out of a cache, beside a flat file and other formats; how fast they go in; how fast it opens.

    python benchmarks/reading.py [--folder DIR] [--rows 1216] [--batches 60] [--threads N]

Rows are (576, 768) float16, the tokens of one view by ViT-L/14@336, 885 kB of random numbers. Every contestant holds the same
1216 rows (1.08 GB each; seven copies lie in the folder) and delivers random batches of 8 into the same array. They take turns,
batch by batch and in a new order each round; every batch has rows of its own, so that none finds them in the processor's
caches. Printed are medians and the middle half, and the median of the ratios to the flat file, round by round. What is not
installed is named and left out. Everything comes out of the page cache: how much did not is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pcd.cache import Cache, ColumnEntry, Manifest, TableEntry, commits, parallel
from pcd.cache.column import Column
from pcd.cache.writer import RangeWriter
from pcd.columns import ColumnSpec
from pcd.files import write_bytes
from pcd.fingerprint import digest
from pcd.views import ViewPlan

SHAPE = (576, 768)
ROW_BYTES = 2 * SHAPE[0] * SHAPE[1]
BATCH, SHARD = 8, 64
SPEC = ColumnSpec("clip/patch", SHAPE, "float16", ("patch", "channel"), "noise")
OPENED_ROWS, OPENED_COLUMNS = 200_000, 10

Rows = npt.NDArray[np.int64]
Batch = npt.NDArray[np.float16]
Read = Callable[[Rows, Batch], object]


def blocks(rows: int) -> Iterator[Batch]:
    """The rows, a shard at a time: the same for everybody, all different."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        yield rng.integers(0, 1 << 14, (min(SHARD, rows - start), *SHAPE), dtype=np.uint16).view(np.float16)


def begin_cache(root: Path, samples: int, specs: list[ColumnSpec]) -> Cache:
    """An empty cache of one view per sample, `SHARD` of them in a shard."""
    keys = [str(number) for number in range(samples)]
    manifest = Manifest({"name": "noise"}, ViewPlan((336, 336), flips=False), {}, {"train": TableEntry(samples, digest(keys))})
    cache = Cache.create(root, manifest, {"train": keys})
    cache.add_columns({spec.name: ColumnEntry(spec, SHARD, ("train",), {}) for spec in specs})
    return cache


def write_beside_plain_files(folder: Path, rows: int) -> None:
    """Fill the cache shard by shard, each beside a plain file of the same bytes, both durable; print the ratio."""
    cache = begin_cache(folder / "cache", rows, [SPEC])
    times: dict[str, list[float]] = {"pcd": [], "plain": [], "sha256": []}
    with RangeWriter(cache.table("train"), [SPEC.name], 0, rows) as writer:
        for number, block in enumerate(blocks(rows)):
            data = block.tobytes()
            calls: dict[str, Callable[[], object]] = {
                "pcd": partial(writer.append, {SPEC.name: block}),
                "plain": partial(write_bytes, folder / "plain", data),
                "sha256": partial(hashlib.sha256, data),
            }
            for name in list(calls)[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - begin)
    (folder / "plain").unlink()
    size = SHARD * ROW_BYTES / 1e9  # of a shard, in GB
    print(f"\nwriting {len(times['pcd'])} shards of {size * 1e3:.0f} MB, each durable (fsync)")
    print(f"plain file                       {size / statistics.median(times['plain']):6.2f} GB/s")
    print(f"pcd: crc32c, SHA-256, commit     {size / statistics.median(times['pcd']):6.2f} GB/s")
    print(f"SHA-256 alone                    {size / statistics.median(times['sha256']):6.2f} GB/s")
    print(f"pcd / plain file                 {ratio(times['plain'], times['pcd'])}")


def ratio(base: list[float], times: list[float]) -> str:
    """Median of the ratios of speeds, round by round, and their middle half."""
    quarters = statistics.quantiles([a / b for a, b in zip(base, times, strict=True)], n=4)
    return f"{quarters[1]:6.2f} ({quarters[0]:.2f} to {quarters[2]:.2f})"


def flat_file(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """A file of nothing but rows: `preadv` into place, without any check; and the same file mapped."""
    path = folder / "flat"
    with path.open("wb") as handle:
        for block in blocks(rows):
            handle.write(block.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    pool = ThreadPoolExecutor(max(1, threads - 1))

    def part(numbers: Rows, out: Batch) -> None:
        for position, row in enumerate(numbers.tolist()):
            if os.preadv(descriptor, [out[position].data], row * ROW_BYTES) != ROW_BYTES:
                raise OSError(f"{path} is too short")

    def parts(numbers: Rows, out: Batch) -> None:
        bounds = [len(numbers) * n // threads for n in range(threads + 1)]
        others = [pool.submit(part, numbers[a:b], out[a:b]) for a, b in itertools.pairwise(bounds[1:])]
        part(numbers[: bounds[1]], out[: bounds[1]])
        for other in others:
            other.result()

    mapped = np.memmap(path, np.float16, "r", shape=(rows, *SHAPE))
    yield "flat file, preadv", parts
    yield "flat file, preadv, 1 thread", part
    yield "flat file, np.memmap", lambda numbers, out: np.take(mapped, numbers, axis=0, out=out)


def pcd_reader(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """The cache's own reader."""

    def read(column: Column, number: int, rows: Rows, out: Batch) -> None:
        parallel.THREADS = number
        column.read(rows, out)

    plain = Cache.open(folder / "cache", verify=False).table("train").column(SPEC.name)
    checked = Cache.open(folder / "cache").table("train").column(SPEC.name)
    yield "pcd, without verification", partial(read, plain, threads)
    yield "pcd, crc32c verified", partial(read, checked, threads)
    yield "pcd, without verification, 1 thread", partial(read, plain, 1)
    yield "pcd, crc32c verified, 1 thread", partial(read, checked, 1)


def tensorstore_reader(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """The same store by tensorstore: no cache of its own, metadata looked at once, all of a batch asked for at once."""
    ts: Any = importlib.import_module("tensorstore")
    limit = {"limit": threads}
    context = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": limit, "file_io_concurrency": limit}
    store = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / "cache" / "train" / SPEC.name)},
            "context": context,
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
    ).result()
    yield "tensorstore", lambda numbers, out: ts.array(out).write(store[numbers]).result()


def zarr_reader(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """The same store by zarr-python: the batch as one selection, and row by row."""
    array: Any = zarr.open_array(folder / "cache" / "train" / SPEC.name, mode="r")

    def selection(numbers: Rows, out: Batch) -> None:
        out[:] = array.oindex[numbers]

    def one_by_one(numbers: Rows, out: Batch) -> None:
        for position, row in enumerate(numbers.tolist()):
            out[position] = array[row]

    yield "zarr-python, a selection", selection
    yield "zarr-python, row by row", one_by_one


def hdf5(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """HDF5, one row per chunk, without checksum."""
    h5py: Any = importlib.import_module("h5py")
    with h5py.File(folder / "rows.h5", "w", libver="latest") as file:
        written = file.create_dataset("rows", (rows, *SHAPE), "f2", chunks=(1, *SHAPE))
        for number, block in enumerate(blocks(rows)):
            written[number * SHARD : number * SHARD + len(block)] = block
    dataset = h5py.File(folder / "rows.h5", "r")["rows"]

    def read(numbers: Rows, out: Batch) -> None:
        for position, row in enumerate(numbers.tolist()):
            dataset.read_direct(out, np.s_[row], np.s_[position])

    yield "h5py, chunk = 1 row", read


def safetensors_slices(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """One tensor of all rows in a safetensors file, sliced."""
    numpy_files: Any = importlib.import_module("safetensors.numpy")
    safetensors: Any = importlib.import_module("safetensors")
    mapped = np.memmap(folder / "flat", np.float16, "r", shape=(rows, *SHAPE))
    numpy_files.save_file({"rows": np.ascontiguousarray(mapped)}, folder / "rows.safetensors")
    slices = safetensors.safe_open(folder / "rows.safetensors", framework="numpy").get_slice("rows")

    def read(numbers: Rows, out: Batch) -> None:
        for position, row in enumerate(numbers.tolist()):
            out[position] = slices[row]

    yield "safetensors slices", read


def litdata_reader(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """LitData's chunks of about the size of a shard, by index."""
    litdata: Any = importlib.import_module("litdata")
    torch: Any = importlib.import_module("torch")
    writer: Any = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder / "lit"), chunk_bytes="56MB")
    for number, row in enumerate(itertools.chain.from_iterable(blocks(rows))):
        writer.add_item(number, torch.from_numpy(row))
    writer.done()
    writer.merge()
    dataset = litdata.StreamingDataset(str(folder / "lit"), shuffle=False)

    def read(numbers: Rows, out: Batch) -> None:
        for position, row in enumerate(numbers.tolist()):
            out[position] = dataset[row].numpy()

    yield "LitData, by index", read


def webdataset_reader(folder: Path, rows: int, threads: int) -> Iterator[tuple[str, Read]]:
    """Tar files of .npy: only in the order of the file."""
    wds: Any = importlib.import_module("webdataset")
    for number, block in enumerate(blocks(rows)):
        with wds.TarWriter(str(folder / f"{number:03d}.tar")) as tar:
            for position, row in enumerate(block):
                tar.write({"__key__": f"{number * SHARD + position:06d}", "npy": row})
    files = sorted(map(str, folder.glob("*.tar")))
    stream = iter(wds.WebDataset(files, shardshuffle=False, empty_check=False).decode().repeat())

    def read(numbers: Rows, out: Batch) -> None:
        for position in range(len(numbers)):
            out[position] = next(stream)["npy"]

    yield "WebDataset, in order, not random", read


CONTESTANTS = {
    "flat": flat_file,
    "pcd": pcd_reader,
    "tensorstore": tensorstore_reader,
    "zarr": zarr_reader,
    "h5py": hdf5,
    "safetensors": safetensors_slices,
    "litdata": litdata_reader,
    "webdataset": webdataset_reader,
}


def contestants(folder: Path, rows: int, threads: int) -> dict[str, Read]:
    """Those that are installed, each seen to deliver what the flat file holds."""
    reads: dict[str, Read] = {}
    for name, make in CONTESTANTS.items():
        try:
            reads |= dict(make(folder, rows, threads))
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error.name} is not installed")
    truth = np.memmap(folder / "flat", np.float16, "r", shape=(rows, *SHAPE))
    for name, read in reads.items():
        numbers, out = np.arange(BATCH), np.zeros((BATCH, *SHAPE), np.float16)  # the first rows: WebDataset begins there
        read(numbers, out)
        if out.tobytes() != truth[numbers].tobytes():
            raise SystemExit(f"{name} delivers something else")
    return reads


def from_storage() -> int:
    """Bytes this process has had fetched from storage, not from the page cache; on Linux."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def race(reads: dict[str, Read], rows: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per batch of each, in turns, and of processor time; the first two rounds are not counted."""
    rng = np.random.default_rng(1)
    out = np.zeros((BATCH, *SHAPE), np.float16)
    wall: dict[str, list[float]] = {name: [] for name in reads}
    processor: dict[str, list[float]] = {name: [] for name in reads}
    for turn in range(rounds + 2):
        for name in rng.permutation(list(reads)).tolist():
            numbers = rng.integers(0, rows, BATCH)
            begin, used = time.perf_counter(), time.process_time()
            reads[name](numbers, out)
            if turn > 1:
                wall[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - used)
    return wall, processor


def compare_reading(folder: Path, rows: int, rounds: int, threads: int) -> None:
    """Print speeds and ratios."""
    reads = contestants(folder, rows, threads)
    before = from_storage()
    wall, processor = race(reads, rows, rounds)
    print(f"\nreading {rounds} random batches of {BATCH} rows, {threads} threads where not said otherwise; middle half in ()")
    print(f"{'':36s}  GB/s                    beside the flat file    processor ms a batch")
    for name, seconds in wall.items():
        speeds = [BATCH * ROW_BYTES / 1e9 / value for value in statistics.quantiles(seconds, n=4)]
        share = f"{ratio(wall['flat file, preadv'], seconds):24s}{1e3 * statistics.median(processor[name]):8.2f}"
        print(f"{name:36s}{speeds[1]:6.2f} ({speeds[2]:.2f} to {speeds[0]:.2f})".ljust(60) + share)
    both = "pcd, without verification", "pcd, crc32c verified"
    pairs = [(f"{ours}, 1 thread", "flat file, preadv, 1 thread") for ours in both]
    pairs += [(ours, other) for other in wall if other.startswith(("tensorstore", "zarr")) for ours in both]
    for ours, other in pairs:
        print(f"{f'{ours} / {other}':64s}{ratio(wall[other], wall[ours])}")
    print(f"fetched from storage meanwhile: {(from_storage() - before) / 1e6:.1f} MB; the rest was in the page cache")


def time_opening(folder: Path) -> None:
    """Print how long a cache of 200,000 rows, ten columns and all their commit records takes to its first row."""
    specs = [ColumnSpec(f"c/{number}", (64,), "float16", ("x",), "noise") for number in range(OPENED_COLUMNS)]
    root = folder / "many"
    cache = begin_cache(root, OPENED_ROWS, specs)
    with RangeWriter(cache.table("train"), [spec.name for spec in specs], 0, SHARD) as writer:
        writer.append({spec.name: np.zeros((SHARD, 64), np.float16) for spec in specs})
    for spec in specs:  # the other records: their shards are not looked at
        record = commits.path(root, "train", spec.name, 0).read_bytes()
        for shard in range(1, -(-OPENED_ROWS // SHARD)):
            commits.path(root, "train", spec.name, shard).write_bytes(record)
    print(f"\nopening {OPENED_ROWS} rows, {OPENED_COLUMNS} columns, {OPENED_COLUMNS * -(-OPENED_ROWS // SHARD)} commit records")
    for words, count in (("first row of one column", 1), ("first row of each column", OPENED_COLUMNS)):
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            with Cache.open(root) as opened:
                for spec in specs[:count]:
                    opened.table("train").column(spec.name).read([0])
            times.append(time.perf_counter() - begin)
        print(f"{words:26s} {1e3 * statistics.median(times):6.1f} ms (slowest {1e3 * max(times):.1f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty or new folder on the file system to measure")
    parser.add_argument("--rows", type=int, default=19 * SHARD)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--threads", type=int, default=parallel.THREADS)
    given = parser.parse_args()
    machine = f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}, numpy {np.__version__}, zarr {zarr.__version__}")
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as name:
        write_beside_plain_files(Path(name), given.rows)
        compare_reading(Path(name), given.rows, given.batches, given.threads)
        time_opening(Path(name))


if __name__ == "__main__":
    main()
