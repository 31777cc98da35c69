"""Sweeps on a toy cache: recipes of a few steps, and old-fashioned readings of what they leave."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pcd.cache import Cache
from pcd.stages.extract import extract
from pcd.stages.sweep_plan import SweepPlan, plan_sweep
from tests.test_extract import toy_recipe

SHORT = [
    *("head.table_init=random", "head.min_depth=0.1", "head.embedding.steps=2", "head.depth.steps=2"),
    *("train.epochs=3", "train.batch_size=4", 'evaluate.protocols=["eigen"]'),
]
METRICS = ("abs_rel", "rmse", "log10", "delta1", "delta2", "delta3")


def toy_cache(root: Path) -> Cache:
    """A cache of toy frames: 11 training samples, 1 to validate on, 5 to test on."""
    return extract(toy_recipe(), root / "cache", device="cpu").cache


def write_sweep(path: Path, text: str) -> str:
    """A sweep file; returns its path."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def cls_plan(cache: Cache, folder: Path, seeds: Sequence[int] = (0, 1), text: str = "") -> SweepPlan:
    """Variants `with` and `without` CLS, and what `text` adds."""
    file = folder / "toy-cls.toml"
    write_sweep(file, f"[variants.with]\n[variants.without]\nhead.cls = false\n{text}")
    return plan_sweep(cache, str(file), seeds=seeds, overrides=SHORT)


def weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint."""
    return safetensors.torch.load_file(run / "checkpoints" / "last.safetensors")


def image_scores(run: Path, protocol: str, metric: str) -> dict[str, float]:
    """A metric by image from the run's `samples.csv`, tiles averaged by hand."""
    found: dict[str, list[float]] = {}
    with (run / "evaluations" / "test-abs_rel" / "samples.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            if row["protocol"] == protocol:
                found.setdefault(row["key"], []).append(float(row[metric]))
    return {key: sum(values) / len(values) for key, values in found.items()}
