"""What the validation of each epoch costs, beside the epoch itself and beside validation that looks at every pixel.

    python benchmarks/validation.py CACHE [--rounds 3] [--images 654] [--device auto] [--threads 2]

First on a cache: an epoch of training (all training rows forward and backward, hidden width 4 D), validation with ground truth
held on the device (`pcd.stages.validation`), the same map by map (`Scorer`, ground truth read in every epoch) and the head's
part of both, in turns; what that means for NYU (24,231 training views, 654 validation images with their mirrored views); peak
memory in a process each. Then scoring alone at the sizes of NYU under ViT-L/14@336: random depths of `--images` images.
Times are medians, on the CPU of processor time of all threads; ratios are medians of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does: a thread that spins costs time

import numpy as np
import torch

from pcd import depths
from pcd.cache import Cache
from pcd.device import resolve_device
from pcd.evaluation.held_scoring import HeldScorer, held_bytes
from pcd.evaluation.protocols import get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.heads import head_options
from pcd.heads.base import Head
from pcd.stages.inference import groups_of, head_predictor, score
from pcd.stages.recipes import training_recipe
from pcd.stages.runs import create_or_continue
from pcd.stages.validation import PREPARED_AT_ONCE, validation, validation_protocol
from pcd.training.rows import TrainingRows
from pcd.training.sources import HeldRows, Placed
from pcd.training.targets import row_targets
from pcd.views import TRUTH, ViewPlan

NYU_TRAIN, NYU_VAL = 24_231, 654
NYU_PLAN, NYU_GRID, NYU_RANGE = ViewPlan(canvas=(336, 336), crop=(40, 470, 38, 603)), (24, 24), (1e-3, 10.0)
HELD, MAPS, FORWARD, EPOCH = "held on the device", "map by map", "the head alone", "training epoch"
PEAK = "--peak-of"

Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Processor time of all threads; on a GPU wall time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def in_turns(works: dict[str, Work], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after another, after one round to warm up."""
    found = [{name: seconds(work, device) for name, work in works.items()} for _ in range(rounds + 1)]
    return {name: [times[name] for times in found[1:]] for name in works}


def share(part: list[float], whole: list[float]) -> float:
    """Median of the ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(part, whole, strict=True))


class Bench:
    """A head with fresh weights, and the works on a cache that are measured."""

    def __init__(self, cache: Cache, folder: Path, device: torch.device) -> None:
        recipe = training_recipe(cache, None, ["head.table_init=random", "head.hidden=4"])
        self.run, _ = create_or_continue(folder, recipe, cache)
        self.head: Head = self.run.new_head().to(device)
        self.check, self.device = cache.table("val"), device
        kind, options = head_options(recipe.head)
        reads, group = kind.reads(options), TRUTH[recipe.views.depth_resize]
        samples = self.check.usable()
        held_out = self.check.view_rows(samples).reshape(-1)
        source = HeldRows(self.check, reads, held_out, device, device)
        self.validate = validation(self.run, self.check, source, device, print)
        self.protocol = validation_protocol(recipe, self.check)
        self.predict = head_predictor(self.head, self.check, source, self.run.grid)
        self.samples, self._group = samples, group
        learn = cache.table("train")
        self.rows = TrainingRows(learn, recipe.train)
        settings = {"embedding": recipe.targets.embedding, "depth": recipe.targets.depth}
        limits = (options.min_depth, options.max_depth)
        targets = row_targets(learn, self.rows.rows, self.run.grid, settings, limits, group)
        self.rows.attach(Placed(HeldRows(learn, reads, self.rows.rows, device, device), ""), targets, device)

    def held(self) -> object:
        """Validation as it is."""
        return self.validate(self.head)

    def maps(self) -> object:
        """The same through `Scorer`, ground truth read again."""
        scorer = Scorer([self.protocol], self.check.plan)
        self.head.eval()
        score(self.predict, self.check, scorer, self._group)
        return scorer.scores[self.protocol.label].means()

    def forward(self) -> None:
        """The predictions alone."""
        self.head.eval()
        self.predict(self.samples)

    def epoch(self) -> None:
        """All training rows forward and backward."""
        self.head.train()
        for batch in self.rows.epoch(0):
            self.head.losses(batch, "embedding")["total"].backward()  # type: ignore[no-untyped-call]
            self.head.zero_grad(set_to_none=True)


def peak(work: Work, device: torch.device) -> int:
    """Bytes that a work takes beyond what there was before; on Linux, or on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def on_a_cache(bench: Bench, rounds: int, command: list[str]) -> None:
    """Print times and shares of an epoch, and what they would be on NYU."""
    works: dict[str, Work] = {EPOCH: bench.epoch, HELD: bench.held, MAPS: bench.maps, FORWARD: bench.forward}
    times = in_turns(works, bench.device, rounds)
    views, images = len(bench.rows.order(0)), len(bench.samples)
    print(f"{views} training views, {images} validation images of {bench.check.views} views")
    print(f"{EPOCH:22s} {statistics.median(times[EPOCH]):9.3f} s")
    for name in (HELD, MAPS, FORWARD):
        part = share(times[name], times[EPOCH])
        nyu = part * views / NYU_TRAIN * (NYU_VAL * 2) / (images * bench.check.views)
        memory = ""
        if name != FORWARD:
            done = subprocess.run([*command, PEAK, name], capture_output=True, text=True, check=True)
            memory = f"   peak memory {int(done.stdout.splitlines()[-1]) / 1e6:5.0f} MB"
        print(f"{name:22s} {statistics.median(times[name]):9.3f} s  {part:6.1%} of an epoch, on NYU {nyu:5.2%}{memory}")


def scoring_alone(name: str, images: int, device: torch.device, rounds: int) -> None:
    """Print times of scoring random predictions of NYU size under one protocol, without any head."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0.5, 9.0, (PREPARED_AT_ONCE, *NYU_GRID)).repeat(14, axis=1).repeat(14, axis=2)
    stored = (coarse * rng.uniform(0.8, 1.1, (PREPARED_AT_ONCE, *NYU_PLAN.canvas)) * 1000).astype(np.uint16)
    stored[rng.random(stored.shape) < 0.25] = 0
    truth = torch.from_numpy(depths.decode(stored, 1000))
    patches = torch.from_numpy(rng.uniform(0.5, 9.0, (images, 2, *NYU_GRID)).astype(np.float32)).to(device)
    keys, groups = [str(number) for number in range(images)], list(groups_of(np.arange(images), PREPARED_AT_ONCE))
    protocol = get_protocol(name, "nyu", NYU_RANGE)
    held = HeldScorer(protocol, NYU_PLAN, NYU_GRID, keys, 1000, device)

    def prepare() -> None:
        for group in groups:
            held.hold(int(group[0]), stored[: len(group)])

    def maps() -> dict[str, float]:
        scorer = Scorer([protocol], NYU_PLAN)
        for group in groups:
            scorer.add([keys[at] for at in group], patches[group[0] : group[-1] + 1], truth[: len(group)])
        return scorer.scores[protocol.label].means()

    prepared = seconds(prepare, device)
    times = in_turns({HELD: lambda: held.means(patches), MAPS: maps}, device, rounds)
    found, expected = held.means(patches), maps()
    apart = max(abs(found[metric] / value - 1) for metric, value in expected.items())
    medians = {way: statistics.median(values) for way, values in times.items()}
    size = held_bytes(protocol, NYU_PLAN, NYU_GRID, images)
    ratio = share(times[MAPS], times[HELD])
    print(f"{name}: {HELD} {medians[HELD]:.3f} s, {MAPS} {medians[MAPS]:.3f} s ({ratio:.2f} times);")
    print(f"    means {apart:.0e} apart; prepared once in {prepared:.1f} s, {size / 1e6:.0f} MB held")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=NYU_VAL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(PEAK, choices=[HELD, MAPS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(resolve_device(options.device))
    torch.set_num_threads(options.threads)
    with Cache.open(options.cache) as cache, tempfile.TemporaryDirectory() as folder:
        bench = Bench(cache, Path(folder) / "run", device)
        if options.peak_of:
            print(peak(bench.held if options.peak_of == HELD else bench.maps, device))
            return
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
        print(
            f"{options.cache}, torch {torch.__version__}, {options.threads} threads, {machine}, load {os.getloadavg()[0]:.1f}"
        )
        command = [sys.executable, __file__, str(options.cache), "--device", str(device), "--threads", str(options.threads)]
        on_a_cache(bench, options.rounds, command)
    print(f"\nscoring alone: {options.images} images at 336x336, 24x24 patches, flip TTA")
    for name in ("pureclip", "pureclip[upsample=bilinear]"):
        scoring_alone(name, options.images, device, options.rounds)


if __name__ == "__main__":
    main()
