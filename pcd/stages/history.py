"""What a person finds of a training in the run's folder: a table of its epochs, and a picture of its curves.

The truth is the history inside `checkpoints/last.safetensors` (`Run.history`); the files here are views of it, written whole
after each epoch and made anew by the next one if they are lost. Epochs trained by an earlier pcd have neither learning rates
nor seconds of validation: their cells are empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pcd.evaluation.metrics import METRICS
from pcd.evaluation.tables import write_csv
from pcd.files import plain, write_text
from pcd.stages.events import EventWriter
from pcd.stages.facts import encoder_lines
from pcd.stages.runs import Run

HISTORY_FILE = "history.jsonl"
"""One JSON object per epoch."""
TABLE_FILE = "history.csv"
"""The same as a flat table."""
CURVES = "curves"
"""Name of the picture, without `.png` and `.svg`."""

Entry = Mapping[str, Any]
"""An epoch: the fields of `pcd.training.loop.EpochReport`."""

_FIELDS = ("epoch", "step", "seconds", "validation_seconds", "rows_per_second", "factor", "wait", "improved")
_TABLES = {"rates": "rate_", "losses": "", "metrics": "val_"}
"""Fields that hold several numbers by name, and what the CSV puts before the name."""


@contextmanager
def recording(run: Run, history: Sequence[Entry], *, tensorboard: bool = False) -> Iterator[Callable[[], None]]:
    """While a training goes on: what it gives is called after each epoch and brings the run's files up to `history`.

    `history` is the list that the training appends to, resumed already. The curves are drawn at the end, also that of a
    training that failed or was interrupted. Raises `UsageError` if events are wanted and tensorboardX is not there.
    """
    with ExitStack() as stack:
        events = stack.enter_context(EventWriter(run, history)) if tensorboard else None
        stack.callback(draw_curves, run, history)

        def record() -> None:
            write_history(run.root, history)
            if events is not None:
                events.write(history[-1])

        yield record


def write_history(root: Path, history: Sequence[Entry]) -> None:
    """Write `history.jsonl` and `history.csv` of the run in `root`; a crash leaves the old or the new file, whole.

    What is not finite is null in the first; NaN, and a loss that an epoch did not compute, is an empty cell in the second.
    The order of keys and columns follows from their names alone: not from which phase came first, nor from interruptions.
    """
    lines = [json.dumps(plain(_ordered(entry)), allow_nan=False) for entry in history]
    write_text(root / HISTORY_FILE, "".join(f"{line}\n" for line in lines))
    columns = _columns(history)
    write_csv(root / TABLE_FILE, [dict.fromkeys(columns) | _row(entry) for entry in history], columns)


def draw_curves(run: Run, history: Sequence[Entry]) -> tuple[Path, ...]:
    """Draw `curves.png` and `curves.svg` of the run; returns their paths, none if no epoch is done."""
    if not history:
        return ()
    from pcd.reports.curves import curves
    from pcd.reports.drawing import save

    return save(curves(history, curves_title(run, history)), run.root / CURVES)


def curves_title(run: Run, history: Sequence[Entry]) -> str:
    """Two lines: run, data and encoder; then how far training went, the protocol of validation, and the run's labels."""
    done, settings = history[-1]["epoch"], run.recipe.train
    encoders = " and ".join(line.partition(",")[0] for line in encoder_lines(run))
    trained = f"epoch {done} of at most {settings.epochs}" if history[-1]["step"] else "nothing to train"
    shown = f"{trained}, seed {settings.seed}, validation protocol {settings.protocol}"
    return f"{run.name}: {run.info['dataset']['name']}, {encoders}\n" + "; ".join((shown, *run.labels))


def _ordered(entry: Entry) -> dict[str, Any]:
    """An epoch with its fields in the order of the table, and after them any that a later pcd may know."""
    ordered = {name: entry.get(name) for name in _FIELDS}
    ordered |= {table: {name: found[name] for name in _names(table, found)} for table, found in _tables(entry).items()}
    return ordered | {name: entry[name] for name in sorted(entry) if name not in ordered}


def _tables(entry: Entry) -> dict[str, dict[str, float]]:
    return {table: entry.get(table, {}) for table in _TABLES}


def _names(table: str, found: Mapping[str, Any]) -> list[str]:
    """Names in their order: metrics as everywhere in pcd, everything else by the alphabet."""
    known = list(METRICS) if table == "metrics" else []
    return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))


def _columns(history: Sequence[Entry]) -> list[str]:
    columns = list(_FIELDS)
    for table, prefix in _TABLES.items():
        found = {name: None for entry in history for name in _tables(entry)[table]}
        columns += [prefix + name for name in _names(table, found)]
    return columns


def _row(entry: Entry) -> dict[str, Any]:
    row = {name: entry.get(name) for name in _FIELDS} | {"improved": " ".join(entry["improved"])}
    return row | {_TABLES[table] + name: value for table, found in _tables(entry).items() for name, value in found.items()}
