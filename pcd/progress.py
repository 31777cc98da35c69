"""How a stage tells what it does, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a stage reports to. The command line draws it; a script may leave it `SILENT`."""

    def say(self, text: str) -> None:
        """One line of news."""
        ...

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """A countable piece of work begins; `done` of `total` are already there."""
        ...

    def advance(self, number: int = 1) -> None:
        """So many more units are done."""
        ...

    def stop(self) -> None:
        """The piece of work begun last has ended."""
        ...


class _Silent:
    def say(self, text: str) -> None:
        """Nothing is said."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Nothing is shown."""

    def advance(self, number: int = 1) -> None:
        """Nothing is shown."""

    def stop(self) -> None:
        """Nothing is shown."""


SILENT: Progress = _Silent()
"""A listener that ignores everything."""
