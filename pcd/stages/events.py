"""A training as TensorBoard shows it: event files in the run's folder, written with tensorboardX.

tensorboardX is the optional extra `tensorboard`; nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pcd.errors import UsageError
from pcd.stages.runs import Run

FOLDER = "tensorboard"
"""Where the event files lie in a run: `tensorboard --logdir RUN/tensorboard`, or of a folder above."""

Entry = Mapping[str, Any]


def require_tensorboard() -> None:
    """Raise `UsageError` if the extra `tensorboard` is not installed, naming the command that installs it."""
    try:
        importlib.import_module("tensorboardX")
    except ModuleNotFoundError as error:
        raise UsageError(
            f'--tensorboard needs the package {error.name}, which is not installed: pip install "pcd-depth[tensorboard]". '
            "history.csv and curves.png in the run show the same."
        ) from None


class EventWriter:
    """Writes losses, validation metrics, learning rates and speed of each epoch as scalars; the step is the epoch.

    It begins with all epochs of `history`, in the place of event files of an earlier start, so that no step is there twice and
    none is missing, however often training was interrupted. Everything is on disk after each epoch. Use it in a `with`.
    """

    def __init__(self, run: Run, history: Sequence[Entry]) -> None:
        """`history` is what was trained before now. Raises `UsageError` without tensorboardX."""
        require_tensorboard()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder = run.root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in event_files(run.root):
            earlier.unlink()
        self._description = "; ".join((f"validation: {run.recipe.train.protocol}", *run.labels))
        self._described: set[str] = set()
        self._writer = EventsWriter(str(folder / "events"))
        # A TensorBoard that looks on has the deleted files in memory: this makes it forget their steps.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=1, session_log=start))
        at = time.time() - sum(entry["seconds"] for entry in history)
        for entry in history:
            at += entry["seconds"]
            self._write(entry, at)
        self._writer.flush()

    def write(self, entry: Entry) -> None:
        """Add an epoch that has just ended (`loop.history[-1]`)."""
        self._write(entry, time.time())
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _write(self, entry: Entry, at: float) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        values = []
        for tag, number in scalars(entry):
            value = summary_pb2.Summary.Value(tag=tag, simple_value=number)
            if tag not in self._described:  # TensorBoard keeps the description that comes first
                value.metadata.summary_description = self._description
                self._described.add(tag)
            values.append(value)
        self._writer.write_event(event_pb2.Event(wall_time=at, step=entry["epoch"], summary=summary_pb2.Summary(value=values)))


def scalars(entry: Entry) -> Iterator[tuple[str, float]]:
    """Tag and value of everything an epoch has; what is absent or not finite is left out."""
    groups = {
        "loss": entry["losses"],
        "validation": entry["metrics"],
        "rate": entry.get("rates", {}),
        "speed": {name: entry.get(name) for name in ("rows_per_second", "seconds", "validation_seconds")},
    }
    for group, found in groups.items():
        for name, value in sorted(found.items()):
            if value is not None and math.isfinite(value):
                yield f"{group}/{name}", float(value)


def event_files(root: Path) -> list[Path]:
    """The event files of the run in `root`."""
    return sorted((root / FOLDER).glob("events.out.tfevents.*"))
