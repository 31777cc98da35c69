"""Prediction from the run to the files, in Python and on the command line, on a toy run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import plyfile
import pytest
import torch

import pcd as package
from pcd.errors import UsageError
from pcd.evaluation.pixels import combine_views, native_prediction
from pcd.heads.pureclip import PureClipHead
from pcd.prediction.saves import Save
from pcd.prediction.sources import find_sources
from pcd.prediction.writers import Output
from pcd.stages.predict import Predictor, predict_files
from pcd.stages.runs import Run, open_run
from pcd.stages.train import train
from pcd.views import image_canvas, to_views
from tests.test_cli import Command, pcd
from tests.test_extract import run as extract_toy
from tests.test_extract import toy_recipe
from tests.test_predict_sources import image, video
from tests.toy import ToyEncoder

__all__ = ["pcd"]

SIZES = [(24, 40), (61, 33), (24, 40), (7, 100), (50, 50)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("toy")
    head = {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0, "table_init": "tokens"}
    recipe = toy_recipe(head=head, train={"epochs": 2})
    return train(recipe, extract_toy(root / "cache", recipe).cache, root / "run", device="cpu")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def predictor(run: Run, **options: Any) -> Predictor:
    return Predictor(run, device="cpu", **options)


def by_hand(of: Predictor, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patch depths and variances `(views, gh, gw)` of an image, view by view."""
    plan = of.plan_for(rgb.shape[0], rgb.shape[1])
    means, variances = [], []
    for view in to_views(image_canvas(rgb, plan), plan):
        with torch.inference_mode():
            columns = of._encoder.encode(torch.from_numpy(view.transpose(2, 0, 1).copy())[None])
            shares = of._head.distribution(columns)
        assert shares is not None
        p, c = shares.probabilities[0].numpy().astype(float), shares.centres.numpy().astype(float)
        mean = (p * c).sum(axis=-1)
        means.append(mean)
        variances.append((p * (c - mean[:, None]) ** 2).sum(axis=-1))
    return np.stack(means).reshape(-1, 4, 4), np.stack(variances).reshape(-1, 4, 4)


def test_a_prediction_is_views_head_and_upsampling(run: Run, images: list[np.ndarray]) -> None:
    of = predictor(run)
    for rgb in images:
        plan = of.plan_for(rgb.shape[0], rgb.shape[1])
        patches = torch.from_numpy(by_hand(of, rgb)[0])[None]
        expected = native_prediction(combine_views(patches, plan), plan, (rgb.shape[0], rgb.shape[1]), "bilinear", "edge")[0]
        depth = of.predict(rgb).depth
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"batch": 3, "overlap": 0.5, "scales": (1, 1.5), "uncertainty": True}])
def test_a_batch_is_its_images_one_by_one(run: Run, images: list[np.ndarray], options: dict[str, Any]) -> None:
    of = predictor(run, **options)
    for rgb, together in zip(images, of.predict_batch(images), strict=True):
        alone = of.predict(rgb)
        assert together.depth.shape == rgb.shape[:2]
        np.testing.assert_allclose(together.depth, alone.depth, rtol=1e-5)
        if options.get("uncertainty"):
            np.testing.assert_allclose(together.std, alone.std, rtol=1e-4)
    assert of.predict_batch([]) == []


def test_batches_go_through_the_encoder_together(run: Run, images: list[np.ndarray]) -> None:
    for batch, calls in ((None, 2), (5, 1), (2, 3), (1, 5)):  # 20 views: 16, 20, 8 and 4 at once
        of = predictor(run, batch=batch)
        before = ToyEncoder.calls
        of.predict_batch(images)
        assert ToyEncoder.calls - before == calls
    assert predictor(run).batch == 4
    assert predictor(run, scales=(4,)).batch == 1
    with pytest.raises(UsageError, match="batch 0: expected"):
        predictor(run, batch=0)


def test_uncertainty_follows_the_law_of_total_variance(run: Run, images: list[np.ndarray]) -> None:
    """Of a patch seen plainly and mirrored: mean of the variances plus variance of the means."""
    of, rgb = predictor(run, uncertainty=True, upsample="nearest"), images[0]
    means, variances = by_hand(of, rgb)
    expected = np.empty((4, 8))
    for row in range(4):
        for column in range(8):
            plain = (column // 4, row, column % 4)
            mirrored = (2 + (7 - column) // 4, row, (7 - column) % 4)
            m, v = [means[plain], means[mirrored]], [variances[plain], variances[mirrored]]
            expected[row, column] = np.sqrt(np.mean(v) + np.var(m))
    prediction = of.predict(rgb)
    np.testing.assert_allclose(prediction.std, np.kron(expected, np.ones((6, 5))), rtol=1e-4)
    np.testing.assert_array_equal(prediction.depth, predictor(run, upsample="nearest").predict(rgb).depth)


def test_overlap_and_scales_are_the_same_head_on_other_windows(run: Run, images: list[np.ndarray]) -> None:
    """A grey image looks the same in every window up to its position, so the depths stay near those of the plain tiles."""
    plain = predictor(run)
    grey = np.full((24, 40, 3), 90, dtype=np.uint8)
    for options in ({"overlap": 0.5}, {"scales": (1.5,)}, {"scales": (1, 2), "overlap": 0.25}):
        of = predictor(run, **options)
        assert of.views > plain.views
        depth = of.predict(grey).depth
        assert abs(depth.mean() / plain.predict(grey).depth.mean() - 1) < 0.2
        assert not np.array_equal(of.predict(images[0]).depth, plain.predict(images[0]).depth)
    np.testing.assert_array_equal(
        predictor(run, overlap=0.0, scales=(1.0,)).predict(images[0]).depth, plain.predict(images[0]).depth
    )
    with pytest.raises(UsageError, match="scales: none given"):
        predictor(run, scales=())


def test_wrong_images_and_heads_without_a_distribution(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    of = predictor(run)
    for shape in ((0, 4, 3), (4, 4), (4, 4, 4)):
        with pytest.raises(UsageError, match=r"predict takes RGB uint8 \(H, W, 3\); got"):
            of.predict(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(UsageError, match=r"--save uncertainty needs Predictor\(..., uncertainty=True\)"):
        predict_files(of, [], Output(Path("out"), (Save.uncertainty,)))
    monkeypatch.setattr(PureClipHead, "distribution", lambda self, columns: None)
    with pytest.raises(UsageError, match="gives no distribution over depths"):
        predictor(run, uncertainty=True).predict(np.zeros((4, 4, 3), dtype=np.uint8))
    monkeypatch.delattr(PureClipHead, "distribution")
    with pytest.raises(UsageError, match=r"head 'pureclip' of .* gives no distribution over depths"):
        predictor(run, uncertainty=True)


def test_python_finds_the_same_as_the_command(run: Run, tmp_path: Path, images: list[np.ndarray]) -> None:
    np.save(tmp_path / "stack.npy", np.stack([images[0], images[2]]))
    of = package.Predictor(run, device="cpu", batch=1)
    items = list(predict_files(of, find_sources([tmp_path / "stack.npy"]), Output(tmp_path / "out", (Save.npy,))))
    assert [(item["frame"], Path(item["npy"]).name) for item in items] == [(0, "stack-000000.npy"), (1, "stack-000001.npy")]
    for item, rgb in zip(items, (images[0], images[2]), strict=True):
        np.testing.assert_array_equal(np.load(item["npy"]), of.predict(rgb).depth)


def test_the_command_takes_patterns_videos_and_arrays(pcd: Command, run: Run, tmp_path: Path) -> None:
    for name in ("in/a.png", "in/deep/a.png", "in/deep/b.jpg"):
        image(tmp_path / name, 90, (20, 30))
    video(tmp_path / "in/clip.mp4", [(200, 30, 40)] * 3, rate=5.0)
    np.save(tmp_path / "stack.npy", np.zeros((2, 10, 12, 3), dtype=np.uint8))
    kinds = ("png", "npy", "side-by-side", "ply", "video")
    saves = [word for kind in kinds for word in ("--save", kind)]
    common = ["--run", str(run.root), "--out", "out", "--device", "cpu"]
    code, out, err = pcd("predict", "in/**/*.png", "in/clip.mp4", "stack.npy", *common, *saves, "--fov", "60", "--json")
    assert code == 0, err
    items = json.loads(out)
    names = ["a", "a-2", "clip-000000", "clip-000001", "clip-000002", "stack-000000", "stack-000001"]
    assert [Path(item["npy"]).stem for item in items] == names
    assert "random encoder weights" in err
    for item in items:
        depth = np.load(item["npy"])
        points = plyfile.PlyData.read(item["ply"])
        np.testing.assert_array_equal(points["vertex"]["z"], depth.reshape(-1))
        assert "random encoder weights" in points.comments
    assert {item.get("video") for item in items} == {None, "out/clip.side-by-side.mp4", "out/stack.side-by-side.mp4"}
    for name, (frames, rate) in {"clip": (3, 5.0), "stack": (2, 10.0)}.items():
        capture = cv2.VideoCapture(f"out/{name}.side-by-side.mp4")
        assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (frames, rate)
        capture.release()


def test_what_was_written_is_told_in_a_line_per_input(pcd: Command, run: Run, tmp_path: Path) -> None:
    image(tmp_path / "in/a.png", 90, (20, 30))
    video(tmp_path / "in/clip.mp4", [(200, 30, 40)] * 2)
    common = ["--run", str(run.root), "--out", "out", "--device", "cpu"]
    code, out, err = pcd("predict", "in", *common, "--overlap", "0.5", "--scales", "1,1.5", "--batch", "2")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["in/a.png", "in/clip.mp4 (2 frames)"]
    assert "out/clip-000000.depth.png (mm), out/clip-000000.npy, out/clip-000000.picture.png" in lines[1]
    code, out, err = pcd("predict", "in/a.png", *common, "--save", "uncertainty")
    assert code == 0, err
    assert out.strip().endswith("m -> out/a.uncertainty.npy, out/a.uncertainty.png")
    assert np.load("out/a.uncertainty.npy").shape == (20, 30)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--save", "ply"], "--save ply needs the camera"),
        (["--fov", "60"], "add --save ply"),
        (["--save", "ply", "--intrinsics", "1,2"], "intrinsics '1,2': expected four numbers"),
        (["--save", "video"], "--save video: none of the inputs is a video or an array of several frames"),
        (["--range", "1"], "--range 1: expected NEAR,FAR in metres"),
        (["--range", "2,1"], "range 2,1: expected NEAR,FAR"),
        (["--scales", "1;2"], "--scales 1;2: expected numbers separated by commas"),
        (["--scales", "0.5"], "scale 0.5: expected 1 (the canvas of training) to 8"),
        (["--overlap", "1"], "overlap 1: expected a fraction of a view from 0 to 0.9"),
        (["--batch", "0"], "batch 0: expected 1 image or more"),
        (["b.png"], "b.png is not there; give image, video or .npy files"),
        (["*.mp4"], "*.mp4 matches no file"),
        (["--save", "jpeg"], "'jpeg' is not one of"),
    ],
)
def test_errors_say_what_to_do(pcd: Command, run: Run, tmp_path: Path, args: list[str], words: str) -> None:
    image(tmp_path / "a.png")
    code, out, err = pcd("predict", "a.png", *args, "--run", str(run.root), "--out", "out")
    assert code == 2
    assert words in err
    assert out == ""
    assert not Path("out").exists()


def test_overlap_of_a_single_tile_is_pointed_out(run: Run) -> None:
    assert predictor(run, overlap=0.5).notes == []
    assert predictor(run, scales=(1.5,)).notes == []
    assert predictor(run).notes == []
    single = Run(run.root, run.recipe, {**run.info, "views": {**run.info["views"], "canvas": [16, 16], "grid": [1, 1]}})
    assert "--overlap changes nothing here" in predictor(single, overlap=0.5).notes[0]


def test_the_newest_run_and_its_notes(pcd: Command, run: Run, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    Path("runs").mkdir()
    Path("runs/toy").symlink_to(open_run(run.root).root, target_is_directory=True)
    code, out, err = pcd("predict", "a.png", "--out", "out", "--no-tta", "--upsample", "nearest", "--range", "1,9")
    assert code == 0, err
    assert out.startswith("a.png: ")
    assert "synthetic scenes" in err
    assert "--save" in pcd("predict", "-h")[1]
