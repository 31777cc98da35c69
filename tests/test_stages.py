"""Whole stages in process: the demo, a recipe, prediction, and real frames in the official layouts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pcd.cache import Cache
from pcd.errors import FingerprintError, RunError, UsageError
from pcd.recipe_files import load_recipe
from pcd.stages.demo import HEAD, MEAN, SHUFFLED, demo, mean_depth
from pcd.stages.predict import Predictor
from pcd.stages.runs import open_run
from tests.test_cli import Command, pcd

__all__ = ["pcd"]

SMALL = ["dataset.train=96", "dataset.test=24", "views.canvas=[160,160]", "train.epochs=24"]


def test_the_demo_beats_its_baselines(tmp_path: Path) -> None:
    result = demo(load_recipe("demo", SMALL), tmp_path, device="cpu")
    for metric in ("abs_rel", "rmse"):
        scores = {name: result.scores[name][metric] for name in (HEAD, SHUFFLED, MEAN)}
        assert scores[HEAD] < 0.95 * scores[SHUFFLED]
        assert scores[HEAD] < 0.95 * scores[MEAN]
    assert result.run.labels == ["random encoder weights", "synthetic scenes"]
    picture = cv2.imread(str(result.picture))
    assert picture is not None
    assert picture.shape[0] > 400
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["labels"] == result.run.labels
    table = Cache.open(tmp_path / "cache").table("train")
    stored_depth = table.column("depth/canvas").read(table.view_rows(table.usable(), flips=False).reshape(-1))
    assert mean_depth(table) == pytest.approx(stored_depth[stored_depth > 0].mean() / 1000, rel=1e-5)


def test_a_recipe_runs_through_and_skips_what_is_done(pcd: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "demo"\n[dataset]\ntrain = 8\ntest = 2\n[views]\ncanvas = [64, 64]\n[train]\nepochs = 1\n')
    for again in (False, True):
        code, out, err = pcd("run", str(recipe), "--cache", "cache/mine", "--device", "cpu")
        assert code == 0, err
        assert "eigen" in out
        assert ("Nothing to do" in err) == again
        assert ("is complete: epoch 1" in err) == again
    assert len(list(Path("runs").iterdir())) == 1


@pytest.fixture(scope="module")
def real_run(shared_data: Path, clip_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official NYU frames with real CLIP weights at a quarter of the usual pixels, trained for two epochs."""
    from pcd.recipe import parse_recipe
    from pcd.stages.extract import extract
    from pcd.stages.recipes import extraction_recipe
    from pcd.stages.train import train

    root = tmp_path_factory.mktemp("real")
    small = ["views.canvas=[160,160]", "head.table_init=tokens", "train.epochs=2"]
    name, frames = "openclip:ViT-B-16-quickgelu/openai", shared_data / "official" / "nyu"
    recipe = extraction_recipe("nyu", None, small, root=frames, encoder=name, weights=str(clip_weights))
    cache = extract(recipe, root / "cache", device="cpu").cache
    train(parse_recipe(recipe.model_dump(exclude_none=True), "test"), cache, root / "run", device="cpu")
    return root


def test_a_training_frame_is_predicted_as_it_is_scored(real_run: Path, shared_data: Path) -> None:
    """Predict and evaluate must agree: the same crop, tokens and upsampling on a frame of the dataset's size."""
    import torch

    from pcd.evaluation.pixels import combine_views, native_prediction
    from pcd.stages.inference import head_predictor
    from pcd.training.sources import StreamedRows

    run, cache = open_run(real_run / "run"), Cache.open(real_run / "cache")
    table = cache.table("test")
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    source = StreamedRows(table, ("clip/patch", "clip/cls"), torch.device("cpu"))
    patches = combine_views(head_predictor(head, table, source, run.grid)(np.array([0])).depth, table.plan)
    expected = native_prediction(patches, table.plan, (480, 640), "bilinear", "edge")[0].numpy()
    image = cv2.imread(str(shared_data / "official/nyu/basement_0001a_out/rgb_00100.jpg"))
    assert image is not None
    got = Predictor(run, device="cpu").predict(np.ascontiguousarray(image[:, :, ::-1])).depth
    np.testing.assert_allclose(got, expected, rtol=2e-3)  # tokens are stored in half precision


def test_predict_refuses_other_weights_and_wrong_arrays(real_run: Path, tmp_path: Path) -> None:
    run = open_run(real_run / "run")
    with pytest.raises(FingerprintError, match=r"weights\.kind: found 'random', wanted 'file'"):
        Predictor(run, weights="random", device="cpu")
    predictor = Predictor(run, device="cpu")
    with pytest.raises(UsageError, match=r"RGB uint8 \(H, W, 3\); got float64"):
        predictor.predict(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    assert predictor.predict(np.zeros((50, 200, 3), dtype=np.uint8)).depth.shape == (50, 200)
    assert predictor.plan_for(480, 640).crop == (40, 470, 38, 603)
    assert predictor.plan_for(481, 640).crop is None
    with pytest.raises(RunError, match="is not a run"):
        open_run(tmp_path)


def test_official_kitti_frames_to_metrics(pcd: Command, shared_data: Path, clip_weights: Path, tmp_path: Path) -> None:
    """The three commands on real frames; the dataset is gone before the second training."""
    shutil.copytree(shared_data / "official" / "kitti", tmp_path / "kitti")
    encoder = ["--encoder", "openclip:ViT-B-16-quickgelu/openai", "--weights", str(clip_weights), "--device", "cpu"]
    small = ["--set", "views.canvas=[96,384]", "--limit", "6"]
    code, _, err = pcd("extract", "--dataset", "kitti", "--root", "kitti", *encoder, *small)
    assert code == 0, err
    assert "1 of 5 lines have no depth map" in err
    shutil.rmtree(tmp_path / "kitti")
    common = ["--cache", "cache/kitti", "--set", "head.table_init=tokens", "--set", "train.epochs=2", "--device", "cpu"]
    for extra in ([], ["--recipe", "kitti-released", "--set", "train.batch_size=4"]):
        code, _, err = pcd("train", *common, *extra)
        assert code == 0, err
        code, out, err = pcd("evaluate", "--protocol", "pureclip", "--protocol", "eigen", "--json", "--device", "cpu")
        assert code == 0, err
        protocols = json.loads(out)["protocols"]
        assert protocols["eigen-kitti-garg"]["images"] == 4
        assert protocols["pureclip"]["tiles"] == 16
        assert all(0 < value["metrics"]["abs_rel"] < 3 for value in protocols.values())
    with (next(Path("runs").glob("*/evaluations/*/samples.csv"))).open() as handle:
        assert {row["protocol"] for row in csv.DictReader(handle)} == {"pureclip", "eigen-kitti-garg"}
