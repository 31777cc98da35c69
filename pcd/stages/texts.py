"""Text embeddings beside the columns: keyed by encoder and phrases, made while the encoder is loaded anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcd.cache import Cache
from pcd.fingerprint import digest
from pcd.progress import Progress

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder


def lacks_texts(cache: Cache, phrases: Sequence[Sequence[str]]) -> bool:
    """Whether some of these lists of phrases could be embedded and are not."""
    encoder = encoder_digest(cache)
    return encoder is not None and any(cache.text(encoder, texts) is None for texts in phrases)


def encoder_digest(cache: Cache) -> str | None:
    """Digest of the encoder whose texts lie beside the columns, or None if it has no text tower or is not known yet."""
    for entry in cache.manifest.columns.values():
        encoder = entry.fingerprint.get("encoder")
        if encoder is not None:
            return digest(encoder) if encoder.get("text", True) else None
    return None


def embed_texts(cache: Cache, encoder: Encoder, phrases: Sequence[Sequence[str]], progress: Progress) -> None:
    """Store the embeddings of those lists of phrases that are not there yet; without a text tower say so."""
    if not encoder.has_text:
        if phrases:
            progress.say("The weights have no text tower: no text embeddings; train with head.table_init = tokens or random.")
        return
    name = digest(encoder.fingerprint())
    for texts in phrases:
        if cache.text(name, texts) is None:
            cache.add_text(name, texts, encoder.embed_text(texts).numpy())
