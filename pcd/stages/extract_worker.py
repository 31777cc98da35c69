# mypy: untyped-calls-exclude="distributed"
"""The part of an extraction that runs in a worker process: one shard range after the other."""

from __future__ import annotations

import os
import platform
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from distributed import Reschedule, Worker, WorkerPlugin, get_worker

from pcd.device import resolve_device
from pcd.errors import PcdError
from pcd.stages.cluster_task import TURN, Wanted, threads
from pcd.stages.shard_task import Job, Kit, Outcome, ShardTask, kept_kit, run_task

TELL = 0.5
"""Seconds between two reports of a task."""

_TURN = threading.Lock()
"""One task at a time in a process, however many threads the worker has: there is one encoder."""


@dataclass(frozen=True)
class Local:
    """What a worker must know that was started by the extraction itself: how many threads compute."""

    threads: int


class Quiet(WorkerPlugin):
    """Sends what a worker process prints into a file of its own, from which the extraction takes it.

    Else it would be written across the progress bar.
    """

    name = "pcd-quiet"

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def setup(self, worker: Worker) -> None:
        """Standard output and error of this process, for good."""
        path = Path(self._folder) / f"{worker.name}-{os.getpid()}.log"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.close(descriptor)


def do_task(job: Job, task: ShardTask, topic: str, local: Local | None) -> Outcome:
    """Write a shard range in this worker, which reports samples under `topic`.

    Computed with as many threads as the worker has, or as `local` says. If it is no longer wanted here (the extraction was
    stopped, the worker is closing) it ends after a batch and leaves nothing. Raises what `run_task` raises.
    """
    worker = get_worker()
    wanted = Wanted(worker, str(worker.get_current_task()))
    news = _News(worker, topic, task)
    if not _TURN.acquire(timeout=TURN):
        raise Reschedule  # a worker with several threads was given several tasks; another may be free
    try:
        with threads(local.threads if local else worker.state.nthreads):
            kit = _kit(replace(job, device=device_of(job.device, int(worker.name))) if local else job)
            here = f"worker {worker.address} on host {platform.node()}"
            if isinstance(kit, str):
                return Outcome(where=here, problem=f"{here}: {kit}")
            return replace(run_task(kit, task, news.advance, news.say, wanted), where=here)
    finally:
        _TURN.release()


def _kit(job: Job) -> Kit | str:
    """Dataset and encoder, or what keeps them from being made: then no shard can be written here, whichever it is."""
    try:
        return kept_kit(job)
    except (PcdError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def device_of(device: str, number: int) -> str:
    """The device of worker `number` of this machine: GPUs are dealt out in turn unless one is named."""
    import torch

    resolved = resolve_device(device)
    return f"cuda:{number % torch.cuda.device_count()}" if resolved == "cuda" else resolved


class _News:
    """Tells the extraction of samples that are done, now and then."""

    def __init__(self, worker: Worker, topic: str, task: ShardTask) -> None:
        self._worker = worker
        self._topic = topic
        self._task = task
        self._held = 0
        self._told = time.monotonic()

    def say(self, text: str) -> None:
        """A line for whoever waits for the extraction."""
        self._worker.log_event(self._topic, {"say": text})

    def advance(self, number: int) -> None:
        """So many samples more; what is not told at the end is known from the task's own end."""
        self._held += number
        if time.monotonic() - self._told > TELL:
            self._worker.log_event(self._topic, {"task": self._task.name, "samples": self._held})
            self._held, self._told = 0, time.monotonic()
