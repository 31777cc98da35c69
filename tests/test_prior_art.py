"""Every method of `pipelines/prior-art` from frames to predictions, on synthetic scenes with small random encoders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pcd.cache import Cache
from pcd.heads import head_options
from pcd.recipe_files import known_methods, load_recipe
from pcd.stages.predict import Predictor
from pcd.stages.runs import open_run
from pcd.stages.sweep_files import find_sweep, read_sweep
from tests.test_cli import Command
from tests.test_cli import pcd as pcd_

__all__ = ["pcd_"]
SMALL = {
    "auty": "token_width = 64\nbins = 7",
    "auty-log256": "token_width = 64\nbins = 9",
    "coarse-refined": "hidden = 16",
    "depth-eigen": "hidden = 16\nwidths = [4, 8, 8, 8, 8]",
    "depthclip-adapter": "image.reduction = 64\ntext.reduction = 32",
    "depthclip-adapter-self": "image.reduction = 64\ntext.reduction = 32",
    "dpt-lite": "channels = 8",
    "hu": "token_width = 64\nscenes = 2\nprompt_vectors = 2",
    "mlp": "width = 16",
    "nearest": "memory = 64",
}
"""What makes a method small enough to be trained in a second."""
MULTI_SCALE = "widths = [16, 8, 8, 8, 4, 4]"
NEEDS_SAM = {"prior-art/msa-seg"}
"""Needs the extra `sam`."""
UNTRAINED = {"mean", "nearest", "depthclip", "depthclip-joint"}
METHODS = [name for name in known_methods() if name not in NEEDS_SAM]


def small_method(folder: Path, name: str) -> str:
    """A method that is the one of that name on a small ResNet with random weights, where it brings an encoder."""
    recipe, short = load_recipe("nyu", [], name), name.partition("/")[2]
    own = MULTI_SCALE if short.startswith("msa") else SMALL.get(short, "")
    few = "samples_per_scene = 99\n" if short == "hu" else ""  # all frames here are of one scene
    text = f'extends = "{name}"\n[head]\n{own}\n[train]\nepochs = 2\nbatch_size = 4\n{few}'
    if recipe.encoder["name"].startswith("openclip:RN50"):
        text += '[encoder]\nname = "openclip:pcd-demo-resnet"\nweights = "random"\nprefix = "rn50"\n'
    file = folder / f"{short}.toml"
    file.write_text(text)
    return f'[variants.{short}]\nrecipe = "{file}"\n'


@pytest.mark.parametrize("base", ["nyu", "kitti"])
@pytest.mark.parametrize("name", known_methods())
def test_a_method_fits_the_data_it_is_used_on(name: str, base: str) -> None:
    alone, over = load_recipe(name), load_recipe(base, [], name)
    assert alone.description
    assert over.dataset["name"] == base
    assert over.head["max_depth"] == load_recipe(base).head["max_depth"]
    for recipe in (alone, over):
        cls, options = head_options(recipe.head)
        made = [recipe.encoder, *recipe.encoders.values()]
        prefixes = {
            table.get("prefix") or {"openclip": "clip"}.get(kind := table["name"].partition(":")[0], kind) for table in made
        }
        assert {column.partition("/")[0] for column in cls.learns_from(options)} <= {*prefixes, "view", "depth"}


def test_every_method_is_in_the_comparison() -> None:
    file = find_sweep("prior-art")
    assert file is not None
    named = {table.get("recipe") for table in read_sweep(file)["variants"].values()}
    assert set(known_methods()) - named == NEEDS_SAM


def test_every_method_from_frames_to_predictions(pcd_: Command, tmp_path: Path) -> None:
    methods = tmp_path / "methods"
    methods.mkdir()
    variants = "".join(small_method(methods, name) for name in METHODS)
    (tmp_path / "all.toml").write_text(f"seeds = [0]\n[variants.pureclip]\n{variants}")
    size = ["--set", "views.canvas=[96,128]", "--set", "dataset.train=12", "--set", "dataset.test=2"]
    code, _, err = pcd_(
        "extract",
        "--dataset",
        "synthetic",
        "--recipe",
        "demo",
        "--cache",
        "cache",
        "--sweep",
        "all.toml",
        "--device",
        "cpu",
        *size,
    )
    assert code == 0, err
    cache = Cache.open("cache")
    assert {name.partition("/")[0] for name in cache.manifest.columns} == {"clip", "rn50", "pixels", "depth", "sample", "view"}
    few = ["--recipe", "demo", "--set", "train.epochs=2", "--set", "train.batch_size=4", "--device", "cpu"]
    code, out, err = pcd_("sweep", "all.toml", "--cache", "cache", "--out", "out", *few, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["failures"] == []
    names = ["pureclip", *(name.partition("/")[2] for name in METHODS)]
    assert [variant["name"] for variant in document["variants"]] == names
    assert document["labels"] == ["random encoder weights", "synthetic scenes"] or "synthetic scenes" in document["labels"]
    rgb = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    for variant in document["variants"]:
        (run,) = (open_run(tmp_path / found["root"]) for found in variant["runs"])
        assert 0 < variant["summary"]["abs_rel"]["mean"] < 10, variant["name"]
        assert len(run.history) == (1 if variant["name"] in UNTRAINED else 2), variant["name"]
        if variant["name"] not in UNTRAINED:
            assert any(np.isfinite(value) and value != 0 for value in run.history[-1]["losses"].values()), variant["name"]
        depth = Predictor(run, device="cpu").predict(rgb).depth
        assert depth.shape == (96, 128)
        assert np.isfinite(depth).all(), variant["name"]


def test_methods_without_their_texts_say_what_is_missing(pcd_: Command, tmp_path: Path) -> None:
    """As with weights of an image tower alone: what needs words fails by name, what does not goes on."""
    methods = tmp_path / "methods"
    methods.mkdir()
    variants = "".join(small_method(methods, f"prior-art/{name}") for name in ("mean", "depthclip", "auty"))
    (tmp_path / "some.toml").write_text(f"seeds = [0]\n{variants}")
    size = ["--set", "views.canvas=[96,128]", "--set", "dataset.train=6", "--set", "dataset.test=1", "--limit", "4"]
    done = pcd_("extract", "--dataset", "synthetic", "--recipe", "demo", "--cache", "cache", "--device", "cpu", *size)
    assert done[0] == 0, done[2]
    code, out, _ = pcd_("sweep", "some.toml", "--cache", "cache", "--recipe", "demo", "--device", "cpu", "--json")
    assert code == 1
    document = json.loads(out)
    said = {failure["variant"]: failure["message"] for failure in document["failures"]}
    assert set(said) == {"depthclip", "auty"}
    assert all(re.search(r"no column 'rn50/layer4'.*pcd extract", message, re.DOTALL) for message in said.values())
    assert document["variants"][0]["runs"]
