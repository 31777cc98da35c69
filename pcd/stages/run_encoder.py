"""The encoders that a run was trained on, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from pcd.cache.manifest import encoder_of
from pcd.encoders import create_encoder, with_columns
from pcd.encoders.base import NO_WEIGHTS, Encoder, Exportable
from pcd.errors import FingerprintError, RunError, UsageError
from pcd.fingerprint import differences
from pcd.heads import head_options
from pcd.stages.runs import Run


class ExportableEncoder(Encoder, Exportable, Protocol):
    """An encoder that can be exported."""


class RunEncoders:
    """All encoders of a run: views in, the columns that its head reads out.

    Half precision on another device is the same network, anything else is not: raises `FingerprintError` for other weights,
    `WeightsError` for none, `RunError` for a column that no encoder makes of an image, and `UsageError` for `weights`, which
    says where they are now, of a run on several encoders with weights.
    """

    def __init__(self, run: Run, weights: str | None = None, device: str = "cpu") -> None:
        cls, head = head_options(run.recipe.head)
        read = set(cls.reads(head))
        keys = [key for key in run.info["encoders"] if read & _columns(run, key).keys()]
        weighty = [key for key in keys if _kind_of_weights(run, key) != NO_WEIGHTS]
        if weights is not None and len(weighty) > 1:
            raise UsageError(
                f"--weights: {run.root} was trained on several encoders with weights ({', '.join(weighty)}); their files are "
                "looked for where the extraction found them."
            )
        self._encoders = [checked_encoder(run, key, weights if key in weighty else None, device) for key in keys]
        if missing := read - {spec.name for encoder in self._encoders for spec in encoder.columns}:
            names = ", ".join(_table(run, key)["name"] for key in run.info["encoders"])
            raise RunError(f"{run.root} reads {', '.join(sorted(missing))}, which {names} does not make of an image.")

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `pcd.encoders.base.Encoder.encode`."""
        return {name: values for encoder in self._encoders for name, values in encoder.encode(views).items()}


def checked_encoder(run: Run, key: str, weights: str | None, device: str = "cpu") -> Encoder:
    """One encoder of the run, by its key; raises `FingerprintError` unless it is the one that the run was trained on."""
    encoder = encoder_from(run, key, weights, device)
    if lines := other_than_trained(run, key, encoder.fingerprint(), ()):
        shown = "\n".join(f"  {line}" for line in lines)
        raise FingerprintError(f"{run.root} was trained on tokens of another encoder:\n{shown}\nGive --weights PATH.")
    return encoder


def load_exportable(run: Run, weights: str | None = None) -> ExportableEncoder:
    """The encoder of a run on one, on the CPU, ready to be exported. Raises `UsageError` for any that cannot be."""
    key = only_key(run)
    encoder = checked_encoder(run, key, weights)
    if not isinstance(encoder, Exportable):
        raise UsageError(
            f"encoder {_table(run, key)['name']!r} cannot be exported: {type(encoder).__name__} has no network() and no "
            "image_weights() (pcd.encoders.base.Exportable). A bundle without --with-encoder needs neither."
        )
    return cast(ExportableEncoder, encoder)


def only_key(run: Run) -> str:
    """The key of the run's encoder. Raises `UsageError` for a run on several."""
    keys: list[str] = list(run.info["encoders"])
    if len(keys) != 1:
        raise UsageError(
            f"{run.root} was trained on {len(keys)} encoders ({', '.join(keys)}); one network with its head is exported. "
            "A bundle without --with-encoder holds the head alone."
        )
    return keys[0]


def encoder_from(run: Run, key: str, weights: str | None, device: str = "cpu") -> Encoder:
    """An encoder of the run with these weights, whatever they are, making the columns it was trained on.

    None for where the weights were.
    """
    options = {name: value for name, value in _table(run, key).items() if name != "name"}
    if weights is not None:
        options["weights"] = weights
    encoder = create_encoder(_table(run, key)["name"], options, run.plan.view_size, device, "encoder")
    return with_columns(encoder, _columns(run, key))


def other_than_trained(run: Run, key: str, found: dict[str, Any], free: Sequence[str]) -> list[str]:
    """The fields in which an encoder is another than the run's of that key, precision and those `free` aside."""
    blank = dict.fromkeys(("precision", *free))
    trained = [fingerprint["encoder"] for fingerprint in _columns(run, key).values()]
    return list(dict.fromkeys(line for own in trained for line in differences({**found, **blank}, {**own, **blank})))


def _columns(run: Run, key: str) -> Mapping[str, Any]:
    """Name and fingerprint of the columns that the head reads from one encoder."""
    keys = run.info["encoders"]
    return {name: found for name, found in run.info["columns"].items() if encoder_of(name, found, keys) == key}


def _kind_of_weights(run: Run, key: str) -> str:
    return next((str(found["encoder"]["weights"]["kind"]) for found in _columns(run, key).values()), NO_WEIGHTS)


def _table(run: Run, key: str) -> dict[str, Any]:
    table: dict[str, Any] = run.info["encoders"][key]["table"]
    return table
