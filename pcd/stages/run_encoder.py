"""The encoder that a run was trained on, and no other."""

from __future__ import annotations

from typing import Any, Protocol, cast

from pcd.encoders import create_encoder, with_columns
from pcd.encoders.base import Encoder, Exportable
from pcd.errors import FingerprintError, RunError, UsageError
from pcd.fingerprint import differences
from pcd.stages.runs import Run


class ExportableEncoder(Encoder, Exportable, Protocol):
    """An encoder that can be exported."""


def load_encoder(run: Run, weights: str | None = None, device: str = "cpu") -> Encoder:
    """The encoder of the run; `weights` says where its weights are now, if not where they were.

    Half precision on another device is the same network, anything else is not: raises `FingerprintError` for other weights,
    `WeightsError` for none, and `RunError` for a run on several encoders.
    """
    if len(run.info["encoders"]) != 1:
        raise RunError(f"{run.root} was trained on {len(run.info['encoders'])} encoders; only one can be run on images.")
    encoder = encoder_from(run, weights, device)
    if lines := other_than_trained(run, encoder.fingerprint(), ()):
        shown = "\n".join(f"  {line}" for line in lines)
        raise FingerprintError(f"{run.root} was trained on tokens of another encoder:\n{shown}\nGive --weights PATH.")
    if missing := set(run.info["columns"]) - {spec.name for spec in encoder.columns}:
        raise RunError(f"{run.root} reads {', '.join(sorted(missing))}, which {_table(run)['name']} does not make of an image.")
    return encoder


def load_exportable(run: Run, weights: str | None = None) -> ExportableEncoder:
    """The same on the CPU, ready to be exported. Raises `UsageError` for an encoder that cannot be."""
    encoder = load_encoder(run, weights)
    if not isinstance(encoder, Exportable):
        raise UsageError(
            f"encoder {_table(run)['name']!r} cannot be exported: {type(encoder).__name__} has no network() and no "
            "image_weights() (pcd.encoders.base.Exportable). A bundle without --with-encoder needs neither."
        )
    return cast(ExportableEncoder, encoder)


def encoder_from(run: Run, weights: str | None, device: str = "cpu") -> Encoder:
    """The encoder of the run with these weights, whatever they are, making the columns it was trained on.

    None for where the weights were.
    """
    options = {key: value for key, value in _table(run).items() if key != "name"}
    if weights is not None:
        options["weights"] = weights
    encoder = create_encoder(_table(run)["name"], options, run.plan.view_size, device, "encoder")
    return with_columns(encoder, run.info["columns"])


def other_than_trained(run: Run, found: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """The fields in which an encoder is another than the run's, precision and those `free` aside."""
    blank = dict.fromkeys(("precision", *free))
    trained = [column["encoder"] for column in run.info["columns"].values() if "encoder" in column]
    return list(dict.fromkeys(line for own in trained for line in differences({**found, **blank}, {**own, **blank})))


def _table(run: Run) -> dict[str, Any]:
    table: dict[str, Any] = next(iter(run.info["encoders"].values()))["table"]
    return table
