"""Every change that a process makes below a folder passes one place here: to be listed, refused, torn, or the last one.

`watched` hooks the functions that all Python file writing ends in. What it listed can be replayed onto `Disk`, a model of a
disk that keeps only what was fsynced: the folder as a power cut at any moment may leave it.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from tests.test_extract import files

Kind = Literal["mkdir", "open", "write", "sync", "sync-folder", "rename", "unlink", "rmdir"]
Loss = Literal["nothing", "data", "zeros", "half", "names", "all"]
LOSSES: tuple[Loss, ...] = ("data", "zeros", "half", "names", "all")
"""What a power cut takes of what is not fsynced: the data (files empty, all zeros, cut in half), the names, or both."""
KILLED = 77
"""Exit status of a child that `os._exit` ended at its point."""
LOCKS = ".lock"
"""How the names of lock files at the root begin: they are not watched."""


@dataclass(frozen=True)
class Step:
    """One change: its kind, the path below the folder (of a rename: whither), and bytes written or the path renamed."""

    kind: Kind
    path: str
    data: bytes = b""
    origin: str = ""


Fault = Callable[[int, Step, Callable[[bytes | None], Any]], Any]
"""Called instead of the change: its number, the change, and a call that makes it (of a write: with these bytes instead)."""


class Watch:
    """Counts the changes below `root` and hands each to `fault`, if there is one."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root = str(root.resolve())
        self.steps: list[Step] = []
        self._fault = fault

    def inside(self, path: Any) -> str | None:
        """The path below the folder, or None for one that is not watched."""
        if isinstance(path, int):
            return None
        whole = os.path.abspath(os.fspath(path))  # noqa: PTH100  pathlib's own functions are being watched
        name = whole.removeprefix(self.root + os.sep)
        return None if name == whole or name.startswith(LOCKS) else name

    def change(self, step: Step, do: Callable[[bytes | None], Any]) -> Any:
        """Make a change, or let the fault decide."""
        number = len(self.steps)
        self.steps.append(step)
        return do(None) if self._fault is None else self._fault(number, step, do)


class _Raw(io.FileIO):
    """What buffered files write into: one call here is one `write` of the system."""

    def __init__(self, watch: Watch, name: str, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._watch, self._name = watch, name

    def write(self, data: Any) -> int:
        whole = bytes(data)

        def do(instead: bytes | None) -> int:
            return io.FileIO.write(self, whole if instead is None else instead) or 0

        return int(self._watch.change(Step("write", self._name, whole), do))


def files_of(root: Path) -> dict[str, bytes]:
    """The files of a cache but provenance and locks: a lock's file that a killed process left counts for nothing."""
    return {name: data for name, data in files(root).items() if not name.startswith(LOCKS)}


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: for thousands of small caches, and fsyncs that need not wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


class _Hooks:
    """What takes the place of the functions of `os` and of `open`."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.real_open = io.open
        names = ("open", "mkdir", "rmdir", "unlink", "replace", "fsync", "truncate")
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in names}

    def table(self) -> dict[str, Callable[..., Any]]:
        """By their names in `os`."""
        changes: dict[str, Kind] = {"mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink"}
        ones = {name: self.one(kind, self.real[name]) for name, kind in changes.items()}
        moves = dict.fromkeys(("replace", "rename"), self.move)
        syncs = dict.fromkeys(("fsync", "fdatasync"), self.fsync)
        return {**ones, "remove": ones["unlink"], **moves, **syncs, "open": self.os_open, "truncate": self.truncate}

    def open(self, file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        name = self.watch.inside(file)
        if name is None or not set(mode) & set("wax+"):
            return self.real_open(file, mode, *rest, **more)
        assert "+" not in mode, "not met so far"
        assert set(rest) <= {-1, None, "utf-8", "locale"}, "not met so far"  # as pathlib hands on what was not given
        raw = self.watch.change(Step("open", name, mode.encode()), lambda _: _Raw(self.watch, name, file, mode.strip("bt")))
        buffer = io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, "utf-8")

    def os_open(self, path: Any, flags: int, *rest: Any, **more: Any) -> Any:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        assert self.watch.inside(path) is None or not writes, f"{path} bypasses the watch"
        return self.real["open"](path, flags, *rest, **more)

    def one(self, kind: Kind, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            inside = self.watch.inside(path)
            if inside is None:
                return real(path, *rest, **more)
            return self.watch.change(Step(kind, inside), lambda _: real(path, *rest, **more))

        return call

    def move(self, origin: Any, target: Any, **more: Any) -> None:
        whence, whither = self.watch.inside(origin), self.watch.inside(target)
        assert (whence is None) == (whither is None), "a rename into or out of the folder"
        if whence is None or whither is None:
            self.real["replace"](origin, target, **more)
        else:
            step = Step("rename", whither, origin=whence)
            self.watch.change(step, lambda _: self.real["replace"](origin, target, **more))

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        inside = "." if str(path) == self.watch.root else self.watch.inside(path)
        if inside is None:
            self.real["fsync"](descriptor)
        else:
            self.watch.change(Step("sync-folder" if path.is_dir() else "sync", inside), lambda _: None)

    def truncate(self, path: Any, length: int) -> None:
        assert self.watch.inside(path) is None, "not met so far"
        self.real["truncate"](path, length)


@contextmanager
def watched(root: Path, fault: Fault | None = None) -> Iterator[Watch]:
    """Watch every change below `root` (locks apart) that this process makes. fsyncs are noted, not carried out."""
    watch = Watch(root, fault)
    hooks = _Hooks(watch)
    with ExitStack() as patched:
        for name, hook in hooks.table().items():
            patched.enter_context(mock.patch.object(os, name, hook))
        patched.enter_context(mock.patch.object(io, "open", hooks.open))
        patched.enter_context(mock.patch.object(builtins, "open", hooks.open))
        yield watch


def begin_child(work: Callable[[], object], seconds: int = 120) -> int:
    """Begin `work` in a forked process; its number. An error is printed there."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of pools hold no lock
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(seconds)
        torch.set_num_threads(1)  # threads of the parent do not exist here
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001  it must not reach the test that runs in the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for a child; its exit status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin_pcd(command: list[str], folder: Path, said: str = "said", prepare: Callable[[], object] = lambda: None) -> int:
    """Begin `pcd COMMAND` in `folder`, in a process of its own that first calls `prepare`; it prints to the file `said`."""

    def work() -> None:
        from pcd import cli

        os.chdir(folder)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["pcd", *command]
        os.environ["COLUMNS"] = "300"
        prepare()
        cli.main()

    return begin_child(work)


# ---- a disk that forgets


@dataclass
class _File:
    now: bytes = b""
    durable: bytes = b""


@dataclass
class Disk:
    """A folder after some steps, and what of it is durable. A folder's name maps to None."""

    names: dict[str, _File | None] = field(default_factory=dict)
    durable: dict[str, _File | None] = field(default_factory=dict)

    def apply(self, step: Step) -> None:
        """Make a change. Only an fsync makes anything durable: of a file its bytes, of a folder the names in it."""
        match step.kind:
            case "mkdir":
                self.names[step.path] = None
            case "open":
                file = self.names.setdefault(step.path, _File())
                assert file is not None
                file.now = file.now if step.data.startswith(b"a") else b""
            case "write":
                self._file(step.path).now += step.data
            case "sync":
                self._file(step.path).durable = self._file(step.path).now
            case "sync-folder":
                here = {name for name in {*self.names, *self.durable} if (name.rpartition("/")[0] or ".") == step.path}
                self.durable = {name: file for name, file in self.durable.items() if name not in here}
                self.durable |= {name: self.names[name] for name in here if name in self.names}
            case "rename":
                self.names[step.path] = self.names.pop(step.origin)
            case _:
                self.names.pop(step.path, None)

    def _file(self, path: str) -> _File:
        file = self.names[path]
        assert file is not None
        return file

    def after(self, loss: Loss) -> dict[str, bytes]:
        """The files that are there after a power cut that takes this much."""
        names = self.durable if loss in ("names", "all") else self.names
        kept = {name: file for name, file in names.items() if all(str(p) in names for p in Path(name).parents[:-1])}
        return {name: _lost(file, loss) for name, file in kept.items() if file is not None}

    def after_any(self, rng: np.random.Generator) -> dict[str, bytes]:
        """The same where each name and each file's data may be lost or not, whatever became of the others."""
        names = {
            name: source[name]
            for name in sorted({*self.names, *self.durable})
            if name in (source := self.names if rng.random() < 0.5 else self.durable)
        }
        losses: tuple[Loss, ...] = ("nothing", "data", "zeros", "half")
        kept = {name: file for name, file in names.items() if all(str(p) in names for p in Path(name).parents[:-1])}
        return {name: _lost(file, losses[rng.integers(4)]) for name, file in kept.items() if file is not None}


def _lost(file: _File, loss: Loss) -> bytes:
    if file.now == file.durable or loss in ("nothing", "names"):
        return file.now
    if loss == "zeros":
        return bytes(len(file.now))
    return file.now[: len(file.now) // 2] if loss == "half" else file.durable


def lay_out(files: dict[str, bytes], root: Path) -> None:
    """Write files below `root`."""
    root.mkdir(parents=True)
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
