"""What open_clip knows: its models, their published weights, their tokenizers.

The one module that imports open_clip; others take it from here.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcd.encoders.checks import check_divides
from pcd.encoders.torchvision_schemas import make_torchvision_importable
from pcd.encoders.weights import fetch_published, first_line
from pcd.errors import TextTowerError, UsageError, WeightsError, suggest

make_torchvision_importable()
open_clip: Any = importlib.import_module("open_clip")
"""The package, untyped: it does not declare its types."""
open_clip.add_model_config(Path(__file__).parent / "configs")  # pcd-demo, pcd-demo-resnet: small, for random weights

Size = tuple[int, int]
RESNET_STRIDE = 32
"""Pixels from one location of a ModifiedResNet's last stage to the next."""


@dataclass(frozen=True)
class Architecture:
    """An open_clip model that pcd can use: its configuration and what follows from it.

    `patch` and `image_size` are (height, width) in pixels, `patch` of a ResNet what a location of its last stage stands for;
    `native_text` is False if the text tower is another library's.
    """

    name: str
    config: dict[str, Any]
    patch: Size
    image_size: Size
    native_text: bool

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is OpenAI's approximation `x * sigmoid(1.702 x)` of GELU."""
        return bool(self.config.get("quick_gelu", False))

    @property
    def resnet(self) -> bool:
        """Whether the image tower is a ModifiedResNet; else it is a vision transformer."""
        return not isinstance(self.config["vision_cfg"].get("layers", 12), int)

    @property
    def positions(self) -> str:
        """The entry of a state dict that holds the positional embedding of the patches."""
        return "visual.attnpool.positional_embedding" if self.resnet else "visual.positional_embedding"

    @property
    def grid(self) -> Size:
        """Patches of an image of the size the model was made for: (rows, columns)."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]


def find_architecture(name: str) -> Architecture:
    """The architecture of open_clip model `name`.

    Raises `UsageError` for a name open_clip does not know, with the nearest one, and for a model that is neither a vision
    transformer with a CLS token nor a ModifiedResNet, naming what was found.
    """
    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        raise UsageError(f"Unknown open_clip model {name!r}.{suggest(name, usable_models())}")
    if obstacle := _obstacle(config):
        raise UsageError(
            f"open_clip model {name!r} cannot be used: it has {obstacle}. pcd needs open_clip's own vision transformer with a "
            "CLS token, e.g. ViT-B-16-quickgelu or ViT-L-14-336-quickgelu, or its own ResNet, e.g. RN50-quickgelu."
        )
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    native_text = not config["text_cfg"].get("hf_model_name")
    patch = vision.patch_size if isinstance(vision.layers, int) else RESNET_STRIDE
    return Architecture(name, config, _pair(patch), _pair(vision.image_size), native_text)


def usable_models() -> list[str]:
    """Names of the open_clip models that `find_architecture` accepts."""
    return [name for name in open_clip.list_models() if not _obstacle(open_clip.get_model_config(name))]


def _obstacle(config: Mapping[str, Any]) -> str | None:
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        return f"a timm image tower ({vision.timm_model_name})"
    if "multimodal_cfg" in config:
        return "a captioning decoder (CoCa)"
    if vision.attentional_pool:
        return "an attentional pooler"
    return None if vision.pool_type == "tok" else f"pooling {vision.pool_type!r} instead of a CLS token"


def find_tag(architecture: Architecture, tag: str) -> dict[str, Any]:
    """What open_clip knows of the published weights `tag`: where they are, their normalisation, their activation.

    Raises `UsageError` for an unknown tag, with the nearest one, and for weights trained with another activation than the
    model has: they load without a complaint and compute something else.
    """
    name = architecture.name
    config: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UsageError(
            f"open_clip has no weights {tag!r} for {name!r}.{suggest(tag, tags)} Leave the tag out for a file of your own."
        )
    if bool(config.get("quick_gelu", False)) != architecture.quick_gelu:
        other = name.removesuffix("-quickgelu") if architecture.quick_gelu else f"{name}-quickgelu"
        trained, has = ("GELU", "QuickGELU") if architecture.quick_gelu else ("QuickGELU", "GELU")
        raise UsageError(f"The weights {name}/{tag} were trained with {trained}, {name} has {has}; use {other}/{tag}.")
    return config


def normalisation(tag: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that the weights expect; open_clip's default without a tag."""
    default = open_clip.transform.PreprocessCfg()
    return tuple(tag.get("mean", default.mean)), tuple(tag.get("std", default.std))


def published_file(architecture: Architecture, tag: str | None) -> Path:
    """The file of the published weights `tag`, from the hub's cache or the hub.

    Raises `UsageError` without a tag and `WeightsError` if the file cannot be had.
    """
    name = architecture.name
    if tag is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(
            f"openclip:{name} does not say which weights: add a tag (openclip:{name}/TAG, known: {tags}), "
            "or use --weights PATH or --weights random."
        )
    config = find_tag(architecture, tag)
    repo, files = _hub_files(config)
    if not repo:
        url = config.get("url", "them")
        raise WeightsError(f"Weights {name}/{tag} are not on the hub; download {url} and pass the file as --weights PATH.")
    return fetch_published(f"{name}/{tag}", repo, files)


def published_weights() -> Iterator[tuple[str, str, list[str]]]:
    """All published weights that pcd can use: `MODEL/TAG`, hub repository, and file names, best first."""
    for name in usable_models():
        for tag in open_clip.list_pretrained_tags_by_model(name):
            config = open_clip.get_pretrained_cfg(name, tag)
            if config.get("hf_hub") and bool(config.get("quick_gelu")) == find_architecture(name).quick_gelu:
                yield f"{name}/{tag}", *_hub_files(config)


def _hub_files(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Hub repository ("" if there is none) and the files that hold the weights, best first."""
    repo, _, file = config.get("hf_hub", "").rpartition("/")
    usual = [open_clip.constants.HF_SAFE_WEIGHTS_NAME, open_clip.constants.HF_WEIGHTS_NAME]
    return repo, [file] if file else usual


def grid_of_view(architecture: Architecture, view_size: Size) -> Size:
    """Patches of a view: (rows, columns).

    Raises `UsageError` if they do not cover it exactly.
    """
    return check_divides(architecture.name, architecture.patch, view_size, "patches")


def find_tokenizer(architecture: Architecture) -> Any:
    """open_clip's tokenizer of a model: phrases to `(N, context length)` token numbers.

    Raises `TextTowerError` if it must come from the hub or from the transformers library and does not.
    """
    try:
        with _quiet_root_logger():
            return open_clip.get_tokenizer(architecture.name)
    except (ImportError, OSError, ValueError) as error:
        source = architecture.config["text_cfg"].get("hf_tokenizer_name", "")
        raise TextTowerError(
            f"The tokenizer of {architecture.name} ({source}) cannot be had: {first_line(error)} Install the transformers "
            'library and connect once, or set head.table_init to "tokens" or "random".'
        ) from error


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keeps open_clip's `logging.info` from installing a handler on the root logger, which would be ours to choose."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _pair(value: int | Size | list[int]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
