"""The encoder of a run as its exports need it: the network itself and its weights."""

from __future__ import annotations

from typing import Any, Protocol, cast

from pcd.encoders import create_encoder
from pcd.encoders.base import Encoder, Exportable
from pcd.errors import FingerprintError, RunError, UsageError
from pcd.fingerprint import differences
from pcd.stages.runs import Run


class ExportableEncoder(Encoder, Exportable, Protocol):
    """An encoder that can be exported."""


def load_encoder(run: Run, weights: str | None) -> ExportableEncoder:
    """The encoder of the run on the CPU. Raises `RunError`, `UsageError` or `FingerprintError` if it will not do."""
    if len(run.info["encoders"]) != 1:
        raise RunError(f"{run.root} was trained on {len(run.info['encoders'])} encoders; export knows how to join one.")
    table = next(iter(run.info["encoders"].values()))["table"]
    encoder = encoder_from(run, table.get("weights", "auto") if weights is None else weights)
    if not isinstance(encoder, Exportable):
        raise UsageError(
            f"encoder {table['name']!r} cannot be exported: {type(encoder).__name__} has no network() and image_weights() "
            "(pcd.encoders.base.Exportable). A bundle without --with-encoder needs neither."
        )
    lines = other_than_trained(run, encoder.fingerprint(), ())
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise FingerprintError(f"{run.root} was trained on tokens of another encoder:\n{shown}\nGive --weights PATH.")
    return cast(ExportableEncoder, encoder)


def encoder_from(run: Run, weights: str) -> Encoder:
    """The encoder of the run with these `weights`, on the CPU, whatever they are."""
    table = next(iter(run.info["encoders"].values()))["table"]
    options = {**{key: value for key, value in table.items() if key != "name"}, "weights": weights}
    return create_encoder(table["name"], options, run.plan.view_size, "cpu", "encoder")


def other_than_trained(run: Run, found: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """The fields in which an encoder is another than the run's, precision and those `free` aside."""
    blank = dict.fromkeys(("precision", *free))
    trained = [column["encoder"] for column in run.info["columns"].values() if "encoder" in column]
    return list(dict.fromkeys(line for own in trained for line in differences({**found, **blank}, {**own, **blank})))
