"""Every named protocol against the independent script, on real frames and on adversarial ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcd.evaluation.protocols import CATALOGUE, get_protocol, protocols_for
from pcd.evaluation.scoring import Scorer
from pcd.views import ViewPlan, depth_canvas
from tests.published_scoring import score

NYU = ViewPlan(canvas=(336, 336), crop=(40, 470, 38, 603))
KITTI = ViewPlan(canvas=(336, 1344), grid=(1, 4))
ODD = ViewPlan(canvas=(42, 60), grid=(3, 2))
RANGES = {"nyu": (1e-3, 10.0), "kitti": (1e-3, 80.0), "generic": (0.3, 7.5)}


def read_depth(path: Path, units: int) -> np.ndarray:
    """A 16-bit depth PNG as float32 metres with NaN holes, read without the package."""
    stored = np.asarray(Image.open(path)).astype(np.float32)
    return np.where(stored > 0, stored / np.float32(units), np.float32(np.nan)).astype(np.float32)


def views_for(gts: list[np.ndarray], plan: ViewPlan, cell: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Imperfect predictions `(N, views, gh, gw)`: patch means of the ground truth with errors that differ between the flips."""
    rng = np.random.default_rng(seed)
    height, width = plan.view_size
    gh, gw = height // cell[0], width // cell[1]
    scale = np.nanmedian(np.concatenate([gt.ravel() for gt in gts]))
    views = rng.lognormal(np.log(scale), 0.3, (len(gts), plan.views, gh, gw))
    for n, gt in enumerate(gts):
        canvas = depth_canvas(gt, plan, "nearest")
        for view in range(plan.views):
            mirrored, tile = divmod(view, plan.tiles)
            shown = canvas[:, ::-1] if mirrored else canvas
            row, column = divmod(tile, plan.grid[1])
            part = shown[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for i in range(gh):
                for j in range(gw):
                    block = part[i * cell[0] : (i + 1) * cell[0], j * cell[1] : (j + 1) * cell[1]]
                    if np.isfinite(block).any():
                        views[n, view, i, j] = np.nanmean(block) * rng.lognormal(0, 0.2)
    return views.astype(np.float32)


def check(family: str, plan: ViewPlan, gts: list[np.ndarray], views: np.ndarray, names: list[str]) -> None:
    """Score everything in one pass and compare every metric of every unit, and the means, to 1e-6."""
    protocols = [get_protocol(name, family, RANGES[family]) for name in names]
    canvases = np.stack([depth_canvas(gt, plan, "masked-bilinear") for gt in gts])
    scorer = Scorer(protocols, plan)
    scorer.add([f"frame {n}" for n in range(len(gts))], torch.from_numpy(views), torch.from_numpy(canvases), gts)
    for protocol in protocols:
        expected = []
        for n, gt in enumerate(gts):
            how = None if protocol.alignment == "none" else protocol.alignment
            expected += score(protocol.name, family, views[n], canvases[n], gt, plan, RANGES[family], how)
        rows = scorer.scores[protocol.label].rows()
        assert len(rows) == len(expected), protocol.label
        for row, wanted in zip(rows, expected, strict=True):
            for metric, value in wanted.items():
                np.testing.assert_allclose(row[metric], value, rtol=1e-6, atol=1e-6, err_msg=f"{protocol.label} {metric}")
        summary = scorer.summary()[protocol.label]
        scored = [wanted for wanted in expected if wanted["pixels"]]
        assert summary["excluded"] == len(expected) - len(scored)
        for metric, value in summary["metrics"].items():
            if not scored:
                assert value is None
                continue
            mean = sum(wanted[metric] for wanted in scored) / len(scored)
            assert value == pytest.approx(mean, rel=1e-6, abs=1e-6), f"{protocol.label} {metric}"


def names_of(family: str) -> list[str]:
    return [protocol.name for protocol in protocols_for(family, RANGES[family])]


def test_every_name_of_the_catalogue_is_compared_below() -> None:
    assert {p.name for p in CATALOGUE} == {name for family in RANGES for name in names_of(family)}


def test_real_nyu_frames(shared_data: Path) -> None:
    files = sorted((shared_data / "official" / "nyu").rglob("sync_depth_*.png"))
    gts = [read_depth(path, 1000) for path in files]
    assert len(gts) == 3
    assert gts[0].shape == (480, 640)
    check("nyu", NYU, gts, views_for(gts, NYU, (14, 14)), names_of("nyu"))


def test_real_kitti_frames(shared_data: Path) -> None:
    files = sorted((shared_data / "official" / "kitti").rglob("proj_depth/groundtruth/image_02/*.png"))
    gts = [read_depth(path, 256) for path in (files[0], files[-1])]
    assert gts[0].shape == (375, 1242)
    check("kitti", KITTI, gts, views_for(gts, KITTI, (14, 14)), names_of("kitti"))


def test_real_frames_of_a_generic_dataset(shared_data: Path) -> None:
    path = sorted((shared_data / "official" / "nyu").rglob("sync_depth_*.png"))[1]
    plan = ViewPlan(canvas=(96, 128), grid=(2, 2))
    metres = read_depth(path, 1000)
    colon = ["tr2m-c3vd", "tr2m-simcol"]
    check("generic", plan, [metres], views_for([metres], plan, (16, 16)), [n for n in names_of("generic") if n not in colon])
    check("generic", plan, [metres / 100], views_for([metres], plan, (16, 16)) / 100, colon)


def sparse(shape: tuple[int, int], share: float, low: float, high: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    depth = rng.uniform(low, high, shape).astype(np.float32)
    depth[rng.random(shape) >= share] = np.nan
    return depth


def adversarial(shape: tuple[int, int], inside: tuple[int, int], limits: list[float]) -> list[np.ndarray]:
    """No pixel at all; one pixel, inside and outside of the usual regions; depths exactly at the limits; nearly nothing."""
    empty = np.full(shape, np.nan, dtype=np.float32)
    one, outside, edges = empty.copy(), empty.copy(), empty.copy()
    one[inside] = 3.7
    outside[0, 0] = 3.7
    edges[inside[0], inside[1] : inside[1] + len(limits)] = np.array(limits, dtype=np.float32)
    return [empty, one, outside, edges, sparse(shape, 0.001, 0.5, 9.5, 1)]


def test_adversarial_masks_on_nyu() -> None:
    limits = [0.001, np.nextafter(np.float32(0.001), 1), 10.0, np.nextafter(np.float32(10), 0), 10.5, 0.0005]
    gts = adversarial((480, 640), (200, 300), limits)
    gts[4][470, 100:500] = 2.0  # the row of the Eigen region that the view crop does not cover
    views = views_for(gts, NYU, (112, 112))
    views[4, :, 0, 0] = 1e-4  # below what DepthCLIP and PureCLIP-Depth count as predicted
    check("nyu", NYU, gts, views, names_of("nyu"))


@pytest.mark.parametrize("shape", [(370, 1224), (376, 1241), (374, 1238), (352, 1216)])
def test_adversarial_masks_and_all_sizes_of_kitti(shape: tuple[int, int]) -> None:
    limits = [0.001, 0.00390625, 1 / 128, 30.0, 80.0, 79.99, 117.1875, 117.2, 200.0]
    gts = [*adversarial(shape, (250, 600), limits)[1:4:2], sparse(shape, 0.01, 1.0, 90.0, 2)]
    views = views_for(gts, KITTI, (112, 112))
    views[1, 2, 1:] = 150.0  # beyond what the released code counts, in one tile only
    names = [n for n in names_of("kitti") if shape == (370, 1224) or not n.startswith(("marigold", "depthmaster", "tr2m"))]
    check("kitti", KITTI, gts, views, names)


@pytest.mark.parametrize("shape", [(43, 61), (97, 31), (5, 7), (42, 60)])
def test_odd_sizes_of_a_generic_dataset(shape: tuple[int, int]) -> None:
    gts = [sparse(shape, 0.6, 0.1, 9.0, 3), np.full(shape, np.nan, dtype=np.float32), sparse(shape, 0.9, 0.29, 0.31, 4)]
    names = [n for n in names_of("generic") if n not in ("tr2m-c3vd", "tr2m-simcol")]
    check("generic", ODD, gts, views_for(gts, ODD, (7, 15)), names)


@pytest.mark.parametrize("how", ["median", "lsq-depth", "lsq-disparity", "lsq-sqrt-disparity"])
def test_every_alignment(how: str) -> None:
    gts = [sparse((43, 61), 0.6, 0.5, 7.0, 5), sparse((97, 31), 0.01, 0.5, 7.0, 6)]
    check("generic", ODD, gts, views_for(gts, ODD, (7, 15)), [f"eigen[alignment={how}]"])
