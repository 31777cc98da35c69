"""Encoders by name. A new one is a module here and a line below, or an entry point in the group `pcd.encoders`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pcd.recipe import parse_table
from pcd.registry import Registry

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder

registry = Registry("encoder", "pcd.encoders", {"openclip": "pcd.encoders.openclip:OpenClipEncoder"})


def split_name(name: str) -> tuple[str, str]:
    """`openclip:ViT-L-14-336-quickgelu/openai` -> (`openclip`, `ViT-L-14-336-quickgelu/openai`)."""
    kind, _, model = name.partition(":")
    return kind, model


def create_encoder(
    name: str, options: Mapping[str, Any], view_size: tuple[int, int], device: str, where: str = "encoder"
) -> Encoder:
    """Load encoder `name` for views of `view_size` (height, width).

    Raises `UsageError` for an unknown name, `RecipeError` for wrong options, `WeightsError` for weights that are not there.
    """
    kind, model = split_name(name)
    cls = registry.get(kind)
    encoder: Encoder = cls(model, parse_table(cls.Options, options, where), view_size, device)
    return encoder


def request_of(name: str, options: Mapping[str, Any], where: str = "encoder") -> dict[str, Any]:
    """What is asked of an encoder, in plain values, without loading it."""
    kind, model = split_name(name)
    cls = registry.get(kind)
    return {"encoder": kind, **cls.request(model, parse_table(cls.Options, options, where))}
