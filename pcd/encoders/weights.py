"""Weights files: finding, fetching, reading and identifying them.

Importing this module imports neither torch nor a hub library; each function brings what it needs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # the name of what torch.load(weights_only=True) raises; nothing is unpickled here
from typing import TYPE_CHECKING, Any

from pcd.errors import WeightsError

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *CHECKPOINT_SUFFIXES)
CONNECT_SECONDS = 5.0
"""How long the hub may take to answer at all before pcd calls it unreachable."""


def find_weights(path: str | Path) -> Path:
    """The weights file at `path` (`~` is expanded). Raises `WeightsError` if it is not there or of no known kind."""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise WeightsError(f"weights file {file} {what}; give auto, random or the path of a {' / '.join(SUFFIXES)} file.")
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"weights file {file}: files of kind {file.suffix!r} are not read; expected {' / '.join(SUFFIXES)}.")
    return file


def describe_file(file: Path) -> dict[str, Any]:
    """Name, size in bytes and modification time in ns: enough to see that a file is unchanged without reading it."""
    stat = file.stat()
    return {"name": file.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def read_state(file: Path) -> State:
    """The state dict in `file`, on the CPU, in the stored dtypes.

    A dictionary wrapped in `state_dict` is unwrapped and the prefix `module.` (from data-parallel training) removed.
    Raises `WeightsError` naming the file for anything else: damaged files, TorchScript archives, pickled classes.
    """
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_checkpoint(file)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{file} holds {_kind(content)}; expected a state dict: names and tensors.")
    strangers = [str(key) for key, value in content.items() if not _is_tensor(value)]
    if strangers:
        raise WeightsError(f"{file} is no state dict: {some(strangers)} hold no tensor; save the model's state_dict() alone.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _read_checkpoint(file: Path) -> Any:
    import torch

    if _is_torchscript(file):
        raise WeightsError(
            f"{file} is a TorchScript archive (OpenAI publishes CLIP so), which is a program and not only weights. Use the "
            "safetensors file that --weights auto names for the model; or, where you trust this one, convert it with "
            "torch.save(dict(torch.jit.load(FILE, 'cpu').state_dict()), OUT) and pass OUT."
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise _unreadable(file, error) from error


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # torch.load will say what is wrong with it


def _unreadable(file: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{file} ({file.stat().st_size:,} bytes) cannot be read as weights alone: {first_line(error)} "
        "It is damaged, incomplete, or holds more than tensors; fetch it again, or save its state_dict() as safetensors."
    )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _kind(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def some(names: list[str], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without a full stop, then one."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(". ") + "."


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of a state dict on the CPU, independent of the order of its keys."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def fetch_published(label: str, repo: str, names: list[str]) -> Path:
    """The file of hub repository `repo` that has the first of `names` which exists, from the hub's cache or downloaded.

    What is in the cache is taken without asking the network. `label` is what the user asked for, e.g.
    `ViT-B-16-quickgelu/openai`. Raises `WeightsError`, in one line and within seconds, if it cannot be had: offline
    (`HF_HUB_OFFLINE` is respected), no such file, no access, or an interrupted download.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    if cached := _cached(repo, names):
        return cached
    try:
        return _download(repo, names)
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except _failures() as error:
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
    page = hf_hub_url(repo, names[0]).partition("/resolve/")[0]
    raise WeightsError(
        f"Weights {label} are not on this machine and could not be fetched ({reason}). Download {names[0]} from {page} "
        "and pass --weights PATH (encoder.weights in a recipe), or --weights random for a trial that means nothing."
    )


def cached_weights() -> dict[str, Path]:
    """Published weights that lie in the hub's cache here: `openclip:MODEL/TAG` to file. Imports open_clip."""
    from pcd.encoders.openclip_names import published_weights

    found = {f"openclip:{label}": _cached(repo, names) for label, repo, names in published_weights()}
    return {name: file for name, file in found.items() if file is not None}


def _cached(repo: str, names: list[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(repo: str, names: list[str]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            # hf_hub_download goes on trying for half a minute, with a warning each time: ask once, briefly, beforehand.
            get_hf_file_metadata(hf_hub_url(repo, name), timeout=CONNECT_SECONDS)
        except EntryNotFoundError:
            continue
        return Path(hf_hub_download(repo, name))
    raise FileNotFoundError(f"{repo} holds neither of {', '.join(names)}")


def _failures() -> tuple[type[BaseException], ...]:
    """What a hub request can raise. The HTTP library below the hub's has changed; its base error is that of the hub's own."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)
