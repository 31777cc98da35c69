"""Who writes a cache on a store: one, or parts side by side; the dead and the silent do not stand in the way."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pcd.cache import commits, lease
from pcd.cache.lock import LOCK, holding, is_lock, parts, sharing, writing
from pcd.errors import CacheError
from pcd.remote import RemotePath
from tests.store_support import Server, remote, server, store

__all__ = ["server", "store"]
WORDS = "process 1 on another since then"
ELSEWHERE = {"machine": "another", "process": 1, "began": 1.0, "holder": WORDS, "token": "x", "turn": 0}
COMMIT = commits.Commit(table="t", column="c", shard=0, start=0, stop=1, bytes=1, sha256="0", fingerprint="0")


def lock_of(path: RemotePath, **words: Any) -> RemotePath:
    """A lease of somebody else, as it lies there."""
    path.put(json.dumps({**ELSEWHERE, **words}).encode())
    return path


def left(root: RemotePath) -> list[str]:
    return sorted(path.name for path, _ in root.walk())


@contextmanager
def silent(monkeypatch: pytest.MonkeyPatch, seconds: float = 2.0) -> Iterator[None]:
    """Leases last that long, and what was written before that is that old by every clock."""
    with monkeypatch.context() as patch:
        patch.setattr(lease, "LASTS", seconds)
        patch.setattr(lease, "RENEW", seconds / 4)
        yield


def test_the_second_is_told_who_the_first_is(store: RemotePath) -> None:
    with writing(store):
        assert left(store) == [LOCK]
        assert is_lock((store / LOCK).relative_to(store))
        held = rf"{store} is being written by process {os.getpid()} on {re.escape(socket.gethostname())} since 20"
        for take in (writing, sharing):
            with pytest.raises(CacheError, match=held), take(store):
                raise AssertionError
        assert left(store) == [LOCK]
    assert left(store) == []
    with writing(store):
        pass


def test_parts_side_by_side_but_not_beside_the_whole(store: RemotePath) -> None:
    occupied: list[str] = []

    def refuse(holder: str) -> None:
        occupied.append(holder)
        raise CacheError(holder)

    with sharing(store), sharing(store), holding(store, "part-1-of-2", refuse), holding(store, "part-2-of-2", refuse):
        assert set(parts(store)) == {"1-of-2", "2-of-2"}
        with pytest.raises(CacheError, match="process"), holding(store, "part-1-of-2", refuse):
            raise AssertionError
        held = rf"is being written in parts: part 1-of-2 by process {os.getpid()} .*; part 2"
        with pytest.raises(CacheError, match=held), writing(store):
            raise AssertionError
    assert left(store) == []
    assert len(occupied) == 1


def _hold(root: str, ready: Any) -> None:
    from pcd.cache import Cache  # noqa: F401  as a process that extracts has it
    from pcd.remote import any_path

    with writing(any_path(root)):
        ready.set()
        time.sleep(60)


def test_a_process_that_was_killed_blocks_nobody(store: RemotePath) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=_hold, args=(str(store), ready))
    child.start()
    assert ready.wait(60)
    with pytest.raises(CacheError, match=f"by process {child.pid} on"), writing(store):
        raise AssertionError
    child.kill()
    child.join()
    assert left(store) == [LOCK]
    began = time.monotonic()
    with writing(store):
        assert left(store) == [LOCK]
    assert time.monotonic() - began < lease.LASTS / 4
    assert left(store) == []


def test_one_of_another_machine_runs_out(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_of(store / LOCK)
    with pytest.raises(CacheError, match="by process 1 on another since then"), writing(store):
        raise AssertionError
    with silent(monkeypatch):
        time.sleep(3.2)  # stores tell whole seconds
        with writing(store):
            time.sleep(3.2)  # renewed meanwhile
            with pytest.raises(CacheError, match=f"by process {os.getpid()}"), writing(store):
                raise AssertionError
    assert left(store) == []


def test_clocks_that_are_wrong_do_not_matter(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is an hour ahead: the lease of somebody else still holds, by the store's clock."""
    lock_of(store / LOCK)
    now = time.time
    for error in (3600.0, -3600.0):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda error=error: now() + error)
            with pytest.raises(CacheError, match="by process 1 on another"), writing(store):
                raise AssertionError
    assert left(store) == [LOCK]


def test_who_lost_it_is_told_before_anything_is_committed(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(store):
        commits.write(store, COMMIT)
        lock_of(store / LOCK)  # somebody believed this process to be dead
        monkeypatch.setattr(lease, "RENEW", -1.0)
        with pytest.raises(CacheError, match=rf"{store}/.lock is no longer held by this process \(process 1 on another"):
            commits.write(store, dataclasses.replace(COMMIT, shard=1))
    assert left(store) == [LOCK, "000000.json"], "the lease of the other stays"
    (store / LOCK).unlink()
    monkeypatch.undo()
    with writing(store):
        (store / LOCK).unlink()
        monkeypatch.setattr(lease, "RENEW", -1.0)
        with pytest.raises(CacheError, match="somebody removed it"):
            commits.write(store, dataclasses.replace(COMMIT, shard=1))


def test_a_sleeper_whose_lease_nobody_took_goes_on(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(store):
        monkeypatch.setattr(lease, "RENEW", -1.0)  # the last renewal is long ago
        commits.write(store, COMMIT)
        monkeypatch.undo()
    assert left(store) == ["000000.json"]


def test_an_answer_that_got_lost_is_no_defeat(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was carried out and is repeated finds its own object."""
    put = RemotePath._put

    def twice(path: RemotePath, data: Any, mode: Any) -> Any:
        put(path, data, mode)
        return put(path, data, mode)

    monkeypatch.setattr(RemotePath, "_put", twice)
    with writing(store):
        monkeypatch.setattr(lease, "RENEW", -1.0)
        commits.write(store, COMMIT)
    monkeypatch.undo()
    assert left(store) == ["000000.json"]
    assert commits.read(store, "t", "c", 0) == COMMIT


def test_a_store_without_conditional_writes_is_refused(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemotePath, "put_new", RemotePath.put)
    for take in (writing, sharing):
        with pytest.raises(CacheError, match=r"\.lock.* this store has no conditional writes"), take(store):
            raise AssertionError


def test_who_cannot_be_read_holds_it_until_it_runs_out(monkeypatch: pytest.MonkeyPatch, store: RemotePath) -> None:
    (store / LOCK).put(b"{")
    with pytest.raises(CacheError, match="by somebody unknown"), writing(store):
        raise AssertionError


def test_leases_of_the_dead_are_removed_by_the_next_writer(store: RemotePath) -> None:
    dead = {"machine": lease.machine(), "process": 2**22 + 1}
    for name in ("part-1-of-2", "train-0", "shared-abc"):
        lock_of(store / f"{LOCK}.{name}", **dead)
    lock_of(store / f"{LOCK}.train-4")
    assert parts(store) == {}
    with writing(store):
        assert left(store) == [LOCK, f"{LOCK}.train-4"]


def test_locks_of_two_caches_are_their_own(server: Server) -> None:
    with writing(remote("one")), writing(remote("one-more")), writing(remote("two")):
        pass
