"""Addresses: folders of this machine, and prefixes in buckets of object stores that can be used like folders.

`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` and `az://CONTAINER/PREFIX` become a `RemotePath`, which has the part of pathlib's
interface that a cache needs; `file:///FOLDER` and everything else become a `Path`. An object appears whole or not at all, so
there are no partial files and nothing to rename.
"""

from __future__ import annotations

import io
import re
import urllib.parse
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pcd.bucket import SETTINGS, Bucket, asking
from pcd.errors import StoreError, UsageError, suggest

if TYPE_CHECKING:
    from obstore import ObjectMeta

LISTED = 1000
"""Objects that are listed at a time."""


class Version(NamedTuple):
    """Which writing of an object is meant, as its store tells them apart."""

    e_tag: str | None
    version: str | None


class Stat(NamedTuple):
    """Length in bytes and time of the last writing, by the store's clock, in seconds since 1970."""

    st_size: int
    st_mtime: float


class RemotePath:
    """An object in a bucket, or what would be a folder of them: a part of pathlib's interface.

    Asking the store raises `StoreError`, which names the address, if it cannot be reached, refuses or has no such bucket.
    """

    def __init__(self, bucket: Bucket, key: str = "") -> None:
        self.bucket = bucket
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.bucket, self.key)

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, other: str | PurePath) -> RemotePath:
        return self.joinpath(other)

    def joinpath(self, *others: str | PurePath) -> RemotePath:
        """What lies below."""
        key = PurePosixPath(self.key, *(str(PurePosixPath(other)) for other in others)).as_posix()
        return RemotePath(self.bucket, "" if key == "." else key)

    def with_name(self, name: str) -> RemotePath:
        """What lies beside it under that name."""
        return self.parent / name

    @property
    def name(self) -> str:
        """The last part; of a whole bucket its name."""
        return PurePosixPath(self.key).name or self.bucket.name

    @property
    def parent(self) -> RemotePath:
        """What would be the folder; the bucket's own is itself."""
        key = PurePosixPath(self.key).parent.as_posix()
        return RemotePath(self.bucket, "" if key == "." else key)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """All above it, the nearest first."""
        return () if not self.key else (self.parent, *self.parent.parents)

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The way from `other`, which is above it."""
        return PurePosixPath(self.key).relative_to(other.key)

    def as_posix(self) -> str:
        """The address."""
        return str(self)

    def resolve(self) -> RemotePath:
        """Itself."""
        return self

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def stat(self) -> Stat:
        """Length and time. Raises `FileNotFoundError`."""
        import obstore

        with asking(self.bucket, self):
            found = obstore.head(self.bucket.store, self.key)
        return Stat(found["size"], found["last_modified"].timestamp())

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is anything below."""
        return any(True for _ in self._list())

    def exists(self) -> bool:
        """Whether there is such an object, or anything below."""
        return bool(self.key and self.is_file()) or self.is_dir()

    def walk(self) -> Iterator[tuple[RemotePath, Stat]]:
        """All objects below."""
        for found in self._list():
            yield RemotePath(self.bucket, found["path"]), Stat(found["size"], found["last_modified"].timestamp())

    def iterdir(self) -> Iterator[RemotePath]:
        """The objects, not the folders, that lie directly below."""
        import obstore

        with asking(self.bucket, self):
            found = obstore.list_with_delimiter(self.bucket.store, self.key or None)["objects"]
        return (RemotePath(self.bucket, each["path"]) for each in found)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Objects below, as many levels as the pattern has, whose names match part by part."""
        parts = pattern.split("/")
        below = self.iterdir() if len(parts) == 1 else (path for path, _ in self.walk())
        for path in below:
            names = path.relative_to(self).parts
            if len(names) == len(parts) and all(map(fnmatchcase, names, parts)):
                yield path

    def _list(self) -> Iterator[ObjectMeta]:
        import obstore

        with asking(self.bucket, self):
            for found in obstore.list(self.bucket.store, self.key or None, chunk_size=LISTED):
                yield from found

    def read_bytes(self) -> bytes:
        """The whole object. Raises `FileNotFoundError`."""
        import obstore

        with asking(self.bucket, self):
            return bytes(obstore.get(self.bucket.store, self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The whole object, held in memory, for reading."""
        if mode != "rb":
            raise ValueError(f"{self}: objects are opened to read bytes, not as {mode!r}; `put` writes them.")
        return io.BytesIO(self.read_bytes())

    def read_range(self, start: int, length: int) -> memoryview:
        """So many bytes from `start` on, fewer where the object ends. Raises `FileNotFoundError`."""
        import obstore

        return self._part(lambda: obstore.get_range(self.bucket.store, self.key, start=start, length=length))

    def read_tail(self, length: int) -> memoryview:
        """The last bytes, all of them if there are fewer. Raises `FileNotFoundError`."""
        import obstore

        if self.bucket.scheme == "az":  # has no ranges that count from the end
            size = self.stat().st_size
            return self.read_range(max(0, size - length), min(size, length)) if size else memoryview(b"")
        suffix: Any = {"range": {"suffix": length}}
        return self._part(lambda: obstore.get(self.bucket.store, self.key, options=suffix).bytes())

    def _part(self, ask: Callable[[], Any]) -> memoryview:
        """What is asked for, or nothing if the object ends before that."""
        try:
            with asking(self.bucket, self):
                return memoryview(ask())
        except EOFError:
            return memoryview(b"")
        except StoreError as error:
            if "non-partial" in str(error) and not self.stat().st_size:
                return memoryview(b"")  # some servers give all of an empty object instead of refusing
            raise

    def read_version(self) -> tuple[bytes, Version, float]:
        """The whole object, which writing of it that is, and when it was written. Raises `FileNotFoundError`."""
        import obstore

        with asking(self.bucket, self):
            found = obstore.get(self.bucket.store, self.key)
            meta = found.meta
            data = bytes(found.bytes())
        return data, Version(meta["e_tag"], meta["version"]), meta["last_modified"].timestamp()

    def version(self) -> Version:
        """Which writing of the object is there. Raises `FileNotFoundError`."""
        import obstore

        with asking(self.bucket, self):
            found = obstore.head(self.bucket.store, self.key)
        return Version(found["e_tag"], found["version"])

    def write_bytes(self, data: bytes) -> int:
        """Write the object, as `put` does; returns the number of bytes."""
        self.put(data)
        return len(data)

    def put(self, data: bytes | memoryview) -> Version:
        """Write the object, whole or not at all; one that is there is replaced."""
        return self._put(data, "overwrite")

    def put_new(self, data: bytes | memoryview) -> Version:
        """Write the object if there is none, else raise `FileExistsError`: of several that do so at once, one succeeds."""
        return self._put(data, "create")

    def put_over(self, data: bytes | memoryview, version: Version) -> Version:
        """Replace this version of the object; raises `FileExistsError` if it is no longer there, or another is."""
        return self._put(data, {key: value for key, value in version._asdict().items() if value is not None})

    def _put(self, data: bytes | memoryview, mode: Any) -> Version:
        import obstore

        with asking(self.bucket, self):
            done = obstore.put(self.bucket.store, self.key, data, mode=mode, use_multipart=False)
        return Version(done["e_tag"], done["version"])

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove the object; whether there was one is not known."""
        import obstore

        with asking(self.bucket, self):
            obstore.delete(self.bucket.store, self.key)


AnyPath = Path | RemotePath
"""Where something lies: here or in a store."""


def any_path(address: str | AnyPath) -> AnyPath:
    """The folder or prefix that an address means. Raises `UsageError` for one that cannot be used."""
    if isinstance(address, RemotePath):
        return address
    text = str(address)
    if isinstance(address, Path):
        if re.match(r"(s3|gs|az|file):/", text):
            raise UsageError(f"{text}: give an address as text, not as a Path, which drops one of its slashes.")
        return address
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://([^/]*)/*(.*)", text)
    if found is None:
        return Path(text)
    scheme, place, rest = found[1].lower(), found[2], found[3].rstrip("/")
    if scheme == "file":
        if place not in ("", "localhost"):
            raise UsageError(f"{text}: expected file:///FOLDER, a folder of this machine.")
        return Path("/" + urllib.parse.unquote(rest))
    if scheme not in SETTINGS:
        raise UsageError(f"{text}: no such store.{suggest(scheme, [*SETTINGS, 'file'])}")
    if not place or any(part in ("", ".", "..") for part in (rest or "x").split("/")):
        raise UsageError(f"{text}: expected {scheme}://BUCKET/PREFIX.")
    return RemotePath(Bucket(scheme, place), rest)
