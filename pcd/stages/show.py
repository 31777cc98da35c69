"""Show: everything that a cache, and a run trained on it, say about one sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pcd.cache import Cache, Table
from pcd.cache.manifest import MANIFEST
from pcd.cache.table import SAMPLE_OK
from pcd.device import resolve_device
from pcd.errors import CacheError, DatasetError, UsageError
from pcd.evaluation.figures_sample import SamplePanel, principal_colours, save_sample, views_panel
from pcd.heads.bins import DepthBins
from pcd.patches import PatchStatistics, PixelRule, patch_statistics
from pcd.remote import AnyPath, any_path
from pcd.stages.frames import open_frames
from pcd.stages.inference import canvas_truth
from pcd.stages.inspect import skipped
from pcd.stages.runs import RUN_FILE, Run, labels, open_run
from pcd.stages.selection import Selection, find_sample
from pcd.stages.show_run import Part, run_part
from pcd.views import TRUTH, ViewPlan, image_canvas

BINS = 10
"""Bins of the histogram where no head says which: of equal width, over the dataset's depth range."""
SUFFIXES = (".png", ".jpg", ".svg", ".pdf")


@dataclass(frozen=True)
class Shown:
    """One sample: `facts` in plain values, and its panels; none if the sample was skipped."""

    facts: dict[str, Any]
    panels: tuple[SamplePanel, ...]

    def save(self, path: Path) -> None:
        """All panels as a PNG. Raises `UsageError` for a sample that was skipped, or a suffix that is no picture's."""
        sample = self.facts["sample"]
        if not self.panels:
            raise UsageError(f"sample {sample['key']} was skipped ({sample['skipped']}): there is nothing to draw.")
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"--out {path}: give the name of a picture; its end can be {', '.join(SUFFIXES)}.")
        view = "" if self.facts["view"] is None else f", view {self.facts['view']}"
        title = f"{sample['key']}: {sample['table']} sample {sample['number']} of {sample['of']}{view}, {self.facts['path']}"
        notes = f" ({', '.join(self.facts['labels'])})" if self.facts["labels"] else ""
        save_sample(path, self.panels, title + notes)


def show(
    path: str | AnyPath,
    *,
    split: str = "test",
    sample: str = "0",
    view: int | None = None,
    root: Path | None = None,
    cache: Cache | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
) -> Shown:
    """Everything about one sample of table `split`: of a cache, or as a run sees it, whichever lies in folder `path`.

    `sample` is a key or a number; `view` shows that view alone, as the encoder sees it; `root` says where the images are now,
    `cache` where the run's cache is now; `checkpoint` is a watched metric (`abs_rel` by default) or `last`.
    Raises `UsageError` for a folder that is neither, an unknown sample or view, or what only a run has asked of a cache.
    """
    path = any_path(path)
    run, opened = _open(path, cache)
    if run is None and (cache is not None or checkpoint is not None):
        raise UsageError(f"{path} is a cache: --cache and --checkpoint need a run; give the run's folder instead.")
    table = opened.table(split)
    chosen = Selection(table, find_sample(table, sample), view)
    facts = {"path": str(path), "view": view, "labels": _labels(opened, run), **_identity(opened, chosen)}
    if facts["sample"]["skipped"] is not None:
        return Shown(facts, ())
    group = _truth_group(table, run)
    parts = [_image(opened, chosen, root), _tokens(chosen, run), _truth(chosen, group)]
    if run is not None:
        parts.append(run_part(run, opened, chosen, group, checkpoint or "abs_rel", torch.device(resolve_device(device))))
    for part in parts:
        facts |= part.facts
    return Shown(facts, tuple(panel for part in parts for panel in part.panels))


def _open(path: AnyPath, cache: Cache | None) -> tuple[Run | None, Cache]:
    """The run in a folder and its cache, or the cache alone."""
    if isinstance(path, Path) and (path / RUN_FILE).is_file():
        run = open_run(path)
        opened = cache or run.open_cache()
        run.check_columns(opened, same_data=False)
        return run, opened
    if (path / MANIFEST).is_file():
        return None, Cache.open(path)
    what = "is neither a cache nor a run" if path.is_dir() else "is not there"
    raise UsageError(f"{path} {what}; give a folder that holds {MANIFEST} (a cache) or {RUN_FILE} (a run).")


def _labels(cache: Cache, run: Run | None) -> list[str]:
    encoders = [entry.fingerprint["encoder"] for entry in cache.manifest.columns.values() if "encoder" in entry.fingerprint]
    return run.labels if run is not None else labels(cache.manifest.dataset, encoders)


def _identity(cache: Cache, chosen: Selection) -> dict[str, Any]:
    """Which sample it is, whether it was read, and where its views lie."""
    table, key = chosen.table, chosen.table.keys[chosen.number]
    read = bool(table.column(SAMPLE_OK).read(chosen.samples)[0])
    reason = None if read else skipped(cache).get(key, "the reason was not recorded")
    size = table.column("sample/size").read(chosen.samples)[0].tolist() if read else None
    where = {"key": key, "table": table.name, "number": chosen.number, "of": table.samples, "skipped": reason, "size": size}
    return {"cache": str(cache.root), "sample": where, "views": [_view(chosen.plan, view) for view in range(table.views)]}


def _view(plan: ViewPlan, number: int) -> dict[str, Any]:
    """A view's tile (row, column) and the rows and columns of the canvas, mirrored or not, that it covers."""
    mirrored, tile = divmod(number, plan.tiles)
    (height, width), (row, column) = plan.view_size, divmod(tile, plan.grid[1])
    rows, columns = [row * height, (row + 1) * height], [column * width, (column + 1) * width]
    return {"view": number, "mirrored": bool(mirrored), "tile": [row, column], "rows": rows, "columns": columns}


def _truth_group(table: Table, run: Run | None) -> str:
    """The columns that hold the ground truth: those the run learnt from, or the first there are."""
    if run is not None:
        return TRUTH[run.recipe.views.depth_resize]
    for group in TRUTH.values():
        if f"{group}/canvas" in table.column_names():
            return group
    raise CacheError(f"{table.root}: table {table.name} holds no ground truth; `pcd extract --cache {table.root}` adds it.")


def _image(cache: Cache, chosen: Selection, root: Path | None) -> Part:
    """The image and its views, if the images are at hand; a `root` that was given must be right."""
    plan, key = chosen.plan, chosen.table.keys[chosen.number]
    try:
        rgb = open_frames(cache, root).load(chosen.table.name, key).rgb
    except DatasetError as error:
        if root is not None:
            raise
        return Part({"no_image": str(error)})
    canvas = np.rint(image_canvas(rgb, plan) * 255).astype(np.uint8)
    name = "image on the canvas" if chosen.view is None else f"view {chosen.view}"
    panels = [
        SamplePanel("image", f"{name}, {'x'.join(map(str, chosen.pixels(canvas).shape[:2]))}", "rgb", chosen.pixels(canvas))
    ]
    if plan.views > 1 and chosen.view is None:
        panels.append(views_panel(canvas, plan))
    return Part({"no_image": None}, panels)


def _tokens(chosen: Selection, run: Run | None) -> Part:
    """Every column of patch tokens (of a run: those it reads) by its first three principal components."""
    panels, facts = [], {}
    entries = chosen.table.manifest.columns
    for name in chosen.table.column_names() if run is None else run.info["columns"]:
        if entries[name].spec.dims != ("patch", "channel"):
            continue
        rows, columns = entries[name].fingerprint["encoder"]["grid"]
        tokens = chosen.patches(chosen.table.column(name).read(chosen.rows), (rows, columns))
        rgb, share = principal_colours(tokens.reshape(-1, tokens.shape[-1]))
        facts[name] = {"width": tokens.shape[-1], "variance_in_3_components": share}
        pixels = np.rint(rgb.reshape(*tokens.shape[:2], 3) * 255).astype(np.uint8)
        title = f"{name}: 3 of {tokens.shape[-1]} principal components, {100 * share:.0f} % of variance"
        panels.append(SamplePanel(f"tokens {name}", title, "rgb", pixels))
    return Part({"tokens": facts}, panels)


def _statistics(table: Table, group: str, rows: npt.NDArray[np.int64], grid: tuple[int, int]) -> PatchStatistics:
    """As they are stored; for patches too small for that, what would be."""
    if f"{group}/mean" in table.column_names():
        return PatchStatistics(*(table.column(f"{group}/{name}").read(rows) for name in ("present", "count", "mean", "var")))
    canvas = table.column(f"{group}/canvas")
    assert canvas.spec.units_per_metre is not None
    rule = PixelRule(*table.manifest.dataset["depth_range"])
    return patch_statistics(canvas.read(rows), canvas.spec.units_per_metre, grid, rule)


def _truth(chosen: Selection, group: str) -> Part:
    """Ground truth on the canvas and per patch, as it is stored."""
    table, dataset = chosen.table, chosen.table.manifest.dataset
    canvas = chosen.pixels(canvas_truth(table, chosen.samples, group)[0])
    rule = table.manifest.columns[f"{group}/canvas"].fingerprint["rule"]
    rows, columns = rule["grid"]
    found = _statistics(table, group, chosen.rows, (rows, columns))
    present, count, mean = (
        chosen.patches(values, (rows, columns)).astype(np.float32) for values in (found.present, found.count, found.mean)
    )
    pixels = chosen.plan.view_size[0] * chosen.plan.view_size[1] // (rows * columns)
    mean[count == 0] = np.nan
    (low, high), there = dataset["depth_range"], np.isfinite(canvas)
    bins = DepthBins(low, high, BINS)
    known = canvas[there].astype(np.float64)
    facts = {
        "truth": {
            "columns": group,
            "min": float(known.min()) if known.size else None,
            "median": float(np.median(known)) if known.size else None,
            "max": float(known.max()) if known.size else None,
            "valid": float(there.mean()),
        },
        "patches": {
            "grid": list(mean.shape),
            "pixels": pixels,
            "number": mean.size,
            "with_depth": int((count > 0).sum()),
            "half_valid": int((present >= pixels / 2).sum()),
        },
        "bins": {
            "of": "patches with depth",
            "edges": bins.edges.tolist(),
            "true": torch.bincount(bins.index(torch.from_numpy(mean[count > 0])), minlength=BINS).tolist(),
            "likely": None,
        },
    }
    limits = f"from {rule['min_depth']:g} m" + ("" if rule["max_depth"] is None else f" to {rule['max_depth']:g} m")
    panels = [
        SamplePanel("truth", f"true depth, {100 * facts['truth']['valid']:.0f} % of the pixels", "depth", canvas),
        SamplePanel("mean", "true depth, mean of each patch", "depth", mean),
    ]
    shares = {
        "present": (f"pixels with depth ({group}/present)", present),
        "count": (f"pixels {limits} ({group}/count)", count),
    }
    if np.array_equal(present, count):
        shares = {"present": (f"pixels with depth, all {limits} ({group}/present, count)", present)}
    panels += [SamplePanel(name, title, "share", share / pixels) for name, (title, share) in shares.items()]
    return Part(facts, panels)
