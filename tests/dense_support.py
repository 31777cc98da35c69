"""Convolutions and losses as numpy loops over their definitions, and rows and targets for heads that give maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcd.heads.base import Batch, Head, PatchTargets, Phase

RANGE: dict[str, Any] = {"min_depth": 0.1, "max_depth": 10.0}
CPU = torch.device("cpu")


def conv(x: Any, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0) -> Any:
    """One picture: `out[o, i, j] = bias[o] + sum weight[o, c, a, b] x[c, i stride + a - padding, j stride + b - padding]`."""
    kernel, add = weight.detach().double().numpy(), bias.detach().double().numpy()
    padded = np.pad(np.asarray(x, dtype=np.float64), ((0, 0), (padding, padding), (padding, padding)))
    rows = (padded.shape[1] - kernel.shape[2]) // stride + 1
    columns = (padded.shape[2] - kernel.shape[3]) // stride + 1
    out = np.empty((len(kernel), rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + kernel.shape[2], j * stride : j * stride + kernel.shape[3]]
            out[:, i, j] = (kernel * window).sum(axis=(1, 2, 3)) + add
    return out


def pool(x: Any) -> Any:
    """The largest of every 2x2 cells; a last odd row or column is left out."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    cut = x[:, : 2 * rows, : 2 * columns]
    return np.maximum.reduce([cut[:, a::2, b::2] for a in (0, 1) for b in (0, 1)])


def relu(x: Any) -> Any:
    return np.where(x > 0, x, 0.0)


def normalised(rgb: Tensor) -> Any:
    """One uint8 picture `(h, w, 3)` as `(3, h, w)`: ImageNet's mean and deviation, written out."""
    values = rgb.double().numpy() / 255
    return np.stack([(values[..., 0] - 0.485) / 0.229, (values[..., 1] - 0.456) / 0.224, (values[..., 2] - 0.406) / 0.225])


def refining(layers: Any, image: Any, coarse: Any) -> Any:
    """Eigen's fine network on one picture and one coarse map."""
    edges = pool(relu(conv(image, layers.edges.weight, layers.edges.bias, stride=2, padding=4)))
    mixed = relu(conv(np.concatenate([edges, coarse[None]]), layers.mixed.weight, layers.mixed.bias, padding=2))
    return conv(mixed, layers.out.weight, layers.out.bias, padding=2)[0]


def count_of(module: torch.nn.Module) -> int:
    """Trainable numbers."""
    return sum(value.numel() for value in module.parameters())


def targets(views: int, grid: tuple[int, int], seed: int = 0, share: float = 0.7) -> PatchTargets:
    """Random metres on a grid, `share` of them known."""
    generator = np.random.default_rng(seed)
    valid = generator.random((views, grid[0] * grid[1])) < share
    mean = np.where(valid, generator.uniform(0.5, 9, valid.shape), 0).astype(np.float32)
    return PatchTargets.from_host(valid.astype(np.float32), mean, np.zeros_like(mean), valid, device=CPU)


def ramps(views: int, grid: tuple[int, int]) -> PatchTargets:
    """Metres that rise from row to row and from view to view, all known: what can be learnt by heart in a few steps."""
    rows = np.linspace(1, 5, grid[0])[None, :, None] + np.arange(views)[:, None, None]
    mean = np.broadcast_to(rows, (views, *grid)).reshape(views, -1).astype(np.float32)
    ones = np.ones_like(mean)
    return PatchTargets.from_host(ones, mean, 0 * ones, ones > 0, device=CPU)


def nowhere(target: PatchTargets) -> PatchTargets:
    """The same without any ground truth."""
    zero = np.zeros(tuple(target.mean.shape), dtype=np.float32)
    return PatchTargets.from_host(zero, zero, zero, zero > 0, device=CPU)


def stirred(head: Head, scale: float = 0.3) -> Any:
    """Every parameter and running statistic away from where it starts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator) * scale)
    return head


class Words:
    """A context with texts of a width."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.asked: list[tuple[str, ...]] = []

    def text(self, phrases: Sequence[str]) -> Tensor:
        self.asked.append(tuple(phrases))
        return torch.randn(len(phrases), self.width, generator=torch.Generator().manual_seed(3))

    def text_tower(self) -> Any:
        raise NotImplementedError

    def batches(self) -> Iterator[Batch]:
        raise NotImplementedError


def trained(head: Head, batch: Batch, steps: int) -> list[float]:
    """Losses of `steps` steps, phases in turns, each with the optimiser that it asks for."""
    phases = head.phases()
    optimisers = [_optimiser(phase) for phase in phases]
    found = []
    for step in range(steps):
        phase, optimiser = phases[step % len(phases)], optimisers[step % len(phases)]
        total = head.train().losses(batch, phase.name)["total"]
        total.backward(inputs=[value for _, value in phase.parameters])
        optimiser.step()
        head.zero_grad()
        found.append(float(total.detach()))
    return found


def _optimiser(phase: Phase) -> torch.optim.Optimizer:
    parameters = [value for _, value in phase.parameters]
    if phase.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=phase.lr, momentum=phase.momentum, weight_decay=phase.weight_decay)
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay)


def pictures(views: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random uint8 RGB `(views, height, width, 3)`."""
    return torch.randint(0, 256, (views, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
