"""What a sweep needs of a cache that is still to be made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pcd.recipe import Recipe
from pcd.stages.recipes import extraction_recipe


def extraction_recipes(
    sweep: str | None, dataset: str, name: str | None, overrides: Sequence[str], **options: Any
) -> list[Recipe]:
    """The recipe of an extraction, see `extraction_recipe`, or those of all variants of a sweep file, the first one first.

    All are of one dataset under one view plan, that of the sweep's own recipe. Raises `RecipeError` for what is no sweep file.
    """
    if sweep is None:
        return [extraction_recipe(dataset, name, overrides, **options)]
    from pcd.stages.sweep_plan import methods_of_sweep  # imports torch

    base, common, variants = methods_of_sweep(sweep)
    return [
        extraction_recipe(dataset, name or base, [*common, *changes, *overrides], method=method, **options)
        for method, changes in variants
    ]
