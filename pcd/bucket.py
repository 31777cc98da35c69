"""A bucket of an object store: how it is reached, and what its errors say to a person.

Credentials and endpoints come from the environment. The stores are reached through obstore, which is imported only when one is
asked for something.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pcd.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

RETRIES = 5
"""How often a request is repeated that met a lost connection, a timeout or an error of the server (5xx)."""
RETRY_TIME = timedelta(seconds=120)
"""After so long a request is not repeated any more."""
CONNECT_TIME, REQUEST_TIME = timedelta(seconds=10), timedelta(seconds=300)
"""The longest that connecting, and one request as a whole (a shard of 100 MB, say), may take."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), AWS_REGION, for a server of your own "
    "AWS_ENDPOINT_URL; AWS_SKIP_SIGNATURE=true reads a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (a key file); GOOGLE_SKIP_SIGNATURE=true reads a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; AZURE_SKIP_SIGNATURE=true reads a public container",
}
"""Variables of the environment that matter, by scheme."""
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")
"""Are asked for credentials when the environment has none."""
REFUSED = ("401 Unauthorized", "403 Forbidden", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Bucket:
    """A bucket of a store. It is opened when first asked, also in the process into which it was pickled."""

    def __init__(self, scheme: str, name: str) -> None:
        self.scheme = scheme
        self.name = name
        self._process = 0
        self._store: S3Store | GCSStore | AzureStore

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.scheme, self.name)

    @property
    def url(self) -> str:
        """Such as `s3://bucket`."""
        return f"{self.scheme}://{self.name}"

    @property
    def store(self) -> S3Store | GCSStore | AzureStore:
        """obstore's own. Raises `StoreError` in a forked process, which has none of the threads that talk to it."""
        if not self._process:
            self._store, self._process = self._open(), os.getpid()
        if self._process != os.getpid():
            raise StoreError(f"{self.url} was opened before this process was forked; start processes anew (spawn) instead.")
        return self._store

    def _open(self) -> S3Store | GCSStore | AzureStore:
        from obstore import store
        from obstore.exceptions import BaseError

        backoff: Any = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=10), "base": 2}
        retry: Any = {"max_retries": RETRIES, "retry_timeout": RETRY_TIME, "backoff": backoff}
        plain = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
        client: Any = {"connect_timeout": CONNECT_TIME, "timeout": REQUEST_TIME, "allow_http": plain}
        kinds: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
        try:
            opened: S3Store | GCSStore | AzureStore = kinds[self.scheme](self.name, client_options=client, retry_config=retry)
        except BaseError as error:
            raise StoreError(f"{self.url} cannot be opened: {_reason(error)}. {_remedy(self.scheme)}") from error
        return opened


@contextmanager
def asking(bucket: Bucket, address: object) -> Iterator[None]:
    """Errors of the store in pcd's words.

    Raises `StoreError`; `FileNotFoundError` for no such object, `FileExistsError` for one that somebody else has written,
    `EOFError` for a range beyond its end.
    """
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise FileExistsError(errno.EEXIST, "somebody else has written it", str(address)) from None
    except (FileNotFoundError, exceptions.BaseError) as error:
        text = str(error)
        missing = isinstance(error, FileNotFoundError)
        if missing and not any(word in text for word in NO_BUCKET):
            raise FileNotFoundError(errno.ENOENT, "no such object", str(address)) from None
        if "416 Range Not Satisfiable" in text or "InvalidRange" in text:
            raise EOFError(f"{address} ends before that") from None
        raise StoreError(_told(bucket, address, text, error)) from error


def _told(bucket: Bucket, address: object, text: str, error: Exception) -> str:
    """What is wrong with an address, and what to do."""
    reason = _reason(error)
    if any(word in text for word in NO_BUCKET):
        what = f"there is no bucket {bucket.name} there ({reason}). Make it, or correct the address."
    elif any(word in text for word in METADATA_SERVERS) or "credential" in text.lower():
        what = f"there are no credentials for it ({reason})."
    elif "501 Not Implemented" in text or "NotImplemented" in text:
        what = f"this store lacks something that pcd needs, probably conditional writes ({reason})."
    elif any(word in text for word in REFUSED):
        what = f"the store refuses ({reason}). Are these the right credentials, and may they do that there?"
    else:
        what = (
            f"the store cannot be reached, or fails ({reason}). Look after network and server, then give the same command "
            "again: what is finished is kept."
        )
    return f"{address}: {what} {_remedy(bucket.scheme)}"


def _remedy(scheme: str) -> str:
    return f"The environment says where and who: {SETTINGS[scheme]}."


def _reason(error: Exception) -> str:
    """The first lines of an error of obstore's, without its inner life; the codes of an XML answer instead of the answer."""
    text = str(error).partition("\n\nDebug source")[0].strip()
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    text = text.partition("<?xml")[0].rstrip(": \n") + (f": {code[1]}" if code else "") + (f", {message[1]}" if message else "")
    return " ".join(text.split())
