"""The differentiable text tower: open_clip's own `encode_text`, its gradients, and what it leaves alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pcd.encoders import create_encoder
from pcd.encoders.base import TextTower, Worded
from pcd.encoders.openclip import OpenClipEncoder
from pcd.encoders.openclip_names import open_clip
from pcd.errors import TextTowerError, UsageError
from tests.tiny_clip import TEXT, VISION, reference_model, tiny_model, tiny_weights
from tests.tiny_resnet import NATIVE, resnet_weights, tiny_resnet

PHRASES = ["This object is giant", "2.00 meter", "a", ""]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("tiny") / "both.safetensors", tiny_model())


def make(weights: Path | str, model: str = "pcd-tiny", size: tuple[int, int] = (64, 64), **options: Any) -> OpenClipEncoder:
    encoder = create_encoder(f"openclip:{model}", {"weights": str(weights), **options}, size, "cpu")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


def registered(name: str, text: dict[str, Any], **more: Any) -> str:
    file = Path(tempfile.mkdtemp()) / f"{name}.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": {**TEXT, **text}, **more}))
    open_clip.add_model_config(file)
    return name


def embedded(tower: TextTower, phrases: list[str]) -> torch.Tensor:
    tokens = tower.tokens(phrases)
    return tower.encode(tower.embed(tokens), tokens)


MODELS = {
    "native": ({}, {}),
    "custom": ({}, {"custom_text": True}),
    "eos": ({"pool_type": "eos", "eos_id": 49407}, {}),
    "custom-last-both-ways": ({"pool_type": "last", "no_causal_mask": True, "proj_bias": True}, {"custom_text": True}),
    "custom-no-projection": ({"proj_type": "none", "width": 32}, {"custom_text": True}),
    "quick": ({}, {"quick_gelu": True}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_phrases_are_embedded_as_open_clip_does(tmp_path: Path, kind: str) -> None:
    text, more = MODELS[kind]
    name = registered(f"pcd-text-{kind}", text, **more)
    file = tiny_weights(tmp_path / "w.safetensors", name)
    encoder = make(file, name)
    tower = encoder.text_tower()
    found = embedded(tower, PHRASES)
    with torch.no_grad():
        expected = reference_model(file, (64, 64), name).encode_text(open_clip.tokenize(PHRASES))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, encoder.embed_text(PHRASES), rtol=1e-5, atol=1e-5)
    assert (tower.width, tower.context, found.dtype, found.requires_grad) == (32, 77, torch.float32, False)
    tokens = tower.tokens(PHRASES)
    short = tokens[:, : tower.needed(tokens)]
    if tower.needed(tokens) < tower.context:  # nothing behind the last end of a sentence is seen
        with torch.no_grad():
            torch.testing.assert_close(tower.encode(tower.embed(short), short), expected, rtol=1e-5, atol=1e-5)


def test_what_of_a_sentence_is_needed(weights: Path) -> None:
    tower = make(weights).text_tower()
    assert [tower.needed(tower.tokens(phrases)) for phrases in (["depth"], ["depth", "far away"], [])] == [3, 4, 77]


def test_a_resnets_text_tower(tmp_path: Path) -> None:
    encoder = make(resnet_weights(tmp_path / "w.safetensors", tiny_resnet()), "pcd-tiny-resnet", NATIVE)
    torch.testing.assert_close(embedded(encoder.text_tower(), PHRASES), encoder.embed_text(PHRASES), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_embeddings_and_nothing_else(weights: Path) -> None:
    """The same gradient as that of open_clip's own model with respect to what leaves its embedding table."""
    tower = make(weights).text_tower()
    tokens = tower.tokens(PHRASES)
    embeddings = tower.embed(tokens).requires_grad_()
    weigh = torch.randn(len(PHRASES), 32, generator=torch.Generator().manual_seed(1))
    (tower.encode(embeddings, tokens) * weigh).sum().backward()

    model, caught = reference_model(weights, (64, 64)), list[torch.Tensor]()

    def catch(_module: object, _inputs: object, out: torch.Tensor) -> None:
        out.retain_grad()
        caught.append(out)

    model.token_embedding.register_forward_hook(catch)
    (model.encode_text(tokens) * weigh).sum().backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad, caught[0].grad, rtol=1e-4, atol=1e-6)
    ends = tokens.argmax(dim=-1)
    for phrase, end in enumerate(ends):
        assert (embeddings.grad[phrase, : end + 1].abs().amax(dim=-1) > 0).all()
        assert (embeddings.grad[phrase, end + 1 :] == 0).all()  # what follows the end is not seen: the mask is causal
    parts = [value for value in vars(tower).values() if isinstance(value, torch.nn.Module)]
    frozen = [parameter for part in parts for parameter in part.parameters()]
    assert len(frozen) > 20
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


def test_a_word_can_be_learned(weights: Path) -> None:
    """The embedding of one word, drawn at random, is led to what another phrase means."""
    tower = make(weights).text_tower()
    tokens = tower.tokens(["This object is thing"])
    place = int(tokens[0].argmax()) - 1
    goal, start = embedded(tower, ["This object is giant"]), tower.embed(tokens)
    word = torch.nn.Parameter(0.02 * torch.randn(tower.width, generator=torch.Generator().manual_seed(0)))
    optimiser, losses = torch.optim.Adam([word], lr=0.05), []
    for _ in range(80):
        sentence = torch.cat([start[:, :place], word.expand(1, 1, -1), start[:, place + 1 :]], dim=1)
        loss = 1 - torch.nn.functional.cosine_similarity(tower.encode(sentence, tokens), goal).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_phrases_that_do_not_fit(weights: Path) -> None:
    tower = make(weights).text_tower()
    assert (tower.tokens(["word " * 75]).shape, tower.tokens(["a"]).dtype) == ((1, 77), torch.int64)
    assert embedded(tower, []).shape == (0, 32)
    with pytest.raises(UsageError, match=r"phrase of 78 tokens, but the text tower takes 77: 'word word"):
        tower.tokens(["short", "word " * 76])
    with pytest.raises(UsageError, match="a list of phrases, not one string"):
        tower.tokens("2.00 meter")


def test_the_digest_says_what_it_computes(tmp_path: Path, weights: Path) -> None:
    found = make(weights).text_tower().digest
    assert found == make(weights, size=(64, 96)).text_tower().digest == make(weights, prefix="other").text_tower().digest
    other = tiny_weights(tmp_path / "other.safetensors", seed=1)
    assert len({found, make(other).text_tower().digest, make(weights, precision="bf16").text_tower().digest}) == 3
    half = embedded(make(weights, precision="bf16").text_tower(), PHRASES)
    exact = embedded(make(weights).text_tower(), PHRASES)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.02


def test_moving_it_leaves_the_encoder_where_it_is(weights: Path) -> None:
    encoder = make(weights)
    before, tower = encoder.embed_text(PHRASES), encoder.text_tower()
    assert isinstance(encoder, Worded)
    assert tower.to(torch.device("cpu")) is tower
    tokens = tower.tokens(PHRASES)
    moved = tower.to(torch.device("meta"))
    found = moved.encode(moved.embed(tokens), tokens)
    assert (found.device.type, found.shape) == ("meta", (4, 32))
    assert torch.equal(encoder.embed_text(PHRASES), before)


def test_models_without_a_tower_say_so(tmp_path: Path) -> None:
    visual = tiny_weights(tmp_path / "visual.safetensors", tiny_model(), visual_only=True)
    with pytest.raises(TextTowerError, match=r"Words cannot be learned: .* image tower alone .*--weights auto"):
        make(visual).text_tower()
    with pytest.raises(TextTowerError, match="belongs to the transformers library"):
        make("random", tiny_model("pcd-tiny-foreign", text="transformers")).text_tower()
    cls = registered("pcd-text-cls", {"embed_cls": True}, custom_text=True)
    with pytest.raises(TextTowerError, match=r"text tower of pcd-text-cls adds a CLS token or masks its padding"):
        make("random", cls).text_tower()
