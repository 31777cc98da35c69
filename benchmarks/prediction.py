"""What overlapping tiles and several scales do to a prediction, and how much memory a large image takes.

    python benchmarks/prediction.py RUN IMAGES... [--units 1000] [--scales 1 1.5 2] [--overlaps 0 0.5]
    python benchmarks/prediction.py RUN --large 100

The first form scores a run on frames whose ground truth lies beside them (NAME.rgb.EXT and NAME.depth.png, 16 bit, `--units`
per metre, 0 for none): mean over the images of AbsRel and RMSE at their own size, where the truth lies in the head's range,
processor seconds per image and views per image; each scale alone, and averaged with those before it in depth and in log depth.
The second form predicts an image of so many megapixels, twice in a row, and writes it as PNG, .npy, picture, side-by-side
picture and point cloud; it does the same the straightforward way (float copy of the image, whole arrays, cv2.imwrite), each in
a process of its own, and prints their peak memory and processor time.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pcd import depths
from pcd.datasets.files import read_depth_png, read_rgb
from pcd.evaluation.metrics import masked_metrics
from pcd.prediction.result import Prediction
from pcd.prediction.saves import Save
from pcd.prediction.sources import find_sources
from pcd.prediction.writers import Output
from pcd.stages.predict import Predictor, predict_files
from pcd.stages.runs import Run, open_run
from pcd.views import image_canvas, to_views

Frame = npt.NDArray[np.float32]


def truth_of(image: Path, units: float) -> Frame:
    """The depth map beside an image, in metres."""
    return read_depth_png(image.with_name(image.name.split(".")[0] + ".depth.png"), units)


def score(depth: Frame, truth: Frame, limit: float) -> tuple[float, float]:
    """AbsRel and RMSE in metres of one image."""
    mask = np.isfinite(truth) & (truth <= limit)
    filled = np.where(mask, truth, np.float32(1))
    metrics = masked_metrics(*(torch.from_numpy(part)[None] for part in (depth, filled, mask)))
    return float(metrics["abs_rel"]), float(metrics["rmse"])


def in_log_depth(prediction: Prediction) -> Frame:
    """The geometric instead of the arithmetic mean of the scales."""
    logs = [np.log(replace(prediction, patches=[patches]).depth) for patches in prediction.patches]
    return np.asarray(np.exp(np.mean(logs, axis=0)), dtype=np.float32)


def table_row(name: str, maps: Sequence[Frame], frames: Sequence[tuple[Any, Frame]], limit: float, cost: str) -> None:
    """Mean scores over the images."""
    scores = [score(depth, truth, limit) for depth, (_, truth) in zip(maps, frames, strict=True)]
    abs_rel, rmse = np.mean(scores, axis=0)
    print(f"{name:32s}  {abs_rel:6.4f}  {rmse:8.4f}  {cost}", flush=True)


def effect(run: Run, images: Sequence[Path], units: float, scales: Sequence[float], overlaps: Sequence[float]) -> None:
    """Score every scale with every overlap, alone and averaged with the scales before it, and print a table."""
    limit = float(run.recipe.head["max_depth"])
    frames = [(read_rgb(path), truth_of(path, units)) for path in images]

    def predict(predictor: Predictor) -> tuple[list[Prediction], str]:
        predictor.predict(frames[0][0])
        begin = time.process_time()
        predictions = [predictor.predict(rgb) for rgb, _ in frames]
        return predictions, f"{(time.process_time() - begin) / len(frames):7.2f}  {predictor.views:5d}"

    print(f"{'':32s}  AbsRel  RMSE (m)  s/image  views")
    predictions, cost = predict(Predictor(run, tta=False))
    table_row("no flip TTA, scale 1, overlap 0", [item.depth for item in predictions], frames, limit, cost)
    for overlap in overlaps:
        together: list[Prediction] = []
        for scale in scales:
            predictions, cost = predict(Predictor(run, overlap=overlap, scales=[scale]))
            name = f"scale {scale:g}, overlap {overlap:g}"
            table_row(name, [item.depth for item in predictions], frames, limit, cost)
            pairs = zip(together, predictions, strict=True)
            together = [replace(a, patches=[*a.patches, *b.patches]) for a, b in pairs] if together else predictions
            if scale != scales[0]:
                name = f"scales to {scale:g}, overlap {overlap:g}"
                table_row(f"{name}: mean", [item.depth for item in together], frames, limit, "")
                table_row(f"{name}: log", [in_log_depth(item) for item in together], frames, limit, "")


def peak() -> float:
    """Peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def straightforward(predictor: Predictor, image: Path, out: Path) -> None:
    """What anybody would write: everything whole."""
    rgb = read_rgb(image)
    plan = predictor.plan_for(rgb.shape[0], rgb.shape[1])
    to_views(image_canvas(rgb, plan), plan)
    depth = predictor.predict(rgb).depth
    np.save(out / "whole.npy", depth)
    cv2.imwrite(str(out / "whole.png"), depths.encode(depth, depths.units_for(float(depth.max()))))
    shade = cv2.applyColorMap((depth / depth.max() * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    cv2.imwrite(str(out / "whole.side.png"), np.concatenate([rgb[..., ::-1], shade], axis=1))
    rows, columns = np.indices(depth.shape, dtype=np.float32)
    points = np.stack([columns * depth, rows * depth, depth], axis=-1)
    with (out / "whole.bin").open("wb") as handle:
        handle.write(points.tobytes() + rgb.tobytes())


def one_large(run: Run, image: Path, out: Path, whole: bool) -> None:
    """Predict in this process and print its memory."""
    predictor = Predictor(run)
    predictor.predict(np.zeros((480, 640, 3), dtype=np.uint8))
    before, begin = peak(), time.process_time()
    if whole:
        for _ in range(2):
            straightforward(predictor, image, out)
    else:
        saves = (Save.png, Save.npy, Save.picture, Save.side_by_side, Save.ply)
        list(predict_files(predictor, find_sources([image, image]), Output(out, saves, fov=60.0)))
    name = "straightforward" if whole else "pcd"
    seconds = time.process_time() - begin
    print(
        f"{name:18s} peak {peak():5.2f} GB, {before:5.2f} GB before the image was read; {seconds:6.1f} s of processor",
        flush=True,
    )


def large(run: Path, megapixels: float) -> None:
    """Make an image and predict it both ways."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(megapixels * 1e6 / height)
    with tempfile.TemporaryDirectory() as scratch:
        noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        image = Path(scratch) / "large.jpg"
        cv2.imwrite(str(image), cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))
        print(f"{width} x {height} pixels: {3e-9 * width * height:.2f} GB of RGB, {4e-9 * width * height:.2f} GB of depth")
        for way in ("pcd", "straightforward"):
            subprocess.run([sys.executable, __file__, str(run), str(image), "--one", way, "--out", scratch], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--units", type=float, default=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0, 0.5])
    parser.add_argument("--large", type=float, metavar="MEGAPIXELS")
    parser.add_argument("--one", choices=("pcd", "straightforward"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one_large(open_run(given.run), given.images[0], given.out, given.one == "straightforward")
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, numpy {np.__version__}, torch {torch.__version__}")
    if given.large:
        large(given.run, given.large)
    else:
        effect(open_run(given.run), given.images, given.units, given.scales, given.overlaps)


if __name__ == "__main__":
    main()
