"""Targets that are made for each batch: the bits of held ones, for several trainings at once, in bounded memory."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch

from pcd.cache import Cache, Table
from pcd.heads.base import PatchTargets
from pcd.patches import PixelRule, patch_statistics, to_patches
from pcd.recipe import Supervision, TrainSection
from pcd.stages.reading import SharedReading
from pcd.training import rows as rows_module
from pcd.training import targets as module
from pcd.training.rows import TrainingRows
from pcd.training.sources import HeldRows, Placed, StreamedRows
from pcd.training.targets import RowTargets, StreamedTargets, row_targets, training_targets
from pcd.training.together import run_together
from pcd.views import ViewPlan
from tests.test_extract import run
from tests.test_training import COLUMNS, CPU, RANGE, RULES, make_loop
from tests.training_support import same, state

GRIDS = [(4, 4), (2, 4), (8, 8), (16, 16)]
"""That of the encoder, a coarser and a finer one, and pixels."""
FIELDS = ("count", "mean", "var", "valid", "flat", "view")


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def agree(first: PatchTargets, second: PatchTargets) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_batch_has_the_bits_of_held_targets(cache: Cache, rule: str, grid: tuple[int, int]) -> None:
    table, rows = cache.table("train"), np.arange(3, 40, 3)
    settings = {"embedding": Supervision(), "depth": RULES[rule]}
    held = training_targets(table, rows, grid, settings, RANGE, "depth", hold=True)
    streamed = training_targets(table, rows, grid, settings, RANGE, "depth", hold=False)
    positions = np.array([5, 0, 11, 5, 7])
    for name in settings:
        assert isinstance(held[name], RowTargets)
        assert isinstance(streamed[name], StreamedTargets)
        assert streamed[name].cells == held[name].cells == grid[0] * grid[1]
        found, expected = (each[name].batch(positions, CPU) for each in (streamed, held))
        assert agree(found, expected)
        assert found.valid.any()
    assert (streamed["embedding"] is streamed["depth"]) == (rule == "paper, nyu"), "equal supervisions share"


def test_targets_of_pixels_against_a_plain_loop(cache: Cache) -> None:
    table, rows = cache.table("train"), np.arange(0, 12)
    rule = Supervision(min_depth=1.0, max_depth=4.0, min_present=1.0, mask="garg")
    found = row_targets(table, rows, (16, 16), {"x": rule}, RANGE, "depth")["x"]
    stored = table.column("depth/canvas").read(rows)
    lines, across = range(int(0.40810811 * 16), int(0.99189189 * 16)), range(int(0.03594771 * 32), int(0.96405229 * 32))
    number = 0
    for row in rows:
        mirrored, tile = divmod(row % 4, 2)
        for y in range(16):
            for x in range(16):
                depth, column = stored[row, y, x] / 1000, tile * 16 + x
                counts = 1.0 <= depth <= 4.0 and y in lines and (31 - column if mirrored else column) in across
                cell = (row, y * 16 + x)
                assert found.valid[cell] == counts
                assert found.count[cell] == counts
                assert found.var[cell] == 0
                assert found.mean[cell] == (np.float32(depth) if counts else 0)
                number += counts
    assert 0 < number < found.valid.size


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("open_range", [False, True])
def test_statistics_of_single_pixels_are_those_of_the_general_formula(masked: bool, open_range: bool) -> None:
    """Every number a uint16 can be, in float64 and rounded once."""
    stored = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).reshape(4, 128, 128)
    mask = np.random.default_rng(1).random(stored.shape) < 0.5 if masked else None
    rule = PixelRule(0.5, 40.0, open_range)
    found = patch_statistics(stored, 1000, (128, 128), rule, mask)
    metres = to_patches(stored, (128, 128))[..., 0] / np.float64(1000)
    counts = (stored.reshape(4, -1) != 0) & (rule.keeps(metres))
    counts = counts if mask is None else counts & mask.reshape(4, -1)
    np.testing.assert_array_equal(found.present, stored.reshape(4, -1) != 0)
    np.testing.assert_array_equal(found.count, counts)
    assert found.mean.tobytes() == np.where(counts, metres, 0).astype(np.float32).tobytes()
    assert not found.var.any()
    assert [values.dtype for values in (found.present, found.count, found.mean, found.var)] == [
        *(np.uint16, np.uint16, np.float32, np.float32)
    ]


class Frames:
    """A table of random ground truth that lies nowhere."""

    plan = ViewPlan(canvas=(336, 336), grid=(1, 1))
    views = 1
    root = Path("nowhere")
    manifest = SimpleNamespace(columns={"depth/count": SimpleNamespace(fingerprint={})})
    spec = SimpleNamespace(units_per_metre=1000)
    most = 0

    def column(self, name: str) -> Frames:
        assert name == "depth/canvas"
        return self

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        self.most = max(self.most, len(rows))
        return np.random.default_rng(rows[0]).integers(0, 9000, (len(rows), 336, 336), dtype=np.uint16)


@pytest.mark.parametrize("grid", [(336, 336), (24, 24)])
def test_memory_beside_what_is_held_does_not_grow_with_the_rows(grid: tuple[int, int]) -> None:
    frames, rows = Frames(), np.arange(80)
    tracemalloc.start()
    try:
        found = row_targets(cast(Table, frames), rows, grid, {"x": Supervision(mask="garg")}, RANGE, "depth")["x"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = sum(getattr(found, name).nbytes for name in ("count", "mean", "var", "valid"))
    assert held == module.BYTES * 80 * grid[0] * grid[1]
    assert 1 < frames.most <= module.CHUNK_PIXELS // 336**2
    assert peak - held < 60 * module.CHUNK_PIXELS


def test_memory_decides_unless_it_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = cache.table("train"), np.arange(40)
    settings = {"embedding": Supervision(), "depth": Supervision(min_present=0.0)}
    size = 2 * 40 * 256 * (3 * 4 + 1)

    def kinds(free: float, hold: bool | None = None, grid: tuple[int, int] = (16, 16)) -> set[type]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return {type(each) for each in training_targets(table, rows, grid, settings, RANGE, "depth", hold).values()}

    share = module.SHARE_OF_MEMORY
    assert kinds(size / share) == {RowTargets}
    assert kinds(size / share - 8) == {StreamedTargets}
    assert kinds(size / share - 8, grid=(4, 4)) == {RowTargets}
    assert kinds(0, hold=True) == {RowTargets}
    assert kinds(1e12, hold=False) == {StreamedTargets}


def attached(cache: Cache, hold: bool, *, held_columns: bool, grid: tuple[int, int] = (16, 16)) -> TrainingRows:
    table = cache.table("train")
    rows = TrainingRows(table, TrainSection(batch_size=4, flips=True))
    settings = {"embedding": Supervision(), "depth": RULES["near"]}
    source = HeldRows(table, COLUMNS, rows.rows, CPU) if held_columns else StreamedRows(table, COLUMNS, CPU)
    rows.attach(Placed(source, ""), training_targets(table, rows.rows, grid, settings, RANGE, "depth", hold), CPU)
    return rows


@pytest.mark.parametrize("held_columns", [True, False])
def test_epochs_are_the_same_and_made_ahead(cache: Cache, monkeypatch: pytest.MonkeyPatch, held_columns: bool) -> None:
    threads: list[str] = []
    made = StreamedTargets.made

    def noted(self: StreamedTargets, rows: Any) -> RowTargets:
        threads.append(threading.current_thread().name)
        return made(self, rows)

    monkeypatch.setattr(StreamedTargets, "made", noted)
    held, streamed = (attached(cache, hold, held_columns=held_columns) for hold in (True, False))
    number = 0
    for first, second in zip(held.epoch(2), streamed.epoch(2), strict=True):
        assert first.columns.keys() == second.columns.keys()
        assert all(torch.equal(first.columns[name], second.columns[name]) for name in COLUMNS)
        assert all(agree(first.targets[name], second.targets[name]) for name in first.targets)
        number += 1
    assert number == streamed.steps() == 11
    assert len(threads) == 2 * number
    assert not any(name == "MainThread" for name in threads)


def test_all_rows_once_a_few_at_a_time(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    held, streamed = (attached(cache, hold, held_columns=True) for hold in (True, False))
    (whole,) = held.once()
    row = 16 * 6 * 2 + 6 * 4 + 2 * 256 * rows_module.CELL_BYTES
    monkeypatch.setattr(rows_module, "ONCE_BYTES", 5 * row + 10)
    parts = list(streamed.once())
    assert [len(part.columns["clip/cls"]) for part in parts] == [5] * 8 + [4]
    for name in COLUMNS:
        assert torch.equal(torch.cat([part.columns[name] for part in parts]), whole.columns[name])
    for name in ("embedding", "depth"):
        for field in ("count", "mean", "var", "valid"):
            joined = torch.cat([getattr(part.targets[name], field) for part in parts])
            assert torch.equal(joined, getattr(whole.targets[name], field))
    monkeypatch.setattr(rows_module, "ONCE_BYTES", 1)
    assert len(list(streamed.once())) == 44


def test_side_by_side_a_batch_of_targets_is_made_once(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cache.table("train")
    settings = {"embedding": Supervision(), "depth": Supervision()}
    calls: list[bytes] = []
    made = StreamedTargets.made

    def counted(self: StreamedTargets, rows: Any) -> RowTargets:
        calls.append(rows.tobytes())
        return made(self, rows)

    monkeypatch.setattr(StreamedTargets, "made", counted)
    loops = {}
    for name, hold in (("held", True), ("a", False), ("b", False)):
        loop = loops[name] = make_loop(cache, tmp_path / name, 2)
        kept = (
            loops["a"].rows._targets
            if name == "b"
            else training_targets(table, loop.rows.rows, (4, 4), settings, RANGE, "depth", hold)
        )
        loop.rows.attach(Placed(StreamedRows(table, COLUMNS, CPU), ""), kept, CPU)
    placed = Placed(StreamedRows(table, COLUMNS, CPU), "", 2)

    def on_error(loop: Any, error: Exception) -> None:
        raise error

    run_together(loops.values(), placed, lambda loop, report: None, on_error)
    assert len(calls) == len(set(calls)) == 2 * loops["a"].rows.steps(), "two epochs, once for both"
    assert same(state(loops["a"]), state(loops["held"]))
    assert same(state(loops["b"]), state(loops["held"]))


def test_trainings_with_one_reading_share_them(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = cache.table("train"), np.arange(8)
    settings = {"embedding": Supervision(), "depth": Supervision()}
    reading = SharedReading({"train": rows})

    def targets(hold: bool | None = None) -> Any:
        return reading.targets(table, rows, (16, 16), settings, RANGE, "depth", hold)

    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
        first = targets()
    assert isinstance(first["depth"], StreamedTargets)
    assert targets() is first
    assert targets(hold=False) is first
    held = targets(hold=True)
    assert isinstance(held["depth"], RowTargets)
    assert targets() is held, "once held, for all"
