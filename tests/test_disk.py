"""Disks that are full, folders that cannot be written to, images that vanish: a clear error, and the same command continues."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pcd.cache import Cache
from pcd.cache.verify import verify_cache
from pcd.datasets.folder import FolderDataset
from pcd.stages import plan
from tests.datasets_support import write_csv, write_png
from tests.failpoints import begin_pcd, end_of, files_of, in_memory
from tests.test_cli import pcd

__all__ = ["pcd"]
Prepare = Callable[[], object]
ENCODER = ["--encoder", "toy:toy", "--weights", "random", "--device", "cpu"]
SETTINGS = ["--set", "dataset.train=9", "--set", "dataset.test=4", "--set", "head.max_depth=10.0"]
NOBODY = 65534


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards per table: two samples each."""
    monkeypatch.setattr(plan, "MAX_SHARD_ROWS", 8)


class Disk:
    """Runs `pcd extract` into `cache` of a folder that everybody may enter."""

    def __init__(self, folder: Path, *more: str) -> None:
        folder.chmod(0o755)
        (folder / "said").touch()
        (folder / "said").chmod(0o666)
        self.folder, self.more = folder, more

    @property
    def said(self) -> str:
        """What the last command printed, in one line."""
        return " ".join((self.folder / "said").read_text().split())

    def extract(self, cache: str = "cache", prepare: Prepare = lambda: None) -> int:
        """Exit code of the extraction, in a process of its own that first calls `prepare`."""
        more = self.more or ("--dataset", "toy", *SETTINGS)
        return self.run("extract", *ENCODER, *more, "--cache", cache, prepare=prepare)

    def run(self, *command: str, prepare: Prepare = lambda: None) -> int:
        """Exit code of a command, likewise."""
        return end_of(begin_pcd([*command], self.folder, prepare=prepare))

    def assert_resumable(self, cache: Path, *, begun: bool = True) -> None:
        """Nothing is damaged, nothing half-written stays, and the same command ends in the bytes of an undisturbed one."""
        assert not list(cache.rglob("*.partial"))
        if begun:
            with Cache.open(cache) as opened:
                assert {fault.kind for fault in verify_cache(opened)} == {"absent"}
        assert self.extract(str(cache)) == 0, self.said
        assert self.extract("undisturbed") == 0, self.said
        assert files_of(cache) == files_of(self.folder / "undisturbed")


@pytest.fixture
def disk() -> Iterator[Disk]:
    with in_memory() as folder:
        yield Disk(folder)


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything is imported here: children that give up their rights may not be able to read Python's files."""
    from pcd.stages.extract import extract
    from tests.test_extract import toy_recipe

    extract(toy_recipe(dataset={"train": 2, "test": 1}), tmp_path_factory.mktemp("warm") / "cache", device="cpu")


def test_files_larger_than_the_limit(disk: Disk) -> None:
    disk.more = ("--dataset", "toy", *SETTINGS, "--set", "views.canvas=[96,192]")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    assert disk.extract(prepare=limit) == 1
    assert re.search(r"cache/train/(clip/patch|depth/canvas)/c/0/0/0 cannot be written: File too large\.", disk.said)
    assert "(or raise the quota, or `ulimit -f`), then give the same command again: what is finished is kept." in disk.said
    disk.assert_resumable(disk.folder / "cache")


@pytest.fixture
def small(disk: Disk) -> Iterator[Path]:
    """A disk of its own, of 300 kB."""
    place = disk.folder / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up(disk: Disk, small: Path) -> None:
    """Again and again, each time a little later; the last time there is room."""
    codes = []
    for size in (*range(330, 1100, 110), 8000):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small], check=True)
        codes.append(disk.extract("small/cache"))
        if codes[-1]:
            assert "error: small/cache/" in disk.said, disk.said
            assert "cannot be written: No space left on device. Free some space there" in disk.said
            assert not list(small.rglob("*.partial"))
        with Cache.open(small / "cache") as cache:
            assert {fault.kind for fault in verify_cache(cache)} <= {"absent"}
    assert codes.count(1) >= 4
    assert codes[-1] == 0, disk.said
    assert disk.extract("undisturbed") == 0
    assert files_of(small / "cache") == files_of(disk.folder / "undisturbed")


def test_a_disk_that_is_surely_too_small_is_refused_at_once(disk: Disk, small: Path) -> None:
    disk.more = ("--dataset", "toy", *SETTINGS, "--set", "views.canvas=[96,192]")
    subprocess.run(["mount", "-o", "remount,size=700k", small], check=True)
    assert disk.extract("small/cache") == 1
    assert "GB are to be written and" in disk.said
    assert "Free some space, choose another --cache" in disk.said
    assert not list(small.rglob("c/*"))


def as_nobody() -> None:
    """Give up root's rights for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.fixture
def half(disk: Disk) -> Iterator[Path]:
    """A cache with records of one table missing, that belongs to nobody in particular."""
    assert disk.extract() == 0, disk.said
    cache = disk.folder / "cache"
    for record in (cache / "commits/train").rglob("000002.json"):
        record.unlink()
    shutil.copytree(cache, disk.folder / "other")
    for path in [cache, *cache.rglob("*")]:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
    yield cache
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o755)


def test_a_folder_that_cannot_be_written_to(disk: Disk, half: Path) -> None:
    """The cache as a whole, then a column of it."""
    half.chmod(0o555)
    assert disk.extract(prepare=as_nobody) == 1
    assert "cache cannot be written to (Permission denied)" in disk.said
    assert "Make the folder writable, or copy the cache to one that is: `pcd cache copy SRC DST`." in disk.said
    half.chmod(0o755)
    (half / "train/clip/patch/c/2/0").chmod(0o555)
    assert disk.extract(prepare=as_nobody) == 1
    assert "cache/train/clip/patch/c/2/0/0 cannot be written: Permission denied." in disk.said
    assert "Make its folder writable, or choose another, then give the same command again" in disk.said
    (half / "train/clip/patch/c/2/0").chmod(0o755)
    disk.assert_resumable(half)


def test_a_finished_cache_needs_no_right_to_write(disk: Disk) -> None:
    assert disk.extract() == 0, disk.said
    folders = [path for path in (disk.folder / "cache", *(disk.folder / "cache").rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    assert disk.extract(prepare=as_nobody) == 0, disk.said
    assert "Nothing to do" in disk.said
    for command in (["verify"], ["verify", "--repair"], ["inspect"], ["gc"]):
        assert disk.run("cache", command[0], "cache", *command[1:], prepare=as_nobody) == 0, (command, disk.said)
    assert disk.run("cache", "gc", "cache", "--column", "depth/var", "--yes", prepare=as_nobody) == 1
    assert "cannot be written to (Permission denied)" in disk.said
    for path in folders:
        path.chmod(0o755)
    assert disk.run("cache", "verify", "cache") == 0


@pytest.fixture
def frames(disk: Disk) -> Path:
    """Twelve frames as files."""
    root, rng, rows = disk.folder / "frames", np.random.default_rng(0), []
    for number in range(12):
        write_png(root / f"rgb/{number:02}.png", rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
        write_png(root / f"depth/{number:02}.png", rng.integers(500, 9000, (24, 40), dtype=np.uint16))
        split = "test" if number % 4 == 3 else "train"
        rows.append({"image": f"rgb/{number:02}.png", "depth": f"depth/{number:02}.png", "split": split, "unit": "mm"})
    write_csv(root, rows)
    disk.more = ("--dataset", "folder", "--root", "frames", "--set", "views.canvas=[16,32]", "--set", "views.grid=[1,2]")
    return root


@pytest.mark.parametrize("what", ["rgb/09.png", "depth/06.png", "rgb", "."])
def test_images_that_vanish_on_the_way(disk: Disk, frames: Path, what: str) -> None:
    """A file, a folder, or all of them (a disk that is no longer mounted), while the fourth sample is read."""
    load, gone = FolderDataset.load, disk.folder / "gone"

    def losing() -> None:
        loaded: list[str] = []

        def lose(self: FolderDataset, split: str, key: str) -> object:
            loaded.append(key)
            if len(loaded) == 5:
                (frames / what).rename(gone)
            return load(self, split, key)  # type: ignore[arg-type]

        FolderDataset.load = lose  # type: ignore[method-assign, assignment]

    assert disk.extract(prepare=losing) == 2, disk.said
    missing = what if "." in what and what != "." else "rgb/"
    assert f"frames/{missing}" in disk.said
    assert "error: sample " in disk.said
    assert "`--on-error skip` records such samples and goes on; what is done is kept." in disk.said
    committed = [path for path in (disk.folder / "cache/commits").rglob("*.json") if path.name != "manifest.json"]
    assert committed  # of the samples before
    gone.rename(frames / what)
    disk.assert_resumable(disk.folder / "cache")
