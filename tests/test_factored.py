"""What a training step of PureCLIP computes against its plain twin: the modules, applied to the concatenation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcd.heads import factored
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.pureclip import PureClipHead, PureClipOptions

PATTERNS = EVERYWHERE, HOLES, LONELY = "everywhere", "holes", "lonely"
"""Which patches count: all; some, and none of one view; one in every view but the first."""


def valid_patches(pattern: str, batch: int, patches: int) -> Tensor:
    """`(B, P)`."""
    valid = torch.rand(batch, patches, generator=torch.Generator().manual_seed(5)) < 0.6
    if pattern == EVERYWHERE:
        valid[:] = True
    elif pattern == HOLES:
        valid[:, 0] = True
        valid[batch // 2] = False
    else:
        valid[1:] = False
        valid[1:, patches // 2] = True
    return valid


def sequential(width: int, hidden: int, out: int, dropout: float = 0.0) -> nn.Sequential:
    """An MLP of the head, every parameter away from where it starts."""
    torch.manual_seed(2)
    first, second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, out, bias=False)
    layers = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), nn.Dropout(dropout), second, nn.LayerNorm(out))
    with torch.no_grad():
        for value in layers.parameters():
            value.add_(torch.randn_like(value) * 0.2)
    return layers


class Twin(PureClipHead):
    """The head, its MLPs applied as modules also in training, in the precision of its parameters."""

    def embed(self, patch: Tensor, cls: Tensor | None, view: Tensor | None = None) -> Tensor:
        if view is None:
            return super().embed(patch, cls)
        rotated = self.phi(patch.to(self.table.dtype))
        if cls is not None:
            rotated = torch.cat([rotated, F.normalize(cls.float(), dim=-1).to(rotated)[view]], dim=-1)
        return F.normalize(self.psi(rotated), dim=-1)


def make_head(kind: type[PureClipHead], width: int, patches: int, **options: Any) -> PureClipHead:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"min_depth": 1e-3, "max_depth": 10.0, "table_init": "random", "hidden": 2, "dropout": 0.0}
    shapes = {"clip/patch": (patches, width), "clip/cls": (width,)}
    head = kind(PureClipOptions.model_validate({**defaults, **options}), shapes, (1, patches))
    with torch.no_grad():
        for value in head.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.2)
    return head.train()


def make_batch(width: int, batch: int, patches: int, *, pattern: str = HOLES, cls_scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    columns = {
        "clip/patch": torch.randn(batch, patches, width, generator=generator).half(),
        "clip/cls": torch.randn(batch, width, generator=generator) * cls_scale,
    }
    mean = torch.rand(batch, patches, generator=generator) * 9 + 0.5
    valid = valid_patches(pattern, batch, patches)
    arrays = (valid.float() * 5, mean, torch.full_like(mean, 0.25), valid)
    target = PatchTargets.from_host(*(array.numpy() for array in arrays), device=torch.device("cpu"))
    return Batch(columns, {"embedding": target, "depth": target})


def gradients(head: PureClipHead, batch: Batch, phase: str = "embedding") -> dict[str, Tensor]:
    """The loss, and the gradients of all parameters that have one."""
    head.zero_grad()
    torch.manual_seed(3)
    total = head.losses(batch, phase)["total"]
    total.backward()
    return {"loss": total.detach(), **{name: p.grad for name, p in head.named_parameters() if p.grad is not None}}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference as a share of the largest absolute value of each tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - value.double()).abs().max() / value.abs().max()) for name, value in expected.items()
    )


def through(function: Callable[[Tensor], Tensor], inputs: Tensor, layers: nn.Module) -> dict[str, Tensor]:
    """The value at `inputs` and the gradients of a weighted sum of it."""
    inputs = inputs.clone().requires_grad_()
    value = function(inputs)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(4)).to(value)
    names, parameters = zip(*layers.named_parameters(), strict=True)
    found = torch.autograd.grad((value * weights).sum(), [inputs, *parameters])
    return {"value": value.detach(), **dict(zip(["inputs", *names], found, strict=True))}


SIZES = [(5, 1, 3, 2, 3), (6, 6, 12, 3, 4), (16, 8, 24, 9, 3), (96, 96, 192, 4, 25)]
"""Width of patches and of what views share, hidden width, views, patches."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_the_modules(sizes: tuple[int, ...], pattern: str, dtype: torch.dtype) -> None:
    width, shared_width, hidden, batch, patches = sizes
    view = valid_patches(pattern, batch, patches).nonzero()[:, 0]
    layers = sequential(width + shared_width, hidden, 12).to(dtype)
    inputs, shared = torch.randn(len(view), width, dtype=dtype) * 3 + 1, torch.randn(batch, shared_width, dtype=dtype) - 2
    expected = through(lambda x: layers(torch.cat([x, shared[view]], dim=-1)), inputs, layers)
    found = through(lambda x: factored.mlp_with_view(layers, x, shared, view), inputs, layers)
    assert furthest(found, expected) <= TOLERANCE[dtype]
    layers = sequential(width, hidden, 12).to(dtype)
    found = through(lambda x: factored.mlp(layers, x), inputs, layers)
    assert furthest(found, through(layers, inputs, layers)) <= TOLERANCE[dtype]


def test_unit_rows() -> None:
    inputs = torch.randn(5, 7, dtype=torch.float64)
    inputs[1], inputs[2] = 0, inputs[2] * 1e-14
    inputs.requires_grad_()
    weights = torch.randn(5, 7, dtype=torch.float64)
    values = [function(inputs) for function in (factored.unit_rows, lambda x: F.normalize(x, dim=-1))]
    found, expected = (torch.autograd.grad((value * weights).sum(), inputs)[0] for value in values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("middle", "spread"), [(1e3, 1.0), (-1e4, 1.0), (0.0, 1e-3), (1.0, 0.0)])
def test_float32_keeps_the_variance_of_far_or_flat_inputs(middle: float, spread: float) -> None:
    """Means far from 0, where `E[x^2] - E[x]^2` would have no digit left, and inputs near the epsilon of LayerNorm."""
    view = torch.arange(3).repeat_interleave(20)
    layers = sequential(64, 32, 32)
    inputs, shared = torch.randn(60, 32) * spread + middle, torch.randn(3, 32) * spread + middle
    exact = sequential(64, 32, 32).double()
    expected = exact(torch.cat([inputs, shared[view]], dim=-1).double())
    plain = layers(torch.cat([inputs, shared[view]], dim=-1))
    found = factored.mlp_with_view(layers, inputs, shared, view)
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max() + 2e-6 * expected.abs().max()


@pytest.mark.parametrize("cls_scale", [1.0, 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("phase", ["embedding", "depth"])
def test_a_training_step_has_the_gradients_of_the_twin(phase: str, cls: bool, pattern: str, cls_scale: float) -> None:
    """Within 2e-6, or twice as far as the modules in float32 are from float64 where that is more: tau multiplies errors."""
    batch = make_batch(24, 4, 12, pattern=pattern, cls_scale=cls_scale)
    head, twin, exact = (make_head(kind, 24, 12, cls=cls) for kind in (PureClipHead, Twin, Twin))
    target = batch.targets[phase]
    doubled = replace(target, count=target.count.double(), mean=target.mean.double(), var=target.var.double())
    expected = gradients(twin, batch, phase)
    own = furthest(expected, gradients(exact.double(), Batch(batch.columns, {phase: doubled}), phase))
    assert furthest(gradients(head, batch, phase), expected) <= max(2e-6, 2 * own)


def test_dropout_is_that_of_the_module() -> None:
    """The same draws from the same seed on the CPU, so also the same distribution, and none in evaluation."""
    batch = make_batch(24, 4, 12)
    head, twin = (make_head(kind, 24, 12, dropout=0.4) for kind in (PureClipHead, Twin))
    found, expected = gradients(head, batch), gradients(twin, batch)
    assert furthest(found, expected) <= 5e-6
    assert found["loss"] != gradients(make_head(PureClipHead, 24, 12), batch)["loss"]
    torch.testing.assert_close(head.eval().depth(batch.columns), twin.eval().depth(batch.columns), rtol=0, atol=0)
    layers, inputs = sequential(6, 12, 6, dropout=0.4).eval(), torch.randn(5, 6)
    torch.testing.assert_close(factored.mlp(layers, inputs), layers(inputs), rtol=1e-5, atol=1e-6)


def test_training_repeats_bit_for_bit() -> None:
    batch = make_batch(48, 8, 40)
    states = []
    for _ in range(2):
        head = make_head(PureClipHead, 48, 40, dropout=0.2)
        optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for phase in ("embedding", "depth", "embedding", "depth"):
            gradients(head, batch, phase)
            optimiser.step()
        states.append(head.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def products(head: PureClipHead, batch: Batch) -> float:
    """Multiplications of a step as multiples of M D H."""
    width, patches = head.table.shape[1], int(batch.targets["embedding"].valid.sum())
    with FlopCounterMode(display=False) as counter:
        gradients(head, batch)
    return int(counter.get_total_flops()) / 2 / (patches * width * head.options.hidden * width)


def test_a_step_takes_eleven_products_instead_of_fifteen() -> None:
    """None for tokens, for gamma and beta before a Linear, for the CLS half, or for patches that do not count."""
    for pattern in PATTERNS[:2]:
        batch = make_batch(128, 2, 64, pattern=pattern)
        columns, rest = 3 * 8 / 128, 0.3  # two views and the gap, padded; the depth table, weights times CLS and beta
        assert 15 <= products(make_head(Twin, 128, 64), batch) < 15 + rest
        assert 11 + columns <= products(make_head(PureClipHead, 128, 64), batch) < 11 + columns + rest


def test_the_graph_ends_at_parameters() -> None:
    head, batch = make_head(PureClipHead, 12, 6), make_batch(12, 3, 6)
    waiting, seen, leaves = [head.losses(batch, "embedding")["total"].grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [function for function, _ in node.next_functions]
    assert {id(leaf) for leaf in leaves} == {id(value) for value in head.parameters()}
    ends = [node for node in seen if node.name() == "_TwoLinearsBackward" and node.next_functions[0][0] is None]
    assert len(ends) == 1  # phi: nothing in front of its first product needs a gradient


def test_frozen_mlps_leave_the_table_to_learn() -> None:
    batch = make_batch(24, 4, 12)
    found, expected = (gradients(make_head(kind, 24, 12, train_mlps=False), batch) for kind in (PureClipHead, Twin))
    assert set(found) == {"loss", "table"}
    assert furthest(found, expected) <= 2e-6


def test_a_second_backward_is_refused() -> None:
    head = make_head(PureClipHead, 12, 6)
    total = head.losses(make_batch(12, 3, 6), "embedding")["total"]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_parameters_keep_names_and_first_values() -> None:
    """Those of the modules made in this order: checkpoints and seeds of earlier versions stay good."""
    head = PureClipHead(
        PureClipOptions(min_depth=0.0, max_depth=1.0, hidden=2), {"clip/patch": (4, 6), "clip/cls": (6,)}, (2, 2)
    )
    torch.manual_seed(9)
    again = PureClipHead(head.options, {"clip/patch": (4, 6), "clip/cls": (6,)}, (2, 2))
    torch.manual_seed(9)
    expected = {}
    for name, width in (("phi", 6), ("psi", 12)):
        expected[f"{name}.1.weight"] = nn.Linear(width, 12, bias=False).weight
        expected[f"{name}.4.weight"] = nn.Linear(12, 6, bias=False).weight
        for number, size in ((0, width), (5, 6)):
            expected[f"{name}.{number}.weight"], expected[f"{name}.{number}.bias"] = torch.ones(size), torch.zeros(size)
    expected["table"] = torch.randn(15, 6)
    state = again.state_dict()
    assert state.keys() == expected.keys() == head.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
