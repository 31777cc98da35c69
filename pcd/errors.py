"""The errors a person can meet: a small tree under `PcdError`.

Every error is also a standard exception, so code that knows nothing of pcd can catch it. A message says what was found,
where, what was expected and what to do. `exit_code` is what the command line returns: 2 for what the user gave, 1 for
what failed on the way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PcdError(Exception):
    """Base of every error that pcd raises on purpose."""

    exit_code = 1


class UsageError(PcdError, ValueError):
    """An argument, option or name that cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or a `--set` override that cannot be used; names the file and the key."""


class DatasetError(PcdError, ValueError):
    """A dataset on disk is not what its layout promises."""

    exit_code = 2


class MissingFileError(DatasetError, FileNotFoundError):
    """A root, list, image or depth file is not there."""


class SampleError(DatasetError):
    """One sample cannot be used; with `--on-error skip` it is recorded and left out."""


class WeightsError(PcdError, RuntimeError):
    """Encoder weights are missing, unreadable or of another network."""

    exit_code = 2


class TextTowerError(PcdError, RuntimeError):
    """Text embeddings were asked of weights that hold the visual tower alone."""

    exit_code = 2


class CacheError(PcdError, RuntimeError):
    """A cache cannot be used as asked."""


class FingerprintError(CacheError, ValueError):
    """Two things that must have been made the same way were not; names the fields and both values."""

    exit_code = 2


class IncompleteError(CacheError, LookupError):
    """Rows were asked for that no commit record vouches for."""


class CorruptError(CacheError, OSError):
    """Stored bytes do not agree with their checksum or commit record."""


class SpaceError(CacheError, OSError):
    """The file system is too small for what is about to be written."""


class StoreError(CacheError):
    """An object store cannot be reached, refuses, or has no such bucket."""


class WriteError(PcdError, OSError):
    """A file cannot be written: no permission, a read-only or failing disk."""


class RunError(PcdError, RuntimeError):
    """A run directory is missing, unfinished or of another kind."""

    exit_code = 2


class TrainingError(PcdError, ArithmeticError):
    """Training cannot go on: nothing to learn from, or a loss that is not finite."""


class PredictionError(PcdError, ArithmeticError):
    """A prediction that cannot be scored: not finite, or not positive where a disparity is needed."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an error message for an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
