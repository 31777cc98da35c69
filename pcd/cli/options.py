"""Options that several commands share, spelled once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Upsample(StrEnum):
    """How patches become pixels; the values are those of `pcd.evaluation.pixels.Upsample`."""

    nearest = "nearest"
    bilinear = "bilinear"
    bilinear_align_corners = "bilinear-align-corners"


class Place(StrEnum):
    """Where columns are held while training; the values are those of `train.residency`."""

    auto = "auto"
    device = "device"
    host = "host"
    stream = "stream"


def cache(help: str, default: str | None = None) -> Any:
    """An option that names a cache: a folder or an address, as text, since a `Path` would lose a slash of `s3://`."""
    return typer.Option(metavar="PATH", help=help, show_default=default or False)


Recipe = Annotated[str | None, typer.Option(help="Recipe: a name in pipelines/ or a TOML file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. head.dropout=0.1. Repeatable."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Residency = Annotated[
    Place | None,
    typer.Option(
        help="Where columns are held while training: in the device's memory, in this machine's, or read from the cache batch "
        "by batch. Results are the same.",
        show_default="the recipe's",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(help="Encoder weights: auto (published), random (asked for by name only), or a file.", show_default=False),
]
Run = Annotated[Path | None, typer.Option(help="Run folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
