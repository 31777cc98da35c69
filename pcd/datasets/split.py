"""Holding samples out: by a seed, whole groups at a time, or the end of a sequence.

A seeded choice ranks keys (or groups) by a hash of seed and name. It depends on the set of names alone: neither on the order
of a list nor on the version of a random number generator.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pcd.errors import UsageError

Parts = tuple[tuple[str, ...], tuple[str, ...]]
"""(kept, held out), both in the order of the keys that were given."""


def train_val(keys: Sequence[str], seed: int, fraction: float = 0.1, groups: Mapping[str, str] | None = None) -> Parts:
    """Split `keys` into (train, val) by a seed; both keep the given order.

    Without `groups`, `round(fraction * n)` keys are held out, at least one if there are two, and never all of them. With
    `groups` (key to group, e.g. scene) whole groups are held out, so that frames of one scene are never on both sides: groups
    are taken in seeded order as long as each brings the number of samples nearer to the fraction; if none does, the smallest.
    `fraction` 0 holds nothing out. Raises `UsageError` for a fraction outside [0, 1), keys that repeat or have no group, and
    a single group, which cannot be divided.
    """
    _check(keys, fraction)
    if fraction == 0 or len(keys) < 2:
        return tuple(keys), ()
    if groups is None:
        held = set(sorted(keys, key=lambda key: _rank(seed, key))[: _count(len(keys), fraction)])
    else:
        chosen = _groups(_sizes(keys, groups), seed, fraction * len(keys))
        held = {key for key in keys if groups[key] in chosen}
    return _parts(keys, held)


def last_part(keys: Sequence[str], fraction: float, groups: Mapping[str, str] | None = None) -> Parts:
    """Hold out the last `fraction` of the sequence, or of each group's sequence: (earlier, later) keys.

    Neighbouring frames of a video look alike, so a test set from its end is more honest than a random one. A sequence of at
    least two gives at least one key and keeps one; a single frame is kept.
    Raises `UsageError` as `train_val` does, but for the single group.
    """
    _check(keys, fraction)
    if fraction == 0:
        return tuple(keys), ()
    if groups is not None:
        _sizes(keys, groups)
    sequences: dict[str, list[str]] = {}
    for key in keys:
        sequences.setdefault("" if groups is None else groups[key], []).append(key)
    held = {key for names in sequences.values() if len(names) > 1 for key in names[-_count(len(names), fraction) :]}
    return _parts(keys, held)


def _check(keys: Sequence[str], fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise UsageError(f"a split fraction of {fraction} makes no sense; give a number from 0 to below 1.")
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise UsageError(f"{len(repeated)} keys occur more than once, the first is {repeated[0]!r}; keys must be unique.")


def _count(total: int, fraction: float) -> int:
    return max(1, min(total - 1, math.floor(fraction * total + 0.5)))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _sizes(keys: Sequence[str], groups: Mapping[str, str]) -> Counter[str]:
    for key in keys:
        if key not in groups:
            raise UsageError(f"sample {key!r} has no group; every sample needs one for a split by group.")
    return Counter(groups[key] for key in keys)


def _groups(sizes: Counter[str], seed: int, target: float) -> set[str]:
    if len(sizes) < 2:
        raise UsageError(f"all samples are of the group {next(iter(sizes))!r}; a split by group needs two groups or more.")
    chosen: set[str] = set()
    held = 0
    ordered = sorted(sizes, key=lambda group: _rank(seed, group))
    for group in ordered:
        nearer = abs(held + sizes[group] - target) < abs(held - target)
        if nearer and len(chosen) < len(sizes) - 1:
            chosen.add(group)
            held += sizes[group]
    return chosen or {min(ordered, key=lambda group: sizes[group])}


def _parts(keys: Sequence[str], held: set[str]) -> Parts:
    return tuple(key for key in keys if key not in held), tuple(key for key in keys if key in held)
