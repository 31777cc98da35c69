"""The scorer: one pass, any batches, what is excluded, tables and files; numbers are tested in test_scoring_published."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from pcd.errors import PredictionError, SampleError, UsageError
from pcd.evaluation import pixels, scoring
from pcd.evaluation.metrics import METRICS, PIXEL_METRICS, masked_metrics
from pcd.evaluation.pixels import combine_views, native_prediction, upsample
from pcd.evaluation.protocols import Protocol, get_protocol
from pcd.evaluation.scores import COLUMNS
from pcd.evaluation.scoring import Scorer
from pcd.evaluation.tables import write_csv, write_parquet
from pcd.views import ViewPlan, depth_canvas

RANGE = (0.2, 8.0)
PLAN = ViewPlan(canvas=(24, 64), grid=(1, 4))
TILED = Protocol(
    name="tiled",
    words="",
    family="generic",
    resolution="canvas",
    min_depth=0.2,
    max_depth=8.0,
    averaging="tile",
    upsample="nearest",
)

LIMITED = replace(TILED, name="limited", averaging="image", clamp=False, min_prediction=3.0, max_prediction=6.0, declared=())


def generic(*names: str) -> list[Protocol]:
    return [get_protocol(name, "generic", RANGE) for name in names]


class Samples:
    """Random predictions and ground truth of odd frame sizes, the second of them without any depth."""

    def __init__(self, number: int = 7, seed: int = 0, plan: ViewPlan = PLAN) -> None:
        rng = np.random.default_rng(seed)
        self.keys = [f"scene/{n:03d}" for n in range(number)]
        self.native = []
        for n in range(number):
            frame = rng.uniform(0.1, 9.0, (31 + n, 90 - 2 * n)).astype(np.float32)
            frame[rng.random(frame.shape) < (1.0 if n == 1 else 0.4)] = np.nan
            self.native.append(frame)
        self.native[2][:, : self.native[2].shape[1] // 2] = np.nan  # two empty tiles
        self.canvas = torch.from_numpy(np.stack([depth_canvas(frame, plan, "nearest") for frame in self.native]))
        self.patches = torch.from_numpy(rng.uniform(0.3, 9.0, (number, plan.views, 3, 2)).astype(np.float32))

    def add_to(self, scorer: Scorer, start: int = 0, stop: int | None = None) -> Scorer:
        part = slice(start, stop)
        scorer.add(self.keys[part], self.patches[part], self.canvas[part], self.native[part])
        return scorer


def assert_same(first: Scorer, second: Scorer) -> None:
    assert first.summary().keys() == second.summary().keys()
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, other[name], rtol=1e-11, atol=1e-11, err_msg=name)
            else:
                assert value == other[name]


def test_batches_do_not_matter() -> None:
    protocols = [*generic("pureclip", "eigen", "tr2m-hypersim", "eigen[alignment=median]"), TILED]
    samples = Samples()
    whole = samples.add_to(Scorer(protocols, PLAN, depth_bins=4, boundary=True))
    parts = Scorer(protocols, PLAN, depth_bins=4, boundary=True)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 7)):
        samples.add_to(parts, start, stop)
    assert_same(whole, parts)
    for protocol in protocols:
        one, other = whole.scores[protocol.label].depth_table(), parts.scores[protocol.label].depth_table()
        for row, same in zip(one, other, strict=True):
            np.testing.assert_allclose(list(row.values()), list(same.values()), rtol=1e-11)


def test_what_else_is_scored_does_not_matter() -> None:
    """Protocols share upsampled predictions; each alone must give the same."""
    names = (
        "pureclip",
        "pureclip-paper",
        "pureclip[upsample=bilinear]",
        "eigen",
        "eigen[tta=no]",
        "tr2m-diode-outdoor",
        "tr2m-hypersim",
    )
    samples = Samples()
    together = samples.add_to(Scorer(generic(*names), PLAN))
    for name in names:
        alone = samples.add_to(Scorer(generic(name), PLAN))
        label = alone.protocols[0].label
        for one, other in zip(alone.rows, together.scores[label].rows(), strict=True):
            assert str(one) == str(other)


def test_accelerators_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    protocols = [*generic("pureclip", "eigen", "tr2m-hypersim", "eigen[alignment=lsq-disparity]"), TILED, LIMITED]
    samples = Samples()
    expected = samples.add_to(Scorer(protocols, PLAN, depth_bins=5, boundary=True))
    for module in (pixels, scoring):
        monkeypatch.setattr(module, "on_cpu", lambda tensor: False)
    found = samples.add_to(Scorer(protocols, PLAN, depth_bins=5, boundary=True))
    assert_same(found, expected)
    for label, scores in expected.scores.items():
        bins = found.scores[label].bins
        assert bins is not None
        assert scores.bins is not None
        np.testing.assert_allclose(bins, scores.bins, rtol=1e-11)


def test_images_without_valid_pixels_are_excluded_and_counted() -> None:
    samples = Samples()
    scorer = samples.add_to(Scorer(generic("eigen"), PLAN))
    rows = scorer.rows
    assert [row["pixels"] == 0 for row in rows] == [False, True, False, False, False, False, False]
    assert math.isnan(rows[1]["abs_rel"])
    summary = scorer.summary()["eigen"]
    assert (summary["images"], summary["excluded"]) == (6, 1)
    assert summary["pixels"] == sum(row["pixels"] for row in rows)
    assert summary["metrics"]["rmse"] == pytest.approx(np.mean([row["rmse"] for row in rows if row["pixels"]]), rel=1e-14)
    nothing = Scorer(generic("eigen"), PLAN)
    samples.add_to(nothing, 1, 2)
    assert nothing.summary()["eigen"] == {"metrics": dict.fromkeys(PIXEL_METRICS), "images": 0, "excluded": 1, "pixels": 0}
    json.dumps(nothing.summary(), allow_nan=False)
    assert Scorer(generic("eigen"), PLAN).summary()["eigen"]["images"] == 0


def test_tiles_are_units_of_their_own() -> None:
    samples = Samples()
    scorer = samples.add_to(Scorer([TILED], PLAN))
    rows = scorer.rows
    assert [(row["key"], row["tile"]) for row in rows[:5]] == [*((samples.keys[0], t) for t in range(4)), (samples.keys[1], 0)]
    pred = upsample(combine_views(samples.patches, PLAN), PLAN.canvas, "nearest")
    for row in rows:
        at, tile = samples.keys.index(row["key"]), slice(16 * row["tile"], 16 * row["tile"] + 16)
        gt = samples.canvas[at : at + 1, :, tile]
        expected = masked_metrics(pred[at : at + 1, :, tile].clamp(0.2, 8.0), gt, (gt > 0.2) & (gt < 8.0))
        for name in ("rmse", "silog", "delta1", "pixels"):
            np.testing.assert_allclose(row[name], float(expected[name]), rtol=1e-6)
    summary = scorer.summary()["tiled"]
    assert (summary["images"], summary["tiles"], summary["excluded"]) == (6, 22, 6)
    scored = [row["rmse"] for row in rows if row["pixels"]]
    assert summary["metrics"]["rmse"] == pytest.approx(np.mean(scored), rel=1e-14)
    by_image = scorer.scores["tiled"].by_image("rmse")
    assert list(by_image) == samples.keys
    assert by_image[samples.keys[2]] == pytest.approx(np.mean([row["rmse"] for row in rows[8:12] if row["pixels"]]))
    assert math.isnan(by_image[samples.keys[1]])


def test_pooled_pixels_weigh_every_pixel_alike() -> None:
    samples = Samples()
    scorer = samples.add_to(Scorer(generic("eigen[averaging=pixels]", "eigen"), PLAN))
    combined = combine_views(samples.patches.double(), PLAN)
    preds, gts = [], []
    for at, frame in enumerate(samples.native):
        pred = native_prediction(combined[at : at + 1], PLAN, (frame.shape[0], frame.shape[1]), "bilinear", "edge")[0]
        mask = (frame > np.float32(0.2)) & (frame < 8)
        preds.append(pred.numpy()[mask].clip(0.2, 8))
        gts.append(frame[mask].astype(np.float64))
    difference = np.concatenate(preds) - np.concatenate(gts)
    metrics = scorer.summary()["eigen[averaging=pixels]"]["metrics"]
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-12)
    assert metrics["bias"] == pytest.approx(np.mean(difference), rel=1e-12)
    assert metrics["rmse"] != pytest.approx(scorer.summary()["eigen"]["metrics"]["rmse"], rel=1e-3)


def test_depth_table_against_masks() -> None:
    samples = Samples()
    scorer = samples.add_to(Scorer(generic("pureclip-paper"), PLAN, depth_bins=3))
    pred = upsample(combine_views(samples.patches.double(), PLAN), PLAN.canvas, "nearest").clamp(0.2, 8.0)[None]
    gt = samples.canvas.double()[None]
    table = scorer.scores["pureclip-paper"].depth_table()
    assert [(round(row["low"], 9), round(row["high"], 9)) for row in table] == [(0.2, 2.8), (2.8, 5.4), (5.4, 8.0)]
    for row in table:
        mask = (gt >= max(row["low"], float(np.float32(0.2)))) & (gt < row["high"])
        expected = masked_metrics(pred, gt, mask)
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-11, abs=1e-11), name
    with pytest.raises(UsageError, match="create the Scorer with depth_bins"):
        Scorer(generic("eigen"), PLAN).scores["eigen"].depth_table()


def test_intervals_rest_on_images_or_scenes() -> None:
    samples = Samples()
    scorer = samples.add_to(Scorer([*generic("eigen", "eigen[averaging=pixels]"), TILED], PLAN))
    for label, scores in scorer.scores.items():
        found = scores.intervals(resamples=500)
        assert found["rmse"].groups == 6, label
        assert found["rmse"].mean == pytest.approx(scorer.summary()[label]["metrics"]["rmse"])
        assert found["rmse"].low < found["rmse"].mean < found["rmse"].high
    scenes = {key: "left" if at < 4 else "right" for at, key in enumerate(samples.keys)}
    assert scorer.scores["eigen"].intervals(scenes, resamples=50)["rmse"].groups == 2


def test_boundary_f1_where_asked_for() -> None:
    samples = Samples(3)
    scorer = samples.add_to(Scorer(generic("eigen", "pureclip"), PLAN, boundary=True))
    assert set(scorer.summary()["eigen"]["metrics"]) == set(METRICS)
    assert set(scorer.summary()["pureclip"]["metrics"]) == set(PIXEL_METRICS)
    values = [row["boundary_f1"] for row in scorer.scores["eigen"].rows()]
    assert math.isnan(values[1])
    assert scorer.summary()["eigen"]["metrics"]["boundary_f1"] == pytest.approx((values[0] + values[2]) / 2)
    assert 0 < values[0] < 1


def test_csv_holds_every_row(tmp_path: Path) -> None:
    samples = Samples(3)
    scorer = samples.add_to(Scorer([*generic("eigen"), TILED], PLAN))
    write_csv(tmp_path / "run" / "samples.csv", scorer.rows, COLUMNS)
    with (tmp_path / "run" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 12
    assert list(rows[0]) == ["key", "protocol", "tile", "pixels", *PIXEL_METRICS]
    for written, row in zip(rows, scorer.rows, strict=True):
        assert (written["key"], written["protocol"], int(written["pixels"])) == (row["key"], row["protocol"], row["pixels"])
        assert written["tile"] == ("" if row["tile"] is None else str(row["tile"]))
        assert written["rmse"] == ("" if math.isnan(row["rmse"]) else repr(row["rmse"]))


def test_parquet_holds_the_same_with_nulls_and_units(tmp_path: Path) -> None:
    samples = Samples(3)
    scorer = samples.add_to(Scorer([*generic("eigen"), TILED], PLAN))
    write_parquet(tmp_path / "samples.parquet", scorer.rows, COLUMNS)
    table = parquet.read_table(tmp_path / "samples.parquet")
    assert table.column_names == ["key", "protocol", "tile", "pixels", *PIXEL_METRICS]
    assert table.schema.field("rmse").metadata[b"unit"] == b"m"
    for written, row in zip(table.to_pylist(), scorer.rows, strict=True):
        assert written == {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    assert table.column("rmse").null_count > 0


def test_predictions_may_still_carry_gradients_or_be_half_precision() -> None:
    samples = Samples(3)
    expected = samples.add_to(Scorer(generic("eigen"), PLAN))
    samples.patches.requires_grad_()
    assert_same(samples.add_to(Scorer(generic("eigen"), PLAN)), expected)
    samples.patches = samples.patches.detach().bfloat16()
    found = samples.add_to(Scorer(generic("eigen"), PLAN)).summary()["eigen"]["metrics"]["rmse"]
    assert found == pytest.approx(expected.summary()["eigen"]["metrics"]["rmse"], rel=1e-2)


def test_native_truth_is_only_needed_by_some() -> None:
    assert not Scorer([*generic("pureclip"), TILED], PLAN).needs_native
    scorer = Scorer(generic("pureclip", "eigen"), PLAN)
    assert scorer.needs_native
    samples = Samples(3)
    with pytest.raises(UsageError, match="eigen: native ground truth is needed"):
        scorer.add(samples.keys, samples.patches, samples.canvas)


def test_bad_samples_are_named_and_nothing_of_their_batch_is_kept() -> None:
    samples = Samples(4)
    scorer = Scorer(generic("pureclip", "eigen"), PLAN)
    broken = samples.patches.clone()
    broken[2, 5, 1, 1] = torch.nan
    with pytest.raises(PredictionError, match="the prediction of scene/002 is not finite"):
        scorer.add(samples.keys, broken, samples.canvas, samples.native)
    aligned = Scorer(generic("pureclip", "eigen[alignment=lsq-disparity]"), PLAN)
    broken[2] = -1.0
    with pytest.raises(PredictionError, match="scene/002: alignment 'lsq-disparity' needs positive"):
        aligned.add(samples.keys, broken, samples.canvas, samples.native)
    kitti = ViewPlan(canvas=(24, 64), grid=(1, 4))
    small = Scorer([get_protocol(name, "kitti", (1e-3, 80)) for name in ("pureclip", "eigen-kitti-garg-kb")], kitti)
    with pytest.raises(SampleError, match="scene/000: a frame of 31x90 is smaller than the 352x1216 crop"):
        small.add(samples.keys, samples.patches, samples.canvas, samples.native)
    for each in (scorer, aligned, small):
        assert each.rows == []


def test_what_does_not_belong_together_is_refused() -> None:
    samples = Samples(3)
    scorer = Scorer(generic("pureclip", "eigen"), PLAN)
    for keys, patches, canvas, native in (
        (samples.keys[:2], samples.patches, samples.canvas, samples.native),
        (samples.keys, samples.patches[:2], samples.canvas, samples.native),
        (samples.keys, samples.patches, samples.canvas[:, :12], samples.native),
        (samples.keys, samples.patches, samples.canvas, samples.native[:2]),
    ):
        with pytest.raises(UsageError, match="do not belong together"):
            scorer.add(keys, patches, canvas, native)
    with pytest.raises(UsageError, match="named twice"):
        Scorer(generic("eigen", "eigen"), PLAN)
    with pytest.raises(UsageError, match="pureclip averages over mirrored views, and there are none"):
        Scorer(generic("pureclip"), ViewPlan(canvas=(24, 64), flips=False))
    with pytest.raises(UsageError, match="the canvas holds the crop"):
        Scorer([get_protocol("pureclip-paper", "kitti", (1e-3, 80))], ViewPlan(canvas=(24, 64), crop=(0, 100, 0, 400)))
    with pytest.raises(UsageError, match=r"Unknown metric 'rms'\. Did you mean 'rmse'"):
        scorer.scores["eigen"].by_image("rms")
