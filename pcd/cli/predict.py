"""`pcd predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pcd.cli import options
from pcd.cli.app import LOOK, app, output, print_json, print_notes, reporting
from pcd.errors import UsageError
from pcd.prediction.saves import DEFAULT, Save

HOW, PICTURES, CLOUD = "How depth is predicted", "Pictures", "Point clouds (--save ply)"


Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Images, videos, .npy arrays of RGB uint8 (H, W, 3) or (N, H, W, 3), folders of images and videos, or quoted "
        "patterns such as 'scans/**/*.png'.",
        show_default=False,
    ),
]
Saves = Annotated[
    list[Save] | None,
    typer.Option(
        metavar="KIND",
        help="What to write, repeatable: png (16 bit, mm, or 1/256 m beyond 65 m); npy, tiff, exr (float32 metres, in exr "
        "channel Z); picture (image and coloured depth with a scale); side-by-side (the two at full size, nothing else); "
        "video (that as one .mp4 per video); ply (point cloud); uncertainty (standard deviation in metres: .npy, picture).",
        show_default=", ".join(DEFAULT),
    ),
]
Overlap = Annotated[
    float, typer.Option(metavar="FRACTION", help="Overlap of neighbouring tiles, blended; 0 to 0.9.", rich_help_panel=HOW)
]
Scales = Annotated[
    str, typer.Option(metavar="S,S,...", help="Enlarge the canvas by each factor; average.", rich_help_panel=HOW)
]
Batch = Annotated[
    int | None,
    typer.Option(
        help="Images that go through the encoder together.",
        show_default="as many as give 16 views on a CPU, 128 on a GPU",
        rich_help_panel=HOW,
    ),
]
Range = Annotated[
    str | None,
    typer.Option(
        "--range",
        metavar="NEAR,FAR",
        help="Metres of the first and last colour.",
        show_default="2nd to 98th percentile of the image, or of a video's first frame and a quarter more on both sides",
        rich_help_panel=PICTURES,
    ),
]
Camera = Annotated[
    str | None, typer.Option(metavar="FX,FY,CX,CY", help="Camera in pixels.", show_default=False, rich_help_panel=CLOUD)
]
Fov = Annotated[
    float | None,
    typer.Option(metavar="DEGREES", help="Or its horizontal field of view.", show_default=False, rich_help_panel=CLOUD),
]
Stride = Annotated[int, typer.Option(help="Only every so many-th pixel of both axes.", rich_help_panel=CLOUD)]


@app.command(rich_help_panel=LOOK, epilog="Example: pcd predict photo.jpg clip.mp4 'scans/**/*.png' --run runs/nyu --out depth")
def predict(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")],
    run: Annotated[Path | None, typer.Option(help="Run folder.", show_default="the newest under runs/")] = None,
    save: Saves = None,
    weights: options.Weights = None,
    checkpoint: Annotated[str, typer.Option(help="A metric (its best epoch) or last.", rich_help_panel=HOW)] = "abs_rel",
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average with the mirrored image.", rich_help_panel=HOW)] = True,
    upsample: Annotated[
        options.Upsample, typer.Option(help="How patches become pixels.", rich_help_panel=HOW)
    ] = options.Upsample.bilinear,
    overlap: Overlap = 0.0,
    scales: Scales = "1",
    batch: Batch = None,
    device: options.Device = "auto",
    span: Range = None,
    intrinsics: Camera = None,
    fov: Fov = None,
    stride: Stride = 1,
    json: options.Json = False,
) -> None:
    """Depth of images, videos and arrays: maps in metres, pictures, point clouds, uncertainty."""
    from pcd.prediction.pointcloud import parse_intrinsics
    from pcd.prediction.sources import find_sources
    from pcd.prediction.writers import Output
    from pcd.stages.predict import Predictor, predict_files
    from pcd.stages.runs import newest_run, open_run

    saves = tuple(save or DEFAULT)
    camera = None if intrinsics is None else parse_intrinsics(intrinsics)
    wanted = Output(out, saves, camera, fov, stride, _range(span))
    factors = _numbers("scales", scales)
    sources = find_sources(inputs)
    with reporting() as progress:
        opened = open_run(run) if run else newest_run()
        predictor = Predictor(
            opened,
            checkpoint=checkpoint,
            weights=weights,
            device=device,
            tta=tta,
            upsample=upsample.value,
            overlap=overlap,
            scales=factors,
            uncertainty=Save.uncertainty in saves,
            batch=batch,
        )
        for note in predictor.notes:
            progress.say(note)
        progress.start("predicting", sum(source.frames for source in sources), "images")
        written = list(predict_files(predictor, sources, wanted, progress))
    print_notes(opened.labels)
    print_json(written) if json else print_written(written)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{option} {text}: expected numbers separated by commas.") from None


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    numbers = _numbers("range", text)
    if len(numbers) != 2:
        raise UsageError(f"--range {text}: expected NEAR,FAR in metres.")
    return numbers[0], numbers[1]


def print_written(written: list[dict[str, Any]]) -> None:
    """A line per image, or per video: its range and its files, of a video those of the first frame."""
    for item in _by_input(written):
        frames = f" ({item['frames']} frames)" if "frames" in item else ""
        paths = [_path(kind, item) for kind in item if kind in _SHOWN]
        output.print(
            f"{item['image']}{frames}: {item['min']:.2f} to {item['max']:.2f} m -> {', '.join(paths)}",
            soft_wrap=True,
            markup=False,
        )


_SHOWN = {*Save, "uncertainty-picture"}


def _by_input(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The frames of one video taken together."""
    inputs: list[dict[str, Any]] = []
    for item in written:
        if item.get("frame", 0) == 0:
            inputs.append({**item, "frames": 1} if "frame" in item else item)
            continue
        last = inputs[-1]
        last["frames"] += 1
        last["min"], last["max"] = min(last["min"], item["min"]), max(last["max"], item["max"])
    return inputs


def _path(kind: str, item: dict[str, Any]) -> str:
    if kind != "png":
        return str(item[kind])
    unit = "mm" if item["units_per_metre"] == 1000 else f"1/{item['units_per_metre']} m"
    return f"{item['png']} ({unit})"
