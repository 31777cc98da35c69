"""What the cache saves: a training step from cached tokens against one that encodes its images first.

    python benchmarks/cached_step.py [--model ViT-B-16-quickgelu] [--size 336] [--width 4] [--device auto]

Weights are random: speed does not depend on them. The published procedure runs the encoder twice per step (patch tokens, then
`encode_image` for the CLS token); ours would need it once.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable

import torch

from pcd.device import resolve_device
from pcd.encoders import create_encoder
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.pureclip import PureClipHead, PureClipOptions

BATCH = 8


def seconds(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median wall time of a call after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--size", type=int, default=336)
    parser.add_argument("--width", type=int, default=4, help="hidden width of the MLPs in multiples of D")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    encoder = create_encoder(f"openclip:{options.model}", {"weights": "random"}, (options.size, options.size), device)
    views = torch.rand(BATCH, 3, options.size, options.size)
    columns = {name: values.to(device) for name, values in encoder.encode(views).items()}
    shapes = {spec.name: spec.shape for spec in encoder.columns}
    head = PureClipHead(PureClipOptions(min_depth=1e-3, max_depth=10.0, hidden=options.width), shapes, encoder.grid).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-4)
    mean = torch.rand(BATCH, shapes["clip/patch"][0], device=device) * 9 + 0.5
    valid = torch.ones_like(mean, dtype=torch.bool)
    target = PatchTargets(valid.float() * 196, mean, torch.full_like(mean, 0.1), valid)

    def step() -> None:
        head.losses(Batch(columns, {"embedding": target}), "embedding")["total"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    cached, encode = seconds(step, device), seconds(lambda: encoder.encode(views), device)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} cores {platform.machine()}"
    print(
        f"{options.model} at {options.size}, {BATCH} views, hidden width {options.width} D, torch {torch.__version__}, {name}"
    )
    print(f"step from the cache          {cached:8.3f} s")
    print(f"encode once + step           {encode + cached:8.3f} s   {(encode + cached) / cached:5.1f} times the cached step")
    print(f"encode twice + step (paper)  {2 * encode + cached:8.3f} s   {(2 * encode + cached) / cached:5.1f} times")
    print(f"encoder alone                {BATCH / encode:8.2f} views/s")
    print(f"peak memory                  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f} GB")


if __name__ == "__main__":
    main()
