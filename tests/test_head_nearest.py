"""Nearest neighbours in token space against brute force in float64, and the memory they are looked up in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcd.cache import Cache
from pcd.errors import RecipeError, TrainingError
from pcd.heads import head_options, nearest
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.nearest import NearestHead
from pcd.recipe import parse_recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.train import train
from tests.baseline_support import once
from tests.test_extract import run, toy_recipe

GRID, D = (3, 4), 8
P = 12
CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]


def make_head(seed: int = 0, shape: tuple[int, ...] = (P, D), **options: Any) -> NearestHead:
    cls, parsed = head_options({"name": "nearest", "min_depth": 0.1, "max_depth": 10.0, "memory": 500, **options})
    assert cls is NearestHead
    torch.manual_seed(seed)
    return NearestHead(parsed, {"clip/patch": shape}, GRID)  # type: ignore[arg-type]


def targets(valid: npt.NDArray[np.bool_], mean: npt.NDArray[np.float32]) -> PatchTargets:
    return PatchTargets.from_host(valid.astype(np.float32), mean, np.zeros_like(mean), valid, device=CPU)


def make_batch(views: int, seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    tokens = torch.from_numpy(generator.normal(0.3, 1, (views, P, D)) * generator.uniform(0.1, 9, (views, P, 1))).half()
    valid = generator.random((views, P)) < 0.6
    mean = generator.uniform(0.5, 9, (views, P)).astype(np.float32)
    return Batch({"clip/patch": tokens}, {"depth": targets(valid, mean)})


def valid_ones(batches: list[Batch]) -> tuple[Floats, Floats]:
    """Tokens and depths of all patches that count, in the order of the table."""
    tokens, depths = [], []
    for batch in batches:
        target = batch.targets["depth"]
        for view, patch in zip(*np.nonzero(target.valid.numpy()), strict=True):
            tokens.append(batch.columns["clip/patch"][view, patch].double().numpy())
            depths.append(float(target.mean[view, patch]))
    return np.array(tokens), np.array(depths)


def brute(queries: Floats, tokens: Floats, depths: Floats, k: int, weights: str, average: str) -> Floats:
    """One patch after the other."""
    found = []
    for query in queries:
        cosine = [float(query @ token) / float(np.linalg.norm(query) * np.linalg.norm(token)) for token in tokens]
        order = sorted(range(len(tokens)), key=lambda at: -cosine[at])[:k]
        weight = [1 / max(1 - cosine[at], 1e-6) if weights == "distance" else 1.0 for at in order]
        values = [np.log(depths[at]) if average == "log" else depths[at] for at in order]
        mean = sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)
        found.append(np.exp(mean) if average == "log" else mean)
    return np.array(found)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("average", ["log", "depth"])
@pytest.mark.parametrize("k", [1, 7])
def test_against_brute_force(monkeypatch: pytest.MonkeyPatch, k: int, average: str, weights: str) -> None:
    """In one block, and in blocks and queries that do not divide the numbers there are."""
    batches = [make_batch(9, 1), make_batch(5, 2)]
    head = make_head(k=k, average=average, weights=weights)
    head.initialise(once(*batches))
    tokens, depths = valid_ones(batches)
    queries = make_batch(3, 4).columns["clip/patch"]
    expected = brute(queries.double().numpy().reshape(-1, D), tokens, depths, k, weights, average)
    for block, size in ((8192, 2048), (7, 5), (1, 100)):
        monkeypatch.setattr(nearest, "BLOCK", block)
        monkeypatch.setattr(nearest, "QUERIES", size)
        found = head.depth({"clip/patch": queries})
        assert (found.shape, found.dtype) == ((3, P), torch.float32)
        np.testing.assert_allclose(found.numpy().reshape(-1), expected, rtol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(head.depth({"clip/patch": queries}).numpy().reshape(-1), expected, rtol=2e-5)


def test_a_training_token_finds_its_own_depth() -> None:
    batches = [make_batch(4, 1)]
    head = make_head(k=3)
    head.initialise(once(*batches))
    target = batches[0].targets["depth"]
    found = head.depth(batches[0].columns).reshape(-1)[target.flat]
    np.testing.assert_allclose(found, target.mean.reshape(-1)[target.flat], rtol=1e-3)


def test_fewer_tokens_than_neighbours_and_none() -> None:
    batch = make_batch(1, 1)
    head = make_head(k=400, weights="uniform", average="depth")
    head.initialise(once(batch))
    target = batch.targets["depth"]
    assert int(head.kept) == len(target.flat) < 400
    expected = target.mean.reshape(-1)[target.flat].double().mean().item()
    np.testing.assert_allclose(head.depth(make_batch(2, 2).columns).numpy(), expected, rtol=1e-5)
    nothing = targets(np.zeros((1, P), dtype=np.bool_), np.zeros((1, P), dtype=np.float32))
    with pytest.raises(TrainingError, match="no training patch has valid depth"):
        head.initialise(once(Batch(batch.columns, {"depth": nothing})))
    with pytest.raises(TrainingError, match="tokens of clip/patch are beyond float16"):
        head.initialise(once(Batch({"clip/patch": torch.full((1, P, D), 1e5)}, batch.targets)))


def test_a_copy_that_loads_a_state_knows_how_much_it_keeps() -> None:
    made, other = make_head(), make_head(seed=1)
    made.initialise(once(make_batch(3, 1)))
    twin = copy.deepcopy(other)
    twin.load_state_dict(made.state_dict())
    queries = make_batch(2, 2).columns
    assert torch.equal(twin.depth(queries), made.depth(queries))
    assert (other._filled, twin._filled) == (0, int(made.kept))


def rows_of(head: NearestHead) -> set[bytes]:
    return {row.numpy().tobytes() for row in head.tokens[: int(head.kept)]}


def test_the_memory_is_drawn_by_the_seed_alone() -> None:
    batches = [make_batch(30, 1), make_batch(30, 2)]
    parts = [part(batch, slice(at, at + 7)) for batch in batches for at in range(0, 30, 7)]
    heads = [make_head(seed, memory=50) for seed in (0, 0, 1)]
    for head, read in zip(heads, (batches, parts, batches), strict=True):
        head.initialise(once(*read))
        assert int(head.kept) == 50
    assert torch.equal(heads[0].tokens, heads[1].tokens)
    assert torch.equal(heads[0].metres, heads[1].metres)
    assert rows_of(heads[0]) != rows_of(heads[2])
    tokens, depths = valid_ones(batches)
    for token, metres in zip(heads[0].tokens.double().numpy(), heads[0].metres.tolist(), strict=True):
        (place,) = np.flatnonzero((tokens == token).all(axis=1))
        assert depths[place] == metres


def part(batch: Batch, views: slice) -> Batch:
    """Some views of a batch."""
    target = batch.targets["depth"]
    own = targets(target.valid[views].numpy(), target.mean[views].numpy())
    return Batch({"clip/patch": batch.columns["clip/patch"][views]}, {"depth": own})


def test_every_patch_is_as_likely_to_be_kept() -> None:
    """400 draws of 10 among some 140: each is expected 28 times or so, and none is off by five standard deviations."""
    batches = [make_batch(10, 1), make_batch(10, 2)]
    tokens, _ = valid_ones(batches)
    places = {row.astype(np.float16).tobytes(): at for at, row in enumerate(tokens)}
    seen = np.zeros(len(tokens))
    for seed in range(400):
        head = make_head(seed, memory=10, k=1)
        head.initialise(once(*batches))
        for row in rows_of(head):
            seen[places[row]] += 1
    share = 10 / len(tokens)
    assert seen.sum() == 4000
    assert np.abs(seen - 400 * share).max() < 5 * np.sqrt(400 * share * (1 - share))


def test_maps_are_looked_up_as_well() -> None:
    batch = make_batch(2, 1)
    flat, maps = make_head(), make_head(shape=(*GRID, D))
    flat.initialise(once(batch))
    maps.initialise(once(Batch({"clip/patch": batch.columns["clip/patch"].reshape(2, *GRID, D)}, batch.targets)))
    queries = make_batch(2, 3).columns["clip/patch"]
    found = maps.depth({"clip/patch": queries.reshape(2, *GRID, D)})
    assert torch.equal(found, flat.depth({"clip/patch": queries}))


def test_options() -> None:
    with pytest.raises(RecipeError, match="k = 9 neighbours do not fit into a memory of 4 tokens"):
        make_head(k=9, memory=4)
    with pytest.raises(RecipeError, match="one vector a view"):
        make_head(shape=(D,))
    _, options = head_options({"name": "nearest", "min_depth": 0.1, "max_depth": 10.0, "patch_column": "timm/patch@3"})
    assert NearestHead.reads(options) == ("timm/patch@3",)  # type: ignore[arg-type]
    assert (make_head().phases(), list(make_head().parameters())) == ((), [])


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def test_a_run_from_training_to_scores(cache: Cache, tmp_path: Path) -> None:
    """Colour says how far things are, so neighbours know much more than the mean; any place for columns gives the same."""
    scores = {}
    heads: dict[str, dict[str, Any]] = {"mean": {}, "near": {"k": 3}, "few": {"memory": 16}}
    for name, options in heads.items():
        table = toy_recipe().model_dump(exclude_none=True)
        table["head"] = {"name": "mean" if name == "mean" else "nearest", "min_depth": 0.1, "max_depth": 10.0, **options}
        found = train(parse_recipe(table, "test"), cache, tmp_path / name, device="cpu")
        scores[name] = evaluate(found, cache, protocols=["eigen"], device="cpu").metrics("eigen")["abs_rel"]
        if name != "mean":
            streamed = train(parse_recipe(table, "test"), cache, tmp_path / f"{name}-2", device="cpu", residency="stream")
            states = [each.load_head("last", CPU)[0].state_dict() for each in (found, streamed)]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert scores["near"] < scores["few"] < scores["mean"]
    assert scores["near"] < 0.5 * scores["mean"]
