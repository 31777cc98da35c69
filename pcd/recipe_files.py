"""Recipe files: found by name, read, merged with what they extend, and with the method and the overrides that are asked for."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pcd.errors import RecipeError, suggest
from pcd.recipe import Recipe, parse_recipe

RECIPE_FOLDER = Path("pipelines")
_PACKAGE = Path(__file__).parent
INSTALLED = _PACKAGE / "pipelines" if (_PACKAGE / "pipelines").is_dir() else _PACKAGE.parent / "pipelines"
"""The recipes that come with pcd: inside an installed package, beside it in a checkout."""


PRIOR_ART = "prior-art"
"""Folder beside the recipes with those of other methods."""
RANGE = ("min_depth", "max_depth")
"""Keys of a head that follow from the data."""
METHOD = ("encoder", "encoders", "head", "targets", "train")
"""Tables of a recipe that make up a method."""


def find_recipe(name: str | Path, folder: Path = RECIPE_FOLDER) -> Path:
    """The file of a recipe given by path or by name (`nyu` is `pipelines/nyu.toml`, else the installed one).

    Raises `RecipeError` with the nearest known name.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    for candidate in (folder, INSTALLED):
        if (found := candidate / f"{name}.toml").is_file():
            return found
    if path.suffix == ".toml":
        raise RecipeError(f"recipe {path} is not there; give a path, or the name of a file in {folder}/.")
    known = [*known_recipes(folder), *known_methods(folder)]
    raise RecipeError(f"Unknown recipe {str(name)!r}.{suggest(str(name), known)}")


def _own(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says itself, and those of `prior-art` that it extends: not the recipe of the data at the end of the chain."""
    table = _parse(path)
    base = _base(table, path, seen)
    return merge(_own(base, (*seen, path)), table) if base is not None and base.parent.name == PRIOR_ART else table


def _base(table: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> Path | None:
    """The file that the table of file `path` extends; takes that key out of it. `seen` led here."""
    name = table.pop("extends", None)
    if name is None:
        return None
    if not isinstance(name, str):
        raise RecipeError(f"{path}: extends = {name!r}: give the name of another recipe.")
    base = find_recipe(name, path.parent)
    if base in (chain := (*seen, path)):
        raise RecipeError(f"{base}: 'extends' goes round in a circle: {' -> '.join(map(str, (*chain, base)))}")
    return base


def known_methods(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of the recipes of other methods, `prior-art/NAME`, in `folder` and among those that came with pcd, sorted."""
    files = (file for candidate in (folder, INSTALLED) for file in (candidate / PRIOR_ART).glob("*.toml"))
    return sorted({f"{PRIOR_ART}/{file.stem}" for file in files})


def known_recipes(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of the recipes in `folder` and of those that came with pcd, sorted."""
    return sorted({file.stem for candidate in (folder, INSTALLED) for file in candidate.glob("*.toml")})


def load_recipe(name: str | Path, overrides: Iterable[str] = (), method: str | None = None) -> Recipe:
    """Read, merge and validate a recipe; `overrides` are `key=value` with a dotted key and a TOML value.

    `method` names another recipe whose head, encoders and training take the place of this one's; the data, their views, the
    depth range and how runs are scored stay. Overrides of `encoder` are then those of this recipe's: a method that brings its
    own keeps it. Raises `RecipeError`. The dataset, encoder and head tables are checked by the stages that open them.
    """
    path = find_recipe(name)
    table = _read(path, seen=())
    table.setdefault("name", path.stem)
    given = list(overrides)
    early = [override for override in given if method is not None and override.strip().startswith("encoder.")]
    for override in early:
        _override(table, override)
    if method is not None:
        table = _with_method(table, find_recipe(method))
    for override in given:
        if override not in early:
            _override(table, override)
    return parse_recipe(table, f"{path}{''.join(f' --set {override}' for override in given)}")


def _with_method(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The recipe with what the file in `path` says of its method."""
    own = _own(path, seen=())
    method = {key: own[key] for key in METHOD if key in own}
    method["head"] = {key: value for key, value in method.get("head", {}).items() if key not in RANGE}
    return merge({**table, "name": path.stem, "description": own.get("description", "")}, method)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    table = _parse(path)
    base = _base(table, path, seen)
    if base is None:
        return table
    merged = _read(base, (*seen, path))
    merged.pop("name", None)
    return merge(merged, table)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; tables are merged key by key.

    A table of another `name` replaces the old one, but for the depth range, which belongs to the data.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if not isinstance(old, Mapping) or not isinstance(value, Mapping):
            result[key] = value
        elif value.get("name", old.get("name")) == old.get("name"):
            result[key] = merge(old, value)
        else:
            result[key] = {**{name: old[name] for name in RANGE if name in old}, **value}
    return result


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set head.dropout=0.1")
    target = table
    for part in parts[:-1]:
        target[part] = dict(target[part]) if isinstance(target.get(part), Mapping) else {}
        target = target[part]
    target[parts[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value; anything that is none is taken as a bare string, so quotes can be left to the shell."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if not (isinstance(value, float) and math.isnan(value)) else text
