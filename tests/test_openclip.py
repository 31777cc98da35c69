"""What the encoder computes, against open_clip's own outputs and a plain recomputation."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pcd.encoders import create_encoder
from pcd.encoders.base import Encoder
from pcd.encoders.openclip import OpenClipEncoder
from pcd.encoders.openclip_names import open_clip
from pcd.encoders.openclip_towers import resize_positions
from pcd.errors import RecipeError, TextTowerError, UsageError, WeightsError
from pcd.fingerprint import canonical, digest
from tests.tiny_clip import reference_model, tiny_model, tiny_weights

NATIVE = (64, 64)
CPU = "cpu"


def make(size: tuple[int, int] = NATIVE, model: str = "pcd-tiny", **options: Any) -> OpenClipEncoder:
    encoder = create_encoder(f"openclip:{model}", options, size, CPU)
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(tiny_weights(tmp_path_factory.mktemp("tiny") / "both.safetensors", tiny_model()))


@pytest.fixture(scope="module")
def visual_weights(tmp_path_factory) -> str:
    return str(tiny_weights(tmp_path_factory.mktemp("tiny") / "visual.safetensors", tiny_model(), visual_only=True))


def random_views(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def normalised(views: torch.Tensor, model: Any) -> torch.Tensor:
    """By the preprocessing that open_clip itself attached to the model, channel by channel."""
    config = open_clip.get_model_preprocess_cfg(model)
    channels = [(views[:, c] - config["mean"][c]) / config["std"][c] for c in range(3)]
    return torch.stack(channels, dim=1)


def reference_outputs(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_image`, and all tokens `(B, 1 + P, D)` in float64: the last block's output, caught by a hook on the way, with
    LayerNorm and projection written out.
    """
    caught = []
    hook = model.visual.transformer.resblocks[-1].register_forward_hook(lambda _m, _i, output: caught.append(output))
    with torch.no_grad():
        encoded = model.encode_image(images, normalize=False)
    hook.remove()
    hidden = caught[0].double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (model.visual.ln_post.weight, model.visual.ln_post.bias))
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + model.visual.ln_post.eps) * weight + bias
    return encoded, torch.from_numpy(np.einsum("blw,wd->bld", scaled, model.visual.proj.detach().double().numpy()))


def assert_columns(encoder: Encoder, model: Any, views: torch.Tensor, tolerance: float = 2e-4) -> dict[str, torch.Tensor]:
    """Both columns agree with `model`: CLS with `encode_image`, patches with the recomputation to float16's resolution."""
    columns = encoder.encode(views)
    expected, tokens = reference_outputs(model, normalised(views, model))
    assert [(name, tuple(values.shape[1:]), str(values.dtype)) for name, values in columns.items()] == [
        (spec.name, spec.shape, f"torch.{spec.dtype}") for spec in encoder.columns
    ]
    torch.testing.assert_close(columns["clip/cls"], expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(columns["clip/cls"].double(), tokens[:, 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(columns["clip/patch"].double(), tokens[:, 1:], rtol=2**-11 + tolerance, atol=tolerance)
    return columns


@pytest.mark.parametrize("size", [NATIVE, (96, 96), (64, 160), (48, 16)])
def test_tokens_agree_with_open_clip(weights, size):
    encoder = make(size, weights=weights)
    assert encoder.grid == (size[0] // 16, size[1] // 16)
    columns = assert_columns(encoder, reference_model(Path(weights), size), random_views(size))
    assert columns["clip/patch"].shape == (2, size[0] * size[1] // 256, 32)
    assert not columns["clip/cls"].requires_grad


def test_quick_gelu_is_the_models(tmp_path):
    quick = tiny_model("pcd-tiny-quickgelu", quick_gelu=True)
    file = tiny_weights(tmp_path / "w.safetensors", quick)
    encoder = make(model=quick, weights=str(file))
    assert_columns(encoder, reference_model(file, NATIVE, quick), random_views(NATIVE))
    plain = make(weights=str(file))  # the keys are the same: only the name tells
    assert not torch.allclose(plain.encode(random_views(NATIVE))["clip/cls"], encoder.encode(random_views(NATIVE))["clip/cls"])
    assert (encoder.fingerprint()["quick_gelu"], plain.fingerprint()["quick_gelu"]) == (True, False)


@pytest.mark.parametrize("target", [(6, 6), (4, 10), (2, 3), (2, 8), (16, 1)])
def test_positions_are_resized_as_a_picture_would_be(target):
    """Pillow's bicubic filter is the antialiased one, too. (2, 8) and (16, 1) have as many patches as 4x4."""
    positions = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    resized = resize_positions(positions, (4, 4), target)
    assert torch.equal(resized[0], positions[0])
    for channel in range(3):
        plane = Image.fromarray(positions[1:, channel].reshape(4, 4).numpy())
        expected = np.asarray(plane.resize((target[1], target[0]), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[1:, channel].reshape(target).numpy(), expected, atol=1e-5)


def test_a_view_of_another_shape_but_as_many_patches_is_interpolated(weights):
    size = (32, 128)
    model = reference_model(Path(weights), NATIVE)
    positions = model.visual.positional_embedding.data
    model.visual.positional_embedding.data = resize_positions(positions, (4, 4), (2, 8))
    assert_columns(make(size, weights=weights), model, random_views(size))


def test_weights_trained_at_another_size(tmp_path, weights):
    state = load_file(weights)
    state["visual.positional_embedding"] = torch.randn(1 + 36, 64, generator=torch.Generator().manual_seed(2))
    save_file(state, tmp_path / "at96.safetensors")
    model = reference_model(tmp_path / "at96.safetensors", (96, 96))
    assert_columns(make((96, 96), weights=str(tmp_path / "at96.safetensors")), model, random_views((96, 96)))
    state["visual.positional_embedding"] = torch.zeros(1 + 15, 64)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"is for 15 patches, neither the 4x4 of pcd-tiny nor a square grid"):
        make(weights=str(tmp_path / "odd.safetensors"))


def test_checkpoints_and_half_precision_files_load_the_same(tmp_path, weights):
    state = {f"module.{key}": value for key, value in load_file(weights).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.pt")
    halves = {key: value.half() for key, value in load_file(weights).items()}
    torch.save({**halves, "input_resolution": torch.tensor(64), "vocab_size": torch.tensor(49408)}, tmp_path / "half.bin")
    views = random_views((96, 96))
    expected = make((96, 96), weights=weights).encode(views)["clip/cls"]
    assert torch.equal(make((96, 96), weights=str(tmp_path / "w.pt")).encode(views)["clip/cls"], expected)
    half = make((96, 96), weights=str(tmp_path / "half.bin")).encode(views)["clip/cls"]
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0.02)


def test_loading_leaves_the_random_state_alone(weights):
    before = torch.get_rng_state()
    make(weights=weights)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.005), ("bf16", 0.04)])
def test_half_precision_computes_in_half_and_returns_the_columns_types(weights, precision, error):
    views = random_views(NATIVE)
    exact = make(weights=weights).encode(views)
    encoder = make(weights=weights, precision=precision)
    columns = encoder.encode(views)
    assert (columns["clip/patch"].dtype, columns["clip/cls"].dtype) == (torch.float16, torch.float32)
    for name, values in columns.items():
        off = (values.float() - exact[name].float()).norm() / exact[name].float().norm()
        assert 0 < off < error
    assert encoder.fingerprint()["precision"] == precision
    assert encoder.embed_text(["a chair"]).dtype == torch.float32


def test_texts_agree_with_open_clip(monkeypatch, weights):
    monkeypatch.setattr("pcd.encoders.openclip.TEXT_BATCH", 4)
    encoder = make((96, 96), weights=weights)
    phrases = [f"{metres:.2f} meter" for metres in np.linspace(0.1, 10, 11)]
    embedded = encoder.embed_text(phrases)
    model = reference_model(Path(weights), NATIVE)
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(phrases), normalize=False)
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)
    assert embedded.shape == (len(phrases), 32)
    assert torch.equal(encoder.embed_text(phrases), embedded)
    assert encoder.embed_text([]).shape == (0, 32)


def test_results_can_be_trained_on(weights):
    encoder = make(weights=weights)
    table = torch.nn.Parameter(encoder.embed_text(["near", "far"]))
    (encoder.encode(random_views(NATIVE))["clip/cls"] @ table.T).sum().backward()
    assert table.grad is not None


def test_phrases_that_do_not_fit(weights):
    encoder = make(weights=weights)
    assert encoder.embed_text(["word " * 75]).shape == (1, 32)
    with pytest.raises(UsageError, match=r"phrase of 78 tokens, but the text tower takes 77: 'word word"):
        encoder.embed_text(["short", "word " * 76])
    with pytest.raises(UsageError, match="a list of phrases, not one string"):
        encoder.embed_text("2.00 meter")


def test_the_image_tower_alone(weights, visual_weights):
    encoder = make(weights=visual_weights)
    assert not encoder.has_text
    assert make(weights=weights).has_text
    assert_columns(encoder, reference_model(Path(weights), NATIVE), random_views(NATIVE))
    with pytest.raises(TextTowerError, match=r'image tower alone .* head\.table_init to "tokens" or "random".*--weights auto'):
        encoder.embed_text(["a chair"])
    modules = [value for value in vars(encoder).values() if isinstance(value, torch.nn.Module)]
    assert max(p.shape[0] for module in modules for p in module.parameters()) < 49408  # no idle text tower is kept


def test_text_towers_of_open_clip_in_a_module_of_their_own(tmp_path):
    """Its files exist in two layouts: `text.*`, and everything of the text tower at the top."""
    name = tiny_model("pcd-tiny-custom", text="custom")
    file = tiny_weights(tmp_path / "new.safetensors", name)
    old = {key.removeprefix("text."): value for key, value in load_file(file).items()}
    save_file(old, tmp_path / "old.safetensors")
    with torch.no_grad():
        expected = reference_model(file, NATIVE, name).encode_text(open_clip.tokenize(["a chair"]))
    for layout in ("new", "old"):
        embedded = make(model=name, weights=str(tmp_path / f"{layout}.safetensors")).embed_text(["a chair"])
        torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)


def test_text_towers_of_other_libraries_are_left_out(tmp_path):
    name = tiny_model("pcd-tiny-foreign", text="transformers")
    encoder = make(model=name, weights="random")
    assert not encoder.has_text
    with pytest.raises(TextTowerError, match="belongs to the transformers library"):
        encoder.embed_text(["a chair"])


def test_random_weights_depend_on_the_seed_alone():
    tiny_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(weights="random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, wide, other = (
        make(weights="random", seed=3),
        make((64, 96), weights="random", seed=3),
        make(weights="random", seed=4),
    )
    views = random_views(NATIVE)
    assert torch.equal(first.encode(views)["clip/patch"], again.encode(views)["clip/patch"])
    assert not torch.equal(first.encode(views)["clip/patch"], other.encode(views)["clip/patch"])
    assert first.random_weights
    assert first.has_text
    assert torch.equal(first.embed_text(["near"]), again.embed_text(["near"]))
    weights = [encoder.fingerprint()["weights"] for encoder in (first, again, wide, other)]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    assert {key: weights[0][key] for key in ("kind", "seed")} == {"kind": "random", "seed": 3}


def test_the_fingerprint_says_what_determines_the_columns(tmp_path, weights, visual_weights):
    found = make((64, 96), weights=weights).fingerprint()
    default = reference_model(Path(weights), NATIVE).visual.preprocess_cfg
    assert found == {
        "encoder": "openclip",
        "model": "pcd-tiny",
        "quick_gelu": False,
        "weights": {"kind": "file", "digest": hashlib.sha256(Path(weights).read_bytes()).hexdigest()},
        "layer": "final",
        "projection": "ln_post+proj",
        "precision": "fp32",
        "view_size": [64, 96],
        "patch": [16, 16],
        "grid": [4, 6],
        "width": 32,
        "text": True,
        "mean": list(default["mean"]),
        "std": list(default["std"]),
    }
    (tmp_path / "elsewhere.safetensors").write_bytes(Path(weights).read_bytes())
    moved = make((64, 96), weights=str(tmp_path / "elsewhere.safetensors")).fingerprint()
    assert canonical(moved) == canonical(found)
    others = [
        make(weights=weights).fingerprint(),
        make((64, 96), weights=visual_weights).fingerprint(),
        make((64, 96), weights=weights, precision="bf16").fingerprint(),
    ]
    assert len({digest(value) for value in (found, *others)}) == 4


def test_tokens_that_do_not_fit_are_refused(tmp_path, weights):
    state = load_file(weights)
    state["visual.proj"] *= 1e6
    save_file(state, tmp_path / "huge.safetensors")
    message = r"not finite or do not fit float16 \(up to 65504\): \d+ of 1024 in clip/patch\. Nothing was stored"
    with pytest.raises(WeightsError, match=message):
        make(weights=str(tmp_path / "huge.safetensors")).encode(random_views(NATIVE))
    views = random_views(NATIVE)
    views[1, 0, 3, 3] = torch.nan
    with pytest.raises(WeightsError, match=r"512 of 1024 in clip/patch, 32 of 64 in clip/cls"):
        make(weights=weights).encode(views)


@pytest.mark.parametrize(
    "views", [torch.rand(2, 64, 64, 3), torch.rand(3, 64, 64), torch.rand(1, 3, 64, 96), torch.zeros(1, 3, 64, 64).byte()]
)
def test_views_of_another_kind_are_refused(weights, views):
    with pytest.raises(UsageError, match=r"expected torch\.float32 \(B, 3, 64, 64\), RGB in \[0, 1\]"):
        make(weights=weights).encode(views)


def test_options_are_checked_when_they_are_read():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"precision": "fp8"}, "precision"),
        ({"weight": "auto"}, "Did you mean 'weights'"),
        ({"seed": -1}, "seed"),
    ]
    for options, message in wrong:
        with pytest.raises(RecipeError, match=message):
            create_encoder("openclip:pcd-tiny", options, NATIVE, CPU)


def test_the_root_logger_is_left_alone(monkeypatch, weights):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    make((96, 96), weights=weights).embed_text(["a chair"])
    assert logging.getLogger().handlers == []


def reference_visual(name: str, size: int, state: dict[str, torch.Tensor]) -> Any:
    """open_clip's model with the weights of the image tower and a text tower that is as small as can be."""
    model = open_clip.create_model(name, force_image_size=size, text_cfg={"width": 64, "heads": 1, "layers": 1}).eval()
    open_clip.model.resize_pos_embed(state, model)
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if key.startswith("visual.")]
    return model


def test_real_weights_on_a_real_frame(clip_weights, shared_data):
    """OpenAI's ViT-B/16, made for 224x224, at 336x336."""
    frame = Image.open(min((shared_data / "official" / "nyu").glob("*/rgb_*.jpg"))).resize((336, 336))
    views = torch.from_numpy(np.asarray(frame, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()
    encoder = make((336, 336), "ViT-B-16-quickgelu/openai", weights=str(clip_weights))
    assert (encoder.grid, encoder.has_text, encoder.random_weights) == ((21, 21), False, False)
    with pytest.raises(TextTowerError):
        encoder.embed_text(["a kitchen"])

    model = reference_visual("ViT-B-16-quickgelu", 336, load_file(clip_weights))
    columns = assert_columns(encoder, model, views, tolerance=1e-3)
    assert columns["clip/patch"].shape == (1, 441, 512)
