"""Recipes: TOML files that say what a run is made of, validated when they are read.

A recipe is a table per stage. Tables that belong to a dataset, an encoder or a head are open here and validated by the
class that owns them (`parse_table`), so that a third party's options are checked just as ours. `extends = "name"` starts
from another recipe. Every error names the file (or `--set`) and the key, and suggests the nearest known name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from pcd.errors import RecipeError, suggest


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


class OneCycle(Section):
    """`[train.onecycle]`: the shape of `decay = "onecycle"`, with the names and the meaning of torch's OneCycleLR."""

    pct_start: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps in which the rates rise."""
    div_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 25.0
    """They start at the head's rates divided by this."""
    final_div_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0
    """They end at where they started divided by this."""


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
    samples_per_scene: Annotated[int, Field(gt=0)] | None = None
    """At most so many samples of each scene, spread evenly over it, for training with few; absent: all. A scene is what the
    keys of its samples have before the last `/`."""
    patience: Annotated[int, Field(gt=0)] = 50
    decay_start: Annotated[int, Field(ge=0)] = 20
    decay_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    decay: Literal["plateau", "cosine", "step", "onecycle"] = "plateau"
    """How the learning rates change. `plateau`: they fall to `decay_floor` while nothing improves, from `decay_start` to
    `patience`. The others do not look at validation: `cosine` falls to `decay_floor` over `decay_epochs`, `step` by
    `decay_factor` after every `decay_step` epochs; `onecycle` changes with every step, up and then down, see `OneCycle`, over
    `decay_epochs`. Momentum stays as it is."""
    decay_epochs: Annotated[int, Field(gt=0)] | None = None
    """Epochs of `cosine` and `onecycle`; absent: all `epochs`. A run that goes on for more of them stays where they end."""
    decay_step: Annotated[int, Field(gt=0)] | None = None
    decay_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of `step`; absent: 0.1."""
    onecycle: OneCycle | None = None
    """Of `onecycle`; absent: its defaults."""
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
    def _decay_is_complete(self) -> Self:
        """Refuse keys of another decay, and write down how long this one is: continued with other `epochs`, a run must not
        follow another curve."""
        for key, kinds in _OF_DECAY.items():
            if getattr(self, key) is not None and self.decay not in kinds:
                shown = " or ".join(f'"{kind}"' for kind in kinds)
                raise PydanticCustomError(key, f"{key} belongs to decay = {shown}")
        if self.decay == "step" and self.decay_step is None:
            raise PydanticCustomError("decay_step", 'decay = "step" needs decay_step, the epochs from one fall to the next')
        absent = {"decay_epochs": self.epochs, "decay_factor": 0.1, "onecycle": OneCycle()}
        for key, value in absent.items():
            if self.decay in _OF_DECAY[key] and getattr(self, key) is None:
                object.__setattr__(self, key, value)  # the section is frozen for everybody else
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without the keys that are not used and that earlier versions did not know: a run's digest stays."""
        return {key: value for key, value in handler(self).items() if value is not None or key not in _LATER}


_OF_DECAY: dict[str, tuple[str, ...]] = {
    "decay_epochs": ("cosine", "onecycle"),
    "decay_step": ("step",),
    "decay_factor": ("step",),
    "onecycle": ("onecycle",),
}
"""Keys of `[train]` that belong to some values of `decay` alone."""
_LATER = {"decay_step", "decay_factor", "onecycle", "samples_per_scene"}


class EvaluateSection(Section):
    """`[evaluate]`: how runs of this recipe are scored unless the command says otherwise."""

    protocols: Names = ("pureclip", "eigen")
    tta: bool = True
    upsample: Literal["nearest", "bilinear", "bilinear-align-corners"] | None = None
    """How patches become pixels; absent: as each protocol says."""


class Recipe(Section):
    """A whole recipe. `dataset`, `encoder` and `head` hold `name` and the options of the class of that name.

    `encoders` holds further tables like `encoder`, under names of the author's choice, for a head that reads several networks.
    """

    name: str
    description: str = ""
    dataset: dict[str, Any]
    views: ViewsSection = ViewsSection()
    encoder: dict[str, Any]
    encoders: dict[str, dict[str, Any]] = {}
    head: dict[str, Any]
    targets: TargetsSection = TargetsSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()

    def options(self, table: Literal["dataset", "encoder", "head"]) -> dict[str, Any]:
        """The options of a named table, without its `name`."""
        return {key: value for key, value in getattr(self, table).items() if key != "name"}

    def one_by_one(self) -> list[Self]:
        """The recipe once for each of its encoders, `encoder` first; the last of them knows no others."""
        tables = [self.encoder, *self.encoders.values()]
        left = list(self.encoders.items())
        return [self.model_copy(update={"encoder": table, "encoders": dict(left[at:])}) for at, table in enumerate(tables)]

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
    current: type[BaseModel] | None = model
    for part in path:
        field = current.model_fields.get(part) if current is not None else None
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))  # a table, or one that may be absent
        current = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [] if current is None else list(current.model_fields)


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe that is already a nested dictionary."""
    recipe = parse_table(Recipe, table, where)
    for part in ("dataset", "encoder", "head"):
        if not isinstance(getattr(recipe, part).get("name"), str):
            raise RecipeError(f"{where}: key '{part}.name' is missing; it says which {part} is meant.")
    for label, further in recipe.encoders.items():
        if not isinstance(further.get("name"), str):
            raise RecipeError(f"{where}: key 'encoders.{label}.name' is missing; it says which encoder is meant.")
    return recipe
