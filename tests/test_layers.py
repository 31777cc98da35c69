"""Columns that an encoder makes when a head reads them: tokens of several layers, from encoder to cache, run and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pcd.cache import Cache
from pcd.cache.verify import verify_cache
from pcd.columns import ColumnSpec
from pcd.datasets import create_dataset
from pcd.encoders import create_encoder, output_of, registry, with_columns
from pcd.encoders.openclip import OpenClipEncoder
from pcd.errors import CacheError, RunError, UsageError
from pcd.evaluation.pixels import combine_views
from pcd.export.graph import DepthNetwork
from pcd.fingerprint import digest
from pcd.recipe import Recipe
from pcd.recipe_files import load_recipe
from pcd.stages.export_bundle import export_bundle
from pcd.stages.extract import Extraction, extract
from pcd.stages.predict import Predictor
from pcd.stages.run_encoder import load_exportable
from pcd.stages.runs import Run, open_run
from pcd.stages.sweep import sweep
from pcd.stages.sweep_plan import plan_sweep
from pcd.stages.texts import text_digest
from pcd.stages.train import train
from tests.export_support import SHORT, as_input, picture, train_tiny
from tests.test_extract import files, toy_recipe
from tests.tiny_clip import reference_model, tiny_model, tiny_weights
from tests.toy import Said, ToyEncoder

PATCH = "clip/patch"
HEAD = ["head.layers=[1]", "head.fusion=film"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("tiny") / "both.safetensors", tiny_model())


def tiny(weights: Path, size: tuple[int, int] = (64, 64), **options: Any) -> OpenClipEncoder:
    encoder = create_encoder("openclip:pcd-tiny", {"weights": str(weights), **options}, size, "cpu")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_tokens_of_a_block_are_those_a_hook_sees(weights: Path, size: tuple[int, int]) -> None:
    """Blocks of open_clip's own model, then LayerNorm and projection written out in float64."""
    plain = tiny(weights, size)
    encoder = with_columns(plain, [f"{PATCH}@3", f"{PATCH}@1", f"{PATCH}@2"])
    views = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))
    columns = encoder.encode(views)
    assert [(name, tuple(value.shape[1:]), str(value.dtype)) for name, value in columns.items()] == [
        (spec.name, spec.shape, f"torch.{spec.dtype}") for spec in encoder.columns
    ]
    assert [spec.name for spec in encoder.columns][2:] == [f"{PATCH}@1", f"{PATCH}@2", f"{PATCH}@3"]

    model, caught = reference_model(weights, size), dict[int, np.ndarray]()
    for number, block in enumerate(model.visual.transformer.resblocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, number=number: caught.update({number: out.double().numpy()}))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        model.encode_image((views - mean) / std)
    norm, proj = model.visual.ln_post, model.visual.proj.detach().double().numpy()
    weight, bias = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    for number, hidden in caught.items():
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        expected = (centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps) * weight + bias) @ proj
        found = columns[f"{PATCH}@{number}"].double().numpy()
        np.testing.assert_allclose(found, expected[:, 1:], rtol=2**-11 + 2e-4, atol=2e-4)
    assert torch.equal(columns[f"{PATCH}@3"], columns[PATCH])
    assert not torch.equal(columns[f"{PATCH}@2"], columns[PATCH])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_final_tokens_do_not_depend_on_what_else_is_asked_for(weights: Path, precision: str) -> None:
    plain = tiny(weights, precision=precision)
    more = with_columns(with_columns(plain, [f"{PATCH}@2"]), [f"{PATCH}@1", PATCH, "depth/mean", "clip/patch@x"])
    views = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    found, expected = more.encode(views), plain.encode(views)
    assert [*expected] == [PATCH, "clip/cls"]
    assert [*found] == [PATCH, "clip/cls", f"{PATCH}@1", f"{PATCH}@2"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert more.fingerprint() == plain.fingerprint()
    assert output_of(more, f"{PATCH}@2") == {"layer": 2}
    assert output_of(more, PATCH) == output_of(plain, PATCH) == {}
    assert more.embed_text(["near"]).equal(plain.embed_text(["near"]))


def test_blocks_that_are_not_there(weights: Path) -> None:
    with pytest.raises(UsageError, match=r"column clip/patch@4: pcd-tiny has transformer blocks 1 to 3\."):
        with_columns(tiny(weights), [f"{PATCH}@4"])
    for name in ("clip/patch@0", "clip/patch@01", "clip/cls@0", "x/clip/patch@1", "clip/patch@1/x"):
        assert not tiny(weights).offers(name)
    toy = create_encoder("toy:toy", {}, (16, 16), "cpu")
    assert with_columns(toy, [f"{PATCH}@1"]) is toy


class LayeredToy(ToyEncoder):
    """As a third party would write it: layer n are the tokens times n."""

    stop_after = 10**9

    def __init__(self, model: str, options: ToyEncoder.Options, view_size: tuple[int, int], device: str) -> None:
        super().__init__(model, options, view_size, device)
        self.outputs: dict[str, dict[str, Any]] = {}

    def offers(self, name: str) -> bool:
        return name.startswith(f"{PATCH}@")

    def with_columns(self, names: list[str]) -> LayeredToy:
        other = LayeredToy("", self.options, (self.grid[0] * 4, self.grid[1] * 4), "cpu")
        other.outputs = self.outputs | {name: {"factor": int(name.partition("@")[2])} for name in names}
        spec = self.columns[0]
        more = (ColumnSpec(name, spec.shape, spec.dtype, spec.dims, "toy") for name in other.outputs)
        other.columns = (*self.columns[:2], *more)  # type: ignore[assignment]
        return other

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        if ToyEncoder.calls >= LayeredToy.stop_after:
            raise KeyboardInterrupt
        found = super().encode(views)
        return found | {name: found[PATCH] * output["factor"] for name, output in self.outputs.items()}


@pytest.fixture(autouse=True, scope="module")
def layered_toy() -> None:
    registry.add("layered", "tests.test_layers:LayeredToy")


def layered(*layers: int, encoder: str = "layered:toy") -> Recipe:
    head = {"name": "pureclip", "min_depth": 0.1, "max_depth": 10.0, "layers": list(layers)}
    return toy_recipe(head=head).model_copy(update={"encoder": {"name": encoder, "weights": "random"}})


def run(root: Path, recipe: Recipe, **options: Any) -> Extraction:
    return extract(recipe, root, device="cpu", **options)


def test_an_extraction_adds_the_columns_that_are_missing(tmp_path: Path) -> None:
    cache = run(tmp_path / "a", layered()).cache
    assert cache.manifest.encoders.keys() == {"layered"}
    before, texts = files(tmp_path / "a"), cache.texts()
    assert not any("@" in name for name in cache.manifest.columns)
    extraction = run(tmp_path / "a", layered(2, 5))
    after = files(tmp_path / "a")
    assert extraction.encoded == 17
    assert all(after[name] == content for name, content in before.items() if not name.endswith("manifest.json"))
    assert {name.split("/")[2] for name in after.keys() - before.keys() if "commits" not in name} == {"patch@2", "patch@5"}
    cache = Cache.open(tmp_path / "a")
    assert verify_cache(cache) == []
    assert cache.texts() == texts
    for table in cache.tables:
        rows = range(table.samples * table.views)
        tokens = table.column(PATCH).read(rows)
        np.testing.assert_array_equal(table.column(f"{PATCH}@5").read(rows), tokens * np.float16(5))
    assert files(tmp_path / "a") == files_of_another(tmp_path / "b", layered(2, 5))
    entries = cache.manifest.columns
    assert entries[f"{PATCH}@2"].fingerprint == {
        **entries[PATCH].fingerprint,
        "column": f"{PATCH}@2",
        "output": {"factor": 2},
    }
    for recipe in (layered(2, 5), layered(), layered(5)):
        calls = ToyEncoder.calls
        assert run(tmp_path / "a", recipe).encoded == 0
        assert ToyEncoder.calls == calls
    assert run(tmp_path / "a", layered(2, 3)).encoded == 17
    assert f"{PATCH}@3" in Cache.open(tmp_path / "a").manifest.columns


def files_of_another(root: Path, recipe: Recipe) -> dict[str, bytes]:
    run(root, recipe)
    return files(root)


def test_what_was_begun_is_completed_by_whoever_extracts_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, layered())
    monkeypatch.setattr(LayeredToy, "stop_after", ToyEncoder.calls + 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, layered(4), batch_views=4)
    monkeypatch.undo()
    assert not Cache.open(tmp_path).complete
    assert run(tmp_path, layered()).encoded > 0
    cache = Cache.open(tmp_path)
    assert cache.complete
    assert f"{PATCH}@4" in cache.manifest.columns


def test_an_encoder_without_layers_says_so(tmp_path: Path) -> None:
    said = Said()
    recipe = layered(3, encoder="toy:toy")
    cache = run(tmp_path / "cache", recipe, progress=said).cache
    assert "The head reads clip/patch@3, which toy:toy does not make; it cannot train so." in said
    with pytest.raises(CacheError, match=r"table train has no column 'clip/patch@3'"):
        train(recipe, cache, tmp_path / "run", device="cpu")


def test_the_sweep_over_layers_trains_every_variant(tmp_path: Path) -> None:
    cache = run(tmp_path / "cache", layered(6, 12, 18)).cache
    plan = plan_sweep(cache, "layers", seeds=[0], overrides=["head.min_depth=0.1", "train.epochs=1"])
    done = sweep(plan, cache, tmp_path / "out", device="cpu", protocols=["eigen"])
    assert done.failures == []
    tensors = [load_file(tmp_path / "out" / v.name / "seed-0" / "checkpoints" / "last.safetensors") for v in plan.variants]
    assert [found["weights.phi.1.weight"].shape[1] for found in tensors] == [6, 12, 12, 12, 24]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Cache]:
    return train_tiny(tmp_path_factory.mktemp("run"), "openclip:pcd-demo", "random", head=HEAD)


def test_a_run_with_layers_predicts_what_its_cache_gives(trained: tuple[Run, Cache]) -> None:
    run, cache = trained
    assert list(run.info["columns"]) == [PATCH, f"{PATCH}@1", "clip/cls"]
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    assert head.phi[1].weight.shape == (128, 2 * 128)  # type: ignore[union-attr, index]
    dataset, table = create_dataset("toy", {"limit": 6}), cache.table("test")
    rows = table.view_rows(np.arange(2)).reshape(-1)
    columns = {name: torch.from_numpy(table.column(name).read(rows)) for name in head.reads(head.options)}
    predictor = Predictor(run, device="cpu", upsample="nearest")
    images = [dataset.load("test", key).rgb for key in table.keys[:2]]
    found = torch.cat([prediction.patches[0] for prediction in predictor.predict_batch(images)])
    with torch.inference_mode():
        depth = combine_views(head.depth(columns).reshape(2, table.views, *run.grid), run.plan, tta=True)
    torch.testing.assert_close(found, depth, rtol=1e-4, atol=1e-4)
    other = open_run(run.root)
    for part in ("columns", "shapes"):
        other.info[part]["clip/other"] = other.info[part]["clip/cls"]
    other.recipe.head["cls_column"] = "clip/other"
    with pytest.raises(RunError, match=r"reads clip/other, which openclip:pcd-demo does not make of an image"):
        Predictor(other, device="cpu")


def test_a_run_with_layers_is_exported(trained: tuple[Run, Cache], tmp_path: Path) -> None:
    run, _ = trained
    made = export_bundle(run, tmp_path / "bundle", with_encoder=True)
    bundled = open_run(made.root)
    image = picture(24, 40)
    expected = Predictor(run, device="cpu").predict(image).depth
    np.testing.assert_array_equal(Predictor(bundled, device="cpu").predict(image).depth, expected)
    assert bundled.info["columns"][f"{PATCH}@1"]["output"] == {"layer": 1}
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    network = DepthNetwork(load_exportable(run).network(), head, run.plan, (24, 40))
    with torch.inference_mode():
        np.testing.assert_allclose(network(torch.from_numpy(as_input(image)))[0][0, 0], expected, rtol=1e-4)


def test_weights_in_a_bundle_make_the_layers(weights: Path, tmp_path: Path) -> None:
    run, cache = train_tiny(tmp_path, "openclip:pcd-tiny", str(weights), head=["head.layers=[2]"])
    made = export_bundle(run, tmp_path / "bundle", with_encoder=True)
    image = picture(24, 40)
    expected = Predictor(run, device="cpu").predict(image).depth
    np.testing.assert_array_equal(Predictor(open_run(made.root), device="cpu").predict(image).depth, expected)
    plain = load_recipe("folder", SHORT).model_copy(update={"dataset": {"name": "toy"}, "encoder": run.recipe.encoder})
    without = train(plain, cache, tmp_path / "without", device="cpu")  # the same cache serves heads that read fewer columns
    assert list(without.info["columns"]) == [PATCH, "clip/cls"]
    assert text_digest(cache, list(cache.manifest.columns)) == digest(tiny(weights, (32, 48)).fingerprint())
