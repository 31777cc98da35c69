"""Encoders by name. A new one is a module here and a line below, or an entry point in the group `pcd.encoders`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pcd.cache.manifest import encoder_key
from pcd.recipe import parse_table
from pcd.registry import Registry

if TYPE_CHECKING:
    from pcd.encoders.base import Encoder

registry = Registry(
    "encoder",
    "pcd.encoders",
    {
        "openclip": "pcd.encoders.openclip:OpenClipEncoder",
        "timm": "pcd.encoders.timm_models:TimmEncoder",
        "pixels": "pcd.encoders.pixels:PixelEncoder",
        "folder": "pcd.encoders.folder:FolderEncoder",
        "sam": "pcd.encoders.sam:SamEncoder",
    },
)


def split_name(name: str) -> tuple[str, str]:
    """`openclip:ViT-L-14-336-quickgelu/openai` -> (`openclip`, `ViT-L-14-336-quickgelu/openai`)."""
    kind, _, model = name.partition(":")
    return kind, model


def key_of(table: Mapping[str, Any]) -> str:
    """What tells the encoder of an `[encoder]` table apart from others of a cache; see `pcd.cache.manifest.encoder_key`."""
    return encoder_key(split_name(table["name"])[0], str(table.get("prefix", "")))


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


def with_columns(encoder: Encoder, names: Iterable[str]) -> Encoder:
    """The encoder that also makes those of the columns `names` that it makes only when they are asked for.

    Names that are none of its columns are passed over: a head may read columns of several encoders. Raises `UsageError` as
    `Extendable.offers` does.
    """
    from pcd.encoders.base import Extendable

    made = {spec.name for spec in encoder.columns}
    asked = [name for name in dict.fromkeys(names) if name not in made]
    if not isinstance(encoder, Extendable):
        return encoder
    offered = [name for name in asked if encoder.offers(name)]
    return encoder.with_columns(offered) if offered else encoder


def output_of(encoder: Encoder, column: str) -> dict[str, Any]:
    """What determines a column of the encoder beside its fingerprint: nothing, for those that it always makes."""
    from pcd.encoders.base import Extendable

    return dict(encoder.outputs.get(column, {})) if isinstance(encoder, Extendable) else {}


def request_of(name: str, options: Mapping[str, Any], where: str = "encoder") -> dict[str, Any]:
    """What is asked of an encoder, in plain values, without loading it."""
    kind, model = split_name(name)
    cls = registry.get(kind)
    return {"encoder": kind, **cls.request(model, parse_table(cls.Options, options, where))}
