"""Options of the PureCLIP head that neither paper nor code have, and a training step that never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcd.encoders.base import TextTower
from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.heads.base import Batch, PatchTargets
from pcd.heads.bins import DepthBins
from pcd.heads.pureclip import PureClipHead, PureClipOptions
from pcd.losses import info_nce_loss, neighbour_targets
from pcd.training.targets import RowTargets
from tests.test_pureclip import _linear, _mlp, _unit

D, P, B, GRID, CPU = 6, 4, 3, (2, 2), torch.device("cpu")
SHAPES = {"clip/patch": (P, D), "clip/patch@2": (P, D), "clip/patch@7": (P, D), "clip/cls": (D,)}
RANGE = {"min_depth": 0.1, "max_depth": 10.0}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"cls": False},
    {"fusion": "film"},
    {"layers": [2, 7]},
    {"label_smoothing": 0.8, "spacing": "log"},
    {"depth": {"rmse_over": "batch", "train_table": True}, "dropout": 0.2},
]


def make_head(seed: int = 0, **options: Any) -> PureClipHead:
    torch.manual_seed(seed)
    values = {**RANGE, "table_init": "random", "hidden": 2, "dropout": 0.0, **options}
    return PureClipHead(PureClipOptions.model_validate(values), SHAPES, GRID)


def stirred(head: PureClipHead) -> PureClipHead:
    """Every parameter away from where it starts."""
    with torch.no_grad():
        for value in head.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.3)
    return head


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    columns = {name: torch.randn(B, *shape, generator=generator) for name, shape in SHAPES.items()}
    columns = {name: value if name == "clip/cls" else value.half() for name, value in columns.items()}
    valid = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=bool)
    mean = np.random.default_rng(2).uniform(0.1, 10, (B, P)).astype(np.float32)
    target = PatchTargets.from_host(valid * np.float32(5), mean, np.full_like(mean, 0.25), valid, device=CPU)
    return Batch(columns, {"embedding": target, "depth": target})


class NothingWaits(TorchDispatchMode):
    """Fails for operations whose result the host must know before it can go on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if name == "index" else []
        if masks or name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", VARIANTS)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    head, batch = make_head(**options).train(), make_batch()
    for phase in ("embedding", "depth"):
        with NothingWaits():
            head.losses(batch, phase)["total"].backward()
    assert head.phi[1].weight.grad is not None
    with NothingWaits(), torch.inference_mode():
        head.eval().depth(batch.columns)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        torch.nonzero,
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_noticed(wait: Any) -> None:
    """In forward and in backward: or the test above would prove nothing."""
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(3))

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            wait(gradient)
            return gradient

    total = Waiting.apply(torch.ones(3, requires_grad=True)).sum()
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        total.backward()


def test_targets_list_the_patches_that_count() -> None:
    generator = np.random.default_rng(0)
    count, mean, var = (generator.random((9, P)).astype(np.float32) for _ in range(3))
    valid = generator.random((9, P)) < 0.5
    valid[4] = False
    rows = [7, 4, 0, 7]
    found = RowTargets(count, mean, var, valid).batch(np.array(rows), CPU)
    expected = [(b * P + p, b) for b, row in enumerate(rows) for p in range(P) if valid[row, p]]
    assert list(zip(found.flat.tolist(), found.view.tolist(), strict=True)) == expected
    assert (found.flat.dtype, found.view.dtype) == (torch.int64, torch.int64)
    for tensor, array in ((found.count, count), (found.mean, mean), (found.var, var), (found.valid, valid)):
        np.testing.assert_array_equal(tensor, array[rows])
    nothing = RowTargets(count, mean, var, valid).batch(np.array([4]), CPU)
    assert nothing.flat.shape == nothing.view.shape == (0,)
    assert not make_head().losses(Batch({}, {"depth": nothing}), "depth")["total"].requires_grad


def test_small_products_keep_their_precision_under_autocast() -> None:
    """Cosines in bf16 would be wrong by 5 % of a score at tau = 0.07."""
    head, batch = stirred(make_head(fusion="film")).eval(), make_batch()
    fused = torch.nn.functional.normalize(torch.randn(5, D), dim=-1)
    expected = head.expected_depth(fused), head._modulate(fused, fused, fused, torch.arange(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.expected_depth(fused), expected[0])
        assert torch.equal(head._modulate(fused, fused, fused, torch.arange(5)), expected[1])
        found = head.distribution(batch.columns)
        depth = found.mean
        head.train().losses(batch, "embedding")["total"].backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in head.parameters())
    exact = (found.probabilities.double() * found.centres.double()).sum(dim=-1)
    torch.testing.assert_close(depth.double(), exact, rtol=1e-6, atol=0)


def test_bins_in_steps_of_a_factor() -> None:
    bins = DepthBins(0.5, 8.0, 4, "log")
    np.testing.assert_allclose(bins.edges, [0.5, 1, 2, 4, 8], rtol=1e-15)
    np.testing.assert_allclose(bins.centres, [0.5 * 2**0.5, 2**0.5, 2 * 2**0.5, 4 * 2**0.5], rtol=1e-15)
    assert bins.describe() == "4 bins, each 2.00 times as wide as the one before"
    assert DepthBins(0.0, 10.0, 4).describe() == "4 bins of 2.50 m"
    for spacing in ("even", "log"):
        bins = DepthBins(0.1, 10.0, 15, spacing)
        edges, ends = [np.float32(edge) for edge in bins.edges], (np.float32(0), np.float32(99))
        depths = [step for edge in edges for step in (np.nextafter(edge, ends[0]), edge, np.nextafter(edge, ends[1]))]
        slow = [next((j for j in range(15) if depth <= edges[j + 1]), 14) for depth in depths]
        given = torch.tensor(depths)
        assert bins.index(given).tolist() == bins.index(given, make_head(spacing=spacing).edges).tolist() == slow
        assert np.all((bins.edges[:-1] < bins.centres) & (bins.centres < bins.edges[1:]))


def test_bins_in_steps_of_a_factor_need_a_start() -> None:
    table = {"name": "pureclip", "min_depth": 0.0, "max_depth": 10.0, "spacing": "log"}
    with pytest.raises(RecipeError, match=r"spacing = 'log': bins that grow by a constant factor need a min_depth above 0"):
        head_options(table)
    head_options({**table, "min_depth": 0.1})
    log = make_head(spacing="log", bins=4, table_init="text")
    np.testing.assert_allclose(log.centres, DepthBins(0.1, 10.0, 4, "log").centres, rtol=1e-6)
    assert log.phrases(log.options) == ("0.18 meter", "0.56 meter", "1.78 meter", "5.62 meter")


@pytest.mark.parametrize("width", [0.4, 1.0, 3.0])
def test_smoothed_targets_against_a_loop(width: float) -> None:
    cosines = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    bins, tau, expected = [0, 4, 2, 1, 1, 3, 0], 0.07, 0.0
    for row, y in zip(cosines.tolist(), bins, strict=True):
        weights = [math.exp(-0.5 * (abs(j - y) / width) ** 2) for j in range(5)]
        total = math.log(math.fsum(math.exp(score / tau) for score in row))
        expected -= math.fsum(w * (score / tau - total) for w, score in zip(weights, row, strict=True)) / math.fsum(weights)
    targets = neighbour_targets(5, width)
    found = info_nce_loss(cosines, torch.tensor(bins), tau, targets.double())
    assert float(found) == pytest.approx(expected / 7, rel=1e-6)
    np.testing.assert_allclose(targets.sum(dim=1), 1, rtol=1e-6)
    assert targets[2].tolist() == targets[2].flip(0).tolist()
    assert targets[0, 0] > targets[2, 2]  # what falls beyond the end stays with the bins there are


def test_no_smoothing_is_what_was_there_before() -> None:
    assert torch.equal(neighbour_targets(6, 1e-200), torch.eye(6))
    batch, values = make_batch(), []
    for options in ({}, {"label_smoothing": 0.0}, {"label_smoothing": 1e-3}, {"label_smoothing": 1.0}):
        values.append(make_head(0, **options).losses(batch, "embedding"))
    assert torch.equal(values[0]["info_nce"], values[1]["info_nce"])
    torch.testing.assert_close(values[2]["info_nce"], values[0]["info_nce"])
    assert values[3]["info_nce"] != values[0]["info_nce"]
    assert values[3]["alignment"] == values[0]["alignment"]
    for wrong in (-0.1, math.inf):
        with pytest.raises(RecipeError, match="label_smoothing"):
            head_options({"name": "pureclip", **RANGE, "label_smoothing": wrong})


def slow_depth(head: PureClipHead, columns: dict[str, Tensor]) -> list[float]:
    """Depths with FiLM, in plain floats."""
    state: dict[str, Any] = {name: value.double().tolist() for name, value in head.state_dict().items()}
    table, centres = [_unit(row) for row in state["table"]], head.bins.centres
    depths = []
    for b in range(B):
        maps = _linear(_unit(columns["clip/cls"][b].double().tolist()), state["film.weight"])
        for i in range(P):
            token = [v for name in head.options.token_columns for v in columns[name][b, i].double().tolist()]
            rotated = _mlp(token, state, "phi")
            seen = [(1 + s) * v + t for s, v, t in zip(maps[:D], rotated, maps[D:], strict=True)]
            z = _unit(_mlp(seen, state, "psi"))
            scores = [math.exp(sum(a * w for a, w in zip(z, row, strict=True)) / 0.07) for row in table]
            depths.append(sum(s * c for s, c in zip(scores, centres, strict=True)) / sum(scores))
    return depths


@pytest.mark.parametrize("layers", [[], [7, 2]])
def test_film_and_layers_agree_with_the_formula(layers: list[int]) -> None:
    head, batch = stirred(make_head(fusion="film", layers=layers)).eval(), make_batch()
    expected = slow_depth(head, dict(batch.columns))
    np.testing.assert_allclose(head.depth(batch.columns).detach().reshape(-1), expected, rtol=2e-5)
    np.testing.assert_allclose(head.train().depth(batch.columns).detach().reshape(-1), expected, rtol=2e-5)


@pytest.mark.parametrize("phase", ["embedding", "depth"])
@pytest.mark.parametrize("options", [{"fusion": "film"}, {"layers": [2]}, {"layers": [7], "fusion": "film", "cls": True}])
def test_training_has_the_gradients_of_the_modules(options: dict[str, Any], phase: str) -> None:
    found = []
    for training in (True, False):
        head = stirred(make_head(**options)).train(training)
        head.losses(make_batch(), phase)["total"].backward()
        found.append({name: value.grad for name, value in head.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_film_starts_as_no_cls_and_is_computed_once_per_view() -> None:
    batch, film, plain = make_batch(), make_head(fusion="film").eval(), make_head(cls=False).eval()
    assert torch.equal(film.depth(batch.columns), plain.depth(batch.columns))
    assert film.film is not None
    sizes: list[tuple[int, ...]] = []
    film.film.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape)))
    film.depth(batch.columns)
    film.train().losses(batch, "depth")["total"].backward()
    assert sizes == [(B, D), (B, D)]
    assert float(film.film.weight.grad.abs().min()) > 0  # type: ignore[union-attr]
    ignored = make_head(cls=False, fusion="film")
    assert ignored.state_dict().keys() == plain.state_dict().keys()
    frozen = make_head(fusion="film", train_mlps=False)
    assert [name for phase in frozen.phases() for name, _ in phase.parameters] == ["table"]


@pytest.mark.parametrize(
    ("options", "phi", "psi", "film"),
    [
        ({}, 4_721_664, 7_082_496, 0),
        ({"cls": False}, 4_721_664, 4_721_664, 0),
        ({"fusion": "film"}, 4_721_664, 4_721_664, 2 * 768 * 768),
        ({"layers": [6, 12]}, 4_721_664 + 2 * 768 * 3072 + 2 * 2 * 768, 7_082_496, 0),
    ],
)
def test_parameters(options: dict[str, Any], phi: int, psi: int, film: int) -> None:
    """At the sizes of ViT-L/14@336."""
    shapes = {name: (768,) if name == "clip/cls" else (576, 768) for name in ("clip/patch", "clip/patch@6", "clip/patch@12")}
    values = PureClipOptions.model_validate({**RANGE, **options})
    with torch.device("meta"):
        head = PureClipHead(values, {**shapes, "clip/cls": (768,)}, (24, 24))
    sizes = [sum(v.numel() for v in part.parameters()) for part in (head.phi, head.psi, head)]
    assert sizes == [phi, psi, phi + psi + film + 15 * 768]


def test_layers_are_read_and_must_fit() -> None:
    options = PureClipOptions.model_validate({**RANGE, "layers": [7, 2]})
    assert PureClipHead.reads(options) == ("clip/patch", "clip/patch@7", "clip/patch@2", "clip/cls")
    other = options.model_copy(update={"patch_column": "mine", "cls": False})
    assert PureClipHead.reads(other) == ("mine", "mine@7", "mine@2")
    with pytest.raises(RecipeError, match=r"clip/patch@2 is \(5, 6\), clip/patch has 4 patches"):
        PureClipHead(options, {**SHAPES, "clip/patch@2": (5, D)}, GRID)
    for wrong, message in (([2, 2], "a layer is named twice"), ([0], "greater than 0"), (["x"], "integer")):
        with pytest.raises(RecipeError, match=message):
            head_options({"name": "pureclip", **RANGE, "layers": wrong})


class Texts:
    """A context that knows texts alone."""

    def text(self, phrases: Sequence[str]) -> Tensor:
        return torch.eye(len(phrases), D) + 0.1 * torch.arange(len(phrases))[:, None]

    def text_tower(self) -> TextTower:
        raise AssertionError("this head learns no words")

    def batches(self) -> Iterator[Batch]:
        raise AssertionError("a table of texts looks at no rows")


def test_shuffled_prompts_give_no_bin_its_own() -> None:
    plain = make_head(table_init="text", bins=6)
    plain.initialise(Texts())
    rows = [tuple(row) for row in plain.table.tolist()]
    orders = set()
    for seed in range(8):
        head = make_head(seed, table_init="text-shuffled", bins=6)
        assert head.phrases(head.options) == plain.phrases(plain.options)
        head.initialise(Texts())
        order = tuple(rows.index(tuple(row)) for row in head.table.tolist())
        assert sorted(order) == list(range(6))
        assert all(place != number for place, number in enumerate(order))
        again = make_head(seed, table_init="text-shuffled", bins=6)
        again.initialise(Texts())
        assert torch.equal(again.table, head.table)
        orders.add(order)
    assert len(orders) > 1
    unlike = make_head(0, table_init="text-shuffled", bins=6)
    assert all(torch.equal(a, b) for a, b in zip(unlike.parameters(), make_head(0, bins=6).parameters(), strict=True))
