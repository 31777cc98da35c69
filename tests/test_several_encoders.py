"""Several encoders in one cache, heads that read more than one, and heads whose depths are finer than their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcd.cache import Cache
from pcd.cache.gc import collect, garbage
from pcd.errors import CacheError, FingerprintError, RecipeError, RunError, UsageError
from pcd.recipe import Recipe, parse_recipe
from pcd.recipe_files import load_recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.export_bundle import export_bundle
from pcd.stages.extract import extract
from pcd.stages.inference import canvas_truth
from pcd.stages.origin import Origin, Place
from pcd.stages.predict import Predictor
from pcd.stages.recipes import training_recipe
from pcd.stages.repair import HERE, repair
from pcd.stages.report import report
from pcd.stages.run_encoder import load_exportable
from pcd.stages.runs import Run, open_run
from pcd.stages.show import show
from pcd.stages.sweep import sweep
from pcd.stages.sweep_needs import extraction_recipes
from pcd.stages.sweep_plan import plan_sweep
from pcd.stages.train import train
from pcd.stages.verify import verify
from pcd.views import from_views
from tests.cache_support import local
from tests.sweep_support import SHORT, write_sweep
from tests.test_extract import files, toy_recipe
from tests.toy import FineHead, MapEncoder, Said, ToyDataset, ToyEncoder

FINE = {"name": "toy-fine", "min_depth": 0.1, "max_depth": 10.0}
MAPS = {"maps": {"name": "toy-maps"}}
FEW = {"epochs": 3, "batch_size": 4}


def fine(**tables: Any) -> Recipe:
    """A recipe whose head reads tokens and maps."""
    return toy_recipe(**{"head": FINE, "encoders": MAPS, "train": FEW, **tables})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(fine(), tmp_path_factory.mktemp("fine") / "cache", device="cpu").cache


@pytest.fixture(scope="module")
def run(cache: Cache) -> Run:
    return train(
        training_recipe(cache, None, []).model_copy(update={"head": FINE, "train": fine().train}),
        cache,
        local(cache.root).parent / "run",
    )


def test_each_encoder_fills_its_columns_as_it_would_alone(cache: Cache, tmp_path: Path) -> None:
    assert list(cache.manifest.encoders) == ["toy", "toy-maps"]
    assert cache.manifest.encoder_of("maps/colour") == "toy-maps"
    assert cache.manifest.encoder_of("depth/count") is None
    alone = extract(toy_recipe(head=FINE), tmp_path / "alone", device="cpu").cache
    for table in alone.tables:
        for name in table.column_names():
            every = range(table.column(name).rows)
            np.testing.assert_array_equal(table.column(name).read(every), cache.table(table.name).column(name).read(every))
    maps, encoder = cache.table("test").column("maps/colour"), MapEncoder("", MapEncoder.Options(), (16, 16), "cpu")
    assert maps.spec.shape == (8, 8, 3)
    tokens = ToyEncoder("", ToyEncoder.Options(), (16, 16), "cpu")
    assert tokens.grid == (4, 4)
    stored = cache.table("test").column("clip/patch").read([3])[0]
    np.testing.assert_allclose(  # a token begins with the mean colour of 4x4 pixels: four cells of the map
        F.avg_pool2d(torch.from_numpy(maps.read([3])).float().permute(0, 3, 1, 2), 2).flatten(2)[0].T, stored[:, :3], atol=2e-3
    )
    assert encoder.grid == (8, 8)


def test_an_encoder_is_added_to_a_cache_that_is_there_and_no_other_runs_again(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    extract(toy_recipe(), root, device="cpu")
    before, calls = files(root), ToyEncoder.calls
    cache = extract(fine(), root, device="cpu").cache
    assert ToyEncoder.calls == calls
    after = files(root)
    assert {name for name in before if before[name] != after[name]} == {"manifest.json", "commits/manifest.json"}
    assert cache.manifest.columns["depth/count"].spec.shape == (16,)  # patches of the encoder that was first
    said = Said()
    maps = MapEncoder.calls
    assert extract(fine(), root, device="cpu", progress=said).encoded == 0
    assert (ToyEncoder.calls, MapEncoder.calls, files(root)) == (calls, maps, after)
    assert sum("Nothing to do" in line for line in said) == 2


def test_a_missing_text_tower_is_spoken_of_once_and_only_if_no_encoder_has_one(tmp_path: Path) -> None:
    texts = {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0}
    for text, times in ((True, 0), (False, 1)):
        said = Said()
        extract(
            toy_recipe(head=texts, encoders=MAPS, encoder={"text": text}), tmp_path / f"{text}", device="cpu", progress=said
        )
        assert sum("no text tower" in line for line in said) == times


def test_a_cache_of_small_patches_holds_their_depth_once(tmp_path: Path) -> None:
    only = toy_recipe(encoder={"name": "toy-maps"}, head={**FINE, "tokens": "maps/colour"})
    cache = extract(only, tmp_path / "cache", device="cpu").cache
    assert {name for name in cache.manifest.columns if name.startswith("depth/")} == {"depth/canvas", "depth/native"}
    shown = show(cache.root, split="test", sample="1")
    canvas = canvas_truth(cache.table("test"), np.array([1]), "depth")[0]
    assert shown.facts["truth"]["max"] == pytest.approx(float(np.nanmax(canvas)))
    with pytest.raises(CacheError, match="no column 'clip/patch'"):
        train(training_recipe(cache, None, SHORT), cache, tmp_path / "run")


def test_two_models_of_one_encoder_have_prefixes_and_texts_of_their_own(tmp_path: Path) -> None:
    head = {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0, "bins": 3}
    first = toy_recipe(head=head)
    second = {"patch_column": "alt/patch", "cls_column": "alt/cls"}
    other = toy_recipe(head={**head, **second}, encoder={"prefix": "alt", "gain": 2.0})
    extract(first, tmp_path / "cache", device="cpu")
    cache = extract(other, tmp_path / "cache", device="cpu").cache
    assert list(cache.manifest.encoders) == ["toy", "toy:alt"]
    assert cache.manifest.encoder_of("alt/patch") == "toy:alt"
    rows = range(cache.table("train").column("clip/patch").rows)
    one, two = (cache.table("train").column(name).read(rows).astype(np.float32) for name in ("clip/patch", "alt/patch"))
    np.testing.assert_allclose(two, 2 * one, rtol=2e-3)
    assert len({text["encoder"] for text in cache.texts()}) == 2
    resolved = training_recipe(cache, None, [*SHORT, "head.patch_column=alt/patch", "head.cls_column=alt/cls"])
    assert resolved.encoder["prefix"] == "alt"
    assert resolved.encoders == {}
    collect(cache.root, garbage(cache.root, ["alt/patch", "alt/cls"]))
    left = Cache.open(cache.root)
    assert list(left.manifest.encoders) == ["toy"]
    assert verify(cache.root).faults == []


def test_a_head_is_trained_on_its_own_grid(cache: Cache, run: Run) -> None:
    assert (run.patches, run.grid) == ((4, 4), (8, 8))
    assert list(run.info["encoders"]) == ["toy", "toy-maps"]
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    assert isinstance(head, FineHead)
    assert head.grid == (8, 8)
    first, last = run.history[0], run.history[-1]
    assert last["losses"]["depth/total"] < first["losses"]["depth/total"]


def test_cells_that_do_not_divide_a_view_are_refused_before_anything_is_read(cache: Cache, tmp_path: Path) -> None:
    decoder = {"name": "dpt-lite", "min_depth": 0.1, "max_depth": 10.0, "scale": 8}
    with pytest.raises(RecipeError, match=r"a grid of 32x32 cells, which does not divide the height of views of 16x16 pixels"):
        train(toy_recipe(head=decoder), cache, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def by_hand(cache: Cache, run: Run) -> list[float]:
    """AbsRel of each test image on the canvas: mirrored view averaged in, cells repeated, no code of the evaluation."""
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    table, found = cache.table("test"), []
    for sample in range(table.samples):
        rows = table.view_rows(np.array([sample])).reshape(-1)
        columns = {name: torch.from_numpy(table.column(name).read(rows)) for name in ("clip/patch", "maps/colour")}
        with torch.no_grad():
            cells = head.depth(columns).reshape(-1, 8, 8).numpy()
        views = np.stack([np.kron(view, np.ones((2, 2), dtype=np.float32)) for view in cells])
        depth = np.mean(from_views(views, table.plan), axis=0)
        truth = canvas_truth(table, np.array([sample]), "depth")[0]
        there = np.isfinite(truth) & (truth > 0.1) & (truth < 10.0)
        found.append(float(np.mean(np.abs(depth - truth)[there] / truth[there])))
    return found


def test_scores_of_a_finer_grid_are_those_of_a_plain_loop(cache: Cache, run: Run) -> None:
    evaluation = evaluate(run, cache, split="test", protocols=["pureclip"], device="cpu")
    (scores,) = evaluation.result["protocols"].values()
    assert scores["metrics"]["abs_rel"] == pytest.approx(np.mean(by_hand(cache, run)), rel=1e-5)


def test_images_go_through_all_encoders_of_a_run(cache: Cache, run: Run) -> None:
    dataset, head = ToyDataset(ToyDataset.Options()), run.load_head("abs_rel", torch.device("cpu"))[0]
    rgb = dataset.load("test", dataset.keys("test")[0]).rgb
    image = (rgb * 255).round().astype(np.uint8) if rgb.dtype != np.uint8 else rgb
    made = Predictor(run, device="cpu", tta=False, upsample="nearest").predict(image)
    table = cache.table("test")
    rows = table.view_rows(np.array([0]), flips=False).reshape(-1)
    columns = {name: torch.from_numpy(table.column(name).read(rows)) for name in ("clip/patch", "maps/colour")}
    with torch.no_grad():
        cells = head.depth(columns).reshape(-1, 8, 8).numpy()
    canvas = np.concatenate(list(cells), axis=1)
    assert made.patches[0].shape[-2:] == canvas.shape
    np.testing.assert_allclose(made.patches[0].squeeze().numpy(), canvas, rtol=2e-2)  # the image has 8 bits


def test_what_one_network_is_needed_for_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 encoders \(toy, toy-maps\)"):
        load_exportable(run)
    with pytest.raises(UsageError, match="2 encoders"):
        export_bundle(run, tmp_path / "bundle", with_encoder=True)
    plain = export_bundle(run, tmp_path / "bundle")
    assert plain is not None
    with pytest.raises(
        FingerprintError, match=r"weights\.kind: found 'file', wanted 'random'"
    ):  # maps have no weights to replace
        Predictor(run, weights="file", device="cpu")


def test_damage_in_any_encoders_columns_is_mended(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    cache = extract(fine(), root, device="cpu").cache
    before = files(root)
    for name in ("clip/patch", "maps/colour"):
        shard = next(path for path in sorted((root / "train" / name).rglob("*")) if path.is_file() and path.name != "zarr.json")
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(bytes(data))
    cache.close()
    faults = verify(root).faults
    assert {fault.column for fault in faults} == {"clip/patch", "maps/colour"}
    assert repair(root, faults, HERE).notes == []
    assert files(root) == before


def test_weights_of_one_of_several_encoders_are_not_given_to_the_others(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    extract(fine(), one, device="cpu")
    extract(toy_recipe(), two, device="cpu")
    cache = extract(toy_recipe(encoder={"prefix": "alt", "gain": 2.0}), two, device="cpu").cache
    moved = Place(weights="file", device="cpu")
    given = [getattr(encoder, "random_weights", None) for encoder in Origin(Cache.open(one), moved).encoders]
    assert given == [False, False]  # the toy's are now those of a file; maps have none to replace
    with pytest.raises(UsageError, match=r"several encoders with weights \(toy, toy:alt\)"):
        assert Origin(cache, moved).encoders


METHOD = """extends = "folder"
[head]
name = "toy-fine"
min_depth = 3.0
max_depth = 4.0
[encoders.maps]
name = "toy-maps"
[train]
epochs = 2
"""


def method_file(folder: Path, text: str = METHOD) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "fine.toml").write_text(text)
    return folder / "fine.toml"


def test_a_method_takes_the_place_of_head_and_encoders_but_not_of_the_data(tmp_path: Path) -> None:
    file = method_file(tmp_path / "prior-art")
    (tmp_path / "prior-art" / "finer.toml").write_text(
        'extends = "fine"\n[head]\nmaps = "other/colour"\n[views]\nflips = false\n'
    )
    own = 'extends = "fine"\n[encoder]\nname = "toy:own"\n'
    (tmp_path / "prior-art" / "own.toml").write_text(own)
    overrides = ["encoder.weights=some.pt", "train.batch_size=2", "head.maps=x/y"]
    got = load_recipe("kitti", overrides, str(file))
    assert got.dataset == {"name": "kitti"}
    assert got.head == {"name": "toy-fine", "min_depth": 0.001, "max_depth": 30.0, "maps": "x/y"}
    assert (got.encoder["weights"], got.encoders, got.train.epochs, got.train.batch_size) == ("some.pt", MAPS, 2, 2)
    chained = load_recipe("kitti", [], str(tmp_path / "prior-art" / "finer.toml"))
    assert (chained.head["maps"], chained.train.epochs, chained.views.flips) == ("other/colour", 2, None)
    assert load_recipe("kitti", overrides, str(tmp_path / "prior-art" / "own.toml")).encoder == {"name": "toy:own"}
    (tmp_path / "prior-art" / "fine.toml").write_text('extends = "finer"\n')
    with pytest.raises(RecipeError, match="round in a circle"):
        load_recipe("kitti", [], str(file))


def test_encoders_need_names() -> None:
    with pytest.raises(RecipeError, match=r"'encoders\.maps\.name' is missing"):
        fine(encoders={"maps": {"weights": "auto"}})


def test_a_sweep_compares_methods_on_one_cache(cache: Cache, tmp_path: Path) -> None:
    method = method_file(tmp_path / "prior-art")
    file = write_sweep(
        tmp_path / "methods.toml",
        f"""
        [variants.pureclip]
        [variants.fine]
        recipe = "{method}"
        published = "DepthCLIP (zero-shot, RN50)"
        [variants.absent]
        recipe = "{method}"
        head.maps = "nowhere/colour"
        """,
    )
    common = [
        "head.table_init=random",
        "head.embedding.steps=2",
        "head.depth.steps=2",
        "train.batch_size=4",
        'evaluate.protocols=["eigen"]',
    ]
    with pytest.raises(RecipeError, match=r"variants\.fine.*unknown key"):
        plan_sweep(cache, file, overrides=common)
    text = (
        (tmp_path / "methods.toml").read_text().replace("[variants.pureclip]", "[variants.pureclip]\nhead.table_init='random'")
    )
    plan = plan_sweep(cache, write_sweep(tmp_path / "methods.toml", text), seeds=[0], overrides=["train.epochs=2", *common[3:]])
    assert plan.variants[1].recipe.head["max_depth"] == plan.variants[0].recipe.head["max_depth"] == 10.0
    done = sweep(plan, cache, tmp_path / "out", device="cpu")
    (failure,) = done.failures
    assert (failure["variant"], failure["error"]) == ("absent", "CacheError")
    assert "no column 'nowhere/colour'" in failure["message"]
    first, second, third = done.document["variants"]
    assert first["printed_row"] is None
    assert third["runs"] == []
    assert done.document["labels"] == ["random encoder weights", "synthetic scenes"]
    assert [line.split(",")[0] for line in done.document["encoders"]] == ["toy toy", "toy-maps maps"]
    alone = train(plan.variants[1].seeded(0), cache, tmp_path / "alone", device="cpu")
    beside = open_run(tmp_path / "out" / "fine" / "seed-0")
    assert [epoch["losses"] for epoch in alone.history] == [epoch["losses"] for epoch in beside.history]
    assert second["summary"]["abs_rel"]["mean"] is not None


def test_an_extraction_serves_all_variants_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_file(tmp_path / "prior-art")
    file = write_sweep(tmp_path / "methods.toml", f"[variants.plain]\n[variants.fine]\nrecipe = '{method}'\n")
    first, second = extraction_recipes(file, "toy", None, ["encoder.name=toy:toy", "encoder.weights=random"])
    assert (first.encoder, first.encoders) == ({"name": "toy:toy", "weights": "random"}, {})
    assert (second.encoder, second.encoders) == (first.encoder, MAPS)
    calls = ToyEncoder.calls
    cache = extract(first, tmp_path / "cache", device="cpu", together=[second]).cache
    assert {"clip/patch", "maps/colour"} <= set(cache.manifest.columns)
    passes = ToyEncoder.calls - calls
    extract(toy_recipe(), tmp_path / "alone", device="cpu")
    assert ToyEncoder.calls - calls == 2 * passes  # one pass over the views, not one for each variant
    third = second.model_copy(update={"views": second.views.model_copy(update={"flips": False})})
    with pytest.raises(RecipeError, match=r"differ in \[views\]"):
        extract(first, tmp_path / "other", device="cpu", together=[third])


def test_pages_about_a_run_on_several_encoders_name_them(cache: Cache, run: Run, tmp_path: Path) -> None:
    page = report([run], tmp_path / "report", cache=cache, device="cpu").page.read_text()
    assert "toy-maps maps" in page
    assert "depth on 8x8" in page
    assert parse_recipe(run.recipe.model_dump(), "again").encoders == run.recipe.encoders
    with pytest.raises(RunError, match="another recipe"):
        train(run.recipe.model_copy(update={"head": {**FINE, "max_depth": 9.0}}), cache, run.root)
