"""What the timm encoder computes, against timm's own forward passes, hooks on blocks and a LayerNorm written out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pcd.encoders import create_encoder, output_of, with_columns
from pcd.encoders.timm_models import TimmEncoder
from pcd.encoders.timm_names import timm
from pcd.errors import TextTowerError, UsageError, WeightsError
from pcd.fingerprint import canonical, file_digest

SIZE = (96, 128)
VIT, HIERARCHICAL = "test_vit", "test_convnext"
CPU = "cpu"


def make(model: str = VIT, size: tuple[int, int] = SIZE, **options: Any) -> TimmEncoder:
    encoder = create_encoder(f"timm:{model}", options, size, CPU)
    assert isinstance(encoder, TimmEncoder)
    return encoder


def asking(encoder: TimmEncoder, *names: str) -> TimmEncoder:
    other = with_columns(encoder, names)
    assert isinstance(other, TimmEncoder)
    return other


def random_views(size: tuple[int, int] = SIZE, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def tiny_file(file: Path, model: str = VIT, seed: int = 0, **changes: Any) -> Path:
    """A state dict with every value drawn at random, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in timm.create_model(model, **changes).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        wide = (0.3 * noise if value.ndim > 1 else 0.5 + 0.3 * noise).contiguous()
        state[key] = wide if value.is_floating_point() else value.clone()
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("timm") / "vit.safetensors")


@pytest.fixture(scope="module")
def maps_file(tmp_path_factory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("timm") / "convnext.safetensors", HIERARCHICAL)


def reference(file: Path, model: str = VIT, **options: Any) -> Any:
    """The model as timm itself builds, loads and resizes it."""
    overlay = {"file": str(file)}
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def normalised(views: torch.Tensor, model: Any) -> torch.Tensor:
    config = timm.data.resolve_model_data_config(model)
    return torch.stack([(views[:, c] - config["mean"][c]) / config["std"][c] for c in range(3)], dim=1)


def outputs_of(model: Any, modules: list[torch.nn.Module], run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What `run` returns, and what each of the modules gave on the way."""
    caught: dict[int, torch.Tensor] = {}
    hooks = [m.register_forward_hook(lambda _m, _i, out, at=at: caught.__setitem__(at, out)) for at, m in enumerate(modules)]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    return result, [caught[at] for at in range(len(modules))]


def layer_norm(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    """LayerNorm over the last axis in float64, written out."""
    wide = hidden.double()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    scaled: torch.Tensor = centred / spread * norm.weight.double() + norm.bias.double()
    return scaled


@pytest.mark.parametrize("size", [(160, 160), SIZE, (32, 48)])
def test_tokens_of_all_kinds_agree_with_timm_and_with_hooks(weights, size):
    names = ("timm/patch@2", "timm/cls@2", "timm/patch@6", "timm/cls@6")
    encoder = asking(make(size=size, weights=str(weights)), *names)
    columns = encoder.encode(random_views(size))
    model = reference(weights, img_size=size)
    images = normalised(random_views(size), model)
    features, blocks = outputs_of(model, list(model.blocks), lambda: model.forward_features(images))
    assert encoder.grid == (size[0] // 16, size[1] // 16)
    assert [(n, tuple(v.shape[1:]), str(v.dtype)) for n, v in columns.items()] == [
        (spec.name, spec.shape, f"torch.{spec.dtype}") for spec in encoder.columns
    ]
    assert torch.equal(columns["timm/cls"], features[:, 0])
    assert torch.equal(columns["timm/patch"], features[:, 1:].half())
    for block in (2, 6):
        expected = layer_norm(blocks[block - 1], model.norm)
        torch.testing.assert_close(columns[f"timm/patch@{block}"].double(), expected[:, 1:], rtol=2**-10, atol=1e-4)
        torch.testing.assert_close(columns[f"timm/cls@{block}"].double(), expected[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(columns["timm/patch@6"], columns["timm/patch"])


def test_columns_that_are_asked_for_change_no_other_bit(weights):
    encoder = make(weights=str(weights))
    plain = encoder.encode(random_views())
    more = asking(encoder, "timm/patch@1", "timm/patch@3", "clip/patch@3", "depth/count")
    assert [spec.name for spec in more.columns] == ["timm/patch", "timm/cls", "timm/patch@1", "timm/patch@3"]
    assert [spec.name for spec in encoder.columns] == ["timm/patch", "timm/cls"]
    columns = more.encode(random_views())
    for name, values in plain.items():
        assert torch.equal(columns[name], values)
    assert more.fingerprint() == encoder.fingerprint()
    assert output_of(more, "timm/patch@3") == {"tokens": "patch", "layer": 3}
    assert output_of(more, "timm/patch") == {}


def test_registers_and_class_token_of_a_model_with_rotary_positions():
    """DINOv3's architecture: a class token, four registers, then the patches."""
    model = "vit_small_patch16_dinov3"
    encoder = asking(make(model, (32, 48), weights="random", seed=1, prefix="dino"), "dino/registers", "dino/patch@1")
    columns = encoder.encode(random_views((32, 48), 1))
    network = encoder.network()
    with torch.no_grad():
        features = network.network.model.forward_features(normalised(random_views((32, 48), 1), network.network.model))  # type: ignore[union-attr,operator]
    assert features.shape == (1, 5 + 6, 384)
    assert torch.equal(columns["dino/cls"], features[:, 0])
    assert torch.equal(columns["dino/registers"], features[:, 1:5])
    assert torch.equal(columns["dino/patch"], features[:, 5:].half())
    assert list(columns) == ["dino/patch", "dino/cls", "dino/registers", "dino/patch@1"]
    assert output_of(encoder, "dino/registers") == {"tokens": "registers"}


def test_maps_of_a_hierarchical_model(maps_file):
    names = ("timm/stage1", "timm/stage3", "timm/stage4")
    encoder = asking(make(HIERARCHICAL, weights=str(maps_file)), *names)
    columns = encoder.encode(random_views())
    model = reference(maps_file, HIERARCHICAL)
    images = normalised(random_views(), model)
    features, stages = outputs_of(model, list(model.stages), lambda: model.forward_features(images))
    assert (encoder.grid, [spec.name for spec in encoder.columns]) == ((3, 4), ["timm/patch", *names])
    for number in (1, 3, 4):
        found, spec = columns[f"timm/stage{number}"], encoder.columns[names.index(f"timm/stage{number}") + 1]
        assert (tuple(found.shape[1:]), spec.dims) == (spec.shape, ("y", "x", "channel"))
        assert torch.equal(found, stages[number - 1].permute(0, 2, 3, 1).half())
    tokens = columns["timm/patch"]
    for row, column in ((0, 0), (1, 2), (2, 3)):  # reading order
        assert torch.equal(tokens[:, row * 4 + column], features[:, :, row, column].half())
    assert output_of(encoder, "timm/stage3") == {"stage": 3}


@pytest.mark.parametrize("model", ["test_vit4", "test_vit_relpos", "test_resnet", "test_mambaout"])
def test_other_families_give_what_their_forward_features_gives(model):
    """Registers without a class token, no prefix at all, a convolutional net, and one with channels last."""
    encoder = make(model, (160, 192), weights="random")
    columns = encoder.encode(random_views((160, 192), 1))
    network = encoder.network().network.model  # type: ignore[union-attr]
    with torch.no_grad():
        features = network.forward_features(normalised(random_views((160, 192), 1), network))  # type: ignore[operator,union-attr]
    channels_last = model == "test_mambaout"
    if features.ndim == 4:
        features = (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    patches = encoder.grid[0] * encoder.grid[1]
    assert torch.equal(columns["timm/patch"], features[:, -patches:].half())
    assert list(columns) == ["timm/patch"]


@pytest.mark.parametrize(
    ("model", "column", "message"),
    [
        (VIT, "timm/patch@7", r"test_vit has blocks 1 to 6 \(timm/patch@N\)"),
        (VIT, "timm/stage1", r"test_vit has blocks 1 to 6 \(timm/patch@N\)"),
        (VIT, "timm/registers", "test_vit has blocks 1 to 6 and no register token"),
        ("test_vit3", "timm/cls@1", "test_vit3 has blocks 1 to 9 and no class token"),
        (HIERARCHICAL, "timm/patch@1", r"test_convnext has stages 1 to 4 \(timm/stageN\)"),
        (HIERARCHICAL, "timm/stage5", r"test_convnext has stages 1 to 4 \(timm/stageN\)"),
    ],
)
def test_columns_that_a_model_has_not(model, column, message):
    with pytest.raises(UsageError, match=f"column {column}: {message}"):
        with_columns(make(model, weights="random"), [column])


def test_what_cannot_be_used_is_said_at_once(tmp_path, weights, maps_file):
    wrong: list[tuple[str, tuple[int, int], dict[str, Any], type[Exception], str]] = [
        ("", SIZE, {}, UsageError, r"say which model, as timm:MODEL"),
        ("vit_smal", SIZE, {}, UsageError, r"Unknown timm model 'vit_smal'\. The nearest are .*vit_small"),
        ("vit_small_patch14_dinov2.nothing", SIZE, {}, UsageError, r"no weights 'nothing' .* Known: lvd142m"),
        (VIT, (100, 128), {"weights": "random"}, UsageError, r"cells of 16 pixels, .* height 100; the nearest .* 96 or 112"),
        (HIERARCHICAL, (96, 120), {"weights": "random"}, UsageError, r"do not divide the width 120; .* 96 or 128"),
        ("xcit_nano_12_p16_224", SIZE, {"weights": "random"}, UsageError, r"cannot be used: its features are \(1, 49, 128\)"),
        (VIT, SIZE, {"weights": str(maps_file)}, WeightsError, r"convnext\.safetensors does not fit timm's test_vit"),
        (VIT, SIZE, {"weights": str(tmp_path / "no.pt")}, WeightsError, "is not there"),
    ]
    for model, size, options, error, message in wrong:
        with pytest.raises(error, match=message):
            make(model, size, **options)
    state = load_file(weights)
    for lost in ("blocks.5.attn.qkv.weight", "norm.bias", "cls_token"):
        save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "part.safetensors")
        with pytest.raises(WeightsError, match=f"does not fit timm's test_vit.*{lost}"):
            make(weights=str(tmp_path / "part.safetensors"))
    save_file({**state, "blocks.6.norm1.weight": state["norm.weight"].clone()}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.6\.norm1\.weight"):
        make(weights=str(tmp_path / "more.safetensors"))


def test_files_of_the_trunk_alone_other_sizes_and_checkpoints(tmp_path, weights):
    trunk = {key: value for key, value in load_file(weights).items() if not key.startswith("head.")}
    torch.save({"state_dict": {f"module.{key}": value for key, value in trunk.items()}}, tmp_path / "trunk.pt")
    expected = make(weights=str(weights)).encode(random_views())
    found = make(weights=str(tmp_path / "trunk.pt")).encode(random_views())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = tiny_file(tmp_path / "at96x64.safetensors", img_size=(96, 64))  # its positions are for 6x4 patches
    with torch.no_grad():
        model = reference(other, img_size=(96, 64))
        cls = model.forward_features(normalised(random_views((96, 64)), model))[:, 0]
    assert torch.equal(make(size=(96, 64), weights=str(other)).encode(random_views((96, 64)))["timm/cls"], cls)


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(weights="random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other, wide = (
        make(weights="random", seed=3),
        make(weights="random", seed=4),
        make(size=(64, 64), weights="random", seed=3),
    )
    tokens = [e.encode(random_views())["timm/patch"] for e in (first, again, other)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    found = [encoder.fingerprint()["weights"] for encoder in (first, again, wide, other)]
    assert found[0] == found[1] == found[2] != found[3]
    assert (first.random_weights, first.has_text, found[0]["kind"], found[0]["seed"]) == (True, False, "random", 3)


def test_the_fingerprint_says_what_determines_the_columns(tmp_path, weights):
    encoder = make(weights=str(weights))
    config = timm.create_model(VIT).pretrained_cfg
    assert encoder.fingerprint() == {
        "encoder": "timm",
        "model": VIT,
        "weights": {"kind": "file", "digest": file_digest(weights)},
        "layer": "final",
        "norm": "LayerNorm",
        "precision": "fp32",
        "view_size": [96, 128],
        "positions": "resampled by timm",
        "grid": [6, 8],
        "width": 64,
        "text": False,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    (tmp_path / "elsewhere.safetensors").write_bytes(weights.read_bytes())
    assert canonical(make(weights=str(tmp_path / "elsewhere.safetensors")).fingerprint()) == canonical(encoder.fingerprint())
    assert make("test_vit4", weights="random").fingerprint()["norm"] == "Identity"  # it averages first
    with pytest.raises(TextTowerError, match="timm:test_vit has no text tower"):
        encoder.embed_text(["a chair"])


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.005), ("bf16", 0.05)])
def test_half_precision_computes_in_half(weights, precision, error):
    exact, found = (make(weights=str(weights), precision=p).encode(random_views()) for p in ("fp32", precision))
    for name, values in found.items():
        assert values.dtype == exact[name].dtype
        assert 0 < (values.float() - exact[name].float()).norm() / exact[name].float().norm() < error


def test_tokens_that_do_not_fit_are_refused(tmp_path, weights):
    state = load_file(weights)
    state["norm.weight"] *= 1e6
    save_file(state, tmp_path / "huge.safetensors")
    with pytest.raises(WeightsError, match=r"do not fit float16 .* in timm/patch\. Nothing was stored"):
        make(weights=str(tmp_path / "huge.safetensors")).encode(random_views())
    with pytest.raises(UsageError, match=r"expected torch\.float32 \(B, 3, 96, 128\)"):
        make(weights=str(weights)).encode(random_views((96, 96)))


def test_a_request_needs_neither_torch_nor_timm(weights):
    code = (
        "import sys; from pcd.encoders import request_of; "
        f"print(request_of('timm:{VIT}', {{'weights': {str(weights)!r}}})); "
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'vit.safetensors'" in done.stdout
    assert str(weights.parent) not in done.stdout


def test_what_is_exported_computes_the_same(tmp_path, weights):
    encoder = asking(make(weights=str(weights)), "timm/patch@2")
    state = encoder.image_weights()
    assert state is not None
    save_file(state, tmp_path / "bundle.safetensors")
    again = asking(make(weights=str(tmp_path / "bundle.safetensors")), "timm/patch@2")
    with torch.no_grad():
        exported = encoder.network()(random_views())
    for name, values in again.encode(random_views()).items():
        assert torch.equal(exported[name], values)
    assert make(weights="random").image_weights() is None


def test_real_dinov2_on_a_real_frame(clip_weights, shared_data):
    """ViT-S/14, made for 518x518, on 224x280: pooled, class and patch tokens are timm's own, bit for bit."""
    size, dino_file = (224, 280), clip_weights.parent / "dinov2-vit-s-14.safetensors"
    frame = Image.open(min((shared_data / "official" / "nyu").glob("*/rgb_*.jpg"))).resize(size[::-1])
    views = torch.from_numpy(np.asarray(frame, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()
    name = "vit_small_patch14_dinov2.lvd142m"
    encoder = asking(make(name, size, weights=str(dino_file)), "timm/patch@4", "timm/cls@4", "timm/patch@12")
    columns = encoder.encode(views)
    model = reference(dino_file, name, img_size=size)
    images = normalised(views, model)
    with torch.no_grad():
        pooled, features = model(images), model.forward_features(images)
        wanted: dict[str, Any] = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True}
        (fourth, prefix), (last, _) = model.forward_intermediates(images, indices=[3, 11], intermediates_only=True, **wanted)
    assert (encoder.grid, encoder.random_weights) == ((16, 20), False)
    assert torch.equal(columns["timm/cls"], pooled)
    assert torch.equal(columns["timm/cls"], features[:, 0])
    assert torch.equal(columns["timm/patch"], features[:, 1:].half())
    assert torch.equal(columns["timm/patch@12"], last.half())
    assert torch.equal(columns["timm/patch@4"], fourth.half())
    assert torch.equal(columns["timm/cls@4"], prefix[:, 0])
    assert encoder.fingerprint()["mean"] == [0.485, 0.456, 0.406]
