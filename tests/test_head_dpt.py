"""The convolutional decoder against its documentation in plain float64, its pyramids, and that it sees inside patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.heads.base import Batch, has_distribution
from pcd.heads.dpt_lite import DptLiteOptions, pyramid
from pcd.recipe import parse_recipe
from pcd.stages.evaluate import evaluate
from pcd.stages.extract import extract
from pcd.stages.train import train
from tests.baseline_support import (
    GRID,
    RANGE,
    SHAPES,
    B,
    Floats,
    as_arrays,
    counted,
    make_batch,
    make_head,
    make_targets,
    one_thread,
    slow_output,
    slow_silog,
    taught,
)
from tests.test_extract import toy_recipe
from tests.test_head_options import NothingWaits
from tests.test_head_tokens import slow_weights

__all__ = ["one_thread"]

Shapes = dict[str, tuple[int, ...]]
Levels = list[tuple[str, int]]
VARIANTS: list[tuple[Shapes, dict[str, Any], Levels]] = [
    ({"a": (6, 4)}, {"scale": 4}, [("a", 0), ("a", 1), ("a", 2)]),
    ({"a": (6, 4), "b": (6, 3)}, {"scale": 2, "output": "bins", "bins": 5, "normalisation": "linear"}, [("a", 0), ("b", 1)]),
    ({"a": (6, 4), "b": (6, 3), "c": (6, 4)}, {"scale": 2, "norm": "none", "output": "depth"}, [("a", 0), ("b", 1), ("c", 2)]),
    ({"p": (6, 6), "two": (4, 6, 4), "one": (8, 12, 3)}, {"scale": 4}, [("two", 1), ("one", 0), ("p", 2)]),
    (
        {"a": (2, 3, 4), "b": (6, 3), "fine": (16, 24, 2)},
        {"scale": 1, "output": "bins", "bins": 7},
        [("fine", 0), ("a", 0), ("b", 1)],
    ),
    ({"a": (6, 4), "odd": (5, 7, 2)}, {"scale": 2}, [("odd", 0), ("a", 1)]),
]


def slow_conv(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """`(B, C, h, w)`, zeros around, one 3x3 or 1x1 kernel position after the other."""
    reach = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width = x.shape[2:]
    total = np.zeros((len(x), len(weight), height, width))
    for dy in range(weight.shape[2]):
        for dx in range(weight.shape[3]):
            total += np.einsum("oc,bcyx->boyx", weight[:, :, dy, dx], padded[:, :, dy : dy + height, dx : dx + width])
    return total if bias is None else total + bias[:, None, None]


def slow_resized(x: Floats, size: tuple[int, int]) -> Floats:
    down, across = slow_weights(x.shape[2], size[0], True), slow_weights(x.shape[3], size[1], True)
    found: Floats = np.einsum("yh,bchw,xw->bcyx", down, x, across)
    return found


def slow_enlarged(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """A transposed convolution without overlap: every cell becomes its own block."""
    factor = weight.shape[2]
    blocks: Floats = np.einsum("bcyx,coij->boyixj", x, weight) + bias[:, None, None, None, None]
    return blocks.reshape(len(x), weight.shape[1], factor * x.shape[2], factor * x.shape[3])


def slow_forward(head: Any, batch: Batch, state: dict[str, Floats], places: Levels) -> Floats:
    """Metres `(B * P,)`: columns to their levels and added there; residual units from coarse to fine; two convolutions."""

    def conv(x: Floats, name: str) -> Floats:
        return slow_conv(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def unit(x: Floats, name: str) -> Floats:
        return x + conv(np.maximum(conv(np.maximum(x, 0), f"{name}.first"), 0), f"{name}.second")

    deepest = max(level for _, level in places)
    sizes = [(-(-head.grid[0] // 2**level), -(-head.grid[1] // 2**level)) for level in range(deepest + 1)]
    levels: list[Floats] = [np.zeros(1)] * len(sizes)
    for number, (name, level) in enumerate(places):
        x = batch.columns[name].double().numpy()
        x = x.reshape(B, *GRID, -1) if x.ndim == 3 else x
        if head.options.norm == "layer":
            x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        part = f"reassemble.{number}"
        x = conv(np.moveaxis(x, -1, 1), f"{part}.project")
        if f"{part}.enlarge.weight" in state:
            x = slow_enlarged(x, state[f"{part}.enlarge.weight"], state[f"{part}.enlarge.bias"])
        levels[level] = levels[level] + conv(slow_resized(x, sizes[level]), f"{part}.smooth")
    fused = unit(levels[-1], f"fuse.{deepest}")
    for level in reversed(range(deepest)):
        fused = slow_resized(fused, sizes[level])
        fused = fused + unit(levels[level], f"beside.{level}") if levels[level].ndim > 1 else fused
        fused = unit(fused, f"fuse.{level}")
    raw = conv(np.maximum(conv(fused, "narrow"), 0), "map")
    return slow_output(head, np.moveaxis(raw, 1, -1).reshape(-1, raw.shape[1]))


def make(shapes: Shapes, options: dict[str, Any]) -> tuple[Any, Batch]:
    """A head of 4 channels whose depths are well inside the range, and a batch with targets on its finer grid."""
    head = make_head("dpt-lite", shapes, GRID, columns=list(shapes), channels=4, **options)
    return head, make_batch(shapes, GRID, head.options.scale)


@pytest.mark.parametrize(("shapes", "options", "levels"), VARIANTS)
def test_depth_loss_and_gradient_are_those_of_the_documentation(
    shapes: Shapes, options: dict[str, Any], levels: Levels
) -> None:
    head, batch = make(shapes, options)
    state, target = as_arrays(head), batch.targets["depth"]
    mean, count, _ = counted(target)
    valid = target.valid.reshape(-1).numpy()
    expected = slow_forward(head, batch, state, levels)
    with torch.no_grad():
        depth, found = head.eval().depth(batch.columns), head.distribution(batch.columns)
    assert depth.shape == (B, head.grid[0] * head.grid[1])
    np.testing.assert_allclose(depth.reshape(-1), expected.clip(0.1, 10), rtol=2e-5)
    assert (found is None) == (options.get("output") != "bins")
    assert has_distribution(head, shapes) == (found is not None)
    if found is not None:
        np.testing.assert_allclose(found.mean.reshape(-1), expected, rtol=2e-5)
    total = head.train().losses(batch, "depth")["total"]
    assert total.item() == pytest.approx(10 * slow_silog(expected[valid].tolist(), mean, count), rel=2e-5)
    total.backward()
    generator = np.random.default_rng(0)
    for name in (
        "reassemble.0.project.weight",
        "reassemble.0.smooth.weight",
        "fuse.0.first.weight",
        "narrow.bias",
        "map.weight",
    ):
        towards = generator.normal(size=state[name].shape)
        ends = []
        for step in (1e-6, -1e-6):
            there = slow_forward(head, batch, {**state, name: state[name] + step * towards}, levels)[valid]
            ends.append(10 * slow_silog(there.tolist(), mean, count))
        slope = float((head.get_parameter(name).grad.double().numpy() * towards).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=5e-3, abs=1e-3), name


def dpt_options(**options: Any) -> DptLiteOptions:
    return DptLiteOptions(min_depth=0.1, max_depth=10.0, **options)


@pytest.mark.parametrize(
    ("number", "scale", "sizes", "levels"),
    [
        (4, 4, [84, 42, 21, 11], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (3, 4, [84, 42, 21], [(0, 0), (1, 1), (2, 2)]),
        (1, 4, [84, 42, 21], [(0, 0), (0, 1), (0, 2)]),
        (2, 8, [168, 84, 42, 21], [(0, 0), (1, 1), (1, 2), (1, 3)]),
        (2, 1, [21, 11], [(0, 0), (1, 1)]),
    ],
)
def test_pyramids_of_tokens(number: int, scale: int, sizes: list[int], levels: list[tuple[int, int]]) -> None:
    names = tuple(f"clip/patch@{layer}" for layer in range(number))
    found = pyramid(dpt_options(columns=names, scale=scale), dict.fromkeys(names, (441, 768)), (21, 21))
    assert found == (tuple((size, size) for size in sizes), tuple((names[place], level) for place, level in levels))


def test_pyramid_of_a_resnet_at_416x544() -> None:
    """RN50: stages at 1/4 to 1/32 of the view, and the dense attention pool at 1/32. Nothing has to be resized."""
    shapes: Shapes = {"clip/patch": (221, 1024)}
    for stage in (4, 3, 2, 1):
        shapes[f"clip/layer{stage}"] = (208 >> stage, 272 >> stage, 128 << stage)
    names = ("clip/patch", "clip/layer3", "clip/layer2", "clip/layer1")
    sizes, places = pyramid(dpt_options(columns=names, scale=8), shapes, (13, 17))
    assert sizes == ((104, 136), (52, 68), (26, 34), (13, 17))
    assert dict(places) == {"clip/patch": 3, "clip/layer3": 2, "clip/layer2": 1, "clip/layer1": 0}
    with torch.device("meta"):
        head = make_head("dpt-lite", shapes, (13, 17), columns=list(names), scale=8, stir=0.0)
    assert head.grid == (104, 136)
    assert all(part.enlarge is None for part in head.reassemble)


def test_parameters_at_the_sizes_of_vit_l() -> None:
    names = [f"clip/patch@{layer}" for layer in (6, 12, 18, 24)]
    with torch.device("meta"):
        head = make_head("dpt-lite", dict.fromkeys(names, (576, 768)), (24, 24), columns=names, scale=4, stir=0.0)
    conv, unit, enlarge = 9 * 128 * 128, 2 * (9 * 128 * 128 + 128), (16 + 4) * 128 * 128 + 2 * 128
    expected = 4 * (768 * 128 + 128 + conv) + enlarge + 3 * unit + 4 * unit + (9 * 128 * 64 + 64) + 65
    assert sum(value.numel() for value in head.parameters()) == expected == 3_451_521
    assert head.grid == (96, 96)


def test_it_learns_what_lies_where_inside_a_patch() -> None:
    """Two channels of every token say how far the left and the right half of its patch are, two nothing."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.rand(B, *GRID, 2, generator=generator) * 5 + 1
    tokens = torch.cat([halves, torch.randn(B, *GRID, 2, generator=generator)], dim=-1)
    target = make_targets((2 * GRID[0], 2 * GRID[1]), share=2.0)
    fine = halves.reshape(B, GRID[0], 2 * GRID[1]).repeat_interleave(2, dim=1).reshape(B, -1)
    target.mean.copy_(fine)
    batch = Batch({"clip/patch": tokens.flatten(1, 2).half()}, {"depth": target})
    options: dict[str, Any] = {"scale": 2, "channels": 16, "norm": "none", "lr": 4e-3, "weight_decay": 0.0}
    head = make_head("dpt-lite", {"clip/patch": (6, 4)}, stir=0.0, **options)
    assert taught(head, batch, 40) < 0.06
    patches = halves.mean(dim=-1).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(B, -1)
    assert float(((patches - fine).abs() / fine)[:2].mean()) > 0.15  # what patches of one depth have


def test_no_step_waits_and_bf16_only_rounds() -> None:
    for shapes, options, _ in VARIANTS:
        head, batch = make(shapes, options)
        with NothingWaits():
            exact = head.train().losses(batch, "depth")["total"]
            exact.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = head.losses(batch, "depth")["total"]
            rounded.backward()
            assert head.eval().depth(batch.columns).dtype == torch.float32
        assert rounded.dtype == torch.float32
        assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
        nothing = make_targets(head.grid, share=-1.0)
        few = type(nothing)(*(value[:0] if value.dim() == 1 else value for value in vars(nothing).values()))
        assert not head.train().losses(Batch(batch.columns, {"depth": few}), "depth")["total"].requires_grad
    assert not head.sees_valid_patches_only


def test_traced_for_export_it_takes_any_number_of_views() -> None:
    head, batch = make(*VARIANTS[-1][:2])
    views = {name: {0: torch.export.Dim("views")} for name in batch.columns}
    traced = torch.export.export(head.eval(), (dict(batch.columns),), dynamic_shapes=(views,)).module()
    more = {name: torch.cat([value, value[:2]]) for name, value in batch.columns.items()}
    with torch.no_grad():
        torch.testing.assert_close(traced(more), head.depth(more))


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"scale": 3}, "expected a power of two"),
        ({"scale": 0}, "greater than 0"),
        ({"min_depth": 0.0}, "logarithms of depth need a min_depth above 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            head_options({"name": "dpt-lite", **RANGE, **options})
    with pytest.raises(RecipeError, match=r"clip/cls is \(5,\), one vector a view"):
        make_head("dpt-lite", SHAPES, GRID, columns=["clip/patch", "clip/cls"])


def test_from_toy_frames_to_scores(tmp_path: Path) -> None:
    """Targets, validation and scores on a grid twice as fine as that of the tokens."""
    cache = extract(toy_recipe(), tmp_path / "cache", device="cpu").cache
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] = {"name": "dpt-lite", **RANGE, "channels": 8, "scale": 2, "lr": 1e-2}
    table["train"] |= {"epochs": 3, "batch_size": 4}
    run = train(parse_recipe(table, "test"), cache, tmp_path / "run", device="cpu")
    assert run.grid == (8, 8)
    assert run.history[-1]["metrics"]["abs_rel"] < 0.4
    assert evaluate(run, cache, protocols=["pureclip"], device="cpu").metrics("pureclip")["abs_rel"] < 0.4
