"""Recipes: TOML files that say what a run is made of, validated when they are read.

A recipe is a table per stage. Tables that belong to a dataset, an encoder or a head are open here and validated by the
class that owns them (`parse_table`), so that a third party's options are checked just as ours. `extends = "name"` starts
from another recipe. Every error names the file (or `--set`) and the key, and suggests the nearest known name.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pcd.errors import RecipeError, suggest

RECIPE_FOLDER = Path("pipelines")
_PACKAGE = Path(__file__).parent
INSTALLED = _PACKAGE / "pipelines" if (_PACKAGE / "pipelines").is_dir() else _PACKAGE.parent / "pipelines"
"""The recipes that come with pcd: inside an installed package, beside it in a checkout."""


class Section(BaseModel):
    """A table of a recipe: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=BaseModel)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[tuple[int, int], BeforeValidator(_as_tuple)]
Box = Annotated[tuple[int, int, int, int], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Positive = Annotated[float, Field(gt=0)]


class ViewsSection(Section):
    """`[views]`: overrides of the dataset's own view plan (what is absent stays), and how depth is resized."""

    canvas: Size | None = None
    grid: Size | None = None
    crop: Box | Literal["none"] | None = None
    flips: bool | None = None
    depth_resize: Literal["masked-bilinear", "nearest"] = "masked-bilinear"
    """How ground truth comes to the canvas. Tokens do not depend on it: one cache may hold both."""


class Supervision(Section):
    """Which pixels and patches a loss looks at (paper: equation 2 and section 3.1).

    A pixel counts if it has depth, `min_depth <= D <= max_depth` (`<` on both sides with `open_range`) and lies in `mask`.
    A patch counts if at least `min_present` of its pixels have depth at all, at least `min_in_mask` of them lie in `mask`
    (strictly more than that share with `patch_mask_open`), one pixel counts, and its mean is at least `min_mean` metres.
    """

    min_depth: Annotated[float, Field(ge=0)] | None = None
    """Metres; absent: the head's smallest depth."""
    max_depth: Positive | None = None
    """Metres, `inf` for no limit; absent: the head's largest depth."""
    open_range: bool = False
    mask: Literal["none", "garg"] = "none"
    mask_pixels: bool = True
    """Whether pixels outside the mask are left out, or only whole patches are."""
    min_present: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_in_mask: Annotated[float, Field(ge=0, le=1)] = 0.5
    patch_mask_open: bool = False
    min_mean: Annotated[float, Field(ge=0)] = 0.0


class TargetsSection(Section):
    """`[targets]`: the supervision of the embedding losses and of the pixel-wise depth loss."""

    embedding: Supervision = Supervision()
    depth: Supervision = Supervision()


class TrainSection(Section):
    """`[train]`: the loop around a head; what is optimised and at which rates belongs to the head.

    The keys from `decay` to `joint` steady the training; their defaults are the published procedure.
    """

    epochs: Annotated[int, Field(gt=0)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 8
    drop_last: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    tiles: Literal["all", "random"] = "all"
    """Every tile of an image each epoch, or one drawn at random per image and epoch."""
    flips: bool = False
    """Train on mirrored views as well."""
    patience: Annotated[int, Field(gt=0)] = 50
    decay_start: Annotated[int, Field(ge=0)] = 20
    decay_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    decay: Literal["plateau", "cosine"] = "plateau"
    """When the learning rates fall to `decay_floor`: while nothing improves, from `decay_start` to `patience`; or over
    `decay_epochs`, whatever validation says."""
    decay_epochs: Annotated[int, Field(gt=0)] | None = None
    """Epochs of the cosine; absent: all `epochs`. A run that goes on for more of them stays at `decay_floor`."""
    switch_warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises to its value after every switch of phase, and at the very start. 0: none."""
    grad_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient over all parameters of the phase. 0: no limit."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the average of the weights that is validated and kept in their place. 0: the weights themselves."""
    joint: bool = False
    """Every step on the losses of all phases, with one optimiser, instead of phases that take turns."""
    monitor: Names = ("delta1", "delta2", "delta3", "abs_diff", "abs_rel", "log10", "rmse")
    protocol: str = "pureclip"
    """Validation protocol, scored each epoch from the cached canvas depth."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products in training and validation; weights and everything else are float32. tf32 needs a CUDA GPU."""
    residency: Literal["auto", "device", "host", "stream"] = "auto"
    """Where columns are held: on the device, in host memory, or nowhere (each batch is read from the cache). Results agree."""

    @model_validator(mode="after")
    def _cosine_has_epochs(self) -> Self:
        """Write down how long the cosine is: continued with another `epochs`, a run must not follow another curve."""
        if self.decay == "plateau" and self.decay_epochs is not None:
            raise PydanticCustomError("decay_epochs", 'decay_epochs belongs to decay = "cosine"')
        if self.decay == "cosine" and self.decay_epochs is None:
            object.__setattr__(self, "decay_epochs", self.epochs)  # the section is frozen for everybody else
        return self


class EvaluateSection(Section):
    """`[evaluate]`: how runs of this recipe are scored unless the command says otherwise."""

    protocols: Names = ("pureclip", "eigen")
    tta: bool = True
    upsample: Literal["nearest", "bilinear", "bilinear-align-corners"] | None = None
    """How patches become pixels; absent: as each protocol says."""


class Recipe(Section):
    """A whole recipe. `dataset`, `encoder` and `head` hold `name` and the options of the class of that name."""

    name: str
    description: str = ""
    dataset: dict[str, Any]
    views: ViewsSection = ViewsSection()
    encoder: dict[str, Any]
    head: dict[str, Any]
    targets: TargetsSection = TargetsSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()

    def options(self, table: Literal["dataset", "encoder", "head"]) -> dict[str, Any]:
        """The options of a named table, without its `name`."""
        return {key: value for key, value in getattr(self, table).items() if key != "name"}

    def as_toml(self) -> str:
        """The resolved recipe as TOML (absent values left out)."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def parse_table(model: type[T], table: Mapping[str, Any], where: str) -> T:
    """Validate `table` as `model`. Raises `RecipeError` with one line per wrong key; `where` names the origin."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        lines = [_explain(model, dict(detail), where) for detail in error.errors()]
        raise RecipeError("\n".join(lines)) from None


def _explain(model: type[BaseModel], detail: dict[str, Any], where: str) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        return f"{where}: unknown key {key!r}.{suggest(path[-1], known)}"
    if detail["type"] == "missing":
        return f"{where}: key {key!r} is missing."
    return f"{where}: {key} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    current: Any = model
    for part in path:
        is_table = isinstance(current, type) and issubclass(current, BaseModel)
        field = current.model_fields.get(part) if is_table else None
        current = field.annotation if field is not None else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


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
    raise RecipeError(f"Unknown recipe {str(name)!r}.{suggest(str(name), known_recipes(folder))}")


def known_recipes(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of the recipes in `folder` and of those that came with pcd, sorted."""
    return sorted({file.stem for candidate in (folder, INSTALLED) for file in candidate.glob("*.toml")})


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe; `overrides` are `key=value` with a dotted key and a TOML value.

    Raises `RecipeError`. The dataset, encoder and head tables are checked by the stages that open them.
    """
    path = find_recipe(name)
    table = _read(path, seen=())
    table.setdefault("name", path.stem)
    given = list(overrides)
    for override in given:
        _override(table, override)
    return parse_recipe(table, f"{path}{''.join(f' --set {override}' for override in given)}")


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe that is already a nested dictionary."""
    recipe = parse_table(Recipe, table, where)
    for part in ("dataset", "encoder", "head"):
        if not isinstance(getattr(recipe, part).get("name"), str):
            raise RecipeError(f"{where}: key '{part}.name' is missing; it says which {part} is meant.")
    return recipe


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: 'extends' goes round in a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends = {base!r}: give the name of another recipe.")
    merged = _read(find_recipe(base, path.parent), (*seen, path))
    merged.pop("name", None)
    return merge(merged, table)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; tables are merged key by key, a table of another `name` replaces the old one."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = merge(old, value)
        else:
            result[key] = value
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
