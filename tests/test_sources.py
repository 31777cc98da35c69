"""Where columns lie while training, and that it changes nothing but the place."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcd.cache import Cache
from pcd.errors import UsageError
from pcd.stages.demo import ShuffledTokens
from pcd.stages.recipes import training_recipe
from pcd.stages.train import prepare, train
from pcd.training import sources
from pcd.training.sources import HeldRows, Placed, StreamedRows, held_bytes, place_rows
from pcd.training.steps import Products, Randomness
from tests.sweep_support import SHORT, toy_cache, weights
from tests.test_training import COLUMNS, CPU, make_rows
from tests.toy import Said

NARROW = 'targets.embedding={mask="garg"}', 'targets.depth={mask="garg", max_depth=5.0}'
"""Rules under which some patches never count."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return toy_cache(tmp_path_factory.mktemp("toy"))


def trained(cache: Cache, root: Path, residency: str, **options: Any) -> dict[str, torch.Tensor]:
    recipe = training_recipe(cache, None, [*SHORT, *NARROW])
    return weights(train(recipe, cache, root, device="cpu", residency=residency, **options).root)  # type: ignore[arg-type]


def test_the_weights_are_the_same_bits_wherever_columns_lie(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = trained(cache, tmp_path / "stream", "stream")
    whole = trained(cache, tmp_path / "host", "host")
    monkeypatch.setattr(sources, "WORTH_LEAVING_OUT", 1.0)
    for residency in ("auto", "device", "host"):
        held = trained(cache, tmp_path / f"kept-{residency}", residency)
        for name, value in streamed.items():
            assert torch.equal(held[name], value), (residency, name)
            assert torch.equal(whole[name], value), name


def test_what_moves_patches_sees_all_of_them(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's shuffled tokens: nothing may be left out that they could bring to a patch that counts."""
    streamed = trained(cache, tmp_path / "stream", "stream", through=ShuffledTokens)
    monkeypatch.setattr(sources, "WORTH_LEAVING_OUT", 1.0)
    held = trained(cache, tmp_path / "host", "host", through=ShuffledTokens)
    assert all(torch.equal(held[name], value) for name, value in streamed.items())


def test_patches_that_never_count_are_not_held(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    monkeypatch.setattr(sources, "WORTH_LEAVING_OUT", 1.0)
    prepare(training_recipe(cache, None, [*SHORT, *NARROW]), cache, tmp_path / "run", device="cpu", progress=said)
    line = next(text for text in said if text.startswith("train: "))
    assert "of patches that never count" in line
    assert "held in memory" in line
    assert "never count" not in next(text for text in said if text.startswith("val: "))


def test_a_batch_has_the_kept_patches_and_zeros_elsewhere(cache: Cache) -> None:
    table, rows = cache.table("train"), make_rows(cache).rows
    keep = np.random.default_rng(4).random((len(rows), 16)) < 0.4
    keep[3], keep[5] = False, True
    held, whole = HeldRows(table, COLUMNS, rows, CPU, keep=keep), StreamedRows(table, COLUMNS, CPU)
    some = np.random.default_rng(0).permutation(len(rows))[:9]
    some[0], some[1] = 3, 5
    got, expected = held.read(rows[some]), whole.read(rows[some])
    for place, number in enumerate(some):
        for patch in range(16):
            value = expected["clip/patch"][place, patch] if keep[number, patch] else torch.zeros(6, dtype=torch.float16)
            assert torch.equal(got["clip/patch"][place, patch], value)
    assert torch.equal(got["clip/cls"], expected["clip/cls"])
    column = table.column("clip/patch")
    assert held_bytes(column, len(rows), keep) == keep.sum() * 6 * 2
    assert held_bytes(column, len(rows), None) == len(rows) * 16 * 6 * 2
    assert held_bytes(table.column("clip/cls"), len(rows), keep) == len(rows) * 6 * 4


def test_auto_takes_what_fits(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice for a GPU too, from sizes alone: there need not be one."""
    assert sources._chosen("auto", 60, 1000, 100) == "device"
    assert sources._chosen("auto", 80, 1000, 100) == "host"
    assert sources._chosen("auto", 600, 1000, 100) == "stream"
    assert sources._chosen("auto", 60, 1000, 0) == "host"
    assert sources._chosen("host", 60, 1000, 100) == "host"
    table, rows = cache.table("train"), make_rows(cache).rows
    monkeypatch.setattr(sources, "SHARE_OF_MEMORY", 0.0)
    placed = place_rows(table, COLUMNS, rows, "auto", CPU)
    assert isinstance(placed.source, StreamedRows)
    assert "read from the cache batch by batch" in placed.words


def test_reading_ahead_changes_no_batch_and_leaves_no_thread(cache: Cache) -> None:
    plain, early = make_rows(cache, batch_size=3), make_rows(cache, batch_size=3)
    source = StreamedRows(cache.table("train"), COLUMNS, CPU)
    running = set(threading.enumerate())
    for depth in (1, 2, 50):
        found = list(early.read(2, Placed(source, "", ahead=depth)))
        for loaded, own in zip(plain.read(2), found, strict=True):
            np.testing.assert_array_equal(loaded.rows, own.rows)
            assert all(torch.equal(own.columns[name], loaded.columns[name]) for name in COLUMNS)
    batches = early.read(0, Placed(source, "", ahead=2))
    next(batches)
    batches.close()
    assert {thread for thread in threading.enumerate() if thread.name.startswith("pcd-decode")} <= running


def test_random_numbers_of_a_training_are_its_own() -> None:
    def draw() -> list[float]:
        return torch.rand(3).tolist()

    torch.manual_seed(9)
    alone = [draw(), draw()]
    before = torch.get_rng_state()
    first, second = Randomness(9, CPU), Randomness(10, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = []
    for _ in range(2):
        with first.own():
            drawn.append(draw())
        with second.own():
            assert draw() not in alone
    assert drawn == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_products_in_bf16_are_close_and_nothing_else_is_rounded(cache: Cache, tmp_path: Path) -> None:
    exact = trained(cache, tmp_path / "fp32", "host")
    recipe = training_recipe(cache, None, [*SHORT, *NARROW, "train.precision=bf16"])
    rounded = weights(train(recipe, cache, tmp_path / "bf16", device="cpu").root)
    assert all(value.dtype == torch.float32 for value in rounded.values())
    assert any(not torch.equal(value, rounded[name]) for name, value in exact.items())
    for name in ("weights.phi.1.weight", "weights.psi.4.weight", "weights.table"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.1, atol=0.02)


def test_products_know_their_device(cache: Cache, tmp_path: Path) -> None:
    said = Said()
    with pytest.raises(UsageError, match='"tf32" is a mode of CUDA GPUs'):
        prepare(training_recipe(cache, None, ["train.precision=tf32"]), cache, tmp_path / "run", device="cpu", progress=said)
    assert said == []  # nothing was read
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match='"tf32" is a mode of CUDA GPUs, and this is a cpu'):
        Products("tf32", CPU)
    a, b = torch.full((4, 4), 1 / 3), torch.eye(4)
    with Products("bf16", CPU).forward():
        assert (a @ b).dtype == torch.bfloat16
    with Products("fp32", CPU).used(), Products("fp32", CPU).forward():
        assert torch.equal(a @ b, a)
