"""Mean depth: of all training pixels, and of each patch position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcd.cache import Cache
from pcd.errors import RecipeError, TrainingError
from pcd.heads import head_options
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.mean import MeanHead, nearest_filled
from pcd.recipe import parse_recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.predict import Predictor
from pcd.stages.runs import Run
from pcd.stages.train import train
from tests.baseline_support import once
from tests.test_extract import run, toy_recipe

GRID = (3, 4)
P = 12


def make_head(**options: Any) -> MeanHead:
    cls, parsed = head_options({"name": "mean", "min_depth": 0.1, "max_depth": 10.0, **options})
    assert cls is MeanHead
    return MeanHead(parsed, {"clip/patch": (P, 6)}, GRID)  # type: ignore[arg-type]


def batches(*, empty: tuple[int, ...] = (), number: int = 3) -> list[Batch]:
    """Batches of 20, 3 and 17 views; positions `empty` have no pixel that counts."""
    generator, found = np.random.default_rng(3), []
    for views in (20, 3, 17)[:number]:
        valid = generator.random((views, P)) < 0.4
        valid[:, list(empty)] = False
        count = (generator.integers(1, 200, (views, P)) * valid).astype(np.float32)
        mean = generator.uniform(0.5, 9, (views, P)).astype(np.float32)
        target = PatchTargets.from_host(count, mean, np.zeros_like(mean), valid, device=torch.device("cpu"))
        other = PatchTargets.from_host(count, mean + 5, np.zeros_like(mean), valid, device=torch.device("cpu"))
        found.append(Batch({}, {"depth": target, "embedding": other}))
    return found


def by_hand(found: list[Batch], position: int | None = None) -> float:
    """Pixel by pixel."""
    total, number = 0.0, 0
    for batch in found:
        target = batch.targets["depth"]
        for view in range(len(target.count)):
            for patch in range(P) if position is None else (position,):
                for _ in range(int(target.count[view, patch])):
                    total += float(target.mean[view, patch])
                    number += 1
    return total / number


def columns(views: int = 5) -> dict[str, torch.Tensor]:
    return {"clip/patch": torch.zeros(views, P, 6, dtype=torch.float16)}


def test_one_depth_for_everything() -> None:
    head, found = make_head(), batches()
    head.initialise(once(*found))
    depth = head.depth(columns())
    assert (depth.shape, depth.dtype) == ((5, P), torch.float32)
    np.testing.assert_allclose(depth.numpy(), by_hand(found), rtol=1e-6)
    assert list(head.parameters()) == []
    assert head.phases() == ()


def test_one_depth_for_each_position() -> None:
    head, found = make_head(per="position"), batches(empty=(5, 11))
    head.initialise(once(*found))
    depth = head.depth(columns(2))
    expected = {patch: by_hand(found, patch) for patch in range(P) if patch not in (5, 11)}
    for patch in range(P):
        # 5 is (1, 1): as near are 4, 6, 1 and 9, of which 4 is leftmost; 11 is (2, 3): 10 and 7 are as near
        source = {5: 4, 11: 10}.get(patch, patch)
        np.testing.assert_allclose(depth[:, patch].numpy(), expected[source], rtol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 9), (13, 7), (20, 31)])
def test_the_nearest_filled_cell_against_every_other_one(shape: tuple[int, int], share: float) -> None:
    generator = np.random.default_rng(int(100 * share))
    filled = generator.random(shape) < share
    filled[generator.integers(shape[0]), generator.integers(shape[1])] = True
    found = nearest_filled(filled)
    cells = [(x, y) for x in range(shape[1]) for y in range(shape[0]) if filled[y, x]]
    for y in range(shape[0]):
        for x in range(shape[1]):
            nearest = min(cells, key=lambda cell: ((cell[0] - x) ** 2 + (cell[1] - y) ** 2, cell[0], cell[1]))
            assert found[y, x] == nearest[1] * shape[1] + nearest[0]


def test_nothing_that_counts_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no training pixel has valid depth"):
        make_head().initialise(once(*batches(empty=tuple(range(P)))))


def test_options() -> None:
    assert MeanHead.reads(make_head(patch_column="clip/cls").options) == ("clip/cls",)
    with pytest.raises(RecipeError, match="'dataset' or 'position'"):
        make_head(per="tile")


def test_state_of_a_new_head_is_as_large_as_that_of_a_made_one() -> None:
    for per in ("dataset", "position"):
        head = make_head(per=per)
        head.initialise(once(*batches()))
        other = make_head(per=per)
        other.load_state_dict(head.state_dict())
        assert torch.equal(other.depth(columns()), head.depth(columns()))


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def trained(cache: Cache, root: Path, **options: Any) -> Run:
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] = {"name": "mean", "min_depth": 2.0, "max_depth": 6.0, **options}
    table["targets"] = {"depth": {"min_present": 0.9}}
    return train(parse_recipe(table, "test"), cache, root, device="cpu")


def pixels(cache: Cache) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Unmirrored training canvases `(N, 16, 16)` in metres, and which pixels count: in range, in full patches."""
    table = cache.table("train")
    rows = table.view_rows(table.usable(), flips=False).reshape(-1)
    metres = table.column("depth/canvas").read(rows) / 1000
    counts = (metres >= 2) & (metres <= 6)
    for view in range(len(rows)):
        for y in range(0, 16, 4):
            for x in range(0, 16, 4):
                if (metres[view, y : y + 4, x : x + 4] > 0).sum() < 0.9 * 16:
                    counts[view, y : y + 4, x : x + 4] = False
    return metres, counts


def test_a_run_from_training_to_prediction(cache: Cache, tmp_path: Path) -> None:
    """Against the pixels themselves; a smaller column gives the same."""
    metres, counts = pixels(cache)
    found = trained(cache, tmp_path / "one")
    (depth,) = found.load_head("last", torch.device("cpu"))[0].state_dict().values()
    assert depth.item() == pytest.approx(metres[counts].mean(), rel=1e-6)
    each = trained(cache, tmp_path / "each", per="position")
    small = trained(cache, tmp_path / "small", per="position", patch_column="clip/cls")
    heads = [run.load_head("abs_rel", torch.device("cpu"))[0] for run in (each, small)]
    expected = [
        metres[:, y : y + 4, x : x + 4][counts[:, y : y + 4, x : x + 4]].mean()
        for y in range(0, 16, 4)
        for x in range(0, 16, 4)
    ]
    for head in heads:
        np.testing.assert_allclose(head.state_dict()["metres"].numpy(), expected, rtol=1e-6)
    scores = [
        evaluate(run, cache, protocols=["eigen"], device="cpu").metrics("eigen")["abs_rel"] for run in (found, each, small)
    ]
    assert scores[1] == scores[2] < scores[0]
    image = np.zeros((24, 40, 3), dtype=np.uint8)
    np.testing.assert_allclose(Predictor(found, device="cpu").predict(image).depth, depth.item(), rtol=1e-5)
