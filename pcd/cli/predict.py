"""`pcd predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json, print_notes, reporting


@app.command(rich_help_panel=LOOK, epilog="Example: pcd predict photo.jpg --run runs/nyu --out depth")
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the depth maps.")],
    run: Annotated[Path | None, typer.Option(help="Run folder.", show_default="the newest under runs/")] = None,
    weights: options.Weights = None,
    checkpoint: Annotated[str, typer.Option(help="A metric (its best epoch) or last.")] = "abs_rel",
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average with the mirrored image.")] = True,
    upsample: Annotated[options.Upsample, typer.Option(help="How patches become pixels.")] = options.Upsample.bilinear,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Depth maps of images: 16-bit PNG, .npy in metres, and a picture with a scale in metres."""
    from pcd.stages.predict import Predictor, find_images, predict_files
    from pcd.stages.runs import newest_run, open_run

    files = find_images(images)
    with reporting() as progress:
        opened = open_run(run) if run else newest_run()
        predictor = Predictor(opened, checkpoint=checkpoint, weights=weights, device=device, tta=tta, upsample=upsample.value)
        progress.start("predicting", len(files), "images")
        written = list(predict_files(predictor, files, out, progress))
    print_notes(opened.labels)
    if json:
        print_json(written)
        return
    for item in written:
        unit = "mm" if item["units_per_metre"] == 1000 else f"1/{item['units_per_metre']} m"
        output.print(
            f"{item['image']}: {item['min']:.2f} to {item['max']:.2f} m -> {item['png']} ({unit}), {item['picture']}",
            soft_wrap=True,
        )
