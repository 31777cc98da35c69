"""One writer per cache, named while it holds the lock and forgotten however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pcd.cache.lock import LOCK, writing
from pcd.errors import CacheError

HOLD = "import sys; from pathlib import Path; from pcd.cache.lock import writing\n"
HOLD += "with writing(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_holds_the_lock_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(CacheError) as error, writing(tmp_path):
        pass
    said = (
        rf"is being written by process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    )
    assert re.search(said, str(error.value))


def test_a_killed_writer_blocks_nobody(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=30)
    assert f"process {holder.pid} " in (tmp_path / LOCK).read_text()  # the text stays, the lock does not
    with writing(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
        assert f"process {holder.pid} " not in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_an_error_while_writing_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path):
        raise KeyboardInterrupt
    with writing(tmp_path), pytest.raises(CacheError, match=f"process {os.getpid()} "), writing(tmp_path):
        pass


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process cannot write to; root gives up its rights for as long."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        mine = os.geteuid()
        if mine == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(mine)
            folder.chmod(0o755)


def test_a_read_only_folder_is_a_clear_error(read_only: Path) -> None:
    for folder in (read_only, read_only / "new"):
        with pytest.raises(CacheError, match=r"cannot be written to \(Permission denied\).*pcd cache copy"), writing(folder):
            pass


def test_a_file_system_without_locks_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CacheError, match=r"cannot be locked \(No locks available\)"), writing(tmp_path):
        pass
