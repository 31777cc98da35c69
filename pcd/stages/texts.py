"""Text embeddings beside the columns: keyed by encoder and phrases, made while the encoder is loaded anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcd.cache import Cache
from pcd.fingerprint import digest
from pcd.progress import Progress

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder


def lacks_texts(cache: Cache, key: str, phrases: Sequence[Sequence[str]]) -> bool:
    """Whether some of these lists of phrases could be embedded by the encoder of that key and are not."""
    encoder = text_digest(cache, [name for name in cache.manifest.columns if cache.manifest.encoder_of(name) == key])
    return encoder is not None and any(cache.text(encoder, texts) is None for texts in phrases)


def worded_column(cache: Cache, columns: Sequence[str]) -> str | None:
    """The first of `columns` whose encoder has a text tower: texts that a head compares with its columns come from there."""
    fingerprints = {name: cache.manifest.columns[name].fingerprint for name in columns if name in cache.manifest.columns}
    return next((name for name, found in fingerprints.items() if found.get("encoder", {}).get("text", False)), None)


def text_digest(cache: Cache, columns: Sequence[str]) -> str | None:
    """Digest of the encoder of `worded_column`, whose texts lie beside the columns; None without one."""
    column = worded_column(cache, columns)
    return None if column is None else digest(cache.manifest.columns[column].fingerprint["encoder"])


def embed_texts(
    cache: Cache, encoder: Encoder, phrases: Sequence[Sequence[str]], progress: Progress, *, last: bool = True
) -> None:
    """Store the embeddings of those lists of phrases that are not there yet.

    If the last encoder has come and none of the cache has a text tower, say so.
    """
    if not encoder.has_text:
        if phrases and last and worded_column(cache, list(cache.manifest.columns)) is None:
            progress.say("The weights have no text tower: no text embeddings; train with head.table_init = tokens or random.")
        return
    name = digest(encoder.fingerprint())
    for texts in phrases:
        if cache.text(name, texts) is None:
            cache.add_text(name, texts, encoder.embed_text(texts).numpy())
