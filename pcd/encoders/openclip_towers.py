"""Builds the two towers of an open_clip model and puts weights into them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from pcd.device import Precision
from pcd.encoders.openclip_names import (
    RESNET_STRIDE,
    Architecture,
    Size,
    find_architecture,
    grid_of_view,
    open_clip,
    usable_models,
)
from pcd.encoders.openclip_network import DTYPES, ImageNetwork, Reading
from pcd.encoders.openclip_resnet import ResNetNetwork
from pcd.encoders.openclip_vit import VitNetwork
from pcd.encoders.weights import State, some, state_digest
from pcd.errors import WeightsError

_NOT_TOWERS = {"logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size"}
"""Entries of published state dicts that no embedding depends on."""

_COUNTER = ".num_batches_tracked"
"""How many batches a BatchNorm was trained on: of no use once it is, and not in every file."""

_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""A text tower that costs nothing, for when there are no weights for one: open_clip builds both or neither."""


@dataclass(frozen=True)
class Towers:
    """A model in evaluation mode. `text` is the whole model if it can embed text, else None."""

    visual: nn.Module
    text: nn.Module | None
    digest: str | None = None
    """With random weights: of the initial values, before interpolation and conversion."""


def network_of(architecture: Architecture, visual: nn.Module, reading: Reading) -> ImageNetwork:
    """The network from views to columns around an image tower."""
    kind = ResNetNetwork if architecture.resnet else VitNetwork
    return kind(visual, reading, architecture.name)


def random_towers(architecture: Architecture, view_size: Size, precision: Precision, seed: int) -> Towers:
    """Towers with open_clip's random initialisation from `seed`; neither reads nor moves the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(architecture, precision, text=architecture.native_text)
    initial = model.state_dict()
    digest = state_digest(initial)
    _set_positions(model, architecture, initial[architecture.positions], architecture.grid, view_size)
    return _finish(model, precision, architecture.native_text, digest)


def load_towers(architecture: Architecture, view_size: Size, precision: Precision, state: State, file: Path) -> Towers:
    """Towers with the weights of `state`, which was read from `file` (for messages).

    Without text weights there is no text tower. Raises `WeightsError` unless names and shapes are exactly the model's.
    """
    state = {key: value for key, value in state.items() if not key.endswith(_COUNTER)}
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    rest = {key: value for key, value in state.items() if key not in visual and key not in _NOT_TOWERS}
    text = bool(rest) and architecture.native_text
    with _NoInitialisation():
        model = _build(architecture, precision, text)
    if text and isinstance(model, open_clip.CustomTextCLIP):
        rest = open_clip.model.convert_to_custom_text_state_dict(rest)
    found = {**visual, **rest} if text or not visual else visual
    _check(model, found, text, architecture, file)
    positions = found.pop(architecture.positions).float()
    source = _grid_of_file(positions, architecture, file)
    model.load_state_dict(found, strict=False)  # exact already: _check has compared every name
    _set_positions(model, architecture, positions, source, view_size)
    return _finish(model, precision, text)


def _build(architecture: Architecture, precision: Precision, text: bool) -> nn.Module:
    config = open_clip.get_model_config(architecture.name)
    custom = config.pop("custom_text", False) and text
    if not text:
        config["text_cfg"] = dict(_NO_TEXT)
    model_class = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model: nn.Module = model_class(**config, cast_dtype=open_clip.get_cast_dtype(precision))
    return model


def _finish(model: nn.Module, precision: Precision, text: bool, digest: str | None = None) -> Towers:
    if precision != "fp32":
        open_clip.convert_weights_to_lp(model, dtype=DTYPES[precision])
    model.eval().requires_grad_(False)
    return Towers(cast(nn.Module, model.visual), model if text else None, digest)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out the random initialisation of a model that is about to be loaded: 6 s for a ViT-L on two cores.

    It also keeps the global random state as it was.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        drawn = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if drawn or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        func = torch.empty if func is torch.randn else func
        return func(*args, **(kwargs or {}))


def resize_positions(positions: torch.Tensor, source: Size, target: Size) -> torch.Tensor:
    """Positional embeddings `(1 + rows * columns, width)`, CLS first, from one patch grid to another.

    Antialiased bicubic interpolation without aligned corners, as open_clip does it, but by the shape of the grid: open_clip
    looks at the number of patches only and would read a 24x24 grid as 12x48.
    """
    if source == target:
        return positions
    cls, grid = positions[:1], positions[1:]
    plane = grid.reshape(1, *source, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=target, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, plane.permute(0, 2, 3, 1).reshape(target[0] * target[1], -1)])


def _set_positions(
    model: nn.Module, architecture: Architecture, positions: torch.Tensor, source: Size, view_size: Size
) -> None:
    resized = resize_positions(positions, source, grid_of_view(architecture, view_size)).clone()
    module, _, name = architecture.positions.rpartition(".")
    setattr(model.get_submodule(module), name, nn.Parameter(resized, requires_grad=False))


def _grid_of_file(positions: torch.Tensor, architecture: Architecture, file: Path) -> Size:
    """The patch grid that the embeddings in a file belong to: the model's own, or a square (trained at another size)."""
    patches = positions.shape[0] - 1
    rows, columns = architecture.grid
    if patches == rows * columns:
        return rows, columns
    side = math.isqrt(patches)
    if side * side != patches:
        raise WeightsError(
            f"{file}: {architecture.positions} is for {patches} patches, neither the {rows}x{columns} of "
            f"{architecture.name} nor a square grid."
        )
    return side, side


def _check(model: nn.Module, found: Mapping[str, torch.Tensor], text: bool, architecture: Architecture, file: Path) -> None:
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if key not in _NOT_TOWERS and not key.endswith(_COUNTER) and (text or key.startswith("visual."))
    }
    places = architecture.positions
    wrong = [key for key in expected if key in found and not _fits(found[key], expected[key], resizable=key == places)]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape or type": [f"{key} {_spell(found[key])} instead of {_spell(expected[key])}" for key in wrong],
    }
    lines = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if lines:
        raise WeightsError(f"{file} does not fit {architecture.name}: tensors {'; '.join(lines)}.{_likely(found)}")


def _fits(found: torch.Tensor, expected: torch.Tensor, *, resizable: bool) -> bool:
    same = found.shape == expected.shape
    if resizable:  # positions: the number of patches may differ
        same = found.ndim == 2 and found.shape[0] > 1 and found.shape[1] == expected.shape[1]
    return same and found.is_floating_point()


def _spell(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _likely(found: Mapping[str, torch.Tensor]) -> str:
    """What the file may be instead, from its shapes."""
    if any(key.startswith(("vision_model.", "text_model.")) for key in found):
        return " It has the layout of the transformers library; fetch the file that --weights auto names for this model."
    shape = _shape_of_file(found)
    if shape is None:
        return (
            " Image towers of open_clip have visual.conv1.weight and visual.proj; here they are absent or of another kind. "
            "Its ResNets have visual.attnpool.c_proj.weight instead of visual.proj."
        )
    names = [name for name in usable_models() if _shape(find_architecture(name)) == shape]
    return f" By its shapes it is for: {', '.join(names)}." if names else " It fits no model that open_clip knows."


def _shape_of_file(found: Mapping[str, torch.Tensor]) -> tuple[Any, ...] | None:
    """Width, layers, patch and embedding width as `_shape` gives them; None if it is no image tower of open_clip."""
    conv, projection, pool = (found.get(f"visual.{key}") for key in ("conv1.weight", "proj", "attnpool.c_proj.weight"))
    if pool is not None and pool.ndim == 2:
        stages = [{key.split(".")[2] for key in found if key.startswith(f"visual.layer{n}.")} for n in range(1, 5)]
        return pool.shape[1] // 32, tuple(len(blocks) for blocks in stages), (RESNET_STRIDE,) * 2, pool.shape[0]
    if conv is None or projection is None or conv.ndim != 4 or projection.ndim != 2:
        return None
    layers = len({key.split(".")[3] for key in found if key.startswith("visual.transformer.resblocks.")})
    return conv.shape[0], layers, tuple(conv.shape[2:]), projection.shape[1]


def _shape(architecture: Architecture) -> tuple[Any, ...]:
    vision = open_clip.CLIPVisionCfg(**architecture.config["vision_cfg"])
    layers = tuple(vision.layers) if architecture.resnet else vision.layers
    return vision.width, layers, architecture.patch, architecture.config["embed_dim"]
