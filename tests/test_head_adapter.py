"""CLIP-Adapter on DepthCLIP against a re-computation in plain loops, its losses against equations 7 and 8."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcd.errors import RecipeError, TextTowerError
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.depthclip_adapter import AdapterOptions, DepthClipAdapterHead
from pcd.heads.words import DEPTHS, WORDS
from pcd.recipe import parse_recipe
from pcd.smoothness import smoothness
from pcd.stages.extract import extract
from pcd.stages.train import train
from tests.test_extract import toy_recipe
from tests.words_support import (
    CPU,
    GRID,
    JOINT,
    RANGE,
    RELEASED,
    B,
    NoTexts,
    P,
    Rows,
    Texts,
    dot,
    learn,
    made,
    make_batch,
    make_columns,
    make_target,
    rows_of,
    slow_depths,
    unit,
)

SMALL: dict[str, Any] = {"image": {"reduction": 4}, "text": {"reduction": 3}}
WITH_PIXELS = {**RELEASED, "pixels/rgb": (4, 6, 3)}


def make_head(shapes: dict[str, tuple[int, ...]] = RELEASED, **options: Any) -> DepthClipAdapterHead:
    return made(DepthClipAdapterHead, shapes, Texts(), **{**SMALL, **options})


def slow_adapter(rows: Rows, down: Rows, up: Rows, weight: float) -> Rows:
    """`w ReLU(W2 ReLU(W1 x)) + (1 - w) x`."""
    found = []
    for row in rows:
        narrow = [max(dot(line, row), 0.0) for line in down]
        adapted = [max(dot(line, narrow), 0.0) for line in up]
        found.append([weight * a + (1 - weight) * x for a, x in zip(adapted, row, strict=True)])
    return found


def slow_forward(head: DepthClipAdapterHead, columns: dict[str, torch.Tensor], weight: float) -> Any:
    state = {name: rows_of(value) for name, value in head.named_parameters()}
    tokens = rows_of(columns["clip/layer4"])
    tokens = slow_adapter(tokens, state["image_adapter.down.weight"], state["image_adapter.up.weight"], weight)
    texts = rows_of(Texts().text(WORDS))
    texts = slow_adapter(texts, state["text_adapter.down.weight"], state["text_adapter.up.weight"], weight)
    return slow_depths([unit(token[::2]) for token in tokens], [unit(text) for text in texts], DEPTHS, 1 / 0.1)


@pytest.mark.parametrize("weight", [0.2, 0.7])
def test_forward_agrees_with_the_equations(weight: float) -> None:
    head = make_head(image={"reduction": 4, "weight": weight}, text={"reduction": 3, "weight": weight})
    columns = make_columns(RELEASED)
    expected = slow_forward(head, columns, weight)
    np.testing.assert_allclose(head.depth(columns).detach().reshape(-1), expected, rtol=1e-5)
    torch.testing.assert_close(head.distribution(columns).mean, head.depth(columns))


def test_parameters_of_an_rn50_are_those_published() -> None:
    options = AdapterOptions.model_validate(RANGE)
    head = DepthClipAdapterHead(options, {"clip/layer4": (13, 17, 2048)}, (13, 17))
    sizes = {name: tuple(value.shape) for name, value in head.named_parameters()}
    assert sizes == {
        "image_adapter.down.weight": (8, 2048),
        "image_adapter.up.weight": (2048, 8),
        "text_adapter.down.weight": (8, 1024),
        "text_adapter.up.weight": (1024, 8),
    }
    assert sum(value.numel() for value in head.parameters()) == 2 * 2048 * 8 + 2 * 1024 * 8 == 49_152
    (phase,) = head.phases()
    assert (phase.optimiser, phase.lr, phase.momentum, phase.weight_decay) == ("sgd", 0.02, 0.9, 1e-4)


@pytest.mark.parametrize(("part", "left"), [("image", ["text_adapter"]), ("text", ["image_adapter"])])
def test_an_adapter_of_weight_0_is_not_made(part: str, left: list[str]) -> None:
    """Table 4 has rows with one of the two."""
    head = make_head(**{**SMALL, part: {"weight": 0.0}})
    assert sorted({name.partition(".")[0] for name, _ in head.named_parameters()}) == left
    assert make_head(image={"weight": 0.0}, text={"weight": 0.0}).phases() == ()


def test_a_bottleneck_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"head.image.reduction = 256 leaves nothing of 12 channels"):
        made(DepthClipAdapterHead, RELEASED, Texts())


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_error_of_depths_agrees_with_equation_8(mask: bool, loss: str) -> None:
    head, batch = make_head(mask=mask, loss=loss), make_batch(RELEASED)
    depths, target = slow_forward(head, dict(batch.columns), 0.2), batch.targets["depth"]
    total, pixels = 0.0, 0.0
    for depth, truth, count, valid in zip(
        depths,
        target.mean.double().flatten().tolist(),
        target.count.flatten().tolist(),
        target.valid.flatten().tolist(),
        strict=True,
    ):
        away = depth - (truth if valid else 0.0)
        weight = (count if valid else 0.0) if mask else 1.0
        total += weight * (abs(away) if loss == "l1" else away * away)
        pixels += weight
    losses = head.losses(batch, "depth")
    assert float(losses[loss].detach()) == pytest.approx(total / pixels, rel=1e-5)
    torch.testing.assert_close(losses["total"], losses[loss] + 1e-3 * losses["smoothness"])


def slow_smoothness(depth: npt.NDArray[np.float64], image: npt.NDArray[np.float64], sign: int) -> float:
    total = 0.0
    number, height, width = depth.shape
    for b in range(number):
        for y in range(height):
            for x in range(width):
                for v, u in ((y, x + 1), (y + 1, x)):
                    if v < height and u < width:
                        edge = math.sqrt(sum((image[b, c, v, u] - image[b, c, y, x]) ** 2 for c in range(3)))
                        total += abs(float(depth[b, v, u] - depth[b, y, x])) * math.exp(sign * edge)
    return float(total / (number * height * width))


@pytest.mark.parametrize(("edges", "sign"), [("none", 0), ("aware", -1), ("printed", 1)])
def test_smoothness_agrees_with_equation_7(edges: str, sign: int) -> None:
    """The view is averaged over the cells of the depths: here 2x2 pixels each."""
    head, batch = make_head(WITH_PIXELS, edges=edges), make_batch(WITH_PIXELS)
    assert head.reads(head.options) == (("clip/layer4",) if edges == "none" else ("clip/layer4", "pixels/rgb"))
    depth = head.depth(batch.columns).detach().double().reshape(B, *GRID).numpy()
    rgb = batch.columns["pixels/rgb"].double().numpy() / 255
    image = np.zeros((B, 3, *GRID))
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            image[:, :, y, x] = sum(rgb[:, 2 * y + dy, 2 * x + dx] for dy in (0, 1) for dx in (0, 1)) / 4
    expected = slow_smoothness(depth, image, sign)
    assert float(head.losses(batch, "depth")["smoothness"].detach()) == pytest.approx(expected, rel=1e-5)


def test_smoothness_of_a_ramp_is_its_slope() -> None:
    ramp = (torch.arange(5.0) * 0.5).repeat(4, 1)[None]
    assert float(smoothness(ramp)) == pytest.approx(0.5 * 4 / 5)
    assert float(smoothness(torch.full((2, 3, 3), 4.0), torch.rand(2, 3, 3, 3))) == 0


def test_pixels_must_fit_the_depths() -> None:
    with pytest.raises(RecipeError, match="pixels/rgb"):
        make_head({**RELEASED, "pixels/rgb": (5, 6, 3)}, edges="aware")


def test_finer_depths_are_interpolated_with_aligned_corners() -> None:
    """The published loss is of pixels: `upsample` brings targets and depths onto a finer grid."""
    head, columns = make_head(upsample=4), make_columns(RELEASED)
    assert head.grid == (8, 12)
    coarse = make_head().depth(columns).reshape(B, 1, *GRID)
    fine = torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=True)
    torch.testing.assert_close(head.depth(columns).reshape(B, 1, 8, 12), fine)
    torch.testing.assert_close(head.distribution(columns).mean, head.depth(columns))
    losses = head.losses(Batch(columns, {"depth": make_target(8 * 12)}), "depth")
    assert math.isfinite(float(losses["total"].detach()))


@pytest.mark.parametrize("options", [{}, {"optimiser": "adamw", "lr": 1e-2}, {"space": "joint"}, {"upsample": 2}])
def test_training_learns_and_is_the_same_each_time(options: dict[str, Any]) -> None:
    shapes = JOINT if options.get("space") == "joint" else RELEASED
    cells = P * options.get("upsample", 1) ** 2
    runs = []
    for _ in range(2):
        head = make_head(shapes, **{"lr": 0.05, "image": {"reduction": 2, "weight": 0.8}, **options})
        runs.append((learn(head, make_batch(shapes, cells)), head.state_dict()))
    (losses, state), (again, same) = runs
    assert losses[-1] < 0.95 * losses[0]
    assert losses == again
    assert all(torch.equal(state[name], same[name]) for name in state)


def test_without_ground_truth_nothing_is_taught() -> None:
    batch = make_batch(RELEASED, empty=True)
    assert not make_head().losses(batch, "depth")["total"].requires_grad
    arrays = (np.zeros((B, P), np.float32),) * 3
    unknown = PatchTargets.from_host(*arrays, np.zeros((B, P), bool), device=CPU)
    assert make_head(mask=False).losses(Batch(batch.columns, {"depth": unknown}), "depth")["total"].requires_grad


def test_a_saved_head_needs_no_texts() -> None:
    head, columns = make_head(), make_columns(RELEASED)
    learn(head, make_batch(RELEASED), steps=3)
    other = DepthClipAdapterHead(head.options, RELEASED, GRID)
    other.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(other.eval().depth(columns), head.eval().depth(columns))


def test_weights_without_a_text_tower_say_so() -> None:
    with pytest.raises(TextTowerError, match="This object is giant"):
        made(DepthClipAdapterHead, RELEASED, NoTexts(), **SMALL)


def test_trained_from_a_cache(tmp_path: Path) -> None:
    adapters = {"image": {"reduction": 1, "weight": 0.8}, "text": {"reduction": 1}}
    table = {"name": "depthclip-adapter", "space": "joint", **RANGE, "depths": [1, 2, 3, 4, 5, 7, 9], **adapters}
    recipe = toy_recipe(head=table, train={"epochs": 4, "batch_size": 4})
    cache = extract(recipe, tmp_path / "cache", device="cpu").cache
    run = train(recipe, cache, tmp_path / "run", device="cpu")
    losses = [epoch["losses"]["depth/l1"] for epoch in run.history]
    assert losses[-1] < losses[0]
    resumed = parse_recipe({**recipe.model_dump(exclude_none=True), "train": {"epochs": 2, "batch_size": 4}}, "test")
    train(resumed, cache, tmp_path / "other", device="cpu")
    train(recipe, cache, tmp_path / "other", device="cpu")
    one, other = (folder / "checkpoints" / "last.safetensors" for folder in (tmp_path / "run", tmp_path / "other"))
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
