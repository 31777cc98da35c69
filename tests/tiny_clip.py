"""A CLIP small enough for tests, known to open_clip by name, and files with its weights.

open_clip reads model configurations from any JSON file named after the model: `add_model_config` is all it takes.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pcd.encoders.openclip_names import open_clip

VISION = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32, "patch_dropout": 0.5}
"""Patch dropout must do nothing outside training; a model left in training mode shows at once."""
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@functools.cache
def tiny_model(name: str = "pcd-tiny", text: str = "native", quick_gelu: bool = False, width: int = 64) -> str:
    """Register a model with 4x4 patches of 16 pixels and 32 channels; returns its name."""
    texts = {"native": TEXT, "custom": TEXT, "transformers": {**TEXT, "hf_model_name": "nobody/nothing"}}
    config: dict[str, Any] = {
        "embed_dim": 32,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**VISION, "width": width},
        "text_cfg": texts[text],
        **({"custom_text": True} if text == "custom" else {}),
    }
    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def tiny_weights(file: Path, name: str = "pcd-tiny", seed: int = 0, visual_only: bool = False) -> Path:
    """Write a state dict with every value drawn at random (so that no zero or one hides a mistake) to a safetensors file."""
    config = open_clip.get_model_config(name)
    model_class = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model_class(**config).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        state[key] = (0.3 * noise if value.ndim > 1 else 0.5 + 0.3 * noise).contiguous()
    save_file({key: value for key, value in state.items() if key.startswith("visual.") or not visual_only}, file)
    return file


def reference_model(file: Path, size: tuple[int, int], name: str = "pcd-tiny") -> Any:
    """The model as open_clip itself builds, loads and resizes it."""
    return open_clip.create_model(name, pretrained=str(file), force_image_size=size).eval()
