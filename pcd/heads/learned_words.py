"""Sentences with learned vectors in the place of words, through a frozen text tower.

The tower is no part of the module: it is attached for training, is neither saved nor optimised, and what it makes of the
learned words is kept as a buffer, so that a trained head needs no tower to evaluate and predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pcd.device import without_autocast
from pcd.encoders.base import TextTower
from pcd.errors import RecipeError, TextTowerError
from pcd.heads.words import fitting_text

SHARED, OWN = "{shared}", "{own}"
"""Where the vectors stand that all sentences share, and those that a sentence has for itself."""
SPREAD = 0.02
"""Standard deviation of the vectors at first (CoOp, Auty & Mikolajczyk)."""
_WORD, _OTHER = "x", "q"
"""Two words of one token each that hold the places; where tokens differ between them is where vectors go."""


@dataclass(frozen=True)
class _Attached:
    """A tower, the tokens of the sentences with placeholders `(K, L)`, their embeddings, and where vectors go `(K, n)`."""

    tower: TextTower
    tokens: Tensor
    fixed: Tensor
    rows: Tensor
    shared_at: Tensor
    own_at: Tensor

    def to(self, device: torch.device) -> _Attached:
        tensors = (self.tokens, self.fixed, self.rows, self.shared_at, self.own_at)
        return _Attached(self.tower.to(device), *(tensor.to(device) for tensor in tensors))


class LearnedWords(nn.Module):
    """K sentences with learned vectors as text embeddings `(K, D)`.

    In training they go through the attached tower at every call, and gradients with them. In evaluation mode they are the
    buffer `text`, which is brought up to date whenever the module is put into evaluation mode while a tower is attached, and
    when a state is taken in training mode: it belongs to the weights there are at that moment, averaged ones for example.
    """

    text: Tensor

    def __init__(self, sentences: Sequence[str], shared: int, own: int, token_width: int, width: int) -> None:
        """`sentences` name the places `{shared}` and `{own}` if there are `shared` vectors for all, and `own` for each of them.

        `token_width` is that of the tower's tokens and `width` that of its text embeddings. Raises `RecipeError` for sentences
        without a place for vectors.
        """
        super().__init__()
        for count, place in ((shared, SHARED), (own, OWN)):
            if count and (bad := [sentence for sentence in sentences if sentence.count(place) != 1]):
                raise RecipeError(f"head: {bad[0]!r} must name the place of its learned vectors, {place}, once.")
        self._sentences = tuple(sentences)
        self._token_width = token_width
        self.shared = nn.Parameter(torch.randn(shared, token_width) * SPREAD) if shared else None
        self.own = nn.Parameter(torch.randn(len(sentences), own, token_width) * SPREAD) if own else None
        self.register_buffer("text", torch.zeros(len(sentences), width))
        self._attached: _Attached | None = None
        self.register_state_dict_pre_hook(_before_state)  # type: ignore[no-untyped-call]

    def attach(self, tower: TextTower) -> None:
        """Learn with this tower from now on. Raises `RecipeError` for one of other widths, `UsageError` for long sentences."""
        if tower.width != self._token_width:
            raise RecipeError(
                f"head.token_width = {self._token_width}, and the tokens of this text tower are {tower.width} wide; "
                f"set head.token_width = {tower.width}."
            )
        with torch.no_grad():
            tokens, word = self._tokens(tower, _WORD, _WORD), tower.tokens([_WORD]).cpu()
            is_word = torch.isin(tokens, word[word != tower.tokens([_OTHER]).cpu()])
            shared_at = self._places(tokens != self._tokens(tower, _OTHER, _WORD), is_word, self.shared)
            own_at = self._places(tokens != self._tokens(tower, _WORD, _OTHER), is_word, self.own)
            rows, tokens = torch.arange(len(tokens))[:, None], tokens[:, : tower.needed(tokens)]
            self._attached = _Attached(tower, tokens, tower.embed(tokens), rows, shared_at, own_at).to(self.text.device)
            self.text.copy_(fitting_text(self.through_tower(), *self.text.shape))

    def forward(self) -> Tensor:
        """Text embeddings `(K, D)`, not normalised. Raises `TextTowerError` in training mode without a tower."""
        return self.through_tower() if self.training else self.text

    def through_tower(self) -> Tensor:
        """The text embeddings of the vectors as they are now `(K, D)`, float32 also under autocast."""
        if self._attached is None:
            raise TextTowerError("no text tower is attached: words can be learned only with weights that have one.")
        attached = self._attached = self._on(self._attached)
        embeddings = attached.fixed
        if self.shared is not None:
            vectors = self.shared.expand(len(self._sentences), -1, -1)
            embeddings = embeddings.index_put((attached.rows, attached.shared_at), vectors)
        if self.own is not None:
            embeddings = embeddings.index_put((attached.rows, attached.own_at), self.own)
        with without_autocast(embeddings):
            return attached.tower.encode(embeddings, attached.tokens)

    def refresh(self) -> None:
        """Bring the buffer up to date if a tower is attached."""
        if self._attached is not None:
            with torch.no_grad():
                self.text.copy_(self.through_tower())

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; the latter brings the buffer up to date."""
        super().train(mode)
        if not mode:
            self.refresh()
        return self

    def _on(self, attached: _Attached) -> _Attached:
        """Where the parameters are. A move within inference mode would make a tower that never again can be trained through."""
        if attached.fixed.device == self.text.device:
            return attached
        with torch.inference_mode(False), torch.no_grad():
            return attached.to(self.text.device)

    def _tokens(self, tower: TextTower, shared: str, own: str) -> Tensor:
        """Tokens of the sentences with these words in the places of vectors, one for each vector."""
        counts = {SHARED: (shared, 0 if self.shared is None else len(self.shared))}
        counts[OWN] = (own, 0 if self.own is None else self.own.shape[1])
        filled = []
        for sentence in self._sentences:
            words = sentence
            for place, (word, count) in counts.items():
                words = words.replace(place, " ".join([word] * count))
            filled.append(words)
        return tower.tokens(filled).cpu()

    def _places(self, differs: Tensor, is_word: Tensor, vectors: nn.Parameter | None) -> Tensor:
        """Token numbers `(K, n)` at which n vectors stand. Raises `RecipeError` if they cannot be told."""
        count = 0 if vectors is None else vectors.shape[-2]
        if not bool(((differs & is_word).sum(dim=1) == count).all() & (differs.sum(dim=1) == count).all()):
            raise RecipeError(
                f"head: the places of {count} learned vectors cannot be told in {self._sentences[0]!r}: the text tower "
                f"does not read {_WORD!r} and {_OTHER!r} as one token each there. Put spaces around them."
            )
        return differs.nonzero()[:, 1].reshape(len(differs), count)


def _before_state(module: Any, prefix: str, keep_vars: bool) -> None:
    """A state taken while training holds the texts of its own weights."""
    if module.training:
        module.refresh()
