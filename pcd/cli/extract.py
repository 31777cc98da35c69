"""`pcd extract`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pcd.cli import options
from pcd.cli.app import MAKE, app, reporting


class _OnError(StrEnum):
    stop = "stop"
    skip = "skip"


class _Tokens(StrEnum):
    float16 = "float16"
    int8 = "int8"


_Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Share the work among the workers of this dask scheduler, e.g. tcp://HOST:8786.",
        show_default="work here",
    ),
]
_Part = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only every N-th range of samples, for job arrays without a scheduler: parts may be written at once.",
        show_default="all",
    ),
]


_Sweep = Annotated[
    str | None,
    typer.Option(
        metavar="SWEEP",
        help="What every variant of this sweep reads, a pass for each of their encoders; --encoder is that of variants which "
        "name none.",
        show_default=False,
    ),
]


@app.command(rich_help_panel=MAKE, epilog="Example: pcd extract --dataset kitti --root /data/kitti")
def extract(
    dataset: Annotated[str, typer.Option(help="nyu, kitti, folder, synthetic, or a name from an installed package.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the dataset.", show_default=False)] = None,
    cache: Annotated[str | None, options.cache("Folder of the cache, or s3://..., gs://..., az://...", "cache/DATASET")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="openclip:MODEL/TAG, timm:MODEL, pixels, sam:MODEL, folder, ...",
            show_default="the recipe's, ViT-L-14-336-quickgelu/openai",
        ),
    ] = None,
    weights: options.Weights = None,
    limit: Annotated[int | None, typer.Option(help="At most N samples of each list.", show_default=False)] = None,
    device: options.Device = "auto",
    recipe: options.Recipe = None,
    set_: options.Set = None,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Encode mirrored views too (needed for flip TTA).")] = True,
    on_error: Annotated[_OnError, typer.Option(help="What to do with a sample that cannot be read.")] = _OnError.stop,
    batch: Annotated[int | None, typer.Option(help="Views per encoder batch.", show_default="by device")] = None,
    tokens: Annotated[
        _Tokens | None,
        typer.Option(
            help="Store patch tokens as float16, or as int8 in half the bytes, which changes them a little.",
            show_default="as the cache has them, float16 in a new one",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes here that share the work, each with an encoder; GPUs in turn.")
    ] = 1,
    dask: _Dask = None,
    part: _Part = None,
    sweep: _Sweep = None,
) -> None:
    """Run the frozen encoder once over every view and keep the tokens and patch depths in a cache."""
    from pcd.stages.extract import extract as run_stage
    from pcd.stages.needs import shipped_recipes
    from pcd.stages.sweep_needs import extraction_recipes

    resolved, *others = extraction_recipes(
        sweep, dataset, recipe, set_ or (), root=root, encoder=encoder, weights=weights, limit=limit, flips=flips
    )
    with reporting() as progress:
        run_stage(
            resolved,
            cache or Path("cache") / dataset,
            device=device,
            on_error=on_error.value,
            batch_views=batch,
            tokens=tokens.value if tokens else None,
            also=shipped_recipes(dataset),
            together=others,
            workers=workers,
            dask=dask,
            part=part,
            progress=progress,
        )
