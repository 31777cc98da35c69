"""What a sweep compares: a TOML file of variants, or a grid over keys of a recipe, resolved before anything is trained.

recipe = "kitti"            # absent: the recipe of the cache's dataset
seeds = [0, 1, 2]
set = { "train.epochs" = 50 }               # for all variants
[variants.baseline]                         # the first is the reference
[variants.no-cls]
head.cls = false
[variants.linear-probe]                     # another method: head, encoders and training of that recipe, on the same data
recipe = "prior-art/linear"
[grid]                                      # every combination is one variant more
"head.dropout" = [0.0, 0.1]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pcd.cache import Cache
from pcd.errors import RecipeError, UsageError, suggest
from pcd.evaluation.metrics import METRICS
from pcd.heads import head_options
from pcd.recipe import Recipe, Section, parse_table
from pcd.recipe_files import find_recipe
from pcd.reports.published import known_in_print
from pcd.stages.recipes import training_recipe
from pcd.stages.sweep_files import find_sweep, flat, known_sweeps, pairs, read_sweep, toml_text

SEEDS = (0, 1, 2)
_FIXED = ("name", "description", "extends", "dataset", "views", "encoder", "evaluate")
_FIXED_KEYS = {"train.seed": "the seeds are those of the sweep (--seeds)", "train.residency": "columns are read once for all"}
_NAME = re.compile(r"\w[\w.,=+-]*")

Seeds = Annotated[tuple[int, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Values = Mapping[str, Mapping[str, float]]
"""Printed numbers: family of datasets, metric, value."""


class Printed(Section):
    """`[paper]`: where the numbers come from that the variants carry, and what makes them differ from ours."""

    source: str
    protocol: str = ""
    """The protocol of ours that comes nearest."""
    metres_per_unit: dict[str, float] = Field(default_factory=dict)
    """What a printed length of a family is multiplied by to be metres; absent: 1."""
    notes: dict[str, str] = Field(default_factory=dict)
    """What differs, by family."""


class _VariantTable(BaseModel):
    """`[variants.NAME]`: overrides, the method they start from if another than the sweep's, and printed numbers.

    Those are its own row of the sweep's `[paper]`, or the row of this `published` name in `pcd/reports/published.toml`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    recipe: str | None = None
    published: str | None = None
    paper: dict[str, dict[str, float]] = Field(default_factory=dict)


class _SweepFile(Section):
    """A sweep file."""

    description: str = ""
    recipe: str | None = None
    seeds: Seeds = SEEDS
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    paper: Printed | None = None


class _Seeds(Section):
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """One recipe of a sweep: its name, what it changes as `key=value`, the resolved recipe, and numbers in print."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe
    paper: Values
    method: str | None = None
    """The recipe of the method, if another than the sweep's."""
    published: str | None = None

    def seeded(self, seed: int) -> Recipe:
        """The recipe with this seed."""
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update={"seed": seed})})


@dataclass(frozen=True)
class SweepPlan:
    """Everything a sweep does: every variant with every seed. The first variant is the reference."""

    name: str
    description: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    paper: Printed | None = None


def plan_sweep(
    cache: Cache,
    name: str | None = None,
    *,
    recipe: str | None = None,
    vary: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> SweepPlan:
    """The sweep called `name` (a file, a name in `pipelines/ablations` or `comparisons`, or a recipe to `vary`) on a cache.

    `vary` holds `key=value,value`: every combination is a variant. `recipe`, `seeds` replace those of the file; `overrides`
    (`key=value`) hold for all variants, unless a variant says otherwise. Raises `RecipeError` naming file, variant and key.
    """
    read = _read(name, recipe, vary, overrides)
    chosen = parse_table(
        _Seeds, {"seeds": tuple(read.file.seeds if seeds is None else seeds)}, "--seeds" if seeds else read.where
    ).seeds
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"{read.where}: a seed is named twice: {', '.join(map(str, chosen))}.")
    common = read.common if cache.manifest.plan.flips else ["evaluate.tta=false", *read.common]
    variants = tuple(_variant(cache, read.base, common, part, f"{read.where}: variants.{part.name}") for part in read.parts)
    stem = read.stem or read.base or cache.manifest.dataset["name"]
    return SweepPlan(stem, read.file.description, chosen, variants, read.file.paper)


def methods_of_sweep(name: str) -> tuple[str | None, list[str], list[tuple[str | None, tuple[str, ...]]]]:
    """What an extraction for a sweep file must know: its recipe, the overrides of all variants, and of each variant the recipe
    of its method (if another) and its own overrides.

    Raises `RecipeError` for what is no sweep file.
    """
    read = _read(name, None, (), ())
    return read.base, read.common, [(part.method, part.changes) for part in read.parts]


@dataclass(frozen=True)
class _Read:
    """A sweep whose variants are not resolved yet. `stem` is that of its file, if it has one."""

    file: _SweepFile
    base: str | None
    common: list[str]
    parts: list[_Part]
    where: str
    stem: str | None


def _read(name: str | None, recipe: str | None, vary: Sequence[str], overrides: Sequence[str]) -> _Read:
    path = find_sweep(name) if name else None
    if path is None:
        if not vary:
            raise UsageError(_nothing(name))
        file, recipe, where = _SweepFile(), recipe or name, f"sweep of recipe {name or 'of the dataset'}"
    else:
        file, where = parse_table(_SweepFile, read_sweep(path), str(path)), str(path)
    common = [*flat(file.set, f"{where}: set"), *overrides]
    _refuse([key for key in map(_key, common) if key == "train.seed"], f"{where}: --set")
    grid = {key: _values(value, f"{where}: grid.{key}") for key, value in pairs(file.grid)} | dict(map(_vary, vary))
    parts = [_named(variant, table, where) for variant, table in file.variants.items()]
    parts += [_Part(label, changes) for label, changes in _combinations(grid, where)]
    if not parts:
        raise RecipeError(f"{where}: no variants; a sweep needs [variants.NAME] tables or a [grid].")
    if len({part.name for part in parts}) < len(parts):
        raise RecipeError(f"{where}: two variants have one name: {', '.join(part.name for part in parts)}.")
    return _Read(file, recipe or file.recipe, common, parts, where, path.stem if path else None)


def _nothing(name: str | None) -> str:
    if name is None:
        return f"nothing to compare: give a sweep (known: {', '.join(known_sweeps())}) or --vary KEY=VALUE,VALUE."
    return (
        f"{find_recipe(name)} is a recipe, which alone is nothing to compare: give --vary KEY=VALUE,VALUE, "
        "or a file with [variants.NAME] tables."
    )


@dataclass(frozen=True)
class _Part:
    """A variant that is not resolved yet; see `Variant`."""

    name: str
    changes: tuple[str, ...]
    paper: Values = field(default_factory=dict)
    method: str | None = None
    published: str | None = None


def _named(name: str, table: Mapping[str, Any], where: str) -> _Part:
    """What a `[variants.NAME]` table says."""
    place = f"{where}: variants.{name}"
    if not _NAME.fullmatch(name):
        raise RecipeError(f"{place}: a variant is a folder; use letters, digits and . , = + - _ in its name.")
    found = parse_table(_VariantTable, table, place)
    for family, values in found.paper.items():
        if unknown := [metric for metric in values if metric not in METRICS]:
            raise RecipeError(f"{place}: paper.{family}: unknown metric {unknown[0]!r}.{suggest(unknown[0], METRICS)}")
    if found.published is not None and found.published not in (known := known_in_print()):
        raise RecipeError(f"{place}: published: unknown row {found.published!r}.{suggest(found.published, known)}")
    changes = tuple(flat(found.model_extra or {}, place))
    _refuse(map(_key, changes), place)
    return _Part(name, changes, found.paper, found.recipe, found.published)


def _combinations(grid: Mapping[str, list[str]], where: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Name and overrides of every combination, the last key turning fastest."""
    _refuse(grid, f"{where}: grid")
    if empty := [key for key, values in grid.items() if not values]:
        raise RecipeError(f"{where}: grid: {empty[0]} has no values.")
    if not grid:
        return
    tails = [key.rpartition(".")[2] for key in grid]
    short = [tail if tails.count(tail) == 1 else key for key, tail in zip(grid, tails, strict=True)]
    for values in itertools.product(*grid.values()):
        label = ",".join(f"{key}={value}" for key, value in zip(short, values, strict=True))
        name = re.sub(r"[^\w.,=+-]+", "_", label.replace('"', "")).strip("_")
        yield name, tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))


def _refuse(keys: Iterable[str], where: str) -> None:
    """Raise `RecipeError` for keys that all variants of one cache share."""
    for key in keys:
        if key in _FIXED_KEYS:
            raise RecipeError(f"{where}: {key} cannot be set here: {_FIXED_KEYS[key]}.")
        if key.split(".")[0] in _FIXED and key != "views.depth_resize":
            raise RecipeError(
                f"{where}: {key} cannot vary: all variants read one cache and are scored alike. A variant may change head.*, "
                "targets.*, train.* and views.depth_resize; --set changes a key for all."
            )


def _variant(cache: Cache, recipe: str | None, common: Sequence[str], part: _Part, where: str) -> Variant:
    own = (f"recipe={part.method}",) if part.method else ()
    try:
        resolved = training_recipe(cache, recipe, [*common, *part.changes], part.method)
        head_options(resolved.head, "head")
    except UsageError as error:
        raise RecipeError(f"{where}: {error}") from None
    return Variant(part.name, (*own, *part.changes), resolved, part.paper, part.method, part.published)


def _vary(text: str) -> tuple[str, list[str]]:
    """Key and values of a `--vary KEY=VALUE,VALUE`; commas inside brackets and quotes separate nothing."""
    key, equals, values = text.partition("=")
    parts = [""]
    for token in re.findall(r"""\[[^\]]*\]|"[^"]*"|'[^']*'|.""", values):
        parts = [*parts, ""] if token == "," else [*parts[:-1], parts[-1] + token]
    if not equals or not key.strip() or not all(part.strip() for part in parts):
        raise UsageError(f"--vary {text}: expected KEY=VALUE,VALUE, for example --vary head.dropout=0,0.1,0.2")
    return key.strip(), [part.strip() for part in parts]


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _values(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise RecipeError(f"{where} = {value!r}: expected a list of values.")
    return [toml_text(item, where) for item in value]
