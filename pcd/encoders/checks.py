"""What encoders refuse: views that do not fit, and columns that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pcd.errors import UsageError, WeightsError

if TYPE_CHECKING:
    import torch


def check_views(views: torch.Tensor, view_size: tuple[int, int]) -> None:
    """Raise `UsageError` unless `views` are float32 `(B, 3, h, w)` of `view_size` (height, width)."""
    import torch

    if views.ndim != 4 or views.shape[1:] != (3, *view_size) or views.dtype != torch.float32:
        raise UsageError(
            f"views are {views.dtype} {tuple(views.shape)}; expected torch.float32 (B, 3, {view_size[0]}, {view_size[1]}), "
            "RGB in [0, 1]."
        )


def check_divides(what: str, cell: tuple[int, int], view_size: tuple[int, int], called: str = "cells") -> tuple[int, int]:
    """The grid (rows, columns) of cells of `cell` (height, width) pixels in a view; `called` is what such a cell is.

    Raises `UsageError`, naming `what` has them, if they do not cover it exactly: convolutions drop the rest in silence.
    """
    for side, length, pixels in zip(("height", "width"), view_size, cell, strict=True):
        if length % pixels or length < pixels:
            below, above = length // pixels * pixels, (length // pixels + 1) * pixels
            near = f"{below} or {above}" if below else f"{above}"
            raise UsageError(
                f"views of {view_size[0]}x{view_size[1]} pixels: {what} has {called} of {pixels} pixels, which do not divide "
                f"the {side} {length}; the nearest that fits is {near} (views.canvas, views.grid)."
            )
    return view_size[0] // cell[0], view_size[1] // cell[1]


def encoded(
    network: Callable[[torch.Tensor], dict[str, torch.Tensor]], views: torch.Tensor, view_size: tuple[int, int], device: str
) -> dict[str, torch.Tensor]:
    """What a network on `device` makes of views, both checked."""
    import torch

    check_views(views, view_size)
    with torch.no_grad():
        columns = network(views.to(device, non_blocking=True))
    check_finite(columns)
    return columns


def check_finite(columns: dict[str, torch.Tensor]) -> None:
    """Raise `WeightsError` for values that are no numbers: those beyond 65504 have become infinite on the way to float16."""
    bad = {name: int((~values.isfinite()).sum()) for name, values in columns.items()}
    if any(bad.values()):
        found = ", ".join(f"{count} of {columns[name].numel()} in {name}" for name, count in bad.items() if count)
        raise WeightsError(
            f"token values that are not finite or do not fit float16 (up to 65504): {found}. Nothing was stored. Either the "
            'weights are damaged, or fp16 is too narrow for this network: set encoder.precision to "bf16" or "fp32".'
        )
