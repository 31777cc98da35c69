"""Addresses and what lies at them: like pathlib on a real S3 server, and clear words where the store cannot be used."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import obstore
import pytest

from pcd.cache import Cache
from pcd.errors import CacheError, CorruptError, StoreError, UsageError
from pcd.remote import RemotePath, any_path
from tests.store_support import BUCKET, Server, server, store

__all__ = ["server", "store"]


def test_addresses() -> None:
    assert any_path("cache/nyu") == Path("cache/nyu")
    assert any_path(Path("cache")) == Path("cache")
    for text in ("file:///data/my%20cache", "file://localhost/data/my%20cache/", "FILE:///data/my cache"):
        assert any_path(text) == Path("/data/my cache")
    for text in ("s3://bucket/a/b", "gs://bucket/a/b", "az://bucket/a/b"):
        found = any_path(f"{text}/")
        assert isinstance(found, RemotePath)
        assert str(found) == str(found.resolve()) == text
        assert any_path(found) is found
    assert str(any_path("s3://bucket")) == str(any_path("s3://bucket/")) == "s3://bucket"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s4://bucket/x", "Did you mean 's3'"),
        ("http://host/x", "no such store"),
        ("s3:///x", "s3://BUCKET/PREFIX"),
        ("s3://bucket/a/../b", "s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "s3://BUCKET/PREFIX"),
        ("file://host/x", "folder of this machine"),
    ],
)
def test_addresses_that_cannot_be_used(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        any_path(text)
    assert text in str(error.value)
    with pytest.raises(UsageError, match="as text, not as a Path"):
        any_path(Path("s3://bucket/x"))


def test_names_are_those_of_pathlib() -> None:
    root = any_path("s3://bucket/a/b")
    assert isinstance(root, RemotePath)
    twin = PurePosixPath("/bucket/a/b")
    for way in ("c/0/0", "x.json", "."):
        for ours, theirs in ((root / way, twin / way), (root.joinpath("t", way), twin.joinpath("t", way))):
            assert str(ours) == f"s3:/{theirs}"
            assert ours.name == theirs.name
            assert str(ours.parent) == f"s3:/{theirs.parent}"
            assert ours.relative_to(root) == theirs.relative_to(twin)
            assert str(ours.with_name("n")) == f"s3:/{theirs.with_name('n')}"
    assert [str(parent) for parent in (root / "c").parents] == ["s3://bucket/a/b", "s3://bucket/a", "s3://bucket"]
    assert root / "c" in {root / "c"}
    assert root.parent.parent.parent == root.parent.parent
    assert pickle.loads(pickle.dumps(root / "c")) == root / "c"


def test_objects_are_like_files(store: RemotePath, tmp_path: Path) -> None:
    """What both say after the same writing is compared name by name."""
    for name in ("a", "b.json", "t/x/1.json", "t/x/2.json", "t/y/1.json", "tt/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
        (store / name).write_bytes(name.encode() * 10)
    for name in ("a", "t", "t/x", "t/x/2.json", "none", "t/x/none"):
        ours, theirs = store / name, tmp_path / name
        assert (ours.is_file(), ours.is_dir(), ours.exists()) == (theirs.is_file(), theirs.is_dir(), theirs.exists())
    assert (store / "a").stat().st_size == (tmp_path / "a").stat().st_size
    assert abs((store / "a").stat().st_mtime - (tmp_path / "a").stat().st_mtime) < 5
    assert (store / "t/x/1.json").read_text() == (tmp_path / "t/x/1.json").read_text()
    with (store / "t/x/1.json").open("rb") as handle:
        assert handle.read() == (tmp_path / "t/x/1.json").read_bytes()
    for pattern in ("*", "*.json", "t/*/1.json", "t/x/*"):
        theirs_found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file()}
        assert {path.relative_to(store).as_posix() for path in store.glob(pattern)} == theirs_found
    assert {path.relative_to(store).as_posix() for path, _ in store.walk()} == {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    (store / "a").unlink()
    assert not (store / "a").exists()
    for call in (RemotePath.read_bytes, RemotePath.stat, RemotePath.version, RemotePath.read_version):
        with pytest.raises(FileNotFoundError, match="/a'"):
            call(store / "a")


def test_ranges(store: RemotePath) -> None:
    data = bytes(range(200))
    path = store / "x"
    path.put(data)
    for start, length in ((0, 200), (3, 5), (190, 30), (199, 1), (200, 1), (999, 5)):
        assert bytes(path.read_range(start, length)) == data[start : start + length]
    for length in (1, 50, 200, 500):
        assert bytes(path.read_tail(length)) == data[-length:]
    path.put(b"")
    assert bytes(path.read_tail(4)) == bytes(path.read_range(0, 4)) == b""


def test_of_several_who_write_at_once_one_succeeds(store: RemotePath) -> None:
    path = store / "x"
    first = path.put_new(b"first")
    with pytest.raises(FileExistsError, match="somebody else"):
        path.put_new(b"second")
    assert path.read_version()[:2] == (b"first", first)
    second = path.put_over(b"second", first)
    with pytest.raises(FileExistsError, match="somebody else"):
        path.put_over(b"third", first)
    assert (path.read_bytes(), path.version()) == (b"second", second)
    path.unlink()
    with pytest.raises(FileExistsError, match="somebody else"):
        path.put_over(b"third", second)
    assert not path.exists()


def test_no_such_bucket(server: Server) -> None:
    root = any_path("s3://no-such-bucket/cache")
    assert isinstance(root, RemotePath)
    asked: list[Callable[[], object]] = [
        (root / "x").read_bytes,
        root.is_dir,
        lambda: (root / "x").put(b""),
        lambda: (root / "x").put_new(b""),
        lambda: list(root.iterdir()),
        lambda: Cache.open(root),
    ]
    for ask in asked:
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/cache.*: there is no bucket no-such-bucket there.*Make it"):
            ask()
    with pytest.raises(CacheError, match=f"s3://{BUCKET}/nothing is not a pcd cache: .*`pcd extract --cache s3://{BUCKET}/not"):
        Cache.open(f"s3://{BUCKET}/nothing")


def test_no_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is at the address where a machine in a cloud would be asked for them: here it is one of the loopback."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{server.port}/nothing")
    with pytest.raises(StoreError, match="s3://depth-caches/cache") as error:
        Cache.open(f"s3://{BUCKET}/cache")
    assert "AWS_ACCESS_KEY_ID" in str(error.value)
    assert "AWS_SKIP_SIGNATURE=true" in str(error.value)


def test_what_is_public_and_what_is_not(server: Server, store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that nobody has signed."""
    for name in ("x", "secret"):
        (store / name).put(name.encode())
    assert server.ask("PUT", f"/{BUCKET}/{store.key}/x?acl", {"x-amz-acl": "public-read"}) == 200
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    unsigned = any_path(str(store))
    assert (unsigned / "x").read_bytes() == b"x"
    with pytest.raises(StoreError, match=f"{store}/secret: the store refuses .*403 Forbidden.*Are these the right credentials"):
        (unsigned / "secret").read_bytes()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_refused(server: Server, store: RemotePath, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """As S3 answers; the server of these tests lets everybody in."""
    answer = f'Server returned 403 Forbidden: <?xml version="1.0"?><Error><Code>{code}</Code><Message>No.</Message></Error>'

    def refuse(*_: object, **__: object) -> None:
        raise obstore.exceptions.PermissionDeniedError(answer)

    monkeypatch.setattr(obstore, "head", refuse)
    with pytest.raises(StoreError) as error:
        Cache.open(store)
    assert f"{store}/manifest.json: the store refuses (Server returned 403 Forbidden: {code}, No.)" in str(error.value)
    assert "may they do that there? The environment says where and who: AWS_ACCESS_KEY_ID" in str(error.value)


def test_nobody_there(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"/manifest.json: the store cannot be reached, or fails .*after 1 retries.*AWS_END"):
        Cache.open(str(store))


def test_a_forked_process_is_told(store: RemotePath) -> None:
    """It would wait for ever for threads that it does not have."""
    assert not store.exists()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            store.exists()
        except StoreError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"before this process was forked" in os.read(read, 1000)
    os.close(read)
    os.close(write)


def test_a_manifest_that_is_damaged(store: RemotePath) -> None:
    (store / "manifest.json").put(b"{")
    with pytest.raises(CorruptError, match=f"{store}/manifest.json is damaged"):
        Cache.open(store)


def test_all_three_kinds_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of theirs is here: only that obstore takes the address, retries and limits as we give them."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    for scheme, kind in (("s3", "S3Store"), ("gs", "GCSStore"), ("az", "AzureStore")):
        path = any_path(f"{scheme}://bucket/x")
        assert isinstance(path, RemotePath)
        assert type(path.bucket.store).__name__ == kind
