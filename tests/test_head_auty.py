"""Learned words for depth: against a re-computation, through a real text tower, and without one once they are learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcd.errors import RecipeError, RunError, TextTowerError
from pcd.heads.auty import AutyHead, AutyOptions
from pcd.heads.base import Head
from pcd.training import checkpoints
from pcd.training.loop import Loop
from pcd.training.steps import Average
from tests.words_support import (
    GRID,
    JOINT,
    RANGE,
    RELEASED,
    TOKEN,
    WIDTH,
    B,
    P,
    Rows,
    Texts,
    TinyTower,
    learn,
    made,
    make_batch,
    make_columns,
    rows_of,
    slow_depths,
    slow_silog,
    unit,
)

K = 5


def make_head(shapes: dict[str, tuple[int, ...]] = RELEASED, tower: TinyTower | None = None, **options: Any) -> AutyHead:
    return made(AutyHead, shapes, Texts(tower or TinyTower()), **{"bins": K, "token_width": TOKEN, **options})


def slow_texts(head: AutyHead, sentence: str, tower: TinyTower) -> Tensor:
    """Each sentence alone through the tower, its vectors put in one by one. `o` and `d` stand for one vector each."""
    texts = []
    for k in range(K):
        words = sentence.split()
        tokens = tower.tokens([" ".join(words)])
        embedded = tower.embed(tokens).clone()
        for kind, vectors in (("o", head.prompts.shared), ("d", None if head.prompts.own is None else head.prompts.own[k])):
            for number, place in enumerate(at for at, word in enumerate(words) if word == kind):
                assert vectors is not None
                embedded[0, place] = vectors[number]
        texts.append(tower.encode(embedded, tokens)[0])
    return torch.stack(texts)


def centres(spacing: str, low: float, high: float) -> list[float]:
    if spacing == "even":
        return [low + (i + 0.5) * (high - low) / K for i in range(K)]
    return [math.exp(math.log(low) + (i + 0.5) * (math.log(high) - math.log(low)) / K) for i in range(K)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "This object is d"),
        ({"template": "This {object} appears to be {depth}"}, "This object appears to be d"),
        ({"object_vectors": 1, "spacing": "log"}, "This o is d"),
        ({"object_vectors": 1, "depth_vectors": 2, "text_norm": "rows"}, "This o is d d"),
        ({"object_vectors": 4, "depth_vectors": 4, "bins_from": 1e-3, "bins_to": 80.0}, "This o o o o is d d d d"),
    ],
)
def test_forward_agrees_with_the_released_code(options: dict[str, Any], sentence: str) -> None:
    tower = TinyTower()
    head, columns = make_head(tower=tower, **options), make_columns(RELEASED)
    tokens = [unit(token)[::2] for token in rows_of(columns["clip/layer4"])]
    texts = [unit(text) for text in rows_of(slow_texts(head, sentence, tower))]
    if options.get("text_norm") != "rows":
        norm = math.sqrt(sum(value * value for text in texts for value in text))
        assert norm == pytest.approx(math.sqrt(K))
        texts = [[value / norm for value in text] for text in texts]
    depths = centres(options.get("spacing", "even"), options.get("bins_from", 0.1), options.get("bins_to", 10.0))
    expected = slow_depths(tokens, texts, depths, 100 / 0.1)
    np.testing.assert_allclose(head.depth(columns).detach().reshape(-1), expected, rtol=1e-3)
    np.testing.assert_allclose(head.eval().depth(columns).reshape(-1), expected, rtol=1e-3)
    torch.testing.assert_close(head.distribution(columns).mean, head.depth(columns))


def test_in_the_joint_space() -> None:
    tower = TinyTower()
    head, columns = make_head(JOINT, tower, space="joint", text_norm="rows", logit_scale=1.0), make_columns(JOINT)
    tokens: Rows = [unit(token) for token in rows_of(columns["clip/patch"])]
    texts = [unit(text) for text in rows_of(slow_texts(head, "This object is d", tower))]
    expected = slow_depths(tokens, texts, centres("even", 0.1, 10), 10)
    np.testing.assert_allclose(head.depth(columns).detach().reshape(-1), expected, rtol=1e-5)


def test_loss_agrees_with_its_equation() -> None:
    head, batch = make_head(), make_batch(RELEASED)
    target, depth = batch.targets["depth"], head.depth(batch.columns).detach().double().flatten()
    chosen = target.flat.tolist()
    values = [[float(tensor.flatten()[at]) for at in chosen] for tensor in (depth, target.mean, target.count)]
    assert float(head.losses(batch, "depth")["total"].detach()) == pytest.approx(slow_silog(*values), rel=1e-4)
    assert not head.losses(make_batch(RELEASED, empty=True), "depth")["total"].requires_grad


@pytest.mark.parametrize(
    ("bins", "objects", "depths", "expected"),
    [(7, 0, 1, 7 * 512), (20, 0, 1, 20 * 512), (128, 1, 1, 129 * 512), (256, 4, 4, (256 * 4 + 4) * 512)],
)
def test_parameters_are_one_vector_for_each_learned_word(bins: int, objects: int, depths: int, expected: int) -> None:
    options = AutyOptions.model_validate({**RANGE, "bins": bins, "object_vectors": objects, "depth_vectors": depths})
    torch.manual_seed(0)
    head = AutyHead(options, {"clip/layer4": (13, 17, 2048)}, (13, 17))
    assert sum(value.numel() for value in head.parameters()) == expected
    assert head.prompts.own is not None
    assert float(head.prompts.own.detach().std()) == pytest.approx(0.02, rel=0.05)
    (phase,) = head.phases()
    assert (phase.optimiser, phase.lr, phase.weight_decay) == ("adamw", 3.57e-4, 0.1)


@pytest.mark.parametrize("options", [{}, {"object_vectors": 2, "spacing": "log"}, {"space": "joint"}, {"upsample": 2}])
def test_training_learns_and_is_the_same_each_time(options: dict[str, Any]) -> None:
    shapes = JOINT if options.get("space") == "joint" else RELEASED
    runs = []
    for _ in range(2):
        tower = TinyTower()
        before = [value.clone() for value in (*tower.layer.parameters(), tower.table, tower.projection)]
        head = make_head(shapes, tower, **{"lr": 0.05, "logit_scale": 2.0, **options})
        losses = learn(head, make_batch(shapes, P * options.get("upsample", 1) ** 2), steps=15)
        runs.append((losses, head.state_dict()))
        after = (*tower.layer.parameters(), tower.table, tower.projection)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    (losses, state), (again, same) = runs
    assert losses[-1] < losses[0] - 0.1
    assert losses == again
    assert all(torch.equal(state[name], same[name]) for name in state)


def test_a_saved_head_needs_no_tower(tmp_path: Path) -> None:
    head, columns = make_head(object_vectors=2, lr=0.05), make_columns(RELEASED)
    learn(head, make_batch(RELEASED), steps=3)
    assert head.training
    checkpoints.save(tmp_path / "head.safetensors", checkpoints.weights_of(head), {})  # taken while training
    assert sorted(head.state_dict()) == ["prompts.own", "prompts.shared", "prompts.text"]
    tensors, _ = checkpoints.load(tmp_path / "head.safetensors")
    other = AutyHead(head.options, RELEASED, GRID)
    checkpoints.load_weights(other, tensors, tmp_path)
    assert torch.equal(other.eval().depth(columns), head.eval().depth(columns))
    other.train()
    with pytest.raises(TextTowerError, match="no text tower is attached"):
        other.losses(make_batch(RELEASED), "depth")


def test_the_texts_follow_averaged_weights() -> None:
    """Validation and checkpoints see the average; afterwards training goes on from the weights themselves."""
    head, columns = make_head(lr=0.05), make_columns(RELEASED)
    average = Average(head.phases(), 0.9)
    learn(head, make_batch(RELEASED), steps=5)
    own = head.depth(columns).detach()
    with average.in_place(), torch.inference_mode():
        averaged = head.eval().depth(columns)
        state = {name: value.clone() for name, value in head.state_dict().items()}
    assert not torch.allclose(averaged, own)
    first = make_head()  # the average has not been moved: it is what the head began with
    assert torch.equal(state["prompts.text"], first.eval().state_dict()["prompts.text"])
    assert torch.equal(averaged, first.depth(columns))
    assert torch.equal(head.train().depth(columns).detach(), own)
    assert math.isfinite(learn(head, make_batch(RELEASED), steps=1)[0])  # what inference mode has touched can still be learned


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "item"):
            raise RunError(f"{name}: the host waits")
        return func(*args, **(kwargs or {}))


def test_a_step_and_a_change_of_mode_never_wait_for_the_device() -> None:
    head, batch = make_head(object_vectors=1, upsample=2), make_batch(RELEASED, 4 * P)
    head.prompts.through_tower()
    with NoWaiting():
        head.losses(batch, "depth")["total"].backward()
        head.eval().depth(batch.columns)
        head.train().state_dict()


def test_the_loop_trains_it_and_a_run_without_a_tower_gives_the_same(tmp_path: Path) -> None:
    """With an average of weights, as `pcd train` does it."""
    from pcd.recipe import TrainSection

    class Rows:
        """Three batches an epoch."""

        rows = np.arange(3 * B)

        def steps(self) -> int:
            return 3

        def epoch(self, epoch: int) -> Any:
            return iter([make_batch(RELEASED)] * 3)

    seen: list[Tensor] = []

    def validate(head: Head) -> dict[str, float]:
        with torch.inference_mode():
            seen.append(head.eval().depth(make_columns(RELEASED)).clone())
        return {"abs_rel": 1.0 / len(seen)}

    settings = TrainSection(epochs=3, ema=0.5, monitor=("abs_rel",), decay="onecycle", grad_clip=0.1)
    head = make_head(lr=0.05)
    rows: Any = Rows()
    Loop(head, rows, settings, frozenset(), validate, tmp_path).run(lambda report: None)
    assert not torch.equal(seen[0], seen[2])
    for file in ("last.safetensors", "epoch-0003.safetensors"):
        other = AutyHead(head.options, RELEASED, GRID)
        checkpoints.load_weights(other, checkpoints.load(tmp_path / file)[0], tmp_path)
        assert torch.equal(other.eval().depth(make_columns(RELEASED)), seen[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_width": 7}, "set head.token_width = 5"),
        ({"template": "how far"}, "{depth} is missing"),
        ({"template": "it is {depth}", "object_vectors": 1}, "{object} is missing"),
        ({"template": "{depth} and {depth}"}, "{own}, once"),
        ({"template": "it is{depth}m"}, "does not read 'x' and 'q' as one token each"),
        ({"min_depth": 0.0, "spacing": "log"}, "give a range above 0"),
        ({"bins_from": 12.0}, "bins from 12.0 to 10.0 m"),
    ],
)
def test_what_cannot_be_learned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_head(**{"depth_vectors": 2, **options})


def test_texts_of_another_width_are_refused() -> None:
    with pytest.raises(RecipeError, match=f"are 9 wide, and {K} of width {WIDTH}"):
        make_head(tower=TinyTower(out=9))


def test_weights_without_a_text_tower_say_so() -> None:
    with pytest.raises(TextTowerError, match="no text tower here"):
        made(AutyHead, RELEASED, Texts(), bins=K, token_width=TOKEN)
