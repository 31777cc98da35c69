"""What timm knows: its models, their published weights, their normalisation. The one module that imports timm."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcd.encoders.torchvision_schemas import make_torchvision_importable
from pcd.encoders.weights import fetch_published
from pcd.errors import UsageError, WeightsError, suggest

make_torchvision_importable()
timm: Any = importlib.import_module("timm")
"""The package, untyped: it does not declare its types."""

USUAL_FILES = ["model.safetensors", "pytorch_model.bin"]
NEAREST = 5


@dataclass(frozen=True)
class Architecture:
    """A model of timm's registry; `config` is the pretrained configuration of its tag, or of its default one."""

    name: str
    tag: str
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """`MODEL.TAG`, or `MODEL` if timm publishes nothing for it."""
        return f"{self.name}.{self.tag}" if self.tag else self.name

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of RGB in [0, 1] that the weights expect."""
        return tuple(self.config["mean"]), tuple(self.config["std"])

    @property
    def takes_size(self) -> bool:
        """Whether the model is built for one size of image (position embeddings, windows) or takes any (convolutions)."""
        return bool(self.config["fixed_input_size"])


def find_architecture(model: str) -> Architecture:
    """The architecture meant by `MODEL` or `MODEL.TAG`.

    Raises `UsageError` for a name or tag that timm does not know, with the nearest ones.
    """
    name, _, tag = model.partition(".")
    if not timm.models.is_model(name):
        known = timm.list_models()
        near = [other for other in known if name in other] or difflib.get_close_matches(name, known, cutoff=0.5)
        hint = f" The nearest are {', '.join(near[:NEAREST])}." if near else ""
        raise UsageError(f"Unknown timm model {name!r}.{hint} timm.list_models('*PART*') lists those with PART in their name.")
    published = timm.models.get_arch_pretrained_cfgs(name)
    if tag and f"{name}.{tag}" not in published:
        raise UsageError(f"timm has no weights {tag!r} for {name!r}.{suggest(tag, tags_of(name))}")
    config = timm.models.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    return Architecture(name, config.tag or "", config.to_dict())


def tags_of(name: str) -> list[str]:
    """The tags of the published weights of a model."""
    return [label.partition(".")[2] for label in timm.models.get_arch_pretrained_cfgs(name) if "." in label]


def published_file(architecture: Architecture) -> Path:
    """The file of the published weights of the tag, from the hub's cache or the hub.

    Raises `WeightsError` if there is none or it cannot be had.
    """
    config, label = architecture.config, architecture.label
    repo = config.get("hf_hub_id")
    if not repo:
        where = f"download {config['url']} and pass the file as" if config.get("url") else "none are published: use"
        raise WeightsError(f"timm knows no weights of {label} on the hub; {where} --weights PATH, or --weights random.")
    named = config.get("hf_hub_filename")
    return fetch_published(label, repo, [named] if named else USUAL_FILES)
