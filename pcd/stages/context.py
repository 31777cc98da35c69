"""What a head may look at before training: texts, the text tower they come from, the training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pcd.cache import Cache
from pcd.encoders.base import TextTower, Worded
from pcd.errors import CacheError, FingerprintError, TextTowerError
from pcd.fingerprint import differences
from pcd.heads.base import Batch
from pcd.stages.origin import Origin, Place
from pcd.stages.texts import text_digest, worded_column
from pcd.training.rows import TrainingRows


class TrainingContext:
    """See `pcd.heads.base.Context`; `columns` are those that the head reads."""

    def __init__(self, cache: Cache, rows: TrainingRows, columns: Sequence[str]) -> None:
        self._cache = cache
        self._rows = rows
        self._columns = columns

    def text(self, phrases: Sequence[str]) -> Tensor:
        """Text embeddings stored beside the columns, of the encoder of the first column read that has a text tower."""
        encoder = text_digest(self._cache, self._columns)
        if encoder is None:
            raise TextTowerError(
                f"{self._cache.root} was made with weights that have no text tower, and this head needs the text embeddings of "
                f"{phrases[0]!r} ... {phrases[-1]!r}. Extract with weights that have one. The pureclip head can also start "
                'without: head.table_init = "tokens" or "random".'
            )
        stored = self._cache.text(encoder, phrases)
        if stored is None:
            raise CacheError(
                f"{self._cache.root} lacks the text embeddings of {phrases[0]!r} ... {phrases[-1]!r}. "
                "`pcd extract` with this recipe (--recipe NAME) adds them in seconds; no view is encoded again."
            )
        return torch.from_numpy(stored)

    def text_tower(self) -> TextTower:
        """The tower that those embeddings come from, loaded from the weights that the extraction was given.

        Raises `TextTowerError` if there is none that can be trained through, `FingerprintError` for other weights than then.
        """
        column = worded_column(self._cache, self._columns)
        if column is None:
            raise TextTowerError(
                f"{self._cache.root}: no encoder of {', '.join(self._columns)} has a text tower, and this head learns words in "
                "front of one. Extract with weights that have it."
            )
        key = self._cache.manifest.encoder_of(column)
        assert key is not None
        encoder, made_by = Origin(self._cache, Place(device="cpu")).encoder(key), self._cache.manifest.columns[column]
        if lines := differences(encoder.fingerprint(), made_by.fingerprint["encoder"]):
            shown = "\n".join(f"  {line}" for line in lines)
            raise FingerprintError(f"the text tower is not that of the encoder of {self._cache.root}:\n{shown}")
        if not isinstance(encoder, Worded):
            raise TextTowerError(
                f"encoder {key!r} offers no text tower that gradients pass through (pcd.encoders.base.Worded)."
            )
        return encoder.text_tower()

    def batches(self) -> Iterator[Batch]:
        """The training rows once."""
        return self._rows.once()
