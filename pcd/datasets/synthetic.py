"""Made-up rooms and streets with exact metric depth: needs no download, and draws the same samples every time.

Scenes are ray-cast by `pcd.datasets.scenes`. A sample depends on the seed, its split and its number, and on nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from pcd.datasets.base import SPLITS, DatasetOptions, Intrinsics, Sample, Split
from pcd.datasets.scenes.materials import Floats
from pcd.datasets.scenes.roads import random_road
from pcd.datasets.scenes.rooms import random_room
from pcd.datasets.scenes.scene import Scene
from pcd.datasets.scenes.sensor import photograph, punch_holes, scan
from pcd.datasets.scenes.shading import render
from pcd.depths import KITTI_UNITS, MILLIMETRES
from pcd.errors import SampleError, UsageError
from pcd.views import ViewPlan

VERSION = 1
"""Raised whenever the generator draws anything differently, so that caches of older scenes are told apart."""
HEIGHT = 240
WIDTHS = {"indoor": 320, "mixed": 320, "outdoor": 480}
FOCAL = {"indoor": 0.85, "outdoor": 0.7}
"""Focal length as a share of the frame's width: 61 and 71 degrees of horizontal view."""
HOLES = {"indoor": 0.02, "outdoor": 0.0}
TILE = 224
"""Pixels along one side of a tile of the view plan: what most encoders were trained on."""

_SCENE, _SENSOR = 0, 1


class SyntheticOptions(DatasetOptions):
    """Keys of the `[dataset]` table of `synthetic`."""

    seed: Annotated[int, Field(ge=0)] = 0
    train: Annotated[int, Field(ge=0)] = 160
    """Samples in the training list."""
    test: Annotated[int, Field(ge=0)] = 40
    """Samples in the test list."""
    kind: Literal["indoor", "outdoor", "mixed"] = "indoor"
    """Rooms, roads, or in turn a room and a road."""
    height: Annotated[int, Field(ge=16)] = HEIGHT
    width: Annotated[int, Field(ge=16)] | None = None
    """Pixels; absent: 320, or 480 outdoors."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.008
    """Standard deviation of the image noise, as a share of full brightness."""
    holes: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the measured depth that is missing, mostly along edges; absent: 0.02 in rooms, none on roads."""
    lidar: bool = False
    """On roads, keep the depth only where a scanner of 64 rings would have measured it."""

    @field_validator("root")
    @classmethod
    def _no_root(cls, value: object) -> object:
        if value is not None:
            raise ValueError("synthetic scenes are made, not read; leave 'root' out")
        return value

    @field_validator("lidar")
    @classmethod
    def _lidar_on_roads(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("kind") == "indoor":
            raise ValueError("rooms are not scanned; use it with kind 'outdoor' or 'mixed'")
        return value


class SyntheticDataset:
    """Ray-cast rooms and roads behind the `Dataset` protocol.

    Depth is planar (the z-coordinate in the camera frame) and exact to float32 rounding; integer pixel coordinates are pixel
    centres, so that pixel (row i, column j) lies on the ray `((j - cx) / fx, (i - cy) / fy, 1)` of the returned intrinsics.
    There is no depth in the sky, in holes, and outside `depth_range`.
    """

    Options: ClassVar[type[DatasetOptions]] = SyntheticOptions

    name = "synthetic"
    family = "generic"
    synthetic = True

    def __init__(self, options: SyntheticOptions) -> None:
        self.options = options
        indoor = options.kind == "indoor"
        self.depth_range = (0.1, 10.0) if indoor else (0.5, 80.0)
        self.units_per_metre = MILLIMETRES if indoor else KITTI_UNITS
        self.notes = (f"{options.kind} scenes drawn at random from seed {options.seed} (generator version {VERSION})",)
        self._shape = (options.height, options.width or WIDTHS[options.kind])
        counts: dict[Split, int] = {"train": options.train, "val": 0, "test": options.test}
        self._keys: dict[Split, dict[str, int]] = {
            split: {f"{self._kind(index)}-{split}-{index:05d}": index for index in range(counts[split])[: options.limit]}
            for split in SPLITS
        }

    def _kind(self, index: int) -> str:
        if self.options.kind == "mixed":
            return "outdoor" if index % 2 else "indoor"
        return self.options.kind

    def keys(self, split: Split) -> tuple[str, ...]:
        """Names such as `indoor-train-00012`; `val` is empty. Raises `UsageError` for an unknown split."""
        return tuple(self._numbers(split))

    def missing_files(self, split: Split) -> list[tuple[str, Path]]:
        """None: nothing is read from disk."""
        self._numbers(split)
        return []

    def size(self, split: Split, key: str) -> tuple[int, int]:
        """(height, width), the same for all samples. Raises `SampleError` for an unknown key."""
        self._index(split, key)
        return self._shape

    def load(self, split: Split, key: str) -> Sample:
        """Draw one sample. Raises `SampleError` for an unknown key."""
        index = self._index(split, key)
        scene = self.scene(split, key)
        image, hits = render(scene)
        rng, kind = self._random(split, index, _SENSOR), self._kind(index)
        low, high = self.depth_range
        depth: Floats = np.where((hits.depth >= low) & (hits.depth <= high), hits.depth, np.float32(np.nan))
        rgb = photograph(image, self.options.noise, rng)
        depth = punch_holes(depth, HOLES[kind] if self.options.holes is None else self.options.holes, rng)
        if self.options.lidar and kind == "outdoor":
            depth = scan(depth, scene.camera, rng)
        return Sample(key, rgb, depth, scene.camera.intrinsics)

    def scene(self, split: Split, key: str) -> Scene:
        """The scene behind a sample: its solids, lights and camera pose in the world. Raises `SampleError`."""
        index = self._index(split, key)
        rng, kind, (height, width) = self._random(split, index, _SCENE), self._kind(index), self._shape
        focal = FOCAL[kind] * width
        intrinsics = Intrinsics(focal, focal, (width - 1) / 2, (height - 1) / 2)
        return (random_room if kind == "indoor" else random_road)(rng, intrinsics, height, width)

    def view_plan(self) -> ViewPlan:
        """One row of square tiles of 224 pixels, as many as fit the shape of the frame: one for 240x320, two for 240x480."""
        columns = max(round(self._shape[1] / self._shape[0]), 1)
        return ViewPlan(canvas=(TILE, TILE * columns), grid=(1, columns))

    def identity(self) -> dict[str, Any]:
        """Everything the samples depend on, and the generator's version."""
        options = self.options.model_dump(include={"seed", "kind", "noise", "holes", "lidar"})
        lists = {split: len(numbers) for split, numbers in self._keys.items()}
        return {"dataset": self.name, "version": VERSION, "size": list(self._shape), "samples": lists, **options}

    def _numbers(self, split: Split) -> dict[str, int]:
        if split not in self._keys:
            raise UsageError(f"synthetic: unknown split {split!r}; known: {', '.join(SPLITS)}.")
        return self._keys[split]

    def _index(self, split: Split, key: str) -> int:
        numbers = self._numbers(split)
        if key not in numbers:
            known = f"{next(iter(numbers))} to {next(reversed(numbers))}" if numbers else "none"
            raise SampleError(f"synthetic: no sample {key!r} in {split}; its {len(numbers)} keys: {known}.")
        return numbers[key]

    def _random(self, split: Split, index: int, purpose: int) -> np.random.Generator:
        """Separate streams for the scene and the sensor, so that noise and holes do not move the furniture."""
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.options.seed, SPLITS.index(split), index, purpose]))
        )
