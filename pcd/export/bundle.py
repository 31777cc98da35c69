"""A bundle: a trained run as a folder that can be published, small and without the traces of the machine it was trained on.

    model.safetensors    the head's weights, under the names of its parameters
    encoder.safetensors  the encoder's image weights, if they were wanted
    run.json             what the run's `run.json` says, and under `bundle` what is here: epoch, sizes and SHA-256 of the files
    recipe.toml          the recipe
    metrics.json         the evaluations of this epoch by name, if there are any
    README.md            the model card

`pcd.stages.runs.open_run` opens a bundle as it opens a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pcd.errors import CorruptError, RunError, UsageError
from pcd.files import publish, read_json, sync, write_bytes
from pcd.fingerprint import file_digest

RUN_FILE, RECIPE_FILE = "run.json", "recipe.toml"
MODEL_FILE, ENCODER_FILE = "model.safetensors", "encoder.safetensors"
METRICS_FILE, CARD_FILE = "metrics.json", "README.md"
FILES = (MODEL_FILE, ENCODER_FILE, RECIPE_FILE, METRICS_FILE, CARD_FILE, RUN_FILE)
"""In the order in which they are replaced: what describes the others comes last."""
WEIGHTS = (MODEL_FILE, ENCODER_FILE)
KEY = "bundle"
FORMAT = 1
CHECKPOINTS = "checkpoints"
"""A folder with such a folder is a run and never written over."""


def is_bundle(root: Path) -> bool:
    """Whether `root` holds a bundle; its files may still be damaged."""
    if not (root / RUN_FILE).is_file():
        return False
    try:
        info = read_json(root / RUN_FILE)
    except ValueError:
        return False
    return isinstance(info, dict) and KEY in info


def without_paths(value: Any) -> Any:
    """The same JSON value with the last part of every absolute path (also of another system, or under `~`) in its place."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return last_part(value) if isinstance(value, str) and _is_absolute(value) else value


def last_part(path: str) -> str:
    """`/data/weights/vit.safetensors` to `vit.safetensors`, on any system."""
    return PureWindowsPath(path).name or PurePosixPath(path).name


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~", "file:")) or PureWindowsPath(text).is_absolute()


def save_weights(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a plain safetensors file, durably."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(file, safetensors.torch.save(plain, metadata={"format": "pt"}))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file of a bundle. Raises `CorruptError` if it cannot be read."""
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CorruptError(f"{file}: the weights are damaged ({error}).") from None


def describe_files(root: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files of a bundle that are in `root`, `run.json` left out: it will hold this."""
    present = [name for name in FILES if name != RUN_FILE and (root / name).is_file()]
    return {name: {"bytes": (root / name).stat().st_size, "sha256": file_digest(root / name)} for name in present}


def check_place(root: Path, identity: str, *, force: bool) -> None:
    """Raise `UsageError` unless a bundle of the run with this `identity` may be written to `root`.

    A folder that is absent, empty or an earlier bundle of the same run may be, another one only by `force`; a run never.
    """
    if (root / CHECKPOINTS).is_dir() or (root.exists() and not root.is_dir()):
        what = "a run with its checkpoints" if root.is_dir() else "a file"
        raise UsageError(f"{root} is {what}; give another folder with --out.")
    if force or not root.is_dir() or not any(root.iterdir()):
        return
    if not is_bundle(root):
        raise UsageError(f"{root} is not empty and holds no bundle; give another --out, or --force to write into it.")
    found = read_json(root / RUN_FILE)[KEY]
    if found.get("identity") != identity:
        raise UsageError(
            f"{root} is a bundle of another run ({found.get('run')}); give another --out, or --force to replace it."
        )
    card, recorded = root / CARD_FILE, found.get("files", {}).get(CARD_FILE, {})
    if card.is_file() and file_digest(card) != recorded.get("sha256"):
        raise UsageError(f"{card} was edited since it was written; save your text, then give --force to write it anew.")


def put(staged: Path, root: Path) -> None:
    """Move a finished bundle from folder `staged`, on the same file system, to `root`; other files there stay.

    Replaces an earlier bundle file by file: until the last is in place, opening it fails with a wrong checksum.
    """
    if not root.exists():
        staged.rename(root)
        sync(root.parent)
        return
    for name in FILES:
        if (staged / name).is_file():
            publish(staged / name, root / name)
        else:
            (root / name).unlink(missing_ok=True)


def opened(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` of the bundle in `root` says, for a `Run`: checked, and with the weights that lie in the bundle.

    The encoder's table then names `encoder.safetensors`, `columns` has its fingerprint, and `trained_columns` what the run was
    trained on. Raises `RunError` for another format and `CorruptError` for a file that is missing or not the one recorded.
    """
    bundle = info[KEY]
    if not isinstance(bundle, Mapping) or bundle.get("format") != FORMAT:
        found = bundle.get("format") if isinstance(bundle, Mapping) else bundle
        raise RunError(f"{root}: a bundle of format {found!r}; this pcd reads format {FORMAT}. Use the pcd that wrote it.")
    if missing := {"run", "identity", "checkpoint", "epoch", "best", "files", "encoder"} - bundle.keys():
        raise RunError(f"{root / RUN_FILE}: the bundle lacks {', '.join(sorted(missing))}; export it again.")
    _check_files(root, bundle["files"])
    columns = info["columns"]
    if bundle["encoder"] is None:
        return {**info, "trained_columns": columns}
    return {
        **info,
        "encoders": {
            name: {**entry, "table": {**entry["table"], "weights": str(root / ENCODER_FILE)}}
            for name, entry in info["encoders"].items()
        },
        "columns": {
            name: {**found, "encoder": bundle["encoder"]} if "encoder" in found else found for name, found in columns.items()
        },
        "trained_columns": columns,
    }


def _check_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """The weights must be those that were written; the texts may be edited."""
    if MODEL_FILE not in files:
        raise RunError(f"{root / RUN_FILE}: the bundle lists no {MODEL_FILE}; export it again.")
    for name in WEIGHTS:
        if name not in files:
            continue
        if not (root / name).is_file():
            raise CorruptError(f"{root / name} is not there; the bundle is incomplete: fetch or export it again.")
        found, wanted = file_digest(root / name), files[name].get("sha256")
        if found != wanted:
            raise CorruptError(
                f"{root / name} is not the file that was exported: SHA-256 {found}, recorded {wanted}. The bundle is damaged "
                "(a pointer file of a version control system in its place counts, too): fetch or export it again."
            )
