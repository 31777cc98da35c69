"""The MLP baseline against its equations in float64, and that it learns what no linear map can."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.heads.base import Batch
from tests.baseline_support import (
    RANGE,
    B,
    Floats,
    P,
    as_arrays,
    counted,
    make_batch,
    make_head,
    one_thread,
    slow_output,
    slow_silog,
    taught,
)
from tests.test_head_linear import slow_tokens
from tests.test_head_options import NothingWaits

__all__ = ["one_thread"]
_ERF = np.vectorize(math.erf)


def slow_raw(head: Any, tokens: Floats, state: dict[str, Floats]) -> Floats:
    """LayerNorm, then Linear and GELU (exact) per hidden layer, then the map."""
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * state["norm.weight"] + state["norm.bias"]
    for layer in range(head.options.layers):
        x = x @ state[f"hidden.{3 * layer}.weight"].T + state[f"hidden.{3 * layer}.bias"]
        x = x * 0.5 * (1 + _ERF(x / math.sqrt(2)))
    raw: Floats = x @ state["map.weight"].T + state["map.bias"]
    return raw


@pytest.mark.parametrize(
    "options",
    [
        {"width": 16, "bins": 12},
        {"layers": 1, "width": 9, "output": "log-depth", "cls_columns": ["clip/cls"]},
        {"layers": 3, "width": 8, "output": "depth", "columns": ["clip/patch@2", "clip/patch"]},
    ],
)
def test_depth_loss_and_gradient_are_those_of_the_equations(options: dict[str, Any]) -> None:
    head, batch = make_head("mlp", dropout=0.0, **options).train(), make_batch()
    state, tokens, target = as_arrays(head), slow_tokens(head, batch), batch.targets["depth"]
    mean, count, _ = counted(target)
    valid = target.valid.reshape(-1).numpy()

    def slow_loss(changed: dict[str, Floats]) -> float:
        depth = slow_output(head, slow_raw(head, tokens[valid], changed))
        return 10 * slow_silog(depth.tolist(), mean, count)

    with torch.no_grad():
        expected = slow_output(head, slow_raw(head, tokens, state)).clip(0.1, 10).reshape(B, P)
        np.testing.assert_allclose(head.eval().depth(batch.columns), expected, rtol=1e-5)
    total = head.train().losses(batch, "depth")["total"]
    assert total.item() == pytest.approx(slow_loss(state), rel=1e-5)
    total.backward()
    generator = np.random.default_rng(0)
    for name, value in head.named_parameters():
        towards = generator.normal(size=value.shape)
        ends = [slow_loss({**state, name: state[name] + step * towards}) for step in (1e-6, -1e-6)]
        slope = float((value.grad.double().numpy() * towards).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-3, abs=1e-4), name


def test_dropout_belongs_to_training() -> None:
    head, batch = make_head("mlp", dropout=0.5, width=32), make_batch()
    torch.manual_seed(0)
    losses = {head.train().losses(batch, "depth")["total"].item() for _ in range(3)}
    assert len(losses) == 3
    assert torch.equal(head.eval().depth(batch.columns), head.eval().depth(batch.columns))
    plain = make_head("mlp", dropout=0.0, width=32)
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head.eval().depth(batch.columns), plain.eval().depth(batch.columns))


def test_training_looks_at_no_patch_that_does_not_count() -> None:
    batch, found = make_batch(), []
    hidden = ~batch.targets["depth"].valid[..., None]
    for norm in ("layer", "batch"):
        for patch in (batch.columns["clip/patch"], batch.columns["clip/patch"].masked_fill(hidden, torch.nan)):
            head = make_head("mlp", width=8, dropout=0.0, norm=norm).train()
            head.losses(Batch({"clip/patch": patch}, batch.targets), "depth")["total"].backward()
            found.append([*(value.grad for value in head.parameters()), *head.buffers()])
    for plain, spoilt in (found[:2], found[2:]):
        assert all(torch.equal(a, b) for a, b in zip(plain, spoilt, strict=True))


def test_parameters_at_the_size_of_vit_l() -> None:
    with torch.device("meta"):
        head = make_head("mlp", {"clip/patch": (576, 768)}, (24, 24), stir=0.0)
    sizes = [2 * 768, 768 * 512 + 512, 512 * 512 + 512, 512 * 256 + 256]
    assert sum(value.numel() for value in head.parameters()) == sum(sizes) == 789_248


def test_it_learns_what_is_not_linear_in_the_token() -> None:
    """Depth is far for tokens of one sign and near for those of the other, whichever it is: an XOR of two channels."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (B, P, 2), generator=generator) * 2.0 - 1
    batch = make_batch({"clip/patch": (P, 2)}, share=2.0)
    target = batch.targets["depth"]
    target.mean.copy_(torch.where(signs[..., 0] * signs[..., 1] > 0, 6.0, 1.5))
    batch = Batch({"clip/patch": signs.half()}, batch.targets)
    shapes, options = {"clip/patch": (P, 2)}, {"norm": "none", "output": "log-depth", "weight_decay": 0.0, "lr": 0.01}
    linear = make_head("linear", shapes, **options)  # type: ignore[arg-type]
    mlp = make_head("mlp", shapes, layers=1, width=32, dropout=0.0, **options)  # type: ignore[arg-type]
    assert taught(linear, batch, 200) > 0.3
    assert taught(mlp, batch, 200) < 0.03


def test_no_step_waits_and_bf16_only_rounds() -> None:
    head, batch = make_head("mlp", width=16, dropout=0.0).train(), make_batch()
    with NothingWaits():
        exact = head.losses(batch, "depth")["total"]
        exact.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head.losses(batch, "depth")["total"]
        rounded.backward()
        assert head.eval().depth(batch.columns).dtype == torch.float32
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize(("key", "value"), [("layers", 0), ("width", 0), ("dropout", 1.0), ("hidden", 4)])
def test_what_cannot_be_is_refused(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=key):
        head_options({"name": "mlp", **RANGE, key: value})
