"""Columns on their way into a head, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads.tokens import as_map, has_grid, joined, joined_width, on_grid, require_grid, require_vector, resized
from tests.baseline_support import GRID, SHAPES, B, D, P, make_batch


def slow_weights(size: int, wanted: int, spread: bool) -> np.ndarray:
    """`(wanted, size)`: triangles around the centres of the new cells, one old cell wide to each side, or one new cell."""
    step = size / wanted
    reach = max(step, 1.0) if spread else 1.0
    rows = []
    for number in range(wanted):
        centre = (number + 0.5) * step
        row = [max(0.0, 1 - abs(cell + 0.5 - centre) / reach) for cell in range(size)]
        rows.append(np.array(row) / sum(row))
    return np.stack(rows)


@pytest.mark.parametrize("grid", [(4, 6), (6, 8), (3, 3), (2, 9), (9, 2), (1, 1), (13, 5)])
def test_resizing(grid: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    down, across = slow_weights(4, grid[0], True), slow_weights(6, grid[1], True)
    expected = np.einsum("yh,bchw,xw->bcyx", down, maps.double().numpy(), across)
    found = resized(maps, grid)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found is maps) == (grid == (4, 6))
    assert resized(maps.bfloat16(), (8, 8)).dtype == torch.float32


def test_tokens_are_maps_in_reading_order() -> None:
    tokens = torch.arange(B * P * 2).reshape(B, P, 2).half()
    maps = as_map(tokens, GRID)
    assert maps.dtype == torch.float32
    for i in range(P):
        assert torch.equal(maps[:, :, i // GRID[1], i % GRID[1]], tokens[:, i].float())
    stored = tokens.reshape(B, *GRID, 2)
    assert torch.equal(as_map(stored, (7, 7)), maps)
    assert torch.equal(on_grid(stored, GRID), tokens)
    assert on_grid(stored, (4, 6)).shape == (B, 24, 2)


def test_joined() -> None:
    shapes = {**SHAPES, "rn/layer": (4, 6, 3)}
    batch, names, vectors = make_batch(shapes), ["clip/patch@2", "rn/layer", "clip/patch"], ["clip/cls"]
    whole = joined(batch.columns, names, GRID, vectors)
    assert whole.dtype == torch.float32
    assert whole.shape == (B, P, joined_width(names, shapes, GRID, vectors)) == (B, P, 4 + 3 + D + 5)
    layer = resized(batch.columns["rn/layer"].permute(0, 3, 1, 2), GRID)
    for b in range(B):
        for i in range(P):
            parts = [batch.columns[name][b, i].float() for name in ("clip/patch@2", "clip/patch")]
            own = torch.cat([parts[0], layer[b, :, i // GRID[1], i % GRID[1]], parts[1], batch.columns["clip/cls"][b]])
            assert torch.equal(whole[b, i], own)
    target = batch.targets["depth"]
    some = joined(batch.columns, names, GRID, vectors, target.flat, target.view)
    assert torch.equal(some, whole[target.valid])
    alone = joined(batch.columns, ["clip/patch"], GRID)
    assert torch.equal(alone, batch.columns["clip/patch"].float())


def test_what_does_not_lie_on_the_grid_is_named() -> None:
    assert [has_grid(shape) for shape in ((5,), (P, 5), (2, 3, 5))] == [False, True, True]
    assert require_grid("rn/layer", (40, 60, 7), GRID) == 7
    assert require_vector("clip/cls", (5,)) == 5
    with pytest.raises(RecipeError, match="12 tokens do not lie on the head's grid of 2x3"):
        require_grid("other/patch", (12, 7), GRID)
    with pytest.raises(RecipeError, match=r"clip/cls is \(5,\), one vector a view"):
        joined_width(["clip/cls"], SHAPES, GRID)
    with pytest.raises(RecipeError, match=r"clip/patch is \(6, 6\); expected one vector a view"):
        joined_width(["clip/patch"], SHAPES, GRID, ["clip/patch"])
