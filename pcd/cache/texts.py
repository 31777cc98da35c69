"""Text embeddings beside the columns: one small Zarr array per encoder and list of phrases.

`text/ENCODER/PHRASES/` is named by the first 16 digits of the encoder's digest and of the digest of the phrases. The metadata
is written last and carries the SHA-256 of the embeddings: it is to a text what a commit record is to a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from pcd.cache.shards import CRC_BYTES, intact
from pcd.errors import CorruptError
from pcd.files import read_json
from pcd.fingerprint import digest
from pcd.remote import AnyPath

TEXT = "text"
METADATA, CHUNK = "zarr.json", "c/0/0"
NAME_DIGITS = 16

Embeddings = npt.NDArray[np.float32]


def text_folder(root: AnyPath, encoder: str, phrases: Sequence[str]) -> AnyPath:
    """Where the embeddings of `phrases` by the encoder of that digest lie."""
    return root / TEXT / encoder[:NAME_DIGITS] / digest(list(phrases))[:NAME_DIGITS]


def text_folders(root: AnyPath) -> list[AnyPath]:
    """All folders of text embeddings that have their metadata."""
    return sorted(file.parent for file in (root / TEXT).glob(f"*/*/{METADATA}"))


def text_files(encoder: str, phrases: Sequence[str], embeddings: Embeddings, *, digested: bool = True) -> dict[str, bytes]:
    """The files of one array, by path inside its folder, the metadata last.

    `embeddings` is `(len(phrases), D)`; without `digested` as earlier versions wrote it, without SHA-256.
    """
    store = MemoryStore()
    sha256 = {"sha256": hashlib.sha256(embeddings.astype("<f4").tobytes()).hexdigest()} if digested else {}
    array = zarr.create_array(
        store,
        shape=embeddings.shape,
        chunks=embeddings.shape,
        dtype="float32",
        compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True},
        dimension_names=("phrase", "channel"),
        attributes={"encoder": encoder, "phrases": list(phrases), **sha256},
    )
    array[:] = embeddings
    return {key: store._store_dict[key].to_bytes() for key in sorted(store._store_dict)}  # "c/..." before "zarr.json"


def read_attributes(folder: AnyPath) -> dict[str, Any]:
    """Encoder digest, phrases and, unless an earlier version wrote it, SHA-256 of one array.

    Raises `CorruptError` if they cannot be read or do not belong into this folder.
    """
    try:
        attributes: dict[str, Any] = read_json(folder / METADATA)["attributes"]
        belongs = text_folder(folder.parents[2], attributes["encoder"], attributes["phrases"]) == folder
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{folder / METADATA}: the metadata of text embeddings is damaged ({error}).") from None
    if not belongs:
        raise CorruptError(f"{folder / METADATA} speaks of another encoder or other phrases than its folder's name.")
    return attributes


def read_text(folder: AnyPath) -> tuple[str, list[str], Embeddings]:
    """Encoder digest, phrases and embeddings `(len(phrases), D)` of one array.

    Raises `CorruptError` for a file that is damaged, gone or of another text.
    """
    attributes = read_attributes(folder)
    phrases, file = attributes["phrases"], folder / CHUNK
    stored = file.read_bytes() if file.is_file() else b""
    if not intact(stored) or (len(stored) - CRC_BYTES) % (4 * len(phrases)):
        raise CorruptError(f"{file}: the text embeddings are {'damaged (crc32c or length)' if stored else 'gone'}.")
    data = stored[:-CRC_BYTES]
    if "sha256" in attributes and hashlib.sha256(data).hexdigest() != attributes["sha256"]:
        raise CorruptError(f"{file} holds other text embeddings than its metadata says (SHA-256).")
    return attributes["encoder"], phrases, np.frombuffer(data, dtype="<f4").reshape(len(phrases), -1).astype(np.float32)


def metadata_of(encoder: str, phrases: Sequence[str], embeddings: Embeddings, *, digested: bool) -> dict[str, Any]:
    """What the array's metadata should say."""
    value: dict[str, Any] = json.loads(text_files(encoder, phrases, embeddings, digested=digested)[METADATA])
    return value
