"""Work that runs ahead of and behind the encoder, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(function: Callable[[A], B], items: Iterable[A], threads: int, depth: int) -> Generator[B]:
    """`map(function, items)` in order, computed by `threads` up to `depth` items ahead of the consumer.

    An error is raised where its item's turn comes.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pcd-decode")
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Behind:
    """Runs calls one after the other in a thread; at most `depth` wait, then `put` waits too.

    A context manager: leaving it normally waits for the last call; the first error is raised at the next `put` or at the end.
    """

    def __init__(self, depth: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pcd-write")
        self._waiting: deque[Future[None]] = deque()
        self._depth = depth

    def put(self, call: Callable[[], None]) -> None:
        """Run `call` after those put before it."""
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call))

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
