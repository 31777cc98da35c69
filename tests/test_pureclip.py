"""The PureCLIP head against a re-computation in plain loops from the paper's equations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.encoders.base import TextTower
from pcd.errors import RecipeError, TrainingError
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.bins import Distribution
from pcd.heads.pureclip import PureClipHead, PureClipOptions

D, P, B, GRID = 6, 4, 3, (2, 2)
SHAPES = {"clip/patch": (P, D), "clip/cls": (D,)}


def make_head(**options: Any) -> PureClipHead:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"min_depth": 1e-3, "max_depth": 10.0, "table_init": "random", "hidden": 2}
    head = PureClipHead(PureClipOptions.model_validate({**defaults, **options}), SHAPES, GRID).eval()
    with torch.no_grad():
        for value in head.parameters():  # LayerNorms start at 1 and 0: make every parameter matter
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.3)
    return head


def make_columns() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "clip/patch": torch.randn(B, P, D, generator=generator).half(),
        "clip/cls": torch.randn(B, D, generator=generator),
    }


def make_targets(mean: Tensor, valid: Tensor) -> PatchTargets:
    arrays = (valid.float() * 5, mean, torch.full_like(mean, 0.25), valid)
    return PatchTargets.from_host(*(array.numpy() for array in arrays), device=torch.device("cpu"))


def _layer_norm(x: list[float], weight: list[float], bias: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(var + 1e-5) * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def _linear(x: list[float], weight: list[list[float]]) -> list[float]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]


def _mlp(x: list[float], state: dict[str, Any], name: str) -> list[float]:
    """LN, Linear, GELU (exact), Linear, LN."""
    x = _layer_norm(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"])
    x = _linear(x, state[f"{name}.1.weight"])
    x = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    return _layer_norm(_linear(x, state[f"{name}.4.weight"]), state[f"{name}.5.weight"], state[f"{name}.5.bias"])


def _unit(x: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in x))
    return [v / norm for v in x]


def slow_forward(head: PureClipHead, columns: dict[str, Tensor]) -> tuple[list[Any], list[Any]]:
    """Fused vectors (equations 9, 10) and depths (equations 3 to 5) of every patch, in plain Python floats."""
    state = {name: value.double().tolist() for name, value in head.state_dict().items()}
    table = [_unit(row) for row in state["table"]]
    centres = [1e-3 + (j + 0.5) * (10.0 - 1e-3) / len(table) for j in range(len(table))]
    fused, depths = [], []
    for b in range(B):
        cls = _unit(columns["clip/cls"][b].double().tolist())
        for i in range(P):
            rotated = _mlp(columns["clip/patch"][b, i].double().tolist(), state, "phi")
            z = _unit(_mlp([*rotated, *cls] if head.options.cls else rotated, state, "psi"))
            scores = [math.exp(sum(a * w for a, w in zip(z, row, strict=True)) / 0.07) for row in table]
            fused.append(z)
            depths.append(sum(s * c for s, c in zip(scores, centres, strict=True)) / sum(scores))
    return fused, depths


@pytest.mark.parametrize("cls", [True, False])
def test_forward_agrees_with_the_equations(cls: bool) -> None:
    head, columns = make_head(cls=cls), make_columns()
    _, depths = slow_forward(head, columns)
    np.testing.assert_allclose(head.depth(columns).detach().reshape(-1), depths, rtol=1e-5)


MEANS = torch.tensor([[0.0005, 2.0, 12.5, 9.99], [1.0, 4.0, 0.0, 3.3], [0.7, 0.7, 5.0, 6.0]])
VALID = torch.tensor([[True, True, True, True], [True, False, False, True], [False] * 4])


def _slow_bin(depth: float) -> int:
    width = (10.0 - 1e-3) / 15
    for j in range(15):
        if depth <= 1e-3 + (j + 1) * width:
            return j
    return 14


def test_embedding_loss_agrees_with_the_equations() -> None:
    head, columns = make_head(), make_columns()
    fused, _ = slow_forward(head, columns)
    table = [_unit(row) for row in head.table.double().tolist()]
    align, nce, number = 0.0, 0.0, 0
    for b in range(B):
        for i in range(P):
            if not VALID[b, i]:
                continue
            y, z = _slow_bin(float(MEANS[b, i])), fused[b * P + i]
            scores = [sum(a * w for a, w in zip(z, row, strict=True)) for row in table]
            align += 1 - scores[y]
            nce -= scores[y] / 0.07 - math.log(sum(math.exp(s / 0.07) for s in scores))
            number += 1
    losses = head.losses(Batch(columns, {"embedding": make_targets(MEANS, VALID)}), "embedding")
    assert losses["alignment"].item() == pytest.approx(align / number, rel=1e-5)
    assert losses["info_nce"].item() == pytest.approx(nce / number, rel=1e-5)
    assert losses["total"].item() == pytest.approx((align + nce) / number, rel=1e-5)
    weighted = make_head(embedding={"alignment": 0.5, "info_nce": 3.0})
    total = weighted.losses(Batch(columns, {"embedding": make_targets(MEANS, VALID)}), "embedding")["total"]
    assert total.item() == pytest.approx((0.5 * align + 3 * nce) / number, rel=1e-5)


@pytest.mark.parametrize("rmse_over", ["map", "batch"])
def test_depth_loss_agrees_with_the_equations(rmse_over: str) -> None:
    head, columns = make_head(depth={"rmse_over": rmse_over}), make_columns()
    _, depths = slow_forward(head, columns)
    roots, squares, number = [], 0.0, 0
    for b in range(B):
        own = [5 * ((depths[b * P + i] - float(MEANS[b, i])) ** 2 + 0.25) for i in range(P) if VALID[b, i]]
        roots += [math.sqrt(sum(own) / (5 * len(own)))] if own else []
        squares, number = squares + sum(own), number + 5 * len(own)
    expected = sum(roots) / len(roots) if rmse_over == "map" else math.sqrt(squares / number)
    got = head.losses(Batch(columns, {"depth": make_targets(MEANS, VALID)}), "depth")["total"]
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("phase", ["embedding", "depth"])
def test_a_batch_without_valid_patches_is_passed_over(phase: str) -> None:
    head, columns = make_head(), make_columns()
    losses = head.losses(Batch(columns, {phase: make_targets(MEANS, torch.zeros_like(VALID))}), phase)
    assert losses["total"].item() == 0
    assert not losses["total"].requires_grad


def test_published_sizes() -> None:
    shapes = {"clip/patch": (576, 768), "clip/cls": (768,)}
    head = PureClipHead(PureClipOptions(min_depth=1e-3, max_depth=10.0), shapes, (24, 24))

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert (size(head.phi), size(head.psi), size(head)) == (4_721_664, 7_082_496, 11_815_680)


def test_phases_follow_paper_and_code() -> None:
    paper, code = make_head().phases(), make_head(depth={"train_table": True}).phases()
    assert [(p.name, p.steps, p.lr, p.weight_decay) for p in paper] == [("embedding", 100, 3e-4, 1e-2), ("depth", 100, 1e-3, 0)]
    names = [{name for name, _ in phase.parameters} for phase in (*paper, *code)]
    assert "table" in names[0]
    assert names[1] == names[0] - {"table"}
    assert names[2] == names[3] == names[0]
    frozen = make_head(train_mlps=False).phases()
    assert [(p.name, [n for n, _ in p.parameters]) for p in frozen] == [("embedding", ["table"])]
    assert [p.name for p in make_head(depth={"steps": 0}).phases()] == ["embedding"]


class Context:
    def __init__(self, columns: dict[str, Tensor] | None = None, valid: Tensor = VALID) -> None:
        self.asked: list[str] = []
        self._columns, self._valid = columns or make_columns(), valid

    def text(self, phrases: Sequence[str]) -> Tensor:
        self.asked = list(phrases)
        return torch.arange(len(phrases) * D, dtype=torch.float32).reshape(-1, D) + 1

    def text_tower(self) -> TextTower:
        raise AssertionError("this head learns no words")

    def batches(self) -> Iterator[Batch]:
        yield Batch(self._columns, {"embedding": make_targets(MEANS, self._valid)})


def test_table_from_texts_is_normalised_and_uses_bin_centres() -> None:
    head, context = make_head(table_init="text"), Context()
    head.initialise(context)
    assert context.asked[:3] == ["0.33 meter", "1.00 meter", "1.67 meter"]
    expected = torch.arange(15 * D, dtype=torch.float32).reshape(-1, D) + 1
    torch.testing.assert_close(head.table.detach(), expected / expected.norm(dim=1, keepdim=True))
    wordy = PureClipOptions(min_depth=0.0, max_depth=2.0, bins=2, prompt="an object {centre:.0f} meters away")
    assert PureClipHead.phrases(wordy) == ("an object 0 meters away", "an object 2 meters away")


@pytest.mark.parametrize("prompt", ["far away", "{depth} meter"])
def test_prompts_that_cannot_work_are_refused(prompt: str) -> None:
    with pytest.raises(RecipeError, match=r"head\.prompt"):
        PureClipHead.phrases(PureClipOptions(min_depth=0.0, max_depth=2.0, prompt=prompt))


def test_table_from_tokens_is_the_mean_of_each_bin() -> None:
    head, context = make_head(table_init="tokens"), Context()
    head.initialise(context)
    tokens = make_columns()["clip/patch"].double().numpy()
    sums: dict[int, list[np.ndarray]] = {}
    for b in range(B):
        for i in range(P):
            if VALID[b, i]:
                token = tokens[b, i] / np.linalg.norm(tokens[b, i])
                sums.setdefault(_slow_bin(float(MEANS[b, i])), []).append(token)
    for j in range(15):
        nearest = min(sums, key=lambda k: (abs(k - j), k))
        mean = np.mean(sums[nearest], axis=0)
        np.testing.assert_allclose(head.table[j].detach(), mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(TrainingError, match="no training patch has valid depth"):
        make_head(table_init="tokens").initialise(Context(valid=torch.zeros_like(VALID)))


def test_random_table_needs_nothing() -> None:
    head = make_head()
    before = head.table.detach().clone()
    head.initialise(Context())
    assert torch.equal(head.table.detach(), before)


def test_impossible_heads_are_named() -> None:
    with pytest.raises(RecipeError, match="range is empty"):
        make_head(max_depth=1e-4)
    with pytest.raises(RecipeError, match="patches are 6 wide"):
        PureClipHead(PureClipOptions(min_depth=0.0, max_depth=1.0), {"clip/patch": (4, 6), "clip/cls": (5,)}, GRID)


def test_distribution_is_the_depth_with_its_uncertainty() -> None:
    head = make_head()
    columns = make_columns()
    found = head.distribution(columns)
    assert torch.equal(found.mean, head.depth(columns))
    p, c = found.probabilities.detach().double(), found.centres.double()
    mean = torch.stack([p[..., k] * c[k] for k in range(len(c))]).sum(dim=0)
    square = torch.stack([p[..., k] * c[k] ** 2 for k in range(len(c))]).sum(dim=0)
    torch.testing.assert_close(found.std.detach().double(), (square - mean**2).sqrt(), rtol=1e-4, atol=1e-4)
    bits = -torch.stack([p[..., k] * p[..., k].log2() for k in range(len(c))]).sum(dim=0)
    torch.testing.assert_close(found.entropy.detach().double(), bits / math.log2(len(c)), rtol=1e-5, atol=1e-6)


def test_entropy_of_the_certain_and_the_clueless() -> None:
    bins = torch.tensor([1.0, 2.0, 3.0, 4.0])
    certain = Distribution(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), bins)
    clueless = Distribution(torch.full((1, 1, 4), 0.25), bins)
    assert (certain.mean.item(), certain.std.item(), certain.entropy.item()) == (2.0, 0.0, 0.0)
    assert clueless.entropy.item() == 1.0
    assert clueless.std.item() == pytest.approx(1.25**0.5)
