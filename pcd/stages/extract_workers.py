# mypy: untyped-calls-exclude="distributed"
"""An extraction by several processes: workers started here, or those of a running dask.distributed scheduler.

Shards of a worker that dies are done again elsewhere. One that fails again and again, or kills its workers, is reported, and
the others are written all the same. Only `extract` imports this module, when it is needed.
"""

from __future__ import annotations

import logging
import queue
import secrets
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.utils import LoopRunner

from pcd.cache import Cache
from pcd.cache.lock import LOCK
from pcd.errors import RunError
from pcd.files import write_text
from pcd.progress import Progress
from pcd.remote import AnyPath, any_path
from pcd.stages.cluster import APPEAR, Bar, checked_workers, connected
from pcd.stages.cluster_check import Place, versions
from pcd.stages.extract_worker import Local, Quiet, do_task
from pcd.stages.shard_results import Failure, Results
from pcd.stages.shard_task import Job, Outcome, ShardTask, forget, open_tasks

KEY = "pcd-extract"
"""How the names of tasks begin; a scheduler's dashboard shows it."""
TRIES = 3
"""How often a shard that fails is tried; the others come first."""
DEATHS = 1
"""Deaths of workers that a shard may see before it is tried once more with no other shard beside it that could be the cause."""
AHEAD = 2
"""Shards handed out per worker: the next one waits where it will be written."""
IN_A_ROW = 10
"""After so many failures, and three per worker, without a single success there is no point in going on."""
PAUSE = 0.2
"""Seconds between two looks at who is there and what was logged."""
PATIENCE = 60.0
"""Seconds after which workers of this machine that have died and do not come back are given up."""


def run_on_workers(
    job: Job, tasks: list[ShardTask], results: Results, progress: Progress, *, workers: int, address: str | None
) -> None:
    """Have the tasks done by so many processes here, or by the workers of the scheduler at `address`; fills `results`.

    Raises `UsageError` if there is no scheduler, no worker, or one with other versions or without the cache's folder, and
    `RunError` if all workers are gone, or one cannot make the dataset or the encoder.
    """
    if address is None:
        with _local_workers(min(workers, len(tasks))) as (client, logs):
            local = Local(threads=max(1, CPU_COUNT // workers))
            _Dispatch(client, job, local, results, progress, logs=logs).run(tasks)
        return
    root = any_path(job.cache)
    with connected(address) as client, _token(root) as place:
        number = checked_workers(client, address, place(job))
        progress.say(f"{len(tasks)} shards for {number} workers of {address}")
        try:
            _Dispatch(client, job, None, results, progress, address=address).run(tasks)
        finally:
            _free(client)
        _await(root, tasks, results, address)


@contextmanager
def _token(root: AnyPath) -> Iterator[Any]:
    """A file by which workers tell that the folder they see is this one; gives what makes their `Place`."""
    token, file = secrets.token_hex(8), f"{LOCK}.workers"
    write_text(root / file, token)

    def place(job: Job) -> Place:
        words = {"work": "extraction", "needs": "--cache and the dataset", "file": file}
        return Place(job.cache, job.manifest, job.cache, token, versions(), **words)

    try:
        yield place
    finally:
        (root / file).unlink(missing_ok=True)


@contextmanager
def _local_workers(number: int) -> Iterator[tuple[Client, _Logs]]:
    """Processes on this machine, restarted when they die, and what they print."""
    settings = {"distributed.scheduler.allowed-failures": DEATHS}
    options: dict[str, Any] = {"threads_per_worker": 1, "processes": True, "memory_limit": 0}
    options["dashboard_address"] = "127.0.0.1:0"  # None would be the usual port, which another extraction may have
    scratch = tempfile.TemporaryDirectory(prefix="pcd-workers-", ignore_cleanup_errors=True)
    with scratch as folder, dask.config.set(settings), _deaf_loop() as loop:
        try:
            cluster = LocalCluster(
                n_workers=number, silence_logs=logging.CRITICAL, loop=loop, local_directory=folder, host="127.0.0.1", **options
            )
        except (OSError, RuntimeError) as error:
            raise RunError(f"--workers {number}: worker processes cannot be started here ({error}).") from error
        with cluster, Client(cluster, set_as_default=False) as client:
            logs = _Logs(Path(folder))
            client.register_plugin(Quiet(folder))
            yield client, logs


@contextmanager
def _deaf_loop() -> Iterator[Any]:
    """An event loop in a thread that leaves Ctrl-C to the main thread, as do all threads and processes started from it.

    A terminal sends Ctrl-C to all processes: workers must not die of it while the main thread is about to stop them.
    """
    runner = LoopRunner()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()


class _Logs:
    """What workers print, line by line as it comes; see `Quiet`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: Counter[Path] = Counter()

    def news(self) -> Iterator[str]:
        """Whole lines that came since the last call."""
        for file in sorted(self._folder.glob("*.log")):
            with file.open("rb") as handle:
                handle.seek(self._read[file])
                data = handle.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read[file] += len(data)
            for line in data.decode(errors="replace").splitlines():
                if line.strip():
                    yield f"worker {file.stem.partition('-')[0]}: {line.rstrip()}"


class _Dispatch:
    """Hands out tasks, a few for each worker, and takes what they return."""

    def __init__(
        self,
        client: Client,
        job: Job,
        local: Local | None,
        results: Results,
        progress: Progress,
        *,
        logs: _Logs | None = None,
        address: str = "",
    ) -> None:
        self._client = client
        self._job = job
        self._local = local
        self._results = results
        self._progress = progress
        self._logs = logs
        self._where = address or "this machine"
        self._topic = f"{KEY}-{secrets.token_hex(4)}"
        self._ended: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        self._busy: dict[str, tuple[Future[Outcome], ShardTask]] = {}
        self._waiting: deque[ShardTask] = deque()
        self._tries: Counter[ShardTask] = Counter()
        self._suspects: list[ShardTask] = []
        self._alone = False
        self._in_a_row = 0
        self._seen = (0, time.monotonic())
        self._missed = 0.0

    def run(self, tasks: Iterable[ShardTask]) -> None:
        """All tasks to their end. However it ends, no task goes on that nobody waits for."""
        tasks = list(tasks)
        self._bar = Bar(self._progress, {task.name: task.samples for task in tasks})
        self._client.subscribe_topic(self._topic, self._hear)
        try:
            self._do(tasks)
            self._alone = True
            for task in sorted(self._suspects, key=str):
                self._do([task])
        finally:
            self._client.cancel([future for future, _ in self._busy.values()], force=True)
            self._tell_logs()

    def _do(self, tasks: Iterable[ShardTask]) -> None:
        self._waiting.extend(tasks)
        while (self._waiting and not self._results.given_up) or self._busy:
            while self._waiting and not self._results.given_up and len(self._busy) < self._room():
                self._hand_out(self._waiting.popleft())
            self._tell_logs()
            try:
                self._take(self._ended.get(timeout=PAUSE))
            except queue.Empty:
                self._room()

    def _room(self) -> int:
        """How many tasks may be out now. Raises `RunError` if there are no workers any more."""
        number, asked = self._seen
        if time.monotonic() - asked > PAUSE or not number:
            try:
                number = len(self._client.nthreads())
            except OSError:
                raise self._gone() from None
            self._seen = (number, time.monotonic())
            self._miss(number)
        return 1 if self._alone else AHEAD * max(number, 1)

    def _miss(self, number: int) -> None:
        """Say that no worker is left, and give up if that is this machine's fault."""
        now = time.monotonic()
        if number:
            self._missed = 0.0
        elif not self._missed:
            self._missed = now
            if self._local is None:
                self._progress.say(f"the scheduler at {self._where} has no workers any more; waiting for some to come")
        elif self._local is not None and now - self._missed > PATIENCE:
            raise RunError("all worker processes have died and do not come back; what was committed is kept.")

    def _hand_out(self, task: ShardTask) -> None:
        """The scheduler chooses the worker, and another one if that dies."""
        key = f"{self._topic}-{task.name}-{self._tries[task]}" + "-alone" * self._alone
        future = self._client.submit(do_task, self._job, task, self._topic, self._local, key=key, pure=False)
        self._busy[key] = (future, task)
        future.add_done_callback(self._ended.put)

    def _take(self, future: Future[Outcome]) -> None:
        """Note what became of a task. Raises what ended it if that was no fault of its shard."""
        if future.key not in self._busy:
            return
        _, task = self._busy.pop(future.key)
        if future.cancelled():
            raise self._gone()
        error = future.exception()
        if isinstance(error, KilledWorker):
            self._killed(task, error)
        elif error is not None:
            self._failed(task, error)
        else:
            outcome = future.result()
            if outcome.problem:
                raise RunError(outcome.problem)
            self._in_a_row = 0
            self._results.take(task, outcome)
            self._bar.finished(task.name)

    def _killed(self, task: ShardTask, error: KilledWorker) -> None:
        """It, or another one beside it, has killed workers: who it was shows when it is alone."""
        if not self._alone:
            self._suspects.append(task)
            return
        self._fail(
            task,
            f"{error.allowed_failures + 1} workers that had nothing else to do died while they wrote it, the last was "
            f"{error.last_worker.address}; was there too little memory, or does a library crash on one of these frames?",
        )

    def _failed(self, task: ShardTask, error: BaseException) -> None:
        self._tries[task] += 1
        self._in_a_row += 1
        reason = f"{type(error).__name__}: {error}"
        if self._tries[task] < TRIES:
            self._progress.say(f"{task}: {reason} (to be tried again)")
            self._waiting.append(task)
        else:
            self._fail(task, f"{reason} ({TRIES} tries)")
        if self._in_a_row >= max(IN_A_ROW, 3 * self._seen[0]) and not self._results.given_up:
            known = {failure.task for failure in self._results.failures}
            if task not in known:
                self._fail(task, reason)
            self._results.given_up = f"After {self._in_a_row} failures in a row the others were not tried any more."

    def _fail(self, task: ShardTask, reason: str) -> None:
        self._results.failures.append(Failure(task, reason))
        self._progress.say(f"{task} cannot be written: {reason}")
        self._bar.finished(task.name)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """News from a worker, in a thread of the client's own."""
        news = event[1]
        if "say" in news:
            self._progress.say(news["say"])
        else:
            self._bar.advance(news["task"], news["samples"])

    def _tell_logs(self) -> None:
        for line in self._logs.news() if self._logs else ():
            self._progress.say(line)

    def _gone(self) -> RunError:
        return RunError(
            f"the scheduler at {self._where} is no longer there. What was committed is kept; when it is back, the same command "
            "continues."
        )


def _free(client: Client) -> None:
    """Have the workers give up their encoders: they go on to live."""
    try:
        client.run(forget, on_error="ignore")
    except OSError:
        return  # the scheduler is gone, or some worker is


def _await(root: AnyPath, tasks: list[ShardTask], results: Results, address: str) -> None:
    """Wait for the commit records of what was written; a network file system may show them late. Raises `RunError`."""
    failed = {failure.task for failure in results.failures}
    todo = [task for task in tasks if task not in failed] if not results.given_up else []
    deadline = time.monotonic() + APPEAR
    while missing := open_tasks(Cache.open(root), todo):
        if time.monotonic() > deadline:
            raise RunError(f"a worker of {address} has written {missing[0]}, which is not here: {root} must be shared by all.")
        time.sleep(1)
