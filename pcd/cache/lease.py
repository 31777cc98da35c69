"""Who writes a cache on an object store, which has no locks that end with their holder: leases.

A lease is a small object, made only if there is none, that says who holds it. A thread writes it anew every `RENEW` seconds.
One that has not been renewed for `LASTS` seconds by the store's own clock, or whose process is known to be dead, may be taken
over; each writing of it replaces the one before and no other, so that of several only one succeeds, and who has lost it is told
before anything more is committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pcd.errors import CacheError, StoreError
from pcd.locks import words_for
from pcd.remote import RemotePath, Version

LASTS, RENEW = 60.0, 15.0
"""Seconds until a lease that is not renewed has run out, and between two renewals."""
SAME = 2.0
"""Seconds by which two looks at when a process began may differ: clocks are corrected."""
LOCK, PART, SHARE = ".lock", "part-", "shared-"
"""How the names of objects begin, and of those of parts and of who shares the cache."""

_held: dict[str, set[Lease]] = {}
"""The leases of this process, by cache."""
_tokens: set[str] = set()
"""Those of them that are not given up, by what tells them apart: others of this process could not be, without network."""


@contextmanager
def writing(root: RemotePath) -> Iterator[None]:
    """Hold the cache for writing, alone. Raises `CacheError` naming process, host and since when if it is held."""
    with _lease(root, LOCK, _refuse(root)):
        _refuse_careless(root / LOCK)
        if sharers := [words for path in _others(root, SHARE) if (words := _holder(path))]:
            parts_held = "; ".join(f"part {name} by {words}" for name, words in parts(root).items())
            raise _busy(root, f"in parts: {parts_held}" if parts_held else f"by {sharers[0]}")
        for path in _others(root, ""):
            if not _holder(path):
                path.unlink()  # of a process that died
        yield


@contextmanager
def sharing(root: RemotePath) -> Iterator[None]:
    """Hold the cache so that others may write parts of it meanwhile, but nobody the whole. Raises as `writing` does."""
    name = f"{LOCK}.{SHARE}{secrets.token_hex(8)}"
    with _lease(root, name, _refuse(root)):  # first ours, then a look: as `writing` does, so that one of the two sees the other
        _refuse_careless(root / name)
        if holder := _holder(root / LOCK):
            raise _busy(root, f"by {holder}")
        yield


@contextmanager
def holding(root: RemotePath, name: str, occupied: Callable[[str], None]) -> Iterator[None]:
    """Hold what is called `name`; see `pcd.cache.lock.holding`."""
    with _lease(root, f"{LOCK}.{name}", occupied):
        yield


def parts(root: RemotePath) -> dict[str, str]:
    """Parts that are being written and the words for their holders."""
    found = {path.name.removeprefix(f"{LOCK}.{PART}"): _holder(path) for path in _others(root, PART)}
    return {name: words for name, words in found.items() if words}


def confirm(root: RemotePath) -> None:
    """Raise `CacheError` unless every lease that this process took on the cache is still its own: before each commit."""
    for lease in tuple(_held.get(str(root), ())):
        lease.confirm()


def _refuse_careless(held: RemotePath) -> None:
    """Raise `CacheError` if the store lets an object be made that is there: some ignore that they should not."""
    try:
        held.put_new(b"")
    except FileExistsError:
        return
    raise CacheError(
        f"{held} could be written although it is there: this store has no conditional writes, and without them two writers "
        "could not be kept apart. Write to a disk and copy the finished cache there with the store's own tool."
    )


def _refuse(root: RemotePath) -> Callable[[str], None]:
    def refuse(holder: str) -> None:
        raise _busy(root, f"by {holder}")

    return refuse


def _busy(root: RemotePath, holder: str) -> CacheError:
    return CacheError(f"{root} is being written {holder}; wait for it to end.")


def _others(root: RemotePath, begin: str) -> list[RemotePath]:
    """Leases but for that of the whole cache, whose names begin so."""
    return sorted(root.glob(f"{LOCK}.{begin}*"))


@contextmanager
def _lease(root: RemotePath, name: str, occupied: Callable[[str], None]) -> Iterator[None]:
    lease = Lease(root / name)
    while holder := lease.take():
        occupied(holder)
    mine = _held.setdefault(str(root), set())
    mine.add(lease)
    try:
        yield
    finally:
        mine.discard(lease)
        lease.release()


class Lease:
    """One lease, not taken yet."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._words = words_for()
        self._token = secrets.token_hex(8)
        self._turn = 0
        self._version: Version
        self._renewed = 0.0
        self._lost = ""
        self._busy = threading.Lock()
        self._over = threading.Event()

    def take(self) -> str:
        """Take it, and keep it until `release`; returns the words for who holds it if somebody else does."""
        while True:
            began = time.monotonic()
            try:
                self._version = self._path.put_new(self._text())
            except FileExistsError:
                found = _look(self._path)
                if found is None:
                    continue  # it was there a moment ago
                if found.token != self._token:  # else an answer got lost, and the request was repeated
                    if _alive(self._path, found):
                        return found.words
                    try:
                        self._version = self._path.put_over(self._text(), found.version)
                    except FileExistsError:
                        continue  # a third one was faster
                else:
                    self._version = found.version
            self._renewed = began
            _tokens.add(self._token)
            threading.Thread(target=self._keep, name="pcd-lease", daemon=True).start()
            return ""

    def confirm(self) -> None:
        """Raise `CacheError` if somebody else has it now; renews one that is about to run out."""
        if time.monotonic() - self._renewed > 2 * RENEW:  # the process was asleep, or the network away
            self._renew()
        if self._lost:
            raise CacheError(
                f"{self._path} is no longer held by this process ({self._lost}): it was stopped, or without network, for more "
                f"than {LASTS:.0f} s. What it was writing is not committed; give the same command again."
            )

    def release(self) -> None:
        """Give it up. Without network it runs out by itself."""
        self._over.set()
        _tokens.discard(self._token)
        if not self._busy.acquire(timeout=RENEW):
            return
        with contextlib.suppress(StoreError):
            if not self._lost and time.monotonic() - self._renewed < LASTS / 2:
                self._path.unlink()
        self._busy.release()

    def _keep(self) -> None:
        while not self._over.wait(RENEW) and not self._lost:
            with contextlib.suppress(StoreError):  # whoever commits meets it too, and tells
                self._renew()

    def _renew(self) -> None:
        with self._busy:
            if self._over.is_set() or self._lost:
                return
            began, self._turn = time.monotonic(), self._turn + 1
            try:
                self._version = self._path.put_over(self._text(), self._version)
            except FileExistsError:
                found = _look(self._path)
                if found is None or found.token != self._token:
                    self._lost = f"{found.words} holds it" if found else "somebody removed it"
                    return
                self._version = found.version  # an answer got lost, and the request was repeated
            self._renewed = began

    def _text(self) -> bytes:
        """Who holds it; never the same twice, so that stores that name versions by content tell them apart."""
        who = {"holder": self._words, "machine": machine(), "process": os.getpid(), "began": _began(os.getpid())}
        return json.dumps({**who, "token": self._token, "turn": self._turn}, sort_keys=True).encode()


@dataclass(frozen=True)
class _Found:
    """What a lease says, and when by the store's clock it was written."""

    words: str
    machine: str
    process: int
    began: float | None
    token: str
    version: Version
    written: float


def _look(path: RemotePath) -> _Found | None:
    try:
        data, version, written = path.read_version()
    except FileNotFoundError:
        return None
    try:
        value: dict[str, Any] = json.loads(data)
        who = str(value["holder"]), str(value["machine"]), int(value["process"]), value["began"], str(value["token"])
    except (ValueError, KeyError, TypeError):
        who = "somebody unknown", "", 0, None, ""
    return _Found(*who, version, written)


def _holder(path: RemotePath) -> str:
    """The words for who holds a lease, or nothing if nobody does."""
    found = _look(path)
    return found.words if found and _alive(path, found) else ""


def _alive(path: RemotePath, found: _Found) -> bool:
    """Whether its holder may still be at work: not if its process is gone, or it was not renewed in time."""
    if found.machine == machine() and not _lives(found):
        return False
    if abs(time.time() - found.written) < LASTS / 2:
        return True  # a clock that is wrong is found out a little later
    return _now(path) - found.written < LASTS


def _lives(found: _Found) -> bool:
    """Whether this machine still has its process, and not another one of the same number, and that has not given it up."""
    if found.process == os.getpid():
        return found.token in _tokens
    began = _began(found.process)
    return began is not None and found.began is not None and abs(began - found.began) < SAME


def _now(path: RemotePath) -> float:
    """The time by the store's clock, which is the one that leases are dated by."""
    probe = path.with_name(f"{LOCK}.clock-{secrets.token_hex(8)}")
    probe.put(b"")
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def machine() -> str:
    """What tells whether a process number means a process that can be seen from here: host, boot and container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts += [boot.read_text().strip(), str(space.readlink())]
    return " ".join(facts)


def _began(process: int) -> float | None:
    """When a process of this machine began, which tells it from a later one of the same number; None if there is none."""
    try:
        return float(psutil.Process(process).create_time())
    except psutil.Error:
        return None
