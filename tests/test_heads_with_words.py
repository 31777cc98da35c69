"""Heads with texts from extraction to scores, on a small ResNet of open_clip with a text tower that words are learned in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pcd.cache import Cache
from pcd.encoders.openclip_names import open_clip
from pcd.errors import TextTowerError
from pcd.heads import head_options
from pcd.recipe import Recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.extract import extract
from pcd.stages.predict import Predictor
from pcd.stages.runs import open_run
from pcd.stages.train import train
from tests.export_support import picture
from tests.test_extract import toy_recipe
from tests.tiny_clip import TEXT
from tests.tiny_resnet import resnet_weights

MODEL = "pcd-words-resnet"
"""Half as wide in the joint space as its last feature map, as RN50 is."""
RANGE = {"min_depth": 0.1, "max_depth": 10.0}
NAMED = {"depths": [1, 2, 3, 4, 5, 7, 9]}
HEADS: dict[str, dict[str, Any]] = {
    "depthclip": NAMED,
    "depthclip-adapter": {**NAMED, "image": {"reduction": 8}, "text": {"reduction": 8}, "upsample": 2},
    "auty": {"bins": 7, "object_vectors": 1, "token_width": 32, "lr": 0.02, "upsample": 2},
    "hu": {**NAMED, "scenes": 2, "prompt_vectors": 2, "token_width": 32, "lr": 0.02},
}
LEARNED = ("auty", "hu")
CPU = torch.device("cpu")


def recipe_of(name: str, weights: Path, **options: Any) -> Recipe:
    return toy_recipe(
        dataset={"train": 6, "test": 2},
        encoder={"name": f"openclip:{MODEL}", "weights": str(weights)},
        views={"canvas": [64, 96], "grid": [1, 1]},
        head={"name": name, **RANGE, **HEADS[name], **options},
        targets={"depth": {"min_present": 0.0}},
        train={"epochs": 3, "batch_size": 4, "ema": 0.5},
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    vision = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    (folder / f"{MODEL}.json").write_text(json.dumps({"embed_dim": 128, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(folder / f"{MODEL}.json")
    return resnet_weights(folder / "both.safetensors", MODEL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Cache:
    """Columns and texts of all heads, added one after the other as `pcd extract` does it."""
    root = tmp_path_factory.mktemp("cache") / "cache"
    return [extract(recipe_of(name, weights), root, device="cpu").cache for name in HEADS][-1]


@pytest.mark.parametrize("space", ["released", "joint"])
@pytest.mark.parametrize("name", list(HEADS))
def test_from_columns_to_scores_and_pictures(
    name: str, space: str, cache: Cache, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained through the tower is evaluated and predicts without it."""
    run = train(recipe_of(name, weights, space=space), cache, tmp_path / "run", device="cpu")
    assert len(run.history) == (1 if name == "depthclip" else 3)
    assert all(math.isfinite(value) for epoch in run.history for value in epoch["losses"].values())
    before, after = run.new_head().state_dict(), run.load_head("last", CPU)[0].state_dict()
    learned = {key for key in after if not torch.equal(before[key], after[key])}
    assert learned == {"text"} if name == "depthclip" else len(learned) > 1

    def no_tower(*args: Any) -> None:
        raise AssertionError("a trained head asked for a text tower")

    monkeypatch.setattr("pcd.encoders.openclip_text.OpenClipText.__init__", no_tower)
    found = evaluate(open_run(tmp_path / "run"), cache, protocols=["eigen"], checkpoint="last", device="cpu")
    assert math.isfinite(found.metrics("eigen")["abs_rel"])
    shown = Predictor(open_run(tmp_path / "run"), device="cpu", uncertainty=True).predict(picture(64, 96))
    assert shown.depth.shape == (64, 96)
    assert float(shown.depth.min()) > 0


@pytest.mark.parametrize("name", list(HEADS))
def test_exporters_can_trace_it_for_any_number_of_views(name: str, cache: Cache, weights: Path) -> None:
    cls, options = head_options(recipe_of(name, weights).head)
    table = cache.table("train")
    columns = {column: torch.from_numpy(table.column(column).read([0, 1, 2])) for column in cls.reads(options)}
    head = cls(options, {column: tuple(value.shape[1:]) for column, value in columns.items()}, (2, 3)).eval()
    with torch.no_grad():
        for value in head.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
        dynamic = {column: {0: torch.export.Dim("views")} for column in columns}
        traced = torch.export.export(head, (columns,), dynamic_shapes=(dynamic,)).module()
        fewer = {column: value[:2] for column, value in columns.items()}
        for part in (columns, fewer):
            torch.testing.assert_close(traced(part), head.depth(part))


@pytest.mark.parametrize("name", LEARNED)
def test_interrupted_and_continued(name: str, cache: Cache, weights: Path, tmp_path: Path) -> None:
    """The tower is loaded again, and the weights come out the same, bit for bit."""
    whole = train(recipe_of(name, weights), cache, tmp_path / "whole", device="cpu")

    def stop(report: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe_of(name, weights), cache, tmp_path / "parts", device="cpu", on_epoch=stop)
    parts = train(recipe_of(name, weights), cache, tmp_path / "parts", device="cpu")
    one, other = (run.load_head("last", CPU)[0].state_dict() for run in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_weights_of_the_visual_tower_alone_say_that_texts_are_missing(tmp_path: Path, weights: Path) -> None:
    bare = resnet_weights(tmp_path / "visual.safetensors", MODEL, visual_only=True)
    for name in HEADS:
        cache = extract(recipe_of(name, bare), tmp_path / "cache", device="cpu").cache
        with pytest.raises(TextTowerError, match=r"text tower.*Extract with weights that have"):
            train(recipe_of(name, bare), cache, tmp_path / name, device="cpu")
