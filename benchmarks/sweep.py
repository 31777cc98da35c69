"""What one read saves a sweep: the bytes and seconds that reading takes in one run, and in eight variants of one sweep.

    python benchmarks/sweep.py CACHE [--variants 8] [--residency host]

Measured is everything that `Column.read` does for the tables train and val, with two epochs of a narrow head per run: tokens
(once if they are held in memory, in every epoch if they are streamed), and apart from them the depth columns. The page cache is
warm, as it is after the first run.
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
from pcd.progress import SILENT
from pcd.stages.sweep_plan import SweepPlan, plan_sweep
from pcd.stages.together import Failures, Together
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


def run_alone(plan: SweepPlan, cache: Cache, root: Path) -> None:
    """Every variant by itself."""
    for variant in plan.variants:
        train(variant.seeded(0), cache, root / variant.name, device="cpu")


def run_together(plan: SweepPlan, cache: Cache, root: Path) -> None:
    """Every variant side by side, as a sweep does."""
    failures = Failures(root, SILENT)
    Together(plan.variants, cache, root, "cpu", SILENT, lambda report: None).train(0, failures)
    if failures.found:
        raise SystemExit(str(failures.found))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--residency", choices=["host", "stream"], default="host")
    options = parser.parse_args()
    vary = [f"head.dropout={','.join(str(number / 100) for number in range(options.variants))}"]
    narrow = ["head.table_init=random", "head.hidden=1", "train.epochs=2", f"train.residency={options.residency}"]
    with Cache.open(options.cache) as cache, tempfile.TemporaryDirectory() as folder:
        many = plan_sweep(cache, vary=vary, overrides=narrow)
        one = SweepPlan(many.name, "", many.seeds, many.variants[:1])
        run_alone(one, cache, Path(folder) / "warm")
        single = metered(lambda: run_alone(one, cache, Path(folder) / "one"))
        shared = metered(lambda: run_together(many, cache, Path(folder) / "shared"))
        alone = metered(lambda: run_alone(many, cache, Path(folder) / "alone"))
    print(f"{options.cache}, tables train and val, {os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}")
    names = ("one run", f"{options.variants} variants, one sweep", f"{options.variants} runs of their own")
    for tokens, kind in ((True, "tokens"), (False, "depth")):
        for label, meters in zip(names, (single, shared, alone), strict=True):
            found, first = meters[tokens], single[tokens]
            times = f"{found.size / first.size:5.2f} times the bytes, {found.seconds / first.seconds:5.2f} times the seconds"
            print(f"{kind:8s}{label:24s}{found.size / 1e6:9.1f} MB {found.seconds:7.3f} s   {times} of one run")


if __name__ == "__main__":
    main()
