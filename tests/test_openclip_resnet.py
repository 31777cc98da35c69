"""Columns of ModifiedResNets, against hooks on open_clip's own modules and attention written out in float64."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from pcd.cache.verify import verify_cache
from pcd.datasets import create_dataset
from pcd.encoders import create_encoder, output_of, with_columns
from pcd.encoders.openclip import OpenClipEncoder
from pcd.encoders.openclip_names import find_architecture, open_clip, usable_models
from pcd.encoders.openclip_towers import _build
from pcd.errors import UsageError, WeightsError
from pcd.stages.extract import extract
from pcd.stages.recipes import extraction_recipe
from pcd.views import image_canvas, to_views
from tests.tiny_clip import tiny_model, tiny_weights
from tests.tiny_resnet import NATIVE, STAGES, reference_resnet, resnet_weights, tiny_resnet

Doubles = npt.NDArray[np.float64]
ALL = [f"clip/{stage}" for stage in STAGES]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resnet_weights(tmp_path_factory.mktemp("resnet") / "both.safetensors", tiny_resnet())


def make(
    weights: Path | str, size: tuple[int, int] = NATIVE, model: str = "pcd-tiny-resnet", **options: Any
) -> OpenClipEncoder:
    encoder = create_encoder(f"openclip:{model}", {"weights": str(weights), **options}, size, "cpu")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


def random_views(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def normalised(views: torch.Tensor, model: Any) -> torch.Tensor:
    config = open_clip.get_model_preprocess_cfg(model)
    return torch.stack([(views[:, c] - config["mean"][c]) / config["std"][c] for c in range(3)], dim=1)


def stages(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What leaves each stage, caught on the way: copied at once, since open_clip's ReLUs write in place."""
    caught: dict[str, torch.Tensor] = {}
    watched = {"stem": model.visual.act3, **{name: getattr(model.visual, name) for name in STAGES if name != "stem"}}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: caught.update({name: out.clone()}))
        for name, module in watched.items()
    ]
    with torch.no_grad():
        caught["encode_image"] = model.encode_image(images)
    for hook in hooks:
        hook.remove()
    return caught


def linear(layer: Any, values: Doubles) -> Doubles:
    found: Doubles = values @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    return found


def pooled(pool: Any, last: Doubles, positions: Doubles) -> Doubles:
    """The attention pool of locations `(P, C)` and positions `(1 + P, C)`, head by head."""
    tokens = np.concatenate([last.mean(axis=0, keepdims=True), last]) + positions
    query, key, value = (linear(layer, tokens) for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
    width, heads = tokens.shape[1] // pool.num_heads, []
    for head in range(pool.num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = key[:, part] @ query[0, part] / np.sqrt(width)
        share = np.exp(logits - logits.max())
        heads.append(share / share.sum() @ value[:, part])
    return linear(pool.c_proj, np.concatenate(heads))


def resampled(positions: torch.Tensor, grid: tuple[int, int]) -> Doubles:
    """Each channel of the 3x3 positions as a picture through Pillow's bicubic filter; the first position as it is."""
    planes = positions[1:].reshape(3, 3, -1).numpy()
    pictures = [Image.fromarray(planes[:, :, c]).resize(grid[::-1], Image.Resampling.BICUBIC) for c in range(planes.shape[2])]
    spread = np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures], axis=-1)
    return np.concatenate([positions[:1].double().numpy(), spread.reshape(grid[0] * grid[1], -1)])


@pytest.mark.parametrize("size", [NATIVE, (64, 160), (32, 32)])
def test_every_column_agrees_with_a_recomputation(weights: Path, size: tuple[int, int]) -> None:
    encoder = with_columns(make(weights, size), [*ALL[::-1], "depth/mean"])
    assert encoder.grid == (size[0] // 32, size[1] // 32)
    views = random_views(size)
    columns = encoder.encode(views)
    assert [*columns] == ["clip/patch", "clip/cls", *ALL]
    assert [(name, tuple(value.shape[1:]), str(value.dtype)) for name, value in columns.items()] == [
        (spec.name, spec.shape, f"torch.{spec.dtype}") for spec in encoder.columns
    ]
    model = reference_resnet(weights)
    positions = model.visual.attnpool.positional_embedding.detach()
    if size != NATIVE:  # open_clip itself has one size only; here its pool is kept from complaining
        model.visual.attnpool = torch.nn.Identity()
    expected, pool = stages(model, normalised(views, model)), reference_resnet(weights).visual.attnpool
    for name, (stride, channels) in STAGES.items():
        found = columns[f"clip/{name}"]
        assert found.shape == (2, size[0] // stride, size[1] // stride, channels)
        assert found.is_contiguous()
        torch.testing.assert_close(found.float(), expected[name].permute(0, 2, 3, 1), rtol=2**-10, atol=1e-4)
    last = expected["layer4"].double().flatten(2).transpose(1, 2).numpy()
    dense = linear(pool.c_proj, linear(pool.v_proj, last))
    np.testing.assert_allclose(columns["clip/patch"].double().numpy(), dense, rtol=2**-10, atol=1e-4)
    spread = resampled(positions, encoder.grid)
    np.testing.assert_allclose(columns["clip/cls"].numpy(), [pooled(pool, view, spread) for view in last], rtol=1e-4, atol=1e-5)
    if size == NATIVE:
        torch.testing.assert_close(columns["clip/cls"], expected["encode_image"], rtol=1e-5, atol=1e-6)


def test_the_dense_path_is_the_pool_for_queries_that_see_their_own_location_alone(weights: Path) -> None:
    """torch's attention itself, with a mask that leaves the diagonal, and without positions."""
    model, views = reference_resnet(weights), random_views(NATIVE)
    pool, last = model.visual.attnpool, stages(model, normalised(views, model))["layer4"].flatten(2).permute(2, 0, 1)
    found, _ = F.multi_head_attention_forward(
        last, last, last, 512, pool.num_heads, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        attn_mask=torch.full((9, 9), -torch.inf).fill_diagonal_(0), use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    dense = make(weights).encode(views)["clip/patch"]
    torch.testing.assert_close(dense.float(), found.transpose(0, 1).detach(), rtol=2**-10, atol=1e-4)


def test_mirrored_views_give_mirrored_maps_where_they_can(tmp_path: Path, weights: Path) -> None:
    """Strided convolutions start at the left: mirroring commutes once only their middle taps count and pixels come in pairs."""
    state = load_file(weights)
    for value in state.values():
        if value.ndim == 4 and value.shape[-1] == 3:
            value[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    places = state["visual.attnpool.positional_embedding"]
    places[1:] = places[1:].reshape(3, 3, -1)[:, [0, 1, 0]].reshape(9, -1)
    save_file(state, tmp_path / "middle.safetensors")
    encoder = with_columns(make(tmp_path / "middle.safetensors", (64, 160)), ALL)
    views = random_views((32, 80)).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    plain, mirrored = encoder.encode(views), encoder.encode(views.flip(-1))
    for name in ALL:
        torch.testing.assert_close(mirrored[name].flip(2), plain[name], rtol=2e-3, atol=1e-4)
        assert not torch.allclose(mirrored[name], plain[name], rtol=2e-3, atol=1e-4)
    grids = (found["clip/patch"].reshape(2, 2, 5, 32) for found in (plain, mirrored))
    torch.testing.assert_close(next(grids).flip(2), next(grids), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(mirrored["clip/cls"], plain["clip/cls"], rtol=1e-4, atol=1e-5)


def test_rn50_at_the_size_of_the_papers() -> None:
    """DepthCLIP and the papers after it: 416x544 to 13x17 locations, of 2048 channels before the pool."""
    encoder = with_columns(make("random", (416, 544), "RN50"), ALL)
    shapes = {spec.name: spec.shape for spec in encoder.columns}
    assert shapes == {
        "clip/patch": (221, 1024),
        "clip/cls": (1024,),
        "clip/stem": (208, 272, 64),
        "clip/layer1": (104, 136, 256),
        "clip/layer2": (52, 68, 512),
        "clip/layer3": (26, 34, 1024),
        "clip/layer4": (13, 17, 2048),
    }
    assert {name: tuple(value.shape[1:]) for name, value in encoder.encode(random_views((416, 544), 1)).items()} == shapes
    assert encoder.embed_text(["a chair"]).shape == (1, 1024)


@pytest.mark.parametrize(
    ("name", "millions"), [("RN50", 38.32), ("RN101", 56.26), ("RN50x4", 87.14), ("RN50x16", 167.33), ("RN50x64", 420.38)]
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    """open_clip's table of models lists the parameters of each image tower."""
    with torch.device("meta"):
        for model in (name, f"{name}-quickgelu"):
            visual: Any = _build(find_architecture(model), "fp32", text=False).visual
            count = sum(value.numel() for value in visual.parameters())
            assert round(count / 1e6, 2) == millions
            assert model in usable_models()
    assert name != "RN50" or count == 38_316_896


def test_columns_that_a_tower_does_not_have(weights: Path) -> None:
    resnet = make(weights)
    for name in ("clip/patch@1", "clip/maskclip", "clip/tokens@2", "clip/cls@1", "clip/layer5"):
        with pytest.raises(UsageError, match=rf"column {name}: pcd-tiny-resnet is a ResNet; .* maps, clip/stem and clip/lay"):
            resnet.offers(name)
    for name in ("clip/layer", "clip/layer01", "clip/stem@1", "stem", "timm/stem", "clip/x"):
        assert not resnet.offers(name)
    with pytest.raises(UsageError, match=r"views of 100x96 pixels: .* patches of 32 pixels, .* the height 100; .* 96 or 128"):
        make(weights, (100, 96))


def test_what_determines_the_columns(weights: Path) -> None:
    found, native = make(weights, (64, 160), precision="bf16").fingerprint(), make(weights).fingerprint()
    assert found == {
        "encoder": "openclip",
        "model": "pcd-tiny-resnet",
        "quick_gelu": False,
        "weights": {"kind": "file", "digest": hashlib.sha256(weights.read_bytes()).hexdigest()},
        "layer": "layer4",
        "projection": {"patch": "attnpool.c_proj(v_proj), no positions", "cls": "attnpool"},
        "positions": "antialiased bicubic",
        "precision": "bf16",
        "view_size": [64, 160],
        "patch": [32, 32],
        "grid": [2, 5],
        "width": 32,
        "text": True,
        "mean": native["mean"],
        "std": native["std"],
    }
    encoder = with_columns(make(weights), ALL)
    assert output_of(encoder, "clip/layer3") == {"layer": "layer3", "space": "tower"}
    assert output_of(encoder, "clip/stem") == {"layer": "stem", "space": "tower"}
    assert output_of(encoder, "clip/patch") == {}
    assert (encoder.fingerprint(), [spec.dims for spec in encoder.columns][2:]) == (native, [("y", "x", "channel")] * 5)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("bf16", 0.06)])
def test_half_precision(weights: Path, precision: str, error: float) -> None:
    exact, coarse = (with_columns(make(weights, precision=p), ALL).encode(random_views(NATIVE)) for p in ("fp32", precision))
    for name, value in coarse.items():
        assert value.dtype == exact[name].dtype
        assert 0 < (value.float() - exact[name].float()).norm() / exact[name].float().norm() < error


def test_what_is_always_made_does_not_depend_on_what_else_is_asked_for(weights: Path) -> None:
    plain, views = make(weights), random_views(NATIVE)
    more, expected = with_columns(with_columns(plain, ["clip/layer2"]), ["clip/stem"]).encode(views), plain.encode(views)
    assert [*more] == ["clip/patch", "clip/cls", "clip/stem", "clip/layer2"]
    assert all(torch.equal(more[name], value) for name, value in expected.items())


def test_maps_in_a_cache_are_what_the_encoder_gives(tmp_path: Path) -> None:
    maps = ["head.patch_column=clip/layer2", "head.cls_column=clip/stem", "head.table_init=tokens"]
    overrides = ["views.canvas=[64,192]", "views.grid=[1,2]", *maps]
    recipe = extraction_recipe("toy", None, overrides, encoder="openclip:pcd-demo-resnet", weights="random", limit=6)
    cache = extract(recipe, tmp_path, device="cpu").cache
    assert verify_cache(cache) == []
    entries, table = cache.manifest.columns, cache.table("test")
    assert [entries[f"clip/{name}"].spec.shape for name in ("stem", "layer2")] == [(32, 48, 16), (8, 12, 128)]
    assert entries["clip/stem"].fingerprint["output"] == {"layer": "stem", "space": "tower"}
    dataset = create_dataset("toy", {"limit": 6})
    canvas = image_canvas(dataset.load("test", table.keys[0]).rgb, cache.manifest.plan)
    encoder = with_columns(make("random", (64, 96), "pcd-demo-resnet"), ["clip/layer2", "clip/stem"])
    found = encoder.encode(torch.from_numpy(to_views(canvas, cache.manifest.plan)).permute(0, 3, 1, 2).contiguous())
    for name in ("clip/layer2", "clip/stem"):
        stored = table.column(name).read(table.view_rows(np.arange(1)).reshape(-1))
        np.testing.assert_allclose(stored.astype(np.float32), found[name].float().numpy(), rtol=2e-3, atol=2e-3)


def test_files_of_the_image_tower_alone_and_without_counters(tmp_path: Path, weights: Path) -> None:
    state = {key: value for key, value in load_file(weights).items() if key.startswith("visual.")}
    expected = make(weights).encode(random_views(NATIVE))["clip/cls"]
    save_file(state, tmp_path / "visual.safetensors")
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.safetensors")
    for name in ("visual", "old"):
        encoder = make(tmp_path / f"{name}.safetensors")
        assert not encoder.has_text
        assert torch.equal(encoder.encode(random_views(NATIVE))["clip/cls"], expected)
    assert {*(encoder.image_weights() or {})} == {*state} - {key for key in state if "num_batches" in key}
    random = [make("random", seed=seed).encode(random_views(NATIVE))["clip/cls"] for seed in (1, 1, 2)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])


def test_files_that_do_not_fit(tmp_path: Path, weights: Path) -> None:
    state = load_file(weights)
    wider = tiny_resnet("pcd-wider-resnet", width=32)
    with pytest.raises(WeightsError, match=r"does not fit pcd-wider-resnet: .* By its shapes it is for: pcd-tiny-resnet\."):
        make(weights, model=wider)
    with pytest.raises(WeightsError, match=r"does not fit pcd-tiny: .* By its shapes it is for: pcd-tiny-resnet\."):
        make(weights, (64, 64), tiny_model())
    vit = tiny_weights(tmp_path / "vit.safetensors", tiny_model())
    with pytest.raises(WeightsError, match=r"does not fit pcd-tiny-resnet: .* By its shapes it is for: .*pcd-tiny"):
        make(vit)
    state["visual.attnpool.positional_embedding"] = torch.zeros(1 + 8, 512)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"visual\.attnpool\.positional_embedding is for 8 patches, neither the 3x3 of"):
        make(tmp_path / "odd.safetensors")
