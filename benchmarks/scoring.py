"""How long scoring takes, and what it is compared with.

    python benchmarks/scoring.py [--images 654] [--family nyu] [--boundary]

Scores random predictions of NYU size (480x640 frames, 336x336 canvas, 24x24 patches, flip TTA) or KITTI size (375x1242,
336x1344, four tiles) under five protocols in one pass, and prints seconds and peak memory beyond the start: for the means, for
all that `pcd evaluate` gathers beside them (tables by depth, the analysis, bootstrap intervals), and for the straightforward
way: OpenCV resize to the frame and the textbook formulas on whole float64 arrays, protocol by protocol.
All use this process only; the share of the machine it got is the quotient of processor and wall time.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pcd.evaluation.analysis import Analysis
from pcd.evaluation.pixels import combine_views
from pcd.evaluation.protocols import Protocol, get_protocol
from pcd.evaluation.scoring import Scorer
from pcd.stages.evaluate import DEPTH_BINS
from pcd.views import ViewPlan, crop_region, depth_canvas

NAMES = {
    "nyu": ("pureclip", "pureclip-paper", "eigen-nyu", "depthclip-nyu", "tr2m-nyu"),
    "kitti": ("pureclip", "pureclip-paper", "eigen-kitti-garg", "eigen-kitti-garg-kb", "eigen-kitti-eigen"),
}
PLANS = {
    "nyu": ViewPlan(canvas=(336, 336), crop=(40, 470, 38, 603)),
    "kitti": ViewPlan(canvas=(336, 1344), grid=(1, 4)),
}
FRAMES = {"nyu": (480, 640, 0.75, 10.0), "kitti": (375, 1242, 0.19, 80.0)}
"""Height, width, share of pixels with depth, range in metres."""
BATCH = 8

Frame = npt.NDArray[np.float32]


def make(family: str) -> tuple[torch.Tensor, torch.Tensor, list[Frame]]:
    """One batch of predictions `(8, views, 24, 24)` and ground truth on the canvas and as stored."""
    height, width, share, far = FRAMES[family]
    rng = np.random.default_rng(0)
    native = [rng.uniform(0.5, far, (height, width)).astype(np.float32) for _ in range(BATCH)]
    for frame in native:
        frame[rng.random(frame.shape) >= share] = np.nan
    canvas = np.stack([depth_canvas(frame, PLANS[family], "nearest") for frame in native])
    patches = rng.uniform(0.5, far, (BATCH, PLANS[family].views, 24, 24)).astype(np.float32)
    return torch.from_numpy(patches), torch.from_numpy(canvas), native


def plain(protocol: Protocol, patches: npt.NDArray[np.float64], canvas: Frame, native: Frame, plan: ViewPlan) -> list[float]:
    """The straightforward way for one sample (tiles taken together)."""
    if protocol.resolution == "canvas":
        gt, size = canvas, canvas.shape
        pred = cv2.resize(patches, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    else:
        gt = native
        top, bottom, left, right = crop_region(plan, *gt.shape)
        pred = np.zeros(gt.shape)
        pred[top:bottom, left:right] = cv2.resize(patches, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
    top, bottom, left, right = protocol.region_in(*gt.shape)
    valid = np.zeros(gt.shape, dtype=bool)
    valid[top:bottom, left:right] = True
    valid &= (gt > protocol.min_depth) & (gt < protocol.max_depth)
    p, g = np.clip(pred[valid], protocol.min_depth, protocol.max_depth), gt[valid].astype(np.float64)
    thresh = np.maximum(g / p, p / g)
    e = np.log(p) - np.log(g)
    return [
        float(np.mean(np.abs(g - p) / g)),
        float(np.mean((g - p) ** 2 / g)),
        float(np.sqrt(np.mean((g - p) ** 2))),
        float(np.sqrt(np.mean((np.log(g) - np.log(p)) ** 2))),
        float(np.mean(np.abs(np.log10(g) - np.log10(p)))),
        float(100 * np.sqrt(np.mean(e**2) - np.mean(e) ** 2)),
        float(np.mean(np.abs(g - p))),
        float(np.mean(p - g)),
        *(float((thresh < bound).mean()) for bound in (1.25, 1.25**2, 1.25**3, 1.05, 1.1)),
    ]


def timed(work: Callable[[], None], images: int, words: str) -> None:
    """Run and print."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{words:34s} {wall:7.1f} s  {processor:7.1f} s of processor  {1e3 * wall / images:6.1f} ms an image  +{grown:.0f} MB"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=654)
    parser.add_argument("--family", choices=sorted(NAMES), default="nyu")
    parser.add_argument("--boundary", action="store_true", help="also boundary F1")
    given = parser.parse_args()
    plan = PLANS[given.family]
    protocols = [get_protocol(name, given.family, (1e-3, FRAMES[given.family][3])) for name in NAMES[given.family]]
    patches, canvas, native = make(given.family)
    scorer = Scorer(protocols, plan, boundary=given.boundary)
    analysis = Analysis(protocols[0])
    whole = Scorer(protocols, plan, depth_bins=DEPTH_BINS, boundary=given.boundary, watch=analysis.pixels)

    def ours(scorer: Scorer = scorer) -> None:
        for start in range(0, given.images, BATCH):
            number = min(BATCH, given.images - start)
            keys = [str(start + at) for at in range(number)]
            scorer.add(keys, patches[:number], canvas[:number], native[:number])

    def everything() -> None:
        ours(whole)
        analysis.as_json()
        for scores in whole.scores.values():
            scores.intervals()

    def straightforward() -> None:
        for at in range(given.images):
            sample = at % BATCH
            combined = combine_views(patches[sample : sample + 1].double(), plan)[0].numpy()
            for protocol in protocols:
                plain(protocol, combined, canvas[sample].numpy(), native[sample], plan)

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, numpy {np.__version__}, torch {torch.__version__}")
    print(f"{given.images} predictions of {given.family} size under {', '.join(p.label for p in protocols)}:")
    timed(ours, given.images, "pcd, means")
    timed(everything, given.images, "pcd, as evaluate does")
    timed(straightforward, given.images, "straightforward NumPy and OpenCV")
    print("mean AbsRel: " + ", ".join(f"{label} {s['metrics']['abs_rel']:.4f}" for label, s in scorer.summary().items()))


if __name__ == "__main__":
    main()
