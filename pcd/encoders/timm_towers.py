"""Builds a timm model, puts weights into it, and makes a network of it that gives columns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pcd.device import Precision
from pcd.encoders.checks import check_divides
from pcd.encoders.timm_names import Architecture, timm
from pcd.encoders.weights import State, state_digest
from pcd.errors import UsageError, WeightsError

Size = tuple[int, int]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = 400
"""Characters of timm's own message that an error repeats."""
REFUSALS = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError)
"""What timm raises for weights, a size or an interface that a model does not take; it has no errors of its own."""


@dataclass(frozen=True)
class Anatomy:
    """What a model gives for views of one size: tokens of blocks, or maps of stages.

    `grid` and `width` are those of the final patch tokens. `layers` holds the shape of what each block or stage gives, `(P, D)`
    or `(h, w, C)`; `prefix` counts the tokens before the patches, of which `cls` says whether the first is a class token.
    """

    tokens: bool
    grid: Size
    width: int
    layers: tuple[tuple[int, ...], ...]
    prefix: int = 0
    cls: bool = False

    @property
    def registers(self) -> int:
        """Tokens before the patches that are no class token."""
        return self.prefix - self.cls


Asked = Mapping[str, tuple[str, int]]
"""Columns beside the final tokens, in their order: `patch@` or `cls@` and a block, `stage` and a stage, both from 1; or
`registers` and 0."""


class TimmNetwork(nn.Module):
    """Views `(B, 3, h, w)`, RGB in [0, 1], through a timm model to columns. Tensor operations only; nothing is checked."""

    def __init__(self, model: Any, architecture: Architecture, precision: Precision) -> None:
        super().__init__()
        self.model: Any = model
        self.dtype = DTYPES[precision]
        for name, value in zip(("mean", "std"), architecture.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        parameters = inspect.signature(model.forward_intermediates).parameters
        self.gives_tokens = "return_prefix_tokens" in parameters
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))

    def features(self, views: torch.Tensor, indices: list[int] | None) -> tuple[torch.Tensor, list[Any]]:
        """timm's final features and those of some blocks or stages, numbered from 0; None: of all.

        Tokens `(B, prefix + P, D)`, and for each block `(B, P, D)` or, with prefix tokens, the pair of it and `(B, prefix, D)`,
        all through the model's final norm. Of a hierarchical model maps `(B, C, h, w)`, the final one through the final norm if
        the model has one there, those of the stages as they are.
        """
        images = ((views - self.mean) / self.std).to(self.dtype)
        if self.gives_tokens:
            wanted = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": self.prefix > 0}
            final, layers = self.model.forward_intermediates(images, indices=indices, **wanted)
            return final, layers
        final, layers = self.model.forward_intermediates(images, indices=indices)
        if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
            final = final.permute(0, 3, 1, 2)
        return final, layers


class ColumnNetwork(nn.Module):
    """A `TimmNetwork` and which columns are made of what it gives: `PREFIX/patch`, `PREFIX/cls` and those asked for."""

    def __init__(self, network: TimmNetwork, anatomy: Anatomy, prefix: str, asked: Asked) -> None:
        super().__init__()
        self.network = network
        self.anatomy = anatomy
        self.prefix = prefix
        self.asked = dict(asked)
        self.taken = sorted({number for _, number in asked.values() if number} or {len(anatomy.layers)})

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Patch tokens float16 `(B, P, D)`, class tokens float32 `(B, D)`, registers float32 `(B, R, D)`, maps float16."""
        final, layers = self.network.features(views, [number - 1 for number in self.taken])
        found, anatomy = dict(zip(self.taken, layers, strict=True)), self.anatomy
        if not anatomy.tokens:
            columns = {f"{self.prefix}/patch": _last(final).flatten(1, 2).to(torch.float16)}
            return columns | {name: _last(found[number]).to(torch.float16) for name, (_, number) in self.asked.items()}
        columns = {f"{self.prefix}/patch": final[:, anatomy.prefix :].to(torch.float16)}
        if anatomy.cls:
            columns[f"{self.prefix}/cls"] = final[:, 0].float()
        for name, (what, number) in self.asked.items():
            if what == "registers":
                columns[name] = final[:, int(anatomy.cls) : anatomy.prefix].float()
            elif what == "cls@":
                columns[name] = found[number][1][:, 0].float()
            else:
                columns[name] = (found[number][0] if anatomy.prefix else found[number]).to(torch.float16)
        return columns


def _last(maps: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` to `(B, h, w, C)`."""
    return maps.permute(0, 2, 3, 1)


def random_state(architecture: Architecture, seed: int) -> tuple[State, str]:
    """timm's random initial values from `seed`, at the model's own image size, and their digest.

    Neither reads nor moves the global random state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        state: State = timm.create_model(architecture.label, pretrained=False).state_dict()
    return state, state_digest(state)


def load_network(
    architecture: Architecture, view_size: Size, precision: Precision, state: State, source: str
) -> tuple[TimmNetwork, Size]:
    """The network with the weights of `state`, read from `source` (for messages), and its grid of patches.

    timm itself loads them: it renames those of an original publication and resamples position embeddings to the grid of a
    view. Raises `WeightsError` unless names and shapes are then exactly the model's, apart from a classifier that is not there,
    and `UsageError` for a model without a feature interface and a view size that it cannot take.
    """
    with torch.random.fork_rng(devices=[]):
        model = _load(architecture, view_size, state, source)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise UsageError(f"timm model {architecture.name!r} cannot be used: it has no forward_intermediates().")
    cell = int(model.feature_info[-1]["reduction"])
    grid = check_divides(architecture.name, (cell, cell), view_size)
    model.eval().requires_grad_(False)
    return TimmNetwork(model.to(DTYPES[precision]), architecture, precision), grid


def _load(architecture: Architecture, view_size: Size, state: State, source: str) -> Any:
    sized = {"img_size": view_size} if architecture.takes_size else {}
    problem: BaseException | None = None
    for bare in ({}, {"num_classes": 0}):  # a file of the trunk alone is complete for a model without a classifier
        overlay = {"state_dict": dict(state), **bare}
        try:
            model = timm.create_model(architecture.label, pretrained=True, pretrained_cfg_overlay=overlay, **sized, **bare)
        except REFUSALS as error:
            problem = problem or error
            continue
        model.pretrained_cfg.pop("state_dict", None)  # else the weights are held twice
        return model
    assert problem is not None
    try:
        timm.create_model(architecture.label, pretrained=False, **sized)
    except REFUSALS as error:
        size = f"{view_size[0]}x{view_size[1]}"
        raise UsageError(f"timm cannot build {architecture.name} for views of {size} pixels: {_short(error)}") from error
    raise WeightsError(f"{source} does not fit timm's {architecture.label}: {_short(problem)}") from problem


def _short(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."


def examine(network: TimmNetwork, architecture: Architecture, view_size: Size, grid: Size, device: str) -> Anatomy:
    """What the network gives for one black view, seen by trying. Raises `UsageError` for what pcd cannot make columns of."""
    try:
        with torch.no_grad():
            final, layers = network.features(torch.zeros(1, 3, *view_size, device=device), None)
    except REFUSALS as error:
        size = f"{view_size[0]}x{view_size[1]}"
        raise UsageError(f"timm model {architecture.name!r} cannot take views of {size} pixels: {_short(error)}") from error
    patches = grid[0] * grid[1]
    if network.gives_tokens and final.ndim == 3 and final.shape[1] == network.prefix + patches:
        cls = network.prefix > 0 and getattr(network.model, "cls_token", None) is not None
        shape = (patches, int(final.shape[2]))
        return Anatomy(True, grid, shape[1], (shape,) * len(layers), network.prefix, cls)
    if not network.gives_tokens and final.ndim == 4 and tuple(final.shape[2:]) == grid:
        shapes = tuple((int(m.shape[2]), int(m.shape[3]), int(m.shape[1])) for m in layers)
        return Anatomy(False, grid, int(final.shape[1]), shapes)
    raise UsageError(
        f"timm model {architecture.name!r} cannot be used: its features are {tuple(final.shape)} for a view of {view_size[0]}x"
        f"{view_size[1]}; pcd needs tokens (1, {network.prefix} + {patches}, D) or a map (1, C, {grid[0]}, {grid[1]})."
    )
