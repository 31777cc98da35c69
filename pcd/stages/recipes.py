"""Which recipe a command means, and what its options change in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pcd.cache import Cache
from pcd.errors import CacheError, RecipeError
from pcd.recipe import Recipe, parse_recipe
from pcd.recipe_files import known_recipes, load_recipe
from pcd.stages.needs import columns_of

FALLBACK = "folder"
"""The recipe of datasets that have none of their own name."""


def recipe_for(dataset: str, name: str | None = None, overrides: Iterable[str] = (), method: str | None = None) -> Recipe:
    """Recipe `name`, or the one of the dataset's name, or that of a folder of RGB-D frames under this dataset's name.

    `method` is that of `load_recipe`. Raises `RecipeError`; also if the recipe is for another dataset.
    """
    if name is None and dataset not in known_recipes():
        base = load_recipe(FALLBACK, overrides, method)
        options = {**base.dataset, "name": dataset} if base.dataset["name"] != dataset else base.dataset
        return base.model_copy(update={"dataset": options})
    recipe = load_recipe(name or dataset, overrides, method)
    if recipe.dataset["name"] != dataset:
        raise RecipeError(f"recipe {recipe.name} is for dataset {recipe.dataset['name']!r}, not {dataset!r}.")
    return recipe


def extraction_recipe(
    dataset: str,
    name: str | None,
    overrides: Iterable[str],
    *,
    root: Path | None = None,
    encoder: str | None = None,
    weights: str | None = None,
    limit: int | None = None,
    flips: bool = True,
    method: str | None = None,
) -> Recipe:
    """The recipe of an extraction with the command's options put in; `method` as for `load_recipe`."""
    chosen = {key: value for key, value in (("name", encoder), ("weights", weights)) if value is not None}
    early = [f"encoder.{key}={json.dumps(value)}" for key, value in chosen.items()] if method else []
    table: dict[str, Any] = recipe_for(dataset, name, [*overrides, *early], method).model_dump(exclude_none=True)
    table["dataset"] |= {key: value for key, value in (("root", root), ("limit", limit)) if value is not None}
    if "root" in table["dataset"]:
        table["dataset"]["root"] = str(table["dataset"]["root"])
    if not method:
        table["encoder"] |= chosen
    if not flips:
        table["views"]["flips"] = False
    return parse_recipe(table, "extract")


def training_recipe(cache: Cache, name: str | None, overrides: Iterable[str], method: str | None = None) -> Recipe:
    """The recipe of a training on `cache`, with the encoders that made the columns it reads (the only one, if it reads none).

    Raises `CacheError` for a cache without encoder columns.
    """
    dataset = cache.manifest.dataset["name"]
    recipe = load_recipe(name, overrides, method) if name else recipe_for(dataset, None, overrides, method)
    if not cache.manifest.encoders:
        raise CacheError(f"{cache.root} has no encoder columns yet; `pcd extract` fills it.")
    if recipe.dataset["name"] != dataset:
        recipe = recipe.model_copy(update={"dataset": {"name": dataset}})
    known = cache.manifest.encoders
    keys = [key for key in map(cache.manifest.encoder_of, columns_of(recipe)) if key in known] or list(known)
    first, *others = dict.fromkeys(keys)
    further = {key.replace(":", "-"): known[key]["table"] for key in others}
    return recipe.model_copy(update={"encoder": known[first]["table"], "encoders": further})
