"""The coarse/refined adapter and what dense heads share, against loops over their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads import dense, head_options
from pcd.heads.base import Batch
from pcd.heads.coarse_refined import CoarseRefinedHead, CoarseRefinedOptions
from tests import dense_support as by_hand
from tests.dense_support import RANGE
from tests.test_head_options import NothingWaits

B, SHAPES, GRID = 3, {"clip/layer4": (2, 3, 8), "clip/patch": (6, 4), "pixels/rgb": (16, 24, 3)}, (2, 3)
OUT = (4, 6)


def make_head(**options: Any) -> CoarseRefinedHead:
    torch.manual_seed(0)
    head = CoarseRefinedHead(CoarseRefinedOptions.model_validate({**RANGE, "hidden": 5, "width": 4, **options}), SHAPES, GRID)
    head.initialise(by_hand.Words(4))
    return head


def make_columns() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps, tokens = (torch.randn(B, *SHAPES[name], generator=generator).half() for name in ("clip/layer4", "clip/patch"))
    return {"clip/layer4": maps, "clip/patch": tokens, "pixels/rgb": by_hand.pictures(B, 16, 24)}


def make_batch() -> Batch:
    return Batch(make_columns(), {"depth": by_hand.targets(B, OUT)})


def clip_depth(head: CoarseRefinedHead, tokens: Any) -> Any:
    """Equations 3 and 4 for the patches `(P, D)` of one view."""
    found = []
    for token in tokens:
        words = head.clip.text.double().numpy()
        scores = [math.fsum(word * token) / (np.linalg.norm(word) * np.linalg.norm(token)) for word in words]
        weights = [math.exp(score / 0.1) for score in scores]
        depths = (1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0)
        found.append(sum(w * d for w, d in zip(weights, depths, strict=True)) / sum(weights))
    return np.array(found)


def coarse_map(head: CoarseRefinedHead, columns: dict[str, torch.Tensor], view: int) -> Any:
    if head.options.clip.space == "joint":
        tokens = columns["clip/patch"][view].double().numpy()
    else:
        tokens = columns["clip/layer4"][view].double().numpy().reshape(6, 8)[:, [0, 2, 4, 6]]
    layers: Any = head.coarse
    first, second = layers
    hidden = first.weight.double() @ torch.tensor(clip_depth(head, tokens)) + first.bias.double()
    return (second.weight.double() @ hidden + second.bias.double()).detach().numpy().reshape(OUT)


@pytest.mark.parametrize("space", ["released", "joint"])
@pytest.mark.parametrize("refined", [True, False])
def test_forward_is_that_of_the_paper(space: str, refined: bool) -> None:
    head = make_head(clip={"space": space}, refined=refined, min_depth=-99.0, max_depth=99.0)
    head, columns = by_hand.stirred(head).eval(), make_columns()
    found = head(columns)
    assert found.shape == (B, 24)
    assert head.grid == CoarseRefinedHead.output_grid(head.options, SHAPES, GRID) == OUT
    for view in range(B):
        expected = coarse_map(head, columns, view)
        if refined:
            expected = by_hand.refining(head.refine, by_hand.normalised(columns["pixels/rgb"][view]), expected)
        np.testing.assert_allclose(found[view].detach().numpy().reshape(OUT), expected, rtol=2e-4, atol=2e-4)
    assert float(make_head(min_depth=2.0, max_depth=2.5)(columns).detach().sub(2.25).abs().max()) <= 0.25


def test_coarse_part_is_linear_and_sizes_are_the_published_ones() -> None:
    head = make_head()
    one, two = torch.randn(2, 6), torch.randn(2, 6)
    coarse = lambda x: head.coarse(x) - head.coarse(torch.zeros(1, 6))  # noqa: E731
    torch.testing.assert_close(coarse(3 * one + two), 3 * coarse(one) + coarse(two))
    shapes = {"clip/layer4": (13, 17, 2048), "pixels/rgb": (416, 544, 3)}
    with torch.device("meta"):
        whole = CoarseRefinedHead(CoarseRefinedOptions(**RANGE), shapes, (13, 17))
    assert whole.grid == (104, 136)
    linear = (221 * 4096 + 4096) + (4096 * 104 * 136 + 104 * 136)
    refining = (3 * 63 * 81 + 63) + (64 * 64 * 25 + 64) + (64 * 25 + 1)
    assert (linear, refining) == (58_857_280, 119_437)
    assert by_hand.count_of(whole) == linear + refining == 58_976_717
    assert whole.clip.text.shape == (7, 1024)
    assert CoarseRefinedHead.phrases(whole.options)[1] == "This object is extremely close"
    assert whole.options.coarse.phase("coarse", ()).optimiser == "sgd"
    assert CoarseRefinedHead.reads(whole.options) == ("clip/layer4", "pixels/rgb")


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("mask", [True, False])
def test_losses_are_means_over_cells(kind: str, mask: bool) -> None:
    head, batch = by_hand.stirred(make_head(loss=kind, mask=mask)), make_batch()
    target = batch.targets["depth"]
    found = {name: value.item() for name, value in head.losses(batch, "coarse").items()}
    errors, rough = [], {"across": [], "down": []}  # type: ignore[var-annotated]
    for view in range(B):
        depth = coarse_map(head, batch.columns, view)  # type: ignore[arg-type]
        for cell in range(24):
            if target.valid[view, cell] or not mask:
                away = abs(depth.reshape(-1)[cell] - float(target.mean[view, cell]))
                errors.append(away if kind == "l1" else away**2)
        image = by_hand.normalised(batch.columns["pixels/rgb"][view])
        small = np.empty((3, *OUT))
        for c, i, j in np.ndindex(3, *OUT):
            small[c, i, j] = image[c, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean()
        for i in range(4):
            for j in range(6):
                if j < 5:
                    edge = np.abs(small[:, i, j + 1] - small[:, i, j]).mean()
                    rough["across"].append(abs(depth[i, j + 1] - depth[i, j]) * math.exp(-edge))
                if i < 3:
                    edge = np.abs(small[:, i + 1, j] - small[:, i, j]).mean()
                    rough["down"].append(abs(depth[i + 1, j] - depth[i, j]) * math.exp(-edge))
    error, roughness = np.mean(errors), np.mean(rough["across"]) + np.mean(rough["down"])
    assert found["error"] == pytest.approx(error, rel=1e-4)
    assert found["roughness"] == pytest.approx(roughness, rel=1e-4)
    assert found["total"] == pytest.approx(error + 1e-3 * roughness, rel=1e-4)
    assert set(by_hand.stirred(make_head(smoothness=0.0)).losses(batch, "coarse")) == {"total"}


def test_refining_never_changes_the_coarse_part_unless_together() -> None:
    batch = make_batch()
    moving = {"coarse": (True, False), "refine": (False, True), "depth": (True, True)}
    for training, names in (("turns", ["coarse", "refine"]), ("together", ["depth"])):
        head = by_hand.stirred(make_head(training=training))
        assert [phase.name for phase in head.phases()] == names
        for phase in head.phases():
            head.zero_grad()
            head.losses(batch, phase.name)["total"].backward()
            parts = tuple(any(value.grad is not None for value in part.parameters()) for part in (head.coarse, head.refine))
            assert parts == moving[phase.name]
            named = dict(head.named_parameters())
            assert all(named[name] is value for name, value in phase.parameters)
            assert {name.split(".")[0] for name, _ in phase.parameters} == {
                part for part, moves in zip(("coarse", "refine"), parts, strict=True) if moves
            }
    assert [phase.name for phase in make_head(refined=False, training="together").phases()] == ["coarse"]
    assert [phase.name for phase in make_head(coarse={"steps": 0}).phases()] == ["refine"]
    assert [phase.steps for phase in make_head(coarse={"steps": 130}, refine={"steps": 7}).phases()] == [130, 7]


@pytest.mark.parametrize(
    "options", [{}, {"training": "together"}, {"mask": False, "clip": {"space": "joint"}}, {"refined": False}]
)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    head, batch = make_head(**options).train(), make_batch()
    for phase in head.phases():
        with NothingWaits():
            head.losses(batch, phase.name)["total"].backward()
    with NothingWaits(), torch.inference_mode():
        head.eval().depth(batch.columns)


def test_rows_without_ground_truth_teach_nothing() -> None:
    batch = make_batch()
    nothing = Batch(batch.columns, {"depth": by_hand.nowhere(batch.targets["depth"])})
    assert not make_head().losses(nothing, "refine")["total"].requires_grad
    assert make_head(mask=False).losses(nothing, "refine")["total"].requires_grad


@pytest.mark.parametrize("training", ["turns", "together"])
def test_a_batch_is_learnt_by_heart(training: str) -> None:
    stage = {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.0}
    head = make_head(hidden=32, width=16, training=training, clip={"temperature": 0.02}, coarse=stage, refine=stage)
    losses = by_hand.trained(head, Batch(make_columns(), {"depth": by_hand.ramps(B, OUT)}), 60)
    assert losses[-1] < 0.1 * losses[1]


def test_a_checkpoint_holds_the_texts() -> None:
    head, other, columns = by_hand.stirred(make_head()), make_head(), make_columns()
    other.clip.text.zero_()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(columns), head(columns))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(columns).dtype == torch.float32
        assert head.losses(make_batch(), "refine")["total"].dtype == torch.float32


def test_columns_that_do_not_fit_are_refused() -> None:
    table = {"name": "coarse-refined", **RANGE}
    cls, options = head_options(table)
    for shapes, words in (
        ({**SHAPES, "pixels/rgb": (18, 24, 3)}, r"pixels/rgb is 18x24; expected multiples of 4"),
        ({**SHAPES, "pixels/rgb": (16, 24, 4)}, r"pixels/rgb is \(16, 24, 4\) a row; expected \(h, w, 3\)"),
        ({**SHAPES, "clip/layer4": (2, 3, 7)}, r"clip/layer4 has 7 channels"),
    ):
        with pytest.raises(RecipeError, match=words):
            cls(options, shapes, GRID)
    with pytest.raises(RecipeError, match=r"7 texts are 5 wide"):
        make_head().initialise(by_hand.Words(5))
    with pytest.raises(RecipeError, match=r"unknown key 'clip\.word'.*Did you mean 'words'"):
        head_options({**table, "clip": {"word": []}})
    with pytest.raises(RecipeError, match=r"unknown key 'coarse\.rate'"):
        head_options({**table, "coarse": {"rate": 1.0}})


def test_map_error_of_equal_cells() -> None:
    """Every cell weighs the same, and one that does not count has no gradient."""
    target = by_hand.targets(2, OUT)
    depth = torch.full((2, 24), 3.0, requires_grad=True)
    dense.map_error(depth, target, "l1", mask=True).backward()
    assert depth.grad is not None
    assert torch.equal(depth.grad != 0, target.valid)
    assert depth.grad.abs().sum() == pytest.approx(1.0)
