"""What a training step from the cache costs: beside one that encodes its images first, and beside a plain one.

    python benchmarks/cached_step.py [--model ViT-B-16-quickgelu] [--size 336] [--width 4] [--device auto] [--threads 2]

Weights are random: speed does not depend on them. First what `pcd.heads.factored` saves, at the sizes of ViT-L/14@336: the step
against the same with the MLPs as modules, in turns; the step where only some patches count; and the optimiser. Times are
medians, on the CPU of processor time, which other processes disturb less; ratios are medians of the ratios of neighbours.
Then what the cache saves: the published procedure runs the encoder twice per step (patch tokens, then `encode_image` for the
CLS token); ours would need it once.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command line does: a thread that spins costs time

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd.device import resolve_device
from pcd.encoders import create_encoder
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.pureclip import PureClipHead, PureClipOptions

BATCH = 8
PATCHES, WIDTH = 576, 768
"""ViT-L/14@336."""
REPEATS = {4: 7, 1: 21}
"""Steps to measure by hidden width in multiples of D."""
PEAK = "--peak-of"

Step = Callable[[], object]


class PlainHead(PureClipHead):
    """The head, its MLPs applied as modules to the concatenation also in training."""

    def embed(self, patch: Tensor, cls: Tensor | None, view: Tensor | None = None) -> Tensor:
        """Equations 9 and 10."""
        if view is None:
            return super().embed(patch, cls)
        shared = F.normalize(cls.float(), dim=-1)[view] if cls is not None else patch[:, :0].float()
        return F.normalize(self.psi(torch.cat([self.phi(patch.float()), shared], dim=-1)), dim=-1)


class Training:
    """A head, its optimiser and a batch whose tokens are noise."""

    def __init__(self, kind: type[PureClipHead], columns: dict[str, Tensor], hidden: int, *, share: float = 1.0) -> None:
        """`share` is that of the patches that count."""
        patch = columns["clip/patch"]
        torch.manual_seed(0)
        options = PureClipOptions(min_depth=1e-3, max_depth=10.0, hidden=hidden)
        shapes = {name: tuple(values.shape[1:]) for name, values in columns.items()}
        self.head = kind(options, shapes, (1, patch.shape[1])).to(patch.device).train()
        self.optimiser = torch.optim.AdamW(self.head.parameters(), lr=3e-4)
        mean = torch.rand(patch.shape[:2], device=patch.device) * 9 + 0.5
        valid = torch.rand(patch.shape[:2], device=patch.device).argsort(dim=1) < share * patch.shape[1]
        arrays = (valid.float() * 196, mean, torch.full_like(mean, 0.1), valid)
        targets = PatchTargets.from_host(*(array.cpu().numpy() for array in arrays), device=patch.device)
        self.batch = Batch(columns, {"embedding": targets})

    def gradients(self) -> None:
        """Forward and backward."""
        self.optimiser.zero_grad(set_to_none=True)
        self.head.losses(self.batch, "embedding")["total"].backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.gradients()
        self.optimiser.step()


def noise_columns(device: str) -> dict[str, Tensor]:
    """Tokens of a batch at the sizes of ViT-L/14@336."""
    patch = torch.randn(BATCH, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0))
    return {"clip/patch": patch.half().to(device), "clip/cls": patch[:, 0].to(device)}


def seconds(call: Step, device: str) -> float:
    """Processor time of a call, of all threads; on a GPU wall time."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    call()
    return time.process_time() - begin


def in_turns(calls: dict[str, Step], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the calls one after another, after one round to warm up."""
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: [times[name] for times in rounds[1:]] for name in calls}


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median of the ratios of neighbours, and their middle half."""
    quarters = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4)
    return f"{quarters[1]:.2f} ({quarters[0]:.2f} to {quarters[2]:.2f})"


def peak(kind: str, hidden: int, device: str) -> int:
    """Bytes that the steps of a fresh process take beyond what it had before the first; on Linux, or on a GPU."""
    training = Training(PlainHead if kind == "plain" else PureClipHead, noise_columns(device), hidden)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
    for _ in range(2):
        training.step()
    return (torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare_with_encoding(model: str, size: int, hidden: int, device: str) -> None:
    """Print what the cache saves."""
    encoder = create_encoder(f"openclip:{model}", {"weights": "random"}, (size, size), device)
    views = torch.rand(BATCH, 3, size, size)
    columns = {name: values.to(device) for name, values in encoder.encode(views).items()}
    training = Training(PureClipHead, columns, hidden)
    times = in_turns({"step": training.step, "encode": partial(encoder.encode, views)}, device, 5)
    cached, encode = statistics.median(times["step"]), statistics.median(times["encode"])
    print(f"\n{model} at {size}, D = {columns['clip/cls'].shape[1]}, hidden width {hidden} D")
    print(f"step from the cache          {cached:8.3f} s")
    print(f"encode once + step           {encode + cached:8.3f} s   {(encode + cached) / cached:5.1f} times the cached step")
    print(f"encode twice + step (paper)  {2 * encode + cached:8.3f} s   {(2 * encode + cached) / cached:5.1f} times")
    print(f"encoder alone                {encode:8.3f} s")


def compare_with_modules(hidden: int, device: str) -> None:
    """Print what the factored step saves, what patches that do not count cost, and what AdamW takes."""
    columns, repeats = noise_columns(device), REPEATS[hidden]
    plain, factored = (Training(kind, columns, hidden) for kind in (PlainHead, PureClipHead))
    times = in_turns({"plain": plain.step, "factored": factored.step}, device, repeats)
    print(f"\n{PATCHES} patches, D = {WIDTH}, hidden width {hidden * WIDTH}")
    for name in times:
        command = [sys.executable, __file__, PEAK, name, "--width", str(hidden), "--device", device]
        done = subprocess.run([*command, "--threads", str(torch.get_num_threads())], capture_output=True, text=True, check=True)
        print(f"{name + ' step':28s} {statistics.median(times[name]):8.3f} s   peak memory {int(done.stdout) / 1e6:6.0f} MB")
    print(f"plain / factored             {ratio(times['plain'], times['factored']):>8s}")
    part = {f"1/{n}": Training(PureClipHead, columns, hidden, share=1 / n) for n in (2, 4)}
    calls: dict[str, Step] = {"all": factored.gradients, **{name: training.gradients for name, training in part.items()}}
    times = in_turns(calls, device, repeats)
    for name, training in part.items():
        valid = training.batch.targets["embedding"].valid
        each = statistics.median(times[name]) / statistics.median(times["all"]) * valid.numel() / int(valid.sum())
        print(f"{name} of the patches count     {each:8.2f} of the time per patch with all, forward and backward")
    fused = Training(PureClipHead, columns, hidden)
    fused.optimiser = torch.optim.AdamW(fused.head.parameters(), lr=3e-4, fused=True)
    fused.gradients()
    times = in_turns({"AdamW": factored.optimiser.step, "AdamW(fused=True)": fused.optimiser.step}, device, 4 * repeats)
    for name in times:
        print(f"{name:28s} {1000 * statistics.median(times[name]):8.1f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--size", type=int, default=336)
    parser.add_argument("--width", type=int, default=4, help="hidden width of the MLPs in multiples of D beside the encoder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(PEAK, choices=["plain", "factored"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = resolve_device(options.device)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak(options.peak_of, options.width, device))
        return
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} cores {platform.machine()}"
    print(f"{BATCH} views, torch {torch.__version__}, {options.threads} threads, {name}, load {os.getloadavg()[0]:.1f}")
    for hidden in sorted(REPEATS, reverse=True):
        compare_with_modules(hidden, device)
    compare_with_encoding(options.model, options.size, options.width, device)


if __name__ == "__main__":
    main()
