"""A server of the S3 protocol on the loopback, which speaks it for real and keeps its objects in memory."""

from __future__ import annotations

import http.client
import logging
import re
from collections.abc import Iterator

import obstore
import pytest
from moto.server import ThreadedMotoServer

from pcd import bucket
from pcd.cache.objects import at_once
from pcd.remote import RemotePath, any_path

BUCKET = "depth-caches"
LOGIN = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"


class Server:
    """The server, which can be stopped and started again; what it holds lives on."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        self.ask("PUT", f"/{BUCKET}")

    def start(self) -> None:
        """On the port it had before."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> int:
        """A request of our own; the status of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers={"Content-Length": "0", "Authorization": LOGIN, **(headers or {})})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A running server with an empty bucket, which the environment names."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    found = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setattr(bucket, "RETRIES", 1)
        yield found
    found.stop()


@pytest.fixture
def store(server: Server, request: pytest.FixtureRequest) -> RemotePath:
    """A prefix of its own for each test."""
    return remote(re.sub(r"\W+", "-", request.node.name).strip("-"))


def remote(name: str) -> RemotePath:
    """The prefix of that name."""
    found = any_path(f"s3://{BUCKET}/{name}")
    assert isinstance(found, RemotePath)
    return found


def objects_of(root: RemotePath) -> dict[str, bytes]:
    """All objects of a cache but its provenance, by their place in it."""
    paths = [path for path, _ in root.walk() if path.name != "provenance.jsonl"]
    return dict(zip((path.relative_to(root).as_posix() for path in paths), at_once(RemotePath.read_bytes, paths), strict=True))


def copied(source: RemotePath, target: RemotePath) -> RemotePath:
    """Another prefix that holds the same objects."""

    def copy(path: RemotePath) -> None:
        obstore.copy(path.bucket.store, path.key, (target / path.relative_to(source)).key)

    at_once(copy, [path for path, _ in source.walk()])
    return target
