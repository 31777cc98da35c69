"""How steady training is, and what the options of `[train]` that steady it are worth.

    python benchmarks/stability.py CACHE [--recipe folder] [--set KEY=VALUE] [--seeds 3] [--epochs 30] [--only NAME] [--out DIR]

Trains every variant with every seed on a cache and prints, as mean and standard deviation over the seeds: the best and the
last AbsRel of validation, the largest rise of it from one epoch to the next after the fifth, and AbsRel on the test table under
`eigen` of the best and of the last epoch, with nearest and with bilinear upsampling. Runs lie in `--out`; complete ones are
taken from there, so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from pcd.cache import Cache
from pcd.stages.evaluate import evaluate
from pcd.stages.recipes import training_recipe
from pcd.stages.runs import Run
from pcd.stages.train import train

WARMUP, CLIP, COSINE, EMA = "train.switch_warmup=30", "train.grad_clip=1.0", "train.decay=cosine", "train.ema=0.999"
VARIANTS: dict[str, tuple[str, ...]] = {
    "faithful": (),
    "warm-up 30": (WARMUP,),
    "clip 1": (CLIP,),
    "cosine": (COSINE,),
    "EMA": (EMA,),
    "joint": ("train.joint=true",),
    "warm-up 30, clip 1": (WARMUP, CLIP),
    "warm-up 30, EMA": (WARMUP, EMA),
    "warm-up 30, cosine, EMA": (WARMUP, COSINE, EMA),
}
UPSAMPLINGS = ("nearest", "bilinear")
SETTLED = 5
"""Epochs after which a rise counts as a swing."""


def folder(variant: str) -> str:
    """A variant's name without blanks and commas."""
    return variant.replace(",", "").replace(" ", "-")


def swing(values: Sequence[float]) -> float:
    """The largest rise between neighbouring epochs after the first `SETTLED`."""
    return max(after - before for before, after in zip(values[SETTLED - 1 :], values[SETTLED:], strict=False))


def figures(run: Run) -> list[float]:
    """The row of a run: best, last, swing, then best and last epoch on the test table by upsampling."""
    values = [epoch["metrics"]["abs_rel"] for epoch in run.history]
    row = [min(values), values[-1], swing(values)]
    names = [f"eigen[upsample={way}]" for way in UPSAMPLINGS]
    scores = [evaluate(run, protocols=names, checkpoint=which) for which in ("abs_rel", "last")]
    labels = scores[0].result["order"]
    return row + [score.metrics(label)["abs_rel"] for label in labels for score in scores]


def line(variant: str, rows: Sequence[Sequence[float]]) -> str:
    """A row of the table: mean and, with more than one seed, standard deviation of every figure."""
    cells = []
    for values in zip(*rows, strict=True):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    return f"| {variant} | {' | '.join(cells)} |"


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--recipe", default="folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="a variant; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    options = parser.parse_args()
    cache, chosen = Cache.open(options.cache), options.only or list(VARIANTS)
    rows: dict[str, list[list[float]]] = {variant: [] for variant in chosen}
    for seed in range(options.seeds):
        for variant in chosen:
            given = [*options.overrides, f"train.epochs={options.epochs}", f"train.seed={seed}", *VARIANTS[variant]]
            recipe = training_recipe(cache, options.recipe, given)
            rows[variant].append(figures(train(recipe, cache, options.out / f"{folder(variant)}-{seed}")))
            print(f"seed {seed} {line(variant, rows[variant][-1:])}", flush=True)
    machine = f"torch {torch.__version__}, {os.cpu_count()} cores {platform.machine()}"
    print(f"\n{options.cache}, recipe {options.recipe}, {options.seeds} seeds, {options.epochs} epochs, {machine}")
    heads = [f"test, {way}, {epoch}" for way in UPSAMPLINGS for epoch in ("best epoch", "last epoch")]
    print("| variant | best | last | largest rise | " + " | ".join(heads) + " |")
    print("|---" * (4 + len(heads)) + "|")
    for variant in chosen:
        print(line(variant, rows[variant]))


if __name__ == "__main__":
    main()
