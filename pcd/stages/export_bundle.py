"""Export as a bundle: weights, recipe, scores and a model card in a folder that can be published."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcd.errors import FingerprintError, UsageError
from pcd.export import bundle
from pcd.export.card import model_card
from pcd.export.staging import staging
from pcd.files import read_json, write_json, write_text
from pcd.recipe import Recipe, parse_recipe
from pcd.stages.evaluate import EVALUATIONS, METRICS_FILE
from pcd.stages.run_encoder import encoder_from, load_exportable, only_key, other_than_trained
from pcd.stages.runs import Run, open_run


@dataclass(frozen=True)
class BundleExport:
    """What was written: the files with size and SHA-256, evaluations that are in it, and those of other epochs that are not."""

    root: Path
    files: dict[str, dict[str, Any]]
    evaluations: list[str]
    left_out: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "root": str(self.root)}


def export_bundle(
    run: Run,
    out: Path,
    *,
    checkpoint: str = "abs_rel",
    weights: str | None = None,
    with_encoder: bool = False,
    licence: str | None = None,
    force: bool = False,
) -> BundleExport:
    """Write the run as a bundle to folder `out` (see `pcd.export.bundle`), with the encoder's image weights if asked for.

    Raises `UsageError` for a folder that may not be written over, or an encoder whose weights cannot be put in a file.
    """
    if run.bundle:
        raise UsageError(f"{run.root} is a bundle already; copy the folder.")
    bundle.check_place(out, run.identity, force=force)
    head, epoch = run.load_head(checkpoint, torch.device("cpu"))
    evaluations, left_out = _evaluations(run, epoch)
    best = {metric: value for metric, value in run.best.items() if value["epoch"] == epoch}
    recipe = _portable_recipe(run.recipe)
    with staging(out) as folder:
        staged = folder / "bundle"
        staged.mkdir()
        bundle.save_weights(staged / bundle.MODEL_FILE, head.state_dict())
        encoder, notes = _put_encoder(run, weights, staged) if with_encoder else (None, [])
        write_text(staged / bundle.RECIPE_FILE, recipe.as_toml())
        if evaluations:
            write_json(staged / bundle.METRICS_FILE, evaluations)
        about = {
            "format": bundle.FORMAT,
            "run": run.name,
            "identity": run.identity,
            "checkpoint": checkpoint,
            "epoch": epoch,
            "best": best,
            "parameters": sum(parameter.numel() for parameter in head.parameters()),
            "encoder": encoder,
        }
        info = _portable_info(run.info, inside=encoder is not None)
        info[bundle.KEY] = {**about, "files": bundle.describe_files(staged)}
        write_text(staged / bundle.CARD_FILE, model_card(info, recipe, evaluations, licence))
        info[bundle.KEY]["files"] = bundle.describe_files(staged)
        write_json(staged / bundle.RUN_FILE, info)
        open_run(staged).load_head(checkpoint, torch.device("cpu"))  # what cannot be opened is not published
        bundle.put(staged, out)
    return BundleExport(out, info[bundle.KEY]["files"], sorted(evaluations), left_out, notes)


def _evaluations(run: Run, epoch: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The run's evaluations of an epoch by name, without paths, and the names of those of other epochs."""
    kept, left_out = {}, []
    for file in sorted((run.root / EVALUATIONS).glob(f"*/{METRICS_FILE}")):
        document = read_json(file)
        if document["epoch"] == epoch:
            document |= {"run": run.name, "cache": bundle.last_part(document["cache"])}
            kept[file.parent.name] = bundle.without_paths(document)
        else:
            left_out.append(file.parent.name)
    return kept, left_out


def _put_encoder(run: Run, weights: str | None, staged: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Write the encoder's image weights; returns the fingerprint of the encoder made from them, and what to tell."""
    key, tensors = only_key(run), load_exportable(run, weights).image_weights()
    if tensors is None:
        return None, ["the encoder's weights are drawn from their seed; there is no file to put in"]
    bundle.save_weights(staged / bundle.ENCODER_FILE, tensors)
    fingerprint = encoder_from(run, key, str(staged / bundle.ENCODER_FILE)).fingerprint()
    if lines := other_than_trained(run, key, fingerprint, ("weights", "text")):
        raise FingerprintError(f"the encoder's image weights alone make another encoder: {'; '.join(lines)}.")
    return fingerprint, []


def _portable_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the paths of this machine."""
    table = bundle.without_paths(recipe.model_dump(exclude_none=True))
    return parse_recipe({**table, "encoder": _portable_table(table["encoder"])}, f"recipe {recipe.name}")


def _portable_table(table: dict[str, Any]) -> dict[str, Any]:
    """An encoder table that names its weights file, if it has one, without the folder."""
    return {**table, "weights": bundle.last_part(table["weights"])} if "weights" in table else table


def _portable_info(info: dict[str, Any], *, inside: bool) -> dict[str, Any]:
    """`run.json` without the paths of this machine; the encoder's weights are a bare name, or the file `inside` the bundle."""
    plain: dict[str, Any] = bundle.without_paths(info)
    encoders = {}
    for name, entry in plain["encoders"].items():
        table = _portable_table(entry["table"])
        encoders[name] = {**entry, "table": {**table, "weights": bundle.ENCODER_FILE} if inside else table}
    return {**plain, "cache": bundle.last_part(info["cache"]), "encoders": encoders}
