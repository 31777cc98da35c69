"""Sweep: many variants of a recipe, each with several seeds, trained on one read of a cache and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcd.cache import Cache
from pcd.errors import RunError, UsageError
from pcd.evaluation.protocol import Protocol
from pcd.evaluation.scoring import Scorer
from pcd.files import read_json
from pcd.fingerprint import digest
from pcd.heads import head_options
from pcd.progress import SILENT, Progress
from pcd.stages.evaluate import EACH, METRICS_FILE, choose_protocols
from pcd.stages.facts import encoder_lines
from pcd.stages.runs import RUN_FILE, Run, default_run_folder, describe_run, open_run
from pcd.stages.sweep_plan import SweepPlan, Variant
from pcd.stages.sweep_table import Document, Trained, variant_documents, write_tables
from pcd.stages.together import SCORES_FILE, Failures, Scoring, Together, run_folder
from pcd.training import checkpoints

if TYPE_CHECKING:
    from pcd.training.loop import EpochReport

SWEEPS = Path("sweeps")


@dataclass(frozen=True)
class Sweep:
    """A sweep that went through. `document` is what `sweep.json` in `root` holds; `failures` are part of it."""

    root: Path
    document: Document

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Runs that ended in an error: variant, seed, kind and message."""
        return list(self.document["failures"])


def sweep(
    plan: SweepPlan,
    cache: Cache,
    root: Path | None = None,
    *,
    protocols: Sequence[str] = (),
    checkpoint: str = "abs_rel",
    device: str = "auto",
    dask: str | None = None,
    progress: Progress = SILENT,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> Sweep:
    """Train and evaluate every variant of `plan` with every seed, and write the tables into `root`.

    A run lies in `ROOT/VARIANT/seed-N` and is what `train` alone makes of the same recipe, bit for bit. Variants take their
    steps side by side on each batch that is read; what is held in memory is read once for all seeds. Finished runs are not
    repeated, an interrupted one goes on. An error of pcd in a run is recorded and does not stop the others. Scored is the test
    table, or val where there is none, under `protocols` (default: the recipe's), the first of them the main one.

    With `dask`, the address of a dask.distributed scheduler, its workers train and score: the runs are the same on machines of
    the same type with the same number of threads, and `on_epoch` hears nothing; see `pcd.stages.cluster`. Raises `UsageError`
    for options that do not apply and workers that cannot take part, `RunError` if `root` holds another sweep.
    """
    if checkpoint == EACH:
        raise UsageError("a sweep compares one set of weights per run: give a metric (its best epoch) or last, not each.")
    root = root or default_sweep_folder(plan, cache)
    split = "test" if "test" in cache.manifest.tables else "val"
    chosen = _protocols(plan, cache, root, protocols)
    _refuse_other_runs(plan, cache, root)
    scoring = Scoring(split, tuple(protocol.label for protocol in chosen), checkpoint)
    failures = Failures(root, progress)
    if dask is None:
        found = _sweep_here(plan, cache, root, scoring, device, progress, failures, on_epoch)
    else:
        from pcd.stages.cluster import sweep_on_workers  # distributed is imported by who uses it

        found = sweep_on_workers(dask, plan, cache, root, scoring, device, progress, failures)
    names = [variant.name for variant in plan.variants]
    failures.found.sort(key=lambda failure: (plan.seeds.index(failure["seed"]), names.index(failure["variant"])))
    runs: dict[str, list[Trained]] = {name: [] for name in names}
    for seed in plan.seeds:
        for name, trained in runs.items():
            if (name, seed) in found:
                trained.append(_trained(seed, run_folder(root, name, seed), found[name, seed]))
    document = _document(plan, cache, root, split, checkpoint, chosen, runs, failures.found)
    write_tables(root, document)
    return Sweep(root, document)


def _sweep_here(
    plan: SweepPlan,
    cache: Cache,
    root: Path,
    scoring: Scoring,
    device: str,
    progress: Progress,
    failures: Failures,
    on_epoch: Callable[[EpochReport], None],
) -> dict[tuple[str, int], Path]:
    """Train and score all runs in this process; the folder of the evaluation by variant and seed."""
    found: dict[tuple[str, int], Path] = {}
    names = ", ".join(variant.name for variant in plan.variants)
    together = Together(plan.variants, cache, root, device, progress, on_epoch)
    for number, seed in enumerate(plan.seeds, start=1):
        progress.say(f"[{number}/{len(plan.seeds)}] seed {seed}: {names}")
        found |= {(name, seed): folder for name, folder in together.scored(seed, scoring, failures).items()}
    return found


def default_sweep_folder(plan: SweepPlan, cache: Cache) -> Path:
    """`sweeps/CACHE-SWEEP-DIGEST`: the same variants find their runs again, with whatever seeds."""
    identity = digest([(variant.name, default_run_folder(cache, variant.seeded(0)).name) for variant in plan.variants])
    return SWEEPS / f"{cache.root.resolve().name}-{plan.name}-{identity[:8]}"


def _training(variant: Variant) -> tuple[Any, ...]:
    """What a variant's training follows from, defaults filled in; equal for variants that train the same."""
    recipe = variant.seeded(0)
    return *head_options(recipe.head), recipe.targets, recipe.train, recipe.views.depth_resize


def _protocols(plan: SweepPlan, cache: Cache, root: Path, names: Sequence[str]) -> list[Protocol]:
    """The protocols every run is scored under; found before hours of training if they do not fit the frames."""
    recipe = plan.variants[0].recipe
    run = Run(root, recipe, describe_run(recipe, cache))
    chosen = choose_protocols(run, cache, names, None, None)
    Scorer(chosen, cache.manifest.plan)
    for protocol in chosen:
        if protocol.resolution == "native":
            protocol.region_in(*run.info["frame"])
    return chosen


def _refuse_other_runs(plan: SweepPlan, cache: Cache, root: Path) -> None:
    """Raise `RunError` if a run that this sweep would continue was begun with another recipe or on other columns."""
    for variant in plan.variants:
        for seed in plan.seeds:
            folder = root / variant.name / f"seed-{seed}"
            if not (folder / RUN_FILE).is_file() or not (folder / checkpoints.FOLDER / checkpoints.LAST).is_file():
                continue
            wanted = Run(folder, variant.seeded(seed), describe_run(variant.recipe, cache))
            if open_run(folder).identity != wanted.identity:
                raise RunError(
                    f"{root} holds another sweep: {folder} was trained with another recipe or on another cache than variant "
                    f"{variant.name} asks for. Give another --out, or the options of the sweep that is there."
                )


def _trained(seed: int, root: Path, folder: Path) -> Trained:
    """The run in `root`, scored in `folder`."""
    document = read_json(folder / METRICS_FILE)
    metrics = {label: scores["metrics"] for label, scores in document["protocols"].items()}
    return Trained(seed, root, document["epoch"], metrics, folder / SCORES_FILE)


def _document(
    plan: SweepPlan,
    cache: Cache,
    root: Path,
    split: str,
    checkpoint: str,
    protocols: Sequence[Protocol],
    runs: dict[str, list[Trained]],
    failures: list[dict[str, Any]],
) -> Document:
    """What `sweep.json` holds."""
    main, recipe = protocols[0], plan.variants[0].recipe
    run = Run(root, recipe, describe_run(recipe, cache))
    made = {name: open_run(found[0].root) for name, found in runs.items() if found}
    family = cache.manifest.dataset["family"]
    variants = variant_documents(plan.variants, runs, main.label, family, plan.paper)
    for number, (document, variant) in enumerate(zip(variants, plan.variants, strict=True)):
        same = [earlier.name for earlier in plan.variants[:number] if _training(earlier) == _training(variant)]
        document["same_as"] = same[0] if same else None
        document["labels"] = made[variant.name].labels if variant.name in made else []
    return {
        "sweep": plan.name,
        "description": plan.description,
        "root": str(root),
        "cache": str(cache.root),
        "dataset": run.info["dataset"],
        "encoders": list(dict.fromkeys(line for each in [run, *made.values()] for line in encoder_lines(each))),
        "labels": [label for label in run.labels if all(label in each.labels for each in made.values())],
        "split": split,
        "samples": len(cache.table(split).usable()),
        "checkpoint": checkpoint,
        "protocol": main.label,
        "description_of_protocol": main.describe(),
        "protocols": [protocol.label for protocol in protocols],
        "seeds": list(plan.seeds),
        "reference": plan.variants[0].name,
        "variants": variants,
        "failures": failures,
        "printed_source": plan.paper.source if plan.paper else None,
        "printed_notes": _printed_notes(plan, run, cache, main, checkpoint),
    }


def _printed_notes(plan: SweepPlan, run: Run, cache: Cache, protocol: Protocol, checkpoint: str) -> list[str]:
    """What makes the numbers in print differ from ours."""
    if plan.paper is None:
        return []
    family, encoders = run.info["dataset"]["family"], "; ".join(encoder_lines(run))
    notes = [f"in print: {plan.paper.source}: {plan.paper.notes[family]}"] if family in plan.paper.notes else []
    nearest = choose_protocols(run, cache, [plan.paper.protocol], None, None)[0] if plan.paper.protocol else protocol
    if nearest.label != protocol.label:
        notes.append(f"in print: nearest to protocol {nearest.label}; ours are under {protocol.label} (--protocol chooses)")
    samples = len(cache.table("train").usable())
    train = run.recipe.train
    ours = f"ours: {encoders}; {samples} training samples, at most {train.epochs} epochs, epoch best for {checkpoint}"
    return [*notes, ours]
