"""A few threads that all columns share for reading. `preadv` and zstd run without Python's global lock, so they overlap."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


THREADS = min(4, _cores())
"""Threads that read one batch, the caller's among them: a few saturate the memory."""
THREAD_BYTES = 1 << 21
"""Least bytes for each thread: for less, waking it costs more than it saves."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="pcd-read")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the threads and starts its own


def share(work: Callable[[int], None], tasks: int, size: int) -> None:
    """Call `work(task)` once for each of `range(tasks)`, `size` bytes in all, in this thread and, if it pays, some beside it.

    Each thread takes the next task when it is free, so one that is late (other processes have the cores) is not waited for.
    Returns when nothing is being worked on any more. Raises the `OSError` of the first task that fails, whichever thread it
    met and whichever failed earlier in time; later tasks may then not have been called.
    """
    turns = itertools.count()
    failures: dict[int, OSError] = {}

    def help_out() -> None:
        while not failures and (task := next(turns)) < tasks:  # what precedes a failed task was taken, and is finished
            try:
                work(task)
            except OSError as error:
                failures[task] = error

    helpers = [_pool().submit(help_out) for _ in range(1, min(THREADS, tasks, size // THREAD_BYTES))]
    try:
        help_out()
    finally:
        unexpected = [helper.exception() for helper in helpers if not helper.cancel()]  # waits for those that began
    for error in unexpected:
        if error is not None:
            raise error
    if failures:
        raise failures[min(failures)]
