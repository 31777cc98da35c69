"""How fast rows come from an object store: a server of the S3 protocol on the loopback, beside the same cache on disk.

    python benchmarks/remote.py [--folder DIR] [--rows 256] [--batches 24] [--delay 20]

Rows are (576, 768) float16, 885 kB of random numbers, in shards of 64; random batches of 8. The server (moto, a process of its
own, in Python) answers every request after `--delay` milliseconds, as a store some way off does, and once without. Contestants
take turns in a new order each round; printed are medians and the middle half. Server and reader share this machine's cores:
what matters is how much of the delay is hidden, not the bandwidth.
"""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import obstore
from reading import BATCH, ROW_BYTES, SHARD, SPEC, begin_cache, blocks

from pcd.cache import Cache, objects
from pcd.cache.column import Column
from pcd.cache.copy import copy_cache
from pcd.cache.writer import RangeWriter
from pcd.overlap import ahead
from pcd.remote import any_path
from pcd.training.sources import FETCHED_AHEAD

BUCKET = "benchmark"
AHEAD = FETCHED_AHEAD
"""Batches on their way at once, as in training."""

Rows = npt.NDArray[np.int64]


def serve(port: int, folder: Path) -> None:
    """Answer for ever; every answer waits as long as the last `PUT /delay-MS` said.

    Ranges of shards come from the files in `folder`, which are the same bytes: moto copies a whole object for each of them.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    delay = [0.0]

    def delayed(environ: dict[str, Any], start: Any) -> Any:
        path, asked = environ["PATH_INFO"], environ.get("HTTP_RANGE", "")
        if path.startswith("/delay-"):
            delay[0] = float(path.removeprefix("/delay-")) / 1000
            start("200 OK", [("Content-Length", "0")])
            return [b""]
        time.sleep(delay[0])
        if environ["REQUEST_METHOD"] == "GET" and asked:
            return [part_of(folder / path.removeprefix(f"/{BUCKET}/"), asked, start)]
        return application(environ, start)

    make_server("127.0.0.1", port, delayed, threaded=True).serve_forever()


def part_of(file: Path, asked: str, start: Any) -> bytes:
    """The answer to a request for `bytes=FIRST-LAST` or `bytes=-LENGTH`."""
    size = file.stat().st_size
    first, _, last = asked.removeprefix("bytes=").partition("-")
    begin, end = (int(first), min(int(last) + 1, size)) if first else (size - int(last), size)
    with file.open("rb") as handle:
        data = os.pread(handle.fileno(), end - begin, begin)
    about = {"Content-Length": str(len(data)), "Content-Range": f"bytes {begin}-{end - 1}/{size}", "ETag": '"x"'}
    start("206 Partial Content", [*about.items(), ("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")])
    return data


def ask(port: int, path: str) -> None:
    """A PUT of our own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        login = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
        connection.request("PUT", path, headers={"Content-Length": "0", "Authorization": login})
        connection.getresponse().read()


@contextmanager
def server(port: int, folder: Path) -> Iterator[None]:
    """A server with a bucket, which the environment names."""
    command = [sys.executable, __file__, "--serve", str(port), "--folder", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                try:
                    ask(port, f"/{BUCKET}")
                    break
                except OSError:
                    time.sleep(0.2)
            names = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
            os.environ.update({f"AWS_{name}": value for name, value in names.items()})
            yield
        finally:
            process.terminate()


def contestants(near: Column, far: Column, one: Column) -> dict[str, Callable[[list[Rows]], None]]:
    """What reads a few batches."""

    def each(column: Column) -> Callable[[list[Rows]], None]:
        def read(batches: list[Rows]) -> None:
            for rows in batches:
                column.read(rows)

        return read

    def in_advance(batches: list[Rows]) -> None:
        with closing(ahead(far.read, batches, AHEAD, AHEAD)) as found:
            for _ in found:
                pass

    def row_by_row(batches: list[Rows]) -> None:
        for rows in batches:
            for row in rows:
                one.read([int(row)])

    return {
        "disk, batch by batch": each(near),
        "store, row by row": row_by_row,
        "store, batch by batch": each(far),
        f"store, {AHEAD} batches ahead (training)": in_advance,
    }


def compare(near: Column, far: Column, one: Column, rows: int, batches: int) -> None:
    """Take turns; print rows per second."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {}
    calls = contestants(near, far, one)
    for round_ in range(-1, 5):  # the first one reads the indexes and is not counted
        for name in rng.permutation(list(calls)).tolist():
            chosen = [rng.choice(rows, BATCH, replace=False) for _ in range(batches)]
            begin = time.perf_counter()
            calls[name](chosen)
            if round_ >= 0:
                times.setdefault(name, []).append(time.perf_counter() - begin)
    for name in calls:
        low, middle, high = (batches * BATCH / value for value in reversed(statistics.quantiles(times[name], n=4)))
        print(f"  {name:38s}{middle:8.0f} rows/s ({low:.0f} to {high:.0f}), {middle * ROW_BYTES / 1e9:.2f} GB/s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty or new folder on the file system to measure")
    parser.add_argument("--rows", type=int, default=4 * SHARD)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds before every answer")
    parser.add_argument("--port", type=int, default=5917)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.folder)
    machine = f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    print(
        f"{machine}, Python {platform.python_version()}, obstore {obstore.__version__}, {objects.IN_FLIGHT} requests in flight"
    )
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as name, server(given.port, Path(name)):
        near = begin_cache(Path(name) / "cache", given.rows, [SPEC])
        with RangeWriter(near.table("train"), [SPEC.name], 0, given.rows) as writer:
            for block in blocks(given.rows):
                writer.append({SPEC.name: block})
        place = any_path(f"s3://{BUCKET}/cache")
        begin = time.perf_counter()
        copied = copy_cache(Cache.open(near.root), place)
        print(f"copied to the store, verified: {copied.bytes / (time.perf_counter() - begin) / 1e9:.2f} GB/s")
        columns = [Cache.open(root).table("train").column(SPEC.name) for root in (near.root, place, place)]
        for delay in (0.0, given.delay):
            ask(given.port, f"/delay-{delay}")
            print(f"answers after {delay:g} ms")
            compare(columns[0], columns[1], columns[2], given.rows, given.batches)


if __name__ == "__main__":
    main()
