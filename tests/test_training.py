"""Rows, targets, schedule and the loop on a toy cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcd.cache import Cache
from pcd.errors import CorruptError, RunError, TrainingError
from pcd.heads.pureclip import PureClipHead, PureClipOptions
from pcd.recipe import Supervision, TrainSection
from pcd.training import checkpoints
from pcd.training.loop import EpochReport, Loop, is_finished
from pcd.training.rows import TrainingRows
from pcd.training.schedule import EarlyStopping
from pcd.training.sources import HeldRows, Placed, StreamedRows, place_rows
from pcd.training.targets import RowTargets, row_targets
from tests.test_extract import run, toy_recipe

CPU = torch.device("cpu")
GRID = (4, 4)
COLUMNS = ("clip/patch", "clip/cls")
RANGE = (0.1, 10.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy"), toy_recipe(dataset={"broken": ["train-3"]}), on_error="skip").cache


def make_rows(cache: Cache, **settings: Any) -> TrainingRows:
    rows = TrainingRows(cache.table("train"), TrainSection(**settings))
    targets = row_targets(
        cache.table("train"), rows.rows, GRID, {"embedding": Supervision(), "depth": Supervision()}, RANGE, "depth"
    )
    rows.attach(Placed(StreamedRows(cache.table("train"), COLUMNS, CPU), ""), targets, CPU)
    return rows


def test_an_epoch_visits_every_unmirrored_view_of_usable_samples_once(cache: Cache) -> None:
    table = cache.table("train")
    bad = table.keys.index("train-3")
    expected = sorted(s * 4 + t for s in range(table.samples) if s != bad for t in range(2))
    rows = make_rows(cache)
    assert sorted(rows.order(0)) == expected
    assert list(rows.order(0)) != list(rows.order(1))
    assert list(rows.order(3)) == list(make_rows(cache).order(3))
    assert list(rows.order(3)) != list(make_rows(cache, seed=1).order(3))
    assert sorted(make_rows(cache, flips=True).order(0)) == sorted(s * 4 + v for s in range(11) if s != bad for v in range(4))


def test_random_tiles_draw_one_per_image_and_epoch(cache: Cache) -> None:
    rows = make_rows(cache, tiles="random")
    seen = set()
    for epoch in range(12):
        order = rows.order(epoch)
        assert len(order) == 10
        assert len({row // 4 for row in order}) == 10
        seen |= set(order)
    assert seen == set(rows.rows)
    both = make_rows(cache, tiles="random", flips=True).order(0)
    assert {row % 4 for row in both} <= {0, 1, 2, 3}
    assert len(both) == 20


def test_batches_and_what_is_dropped(cache: Cache) -> None:
    assert [len(b.columns["clip/cls"]) for b in make_rows(cache, batch_size=8).epoch(0)] == [8, 8, 4]
    assert [len(b.columns["clip/cls"]) for b in make_rows(cache, batch_size=8, drop_last=True).epoch(0)] == [8, 8]


def test_batches_carry_the_columns_and_targets_of_their_rows(cache: Cache) -> None:
    rows, table = make_rows(cache, batch_size=6), cache.table("train")
    order = rows.order(2)
    for step, batch in enumerate(rows.epoch(2)):
        mine = order[step * 6 : step * 6 + 6]
        np.testing.assert_array_equal(batch.columns["clip/patch"], table.column("clip/patch").read(mine))
        np.testing.assert_array_equal(batch.targets["depth"].mean, table.column("depth/mean").read(mine))


def test_held_and_streamed_rows_are_the_same(cache: Cache) -> None:
    table, rows = cache.table("train"), make_rows(cache).rows
    held, streamed = HeldRows(table, COLUMNS, rows, CPU), StreamedRows(table, COLUMNS, CPU)
    some = np.random.default_rng(0).permutation(rows)[:7]
    for name in COLUMNS:
        assert torch.equal(held.read(some)[name], streamed.read(some)[name])
    assert isinstance(place_rows(table, COLUMNS, rows, "auto", CPU).source, HeldRows)
    assert isinstance(place_rows(table, COLUMNS, rows, "device", CPU).source, HeldRows)
    assert isinstance(place_rows(table, COLUMNS, rows, "stream", CPU).source, StreamedRows)
    assert "held in memory" in place_rows(table, COLUMNS, rows, "host", CPU).words


def _garg(height: int, width: int) -> tuple[range, range]:
    return (
        range(int(0.40810811 * height), int(0.99189189 * height)),
        range(int(0.03594771 * width), int(0.96405229 * width)),
    )


RULES = {
    "paper, nyu": Supervision(),
    "paper, kitti": Supervision(mask="garg"),
    "released, embedding": Supervision(
        min_depth=0.39, max_depth=float("inf"), open_range=True, mask="garg", mask_pixels=False, min_present=0.0,
        patch_mask_open=True, min_mean=0.39,
    ),
    "released, depth": Supervision(open_range=True, min_present=0.0),
    "near": Supervision(max_depth=3.0, min_depth=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_targets_agree_with_a_plain_loop(cache: Cache, name: str) -> None:
    """Every rule of paper and released code, pixel by pixel from the merged canvas, mirrored views included."""
    rule, table = RULES[name], cache.table("train")
    rows = np.arange(0, 28)
    got = row_targets(table, rows, GRID, {"x": rule}, RANGE, "depth")["x"]
    low = RANGE[0] if rule.min_depth is None else rule.min_depth
    high = RANGE[1] if rule.max_depth is None else rule.max_depth
    garg_rows, garg_columns = _garg(16, 32)
    stored = table.column("depth/canvas").read(rows)
    for row in rows:
        mirrored, tile = divmod(row % 4, 2)
        for patch in range(16):
            values, present, inside = [], 0, 0
            for y in range(patch // 4 * 4, patch // 4 * 4 + 4):
                for x in range(patch % 4 * 4, patch % 4 * 4 + 4):
                    column = tile * 16 + x
                    in_mask = y in garg_rows and (31 - column if mirrored else column) in garg_columns
                    depth = stored[row, y, x] / 1000
                    present += depth > 0
                    inside += in_mask
                    fits = low < depth < high if rule.open_range else low <= depth <= high
                    if depth > 0 and fits and (in_mask or rule.mask == "none" or not rule.mask_pixels):
                        values.append(depth)
            mean = sum(values) / len(values) if values else 0.0
            valid = bool(values) and present >= rule.min_present * 16 and mean >= rule.min_mean
            if rule.mask == "garg":
                valid = valid and (inside / 16 > 0.5 if rule.patch_mask_open else inside / 16 >= 0.5)
            assert got.valid[row, patch] == valid
            assert got.count[row, patch] == (len(values) if valid else 0)
            assert got.mean[row, patch] == pytest.approx(mean, rel=1e-6)


def test_stored_statistics_and_recomputed_ones_are_the_same_bits(cache: Cache) -> None:
    table, rows = cache.table("train"), make_rows(cache).rows
    stored = row_targets(table, rows, GRID, {"x": Supervision()}, RANGE, "depth")["x"]
    table.manifest.columns["depth/count"].fingerprint["rule"]["max_depth"] = 9.75  # as if they had another rule
    again = row_targets(table, rows, GRID, {"x": Supervision()}, RANGE, "depth")["x"]
    table.manifest.columns["depth/count"].fingerprint["rule"]["max_depth"] = 10.0
    for field in ("count", "mean", "var", "valid"):
        assert getattr(stored, field).tobytes() == getattr(again, field).tobytes()


def test_early_stopping_and_decay() -> None:
    stopping = EarlyStopping(("rmse", "delta1"), frozenset({"delta1"}), patience=6, decay_start=2, floor=0.1)
    assert stopping.update(1, {"rmse": 2.0, "delta1": 0.5}) == ["rmse", "delta1"]
    assert stopping.update(2, {"rmse": 2.0, "delta1": 0.4}) == []
    assert (stopping.wait, stopping.factor) == (1, 1.0)
    assert stopping.update(3, {"rmse": float("nan"), "delta1": 0.6}) == ["delta1"]
    factors, settings = [], TrainSection(patience=6, epochs=100)
    for epoch in range(4, 10):
        stopping.update(epoch, {"rmse": 3.0, "delta1": 0.1})
        factors.append(stopping.factor)
        assert is_finished(settings, epoch, stopping.wait) == (epoch == 9)
    assert factors == pytest.approx([1.0, 1.0, 0.775, 0.55, 0.325, 0.1])
    assert stopping.kept_epochs == {1, 3}
    other = EarlyStopping(("rmse", "delta1"), frozenset({"delta1"}), 6, 2, 0.1)
    other.restore(stopping.state())
    assert other == stopping


def make_loop(
    cache: Cache, folder: Path, epochs: int, validate: Any = None, train: dict[str, Any] | None = None, **options: Any
) -> Loop:
    torch.manual_seed(5)
    defaults: dict[str, Any] = {"min_depth": 0.1, "max_depth": 10.0, "embedding": {"steps": 2}, "depth": {"steps": 2}}
    shapes = {"clip/patch": (16, 6), "clip/cls": (6,)}
    head = PureClipHead(PureClipOptions.model_validate({**defaults, **options}), shapes, GRID)
    settings = TrainSection(epochs=epochs, batch_size=4, monitor=("rmse",), **(train or {}))
    return Loop(head, make_rows(cache, batch_size=4), settings, frozenset(), validate or _validate, folder)


def _validate(head: Any) -> dict[str, float]:
    return {"rmse": float(sum(p.detach().double().abs().sum() for p in head.parameters()))}


def weights(loop: Loop) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in loop.head.state_dict().items()}


def test_same_seed_same_bits_and_resume_equals_uninterrupted(cache: Cache, tmp_path: Path) -> None:
    first, second = make_loop(cache, tmp_path / "a", 5), make_loop(cache, tmp_path / "b", 5)
    first.run(lambda report: None)

    def stop(report: EpochReport) -> None:
        if report.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.run(stop)
    resumed = make_loop(cache, tmp_path / "b", 5)
    assert resumed.resume()
    assert (resumed.epoch, resumed.step) == (2, 10)
    resumed.run(lambda report: None)
    assert weights(resumed) == weights(first)
    assert resumed.stopping == first.stopping
    for key in ("losses", "metrics", "improved", "factor"):
        assert [h[key] for h in resumed.history] == [h[key] for h in first.history]
    tensors = [checkpoints.load(tmp_path / name / "last.safetensors")[0] for name in "ab"]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_dropout_differs_between_epochs_and_seeds_and_leaves_the_global_stream_alone(cache: Cache, tmp_path: Path) -> None:
    seeds = {}
    for name, seed in (("a", 0), ("b", 1)):
        loop = make_loop(cache, tmp_path / name, 3)
        loop._settings = TrainSection(epochs=3, batch_size=4, monitor=("rmse",), seed=seed)
        seen: list[int] = []
        forward = loop.head.losses

        def spy(batch: Any, phase: str, seen: list[int] = seen, forward: Any = forward) -> Any:
            seen.append(torch.initial_seed())
            return forward(batch, phase)

        loop.head.losses = spy  # type: ignore[method-assign]
        before = torch.random.get_rng_state()
        loop.run(lambda report: None)
        assert torch.equal(before, torch.random.get_rng_state())
        seeds[name] = set(seen)
    assert len(seeds["a"]) == len(seeds["b"]) == 3
    assert not seeds["a"] & seeds["b"]


def test_interrupted_inside_an_epoch_goes_back_to_the_last_whole_one(cache: Cache, tmp_path: Path) -> None:
    whole = make_loop(cache, tmp_path / "a", 3)
    whole.run(lambda report: None)
    calls = iter(range(100))

    def interrupt(head: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return _validate(head)

    with pytest.raises(KeyboardInterrupt):
        make_loop(cache, tmp_path / "b", 3, interrupt).run(lambda report: None)
    resumed = make_loop(cache, tmp_path / "b", 3)
    assert resumed.resume()
    assert resumed.epoch == 1
    resumed.run(lambda report: None)
    assert weights(resumed) == weights(whole)


def test_the_frozen_table_moves_only_in_the_embedding_phase(cache: Cache, tmp_path: Path) -> None:
    moved = {}
    for name, options in {
        "paper": {"embedding": {"steps": 0}},
        "released": {"embedding": {"steps": 0}, "depth": {"steps": 2, "train_table": True}},
    }.items():
        loop = make_loop(cache, tmp_path / name, 1, **options)
        before = loop.head.table.detach().clone()  # type: ignore[operator]
        loop.run(lambda report: None)
        moved[name] = not torch.equal(before, loop.head.table.detach())  # type: ignore[operator]
    assert moved == {"paper": False, "released": True}


def test_two_optimisers_take_turns_like_a_plain_loop(cache: Cache, tmp_path: Path) -> None:
    """The loop against a straightforward one with two AdamW over shared parameters, dropout off."""
    loop = make_loop(cache, tmp_path, 2, dropout=0.0)
    twin = make_loop(cache, tmp_path / "twin", 2, dropout=0.0).head
    everything = list(twin.parameters())
    no_table = [p for name, p in twin.named_parameters() if name != "table"]
    adams = [
        torch.optim.AdamW(everything, lr=3e-4, weight_decay=1e-2),
        torch.optim.AdamW(no_table, lr=1e-3, weight_decay=0.0),
    ]
    step = 0
    for epoch in range(2):
        for batch in make_rows(cache, batch_size=4).epoch(epoch):
            phase = (step // 2) % 2
            for parameter in everything:
                parameter.grad = None
            twin.losses(batch, ("embedding", "depth")[phase])["total"].backward()
            adams[phase].step()
            step += 1
    loop.run(lambda report: None)
    for name, value in loop.head.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=0, atol=0)


def test_learning_rates_decay_while_nothing_improves_and_training_ends(cache: Cache, tmp_path: Path) -> None:
    loop = make_loop(cache, tmp_path, 50, lambda head: {"rmse": 1.0})
    loop._settings = TrainSection(epochs=50, batch_size=4, monitor=("rmse",), patience=5)
    loop.stopping.patience, loop.stopping.decay_start = 5, 1
    rates: list[tuple[float, float]] = []
    loop.run(lambda report: rates.append((report.factor, loop._optimisers["embedding"].param_groups[0]["lr"])))
    factors = [1.0, 1.0, 1.0, 0.775, 0.55, 0.325]
    assert [factor for factor, _ in rates] == pytest.approx(factors)
    assert [rate for _, rate in rates] == pytest.approx([3e-4 * factor for factor in factors])
    assert loop.stopping.wait == 5


def test_only_best_epochs_are_kept(cache: Cache, tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 5.0, 1.0, 4.0])
    make_loop(cache, tmp_path, 5, lambda head: {"rmse": next(values)}).run(lambda report: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0004.safetensors", "last.safetensors"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(cache: Cache, tmp_path: Path) -> None:
    loop = make_loop(cache, tmp_path, 3)

    def poison(report: EpochReport) -> None:
        with torch.no_grad():
            next(loop.head.parameters()).fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"epoch 2: the mean of \w+/\w+ is nan; the last good epoch is 1"):
        loop.run(poison)
    assert checkpoints.read_state(tmp_path / "last.safetensors")["epoch"] == 1


def test_rows_that_teach_nothing_are_an_error(cache: Cache, tmp_path: Path) -> None:
    loop = make_loop(cache, tmp_path, 1)
    nothing = np.zeros((20, 16), dtype=np.float32)
    target = RowTargets(nothing, nothing, nothing, nothing.astype(bool))
    loop.rows.attach(loop.rows._placed, {"embedding": target, "depth": target}, CPU)
    with pytest.raises(TrainingError, match="no training patch has valid depth"):
        loop.run(lambda report: None)
    empty = make_loop(cache, tmp_path, 1)
    empty.rows._settings = TrainSection(batch_size=64, drop_last=True)
    with pytest.raises(TrainingError, match="an epoch has no batch: 20 rows, batch_size"):
        empty.run(lambda report: None)


def test_damaged_and_foreign_checkpoints_are_named(cache: Cache, tmp_path: Path) -> None:
    make_loop(cache, tmp_path, 1).run(lambda report: None)
    with pytest.raises(RunError, match="do not fit the head"):
        make_loop(cache, tmp_path, 2, hidden=2).resume()
    (tmp_path / "last.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CorruptError, match=r"last\.safetensors: the checkpoint is damaged"):
        make_loop(cache, tmp_path, 2).resume()
    with pytest.raises(RunError, match="has not finished its first epoch"):
        checkpoints.read_state(tmp_path / "nothing.safetensors")
