"""What a worker must find before a sweep or an extraction sends it work.

Workers run this in their event loop, so nothing heavy is imported: neither torch nor what reads a cache.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pcd
from pcd.errors import StoreError
from pcd.fingerprint import file_digest
from pcd.remote import any_path

TOKEN = ".workers"
"""File in the folder of a sweep by which workers tell that it is the one the sweep means; there while the sweep goes on."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Place:
    """Where the runs of a sweep come from and go to, and with what they are trained; plain values that can be sent."""

    cache: str
    manifest: str
    """SHA-256 of the cache's manifest."""
    root: str
    token: str
    """What `TOKEN` in `root` holds."""
    versions: dict[str, str]
    """Of the packages on which results depend."""
    work: str = "sweep"
    """What is to be done there, in messages."""
    needs: str = "cache and --out"
    """Folders that workers must see, in messages."""
    file: str = TOKEN
    """Name of the file with the token."""


def versions() -> dict[str, str]:
    """The versions here of what results depend on. Builds of one torch (+cpu, +cu126) count as the same."""
    return {"pcd": pcd.__version__, "torch": version("torch").partition("+")[0]}


def examine(place: Place) -> dict[str, str]:
    """What a worker answers: its `host`, and the `problem` that keeps it from taking part ("" if there is none)."""
    return {"host": platform.node(), "problem": problem(place)}


def problem(place: Place) -> str:
    """What keeps this process from taking part, as the end of a sentence that begins with its name; "" if nothing does."""
    try:
        return _problem(place)
    except StoreError as error:
        return f"cannot use an object store there: {error}"


def _problem(place: Place) -> str:
    own = versions()
    if own != place.versions:
        return f"has {_words(own)}; the {place.work} was started with {_words(place.versions)}"
    manifest, root = any_path(place.cache) / MANIFEST, any_path(place.root)
    if not manifest.is_file():
        return f"does not find the cache {place.cache}"
    if file_digest(manifest) != place.manifest:
        return f"finds another cache than the {place.work}'s at {place.cache}"
    probe = root / f"{place.file}-{platform.node()}-{os.getpid()}"
    try:
        if isinstance(root, Path):
            os.listdir(root)  # noqa: PTH208  a network file system looks again for files that were not there before
        if (root / place.file).read_text(encoding="utf-8") != place.token:
            return f"finds another folder than the {place.work}'s at {place.root}"
        probe.write_bytes(b"")
        probe.unlink()
    except FileNotFoundError:
        return f"does not find the {place.work}'s folder {place.root}"
    except OSError as error:
        return f"cannot write in the {place.work}'s folder {place.root} ({error.strerror})"
    return ""


def _words(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
