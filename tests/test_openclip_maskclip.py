"""Columns of vision transformers made on demand, beside `clip/patch@N`: `tokens@N`, `cls@N`, `maskclip`; and their prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pcd.encoders import create_encoder, output_of, request_of, with_columns
from pcd.encoders.openclip import OpenClipEncoder
from pcd.errors import RecipeError, UsageError
from pcd.evaluation.pixels import combine_views
from pcd.fingerprint import canonical
from pcd.stages.predict import Predictor
from tests.export_support import train_tiny
from tests.test_openclip import normalised
from tests.tiny_clip import reference_model, tiny_model, tiny_weights

Doubles = npt.NDArray[np.float64]
ASKED = ["clip/maskclip", "clip/cls@1", "clip/tokens@3", "clip/tokens@1", "clip/cls@3", "clip/patch@2"]
ORDER = [
    "clip/patch",
    "clip/cls",
    "clip/patch@2",
    "clip/tokens@1",
    "clip/tokens@3",
    "clip/cls@1",
    "clip/cls@3",
    "clip/maskclip",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("tiny") / "both.safetensors", tiny_model())


def tiny(weights: Path, size: tuple[int, int] = (64, 64), **options: Any) -> OpenClipEncoder:
    encoder = create_encoder("openclip:pcd-tiny", {"weights": str(weights), **options}, size, "cpu")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


def random_views(size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))


def hidden(model: Any, views: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`encode_image`, and all tokens behind every block, caught by hooks."""
    caught: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: caught.append(out)) for block in model.visual.transformer.resblocks
    ]
    with torch.no_grad():
        encoded = model.encode_image(normalised(views, model))
    for hook in hooks:
        hook.remove()
    return encoded, caught


def double(values: torch.Tensor) -> Doubles:
    found: Doubles = values.detach().double().numpy()
    return found


def layer_norm(norm: Any, x: Doubles) -> Doubles:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled: Doubles = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return scaled * double(norm.weight) + double(norm.bias)


def joint(visual: Any, x: Doubles) -> Doubles:
    found: Doubles = layer_norm(visual.ln_post, x) @ double(visual.proj)
    return found


def maskclip(block: Any, x: Doubles) -> Doubles:
    """Equation by equation: y = x + W_o (W_v LN(x) + b_v) + b_o; z = y + W_2 gelu(W_1 LN(y) + b_1) + b_2."""
    width = x.shape[-1]
    weight, bias = double(block.attn.in_proj_weight)[2 * width :], double(block.attn.in_proj_bias)[2 * width :]
    value = layer_norm(block.ln_1, x) @ weight.T + bias
    y = x + value @ double(block.attn.out_proj.weight).T + double(block.attn.out_proj.bias)
    inner = layer_norm(block.ln_2, y) @ double(block.mlp.c_fc.weight).T + double(block.mlp.c_fc.bias)
    active = inner * 0.5 * (1 + torch.erf(torch.from_numpy(inner) / np.sqrt(2)).numpy())
    found: Doubles = y + active @ double(block.mlp.c_proj.weight).T + double(block.mlp.c_proj.bias)
    return found


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_every_column_agrees_with_a_recomputation(weights: Path, size: tuple[int, int]) -> None:
    encoder, views = with_columns(tiny(weights, size), ASKED), random_views(size)
    columns = encoder.encode(views)
    assert [*columns] == [spec.name for spec in encoder.columns] == ORDER
    patches = size[0] * size[1] // 256
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ORDER, (patches, 32))
    shapes |= dict.fromkeys(["clip/tokens@1", "clip/tokens@3"], (patches, 64))
    shapes |= dict.fromkeys(["clip/cls", "clip/cls@1", "clip/cls@3"], (32,))
    for spec in encoder.columns:
        found = columns[spec.name]
        assert tuple(found.shape[1:]) == spec.shape == shapes[spec.name]
        assert str(found.dtype) == f"torch.{spec.dtype}" == ("torch.float32" if "cls" in spec.name else "torch.float16")
    model = reference_model(weights, size)
    encoded, caught = hidden(model, views)
    tokens, last = [double(block) for block in caught], model.visual.transformer.resblocks[-1]
    expected = {
        "clip/tokens@1": tokens[0][:, 1:],
        "clip/tokens@3": tokens[2][:, 1:],
        "clip/cls@1": joint(model.visual, tokens[0])[:, 0],
        "clip/cls@3": double(encoded),
        "clip/maskclip": joint(model.visual, maskclip(last, tokens[1][:, 1:])),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(double(columns[name]), value, rtol=2**-10, atol=3e-4, err_msg=name)
    assert torch.equal(columns["clip/cls@3"], columns["clip/cls"])
    plain = tiny(weights, size).encode(views)
    assert all(torch.equal(columns[name], value) for name, value in plain.items())


def test_maskclip_is_the_last_block_with_a_mask_that_leaves_the_diagonal(weights: Path) -> None:
    """open_clip's own block and attention: every token sees itself alone, so its weight is one."""
    views, model = random_views(), reference_model(weights, (64, 64))
    _, caught = hidden(model, views)
    alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0)
    with torch.no_grad():
        tokens = model.visual.transformer.resblocks[-1](caught[1], attn_mask=alone)
        expected = (model.visual.ln_post(tokens) @ model.visual.proj)[:, 1:]
    found = with_columns(tiny(weights), ["clip/maskclip"]).encode(views)
    torch.testing.assert_close(found["clip/maskclip"].float(), expected, rtol=2**-10, atol=2e-4)
    assert (found["clip/maskclip"] - found["clip/patch"]).abs().max() > 0.1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(weights: Path, precision: str) -> None:
    exact, coarse = (with_columns(tiny(weights, precision=p), ASKED).encode(random_views()) for p in ("fp32", precision))
    for name, value in coarse.items():
        assert value.dtype == exact[name].dtype
        assert 0 < (value.float() - exact[name].float()).norm() / exact[name].float().norm() < 0.04


def test_what_determines_the_columns(weights: Path) -> None:
    plain = tiny(weights)
    encoder = with_columns(with_columns(plain, ASKED[:2]), ASKED[2:])
    assert encoder.fingerprint() == plain.fingerprint()
    assert {name: output_of(encoder, name) for name in ORDER} == {
        "clip/patch": {},
        "clip/cls": {},
        "clip/patch@2": {"layer": 2},
        "clip/tokens@1": {"layer": 1, "space": "tower"},
        "clip/tokens@3": {"layer": 3, "space": "tower"},
        "clip/cls@1": {"layer": 1, "space": "joint", "token": "cls"},
        "clip/cls@3": {"layer": 3, "space": "joint", "token": "cls"},
        "clip/maskclip": {
            "layer": 3,
            "space": "joint",
            "variant": "maskclip",
            "attention": "out_proj(v_proj)",
            "residual": True,
            "mlp": True,
        },
    }


def test_columns_that_a_tower_does_not_have(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny(weights)
    for name in ("clip/patch@4", "clip/tokens@4", "clip/cls@4"):
        with pytest.raises(UsageError, match=rf"column {name}: pcd-tiny has transformer blocks 1 to 3\."):
            encoder.offers(name)
    for name in ("clip/stem", "clip/layer2"):
        with pytest.raises(UsageError, match=rf"column {name}: pcd-tiny is a vision transformer and has no stages; it makes"):
            encoder.offers(name)
    for name in ("clip/tokens", "clip/cls@0", "clip/maskclip@2", "maskclip", "timm/tokens@1", "clip/layers"):
        assert not encoder.offers(name)
    blocks = encoder._network.visual.transformer.resblocks
    monkeypatch.setattr(encoder._network.visual.transformer, "resblocks", blocks[:1])
    with pytest.raises(UsageError, match=r"two or more blocks of CLIP's own kind; pcd-tiny has 1, .* Read clip/patch instead"):
        encoder.offers("clip/maskclip")


def test_a_prefix_names_the_columns_and_changes_nothing_else(weights: Path) -> None:
    plain, other = with_columns(tiny(weights), ASKED), tiny(weights, prefix="big-clip_2")
    assert not other.offers("clip/maskclip")
    other = with_columns(other, [name.replace("clip/", "big-clip_2/") for name in ASKED])  # type: ignore[assignment]
    found, expected = other.encode(random_views()), plain.encode(random_views())
    assert [*found] == [spec.name for spec in other.columns] == [name.replace("clip/", "big-clip_2/") for name in ORDER]
    assert all(torch.equal(value, expected[name.replace("big-clip_2/", "clip/")]) for name, value in found.items())
    assert canonical(other.fingerprint()) == canonical(plain.fingerprint())
    assert output_of(other, "big-clip_2/maskclip") == output_of(plain, "clip/maskclip")
    asked, usual = (request_of("openclip:pcd-tiny", {"weights": "random", "prefix": p}) for p in ("other", ""))
    assert usual == request_of("openclip:pcd-tiny", {"weights": "random"})
    assert asked == {**usual, "prefix": "other"}
    with pytest.raises(RecipeError, match="prefix"):
        tiny(weights, prefix="two/parts")


def test_a_run_on_maskclip_tokens_predicts_what_its_cache_gives(tmp_path: Path) -> None:
    head = ["head.patch_column=clip/maskclip", "head.cls_column=clip/cls@1"]
    run, cache = train_tiny(tmp_path, "openclip:pcd-demo", "random", head=head)
    assert [*run.info["columns"]] == ["clip/maskclip", "clip/cls@1"]
    table = cache.table("test")
    trained, _ = run.load_head("abs_rel", torch.device("cpu"))
    columns = {name: torch.from_numpy(table.column(name).read(table.view_rows(np.arange(1)).reshape(-1))) for name in
               trained.reads(trained.options)}  # fmt: skip
    from pcd.datasets import create_dataset

    image = create_dataset("toy", {"limit": 6}).load("test", table.keys[0]).rgb
    found = Predictor(run, device="cpu", upsample="nearest").predict(image).patches[0]
    with torch.inference_mode():
        depth = combine_views(trained.depth(columns).reshape(1, table.views, *run.grid), run.plan, tta=True)
    torch.testing.assert_close(found, depth, rtol=1e-4, atol=1e-4)


def test_real_tokens_of_a_real_frame(clip_weights: Path, shared_data: Path) -> None:
    """OpenAI's ViT-B/16: MaskCLIP's tokens differ from the final ones, and differ more among each other."""
    frame = Image.open(min((shared_data / "official" / "nyu").glob("*/rgb_*.jpg"))).resize((224, 224))
    views = torch.from_numpy(np.asarray(frame, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()
    encoder = create_encoder("openclip:ViT-B-16-quickgelu/openai", {"weights": str(clip_weights)}, (224, 224), "cpu")
    columns = with_columns(encoder, ["clip/maskclip", "clip/tokens@12", "clip/patch@11"]).encode(views)
    assert columns["clip/tokens@12"].shape == (1, 196, 768)
    own, final = (torch.nn.functional.normalize(columns[f"clip/{name}"][0].float(), dim=-1) for name in ("maskclip", "patch"))
    assert 0.4 < (own * final).sum(-1).mean() < 0.65
    assert (own @ own.T).mean() < (final @ final.T).mean() - 0.03
