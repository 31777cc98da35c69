"""What one read saves a sweep: the bytes and seconds that reading takes in one run, and in eight variants of one sweep.

    python benchmarks/sweep.py CACHE [--variants 8]

Measured is everything that `Column.read` does for the tables train and val, with one epoch of a narrow head per run: tokens,
and apart from them the depth columns (targets of the training rows; ground truth of val, which is read again in every epoch of
every run, in a sweep or not). The page cache is warm, as it is after the first run.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pcd.cache import Cache
from pcd.cache.column import Column
from pcd.stages.reading import OWN, Reading, shared_reading
from pcd.stages.sweep_plan import SweepPlan, plan_sweep
from pcd.stages.train import train

TABLES = ("train", "val")
TOKENS = "clip/"


@dataclass
class Meter:
    """Seconds inside `Column.read` and its bytes."""

    seconds: float = 0.0
    size: int = 0


def metered(call: Callable[[], object]) -> dict[bool, Meter]:
    """What a call reads of the tables: True for tokens, False for everything else."""
    meters, read = {True: Meter(), False: Meter()}, Column.read

    def watched(self: Column, rows: Any, out: Any = None) -> Any:
        begin = time.perf_counter()
        found = read(self, rows, out)
        if self.table in TABLES:
            meter = meters[self.spec.name.startswith(TOKENS)]
            meter.seconds += time.perf_counter() - begin
            meter.size += found.nbytes
        return found

    Column.read = watched  # type: ignore[method-assign]
    try:
        call()
    finally:
        Column.read = read  # type: ignore[method-assign]
    return meters


def run_all(plan: SweepPlan, cache: Cache, root: Path, reading: Reading) -> None:
    """Every variant, one epoch each."""
    for variant in plan.variants:
        train(variant.seeded(0), cache, root / variant.name, device="cpu", reading=reading)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--variants", type=int, default=8)
    options = parser.parse_args()
    vary = [f"head.dropout={','.join(str(number / 100) for number in range(options.variants))}"]
    narrow = ["head.table_init=random", "head.hidden=1", "train.epochs=1", "train.residency=host"]
    with Cache.open(options.cache) as cache, tempfile.TemporaryDirectory() as folder:
        many = plan_sweep(cache, vary=vary, overrides=narrow)
        one = SweepPlan(many.name, "", many.seeds, many.variants[:1])
        recipes = [variant.recipe for variant in many.variants]
        run_all(one, cache, Path(folder) / "warm", OWN)
        single = metered(lambda: run_all(one, cache, Path(folder) / "one", OWN))
        shared = metered(lambda: run_all(many, cache, Path(folder) / "shared", shared_reading(cache, recipes)))
        alone = metered(lambda: run_all(many, cache, Path(folder) / "alone", OWN))
    print(f"{options.cache}, tables train and val, {os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}")
    names = ("one run", f"{options.variants} variants, one sweep", f"{options.variants} runs of their own")
    for tokens, kind in ((True, "tokens"), (False, "depth")):
        for label, meters in zip(names, (single, shared, alone), strict=True):
            found, first = meters[tokens], single[tokens]
            times = f"{found.size / first.size:5.2f} times the bytes, {found.seconds / first.seconds:5.2f} times the seconds"
            print(f"{kind:8s}{label:24s}{found.size / 1e6:9.1f} MB {found.seconds:7.3f} s   {times} of one run")


if __name__ == "__main__":
    main()
