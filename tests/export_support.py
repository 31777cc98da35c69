"""A run on toy frames with a CLIP that is small but real, for the tests of exports: cropped, tiled and mirrored views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcd.cache import Cache
from pcd.recipe_files import load_recipe
from pcd.stages.extract import extract
from pcd.stages.recipes import extraction_recipe
from pcd.stages.runs import Run
from pcd.stages.train import train

CROP = (2, 21, 3, 36)
VIEWS = ["views.canvas=[64,96]", "views.grid=[2,2]", f"views.crop={list(CROP)}"]
SHORT = ["train.epochs=2", "head.table_init=tokens", "head.max_depth=10.0", "head.hidden=1"]
SHORT += ["head.embedding.steps=6", "head.depth.steps=6"]


def train_tiny(
    root: Path, encoder: str, weights: str, views: list[str] | None = None, head: Sequence[str] = ()
) -> tuple[Run, Cache]:
    """A run in `root/run` and its cache in `root/cache`, on the CPU; `head` are overrides of the recipe."""
    short = [*SHORT, *head]
    overrides = [*(VIEWS if views is None else views), *short]
    recipe = extraction_recipe("toy", None, overrides, encoder=encoder, weights=weights, limit=6)
    cache = extract(recipe, root / "cache", device="cpu").cache
    learned = load_recipe("folder", short).model_copy(update={"dataset": {"name": "toy"}, "encoder": recipe.encoder})
    return train(learned, cache, root / "run", device="cpu"), cache


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Noise: nothing about it is easy to resize."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_input(*images: npt.NDArray[np.uint8]) -> Any:
    """RGB uint8 images of one size as an ONNX file takes them: float32 `(N, 3, H, W)` in [0, 1]."""
    return np.stack([image.transpose(2, 0, 1) for image in images]).astype(np.float32) / np.float32(255)
