"""Which runs of a sweep go to a worker together."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pcd.errors import CorruptError
from pcd.stages.cluster_check import Place
from pcd.stages.cluster_task import Task
from pcd.stages.sweep_plan import SweepPlan, Variant
from pcd.stages.together import Scoring, row_order, run_folder
from pcd.training import checkpoints
from pcd.training.loop import epochs_left

KEY = "pcd-sweep"
"""How the names of tasks begin; a scheduler's dashboard shows it."""

T = TypeVar("T")


def spread(groups: Iterable[Sequence[T]], workers: int) -> list[list[T]]:
    """Cut groups into tasks, the largest first, so that the workers end together if every member takes as long.

    As few cuts as that takes: the members of a group share what they read.
    """
    tasks = [list(group) for group in groups if group]
    total = sum(map(len, tasks))
    while tasks:
        tasks.sort(key=len, reverse=True)
        ends = [0] * workers
        for task in tasks:  # each goes to whoever is free first
            heapq.heapreplace(ends, ends[0] + len(task))
        if len(tasks) >= min(workers, total) and max(ends) <= -(-total // workers):
            break
        largest = tasks.pop(0)
        half = -(-len(largest) // 2)
        tasks += [largest[:half], largest[half:]]
    return tasks


def plan_tasks(plan: SweepPlan, place: Place, scoring: Scoring, device: str, workers: int) -> list[Task]:
    """The tasks of a sweep for so many workers; runs that only need scoring come last."""
    todo: dict[tuple[Any, ...], list[Variant]] = {}
    for seed in plan.seeds:
        for variant in plan.variants:
            left = _epochs_left(variant, run_folder(Path(place.root), variant.name, seed))
            todo.setdefault((left == 0, seed, row_order(variant.recipe)), []).append(variant)
    found = []
    for finished in (False, True):
        groups = [[(seed, each) for each in group] for (done, seed, _), group in todo.items() if done is finished]
        found += spread(groups, workers)
    return [
        Task(
            name=f"{KEY}-{place.token}-{number}",
            seed=members[0][0],
            recipes={variant.name: variant.recipe.model_dump() for _, variant in members},
            place=place,
            scoring=scoring,
            device=device,
            epochs=sum(_epochs_left(each, run_folder(Path(place.root), each.name, seed)) for seed, each in members),
        )
        for number, members in enumerate(found)
    ]


def _epochs_left(variant: Variant, folder: Path) -> int:
    """Epochs that a run may still take; 0 for a finished one."""
    path, train = folder / checkpoints.FOLDER / checkpoints.LAST, variant.recipe.train
    if not path.is_file():
        return train.epochs
    try:
        state = checkpoints.read_state(path)
    except CorruptError:  # the worker will say so
        return train.epochs
    return epochs_left(train, state)
