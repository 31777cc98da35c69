"""Predict: images through encoder and head to depth maps that a person can look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pcd import depths
from pcd.datasets.files import read_rgb
from pcd.device import resolve_device
from pcd.encoders import create_encoder
from pcd.errors import FingerprintError, MissingFileError, RunError, UsageError
from pcd.evaluation.pictures import Panel, save_panels
from pcd.evaluation.pixels import combine_views, native_prediction
from pcd.evaluation.protocol import Upsample
from pcd.fingerprint import differences
from pcd.progress import SILENT, Progress
from pcd.stages.runs import Run
from pcd.views import ViewPlan, image_canvas, to_views

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
VIEWS_AT_ONCE = 16
WIDE = 2.0
"""Images this many times wider than high stand above their depth, others beside it."""


@dataclass(frozen=True)
class Prediction:
    """Depth of one image: float32 `(H, W)` in metres, at the image's own size."""

    depth: npt.NDArray[np.float32]
    plan: ViewPlan


class Predictor:
    """A run with its encoder, ready for images of any size and aspect."""

    def __init__(
        self,
        run: Run,
        *,
        checkpoint: str = "abs_rel",
        weights: str | None = None,
        device: str = "auto",
        tta: bool = True,
        upsample: Upsample = "bilinear",
    ) -> None:
        """Loads the head and the encoder it was trained on.

        `weights` says where the encoder's weights are now, if not where they were. Raises `WeightsError`, and
        `FingerprintError` if they are not the weights the run was trained on.
        """
        self.run = run
        self._device = torch.device(resolve_device(device))
        self._upsample, self._tta = upsample, tta
        self._head, self.epoch = run.load_head(checkpoint, self._device)
        if len(run.info["encoders"]) != 1:
            raise RunError(f"{run.root} was trained on {len(run.info['encoders'])} encoders; predict knows how to run one.")
        table = next(iter(run.info["encoders"].values()))["table"]
        options = {key: value for key, value in table.items() if key != "name"}
        if weights is not None:
            options["weights"] = weights
        self._encoder = create_encoder(table["name"], options, run.plan.view_size, device, "encoder")
        self._refuse_other_weights()

    def _refuse_other_weights(self) -> None:
        """Half precision on another device is the same network; anything else is not."""
        found = {**self._encoder.fingerprint(), "precision": None}
        for fingerprint in self.run.info["columns"].values():
            lines = differences(found, {**fingerprint["encoder"], "precision": None})
            if lines:
                shown = "\n".join(f"  {line}" for line in lines)
                raise FingerprintError(
                    f"{self.run.root} was trained on tokens of another encoder:\n{shown}\nGive --weights PATH."
                )

    def plan_for(self, height: int, width: int) -> ViewPlan:
        """The view plan for an image: the dataset's crop if it has the size of the dataset's frames, else all of it."""
        plan = self.run.plan
        whole = [height, width] != self.run.info["frame"]
        return replace(plan, crop=None if whole else plan.crop, flips=self._tta)

    def predict(self, rgb: npt.NDArray[np.uint8]) -> Prediction:
        """Depth of an RGB uint8 image `(H, W, 3)`. Raises `UsageError` for another shape or dtype."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            raise UsageError(f"predict takes RGB uint8 (H, W, 3); got {rgb.dtype} {rgb.shape}.")
        height, width = rgb.shape[:2]
        plan = self.plan_for(height, width)
        views = to_views(image_canvas(rgb, plan), plan).transpose(0, 3, 1, 2)
        patches = torch.cat([self._patches(views[at : at + VIEWS_AT_ONCE]) for at in range(0, len(views), VIEWS_AT_ONCE)])
        combined = combine_views(patches.reshape(1, plan.views, *self.run.grid), plan, tta=self._tta)
        depth = native_prediction(combined, plan, (height, width), self._upsample, "edge")[0]
        return Prediction(depth.cpu().numpy().astype(np.float32), plan)

    @torch.inference_mode()
    def _patches(self, views: npt.NDArray[np.float32]) -> torch.Tensor:
        columns = self._encoder.encode(torch.from_numpy(np.ascontiguousarray(views)))
        reads = self._head.reads(self._head.options)
        return self._head.depth({name: columns[name].to(self._device) for name in reads}).float()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files: those named, and those inside the folders named, sorted.

    Raises `MissingFileError` for what is not there and `UsageError` if nothing is left.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise MissingFileError(f"{path} is not there; give image files or folders of them.")
    if not found:
        raise UsageError(f"no image in {', '.join(map(str, paths))}; looked for {', '.join(SUFFIXES)}.")
    return found


def predict_files(
    predictor: Predictor, images: Iterable[Path], out: Path, progress: Progress = SILENT
) -> Iterator[dict[str, Any]]:
    """Predict files one by one: `NAME.depth.png` (16 bit), `NAME.npy` (metres) and `NAME.picture.png`; yields what was written.

    Two images of one name get numbers, so that nothing is overwritten.
    """
    taken: dict[str, int] = {}
    for path in images:
        rgb = read_rgb(path)
        prediction = predictor.predict(rgb)
        taken[path.stem] = taken.get(path.stem, 0) + 1
        name = path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"
        yield {"image": str(path), **save_prediction(out, name, rgb, prediction.depth, predictor.run)}
        progress.advance()


def save_prediction(
    out: Path, name: str, rgb: npt.NDArray[np.uint8], depth: npt.NDArray[np.float32], run: Run
) -> dict[str, Any]:
    """Write the three files of one prediction; returns their paths, the PNG's units per metre and the range in metres."""
    out.mkdir(parents=True, exist_ok=True)
    units = depths.units_for(float(depth.max()))
    files = {"png": out / f"{name}.depth.png", "npy": out / f"{name}.npy", "picture": out / f"{name}.picture.png"}
    if not cv2.imwrite(str(files["png"]), depths.encode(depth, units)):
        raise OSError(f"{files['png']} could not be written")
    np.save(files["npy"], depth)
    title = f"{name}: {depth.min():.2f} to {depth.max():.2f} m" + "".join(f" ({label})" for label in run.labels)
    panels = [Panel("image", rgb), Panel("predicted depth", depth)]
    wide = rgb.shape[1] > WIDE * rgb.shape[0]
    save_panels(files["picture"], [[panel] for panel in panels] if wide else [panels], title)
    return {
        **{kind: str(path) for kind, path in files.items()},
        "units_per_metre": units,
        "min": float(depth.min()),
        "max": float(depth.max()),
    }
