"""What an extraction costs beside its encoder: decoding, views, ground truth and durable writing, which go on meanwhile.

    python benchmarks/extraction.py [--encoder ViT-B-16-quickgelu] [--frames 32] [--rounds 3] [--manifest CSV]
    python benchmarks/extraction.py --device cuda --encoder ViT-L-14-336-quickgelu --frames 2048 --files 64

Frames are 480x640 synthetic rooms, or those of a manifest, written as JPEG (quality 95) or PNG with 16-bit PNG depth; they
become 336x336 views and their mirror images. Weights are random: speed does not depend on them. Extractions by the real stage
and the same views through the same encoder alone, in the same batches, take turns, in a new order each round. An extraction's
time is that from the first range of samples to the last commit record: without loading the encoder. Encoding alone has its
batch at hand and brings what it computes to host memory.

"Speed" is that of extraction beside encoding alone, by wall time and by processor time: on a CPU, where decoding takes the
cores from the encoder, the latter is the sum of both costs. "Idle" is the share of an extraction's wall time in which nothing
was being encoded: until the first batch, between batches, and after the last one. At the end of each range of samples, that is
of a shard, the last of it is written before the next begins. Medians over rounds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does: a thread that spins costs time

import cv2
import numpy as np
import psutil
import torch

from pcd import depths, encoders
from pcd.cache import Cache
from pcd.datasets import create_dataset
from pcd.encoders.base import EncoderOptions
from pcd.encoders.openclip import OpenClipEncoder
from pcd.recipe import Recipe, parse_recipe
from pcd.stages.extract import extract

SIZE = (480, 640)
FAR = 10.0
SAMPLED = 0.01
"""Seconds between two looks at the memory in use."""


class WatchedEncoder(OpenClipEncoder):
    """Keeps the moments at which batches began and ended, and how many views they had."""

    last: WatchedEncoder

    def __init__(self, model: str, options: EncoderOptions, view_size: tuple[int, int], device: str) -> None:
        super().__init__(model, options, view_size, device)
        self.batches: list[tuple[float, float, int]] = []
        WatchedEncoder.last = self

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """As the encoder does. It looks whether all is finite, and so returns when the device has ended."""
        begin = time.perf_counter()
        found = super().encode(views)
        self.batches.append((begin, time.perf_counter(), len(views)))
        return found


class Clock:
    """A progress that keeps when the encoding of ranges begins and ends, by wall and processor time."""

    begin = end = (0.0, 0.0)

    def say(self, text: str) -> None:
        """Nothing is said."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """The ranges begin."""
        self.begin = time.perf_counter(), time.process_time()

    def advance(self, number: int = 1) -> None:
        """Nothing is shown."""

    def stop(self) -> None:
        """All is committed."""
        self.end = time.perf_counter(), time.process_time()


@dataclass
class Times:
    """Wall and processor seconds of each round; of extractions also idle seconds (first, between, last) and memory."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    idle: list[tuple[float, float, float]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def write_frames(folder: Path, form: str, frames: int, files: int, manifest: Path | None) -> None:
    """`files` images and depth maps, which a manifest of `frames` samples names in turn."""
    folder.mkdir()
    options: dict[str, Any] = {"train": files, "test": 0, "height": SIZE[0], "width": SIZE[1]}
    if manifest is not None:
        options = {"root": str(manifest.parent), "manifest": manifest.name, "depth_range": [0.1, FAR]}
    source = create_dataset("folder" if manifest else "synthetic", options)
    keys = [key for key in source.keys("train") if source.size("train", key) == SIZE][:files]
    for number, key in enumerate(keys):
        sample = source.load("train", key)
        cv2.imwrite(str(folder / f"{number}.{form}"), sample.rgb[:, :, ::-1])
        near = np.where(sample.depth > FAR, np.nan, sample.depth)
        cv2.imwrite(str(folder / f"{number}.depth.png"), depths.encode(near, 1000))
    with (folder / "manifest.csv").open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["key", "image", "depth", "units_per_metre", "split"])
        for number in range(frames):
            name = str(number % len(keys))
            table.writerow([f"{number:06d}", f"{name}.{form}", f"{name}.depth.png", 1000, "train"])


def recipe_of(root: Path, encoder: str, precision: str) -> Recipe:
    """Extraction of these frames; no texts are embedded."""
    table = {
        "name": "extraction",
        "dataset": {"name": "folder", "root": str(root), "depth_range": [0.1, FAR]},
        "encoder": {"name": f"watched:{encoder}", "weights": "random", "precision": precision},
        "head": {"name": "pureclip", "min_depth": 0.1, "max_depth": FAR, "table_init": "random"},
    }
    return parse_recipe(table, "extraction")


@contextmanager
def peak_memory(into: list[int]) -> Iterator[None]:
    """Append the most bytes that this process had in memory meanwhile, beyond those at the beginning."""
    process, ended, most = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not ended.wait(SAMPLED):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        into.append(max(0, most - before))


def time_extraction(recipe: Recipe, folder: Path, device: str, batch: int | None, times: Times) -> tuple[Cache, list[int]]:
    """One extraction into a new cache; also how many views its batches had."""
    clock, memory = Clock(), list[int]()
    with tempfile.TemporaryDirectory(dir=folder) as name, peak_memory(memory):
        cache = extract(recipe, Path(name) / "cache", device=device, batch_views=batch, progress=clock).cache
    batches = WatchedEncoder.last.batches
    between = sum(after[0] - before[1] for before, after in itertools.pairwise(batches))
    times.idle.append((batches[0][0] - clock.begin[0], between, clock.end[0] - batches[-1][1]))
    times.wall.append(clock.end[0] - clock.begin[0])
    times.processor.append(clock.end[1] - clock.begin[1])
    times.memory.append(memory[0])
    return cache, [views for _, _, views in batches]


def time_encoder(encoder: OpenClipEncoder, batches: Sequence[int], times: Times) -> None:
    """The same number of views in the same batches, from host memory to host memory."""
    views = torch.rand(max(batches), 3, *encoder.view_size)
    encoder.encode(views)
    begin = time.perf_counter(), time.process_time()
    for number in batches:
        for values in encoder.encode(views[:number]).values():
            values.cpu()
    times.wall.append(time.perf_counter() - begin[0])
    times.processor.append(time.process_time() - begin[1])


def report(form: str, times: Times, alone: Times, views: int) -> None:
    """Medians of an input format."""

    def ratio(base: list[float], own: list[float]) -> str:
        found = sorted(a / b for a, b in zip(base, own, strict=True))
        return f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"

    idle = [sum(parts) / wall for parts, wall in zip(times.idle, times.wall, strict=True)]
    first, between, last = (statistics.median(part) for part in zip(*times.idle, strict=True))
    beyond = statistics.median(a - b for a, b in zip(times.processor, alone.processor, strict=True))
    print(f"\n{form}: {views / statistics.median(times.wall):.2f} views/s, encoding alone ", end="")
    print(f"{views / statistics.median(alone.wall):.2f} views/s")
    print(f"  speed beside encoding alone: wall {ratio(alone.wall, times.wall)}, ", end="")
    print(f"processor {ratio(alone.processor, times.processor)}; lowest and highest of the rounds in ()")
    print(f"  processor time beyond the encoder's: {2e3 * beyond / views:.1f} ms a frame")
    print(
        f"  idle: {100 * statistics.median(idle):.1f} %: {first:.3f} s until the first batch, {between:.3f} s between ", end=""
    )
    print(f"{views} views, {last:.3f} s after the last")
    print(f"  peak memory beyond that before, encoder included: {max(times.memory) / 1e6:.0f} MB")


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Extractions of each format and encoding alone, in turns."""
    recipes: dict[str, Recipe] = {}
    for form in given.formats:
        write_frames(folder / form, form, given.frames, given.files, given.manifest)
        recipes[form] = recipe_of(folder / form, given.encoder, given.precision)
    taken: dict[str, Times] = {form: Times() for form in given.formats}
    alone: dict[str, Times] = {form: Times() for form in given.formats}
    random, batches = np.random.default_rng(0), list[int]()
    for turn in range(given.rounds + 1):
        if turn == 1:  # the first round is not counted: it loads and allocates
            taken, alone = ({form: Times() for form in given.formats} for _ in range(2))
        for form in random.permutation(given.formats).tolist():
            cache, batches = time_extraction(recipes[form], folder, given.device, given.batch, taken[form])
            time_encoder(WatchedEncoder.last, batches, alone[form])
    shapes = ", ".join(f"{name} {entry.spec.shape}" for name, entry in cache.manifest.columns.items() if "clip" in name)
    print(f"\n{given.frames} frames, {sum(batches)} views, batches of {max(batches)}, {given.rounds} rounds; {shapes}")
    for form in given.formats:
        report(form, taken[form], alone[form], sum(batches))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="ViT-B-16-quickgelu", help="a model of open_clip")
    parser.add_argument("--precision", default="auto", help="of the encoder; auto: fp16 on a GPU, fp32 elsewhere")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="views per batch; as `pcd extract` chooses it if absent")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--files", type=int, default=16, help="different frames; the samples take them in turn")
    parser.add_argument("--formats", nargs="+", choices=("jpg", "png"), default=["jpg", "png"])
    parser.add_argument("--manifest", type=Path, help="of frames of 480x640 to take instead of synthetic ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where frames and caches go for the time being")
    given = parser.parse_args()
    where = torch.cuda.get_device_name() if given.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {where}")
    encoders.registry.add("watched", f"{__name__}:WatchedEncoder")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        measure(given, Path(name))


if __name__ == "__main__":
    main()
