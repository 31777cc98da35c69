"""The application object, what all commands share, and how errors reach a person."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

import pcd
from pcd.errors import PcdError
from pcd.files import plain

MAKE, LOOK = "Make", "Look"
INTERRUPTED = 130

errors = Console(stderr=True, highlight=False)
"""Everything but results goes to standard error, so that standard output can be read by a program."""
output = Console(highlight=False)

app = typer.Typer(
    help="Train and compare depth heads on frozen encoders, from a cache that is written once.",
    epilog="Start with: pcd demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)
cache_app = typer.Typer(
    help="Look at caches, check, mend, thin out, copy and merge them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache", rich_help_panel=LOOK)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pcd {pcd.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of pcd itself; `--debug` is read by `main` before anything can fail."""


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        """For example `3.1 samples/s`."""
        speed = task.speed or 0.0
        return Text(f"{speed:.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class Terminal:
    """A `Progress` that says lines, and draws a bar with rate and time left if a person is looking."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line on standard error, above the bar if there is one."""
        errors.print(text, markup=False, soft_wrap=True)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a bar."""
        if not errors.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
        self._bar = RichProgress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, completed=done, unit=unit)

    def advance(self, number: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._task, number)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def reporting() -> Iterator[Terminal]:
    """A `Terminal` whose bar is taken away however the work ends."""
    terminal = Terminal()
    try:
        yield terminal
    finally:
        terminal.stop()


def print_notes(labels: list[str]) -> None:
    """What must stand beside every number of a run."""
    for label in labels:
        errors.print(f"note: {label}", style="yellow", soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output; what is not a number there is null."""
    typer.echo(json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False))


def main() -> None:
    """Run the command line; errors become one message and an exit code: 2 what the user gave, 1 what failed."""
    # Threads that wait must sleep, not spin: on a machine shared with other work that nearly doubles the speed of CPU training,
    # on a quiet one it costs a sixth (benchmarks/waiting_threads.py). Whoever sets the variable decides.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except PcdError as error:
        _fail(str(error), error.exit_code, debug)
    except _Stopped:
        _fail("stopped. What was committed is kept; the same command continues from there.", INTERRUPTED, debug)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1, debug)
    except Exception as error:  # noqa: BLE001  a defect of pcd: say so instead of a traceback nobody asked for
        _fail(f"unexpected {type(error).__name__}: {error}\nThis is a defect of pcd; `pcd --debug ...` shows where.", 1, debug)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; not a `KeyboardInterrupt`, which the command parser would answer before we can."""


def _stop(*_: object) -> None:
    raise _Stopped


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        errors.print_exception()
    errors.print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)
    sys.exit(code)
