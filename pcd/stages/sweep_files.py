"""Where sweep files lie and how they are read; imports nothing heavy."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pcd.errors import RecipeError, suggest
from pcd.recipe_files import INSTALLED, RECIPE_FOLDER, known_recipes

SWEEPS = ("ablations", "comparisons")
"""Folders of `pipelines` that hold sweeps: variants of one method, and methods."""


def find_sweep(name: str) -> Path | None:
    """The sweep file of that path or name; None if it is a recipe. Raises `RecipeError` for neither."""
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path if {"variants", "grid"} & read_sweep(path).keys() else None
    for folder in _folders():
        if (found := folder / f"{name}.toml").is_file():
            return found
    if name not in known_recipes():
        known = [*known_sweeps(), *known_recipes()]
        raise RecipeError(f"{name!r} is neither a sweep nor a recipe.{suggest(name, known)}")
    return None


def known_sweeps() -> list[str]:
    """Names of the sweeps in `pipelines` and of those that came with pcd, sorted."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.toml")})


def _folders() -> list[Path]:
    return [folder / kind for folder in (RECIPE_FOLDER, INSTALLED) for kind in SWEEPS]


def prompts_of_sweeps() -> list[tuple[str, ...]]:
    """The overrides of each variant that has a prompt of its own, in the sweeps that come with pcd."""
    found = []
    for path in filter(None, map(find_sweep, known_sweeps())):
        file = read_sweep(path)
        for table in file.get("variants", {}).values():
            if "prompt" in table.get("head", {}):
                changes = {key: value for key, value in table.items() if key != "paper"}
                found.append((*flat(file.get("set", {}), str(path)), *flat(changes, str(path))))
    return found


def read_sweep(path: Path) -> dict[str, Any]:
    """The tables of a sweep file. Raises `RecipeError` for what is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def pairs(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables under their dotted keys."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(table: Mapping[str, Any], where: str) -> list[str]:
    """Nested tables as `dotted.key=value`."""
    return [f"{key}={toml_text(value, f'{where}: {key}')}" for key, value in pairs(table)]


def toml_text(value: Any, where: str) -> str:
    """A TOML value as it is written, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(toml_text(item, where) for item in value)}]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    raise RecipeError(f"{where}: {value!r} is no value of a recipe.")
