"""Which models, tags and files the encoder refuses and what it says; where weights come from; the torchvision mismatch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcd.encoders import create_encoder, openclip_names, request_of
from pcd.encoders.openclip_names import find_architecture, find_tag, find_tokenizer, open_clip, usable_models
from pcd.encoders.torchvision_schemas import make_torchvision_importable
from pcd.encoders.weights import cached_weights
from pcd.errors import PcdError, TextTowerError, UsageError, WeightsError
from tests.tiny_clip import reference_model, tiny_model, tiny_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("tiny") / "both.safetensors", tiny_model())


@pytest.fixture
def published(monkeypatch):
    """Two tags of the tiny model, one with a normalisation of its own, one trained with QuickGELU."""
    tags = {
        "mine": {"hf_hub": "somebody/tiny/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)},
        "quick": {"hf_hub": "somebody/tiny/", "quick_gelu": True},
        "by_url": {"url": "https://example.org/tiny.pt"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_model(), tags)


def create(model: str, weights: str | Path = "random", size: tuple[int, int] = (64, 64)):
    return create_encoder(f"openclip:{model}", {"weights": str(weights)}, size, "cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-L-14-366", r"Unknown open_clip model 'ViT-L-14-366'\. Did you mean 'ViT-L-14-336'\? Known: .*ViT-B-16-quickgelu"),
        ("hf-hub:org/model", "Unknown open_clip model 'hf-hub:org'"),
        ("convnext_base", r"'convnext_base' cannot be used: it has a timm image tower \(convnext_base\)\. .* e\.g\. ViT-B-16"),
        ("ViT-B-16-SigLIP", r"a timm image tower \(vit_base_patch16_siglip_224\)"),
        ("coca_ViT-L-14", r"a captioning decoder \(CoCa\)"),
        ("ViT-L-14-CLIPA", "pooling 'avg' instead of a CLS token"),
        ("ViT-B-16-quickgelu/opanai", r"no weights 'opanai' for 'ViT-B-16-quickgelu'\. Did you mean 'openai'\?"),
        ("ViT-B-16/openai", "were trained with QuickGELU, ViT-B-16 has GELU; use ViT-B-16-quickgelu/openai"),
        ("ViT-B-16-quickgelu/laion2b_s34b_b88k", "has no weights 'laion2b_s34b_b88k' for 'ViT-B-16-quickgelu'"),
    ],
)
def test_models_and_tags_that_cannot_be_used(model, message):
    with pytest.raises(UsageError, match=message):
        create(model)


def test_models_with_an_attentional_pooler_are_refused(monkeypatch):
    config = {**open_clip.get_model_config(tiny_model()), "vision_cfg": {"attentional_pool": True}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: config)
    with pytest.raises(UsageError, match="it has an attentional pooler"):
        find_architecture("any")


def test_what_is_called_usable_is():
    names = usable_models()
    assert len(names) > 30
    for name in names:
        architecture = find_architecture(name)
        visual = {**open_clip.get_model_config(name)["vision_cfg"]}
        assert architecture.image_size == (visual["image_size"],) * 2
        assert architecture.patch == (visual["patch_size"] or 32,) * 2  # ResNets have none: one location is 32 pixels
    assert find_tag(find_architecture("ViT-L-14-336-quickgelu"), "openai")["hf_hub"].endswith("openai/")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 100), r"views of 64x100 pixels: pcd-tiny has patches of 16 pixels, .* the width 100; .* 96 or 112"),
        ((8, 64), r"do not divide the height 8; the nearest that fits is 16 \(views\.canvas"),
    ],
)
def test_views_that_patches_do_not_cover(size, message):
    with pytest.raises(UsageError, match=message):
        create(tiny_model(), size=size)


def rename(state: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "resblocks.1.mlp" not in k},
            r"tensors 8 missing \(transformer\.resblocks\.1.*and 5 more\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "visual.ln_post.bias"},
            r"tensors 1 missing \(visual\.ln_post\.bias\)\.",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("visual.")},
            r"visual\.conv1\.weight and visual\.proj; here they",
        ),
        (lambda s: {**s, "visual.extra": torch.zeros(2)}, r"1 unexpected \(visual\.extra\)"),
        (
            lambda s: {**s, "visual.proj": torch.zeros(64, 48)},
            r"1 of another shape or type \(visual\.proj float32 \(64, 48\) instead of float32 \(64, 32\)\)\. It fits no model",
        ),
        (lambda s: {**s, "visual.proj": torch.zeros(64, 32).char()}, r"visual\.proj int8 \(64, 32\) instead of float32"),
        (lambda s: rename(s, "visual.", "vision_model."), "the layout of the transformers library"),
    ],
)
def test_files_that_do_not_fit(tmp_path, weights, change, message):
    save_file({key: value.contiguous() for key, value in change(load_file(weights)).items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=rf"w\.safetensors does not fit pcd-tiny: .*{message}"):
        create("pcd-tiny", tmp_path / "w.safetensors")


def test_a_file_of_another_model_names_that_model(weights):
    with pytest.raises(WeightsError, match=r"does not fit pcd-wider: .* By its shapes it is for: .*pcd-tiny"):
        create(tiny_model("pcd-wider", width=96), weights)


def test_a_tag_decides_the_normalisation_of_a_local_file(weights, published):
    encoder = create("pcd-tiny/mine", weights)
    views = torch.rand(1, 3, 64, 64)
    by_hand = torch.stack([(views[0, 0] - 0.1) / 0.5, (views[0, 1] - 0.2) / 0.25, (views[0, 2] - 0.3) / 1.0])[None]
    with torch.no_grad():
        expected = reference_model(weights, (64, 64)).encode_image(by_hand)
    torch.testing.assert_close(encoder.encode(views)["clip/cls"], expected, rtol=2e-4, atol=2e-4)
    assert encoder.fingerprint()["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(UsageError, match="trained with QuickGELU"):
        create("pcd-tiny/quick", weights)


def test_published_weights_are_the_same_weights_as_a_copy_of_their_file(tmp_path, monkeypatch, weights, published):
    asked: list[tuple[object, ...]] = []
    in_cache = Path(shutil.copy(weights, tmp_path / "open_clip_model.safetensors"))

    def fetch(*question: object) -> Path:
        asked.append(question)
        return in_cache

    monkeypatch.setattr(openclip_names, "fetch_published", fetch)
    from_hub = create("pcd-tiny/mine", "auto")
    assert asked == [("pcd-tiny/mine", "somebody/tiny", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])]
    assert from_hub.fingerprint() == create("pcd-tiny/mine", weights).fingerprint()
    assert (from_hub.random_weights, from_hub.has_text) == (False, True)


def test_the_default_model_is_openais_largest(monkeypatch):
    def refuse(*question):
        raise WeightsError(str(question))

    monkeypatch.setattr(openclip_names, "fetch_published", refuse)
    with pytest.raises(WeightsError, match=r"ViT-L-14-336-quickgelu/openai', 'timm/vit_large_patch14_clip_336\.openai'"):
        create_encoder("openclip", {}, (336, 336), "cpu")


def test_automatic_weights_need_a_tag_with_a_place(published):
    with pytest.raises(
        UsageError, match=r"add a tag \(openclip:pcd-tiny/TAG, known: mine, quick, by_url\), or use --weights PATH"
    ):
        create("pcd-tiny", "auto")
    with pytest.raises(WeightsError, match=r"not on the hub; download https://example\.org/tiny\.pt and pass"):
        create("pcd-tiny/by_url", "auto")


def test_weights_in_the_hubs_cache_are_listed(tmp_path, monkeypatch):
    import huggingface_hub

    file = tmp_path / "w.bin"

    def look(repo: str, name: str) -> str | None:
        return str(file) if (repo, name) == ("timm/vit_base_patch16_clip_224.openai", "open_clip_pytorch_model.bin") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    assert cached_weights() == {"openclip:ViT-B-16-quickgelu/openai": file}


@pytest.mark.parametrize("fault", [ImportError("No module named 'transformers'"), OSError("no connection\nand a page more")])
def test_tokenizers_of_other_libraries_may_be_missing(monkeypatch, fault):
    def refuse(_name):
        raise fault

    monkeypatch.setattr(open_clip, "get_tokenizer", refuse)
    with pytest.raises(
        TextTowerError, match=r"The tokenizer of ViT-L-14-worldwide \(google/mt5-base\) cannot be had: (No|no)"
    ) as caught:
        find_tokenizer(find_architecture("ViT-L-14-worldwide"))
    assert len(str(caught.value).splitlines()) == 1


def test_requests(weights):
    default = {
        "encoder": "openclip",
        "model": "ViT-L-14-336-quickgelu/openai",
        "weights": "auto",
        "file": None,
        "precision": "auto",
    }
    assert request_of("openclip", {}) == default
    assert request_of("openclip:M/t", {"weights": "random", "seed": 4}) == {
        **default,
        "model": "M/t",
        "weights": "random",
        "seed": 4,
    }
    stat = weights.stat()
    described = {"name": weights.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    found = request_of("openclip:M", {"weights": str(weights), "precision": "bf16"})
    assert found == {**default, "model": "M", "weights": "file", "file": described, "precision": "bf16"}
    with pytest.raises(WeightsError, match="is not there"):
        request_of("openclip:M", {"weights": "absent.pt"})


MISMATCH = """
import torch

def refuse(path):  # what a library built for another PyTorch does
    raise OSError(f"{path}: undefined symbol")

torch.ops.load_library = refuse
try:
    import torchvision
except RuntimeError as error:
    print(error)
from pcd.encoders.torchvision_schemas import make_torchvision_importable
print(make_torchvision_importable(), make_torchvision_importable())
import torchvision, open_clip
print(torchvision.extension._has_ops(), open_clip.get_model_config("RN50")["embed_dim"])
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    print(str(error).split('.')[0])
"""


def test_torchvision_whose_operators_do_not_load():
    done = subprocess.run([sys.executable, "-W", "error", "-c", MISMATCH], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "operator torchvision::nms does not exist",
        "True False",
        "False 1024",
        "Couldn't load custom C++ ops",
    ]


def fake_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "torchvision.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    def define(*_arguments):
        raise AssertionError("a schema was declared")

    monkeypatch.setattr(torch.library, "define", define)


def test_a_healthy_torchvision_is_not_touched(tmp_path, monkeypatch):
    fake_torchvision(tmp_path, monkeypatch, "healthy = True")
    assert make_torchvision_importable() is False


def test_schemas_are_declared_once_even_if_that_does_not_help(tmp_path, monkeypatch):
    assert hasattr(torch.ops.torchvision, "nms")  # open_clip has been imported above
    fake_torchvision(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(PcdError, match="torchvision cannot be imported"):
        make_torchvision_importable()


@pytest.mark.parametrize(
    "error", ["RuntimeError('compiled with different CUDA major versions')", "ImportError('libcudart.so')"]
)
def test_other_faults_of_torchvision_are_reported(tmp_path, monkeypatch, error):
    fake_torchvision(tmp_path, monkeypatch, f"raise {error}")
    monkeypatch.delattr("pcd.encoders.torchvision_schemas._declare_schemas")  # schemas are not the remedy here
    with pytest.raises(PcdError, match=r"torchvision cannot be imported beside PyTorch .*(CUDA major|libcudart).*Install the"):
        make_torchvision_importable()
