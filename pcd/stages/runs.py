"""A run: the directory in which a trained head lives, with everything needed to score it and to predict with it."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pcd
from pcd.cache import Cache, ColumnEntry
from pcd.errors import FingerprintError, RecipeError, RunError
from pcd.export import bundle
from pcd.files import read_json, write_json, write_text
from pcd.fingerprint import differences, digest
from pcd.heads import head_options
from pcd.heads.base import Head
from pcd.recipe import Recipe
from pcd.recipe_files import load_recipe
from pcd.remote import any_path
from pcd.training import checkpoints
from pcd.training.loop import epochs_left
from pcd.views import ViewPlan

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.toml"
RUNS = Path("runs")
FIELDS = {"columns", "dataset", "encoders", "frame", "grid", "labels", "shapes", "views"}
"""What no `run.json` can do without."""
FREE_KEYS = {"epochs", "residency"}
"""Keys of `[train]` that may differ when a run is continued: neither changes an epoch that was already trained."""


@dataclass(frozen=True)
class Run:
    """An opened run, or a bundle of one. `info` is what `run.json` holds; see `describe_run` and `pcd.export.bundle`."""

    root: Path
    recipe: Recipe
    info: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Where the weights lie."""
        return self.root / checkpoints.FOLDER

    @property
    def plan(self) -> ViewPlan:
        """The view plan the head was trained under."""
        return ViewPlan.from_json(self.info["views"])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the depths of a view: the head's output grid."""
        return self.info["grid"][0], self.info["grid"][1]

    @property
    def patches(self) -> tuple[int, int]:
        """(rows, columns) of what the head reads; another than `grid` for a head with a decoder."""
        rows, columns = self.info.get("patches", self.info["grid"])
        return rows, columns

    @property
    def labels(self) -> list[str]:
        """What must stand beside every number of this run, e.g. `random encoder weights`."""
        return list(self.info["labels"])

    @property
    def bundle(self) -> dict[str, Any] | None:
        """What a bundle says of itself; None for a run that was trained here."""
        found: dict[str, Any] | None = self.info.get(bundle.KEY)
        return found

    @property
    def name(self) -> str:
        """The name of the run's folder, where it was trained."""
        return str(self.bundle["run"]) if self.bundle else self.root.resolve().name

    @property
    def identity(self) -> str:
        """The same for two trainings of one recipe on the same columns, however long they went on."""
        return digest({"recipe": _fixed(self.recipe), "columns": self._trained_columns})

    @property
    def _trained_columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = self.info.get("trained_columns", self.info["columns"])
        return columns

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """Best validation value and its epoch per watched metric; of a bundle, the metrics that its epoch is best for."""
        if self.bundle:
            return dict(self.bundle["best"])
        state = checkpoints.read_state(self.checkpoints / checkpoints.LAST)
        best: dict[str, dict[str, Any]] = state["stopping"]["best"]
        return best

    @property
    def history(self) -> list[dict[str, Any]]:
        """What each epoch did. Raises `RunError` for a bundle, which does not know."""
        if self.bundle:
            raise RunError(f"{self.root} is an exported bundle, which holds no history of its training.")
        history: list[dict[str, Any]] = checkpoints.read_state(self.checkpoints / checkpoints.LAST)["history"]
        return history

    @property
    def is_finished(self) -> bool:
        """Whether its epochs or its patience have run out, or there is nothing to train: from the last checkpoint's header."""
        state = checkpoints.read_state(self.checkpoints / checkpoints.LAST)
        return epochs_left(self.recipe.train, state) == 0

    def new_head(self) -> Head:
        """The head of the recipe with fresh weights, drawn from the recipe's seed."""
        cls, options = head_options(self.recipe.head, f"{self.root / RECIPE_FILE}: head")
        shapes = {name: tuple(shape) for name, shape in self.info["shapes"].items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.train.seed)
            return cls(options, shapes, self.patches)

    def checkpoint_file(self, which: str) -> tuple[Path, int]:
        """The file of checkpoint `last` or of the best epoch of a metric, and the epoch.

        Raises `RunError` for a metric that was not watched, a run without a finished epoch, or another epoch than a bundle's.
        """
        if self.bundle:
            names = {self.bundle["checkpoint"], *self.bundle["best"]}
            if which not in names:
                raise RunError(
                    f"{self.root} is a bundle of epoch {self.bundle['epoch']} alone, which is not that of checkpoint "
                    f"{which!r}; give --checkpoint {self.bundle['checkpoint']}."
                )
            return self.root / bundle.MODEL_FILE, int(self.bundle["epoch"])
        state = checkpoints.read_state(self.checkpoints / checkpoints.LAST)
        if which == "last":
            return self.checkpoints / checkpoints.LAST, state["epoch"]
        best = state["stopping"]["best"]
        if which not in best:
            raise RunError(f"{self.root}: no best epoch for {which!r}; choose last or one of {', '.join(sorted(best))}.")
        return checkpoints.epoch_file(self.checkpoints, best[which]["epoch"]), best[which]["epoch"]

    def load_head(self, which: str, device: torch.device) -> tuple[Head, int]:
        """The trained head in evaluation mode, and the epoch its weights are of."""
        path, epoch = self.checkpoint_file(which)
        head = self.new_head()
        if self.bundle:
            tensors = {f"{checkpoints.WEIGHTS}{name}": value for name, value in bundle.read_weights(path).items()}
        else:
            tensors, _ = checkpoints.load(path)
        checkpoints.load_weights(head, tensors, path)
        return head.to(device).eval(), epoch

    def open_cache(self) -> Cache:
        """The cache the run was trained on. Raises `RunError` if it is no longer where it was, or the run is a bundle."""
        if self.bundle:
            raise RunError(f"{self.root} is an exported bundle, which does not know where a cache is; say it with --cache.")
        if not any_path(self.info["cache"]).is_dir():
            raise RunError(
                f"{self.root} was trained on {self.info['cache']}, which is not there; say where it is with --cache."
            )
        return Cache.open(self.info["cache"])

    def check_columns(self, cache: Cache, *, same_data: bool) -> None:
        """Raise `FingerprintError` unless the cache's columns were made as those the run was trained on.

        With `same_data` the whole fingerprint must agree, else only the encoder, and of the columns that depth follows from:
        another dataset's cache may be scored.
        """
        cls, options = head_options(self.recipe.head)
        names = self._trained_columns if same_data else [n for n in cls.reads(options) if n in self._trained_columns]
        for name in names:
            trained = self._trained_columns[name]
            column = cache.manifest.columns.get(name)
            found = column.fingerprint if column else {}
            lines = (
                differences(found, trained) if same_data else differences(found.get("encoder", {}), trained.get("encoder", {}))
            )
            if lines:
                shown = "\n".join(f"  {line}" for line in lines)
                raise FingerprintError(
                    f"{self.root} was trained on another column {name} than {cache.root} holds:\n{shown}\n"
                    "Give the cache the run was trained on, or train a new run on this one."
                )


def open_run(root: str | Path) -> Run:
    """Open the run or bundle in folder `root`.

    Raises `RunError` if there is none or it is damaged, `CorruptError` for a bundle whose weights are not those recorded.
    """
    root = Path(root)
    if not (root / RUN_FILE).is_file():
        raise RunError(f"{root} is not a run: {RUN_FILE} is not there. `pcd train --cache DIR --run {root}` makes one.")
    try:
        info = read_json(root / RUN_FILE)
    except ValueError as error:
        raise RunError(f"{root / RUN_FILE} is damaged: {error}") from None
    if not isinstance(info, dict) or (missing := FIELDS - info.keys()):
        lacks = f" (without {', '.join(sorted(missing))})" if isinstance(info, dict) else ""
        raise RunError(f"{root / RUN_FILE} is not that of a run{lacks}; was it written by something else?")
    if bundle.KEY in info:
        info = bundle.opened(root, info)
    return Run(root, load_recipe(root / RECIPE_FILE), info)


def newest_run(folder: Path = RUNS) -> Run:
    """The run under `folder` whose last epoch is the newest. Raises `RunError` if there is none."""
    files = list(folder.glob(f"*/{checkpoints.FOLDER}/{checkpoints.LAST}"))
    if not files:
        raise RunError(f"no run with a finished epoch under {folder}/; `pcd train --cache DIR` makes one, --run names another.")
    return open_run(max(files, key=lambda file: file.stat().st_mtime_ns).parent.parent)


def default_run_folder(cache: Cache, recipe: Recipe) -> Path:
    """`runs/CACHE-RECIPE-DIGEST`: the same command finds its own run again, another option makes another run."""
    cls, options = head_options(recipe.head)
    read = encoders_read(cache, cls.learns_from(options))
    fixed = {"recipe": _fixed(recipe), "dataset": cache.manifest.dataset, "encoders": read}
    return RUNS / f"{cache.root.resolve().name}-{recipe.name}-{digest(fixed)[:8]}"


def create_or_continue(root: Path, recipe: Recipe, cache: Cache) -> tuple[Run, bool]:
    """The run in `root`, made now or found there; True if it was found. One without a finished epoch is made anew.

    Raises `RunError` naming the keys if the run that is there has another recipe, and for a bundle; `FingerprintError` if its
    cache changed.
    """
    if bundle.is_bundle(root):
        raise RunError(f"{root} is an exported bundle, which cannot be trained on; give another --run.")
    fresh = Run(root, recipe, describe_run(recipe, cache))
    if not (root / RUN_FILE).is_file() or not (fresh.checkpoints / checkpoints.LAST).is_file():
        write_text(root / RECIPE_FILE, recipe.as_toml())
        write_json(root / RUN_FILE, fresh.info)
        return fresh, False
    found = open_run(root)
    lines = differences(_fixed(found.recipe), _fixed(recipe))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise RunError(f"{root} already holds a run with another recipe:\n{shown}\nGive another --run, or the same options.")
    found.check_columns(cache, same_data=True)
    write_text(root / RECIPE_FILE, recipe.as_toml())
    return Run(root, recipe, found.info), True


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that two parts of one training must share; where the data lie and how it is scored do not matter."""
    value = recipe.model_dump(mode="json")
    fixed = {key: value[key] for key in ("name", "head", "targets")}
    train = {key: item for key, item in value["train"].items() if key not in FREE_KEYS}
    plain: dict[str, Any] = _finite({**fixed, "train": train, "depth_resize": recipe.views.depth_resize})
    return plain


def _finite(value: Any) -> Any:
    """The same with infinity as a word: fingerprints are JSON, which has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return "inf" if value == math.inf else value


def describe_run(recipe: Recipe, cache: Cache) -> dict[str, Any]:
    """What `run.json` holds: the columns read, their fingerprints and shapes, their grid and that of the depths, the encoders
    they are of, stored frame size, views, dataset, labels.

    Raises `CacheError` naming the column if the cache lacks one that the head reads, and `RecipeError` for depths whose cells
    do not divide a view.
    """
    cls, options = head_options(recipe.head)
    table, manifest = cache.table("train"), cache.manifest
    columns = {name: table.column(name).entry for name in cls.learns_from(options)}
    encoders = [entry.fingerprint["encoder"] for entry in columns.values() if "encoder" in entry.fingerprint]
    shapes = {name: entry.spec.shape for name, entry in columns.items()}
    patches = next((grid for grid in map(grid_of, columns.values()) if grid), None) or encoders[0]["grid"]
    cells = cls.output_grid(options, shapes, patches)
    if (rest := [size % number for size, number in zip(manifest.plan.view_size, cells, strict=True)]) != [0, 0]:
        raise RecipeError(_uneven(manifest.plan.view_size, cells, rest))
    return {
        "pcd": pcd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cache": str(cache.root.resolve()),
        "columns": {name: entry.fingerprint for name, entry in columns.items()},
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "patches": list(patches),
        "grid": list(cells),
        "frame": table.column("sample/size").read(table.usable()[:1])[0].tolist(),
        "views": cache.manifest.plan.as_json(),
        "dataset": {key: manifest.dataset[key] for key in ("name", "family", "synthetic", "depth_range")},
        "encoders": encoders_read(cache, columns),
        "labels": labels(manifest.dataset, encoders),
    }


def _uneven(view: tuple[int, int], cells: tuple[int, int], rest: list[int]) -> str:
    side = "height" if rest[0] else "width"
    return (
        f"the head's depths are a grid of {cells[0]}x{cells[1]} cells, which does not divide the {side} of views of "
        f"{view[0]}x{view[1]} pixels. Change what makes it finer than the patches (head.scale, head.upsample), or views.canvas."
    )


def encoders_read(cache: Cache, columns: Iterable[str]) -> dict[str, Any]:
    """The encoders of the cache's manifest that made some of these columns, in their order."""
    keys = dict.fromkeys(cache.manifest.encoder_of(name) for name in columns)
    return {key: cache.manifest.encoders[key] for key in keys if key in cache.manifest.encoders}


def grid_of(entry: ColumnEntry) -> tuple[int, int] | None:
    """(rows, columns) of a column's maps, or of its encoder's patches; None for one without places in the image."""
    if entry.spec.dims[:2] == ("y", "x"):
        return entry.spec.shape[0], entry.spec.shape[1]
    if entry.spec.dims[:1] != ("patch",):
        return None
    made_by = entry.fingerprint.get("encoder") or entry.fingerprint["rule"]
    return made_by["grid"][0], made_by["grid"][1]


def labels(dataset: Mapping[str, Any], encoders: list[dict[str, Any]]) -> list[str]:
    """What must be said wherever a result is shown."""
    random = any(encoder["weights"]["kind"] == "random" for encoder in encoders)
    return (["random encoder weights"] if random else []) + (["synthetic scenes"] if dataset["synthetic"] else [])
