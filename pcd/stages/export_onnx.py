"""Export to ONNX: encoder and head of a run as one file, checked against pcd before it is there."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

import pcd
from pcd.encoders.base import Encoder
from pcd.encoders.weights import state_digest
from pcd.errors import PcdError, UsageError
from pcd.evaluation.protocol import Upsample
from pcd.export.graph import DepthNetwork
from pcd.export.onnx import OnnxModel, check_onnx, require_onnx, write_onnx
from pcd.export.staging import staging
from pcd.files import publish
from pcd.fingerprint import canonical
from pcd.heads.base import has_distribution
from pcd.progress import SILENT, Progress
from pcd.stages.predict import Predictor
from pcd.stages.run_encoder import load_exportable
from pcd.stages.runs import Run

TOLERANCE = 1e-4
"""How far 99 of 100 pixels may be from pcd, as a share of their depth."""
OUTLIERS = 10
"""The last pixel may be so many times as far. On real runs float32 itself leaves 1e-4 to 3e-4 in a few patches, in torch as in
onnxruntime (both against float64): patch tokens are rounded to float16, and those near the middle go to either side.
"""


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from pcd: at most in metres, and as a share of each pixel's depth at most and for 99 of 100."""

    metres: float
    relative: float
    relative_99: float

    @staticmethod
    def of(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], depth: npt.NDArray[np.float32]) -> Difference:
        """Of two maps of one image, in metres."""
        away = np.abs(found - expected)
        share = away / depth
        return Difference(float(away.max()), float(share.max()), float(np.quantile(share, 0.99)))

    def or_worse(self, other: Difference) -> Difference:
        """The larger of both, number by number."""
        return Difference(
            max(self.metres, other.metres), max(self.relative, other.relative), max(self.relative_99, other.relative_99)
        )

    def is_within(self, tolerance: float) -> bool:
        """Whether 99 of 100 pixels are within `tolerance` and all within ten times that; not for NaN."""
        return self.relative_99 <= tolerance and self.relative <= OUTLIERS * tolerance


@dataclass(frozen=True)
class OnnxExport:
    """What was written, how far it is from `Predictor` by output, and seconds: of the export, and for one image by either."""

    files: list[Path]
    differences: dict[str, Difference]
    seconds: float
    onnx_seconds: float
    pcd_seconds: float
    metadata: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "files": {str(file): file.stat().st_size for file in self.files}}


def export_onnx(
    run: Run,
    out: Path,
    *,
    checkpoint: str = "abs_rel",
    weights: str | None = None,
    tta: bool = True,
    upsample: Upsample = "bilinear",
    tolerance: float = TOLERANCE,
    progress: Progress = SILENT,
) -> OnnxExport:
    """Write encoder and head as the ONNX file `out`, run it with onnxruntime, and keep it if it predicts what pcd does.

    Everything is in fp32, also for a run on fp16 tokens. Raises `UsageError` without the packages of the extra `onnx` or for an
    encoder that cannot be exported, `FingerprintError` for other weights, and `PcdError` if depth is not that of pcd within
    `tolerance` (see `Difference.is_within`); then, as after any error, `out` is what it was.
    """
    require_onnx()
    if out.suffix != ".onnx" or out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a file that ends in .onnx.")
    run = _in_fp32(run)
    encoder, (head, epoch) = load_exportable(run, weights), run.load_head(checkpoint, torch.device("cpu"))
    frame = (run.info["frame"][0], run.info["frame"][1])
    network = DepthNetwork(encoder.network(), head, run.plan, frame, tta=tta, upsample=upsample)
    metadata = _metadata(run, network, encoder, checkpoint, epoch)
    reference = Predictor(
        run,
        checkpoint=checkpoint,
        weights=weights,
        device="cpu",
        tta=tta,
        upsample=upsample,
        uncertainty=has_distribution(head, run.info["shapes"]),
    )
    with staging(out) as folder:
        progress.say("tracing the network")
        start = time.perf_counter()
        files = write_onnx(network, folder / out.name, metadata)
        seconds = time.perf_counter() - start
        progress.say("checking the file with onnxruntime")
        check_onnx(files[0])
        found, onnx_seconds, pcd_seconds = _compare(OnnxModel(files[0]), reference, frame)
        _refuse_differences(found, tolerance, out)
        for file in reversed(files):  # the weights beside the model come first
            publish(file, out.parent / file.name)
    return OnnxExport([out.parent / file.name for file in files], found, seconds, onnx_seconds, pcd_seconds, metadata)


def _in_fp32(run: Run) -> Run:
    """The run with an encoder in fp32, whatever its recipe asks for."""
    encoders = {
        name: {**entry, "table": {**entry["table"], "precision": "fp32"}} for name, entry in run.info["encoders"].items()
    }
    return replace(run, info={**run.info, "encoders": encoders})


def _metadata(run: Run, network: DepthNetwork, encoder: Encoder, checkpoint: str, epoch: int) -> dict[str, str]:
    """What a stranger must know of the file: texts only, as ONNX wants it; what is no plain text is JSON."""
    depth_range = [run.recipe.head["min_depth"], run.recipe.head["max_depth"]]
    facts = {
        "pcd": pcd.__version__,
        "run": run.name,
        "checkpoint": checkpoint,
        "epoch": epoch,
        "units": "metres",
        "depth_range": depth_range,
        "input": "RGB float32 in [0, 1], (N, 3, H, W)",
        "labels": run.labels,
        "dataset": run.info["dataset"]["name"],
        "encoder": next(iter(run.info["encoders"].values()))["table"]["name"],
        "encoder_weights": encoder.fingerprint()["weights"],
        "head_weights": state_digest(network.head.state_dict()),
        "views": network.plan.as_json(),
        "frame": list(network.frame),
        "tta": network.plan.flips,
        "upsample": network.upsample,
        "precision": "fp32",
    }
    return {key: value if isinstance(value, str) else canonical(value) for key, value in facts.items()}


def check_images(frame: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    """Two images to compare predictions on: smooth colours and noise, of another size than the frames and of theirs."""
    generator = np.random.default_rng(0)
    images = []
    for height, width in ((frame[0] * 2 // 3 + 1, frame[1] // 2 + 1), frame):
        smooth = cv2.resize(generator.uniform(20, 235, (6, 8, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
        images.append(np.clip(smooth + generator.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8))
    return images


def _compare(model: OnnxModel, reference: Predictor, frame: tuple[int, int]) -> tuple[dict[str, Difference], float, float]:
    """The largest differences by output, and seconds for an image of the size of the frames by the model and by pcd."""
    found: dict[str, Difference] = {}
    for rgb in check_images(frame):
        start = time.perf_counter()
        prediction = reference.predict(rgb)
        depth = prediction.depth
        between = time.perf_counter()
        outputs = model.predict(rgb.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
        seconds = time.perf_counter() - between, between - start
        expected = {"depth": depth, **({"uncertainty": prediction.std} if reference.uncertainty else {})}
        for name, values in expected.items():
            difference = Difference.of(outputs[name][0, 0], values, depth)
            found[name] = difference.or_worse(found[name]) if name in found else difference
    return found, *seconds


def _refuse_differences(found: dict[str, Difference], tolerance: float, out: Path) -> None:
    for name, difference in found.items():
        if not difference.is_within(tolerance):
            raise PcdError(
                f"{out} was not written: its {name} differs from pcd's by up to {difference.metres:.2g} m, which is "
                f"{difference.relative:.2g} of the depth there (allowed: {OUTLIERS * tolerance:g}) and up to "
                f"{difference.relative_99:.2g} for 99 % of the pixels (allowed: {tolerance:g}). If that is little enough for "
                "you, give --tolerance."
            )
