"""`pcd show`: its numbers and maps against plain NumPy on what zarr-python reads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pytest
import torch
import zarr

from pcd.evaluation.figures_sample import SamplePanel, coloured, principal_colours, scales
from pcd.evaluation.pictures import NO_VALUE, resampled
from pcd.recipe import Recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.extract import extract
from pcd.stages.runs import Run, open_run
from pcd.stages.show import Shown, show
from pcd.stages.train import train
from tests.test_extract import toy_recipe
from tests.toy import ToyDataset

GRID, TILES, PIXELS = (4, 4), 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose test sample 1 was skipped, and a run whose two losses look at different patches."""
    root = tmp_path_factory.mktemp("show")
    cache = extract(toy_recipe(dataset={"broken": ["test-1"]}), root / "cache", device="cpu", on_error="skip").cache
    train(run_recipe(), cache, root / "run", device="cpu")
    return root


def run_recipe() -> Recipe:
    targets = {"depth": {"max_depth": 4.0, "min_present": 0.9}}
    return toy_recipe(train={"epochs": 2}, targets=targets, evaluate={"protocols": ["pureclip", "eigen"]})


def stored(folder: Path, name: str, sample: int, table: str = "test") -> Any:
    """All views of a sample as zarr-python reads them: (flip, tile, ...)."""
    column = zarr.open_group(folder / "cache", mode="r")[f"{table}/{name}"]
    assert isinstance(column, zarr.Array)
    views = np.asarray(column[sample * 4 : sample * 4 + 4])
    return views.reshape(2, TILES, *views.shape[1:])


def side_by_side(tiles: Any) -> Any:
    return np.concatenate(list(tiles), axis=1)


def panel(shown: Shown, name: str) -> Any:
    return next(panel.pixels for panel in shown.panels if panel.name == name)


@pytest.mark.parametrize("far", [10.0, 2.5])
def test_the_numbers_of_a_cache_are_those_that_are_stored(tmp_path: Path, far: float) -> None:
    """With 2.5 m some patches lie partly beyond the range, so that fewer pixels count than are there."""
    extract(toy_recipe(dataset={"far": far}), tmp_path / "cache", device="cpu")
    shown = show(tmp_path / "cache", sample="test-3")
    canvas = side_by_side(stored(tmp_path, "depth/canvas", 3)[0])
    metres = canvas[canvas > 0] / 1000
    truth, patches = shown.facts["truth"], shown.facts["patches"]
    assert truth["min"] == pytest.approx(metres.min(), rel=1e-6)
    assert truth["max"] == pytest.approx(metres.max(), rel=1e-6)
    assert truth["median"] == pytest.approx(np.median(metres), rel=1e-6)
    assert truth["valid"] == (canvas > 0).mean()
    count, present, mean = (stored(tmp_path, f"depth/{name}", 3)[0].ravel() for name in ("count", "present", "mean"))
    expected = {"grid": [4, 8], "pixels": 16, "number": 32, "with_depth": int((count > 0).sum())}
    assert patches == {**expected, "half_valid": int((present >= 8).sum())}
    edges = [0.1 + (far - 0.1) / 10 * number for number in range(11)]
    histogram = [sum(low < depth <= high for depth in mean[count > 0]) for low, high in itertools.pairwise(edges)]
    assert shown.facts["bins"]["true"] == histogram
    assert shown.facts["bins"]["edges"] == pytest.approx(edges)
    assert sum(histogram) == patches["with_depth"]
    sample = {"key": "test-3", "table": "test", "number": 3, "of": 5, "skipped": None, "size": [24, 40]}
    assert shown.facts["sample"] == sample
    shares = {"present": present} if far == 10 else {"present": present, "count": count}
    assert {panel.name for panel in shown.panels if panel.kind == "share"} == set(shares)
    for name, share in shares.items():
        np.testing.assert_array_equal(panel(shown, name), side_by_side(share.reshape(2, 4, 4)) / 16)
    if far == 2.5:
        assert set(count) & {1, 2, 3, 4, 5, 6, 7, 8}
    tokens = side_by_side(stored(tmp_path, "clip/patch", 3)[0].reshape(2, 4, 4, -1))
    rgb = principal_colours(tokens.reshape(32, -1))[0].reshape(4, 8, 3)
    np.testing.assert_allclose(panel(shown, "tokens clip/patch") / 255, rgb, atol=0.51 / 255)


def test_panels_hold_the_canvas_and_each_view_as_the_encoder_saw_it(folder: Path) -> None:
    whole, rgb = show(folder / "cache"), ToyDataset(ToyDataset.Options()).load("test", "test-0").rgb
    canvas = cv2.resize(rgb.astype(np.float32), (32, 16), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(panel(whole, "image").astype(float), canvas, atol=0.51)
    assert whole.facts["views"][3] == {"view": 3, "mirrored": True, "tile": [0, 1], "rows": [0, 16], "columns": [16, 32]}
    views = next(panel for panel in whole.panels if panel.name == "views")
    assert views.marks == ((0, 0, "0"), (24, 0, "1"), (48, 0, "2 mirrored"), (72, 0, "3 mirrored"))
    for view in range(4):
        flip, tile = divmod(view, 2)
        one = show(folder / "cache", view=view)
        seen = np.flip(canvas, axis=1) if flip else canvas
        np.testing.assert_allclose(panel(one, "image").astype(float), seen[:, tile * 16 : tile * 16 + 16], atol=0.51)
        left, top, _ = views.marks[view]
        np.testing.assert_array_equal(views.pixels[top : top + 16, left : left + 16], panel(one, "image"))
        depth = stored(folder, "depth/canvas", 0)[flip, tile] / 1000
        np.testing.assert_allclose(np.nan_to_num(panel(one, "truth")), depth, rtol=1e-6)
        mean = stored(folder, "depth/mean", 0)[flip, tile].reshape(GRID)
        np.testing.assert_array_equal(np.nan_to_num(panel(one, "mean")), mean)


def believed(folder: Path, sample: int) -> tuple[Run, Any, Any]:
    """Probabilities of the bins of both halves on un-mirrored canvases (2, 4, 8, K), from zarr-python's tokens, and centres."""
    run = open_run(folder / "run")
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    columns = {
        name: torch.from_numpy(stored(folder, name, sample).reshape(4, *shape)) for name, shape in run.info["shapes"].items()
    }
    with torch.inference_mode():
        found = head.distribution(columns)
    assert found is not None
    halves = found.probabilities.numpy().reshape(2, TILES, *GRID, -1)
    first, second = (side_by_side(half) for half in halves)
    return run, np.stack([first, second[:, ::-1]]).astype(np.float64), found.centres.numpy().astype(np.float64)


def test_what_a_run_believes_is_the_mean_of_both_halves(folder: Path) -> None:
    shown = show(folder / "run", sample="2")
    run, halves, centres = believed(folder, 2)
    both = halves.mean(axis=0)
    depth = both @ centres
    canvas = side_by_side(stored(folder, "depth/canvas", 2)[0]) / 1000
    canvas[canvas == 0] = np.nan
    pixels = depth.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_allclose(panel(shown, "prediction"), pixels, rtol=1e-4)
    np.testing.assert_allclose(panel(shown, "error"), pixels - canvas, atol=1e-3)
    np.testing.assert_allclose(panel(shown, "std"), np.sqrt(both @ centres**2 - depth**2), rtol=1e-3)
    np.testing.assert_allclose(panel(shown, "likely bin"), centres[both.argmax(axis=-1)], rtol=1e-6)
    facts = shown.facts["prediction"]
    assert (facts["min"], facts["max"]) == pytest.approx((depth.min(), depth.max()), rel=1e-4)
    assert facts["epoch"] == run.best["abs_rel"]["epoch"]
    counted = np.isfinite(canvas) & (canvas > 0.1) & (canvas < 10)
    error = np.abs(pixels - canvas)[counted] / canvas[counted]
    assert shown.facts["scores"]["pureclip"]["metrics"]["abs_rel"] == pytest.approx(error.mean(), rel=1e-4)
    assert shown.facts["scores"]["pureclip"]["pixels"] == counted.sum()
    assert shown.facts["labels"] == ["random encoder weights", "synthetic scenes"]
    one = show(folder / "run", sample="2", view=3)
    np.testing.assert_allclose(panel(one, "prediction")[::4, ::-4], halves[1][:, :4] @ centres, rtol=1e-4)
    assert one.facts["scores"] == shown.facts["scores"]


def test_scores_are_those_of_the_evaluation(folder: Path) -> None:
    evaluation = evaluate(open_run(folder / "run"), device="cpu")
    lines = (evaluation.folder / "samples.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    scores = show(folder / "run", sample="test-4").facts["scores"]
    for label, entry in scores.items():
        row = next(row for row in rows if (row["key"], row["protocol"]) == ("test-4", label))
        assert entry["metrics"]["abs_rel"] == pytest.approx(float(row["abs_rel"]), rel=1e-6)
    assert set(scores) == {"pureclip", "eigen"}
    unscored = show(folder / "run", split="train").facts["scores"]
    assert unscored["eigen"]["not_scored"] == "table train holds no ground truth as stored"
    assert unscored["pureclip"]["metrics"]["abs_rel"] > 0


def test_supervision_agrees_with_a_plain_loop(folder: Path) -> None:
    shown = show(folder / "run", split="train", sample="5")
    canvas = side_by_side(stored(folder, "depth/canvas", 5, "train")[0]) / 1000
    edges, bins = np.linspace(0.1, 10, 16), np.zeros(15, dtype=int)
    for loss, low, high, share in (("embedding", 0.1, 10.0, 0.5), ("depth", 0.1, 4.0, 0.9)):
        counts = np.zeros((4, 8))
        for row in range(4):
            for column in range(8):
                patch = canvas[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].ravel()
                known = [depth for depth in patch if low <= depth <= high]
                counts[row, column] = len(known) > 0 and (patch > 0).sum() >= share * PIXELS
                if loss == "embedding" and counts[row, column]:
                    bins[np.searchsorted(edges, np.float32(np.mean(known))) - 1] += 1
        np.testing.assert_array_equal(panel(shown, f"counts in {loss}"), counts)
        assert shown.facts["counting"][loss] == counts.sum()
    assert shown.facts["bins"]["true"] == bins.tolist()
    assert 0 < shown.facts["counting"]["depth"] < shown.facts["counting"]["embedding"]
    assert sum(shown.facts["bins"]["likely"]) == shown.facts["counting"]["embedding"]


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    tokens = (np.random.default_rng(0).normal(size=(200, 12)) * np.arange(12, 0, -1)).astype(np.float16)
    rgb, share = principal_colours(tokens)
    centred = tokens.astype(np.float64) - tokens.astype(np.float64).mean(axis=0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())
    for axis in range(3):
        sign = np.sign(right[axis][np.abs(right[axis]).argmax()])
        values = left[:, axis] * sign
        low, high = np.percentile(values, (5, 95))
        np.testing.assert_allclose(rgb[:, axis], np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    flat, none = principal_colours(np.ones((5, 2), dtype=np.float16))
    assert (flat.shape, none) == ((5, 3), 0.0)


def test_maps_shrink_to_the_mean_of_what_is_there_and_grow_by_repeating() -> None:
    values = np.random.default_rng(1).uniform(1, 9, (12, 20)).astype(np.float32)
    values[np.random.default_rng(2).random(values.shape) < 0.8] = np.nan
    values[:4, :5] = np.nan
    small = resampled(values, (3, 4))
    for row in range(3):
        for column in range(4):
            known = [v for v in values[row * 4 : row * 4 + 4, column * 5 : column * 5 + 5].ravel() if np.isfinite(v)]
            assert small[row, column] == pytest.approx(np.mean(known), rel=1e-5) if known else np.isnan(small[row, column])
    np.testing.assert_array_equal(resampled(values, (24, 40)), values.repeat(2, axis=0).repeat(2, axis=1))


def test_one_scale_for_all_maps_of_a_kind() -> None:
    maps = [np.linspace(low, low + 2, 100, dtype=np.float32).reshape(10, 10) for low in (1, 5)]
    found = scales([SamplePanel(str(n), "", "depth", pixels) for n, pixels in enumerate(maps)])
    assert (found["depth"].low, found["depth"].high) == pytest.approx(np.percentile(np.stack(maps), (2, 98)), rel=1e-5)
    error = scales([SamplePanel("error", "", "error", np.array([[-3, 1, np.nan]], dtype=np.float32))])["error"]
    assert -error.low == error.high == pytest.approx(np.percentile([3, 1], 90))
    colours = coloured(np.array([[-9, 0, 9, np.nan]], dtype=np.float32), error)[0]
    ends = [matplotlib.colormaps["RdBu"](end, bytes=True)[:3] for end in (0.0, 1.0)]
    assert [tuple(colour) for colour in colours[[0, 2, 3]]] == [*(tuple(end) for end in ends), NO_VALUE]
    assert colours[1].min() > 240
