"""What heads do with columns before their own work: patch tokens `(P, D)`, feature maps `(h, w, C)`, a vector a view `(D,)`.

Columns come in float16 or whatever type they are stored in and leave in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd.errors import RecipeError

Shape = tuple[int, ...]
Grid = tuple[int, int]


def has_grid(shape: Shape) -> bool:
    """Whether a column of this shape per row says something at every place of a view: tokens or a map."""
    return len(shape) in (2, 3)


def require_grid(name: str, shape: Shape, grid: Grid) -> int:
    """Channels of a column of patch tokens on `grid`, or of a map on any grid.

    Raises `RecipeError` for tokens of another grid, whose rows and columns nobody knows, and for a vector a view.
    """
    if not has_grid(shape):
        raise RecipeError(f"head: {name} is {shape}, one vector a view; expected tokens (P, D) or a map (h, w, C).")
    if len(shape) == 2 and shape[0] != grid[0] * grid[1]:
        raise RecipeError(
            f"head: {name} is {shape}: {shape[0]} tokens do not lie on the head's grid of {grid[0]}x{grid[1]}. "
            "Only maps (h, w, C) are brought from one grid to another."
        )
    return shape[-1]


def require_vector(name: str, shape: Shape) -> int:
    """Channels of a column that has one vector a view, such as a CLS token. Raises `RecipeError` for any other."""
    if len(shape) != 1:
        raise RecipeError(f"head: {name} is {shape}; expected one vector a view (D,), such as a CLS token.")
    return shape[0]


def joined_width(names: Sequence[str], shapes: Mapping[str, Shape], grid: Grid, vectors: Sequence[str] = ()) -> int:
    """Channels of `joined(columns, names, grid, vectors)`. Raises `RecipeError` for columns that cannot be joined."""
    wide = sum(require_grid(name, shapes[name], grid) for name in names)
    return wide + sum(require_vector(name, shapes[name]) for name in vectors)


def as_map(column: Tensor, grid: Grid) -> Tensor:
    """Tokens `(B, P, C)` of `grid`, or a map `(B, h, w, C)` of its own size, as float32 `(B, C, h, w)`."""
    if column.dim() == 3:
        column = column.reshape(-1, *grid, column.shape[-1])
    return column.permute(0, 3, 1, 2).float()


def resized(maps: Tensor, grid: Grid) -> Tensor:
    """Maps `(B, C, h, w)` on another grid in float32, bilinear by cell centres; where they shrink, every cell has a share."""
    own = (maps.shape[2], maps.shape[3])
    if own == grid:
        return maps
    shrinks = grid[0] < own[0] or grid[1] < own[1]
    return F.interpolate(maps.float(), size=grid, mode="bilinear", align_corners=False, antialias=shrinks)


def on_grid(column: Tensor, grid: Grid) -> Tensor:
    """Tokens of `grid`, or a map of any size, as `(B, P, C)` in their own type; float32 if they had to be resized."""
    if column.dim() == 3:
        return column
    if tuple(column.shape[1:3]) == grid:
        return column.flatten(1, 2)
    return resized(as_map(column, grid), grid).flatten(2).transpose(1, 2)


def joined(
    columns: Mapping[str, Tensor],
    names: Sequence[str],
    grid: Grid,
    vectors: Sequence[str] = (),
    flat: Tensor | None = None,
    view: Tensor | None = None,
) -> Tensor:
    """Several columns side by side, channels in the order named: float32 `(B, P, W)` on `grid`.

    Every patch has the `vectors` of its view behind its own channels. With `flat` `(M,)`, numbers in the flattened `(B * P)`
    axis, and the `view` `(M,)` of each (see `PatchTargets`), only those patches, `(M, W)`; tokens of others are not looked at.
    """
    parts = [on_grid(columns[name], grid) for name in names]
    beside = [columns[name] for name in vectors]
    if flat is None:
        beside = [vector[:, None].expand(-1, grid[0] * grid[1], -1) for vector in beside]
    else:
        parts = [part.flatten(0, 1)[flat] for part in parts]
        beside = [vector[view] for vector in beside]
    return torch.cat([part.float() for part in (*parts, *beside)], dim=-1)
