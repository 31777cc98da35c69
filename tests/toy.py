"""A tiny dataset and encoder, registered as a third party would, so that stages are tested in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcd.columns import ColumnSpec
from pcd.datasets import DatasetOptions, Intrinsics, Sample, Split
from pcd.encoders.base import EncoderOptions
from pcd.errors import SampleError, TextTowerError
from pcd.heads.base import Batch, Head, HeadOptions, Phase
from pcd.views import ViewPlan

HEIGHT, WIDTH, WIDE = 24, 40, 6


class ToyDataset:
    """Frames whose colour says how far away things are; depth falls with the row, some pixels have none."""

    class Options(DatasetOptions):
        train: int = 12
        test: int = 5
        broken: tuple[str, ...] = ()
        missing: tuple[str, ...] = ()
        factor: float = 1.0
        far: float = 10.0

    family = "generic"
    synthetic = True
    units_per_metre = 1000
    notes = ("toy frames",)

    def __init__(self, options: Options) -> None:
        self.name = "toy"
        self.options = options
        self.depth_range = (0.1, options.far)
        self.loaded: list[str] = []

    def keys(self, split: Split) -> tuple[str, ...]:
        number = {"train": self.options.train, "val": 0, "test": self.options.test}[split]
        number = number if self.options.limit is None else min(number, self.options.limit)
        return tuple(f"{split}-{n}" for n in range(number))

    def load(self, split: Split, key: str) -> Sample:
        if key in self.options.broken:
            raise SampleError(f"{key}.png is broken.")
        seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
        generator = np.random.default_rng(seed)
        scale = generator.uniform(0.4, 1.0) * self.options.factor
        depth = np.linspace(9, 1, HEIGHT)[:, None] * scale + np.linspace(0, 0.8, WIDTH)[None]
        shade = np.clip(depth / 10 * 255, 0, 255)
        rgb = np.stack([shade, 255 - shade, np.full_like(shade, 80)], axis=-1) + generator.normal(0, 4, (HEIGHT, WIDTH, 3))
        depth[generator.random(depth.shape) < 0.1] = np.nan
        return Sample(key, np.clip(rgb, 0, 255).astype(np.uint8), depth.astype(np.float32), Intrinsics(30, 30, 20, 12))

    def size(self, split: Split, key: str) -> tuple[int, int]:
        return HEIGHT, WIDTH

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        return [(key, Path(f"{key}.png")) for key in self.keys(split) if key in self.options.missing]

    def view_plan(self) -> ViewPlan:
        return ViewPlan(canvas=(16, 32), grid=(1, 2))

    def identity(self) -> dict[str, Any]:
        return {"train": len(self.keys("train")), "test": len(self.keys("test")), "factor": self.options.factor}


class ToyEncoder:
    """Mean colour of each 4x4 patch, its position, and a constant."""

    class Options(EncoderOptions):
        text: bool = True
        gain: float = 1.0

    calls = 0

    def __init__(self, model: str, options: Options, view_size: tuple[int, int], device: str) -> None:
        self.options = options
        self.grid = (view_size[0] // 4, view_size[1] // 4)
        patches = self.grid[0] * self.grid[1]
        self._prefix = options.prefix or "clip"
        self.columns = (
            ColumnSpec(f"{self._prefix}/patch", (patches, WIDE), "float16", ("patch", "channel"), "toy tokens"),
            ColumnSpec(f"{self._prefix}/cls", (WIDE,), "float32", ("channel",), "toy CLS"),
        )
        self.has_text = options.text
        self.random_weights = options.weights == "random"

    @staticmethod
    def request(model: str, options: Options) -> dict[str, Any]:
        return {"model": model, **options.model_dump(exclude=None if options.prefix else {"prefix"})}

    def fingerprint(self) -> dict[str, Any]:
        kind = "random" if self.random_weights else "file"
        return {
            "encoder": "toy",
            "model": "toy",
            "weights": {"kind": kind, "digest": f"{self.options.gain}"},
            "precision": "fp32",
            "grid": list(self.grid),
            "text": self.has_text,
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        ToyEncoder.calls += 1
        colour = torch.nn.functional.avg_pool2d(views, 4).flatten(2).transpose(1, 2)
        rows = torch.linspace(-1, 1, self.grid[0]).repeat_interleave(self.grid[1])
        columns = torch.linspace(-1, 1, self.grid[1]).repeat(self.grid[0])
        rest = torch.stack([rows, columns, torch.ones_like(rows)], dim=-1).expand(len(views), -1, -1)
        tokens = torch.cat([colour, rest], dim=-1) * self.options.gain
        return {f"{self._prefix}/patch": tokens.half(), f"{self._prefix}/cls": tokens.mean(dim=1)}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        if not self.has_text:
            raise TextTowerError("toy weights without a text tower")
        seeds = [int(hashlib.sha256(phrase.encode()).hexdigest()[:8], 16) for phrase in phrases]
        return torch.stack([torch.randn(WIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class MapEncoder:
    """Mean colour of each 2x2 patch, as a map; a frozen computation without weights."""

    Options = EncoderOptions
    calls = 0

    def __init__(self, model: str, options: EncoderOptions, view_size: tuple[int, int], device: str) -> None:
        self.grid = (view_size[0] // 2, view_size[1] // 2)
        self.columns = (ColumnSpec("maps/colour", (*self.grid, 3), "float16", ("y", "x", "channel"), "mean colours"),)
        self.has_text = self.random_weights = False

    @staticmethod
    def request(model: str, options: EncoderOptions) -> dict[str, Any]:
        return {"model": model}

    def fingerprint(self) -> dict[str, Any]:
        weights = {"kind": "none", "digest": ""}
        own = {"encoder": "toy-maps", "model": "maps", "weights": weights}
        return {**own, "precision": "fp32", "grid": list(self.grid), "text": False}

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        MapEncoder.calls += 1
        return {"maps/colour": torch.nn.functional.avg_pool2d(views, 2).permute(0, 2, 3, 1).half()}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        raise TextTowerError("maps have no text tower")


class FineHead(Head):
    """Depth of each 2x2 patch, linear in its colour and in the token around it: reads two encoders, gives the finer grid."""

    class Options(HeadOptions):
        tokens: str = "clip/patch"
        maps: str = "maps/colour"

    def __init__(self, options: Options, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> None:
        super().__init__()
        self.options = options
        self.coarse, self.grid = grid, self.output_grid(options, shapes, grid)
        self.linear = torch.nn.Linear(shapes[options.tokens][-1] + 3, 1)

    @staticmethod
    def reads(options: Options) -> tuple[str, ...]:
        return options.tokens, options.maps

    @staticmethod
    def output_grid(options: Options, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns, _ = shapes[options.maps]
        return rows, columns

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("depth", 1, tuple(self.named_parameters()), 1e-2, 0.0),)

    def depth(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = columns[self.options.tokens].float().unflatten(1, self.coarse)
        times = self.grid[0] // self.coarse[0], self.grid[1] // self.coarse[1]
        tokens = tokens.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2)
        both = torch.cat([tokens, columns[self.options.maps].float()], dim=-1).flatten(1, 2)
        depth: torch.Tensor = self.linear(both).squeeze(-1).exp()
        return depth.clamp(self.options.min_depth, self.options.max_depth)

    def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:
        target = batch.targets["depth"]
        error = self.depth(batch.columns).flatten()[target.flat] - target.mean.flatten()[target.flat]
        return {"total": error.abs().mean()}


class Said(list[str]):
    """A progress that keeps its lines."""

    def say(self, text: str) -> None:
        self.append(text)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, number: int = 1) -> None: ...

    def stop(self) -> None: ...
