"""The part of a sweep that runs in a worker of a cluster: some variants with one seed, trained side by side and scored."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed import Reschedule, Worker, get_worker
from distributed.core import Status

from pcd.cache import Cache
from pcd.errors import PcdError, RunError
from pcd.progress import SILENT
from pcd.recipe import Recipe
from pcd.stages.cluster_check import Place, problem
from pcd.stages.run_lock import writing
from pcd.stages.sweep_plan import Variant
from pcd.stages.together import Failures, Scoring, Together, run_folder

PAUSE = 0.5
"""Seconds between two looks at a run that somebody else is writing."""

TURN = 2.0
"""Seconds that a task waits for the one before it in the same process."""

_TURN = threading.Lock()
"""One task at a time in a process, however many threads the worker has: random numbers belong to the process."""


@dataclass(frozen=True)
class Task:
    """Variants that train side by side with one seed; plain values that can be sent."""

    name: str
    seed: int
    recipes: dict[str, dict[str, Any]]
    """Recipe by variant, as plain values."""
    place: Place
    scoring: Scoring
    device: str
    epochs: int
    """How many are left at most, over all variants."""

    @property
    def folders(self) -> list[Path]:
        """Where its runs lie."""
        return [run_folder(Path(self.place.root), name, self.seed) for name in self.recipes]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: the folders of the evaluations by variant, and the failures; see `Failures`."""

    where: str
    """The worker and its host."""
    evaluations: dict[str, str]
    failures: list[dict[str, Any]]


def run_task(task: Task, topic: str) -> Outcome:
    """Train and score the runs of a task in this worker, which reports each epoch under `topic`.

    Computed with as many threads as the worker has. If the task is no longer wanted here (the sweep was stopped, the worker is
    closing) it ends within a batch; what was learnt up to the last epoch is kept. Raises `RunError` if the worker cannot take
    part.
    """
    worker = get_worker()
    here = f"worker {worker.address} on host {platform.node()}"
    wanted = Wanted(worker, str(worker.get_current_task()))
    if reason := problem(task.place):
        raise RunError(f"{here} {reason}.")
    news = _News(worker, topic, task.name)
    try:
        with _alone(task.folders, wanted, news.tell), threads(worker.state.nthreads), Cache.open(task.place.cache) as cache:
            failures = Failures(Path(task.place.root), SILENT)
            variants = [Variant(name, (), Recipe.model_validate(recipe), {}) for name, recipe in task.recipes.items()]
            root = Path(task.place.root)
            together = Together(variants, cache, root, task.device, news, lambda report: None, check=wanted)
            evaluations = together.scored(task.seed, task.scoring, failures)
    except PcdError:
        raise
    except OSError as error:
        raise RunError(f"{here}: {error.filename or 'input/output'}: {error.strerror or error}.") from None
    return Outcome(here, {name: str(folder) for name, folder in evaluations.items()}, failures.found)


class Wanted:
    """Raises `Reschedule` when called in a task that its worker is to give up."""

    def __init__(self, worker: Worker, key: str) -> None:
        self._worker = worker
        self._key = key

    def __call__(self) -> None:
        """Raise, or do nothing."""
        task = self._worker.state.tasks.get(self._key)
        closing = self._worker.status in (Status.closing, Status.closed, Status.failed)
        if closing or task is None or task.state == "cancelled":
            raise Reschedule


class _News:
    """A `Progress` that tells the sweep of each epoch, and of nothing else."""

    def __init__(self, worker: Worker, topic: str, task: str) -> None:
        self._worker = worker
        self._topic = topic
        self._task = task
        self._epochs = False

    def tell(self, text: str) -> None:
        """A line for whoever waits for the sweep."""
        self._worker.log_event(self._topic, {"task": self._task, "say": text})

    def say(self, text: str) -> None:
        """Lines of every run on every worker would be too many."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Epochs are told, samples that are scored are not."""
        self._epochs = unit == "epochs"

    def advance(self, number: int = 1) -> None:
        """So many epochs more."""
        if self._epochs:
            self._worker.log_event(self._topic, {"task": self._task, "epochs": number})

    def stop(self) -> None:
        """The next units are others."""
        self._epochs = False


@contextmanager
def _alone(folders: list[Path], check: Callable[[], None], tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the runs for writing, once nobody else does, in a process that trains nothing else meanwhile.

    A worker that the scheduler believes to be dead may still be at work on them. They are locked in one order by all, so that
    two tasks never wait for each other.
    """
    told: set[Path] = set()

    def wait(folder: Path, holder: str) -> None:
        check()
        if folder not in told:
            tell(f"{folder} is being written by {holder}; waiting for it to end")
        told.add(folder)
        time.sleep(PAUSE)

    if not _TURN.acquire(timeout=TURN):
        raise Reschedule  # a worker with several threads was given several tasks; another may be free
    try:
        with ExitStack() as held:
            for folder in sorted(folders):
                held.enter_context(writing(folder, partial(wait, folder)))
            check()
            yield
    finally:
        _TURN.release()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
