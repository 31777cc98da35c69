"""A CLIP with a ModifiedResNet that is small enough for tests, known to open_clip by name, and files with its weights."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pcd.encoders.openclip_names import open_clip
from tests.tiny_clip import TEXT

NATIVE = (96, 96)
STAGES = {"stem": (2, 16), "layer1": (4, 64), "layer2": (8, 128), "layer3": (16, 256), "layer4": (32, 512)}
"""Stride and channels, by the published architecture: four channels of each stage for one of its width."""


@functools.cache
def tiny_resnet(name: str = "pcd-tiny-resnet", **vision: Any) -> str:
    """Register a ResNet with 3x3 locations of 32 pixels, 512 channels in its last stage and 32 in the joint space."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 96, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None, **vision},
        "text_cfg": TEXT,
    }
    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def resnet_weights(file: Path, name: str = "pcd-tiny-resnet", seed: int = 0, visual_only: bool = False) -> Path:
    """Write a state dict with every value drawn at random, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in open_clip.CLIP(**open_clip.get_model_config(name)).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        elif value.ndim > 1:
            state[key] = 1.2 * noise / math.sqrt(value[0].numel())
        else:
            state[key] = 0.5 + 0.3 * noise
        state[key] = state[key].contiguous()
    save_file({key: value for key, value in state.items() if key.startswith("visual.") or not visual_only}, file)
    return file


def reference_resnet(file: Path, name: str = "pcd-tiny-resnet") -> Any:
    """The model as open_clip itself builds and loads it, at its native size."""
    return open_clip.create_model(name, pretrained=str(file)).eval()
