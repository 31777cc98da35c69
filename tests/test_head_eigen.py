"""The network of Eigen et al. against loops over its definition, and its loss against equation 3 of the paper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads import dense, head_options
from pcd.heads.base import Batch
from pcd.heads.depth_eigen import DepthEigenHead, DepthEigenOptions
from tests import dense_support as by_hand
from tests.dense_support import RANGE
from tests.test_head_options import NothingWaits

B, SHAPES, GRID, OUT = 3, {"pixels/rgb": (20, 24, 3)}, (20, 24), (5, 6)
SMALL: dict[str, Any] = {"widths": [3, 4, 2, 3, 2], "hidden": 5, "width": 4}


def make_head(**options: Any) -> DepthEigenHead:
    torch.manual_seed(0)
    return DepthEigenHead(DepthEigenOptions.model_validate({**RANGE, **SMALL, **options}), SHAPES, GRID)


def make_batch() -> Batch:
    return Batch({"pixels/rgb": by_hand.pictures(B, 20, 24)}, {"depth": by_hand.targets(B, OUT)})


def coarse_map(head: DepthEigenHead, image: Any) -> Any:
    """The coarse network on one picture, layer after layer (figure 1 of the paper)."""
    coarse: Any = head.coarse
    layers: list[Any] = [layer for layer in coarse.convolutions if isinstance(layer, torch.nn.Conv2d)]
    found: Any = image
    for number, (layer, stride, padding) in enumerate(zip(layers, (4, 1, 1, 1, 2), (4, 2, 1, 1, 1), strict=True)):
        found = by_hand.relu(by_hand.conv(found, layer.weight, layer.bias, stride, padding))
        found = by_hand.pool(found) if number < 2 else found
    hidden = by_hand.relu((coarse.all.weight.double() @ torch.tensor(found.reshape(-1)) + coarse.all.bias).detach().numpy())
    return (coarse.map.weight.double() @ torch.tensor(hidden) + coarse.map.bias).detach().numpy().reshape(OUT)


@pytest.mark.parametrize("loss", ["scale-invariant", "l2"])
@pytest.mark.parametrize("refined", [True, False])
def test_forward_is_that_of_the_paper(loss: str, refined: bool) -> None:
    head = make_head(loss=loss, refined=refined, min_depth=-999.0, max_depth=999.0)
    head, columns = by_hand.stirred(head, 0.1).eval(), make_batch().columns
    found = head(columns)
    assert head.grid == DepthEigenHead.output_grid(head.options, SHAPES, GRID) == OUT
    for view in range(B):
        image = by_hand.normalised(columns["pixels/rgb"][view])
        expected = coarse_map(head, image)
        expected = by_hand.refining(head.refine, image, expected) if refined else expected
        expected = np.exp(expected) if loss == "scale-invariant" else expected
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(found[view].detach().numpy().reshape(OUT), expected, rtol=2e-4, atol=2e-4)
    limited = make_head(min_depth=0.9, max_depth=1.1)(columns).detach()
    assert float((limited - 1).abs().max()) <= 0.1 + 1e-6


def test_sizes_are_those_of_the_paper() -> None:
    """Layer by layer; where the original has no padding its maps are a row or column smaller."""
    with torch.device("meta"):
        head = DepthEigenHead(DepthEigenOptions(**RANGE), {"pixels/rgb": (228, 304, 3)}, (228, 304))
        wide = DepthEigenHead(DepthEigenOptions(**RANGE), {"pixels/rgb": (416, 544, 3)}, (416, 544))
        coarse: Any = head.coarse
        sizes, image = [], torch.zeros(1, 3, 228, 304)
        for layer in coarse.convolutions:
            image = layer(image)
            sizes += [tuple(image.shape[1:])] if isinstance(layer, torch.nn.Conv2d | torch.nn.MaxPool2d) else []
    assert sizes[0] == (96, 57, 76)  # the original: 55x74
    assert sizes[1] == (96, 28, 38)  # 27x37
    assert sizes[3] == (256, 14, 19)  # 13x18
    assert sizes[-1] == (256, 7, 10)  # 6x8
    assert (head.grid, wide.grid) == ((57, 76), (104, 136))
    channels = [3, 96, 256, 384, 384, 256]
    convolutions = sum(a * b * k * k + b for a, b, k in zip(channels, channels[1:], (11, 5, 3, 3, 3), strict=False))
    linear = (256 * 7 * 10 * 4096 + 4096) + (4096 * 57 * 76 + 57 * 76)
    assert by_hand.count_of(coarse.convolutions) == convolutions == 3_747_200  # does not depend on padding
    assert by_hand.count_of(head) == convolutions + linear + 119_437 == 95_019_257
    assert DepthEigenHead.reads(head.options) == ("pixels/rgb",)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_scale_invariant_loss_is_that_of_the_paper(share: float) -> None:
    """Equation 4 from its terms; with lambda 1 also as equation 3, the mean over all pairs of cells."""
    generator = np.random.default_rng(4)
    target, guess = by_hand.targets(4, OUT, share=0.6), generator.normal(0.5, 1, (4, 30))
    target.valid[2], target.mean[2] = False, 0.0
    losses, pairs = [], []
    for view in range(4):
        cells = [cell for cell in range(30) if target.valid[view, cell]]
        away = [guess[view, cell] - math.log(float(target.mean[view, cell])) for cell in cells]
        if cells:
            n = len(cells)
            losses.append(math.fsum(d * d for d in away) / n - share / n**2 * math.fsum(away) ** 2)
            pairs.append(math.fsum((a - b) ** 2 for a in away for b in away) / (2 * n**2))
    found = dense.scale_invariant(torch.tensor(guess, dtype=torch.float32), target, share).item()
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)
    if share == 1.0:
        assert found == pytest.approx(sum(pairs) / 3, rel=1e-5)


def test_losses_are_of_the_map_that_the_phase_trains() -> None:
    head, batch = by_hand.stirred(make_head(dropout=0.0), 0.1), make_batch()
    image = head.image(batch.columns["pixels/rgb"])
    coarse = head.coarse(image)
    refined = head.refine(image, coarse)
    for phase, maps in (("coarse", coarse), ("refine", refined)):
        expected = dense.scale_invariant(maps, batch.targets["depth"], 0.5)
        assert torch.equal(head.losses(batch, phase)["total"], expected)
    metres = make_head(dropout=0.0, loss="l2")
    target, found = batch.targets["depth"], metres.coarse(metres.image(batch.columns["pixels/rgb"])).flatten(1)
    expected = (found - target.mean)[target.valid].square().mean()
    torch.testing.assert_close(metres.losses(batch, "coarse")["total"], expected)
    nothing = Batch(batch.columns, {"depth": by_hand.nowhere(target)})
    assert not head.losses(nothing, "refine")["total"].requires_grad


def test_refining_never_changes_the_coarse_network() -> None:
    head, batch = make_head(), make_batch()
    assert [phase.name for phase in head.phases()] == ["coarse", "refine"]
    head.losses(batch, "refine")["total"].backward()
    assert all(value.grad is None for value in head.coarse.parameters())
    assert all(value.grad is not None for value in head.refine.parameters())  # type: ignore[union-attr]
    assert [phase.name for phase in make_head(training="together").phases()] == ["depth"]
    assert sum(value.numel() for _, value in make_head(training="together").phases()[0].parameters) == by_hand.count_of(head)


@pytest.mark.parametrize("options", [{}, {"training": "together"}, {"loss": "l2"}, {"refined": False}])
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    head, batch = make_head(**options).train(), make_batch()
    for phase in head.phases():
        with NothingWaits():
            head.losses(batch, phase.name)["total"].backward()
    with NothingWaits(), torch.inference_mode():
        head.eval().depth(batch.columns)


@pytest.mark.parametrize("loss", ["scale-invariant", "l2"])
def test_a_batch_is_learnt_by_heart(loss: str) -> None:
    stage = {"optimiser": "adamw", "lr": 0.01}
    head = make_head(loss=loss, coarse=stage, refine=stage, dropout=0.0, hidden=32, width=8)
    losses = by_hand.trained(head, Batch(make_batch().columns, {"depth": by_hand.ramps(B, OUT)}), 60)
    assert losses[-1] < 0.1 * losses[1]
    assert losses[-2] < 0.1 * losses[0]


def test_dropout_belongs_to_training() -> None:
    head, columns = by_hand.stirred(make_head(), 0.1), make_batch().columns
    assert torch.equal(head.eval()(columns), head(columns))
    assert not torch.equal(head.train()(columns), head(columns))


def test_pictures_and_options_that_do_not_fit_are_refused() -> None:
    table = {"name": "depth-eigen", **RANGE}
    cls, options = head_options(table)
    with pytest.raises(RecipeError, match=r"12x24 pixels; depth-eigen needs 16x16"):
        cls(options, {"pixels/rgb": (12, 24, 3)}, (12, 24))
    with pytest.raises(RecipeError, match=r"16x22; expected multiples of 4"):
        cls(options, {"pixels/rgb": (16, 22, 3)}, (16, 22))
    with pytest.raises(RecipeError, match="widths"):
        head_options({**table, "widths": [1, 2, 3]})
