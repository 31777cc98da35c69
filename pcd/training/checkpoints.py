"""Checkpoints: safetensors files that appear whole, with their plain state as JSON in the header.

`last.safetensors` holds all that is needed to go on as if nothing had happened; `epoch-NNNN.safetensors` the weights of an
epoch that is the best of some metric. Which epoch is best for what stands in `last`, so there is one truth. With `train.ema`
the weights are the averaged ones everywhere, and `last` holds besides them those that training goes on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pcd.errors import CorruptError, RunError
from pcd.files import write_bytes
from pcd.heads.base import Phase
from pcd.training.steps import Average

LAST = "last.safetensors"
FOLDER = "checkpoints"
STATE = "state"
WEIGHTS = "weights."
OPTIMISER = "optimiser."
LIVE = "live."
UNTRAINED = "untrained"
"""Key in the state of a head that has nothing to train: it is finished with its first epoch."""


def epoch_file(folder: Path, epoch: int) -> Path:
    """Where the weights of an epoch lie."""
    return folder / f"epoch-{epoch:04d}.safetensors"


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and state durably as one file."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, metadata={STATE: json.dumps(state, sort_keys=True)}))


def read_state(path: Path) -> dict[str, Any]:
    """The plain state of a checkpoint, without its tensors. Raises `RunError` or `CorruptError`."""
    if not path.is_file():
        raise RunError(f"{path} is not there; the run has not finished its first epoch.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()[STATE])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path}: the checkpoint is damaged ({error}).") from None
    return state


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and state of a checkpoint."""
    state = read_state(path)
    try:
        return safetensors.torch.load_file(path), state
    except safetensors.SafetensorError as error:
        raise CorruptError(f"{path}: the checkpoint is damaged ({error}).") from None


def weights_of(head: nn.Module) -> dict[str, Tensor]:
    """The head's tensors under the names a checkpoint gives them."""
    return {f"{WEIGHTS}{name}": value for name, value in head.state_dict().items()}


def load_weights(head: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put a checkpoint's weights into a head. Raises `RunError` if they are of another architecture."""
    own = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    try:
        head.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise RunError(f"{path}: the weights do not fit the head of the run's recipe: {error}") from None


def live_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights behind an average under the names a checkpoint gives them."""
    return {f"{LIVE}{name}": value for name, value in values.items()}


def restore_live(average: Average, tensors: Mapping[str, Tensor], path: Path) -> None:
    """The inverse of `live_tensors`. Raises `RunError` for a checkpoint of a training without an average."""
    live = {name.removeprefix(LIVE): value for name, value in tensors.items() if name.startswith(LIVE)}
    if live.keys() != average.values.keys():
        raise RunError(f"{path} holds no weights behind an average; it was trained with train.ema = 0. Give the same options.")
    average.put(live)


def optimiser_tensors(phases: tuple[Phase, ...], optimisers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The moments and step counts of each phase's AdamW, or the momentum of its SGD, by phase and parameter name."""
    tensors: dict[str, Tensor] = {}
    for phase in phases:
        for name, parameter in phase.parameters:
            for key, value in optimisers[phase.name].state.get(parameter, {}).items():
                tensors[f"{OPTIMISER}{phase.name}.{name}.{key}"] = value
    return tensors


def restore_optimisers(
    phases: tuple[Phase, ...], optimisers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimiser_tensors`; moments go to the device of their parameter."""
    for phase in phases:
        for name, parameter in phase.parameters:
            prefix = f"{OPTIMISER}{phase.name}.{name}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                state = {key: value.clone() if key == "step" else value.to(parameter.device) for key, value in found.items()}
                optimisers[phase.name].state[parameter] = state


def prune(folder: Path, keep: set[int]) -> None:
    """Remove the weights of epochs that are no longer the best of anything."""
    names = {epoch_file(folder, epoch).name for epoch in keep}
    for file in folder.glob("epoch-*.safetensors"):
        if file.name not in names:
            file.unlink()
