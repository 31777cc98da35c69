"""How a run was made, in lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcd.cache import Cache
from pcd.stages.runs import Run


def facts_of(run: Run, cache: Cache, document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Heading and value of each fact: data, views, encoder and weights, head, training, versions."""
    info, recipe = run.info, run.recipe
    plan = run.plan
    tables = ", ".join(f"{name} {table.samples}" for name, table in cache.manifest.tables.items())
    parameters = sum(value.numel() for value in run.new_head().parameters())
    dataset = info["dataset"]
    facts = [
        ("run", str(run.root)),
        ("data", f"{dataset['name']}, {_range(dataset['depth_range'])}; samples: {tables}"),
        ("scored on", f"{document['split']} of {document['cache']}: {_scored(document)}"),
        ("views", f"canvas {_size(plan.canvas)}, {plan.tiles} tile(s), {'with' if plan.flips else 'without'} mirrored views"),
        *(("encoder", line) for line in encoder_lines(run)),
        ("head", f"{recipe.head['name']}, {parameters:,} parameters, {_grids(run)}"),
        ("training", "not known: an exported bundle" if run.bundle else _training(run.history)),
        ("weights scored", f"epoch {document['epoch']}, best for {document['checkpoint']}; sha256 {document['weights'][:16]}"),
        ("seed", str(recipe.train.seed)),
        ("made with", f"pcd {info['pcd']}, torch {info['torch']}, Python {info['python']}"),
    ]
    return [*facts, *(("note", label) for label in run.labels)]


def encoder_lines(run: Run) -> list[str]:
    """One line per encoder: model, precision, and which weights."""
    found: dict[str, None] = {}
    for column in run.info["columns"].values():
        encoder = column.get("encoder")
        if encoder:
            weights = encoder["weights"]
            digest = f" sha256 {weights['digest'][:16]}" if weights.get("digest") else ""
            name = f"{encoder['encoder']} {encoder.get('model', '')}".strip()
            found[f"{name}, {encoder['precision']}, weights: {weights['kind']}{digest}"] = None
    return list(found)


def _grids(run: Run) -> str:
    decoded = "" if run.grid == run.patches else f", depth on {_size(run.grid)}"
    return f"grid {_size(run.patches)} patches per view{decoded}"


def _range(depth_range: list[float]) -> str:
    return f"{depth_range[0]:g} to {depth_range[1]:g} m"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _scored(document: Mapping[str, Any]) -> str:
    skipped = f", {document['skipped']} skipped in extraction" if document["skipped"] else ""
    return f"{document['samples']} samples{skipped}"


def _training(history: list[dict[str, Any]]) -> str:
    seconds = sum(epoch["seconds"] for epoch in history)
    if not history[-1]["step"]:
        return "nothing to train"
    return f"{len(history)} epochs, {history[-1]['step']} steps, {seconds / 60:.1f} min"
