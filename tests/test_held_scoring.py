"""Scoring against ground truth held on the device: the same numbers as the scorer, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcd import depths
from pcd.errors import PredictionError, UsageError
from pcd.evaluation import held_scoring
from pcd.evaluation.held_scoring import HeldScorer, constant_over_patches, held_bytes, why_not_held
from pcd.evaluation.metrics import SUMS, THRESHOLDS, masked_sums
from pcd.evaluation.patchwise import SortedPatches
from pcd.evaluation.protocols import Protocol, get_protocol, protocols_for
from pcd.evaluation.scoring import Scorer
from pcd.views import ViewPlan

CPU = torch.device("cpu")
GRID = (3, 2)
UNITS = {"nyu": 1000, "kitti": 256, "generic": 1000}
RANGES = {"nyu": (1e-3, 10.0), "kitti": (1e-3, 80.0), "generic": (0.2, 8.0)}
PLANS = {
    "tiles": ViewPlan(canvas=(24, 64), grid=(1, 4)),
    "two rows of tiles": ViewPlan(canvas=(48, 32), grid=(2, 2)),
    "unmirrored": ViewPlan(canvas=(24, 16), flips=False),
    "patches do not divide": ViewPlan(canvas=(25, 60), grid=(1, 4)),
}


class Samples:
    """Random ground truth and predictions: the second sample without depth, the third half empty, limits met exactly."""

    def __init__(self, family: str, plan: ViewPlan, number: int = 5) -> None:
        rng = np.random.default_rng(0)
        self.plan, self.units, far = plan, UNITS[family], 1.1 * RANGES[family][1]
        self.keys = [f"scene/{at}" for at in range(number)]
        cells = (plan.grid[0] * GRID[0], plan.grid[1] * GRID[1])
        smooth = rng.uniform(0.05 * far, far, (number, *cells))
        where = [np.arange(size) * count // size for size, count in zip(plan.canvas, cells, strict=True)]
        metres = smooth[:, where[0][:, None], where[1]] * rng.uniform(0.7, 1.3, (number, *plan.canvas))
        self.stored = (metres * self.units).astype(np.uint16)
        self.stored[rng.random(self.stored.shape) < 0.4] = 0
        self.stored[1] = 0
        self.stored[2, :, : plan.canvas[1] // 2] = 0
        self.stored[0, ::3, ::2] = np.rint(np.array(RANGES[family])[rng.integers(0, 2)] * self.units)
        patches = rng.uniform(0.0, far, (number, plan.views, *GRID)).astype(np.float32)
        patches[rng.random(patches.shape) < 0.2] = 4.0
        self.stored[3][self.stored[3] > 0] = rng.choice(np.array([3200, 4000, 5000]) * self.units // 1000)
        self.patches = torch.from_numpy(patches)

    def expected(self, protocol: Protocol) -> dict[str, float]:
        scorer = Scorer([protocol], self.plan)
        scorer.add(self.keys, self.patches, torch.from_numpy(depths.decode(self.stored, self.units)))
        return scorer.scores[protocol.label].means()

    def held(self, protocol: Protocol, device: torch.device = CPU) -> HeldScorer:
        scorer = HeldScorer(protocol, self.plan, GRID, self.keys, self.units, device)
        for first in (3, 0):
            scorer.hold(first, self.stored[first : first + 3])
        return scorer

    def views(self, scorer: HeldScorer) -> Tensor:
        return self.patches[:, : scorer.plan.views]


def variants(family: str) -> list[Protocol]:
    """Every protocol of a family that can be held, as it is and changed in each way, and with limits on predictions."""
    found = []
    for protocol in protocols_for(family, RANGES[family]):
        if why_not_held(protocol, CPU) is not None:
            continue
        for upsample in ("nearest", "bilinear", "bilinear-align-corners"):
            for averaging in ("image", "tile", "pixels"):
                changed = replace(protocol, upsample=upsample, averaging=averaging)
                low, high = 0.3 * changed.max_depth, 0.8 * changed.max_depth
                limited = replace(changed, clamp=False, min_prediction=low, max_prediction=high)
                found += [changed, replace(changed, tta=False), limited]
    return found


def assert_close(found: Mapping[str, float], expected: Mapping[str, float], tolerance: float = 1e-9) -> None:
    """SILog is the root of a difference: of a single pixel it is rounding, some 1e-6 instead of 0."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        close = max(tolerance, 1e-6) if name == "silog" else tolerance
        assert found[name] == pytest.approx(value, rel=close, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("family", ["nyu", "kitti", "generic"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_means_are_those_of_the_scorer(family: str, plan: ViewPlan) -> None:
    samples, protocols = Samples(family, plan), variants(family)
    assert {protocol.name for protocol in protocols} == {"pureclip", "pureclip-paper"}
    for protocol in protocols:
        if protocol.tta and not plan.flips:
            with pytest.raises(UsageError, match="mirrored"):
                samples.held(protocol)
            continue
        scorer = samples.held(protocol)
        for _ in range(2):
            assert_close(scorer.means(samples.views(scorer)), samples.expected(protocol))
    assert math.isfinite(samples.expected(protocols[1])["rmse"])


def pixel_by_pixel(samples: Samples, low: float, high: float, least: float) -> dict[str, float]:
    """`pureclip` on NYU as one would write it without a library: per image means of some metrics, then their mean."""
    height, width = samples.plan.canvas
    totals: dict[str, list[float]] = {"abs_rel": [], "rmse": [], "log10": [], "delta1": [], "delta_105": [], "silog": []}
    for stored, views in zip(samples.stored.tolist(), samples.patches.double().tolist(), strict=True):
        pairs = []
        for row in range(height):
            for column in range(width):
                g = float(np.float32(stored[row][column]) / np.float32(samples.units))
                cell, mirrored = column // (width // 8), (width - 1 - column) // (width // 8)
                one = views[cell // 2][row // (height // 3)][cell % 2]
                other = views[4 + mirrored // 2][row // (height // 3)][mirrored % 2]
                p = (one + other) / 2
                if low < g < high and p > least:
                    pairs.append((min(max(p, low), high), g))
        if not pairs:
            continue
        logs = [math.log(p) - math.log(g) for p, g in pairs]
        number = len(pairs)
        totals["abs_rel"].append(sum(abs(p - g) / g for p, g in pairs) / number)
        totals["rmse"].append(math.sqrt(sum((p - g) ** 2 for p, g in pairs) / number))
        totals["log10"].append(sum(abs(e) for e in logs) / math.log(10) / number)
        totals["delta1"].append(sum(max(p / g, g / p) < 1.25 for p, g in pairs) / number)
        totals["delta_105"].append(sum(max(p / g, g / p) < 1.05 for p, g in pairs) / number)
        totals["silog"].append(100 * math.sqrt(sum(e * e for e in logs) / number - (sum(logs) / number) ** 2))
    return {name: sum(values) / len(values) for name, values in totals.items()}


@pytest.mark.parametrize("by_patches", [True, False])
def test_means_are_those_of_a_loop_over_pixels(by_patches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples("nyu", PLANS["tiles"])
    protocol = get_protocol("pureclip", "nyu", RANGES["nyu"])
    assert constant_over_patches(protocol, samples.plan, GRID)
    monkeypatch.setattr(held_scoring, "constant_over_patches", lambda *what: by_patches)
    low, least = float(np.float32(1e-3)), float(np.float32(1e-3))
    found = samples.held(protocol).means(samples.patches)
    for name, value in pixel_by_pixel(samples, low, 10.0, least).items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize(("units", "far"), [(1000, 65.5), (256, 255.9)])
def test_counts_are_exact_at_the_limits(units: int, far: float) -> None:
    """Predictions whose ratio to a pixel is a threshold, or the next number to it."""
    rng = np.random.default_rng(1)
    pixels = 37
    stored = rng.integers(1, int(far * units), (4, 200, pixels)).astype(np.uint16)
    stored[0, :50] = 0
    stored[1, :, -1] = 65535
    gt = torch.from_numpy(depths.decode(stored, units)).double()
    chosen = gt.nan_to_num(1.0)[..., 5] * torch.tensor(rng.choice([1.0, *THRESHOLDS.values()], (4, 200)))
    chosen = torch.where(torch.from_numpy(rng.random((4, 200)) < 0.5), chosen, gt.nan_to_num(1.0)[..., 7] ** 2 / chosen)
    for beside in (-math.inf, None, math.inf):
        pred = chosen if beside is None else torch.nextafter(chosen, torch.tensor(beside, dtype=torch.float64))
        held = SortedPatches(4, 200, pixels, units, CPU)
        held.hold(0, stored)
        found = held.sums(slice(0, 4), pred)
        whole = [values.flatten(0, 1) for values in (pred[..., None].expand(gt.shape), gt, ~gt.isnan())]
        expected = masked_sums(*whole).reshape(4, 200, len(SUMS))
        counts = [0, *range(len(SUMS) - len(THRESHOLDS), len(SUMS))]
        assert torch.equal(found[..., counts], expected[..., counts])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_perfect_predictions_have_no_error() -> None:
    stored = np.full((1, 2, 20), 4321, dtype=np.uint16)
    held = SortedPatches(1, 2, 20, 1000, CPU)
    held.hold(0, stored)
    sums = held.sums(slice(0, 1), torch.from_numpy(depths.decode(stored, 1000)[..., 0]).double())
    errors, counts = sums[..., 1:9], sums[..., 9:]
    assert float(errors.abs().max()) < 1e-12
    assert float(errors[..., :5].min()) >= 0.0
    assert torch.equal(counts, torch.full_like(counts, 20.0))


class NoWaiting(TorchDispatchMode):
    """Fails on whatever would make the host wait for a GPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique", "nonzero_static")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            assert all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]), name
        if name in ("_to_copy", "copy_"):
            wanted = (kwargs or {}).get("device") or args[0].device
            assert args[-1].device == wanted, f"{name} to {wanted}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", ["tiles", "patches do not divide"])
def test_an_epoch_never_waits_for_the_device(plan: str) -> None:
    """Watched op by op, and on the meta device, where values cannot be read and host tensors not be mixed in."""
    meta = torch.device("meta")
    for family in ("nyu", "kitti", "generic"):
        samples = Samples(family, PLANS[plan])
        for protocol in variants(family)[::7]:
            scorer = samples.held(protocol, meta)
            views = samples.views(scorer).to(meta)
            with NoWaiting(), torch.inference_mode():
                assert scorer.values(views).device == meta
            with pytest.raises(NotImplementedError, match="meta"):
                scorer.means(views)
            here = samples.held(protocol)
            with NoWaiting():
                here.means(samples.views(here))
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        samples.expected(protocol)


def test_what_cannot_be_held_says_why() -> None:
    nyu = get_protocol("pureclip[alignment=median]", "nyu", RANGES["nyu"])
    assert "aligns" in str(why_not_held(nyu, CPU))
    assert "as stored" in str(why_not_held(get_protocol("eigen", "nyu", RANGES["nyu"]), CPU))
    assert "float64" in str(why_not_held(get_protocol("pureclip", "nyu", RANGES["nyu"]), torch.device("mps")))
    with pytest.raises(UsageError, match="aligns"):
        Samples("nyu", PLANS["tiles"]).held(nyu)
    cropped = replace(PLANS["tiles"], crop=(0, 20, 0, 20))
    with pytest.raises(UsageError, match="crop"):
        Samples("kitti", cropped).held(get_protocol("pureclip", "kitti", RANGES["kitti"]))


def test_what_is_wrong_with_predictions_is_said() -> None:
    samples, protocol = Samples("nyu", PLANS["tiles"]), get_protocol("pureclip", "nyu", RANGES["nyu"])
    scorer = samples.held(protocol)
    for value, view in ((math.nan, 0), (math.inf, -1), (-math.inf, 3)):
        broken = samples.patches.clone()
        broken[2:, view, 1, 1] = value
        with pytest.raises(PredictionError, match="scene/2 is not finite"):
            scorer.means(broken)
    with pytest.raises(UsageError, match="expected"):
        scorer.means(samples.patches[:, :4])
    nothing = HeldScorer(protocol, samples.plan, GRID, [], 1000, CPU)
    assert all(math.isnan(value) for value in nothing.means(samples.patches[:0]).values())


def test_stated_memory_is_what_is_held() -> None:
    samples = Samples("nyu", PLANS["tiles"])
    for name in ("pureclip", "pureclip[upsample=bilinear]"):
        protocol = get_protocol(name, "nyu", RANGES["nyu"])
        inner = vars(samples.held(protocol)._held)
        tensors = [value for part in (inner, vars(inner.get("_sorted", object))) for value in part.values()]
        held = sum(t.nbytes for t in tensors if isinstance(t, Tensor) and len(t) == len(samples.keys) and t.dim() > 2)
        assert held == held_bytes(protocol, samples.plan, GRID, len(samples.keys))
