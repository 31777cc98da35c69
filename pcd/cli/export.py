"""`pcd export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcd.cli import options
from pcd.cli.app import MAKE, app, errors, output, print_json, print_notes, reporting

if TYPE_CHECKING:
    from pcd.stages.export_bundle import BundleExport
    from pcd.stages.export_onnx import OnnxExport


class _Form(StrEnum):
    onnx = "onnx"
    bundle = "bundle"


@app.command(
    rich_help_panel=MAKE,
    epilog="Example: pcd export runs/nyu --to onnx --out nyu.onnx; pcd export runs/nyu --to bundle --out nyu-depth",
)
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    to: Annotated[_Form, typer.Option(help="onnx: one file for any ONNX runtime. bundle: a folder to publish.")],
    out: Annotated[Path, typer.Option(help="The .onnx file, or the folder of the bundle.")],
    checkpoint: Annotated[str, typer.Option(help="A metric (its best epoch) or last.")] = "abs_rel",
    weights: options.Weights = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="onnx: average with the mirrored image.")] = True,
    upsample: Annotated[options.Upsample, typer.Option(help="onnx: how patches become pixels.")] = options.Upsample.bilinear,
    tolerance: Annotated[
        float,
        typer.Option(help="onnx: how far from pcd 99 % of the pixels may be, as a share of depth.", min=0),
    ] = 1e-4,
    with_encoder: Annotated[bool, typer.Option("--with-encoder", help="bundle: put the encoder's image weights in.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="bundle: licence of the weights, e.g. mit.", show_default="left to you")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="bundle: write into a folder that holds something else.")] = False,
    json: options.Json = False,
) -> None:
    """A run as one ONNX file, checked against pcd, or as a bundle: weights, recipe, scores and a model card."""
    from pcd.stages.export_bundle import export_bundle
    from pcd.stages.export_onnx import export_onnx
    from pcd.stages.runs import open_run

    opened = open_run(run)
    result: OnnxExport | BundleExport
    with reporting() as progress:
        if to is _Form.onnx:
            result = export_onnx(
                opened,
                out,
                checkpoint=checkpoint,
                weights=weights,
                tta=tta,
                upsample=upsample.value,
                tolerance=tolerance,
                progress=progress,
            )
        else:
            result = export_bundle(
                opened, out, checkpoint=checkpoint, weights=weights, with_encoder=with_encoder, licence=licence, force=force
            )
    print_notes(opened.labels)
    if json:
        print_json(result.as_json())
    else:
        _print(result)


def _print(result: OnnxExport | BundleExport) -> None:
    from pcd.stages.export_onnx import OnnxExport

    if isinstance(result, OnnxExport):
        for file in result.files:
            output.print(f"{file}: {file.stat().st_size / 1e6:.1f} MB", soft_wrap=True, markup=False)
        for name, difference in result.differences.items():
            shares = f"{difference.relative:.1e} of the depth there; 99 % of the pixels within {difference.relative_99:.1e}"
            output.print(f"{name}: at most {difference.metres:.1e} m from pcd, {shares}", soft_wrap=True, markup=False)
        ratio = result.pcd_seconds / result.onnx_seconds
        output.print(f"one image: onnxruntime {result.onnx_seconds:.2f} s, pcd {result.pcd_seconds:.2f} s ({ratio:.2f} x)")
        return
    for name, facts in result.files.items():
        output.print(f"{result.root / name}: {facts['bytes'] / 1e6:.2f} MB", soft_wrap=True, markup=False)
    scores = ", ".join(result.evaluations) or "none; `pcd evaluate` before exporting puts them in"
    output.print(f"scores in the card: {scores}", soft_wrap=True, markup=False)
    if result.left_out:
        errors.print(f"note: left out, of other epochs: {', '.join(result.left_out)}", style="yellow", soft_wrap=True)
    for note in result.notes:
        errors.print(f"note: {note}", style="yellow", soft_wrap=True)
