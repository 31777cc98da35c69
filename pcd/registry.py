"""Named things that can be added from outside: datasets, encoders and heads.

A registry maps a name to `"module:attribute"`, imported only when asked for, so that listing costs nothing. Packages add
their own names through an entry point group (`pcd.datasets`, `pcd.encoders`, `pcd.heads`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from pcd.errors import UsageError, suggest


class Registry:
    """Names to classes. `kind` is the word used in messages; `group` the entry point group of third parties."""

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._targets = dict(builtin)

    def names(self) -> list[str]:
        """All names, built in and from installed packages, sorted."""
        return sorted({*self._targets, *(point.name for point in self._entry_points())})

    def add(self, name: str, target: str) -> None:
        """Register `"module:attribute"` under `name` in this process (scripts and notebooks).

        Raises `UsageError` if the name is taken by something else.
        """
        if self._targets.get(name, target) != target:
            raise UsageError(f"{self.kind} {name!r} is already {self._targets[name]}; choose another name.")
        self._targets[name] = target

    def get(self, name: str) -> Any:
        """The class registered under `name`. Raises `UsageError` naming the nearest known name."""
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in self._entry_points():
            if point.name == name:
                return point.load()
        raise UsageError(f"Unknown {self.kind} {name!r}.{suggest(name, self.names())}")

    def _entry_points(self) -> tuple[importlib.metadata.EntryPoint, ...]:
        return tuple(importlib.metadata.entry_points(group=self.group))
