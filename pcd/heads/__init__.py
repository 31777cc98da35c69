"""Heads by name. A new one is a module here and a line below, or an entry point in the group `pcd.heads`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pcd.recipe import parse_table
from pcd.registry import Registry

if TYPE_CHECKING:
    from pcd.heads.base import Head, HeadOptions

registry = Registry(
    "head",
    "pcd.heads",
    {
        "coarse-refined": "pcd.heads.coarse_refined:CoarseRefinedHead",
        "depth-eigen": "pcd.heads.depth_eigen:DepthEigenHead",
        "auty": "pcd.heads.auty:AutyHead",
        "depthclip": "pcd.heads.depthclip:DepthClipHead",
        "depthclip-adapter": "pcd.heads.depthclip_adapter:DepthClipAdapterHead",
        "dpt-lite": "pcd.heads.dpt_lite:DptLiteHead",
        "hu": "pcd.heads.hu:HuHead",
        "linear": "pcd.heads.linear:LinearHead",
        "mean": "pcd.heads.mean:MeanHead",
        "mlp": "pcd.heads.linear:MlpHead",
        "msa": "pcd.heads.msa:MsaHead",
        "nearest": "pcd.heads.nearest:NearestHead",
        "pureclip": "pcd.heads.pureclip:PureClipHead",
    },
)


def head_options(table: Mapping[str, Any], where: str = "head") -> tuple[type[Head], HeadOptions]:
    """The class named by a `[head]` table and its validated options.

    Raises `UsageError` for an unknown name and `RecipeError` for unknown or wrong keys.
    """
    cls: type[Head] = registry.get(str(table["name"]))
    options = parse_table(cls.Options, {key: value for key, value in table.items() if key != "name"}, where)
    return cls, options
