"""A cache of noise with the shapes of a real one, for measuring: nothing in it says anything about depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcd import datasets, encoders
from pcd.cache import Cache
from pcd.columns import ColumnSpec
from pcd.datasets import DatasetOptions, Sample, Split
from pcd.encoders.base import EncoderOptions
from pcd.recipe import Recipe, parse_recipe
from pcd.stages.extract import extract
from pcd.views import ViewPlan

PATCH = 14
FAR = 10.0


class NoiseDataset:
    """Grey frames of canvas size; depth is a ramp, and missing at a fifth of the pixels."""

    class Options(DatasetOptions):
        """How many frames, and their side in patches."""

        train: int = 256
        test: int = 8
        side: int = 24

    family = "nyu"
    synthetic = True
    units_per_metre = 1000
    notes = ("noise, for measuring",)

    def __init__(self, options: Options) -> None:
        self.name = "noise"
        self.options = options
        self.depth_range = (0.1, FAR)
        self._side = options.side * PATCH
        random = np.random.default_rng(0)
        self._depth = np.linspace(1, 9, self._side, dtype=np.float32)[:, None] + random.random((self._side, self._side))
        self._depth[random.random(self._depth.shape) < 0.2] = np.nan

    def keys(self, split: Split) -> tuple[str, ...]:
        """Numbers."""
        number = {"train": self.options.train, "val": self.options.test, "test": self.options.test}[split]
        return tuple(f"{split}-{n}" for n in range(number))

    def load(self, split: Split, key: str) -> Sample:
        """The same frame under every key."""
        return Sample(key, np.full((self._side, self._side, 3), 128, dtype=np.uint8), self._depth.astype(np.float32), None)

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """Of every frame."""
        return self._side, self._side

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """There are no files."""
        return []

    def view_plan(self) -> ViewPlan:
        """The whole frame and its mirror image."""
        return ViewPlan(canvas=(self._side, self._side))

    def identity(self) -> dict[str, Any]:
        """What the frames follow from."""
        return self.options.model_dump(mode="json")


class NoiseEncoder:
    """Random tokens of the width asked for."""

    class Options(EncoderOptions):
        """Width of the tokens."""

        width: int = 768

    has_text = False
    random_weights = True

    def __init__(self, model: str, options: Options, view_size: tuple[int, int], device: str) -> None:
        self.grid = (view_size[0] // PATCH, view_size[1] // PATCH)
        self._shape = (self.grid[0] * self.grid[1], options.width)
        self._random = torch.Generator().manual_seed(0)
        self.columns = (
            ColumnSpec("clip/patch", self._shape, "float16", ("patch", "channel"), "noise"),
            ColumnSpec("clip/cls", self._shape[1:], "float32", ("channel",), "noise"),
        )

    @staticmethod
    def request(model: str, options: Options) -> dict[str, Any]:
        """The options."""
        return options.model_dump()

    def fingerprint(self) -> dict[str, Any]:
        """As of an encoder with random weights."""
        weights = {"kind": "random", "digest": "noise"}
        return {"encoder": "noise", "model": "noise", "weights": weights, "precision": "fp32", "grid": list(self.grid)}

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Noise."""
        tokens = torch.randn(len(views), *self._shape, generator=self._random)
        return {"clip/patch": tokens.half(), "clip/cls": tokens[:, 0].clone()}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Noise too."""
        return torch.randn(len(phrases), self._shape[1], generator=self._random)


def noise_recipe(**tables: Any) -> Recipe:
    """A recipe for such a cache."""
    table = {
        "name": "noise",
        "dataset": {"name": "noise", **tables.pop("dataset", {})},
        "encoder": {"name": "noise:noise", "weights": "random", **tables.pop("encoder", {})},
        "head": {"name": "pureclip", "min_depth": 0.1, "max_depth": FAR, "table_init": "random", **tables.pop("head", {})},
    }
    return parse_recipe({**table, **tables}, "noise")


def noise_cache(folder: Path, **tables: Any) -> Cache:
    """A cache of `dataset.train` frames, twice as many rows."""
    datasets.registry.add("noise", f"{__name__}:NoiseDataset")
    encoders.registry.add("noise", f"{__name__}:NoiseEncoder")
    return extract(noise_recipe(**tables), folder, device="cpu").cache
