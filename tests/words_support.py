"""What tests of heads with texts need: a small text tower, a context that has it, batches, and slow arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcd.errors import TextTowerError
from pcd.heads.base import Batch, Context, Head, PatchTargets
from pcd.training.steps import add_gradient, new_optimiser

B, GRID, CHANNELS, WIDTH, TOKEN = 3, (2, 3), 12, 6, 5
P = GRID[0] * GRID[1]
CPU = torch.device("cpu")
RANGE = {"min_depth": 0.1, "max_depth": 10.0}
RELEASED: dict[str, tuple[int, ...]] = {"clip/layer4": (*GRID, CHANNELS)}
JOINT: dict[str, tuple[int, ...]] = {"clip/patch": (P, WIDTH)}
Rows = list[list[float]]
H = TypeVar("H", bound=Head)


class TinyTower:
    """A frozen text tower: words as tokens, a causal attention, and the state of the last token projected."""

    context = 24

    def __init__(self, width: int = TOKEN, out: int = WIDTH, seed: int = 0) -> None:
        self.width = width
        self.digest = f"tiny-{seed}"
        self.vocabulary: dict[str, int] = {"<end>": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.TransformerEncoderLayer(width, 1, 2 * width, dropout=0.0, batch_first=True).eval()
            self.table = torch.randn(64, width)
            self.places = torch.randn(self.context, width) * 0.3
            self.projection = torch.randn(width, out)
        self.layer.requires_grad_(False)

    def tokens(self, phrases: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(phrases), self.context, dtype=torch.int64)
        for row, phrase in zip(rows, phrases, strict=True):
            words = [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in [*phrase.split(), "<end>"]]
            row[: len(words)] = torch.tensor(words)
        return rows

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def needed(self, tokens: Tensor) -> int:
        return int((tokens == self.vocabulary["<end>"]).int().argmax(dim=1).max()) + 1

    def encode(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        length = embeddings.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        states = self.layer(embeddings + self.places[:length], src_mask=mask, is_causal=True)
        end = (tokens == self.vocabulary["<end>"]).int().argmax(dim=1)
        found: Tensor = states[torch.arange(len(tokens)), end] @ self.projection
        return found

    def to(self, device: torch.device) -> TinyTower:
        return self


class Texts:
    """A context with texts drawn from a seed, a tower or none, and batches."""

    def __init__(self, tower: TinyTower | None = None, batches: Sequence[Batch] = (), width: int = WIDTH) -> None:
        self.tower = tower
        self.rows = batches
        self.width = width
        self.asked: list[tuple[str, ...]] = []

    def text(self, phrases: Sequence[str]) -> Tensor:
        self.asked.append(tuple(phrases))
        return torch.randn(len(phrases), self.width, generator=torch.Generator().manual_seed(7)) * 3

    def text_tower(self) -> TinyTower:
        if self.tower is None:
            raise TextTowerError("no text tower here")
        return self.tower

    def batches(self) -> Iterator[Batch]:
        yield from self.rows


class NoTexts(Texts):
    """A context of weights that hold the visual tower alone."""

    def text(self, phrases: Sequence[str]) -> Tensor:
        raise TextTowerError(f"no text tower for {phrases[0]!r}")


def made(cls: type[H], shapes: Mapping[str, tuple[int, ...]], context: Context, seed: int = 0, **options: Any) -> H:
    """A head that is ready, in training mode."""
    torch.manual_seed(seed)
    parsed = cls.Options.model_validate({**RANGE, **options})
    head: H = cls(parsed, dict(shapes), GRID)
    head.attach(context)
    head.initialise(context)
    return head


def make_columns(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """Columns as they are stored: vectors in float32, pixels in bytes, everything else in float16."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(B, *shape, generator=generator) for name, shape in shapes.items()}
    for name, value in columns.items():
        if name == "pixels/rgb":
            columns[name] = torch.randint(0, 256, value.shape, generator=generator, dtype=torch.uint8)
        elif value.dim() > 2:
            columns[name] = value.half()
    return columns


def make_target(cells: int = P, empty: bool = False) -> PatchTargets:
    """Depths of 1 to 4 m in most cells."""
    generator = np.random.default_rng(3)
    valid = np.zeros((B, cells), dtype=bool) if empty else generator.random((B, cells)) < 0.7
    mean = np.where(valid, generator.uniform(1, 4, (B, cells)), 0).astype(np.float32)
    count = (valid * generator.integers(1, 9, (B, cells))).astype(np.float32)
    return PatchTargets.from_host(count, mean, np.zeros_like(mean), valid, device=CPU)


def make_batch(shapes: Mapping[str, tuple[int, ...]], cells: int = P, empty: bool = False) -> Batch:
    target = make_target(cells, empty)
    return Batch(make_columns(shapes), {"depth": target, "embedding": target})


def learn(head: Head, batch: Batch, steps: int = 40) -> list[float]:
    """Losses of some steps, as the loop takes them."""
    (phase,) = head.phases()
    optimiser = new_optimiser(phase)
    head.train()
    found = []
    for _ in range(steps):
        losses = head.losses(batch, phase.name)
        assert add_gradient(losses["total"], phase)
        optimiser.step()
        head.zero_grad(set_to_none=True)
        found.append(float(losses["total"].detach()))
    return found


def unit(vector: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def rows_of(tensor: Tensor) -> Rows:
    """Every token or text as plain numbers."""
    rows: Rows = tensor.detach().double().reshape(-1, tensor.shape[-1]).tolist()
    return rows


def slow_depths(tokens: Rows, texts: Rows, depths: Sequence[float], factor: float) -> npt.NDArray[np.float64]:
    """`sum_k softmax(factor * token . text)_k depth_k`."""
    return np.array([dot(softmax([factor * dot(token, text) for text in texts]), depths) for token in tokens])


def slow_silog(depths: Sequence[float], truths: Sequence[float], pixels: Sequence[float]) -> float:
    """`10 sqrt(mean g^2 - 0.85 (mean g)^2)` with the pixels of each cell one by one."""
    errors = [
        math.log(depth) - math.log(truth)
        for depth, truth, number in zip(depths, truths, pixels, strict=True)
        for _ in range(int(number))
    ]
    mean = sum(errors) / len(errors)
    return 10 * math.sqrt(sum(error * error for error in errors) / len(errors) - 0.85 * mean * mean)
