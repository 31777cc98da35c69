# mypy: untyped-calls-exclude="distributed"
"""A sweep spread over the workers of a running dask.distributed scheduler.

A task is one seed of some variants that train side by side. As many tasks are out as there are workers, the next is handed out
when one is done, and this process reads nothing but what the workers have written. Tasks of a worker that dies are done again
elsewhere by the scheduler; the runs go on from their last epoch. Only `sweep` imports this module, when it is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from distributed import Client, Future, KilledWorker, Security, as_completed, rpc

from pcd.cache import Cache
from pcd.errors import RunError, UsageError
from pcd.files import write_text
from pcd.fingerprint import file_digest
from pcd.progress import Progress
from pcd.stages.cluster_check import MANIFEST, TOKEN, Place, examine, versions
from pcd.stages.cluster_plan import KEY, plan_tasks
from pcd.stages.cluster_task import Outcome, Task, run_task
from pcd.stages.evaluate import METRICS_FILE
from pcd.stages.run_lock import writing
from pcd.stages.sweep_plan import SweepPlan
from pcd.stages.together import SCORES_FILE, Failures, Scoring

CONNECT = 5.0
"""Seconds in which a scheduler must answer, and have a worker."""
LOOK_AGAIN = 3
"""How often, a second apart, workers are asked for files that they do not see: a network file system may show them late."""
APPEAR = 90
"""Seconds in which what a worker has written must appear here."""
PAUSE = 0.2
"""Seconds between two looks at what is done and who is free."""

Evaluations = dict[tuple[str, int], Path]
"""Folder of the evaluation by variant and seed."""


def sweep_on_workers(
    address: str,
    plan: SweepPlan,
    cache: Cache,
    root: Path,
    scoring: Scoring,
    device: str,
    progress: Progress,
    failures: Failures,
) -> Evaluations:
    """Train and score all runs of `plan` on the workers of the scheduler at `address`; what did not fail.

    Raises `UsageError` if there is no scheduler, no worker, or one with other versions or without the cache or the folder;
    `RunError` if the scheduler goes away or somebody else is at work in `root`.
    """
    with connected(address) as client, _claimed(root) as token:
        place = Place(
            cache=str(cache.root.absolute()),
            manifest=file_digest(cache.root / MANIFEST),
            root=str(root.absolute()),
            token=token,
            versions=versions(),
        )
        workers = checked_workers(client, address, place)
        tasks = plan_tasks(plan, place, scoring, device, workers)
        number, epochs = len(plan.seeds), sum(variant.recipe.train.epochs for variant in plan.variants)
        progress.say(f"{len(plan.variants) * number} runs in {len(tasks)} tasks on {workers} workers of {address}")
        return _Dispatch(client, address, root, progress, failures).run(tasks, epochs * number)


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler at `address`. Raises `UsageError` if there is none."""
    logger = logging.getLogger("distributed")
    with ExitStack() as stack:
        for name in ("client", "core", "utils"):  # they log tracebacks of what is said here in one line
            part = logger.getChild(name)
            stack.callback(part.setLevel, part.level)
            part.setLevel(logging.CRITICAL)
        yield stack.enter_context(_client(address))


def _client(address: str) -> Client:
    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has a loop already
            found = thread.submit(asyncio.run, _kind(address)).result()
        if found == "Scheduler":
            return Client(address, timeout=CONNECT, set_as_default=False, name=KEY)
        reason = f"but a {found}"
    except (OSError, ValueError) as error:
        reason = str(error) or "nothing that speaks dask's protocol"
    raise UsageError(
        f"--dask {address}: no scheduler answers there ({reason}). Start one with `dask scheduler`, workers with "
        "`dask worker tcp://HOST:8786`, and give the address that the scheduler prints."
    )


async def _kind(address: str) -> str:
    """`Scheduler` or `Worker`. A client would wait for ever for an answer from what is neither."""
    async with asyncio.timeout(CONNECT):
        server = rpc(address, timeout=CONNECT, connection_args=Security().get_connection_args("client"))
        try:
            answer: dict[str, str] = await server.identity()
        finally:
            await server.close_rpc()
    return answer["type"]


@contextmanager
def _claimed(root: Path) -> Iterator[str]:
    """Nobody else sweeps in `root` meanwhile; gives the word by which workers recognise the folder."""

    def occupied(holder: str) -> None:
        raise RunError(f"{root}: another sweep is at work there ({holder}); wait for it to end, or give another --out.")

    with writing(root, occupied):
        token = secrets.token_hex(8)
        write_text(root / TOKEN, token)
        try:
            yield token
        finally:
            (root / TOKEN).unlink(missing_ok=True)


def checked_workers(client: Client, address: str, place: Place) -> int:
    """The number of workers. Raises `UsageError` if there are none, or some cannot take part."""
    deadline = time.monotonic() + CONNECT
    while not client.nthreads() and time.monotonic() < deadline:
        time.sleep(PAUSE)
    for attempt in range(LOOK_AGAIN):
        answers: dict[str, Any] = client.run(examine, place, on_error="return")
        lines = [line for worker, answer in sorted(answers.items()) if (line := _trouble(worker, answer))]
        if not lines:
            break
        if attempt + 1 < LOOK_AGAIN:
            time.sleep(1)
    if not answers:
        raise UsageError(f"--dask {address}: the scheduler has no workers; start some with `dask worker {address}`.")
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise UsageError(
            f"--dask {address}: {len(lines)} of {len(answers)} workers cannot take part:\n{shown}\n"
            f"Workers need the same pcd and torch as this machine, and must see {place.needs} under the same paths."
        )
    return len(answers)


def _trouble(worker: str, answer: Any) -> str:
    """What is wrong with a worker, by what it answered; an exception means that it could not even be asked."""
    if isinstance(answer, BaseException):
        return f"worker {worker} could not be asked; has it another pcd, or none? {type(answer).__name__}: {answer}"
    return f"worker {worker} on host {answer['host']} {answer['problem']}" if answer["problem"] else ""


class _Dispatch:
    """Hands out a task for each worker, and takes what they return."""

    def __init__(self, client: Client, address: str, root: Path, progress: Progress, failures: Failures) -> None:
        self._client = client
        self._address = address
        self._root = root
        self._progress = progress
        self._failures = failures
        self._busy: dict[Future[Outcome], Task] = {}
        self._done = as_completed(loop=client.loop)
        self._found: Evaluations = {}
        self._ended = 0

    def run(self, tasks: Sequence[Task], epochs: int) -> Evaluations:
        """All tasks to their end; `epochs` are those of all runs. However it ends, no task goes on that nobody waits for."""
        self._runs = sum(len(task.recipes) for task in tasks)
        self._bar = Bar(self._progress, {task.name: task.epochs for task in tasks})
        waiting, topic = deque(tasks), f"{KEY}-{tasks[0].place.token}"
        self._client.subscribe_topic(topic, self._hear)
        self._progress.start("training", epochs, "epochs", done=epochs - sum(task.epochs for task in tasks))
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._workers():
                    self._hand_out(waiting.popleft(), topic)
                time.sleep(PAUSE)
                for future in self._done.next_batch(block=False):
                    self._take(future)
        finally:
            self._client.cancel(list(self._busy), force=True)
            self._progress.stop()
        return self._found

    def _workers(self) -> int:
        """How many there are now: some may have come later."""
        try:
            return len(self._client.nthreads())
        except OSError:
            raise self._gone() from None

    def _hand_out(self, task: Task, topic: str) -> None:
        """The scheduler chooses the worker, and another one if that dies."""
        future = self._client.submit(run_task, task, topic, key=task.name)
        self._busy[future] = task
        self._done.add(future)

    def _take(self, future: Future[Outcome]) -> None:
        """Record what became of a task. Raises what ended it if that was no fault of one run."""
        if future.cancelled():
            raise self._gone()
        task = self._busy.pop(future)
        self._bar.finished(task.name)
        self._ended += len(task.recipes)
        error = future.exception()
        if isinstance(error, KilledWorker):
            message = (
                f"the workers that trained it died, {error.allowed_failures + 1} of them, the last was "
                f"{error.last_worker.address}; their logs may say why (memory?). The same command tries again."
            )
            for name in task.recipes:
                self._failures.take({"variant": name, "seed": task.seed, "error": "KilledWorker", "message": message})
        elif error is not None:
            raise error
        else:
            self._record(task, future.result())

    def _record(self, task: Task, outcome: Outcome) -> None:
        for failure in outcome.failures:
            self._failures.take(failure)
        for name, folder in outcome.evaluations.items():
            own = self._root / Path(folder).relative_to(task.place.root)
            for file in (METRICS_FILE, SCORES_FILE):
                _await(own / file, outcome.where)
            self._found[name, task.seed] = own
        names = ", ".join(outcome.evaluations) or "nothing"
        self._progress.say(f"[{self._ended}/{self._runs}] seed {task.seed}: {names} done by {outcome.where}")

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """News from a worker, in a thread of the client's own."""
        news = event[1]
        if "say" in news:
            self._progress.say(news["say"])
        else:
            self._bar.advance(news["task"], news["epochs"])

    def _gone(self) -> RunError:
        return RunError(
            f"the scheduler at {self._address} is no longer there. Finished epochs are kept; when it is back, the same command "
            "continues."
        )


class Bar:
    """Units of all tasks. News of them come from another thread, and may come late, twice or not at all."""

    def __init__(self, progress: Progress, left: dict[str, int]) -> None:
        """`left` is how many units each task has."""
        self._progress = progress
        self._left = left
        self._lock = Lock()

    def advance(self, task: str, number: int) -> None:
        """A task has done so many more."""
        with self._lock:
            number = min(number, self._left.get(task, 0))
            if number:
                self._left[task] -= number
                self._progress.advance(number)

    def finished(self, task: str) -> None:
        """A task does no more: its patience may have run out."""
        with self._lock:
            self._progress.advance(self._left.pop(task, 0))


def _await(path: Path, where: str) -> None:
    """Wait for a file that a worker has written; a network file system may show it late. Raises `RunError`."""
    deadline = time.monotonic() + APPEAR
    while not path.is_file():
        if time.monotonic() > deadline:
            raise RunError(f"{where} has written {path}, which is not here: --out must be on a file system that all share.")
        time.sleep(1)
        if path.parent.is_dir():
            os.listdir(path.parent)  # noqa: PTH208  makes it look again
