"""How fast epochs go: wherever columns lie, in each precision, alone and side by side, and how far from the device's floor.

    python benchmarks/training.py [--rows 128] [--hidden 1 4] [--batch 8 64] [--device auto] [--folder DIR]

Trains on a cache of noise with the shapes of NYU under ViT-L/14@336 (576 patches, D = 768), without validation. Contestants
take turns, an epoch each; ratios are medians of the ratios of neighbours, with their middle half. The page cache is warm: every
row was just written and is read once before. On a CPU both wall and processor time are shown, since other processes disturb the
former; on a GPU also the share of the floor: 22 multiplications and additions per patch, width and hidden width in the factored
step, at the device's peak (--peak, in TFLOP/s). `--variants 8` also trains so many heads side by side.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does

import torch
from noise import noise_cache, noise_recipe

from pcd.cache import Cache
from pcd.device import resolve_device
from pcd.stages.reading import shared_reading
from pcd.stages.train import prepare
from pcd.training.loop import Loop

WIDTH, PATCHES = 768, 576
FLOPS = 22
"""11 products of patches, a multiplication and an addition each (see pcd/heads/factored.py)."""
PLACES = {True: ("host", "stream", "device"), False: ("host", "stream")}
PRECISIONS = {True: ("bf16", "tf32"), False: ("bf16",)}
"""What is compared on a GPU, and on a CPU."""


@dataclass(frozen=True)
class Time:
    """Of an epoch."""

    wall: float
    processor: float


class Bench:
    """Trainings on one cache."""

    def __init__(self, cache: Cache, folder: Path, device: str, epochs: int) -> None:
        self._cache = cache
        self._folder = folder
        self._device = device
        self._epochs = epochs
        self._made = 0

    def loops(self, number: int = 1, *, residency: str = "auto", **train: object) -> list[Loop]:
        """Loops before their first epoch that share what they read; `train` and `hidden` go to the recipe."""
        hidden = train.pop("hidden", 1)
        recipes = [
            noise_recipe(
                head={"hidden": hidden, "dropout": 0.2 - place / 100}, train={"epochs": 1, "residency": residency, **train}
            )
            for place in range(number)
        ]
        reading, found = shared_reading(self._cache, recipes), []
        for recipe in recipes:
            self._made += 1
            loop = prepare(recipe, self._cache, self._folder / str(self._made), device=self._device, reading=reading).loop
            assert loop is not None
            found.append(loop)
        return found

    def epoch(self, loops: list[Loop]) -> Time:
        """Seconds of one epoch of all of them, side by side, without validation."""
        for loop in loops:
            loop.begin()
        self._wait()
        begin, processor = time.perf_counter(), time.process_time()
        with closing(loops[0].rows.read(0)) as found:
            for loaded in found:
                for loop in loops:
                    with loop.randomness():
                        loop.learn(loop.rows.batch(loaded))
        self._wait()
        return Time(time.perf_counter() - begin, time.process_time() - processor)

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()

    def in_turns(self, contestants: Mapping[str, list[Loop]]) -> dict[str, list[Time]]:
        """Epochs of each, one after another, after one to warm up."""
        rounds = [{name: self.epoch(loops) for name, loops in contestants.items()} for _ in range(self._epochs + 1)]
        return {name: [times[name] for times in rounds[1:]] for name in contestants}


def ratio(numerator: list[Time], denominator: list[Time], of: Callable[[Time], float]) -> str:
    """Median of the ratios of neighbours, and their middle half."""
    quarters = statistics.quantiles([of(a) / of(b) for a, b in zip(numerator, denominator, strict=True)], n=4)
    return f"{quarters[1]:.2f} ({quarters[0]:.2f} to {quarters[2]:.2f})"


def show(times: dict[str, list[Time]], rows: int, floor: float | None = None) -> None:
    """A line per contestant; ratios against the first."""
    first = next(iter(times.values()))
    for name, own in times.items():
        wall = statistics.median(time.wall for time in own)
        line = f"{name:34s} {rows / wall:9.1f} rows/s   wall {ratio(first, own, lambda t: t.wall):>22s}"
        line += f"   processor {ratio(first, own, lambda t: t.processor):>22s}   speed beside the first"
        print(line + (f"   {100 * floor / wall:5.1f} % of the floor" if floor else ""))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="training rows of an epoch")
    parser.add_argument("--epochs", type=int, default=7, help="epochs of each contestant")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1, 4], help="hidden widths in multiples of D")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="batch sizes")
    parser.add_argument("--variants", type=int, default=0, help="heads to train side by side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of a GPU in bf16")
    parser.add_argument("--folder", type=Path, help="where the cache is made; default: a temporary folder")
    options = parser.parse_args()
    device = resolve_device(options.device)
    gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} cores {platform.machine()}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cache = noise_cache(Path(folder) / "cache", dataset={"train": options.rows})
        rows = len(cache.table("train").usable())
        size = rows * cache.table("train").column("clip/patch").spec.row_bytes
        print(f"{rows} rows, {size / 1e9:.2f} GB of tokens, page cache warm")
        bench = Bench(cache, Path(folder), device, options.epochs)
        for hidden in options.hidden:
            for batch in options.batch:
                print(f"\nhidden width {hidden * WIDTH}, batches of {batch}")
                same: dict[str, Any] = {"hidden": hidden, "batch_size": batch}
                floor = FLOPS * rows * PATCHES * WIDTH * WIDTH * hidden / (options.peak * 1e12)
                contestants = {f"columns: {place}": bench.loops(residency=place, **same) for place in PLACES[gpu]}
                contestants |= {f"products in {kind}": bench.loops(precision=kind, **same) for kind in PRECISIONS[gpu]}
                show(bench.in_turns(contestants), rows, floor if gpu else None)
        for residency in ("auto", "stream") if options.variants else ():
            print(f"\n{options.variants} variants side by side, hidden width {WIDTH}, columns: {residency}; rows/s of each")
            one, many = (bench.loops(number, residency=residency) for number in (1, options.variants))
            show(bench.in_turns({"one": one, "all": many}), rows)


if __name__ == "__main__":
    main()
