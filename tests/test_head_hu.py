"""Depths by scene and learned prompts: against a re-computation in plain loops, and what the choice of scene does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.errors import RecipeError, TextTowerError, TrainingError
from pcd.heads import head_options
from pcd.heads.base import Batch
from pcd.heads.hu import HuHead
from tests.words_support import (
    GRID,
    RANGE,
    RELEASED,
    TOKEN,
    WIDTH,
    B,
    NoTexts,
    P,
    Texts,
    TinyTower,
    dot,
    learn,
    made,
    make_batch,
    make_columns,
    make_target,
    rows_of,
    slow_depths,
    slow_silog,
    softmax,
    unit,
)

SHAPES = {**RELEASED, "clip/cls": (WIDTH,)}
S = 2
NAMES = ["kitchen", "office", "bedroom"]
BATCH = make_batch(SHAPES)


def make_head(batches: tuple[Batch, ...] = (BATCH,), **options: Any) -> HuHead:
    defaults = {"scenes": S, "token_width": TOKEN, "prompt_vectors": 2, "scene_temperature": 0.5, "temperature": 20.0}
    return made(HuHead, SHAPES, Texts(TinyTower(), batches), **{**defaults, **options})


def stirred(head: HuHead) -> HuHead:
    """Every parameter away from where it starts."""
    with torch.no_grad():
        for value in head.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.3)
    return head


def slow_texts(head: HuHead) -> Tensor:
    if head.options.prompts != "tower":
        return Texts().text(head.phrases(head.options))[:7]
    tower, texts = TinyTower(), []
    assert head.learned is not None
    assert head.learned.shared is not None
    for sentence in head.options.sentences:
        tokens = tower.tokens([f"x x {sentence}"])
        embedded = tower.embed(tokens).clone()
        embedded[0, 0], embedded[0, 1] = head.learned.shared[0], head.learned.shared[1]
        texts.append(tower.encode(embedded, tokens)[0])
    return torch.stack(texts)


def slow_forward(head: HuHead, columns: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """Each view: what scenes it is of, the mean of their depths, and the weighted sum over words at every patch."""
    texts = [unit(text) for text in rows_of(slow_texts(head))]
    if head.offsets is not None:
        texts = [
            unit([a + b for a, b in zip(text, offset, strict=True)])
            for text, offset in zip(texts, rows_of(head.offsets), strict=True)
        ]
    codebook = []
    for steps in rows_of(head.steps):
        depths = [math.log1p(math.exp(step)) for step in steps]
        codebook.append([sum(depths[: k + 1]) for k in range(len(depths))])
    scenes, found = [unit(scene) for scene in rows_of(head.scenes)], []
    for view, cls in zip(columns["clip/layer4"], rows_of(columns["clip/cls"]), strict=True):
        agrees = [dot(unit(cls), scene) for scene in scenes]
        shares = softmax([value / 0.5 for value in agrees])
        if head.options.choice == "hard":
            shares = [1.0 if value == max(agrees) else 0.0 for value in agrees]
        depths = [dot(shares, [row[k] for row in codebook]) for k in range(7)]
        tokens = [unit(token)[::2] for token in rows_of(view)]
        found.append(slow_depths(tokens, texts, depths, 100 / 20.0))
    return np.concatenate(found)


@pytest.mark.parametrize("prompts", ["tower", "joint", "none"])
@pytest.mark.parametrize("choice", [{}, {"choice": "hard"}, {"scene_names": NAMES}])
def test_forward_agrees_with_its_description(prompts: str, choice: dict[str, Any]) -> None:
    head, columns = stirred(make_head(prompts=prompts, **choice)), make_columns(SHAPES)
    expected = slow_forward(head, columns)
    np.testing.assert_allclose(head.depth(columns).detach().reshape(-1), expected, rtol=1e-4)
    found = head.eval().distribution(columns)
    assert found.probabilities.shape == (B, P, 7 * head.options.count)
    np.testing.assert_allclose(found.mean.detach().reshape(-1), expected, rtol=1e-4)


def test_every_scene_begins_with_the_depths_of_the_words_and_they_always_ascend() -> None:
    head = make_head()
    torch.testing.assert_close(head.codebook(), torch.tensor([[1, 1.5, 2, 2.25, 2.5, 2.75, 3.0]] * S))
    with torch.no_grad():
        head.steps.copy_(torch.randn(S, 7, generator=torch.Generator().manual_seed(0)) * 5)
    codebook = head.codebook().detach()
    assert float(codebook.diff(dim=1).min()) > 0
    assert float(codebook.min()) > 0


def test_scenes_begin_as_training_views_that_differ_most() -> None:
    batch = make_batch(SHAPES)
    vectors = torch.tensor([[1.0, 0, 0, 0, 0, 0], [2.0, 0.1, 0, 0, 0, 0], [0, 3.0, 0, 0, 0, 0]])
    views = Batch({**batch.columns, "clip/cls": vectors}, batch.targets)
    head = make_head((views,))
    torch.testing.assert_close(head.scenes.detach(), torch.eye(WIDTH)[:2])
    with pytest.raises(TrainingError, match=r"head.scenes = 4, and there are 3 training rows"):
        make_head((views,), scenes=4)


def test_named_scenes_are_told_apart_by_texts() -> None:
    texts = Texts(TinyTower(), [BATCH])
    head = made(HuHead, SHAPES, texts, scene_names=NAMES, prompts="none")
    assert texts.asked[0][7:] == ("a photo of a kitchen", "a photo of a office", "a photo of a bedroom")
    assert len(texts.asked[0]) == 10
    wanted = [unit(row) for row in rows_of(Texts().text(texts.asked[0])[7:])]
    np.testing.assert_allclose(head.scenes, wanted, rtol=1e-5)
    assert head.codebook().shape == (3, 7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"steps": (S, 7), "scenes": (S, WIDTH), "learned.shared": (2, TOKEN)}),
        ({"choice": "hard"}, {"steps": (S, 7), "learned.shared": (2, TOKEN)}),
        ({"scene_names": NAMES, "prompts": "joint"}, {"steps": (3, 7), "offsets": (7, WIDTH)}),
        ({"scene_names": NAMES, "prompts": "none"}, {"steps": (3, 7)}),
    ],
)
def test_what_is_learned(options: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    head = stirred(make_head(**options))
    (phase,) = head.phases()
    assert {name: tuple(value.shape) for name, value in phase.parameters} == expected
    head.losses(BATCH, "depth")["total"].backward()
    assert all(value.grad is not None and bool(value.grad.any()) for _, value in phase.parameters)


@pytest.mark.parametrize("loss", ["silog", "l1"])
def test_losses_agree_with_their_equations(loss: str) -> None:
    head = stirred(make_head(loss=loss))
    target, depth = BATCH.targets["depth"], slow_forward(head, dict(BATCH.columns))
    chosen = target.flat.tolist()
    truths, pixels = ([float(tensor.flatten()[at]) for at in chosen] for tensor in (target.mean, target.count))
    depths = [float(depth[at]) for at in chosen]
    expected = slow_silog(depths, truths, pixels)
    if loss == "l1":
        expected = sum(n * abs(d - t) for d, t, n in zip(depths, truths, pixels, strict=True)) / sum(pixels)
    assert float(head.losses(BATCH, "depth")["total"].detach()) == pytest.approx(expected, rel=1e-4)
    assert not head.losses(make_batch(SHAPES, empty=True), "depth")["total"].requires_grad


@pytest.mark.parametrize("options", [{}, {"choice": "hard", "prompts": "joint"}, {"scene_names": NAMES}, {"upsample": 2}])
def test_training_learns_and_is_the_same_each_time(options: dict[str, Any]) -> None:
    batch = Batch(BATCH.columns, {"depth": make_target(P * options.get("upsample", 1) ** 2)})
    runs = []
    for _ in range(2):
        head = make_head(**{"lr": 0.05, **options})
        runs.append((learn(head, batch, steps=20), head.state_dict()))
    (losses, state), (again, same) = runs
    assert losses[-1] < losses[0] - 0.1
    assert losses == again
    assert all(torch.equal(state[name], same[name]) for name in state)
    other = HuHead(head.options, SHAPES, GRID)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.eval().depth(batch.columns), head.eval().depth(batch.columns))


def test_views_of_other_scenes_learn_other_depths() -> None:
    """One scene is twice as deep as the other: its codebook alone follows."""
    batch = make_batch(SHAPES)
    vectors = torch.eye(WIDTH)[[0, 1, 1]]
    target = batch.targets["depth"]
    target.mean.copy_(torch.tensor([[2.0], [4.0], [4.0]]).expand(B, P))
    batch = Batch({**batch.columns, "clip/cls": vectors}, {"depth": target})
    head = make_head((batch,), scene_temperature=0.01, lr=0.1, prompts="none", loss="l1")
    losses = learn(head, batch, steps=120)
    assert losses[-1] < 0.2 * losses[0]
    depths = head.eval().depth(batch.columns).mean(dim=1)
    np.testing.assert_allclose(depths.detach(), [2, 4, 4], atol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1, 1.5, 2, 2, 3, 4, 5]}, "the depths of a codebook ascend"),
        ({"choice": "some"}, "choice"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        head_options({"name": "hu", **RANGE, **options})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"\{scene\} is missing"):
        make_head(scene_names=NAMES, scene_template="a room")
    with pytest.raises(RecipeError, match="clip/cls is 4 wide and the texts of scene_names are 6"):
        made(HuHead, {**SHAPES, "clip/cls": (4,)}, Texts(), scene_names=NAMES, prompts="none")
    with pytest.raises(RecipeError, match="one vector a view"):
        made(HuHead, {**SHAPES, "clip/cls": (P, WIDTH)}, Texts(), prompts="none")


@pytest.mark.parametrize("prompts", ["tower", "joint"])
def test_weights_without_a_text_tower_say_so(prompts: str) -> None:
    with pytest.raises(TextTowerError, match="no text tower"):
        made(HuHead, SHAPES, NoTexts(), prompts=prompts)
