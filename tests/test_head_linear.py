"""The linear probe against its equations in float64, what it looks at, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.errors import RecipeError, TrainingError
from pcd.heads import head_options
from pcd.heads.base import Batch
from pcd.recipe import parse_recipe
from pcd.recipe_files import load_recipe
from pcd.stages.extract import extract
from pcd.stages.train import train
from tests.baseline_support import (
    GRID,
    RANGE,
    SHAPES,
    B,
    D,
    Floats,
    P,
    as_arrays,
    counted,
    make_batch,
    make_head,
    make_targets,
    once,
    one_thread,
    slow_output,
    slow_silog,
    taught,
)
from tests.test_extract import toy_recipe
from tests.test_head_options import NothingWaits

__all__ = ["one_thread"]

RECIPES = Path(__file__).parent.parent / "pipelines" / "prior-art"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "bins": 7, "spacing": "log"},
    {"norm": "none", "output": "depth"},
    {"output": "log-depth", "cls_columns": ["clip/cls"]},
    {"columns": ["clip/patch", "clip/patch@2"], "cls_columns": ["clip/cls"], "normalisation": "softmax", "bins": 5},
    {"columns": ["clip/patch@2", "clip/patch"], "norm": "layer", "floor": 0.02},
]


def slow_tokens(head: Any, batch: Batch) -> Floats:
    """What the norm sees of all patches: `(B * P, W)`, in reading order."""
    rows = []
    for b in range(B):
        for i in range(P):
            own = [batch.columns[name][b, i].double().numpy() for name in head.options.columns]
            rows.append(np.concatenate([*own, *(batch.columns[name][b].double().numpy() for name in head.options.cls_columns)]))
    return np.stack(rows)


def slow_raw(head: Any, tokens: Floats, state: dict[str, Floats], *, training: bool) -> Floats:
    """The last layer, `(M, K)`: norm and map; in training BatchNorm takes the statistics of these tokens."""
    if head.options.norm == "batch":
        mean = tokens.mean(axis=0) if training else state["norm.running_mean"]
        var = tokens.var(axis=0) if training else state["norm.running_var"]
        tokens = (tokens - mean) / np.sqrt(var + 1e-5) * state["norm.weight"] + state["norm.bias"]
    elif head.options.norm == "layer":
        centred = tokens - tokens.mean(axis=1, keepdims=True)
        tokens = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * state["norm.weight"] + state["norm.bias"]
    raw: Floats = tokens @ state["map.weight"].T + state["map.bias"]
    return raw


def slow_loss(head: Any, batch: Batch, state: dict[str, Floats]) -> float:
    """SILog as the defaults have it, of the patches that count, weighted by pixels."""
    target = batch.targets["depth"]
    tokens = slow_tokens(head, batch)[target.valid.reshape(-1).numpy()]
    depth = slow_output(head, slow_raw(head, tokens, state, training=True))
    mean, count, _ = counted(target)
    return 10 * slow_silog(depth.tolist(), mean, count)


@pytest.mark.parametrize("options", VARIANTS)
def test_depth_is_that_of_the_equations(options: dict[str, Any]) -> None:
    head, batch = make_head("linear", **options), make_batch()
    head.train().losses(batch, "depth")  # gives BatchNorm statistics that are not its first ones
    raw = slow_raw(head, slow_tokens(head, batch), as_arrays(head), training=False)
    expected = slow_output(head, raw).clip(0.1, 10).reshape(B, P)
    with torch.no_grad():
        depth, found = head.eval().depth(batch.columns), head.distribution(batch.columns)
    assert depth.dtype == torch.float32
    np.testing.assert_allclose(depth, expected, rtol=1e-5)
    if head.options.output != "bins":
        assert found is None
        return
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(found.probabilities.sum(dim=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_loss_and_gradient_are_those_of_the_equations(options: dict[str, Any]) -> None:
    """The gradient along random directions, against differences of the loss in float64."""
    head, batch = make_head("linear", **options).train(), make_batch()
    state = as_arrays(head)
    total = head.losses(batch, "depth")["total"]
    assert total.item() == pytest.approx(slow_loss(head, batch, state), rel=1e-5)
    total.backward()
    generator = np.random.default_rng(0)
    for name, value in head.named_parameters():
        towards = generator.normal(size=value.shape)
        ends = [slow_loss(head, batch, {**state, name: state[name] + step * towards}) for step in (1e-6, -1e-6)]
        slope = float((value.grad.double().numpy() * towards).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        ({"variance_focus": 0.5, "scale": 1.0, "weight": "patches"}, lambda p, m, n, v: slow_silog(p, m, [1.0] * len(p), 0.5)),
        ({"root": False, "scale": 3.0}, lambda p, m, n, v: 3 * slow_silog(p, m, n) ** 2),
        ({"kind": "l1"}, lambda p, m, n, v: np.average(np.abs(np.subtract(p, m)), weights=n)),
        ({"kind": "l1", "weight": "patches"}, lambda p, m, n, v: np.mean(np.abs(np.subtract(p, m)))),
        ({"kind": "rmse"}, lambda p, m, n, v: np.sqrt(np.average(np.subtract(p, m) ** 2 + v, weights=n))),
        ({"kind": "rmse", "weight": "patches"}, lambda p, m, n, v: np.sqrt(np.mean(np.subtract(p, m) ** 2))),
    ],
)  # fmt: skip
def test_every_loss_is_what_it_says(loss: dict[str, Any], slow: Callable[..., float]) -> None:
    head, batch = make_head("linear", norm="none", output="depth", loss=loss), make_batch()
    target = batch.targets["depth"]
    depth = slow_output(head, slow_raw(head, slow_tokens(head, batch), as_arrays(head), training=False))
    kept = depth[target.valid.reshape(-1).numpy()].tolist()
    found = head.train().losses(batch, "depth")
    assert set(found) == {"total"}
    assert found["total"].item() == pytest.approx(slow(kept, *counted(target)), rel=1e-5)


def test_gradient_matching_comes_on_top() -> None:
    batch, losses = make_batch(), []
    for weight in (0.0, 0.5, 2.0):
        losses.append(make_head("linear", loss={"gradient": weight}).train().losses(batch, "depth"))
    assert set(losses[1]) == {"total", "silog", "gradient"}
    for weight, found in zip((0.5, 2.0), losses[1:], strict=True):
        assert found["silog"] == losses[0]["total"]
        assert found["total"].item() == pytest.approx((found["silog"] + weight * found["gradient"]).item())
    assert losses[1]["gradient"] == losses[2]["gradient"] > 0


@pytest.mark.parametrize("options", [*VARIANTS, {"loss": {"gradient": 1.0}}])
def test_training_looks_at_no_patch_that_does_not_count(options: dict[str, Any]) -> None:
    """BatchNorm's statistics included: a NaN there reaches nothing."""
    batch = make_batch()
    hidden = ~batch.targets["depth"].valid
    spoilt = dict(batch.columns)
    for name in ("clip/patch", "clip/patch@2"):
        spoilt[name] = spoilt[name].masked_fill(hidden[..., None], torch.nan)
    found = []
    for columns in (dict(batch.columns), spoilt):
        head = make_head("linear", **options).train()
        assert head.sees_valid_patches_only
        head.losses(Batch(columns, batch.targets), "depth")["total"].backward()
        found.append([*(value.grad for value in head.parameters()), *head.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_other_grids_are_resized_and_seen_by_the_map(name: str) -> None:
    shapes = {"rn/a": (4, 6, 5), "clip/patch": (P, D), "rn/b": (1, 1, 3)}
    head, batch = make_head(name, shapes, columns=["clip/patch", "rn/b", "rn/a"]).eval(), make_batch(shapes)
    depth = head.depth(batch.columns)
    assert depth.shape == (B, P)
    on_grid = {**batch.columns, "rn/b": batch.columns["rn/b"].expand(-1, *GRID, -1)}
    torch.testing.assert_close(head.depth(on_grid), depth)
    for column in shapes:
        assert not torch.allclose(head.depth({**batch.columns, column: 2 * batch.columns[column]}), depth)
    head.train().losses(batch, "depth")["total"].backward()


def test_parameters_at_the_sizes_of_vit_l() -> None:
    """256 bins on 768 channels, and DINOv2's four layers of patch and CLS tokens of a ViT-g: 2 x 4 x 1536 channels."""
    shapes: dict[str, tuple[int, ...]] = {"clip/patch": (576, 768)}
    with torch.device("meta"):
        head = make_head("linear", shapes, (24, 24), norm="none", stir=0.0)
        assert sum(value.numel() for value in head.parameters()) == 768 * 256 + 256 == 196_864
        whole = make_head("linear", shapes, (24, 24), stir=0.0)
        assert sum(value.numel() for value in whole.parameters()) == 196_864 + 1_536
        names = [f"dino/{kind}@{layer}" for kind in ("patch", "cls") for layer in (10, 20, 30, 40)]
        giant = {name: (256, 1536) if "patch" in name else (1536,) for name in names}
        probe = make_head("linear", giant, (16, 16), columns=names[:4], cls_columns=names[4:], norm="none", stir=0.0)
        assert probe.map.weight.shape == (256, 2 * 4 * 1536)
    assert probe.reads(probe.options) == tuple(names)


def test_the_start_is_the_training_data() -> None:
    batch = make_batch(share=0.9)
    mean, _, _ = counted(batch.targets["depth"])
    wanted = {"depth": np.mean(mean), "log-depth": np.exp(np.mean(np.log(mean)))}
    for output, value in wanted.items():
        head = make_head("linear", output=output, norm="none")
        head.initialise(once(batch, batch))
        torch.nn.init.zeros_(head.map.weight)
        np.testing.assert_allclose(head.depth(batch.columns).detach(), value, rtol=1e-5)
    for options in ({}, {"normalisation": "softmax"}, {"floor": 0.01, "spacing": "log"}):
        head = make_head("linear", norm="none", bins=20, **options)
        head.initialise(once(batch, batch))
        torch.nn.init.zeros_(head.map.weight)
        edges = np.linspace(0.1, 10, 21) if head.options.spacing == "even" else np.geomspace(0.1, 10, 21)
        shares = np.histogram(mean, edges)[0] / len(mean)
        found = head.distribution(batch.columns).probabilities[0, 0].detach()
        np.testing.assert_allclose(found, 0.9 * shares + 0.1 / 20, rtol=1e-5)
    untouched = make_head("linear", start="random")
    before = untouched.map.bias.clone()
    untouched.initialise(once())
    assert torch.equal(untouched.map.bias, before)


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"columns": []}, "expected one column or more"),
        ({"columns": ["clip/patch", "clip/patch"]}, "each named once"),
        ({"min_depth": 10.0}, "expected 0 <= min_depth < max_depth"),
        ({"min_depth": 0.0, "output": "log-depth"}, "logarithms of depth need a min_depth above 0"),
        ({"min_depth": 0.0, "spacing": "log"}, "logarithms of depth need a min_depth above 0"),
        ({"loss": {"lambda": 0.85}}, "unknown key 'loss.lambda'"),
        ({"norm": "group"}, "norm"),
    ):
        with pytest.raises(RecipeError, match=message):
            head_options({"name": "linear", **RANGE, **options})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"columns": ["clip/cls"]}, r"clip/cls is \(5,\), one vector a view; expected tokens"),
        ({"cls_columns": ["clip/patch@2"]}, r"clip/patch@2 is \(6, 4\); expected one vector a view"),
        ({"columns": ["other/patch"]}, r"8 tokens do not lie on the head's grid of 2x3"),
    ]
    for reads, message in wrong:
        with pytest.raises(RecipeError, match=message):
            make_head("linear", {**SHAPES, "other/patch": (8, D)}, GRID, **reads)
    hidden = make_targets(GRID, share=-1.0)
    nobody = Batch({}, {"depth": type(hidden)(*(value[:0] for value in vars(hidden).values()))})
    with pytest.raises(TrainingError, match="no training patch has valid depth"):
        make_head("linear").initialise(once(nobody))


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_patches_for_statistics_teach_nothing(valid: int) -> None:
    head, batch = make_head("linear").train(), make_batch()
    target = batch.targets["depth"]
    few = type(target)(target.count, target.mean, target.var, target.valid, target.flat[:valid], target.view[:valid])
    before = head.norm.running_mean.clone()
    assert not head.losses(Batch(batch.columns, {"depth": few}), "depth")["total"].requires_grad
    assert torch.equal(head.norm.running_mean, before)


@pytest.mark.parametrize("options", VARIANTS)
def test_no_step_waits_and_bf16_only_rounds(options: dict[str, Any]) -> None:
    head, batch = make_head("linear", **options).train(), make_batch()
    with NothingWaits():
        exact = head.losses(batch, "depth")["total"]
        exact.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head.losses(batch, "depth")["total"]
        rounded.backward()
        depth = head.eval().depth(batch.columns)
    assert rounded.dtype == depth.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.03)
    torch.testing.assert_close(depth, head.depth(batch.columns), rtol=0.03, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"output": "log-depth", "norm": "layer"}, {"normalisation": "softmax"}])
def test_it_learns_what_is_linear_in_the_token(options: dict[str, Any]) -> None:
    """8 patches with 6 + 4 + 5 channels: more unknowns than patches. Bins of 0.4 m must share."""
    columns: dict[str, Any] = {"columns": ["clip/patch", "clip/patch@2"], "cls_columns": ["clip/cls"]}
    head = make_head("linear", **columns, bins=25, weight_decay=0.0, lr=0.02, **options)
    assert taught(head, make_batch(), 300) < 0.03


@pytest.mark.parametrize("name", ["linear", "mlp", "dpt-lite"])
def test_recipes(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    cls, options = head_options(recipe.head)
    assert recipe.head["name"] == name
    assert cls.reads(options) == ("clip/patch",)
    assert (
        options == head_options({"name": name, "min_depth": 0.001, "max_depth": 10.0})[1]
    )  # what a recipe says is the default


def test_a_training_goes_on_with_its_statistics(tmp_path: Path) -> None:
    """On toy frames, through the loop: BatchNorm's buffers are part of what is saved and continued."""
    cache = extract(toy_recipe(), tmp_path / "cache", device="cpu").cache
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] = {"name": "linear", **RANGE, "bins": 16, "cls_columns": ["clip/cls"], "optimiser": "sgd", "lr": 0.05}
    table["train"] |= {"epochs": 3, "batch_size": 4}
    whole = train(parse_recipe(table, "test"), cache, tmp_path / "whole", device="cpu")

    def stop(report: Any) -> None:
        if report.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(table, "test"), cache, tmp_path / "parts", device="cpu", on_epoch=stop)
    parts = train(parse_recipe(table, "test"), cache, tmp_path / "parts", device="cpu")
    states: list[dict[str, Tensor]] = [run.load_head("last", torch.device("cpu"))[0].state_dict() for run in (whole, parts)]
    assert {"norm.running_mean", "norm.running_var"} <= states[0].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert float(states[0]["norm.num_batches_tracked"]) == 18
