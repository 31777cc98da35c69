"""The text towers of open_clip: checks of phrases, and a tower that gradients pass through."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from pcd.encoders.openclip_names import Architecture, find_tokenizer, open_clip
from pcd.errors import TextTowerError, UsageError


def check_lengths(phrases: Sequence[str], tokenizer: Any) -> None:
    """Raise `UsageError` for one string in place of a list, and for a phrase that is longer than the tower's context."""
    if isinstance(phrases, str):
        raise UsageError("texts are given as a list of phrases, not one string.")
    if not hasattr(tokenizer, "encode"):
        return
    for phrase in phrases:
        length = len(tokenizer.encode(phrase)) + 2  # start and end of text
        if length > tokenizer.context_length:
            raise UsageError(
                f"phrase of {length} tokens, but the text tower takes {tokenizer.context_length}: {phrase[:60]!r}..."
            )


class OpenClipText:
    """A frozen text tower, float32; see `pcd.encoders.base.TextTower` for the interface.

    It has weights of its own: moving it leaves the encoder where it is. Those of an encoder in half precision are what that
    computes with, brought to float32.
    """

    def __init__(self, architecture: Architecture, model: nn.Module, digest: str) -> None:
        """`model` is open_clip's, with a native text tower. Raises `TextTowerError` for another form of it, or no tokenizer."""
        self._tokenizer = find_tokenizer(architecture)
        self._parts = _Parts(architecture.name, model)
        self.digest = digest
        self.width = self._parts.width
        self.context = self._parts.context

    def tokens(self, phrases: Sequence[str]) -> torch.Tensor:
        """See `TextTower.tokens`; on the CPU. Raises `UsageError` for a phrase that is too long."""
        check_lengths(phrases, self._tokenizer)
        if not phrases:
            return torch.empty(0, self.context, dtype=torch.int64)
        return cast(torch.Tensor, self._tokenizer(list(phrases)))

    def needed(self, tokens: torch.Tensor) -> int:
        """See `TextTower.needed`: up to the last end of a sentence, if no token sees those behind it."""
        return self._parts.needed(tokens)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `(n, L, width)` of token numbers, on the tower's device, before positions are added."""
        return cast(torch.Tensor, self._parts.token_embedding(tokens.to(self._parts.positions.device)))

    def encode(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Text embeddings `(n, D)` of embedded tokens, as `encode_text` from there on. Gradients reach `embeddings`."""
        return cast(torch.Tensor, self._parts(embeddings, tokens.to(embeddings.device)))

    def to(self, device: torch.device) -> OpenClipText:
        """The same tower, moved to a device."""
        self._parts.to(device)
        return self


class _Parts(nn.Module):
    """What of a model embeds text: `CLIP` has the parts at its top, `CustomTextCLIP` in a module of their own."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        custom = isinstance(model, open_clip.CustomTextCLIP)
        source: Any = model.text if custom else model
        if custom and (source.cls_emb is not None or source.use_pad_mask):
            raise TextTowerError(
                f"The text tower of {name} adds a CLS token or masks its padding, which depends on more than embedded words; "
                "words can be learned in front of text towers that read out the end of a sentence. Choose another model."
            )
        self.token_embedding = _frozen(source.token_embedding)
        self.transformer = _frozen(source.transformer)
        self.ln_final = _frozen(source.ln_final)
        self.positions = _constant(source.positional_embedding)
        self.projection: Any = source.text_projection
        if isinstance(self.projection, nn.Module):
            self.projection = _frozen(self.projection)
        elif self.projection is not None:
            self.projection = _constant(self.projection)
        mask = None if source.attn_mask is None else source.attn_mask.detach().float().cpu().clone()
        self.mask: torch.Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        self.pool_type = source.pool_type if custom else source.text_pool_type
        self.eos = source.eos_id if custom else source.text_eos_id
        self.context, self.width = int(source.context_length), int(source.token_embedding.weight.shape[1])

    def needed(self, tokens: torch.Tensor) -> int:
        ends = {"argmax": tokens, "eos": (tokens == self.eos).int()}
        if self.mask is None or self.pool_type not in ends or not len(tokens):
            return self.context
        return int(ends[self.pool_type].argmax(dim=1).max()) + 1

    def forward(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        length = embeddings.shape[1]
        mask = None if self.mask is None else self.mask[:length, :length]
        x = self.ln_final(self.transformer(embeddings + self.positions[:length], attn_mask=mask))
        x = open_clip.transformer.text_global_pool(x, tokens, self.pool_type, eos_token_id=self.eos)
        if self.projection is None:
            return cast(torch.Tensor, x)
        return cast(torch.Tensor, self.projection(x) if isinstance(self.projection, nn.Module) else x @ self.projection)


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().cpu().eval().requires_grad_(False)


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float().cpu().clone(), requires_grad=False)
