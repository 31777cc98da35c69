"""What steadies training: warm-up after a switch, clipped gradients, cosine, averaged weights, joint steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcd.cache import Cache
from pcd.errors import RecipeError, RunError
from pcd.heads.base import Phase
from pcd.recipe import Recipe, parse_recipe
from pcd.recipe_files import load_recipe
from pcd.stages.runs import open_run
from pcd.stages.train import train
from pcd.training import checkpoints
from pcd.training.loop import EpochReport, Loop
from pcd.training.schedule import cosine
from pcd.training.steps import Average, Turns, add_gradient, clip
from tests.test_extract import run, toy_recipe
from tests.test_training import make_loop, make_rows

STEADY: dict[str, Any] = {"switch_warmup": 3, "grad_clip": 0.5, "decay": "cosine", "ema": 0.9}


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def rates_of(loop: Loop) -> list[tuple[str, float]]:
    """Phase and learning rate of every step that an optimiser takes while the loop runs."""
    seen: list[tuple[str, float]] = []
    for name, optimiser in loop._optimisers.items():
        optimiser.register_step_pre_hook(lambda opt, *_, name=name: seen.append((name, opt.param_groups[0]["lr"])))
    loop.run(lambda report: None)
    return seen


def weights(loop: Loop) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loop.head.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rates_rise_after_every_switch_and_at_the_start(cache: Cache, tmp_path: Path) -> None:
    """Six steps an epoch, three of embedding (3e-4) and four of depth (1e-3) in turns, warm-up over three steps."""
    phases = {"embedding": {"steps": 3, "lr": 3e-4}, "depth": {"steps": 4, "lr": 1e-3}}
    third, two, whole = 1 / 3, 2 / 3, 1.0
    cycle = [("embedding", 3e-4 * f) for f in (third, two, whole)] + [("depth", 1e-3 * f) for f in (third, two, whole, whole)]
    loop = make_loop(cache, tmp_path, 3, train={"switch_warmup": 3}, **phases)
    assert len(rows_per_epoch(cache)) == 6
    found = rates_of(loop)
    expected = (cycle * 3)[:18]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [rate for _, rate in found] == pytest.approx([rate for _, rate in expected])


def rows_per_epoch(cache: Cache) -> list[int]:
    return [len(batch.columns["clip/cls"]) for batch in make_rows(cache, batch_size=4).epoch(0)]


def test_a_phase_that_is_alone_warms_up_once(cache: Cache, tmp_path: Path) -> None:
    loop = make_loop(cache, tmp_path, 2, train={"switch_warmup": 4}, embedding={"steps": 2, "lr": 1.0}, depth={"steps": 0})
    assert [rate for _, rate in rates_of(loop)] == [0.25, 0.5, 0.75] + [1.0] * 9


def test_a_warmup_longer_than_the_phase_never_ends_in_it(cache: Cache, tmp_path: Path) -> None:
    phases = {"embedding": {"steps": 2, "lr": 1.0}, "depth": {"steps": 2, "lr": 1.0}}
    loop = make_loop(cache, tmp_path, 1, train={"switch_warmup": 8}, **phases)
    assert [rate for _, rate in rates_of(loop)] == [0.125, 0.25, 0.125, 0.25, 0.125, 0.25]


def test_steps_that_teach_nothing_count_for_the_warmup(cache: Cache, tmp_path: Path) -> None:
    phases = {"embedding": {"steps": 4, "lr": 1.0}, "depth": {"steps": 2, "lr": 1.0}}
    loop = make_loop(cache, tmp_path, 1, train={"switch_warmup": 4}, **phases)
    forward, calls = loop.head.losses, iter(range(100))

    def sometimes(batch: Any, phase: str) -> dict[str, Tensor]:
        return {"total": torch.zeros(())} if next(calls) in (1, 4) else forward(batch, phase)

    loop.head.losses = sometimes  # type: ignore[method-assign]
    assert rates_of(loop) == [("embedding", 0.25), ("embedding", 0.75), ("embedding", 1.0), ("depth", 0.5)]


def test_cosine_against_values_by_hand(cache: Cache, tmp_path: Path) -> None:
    half = math.sqrt(0.5)
    by_hand = [1.0, 0.1 + 0.45 * (1 + half), 0.55, 0.1 + 0.45 * (1 - half), 0.1, 0.1]
    assert [cosine(epoch, 4, 0.1) for epoch in range(6)] == pytest.approx(by_hand)
    options: dict[str, Any] = {"decay": "cosine", "decay_epochs": 4, "patience": 100}
    loop = make_loop(cache, tmp_path, 6, lambda head: {"rmse": 1.0}, options, depth={"steps": 0})
    rates = rates_of(loop)
    assert [entry["factor"] for entry in loop.history] == pytest.approx(by_hand)
    assert [rate for _, rate in rates] == pytest.approx([3e-4 * factor for factor in by_hand for _ in range(6)])


def clip_by_hand(gradients: list[npt.NDArray[np.float32]], limit: float) -> tuple[list[npt.NDArray[np.float64]], float]:
    total = 0.0
    for gradient in gradients:
        for value in gradient.reshape(-1):
            total += float(value) ** 2
    norm = math.sqrt(total)
    return [gradient.astype(np.float64) * min(1.0, limit / norm) for gradient in gradients], norm


@pytest.mark.parametrize("limit", [0.0, 0.7, 1e6])
def test_clipping_over_the_parameters_of_the_phase_alone(limit: float) -> None:
    torch.manual_seed(1)
    mine, other = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))], nn.Parameter(torch.randn(5))
    phase = Phase("x", 1, [("a", mine[0]), ("b", mine[1])], 1.0, 0.0)
    assert add_gradient(sum(((p**3).sum() for p in mine), torch.zeros(())) + (other * 100).sum(), phase)
    assert other.grad is None
    before = [p.grad.numpy().copy() for p in mine if p.grad is not None]
    expected, norm = clip_by_hand(before, limit or math.inf)
    assert norm > 0.7
    clip(phase, limit)
    for parameter, value in zip(mine, expected, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), value, rtol=1e-5)
    twins = [nn.Parameter(p.detach().clone()) for p in mine]
    for twin, gradient in zip(twins, before, strict=True):
        twin.grad = torch.from_numpy(gradient)
    torch.nn.utils.clip_grad_norm_(twins, limit or math.inf)
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(mine, twins, strict=True) if a.grad is not None and b.grad is not None
    )


def test_clipping_in_the_loop_against_a_plain_one(cache: Cache, tmp_path: Path) -> None:
    loop = make_loop(cache, tmp_path / "a", 2, train={"grad_clip": 0.05}, dropout=0.0)
    twin = make_loop(cache, tmp_path / "b", 2, dropout=0.0).head
    everything = list(twin.parameters())
    no_table = [p for name, p in twin.named_parameters() if name != "table"]
    adams = [torch.optim.AdamW(everything, 3e-4, weight_decay=1e-2), torch.optim.AdamW(no_table, 1e-3, weight_decay=0.0)]
    step, bound = 0, 0
    for epoch in range(2):
        for batch in make_rows(cache, batch_size=4).epoch(epoch):
            turn = (step // 2) % 2
            twin.zero_grad()
            twin.losses(batch, ("embedding", "depth")[turn])["total"].backward()
            mine = (everything, no_table)[turn]
            clipped, norm = clip_by_hand([p.grad.numpy() for p in mine if p.grad is not None], 0.05)
            for parameter, gradient in zip(mine, clipped, strict=True):
                parameter.grad = torch.from_numpy(gradient.astype(np.float32))
            adams[turn].step()
            step, bound = step + 1, bound + (norm > 0.05)
    loop.run(lambda report: None)
    assert bound > 6
    for name, value in loop.head.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_averaged_weights_against_a_plain_loop(cache: Cache, tmp_path: Path) -> None:
    """Validated and kept are the averages; what is trained does not know of them."""
    validated: list[dict[str, Tensor]] = []

    def validate(head: Any) -> dict[str, float]:
        validated.append({name: value.clone() for name, value in head.state_dict().items()})
        return {"rmse": 1.0 / len(validated)}

    plain, loop = make_loop(cache, tmp_path / "a", 3), make_loop(cache, tmp_path / "b", 3, validate, {"ema": 0.6})
    average = {name: value.double().numpy() for name, value in weights(plain).items()}
    expected: list[dict[str, npt.NDArray[np.float64]]] = []

    def follow(*_: Any) -> None:
        step = len(expected) + 1
        keep = min(0.6, step / (step + 10))
        for name, value in plain.head.state_dict().items():
            average[name] = keep * average[name] + (1 - keep) * value.double().numpy()
        expected.append(dict(average))

    for optimiser in plain._optimisers.values():
        optimiser.register_step_post_hook(follow)
    plain.run(lambda report: None)
    loop.run(lambda report: None)
    assert same(weights(plain), weights(loop))
    for epoch, found in enumerate(validated):
        for name, value in found.items():
            np.testing.assert_allclose(value.numpy(), expected[6 * epoch + 5][name], rtol=1e-5, atol=1e-6)
    last = checkpoints.load(tmp_path / "b" / "last.safetensors")[0]
    best = checkpoints.load(checkpoints.epoch_file(tmp_path / "b", 3))[0]
    for name, value in validated[-1].items():
        assert torch.equal(best[f"weights.{name}"], value)
        assert torch.equal(last[f"weights.{name}"], value)
        assert torch.equal(last[f"live.{name}"], plain.head.state_dict()[name])
    assert not any(name.startswith("live.") for name in best)
    assert not any(name.startswith("live.") for name in checkpoints.load(tmp_path / "a" / "last.safetensors")[0])


def test_weights_come_back_if_validation_is_interrupted() -> None:
    parameter = nn.Parameter(torch.ones(3))
    average = Average([Phase("x", 1, [("a", parameter)], 1.0, 0.0)], 0.5)
    with torch.no_grad():
        parameter.fill_(4.0)
    average.update(10)
    with pytest.raises(KeyboardInterrupt), average.in_place() as live:
        assert parameter.tolist() == [2.5, 2.5, 2.5]
        assert live["a"].tolist() == [4.0, 4.0, 4.0]
        raise KeyboardInterrupt
    assert parameter.tolist() == [4.0, 4.0, 4.0]


def test_joint_steps_against_a_plain_loop(cache: Cache, tmp_path: Path) -> None:
    """One AdamW with the rates of the first phase on both losses; a table frozen for the depth loss stays so."""
    loop = make_loop(cache, tmp_path / "a", 2, train={"joint": True}, dropout=0.0)
    twin = make_loop(cache, tmp_path / "b", 2, dropout=0.0).head
    names, values = zip(*twin.named_parameters(), strict=True)
    adam = torch.optim.AdamW(values, lr=3e-4, weight_decay=1e-2)
    for epoch in range(2):
        for batch in make_rows(cache, batch_size=4).epoch(epoch):
            first = torch.autograd.grad(twin.losses(batch, "embedding")["total"], values)
            second = torch.autograd.grad(twin.losses(batch, "depth")["total"], values)
            for name, value, one, two in zip(names, values, first, second, strict=True):
                value.grad = one if name == "table" else one + two
            adam.step()
    loop.run(lambda report: None)
    assert {"embedding/total", "embedding/info_nce", "depth/total"} <= loop.history[-1]["losses"].keys()
    for name, found in loop.head.state_dict().items():
        torch.testing.assert_close(found, twin.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_joint_with_one_phase_changes_nothing(cache: Cache, tmp_path: Path) -> None:
    alone, joint = (make_loop(cache, tmp_path / str(n), 2, train={"joint": n == 1}, depth={"steps": 0}) for n in (0, 1))
    alone.run(lambda report: None)
    joint.run(lambda report: None)
    assert same(weights(alone), weights(joint))
    assert [phase.name for phase in Turns(alone.head.phases(), joint=True).phases] == ["embedding"]


@pytest.mark.parametrize("joint", [False, True])
def test_resumed_is_uninterrupted_with_every_option_on(cache: Cache, tmp_path: Path, joint: bool) -> None:
    options = {**STEADY, "joint": joint}
    first, second = (make_loop(cache, tmp_path / name, 5, train=options) for name in "ab")
    first.run(lambda report: None)

    def stop(report: EpochReport) -> None:
        if report.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.run(stop)
    resumed = make_loop(cache, tmp_path / "b", 5, train=options)
    assert resumed.resume()
    resumed.run(lambda report: None)
    assert same(weights(resumed), weights(first))
    found = [checkpoints.load(tmp_path / name / "last.safetensors")[0] for name in "ab"]
    assert same(found[0], found[1])
    assert any(not torch.equal(found[0][f"live.{name}"], found[0][f"weights.{name}"]) for name in weights(first))
    make_loop(cache, tmp_path / "c", 1).run(lambda report: None)
    with pytest.raises(RunError, match=r"no weights behind an average; it was trained with train\.ema = 0"):
        make_loop(cache, tmp_path / "c", 2, train={"ema": 0.5}).resume()


class Waits(TorchDispatchMode):
    """Counts the operators that wait for the device: those that bring a number to the host."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "_local_scalar_dense" in str(func) or "nonzero" in str(func) or "equal.default" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_option_waits_for_the_device(cache: Cache, tmp_path: Path) -> None:
    numbers = []
    for name, options in (("a", {}), ("b", STEADY)):
        loop = make_loop(cache, tmp_path / name, 2, lambda head: {"rmse": 1.0}, options)
        with Waits() as waits:
            loop.run(lambda report: None)
        numbers.append(waits.number)
    assert numbers[0] == numbers[1] > 0


def steady_recipe(**options: Any) -> Recipe:
    table = toy_recipe().model_dump(exclude_none=True)
    table["head"] |= {"table_init": "random", "embedding": {"steps": 3}, "depth": {"steps": 3}}
    table["train"] = {"epochs": 2, "batch_size": 4, **STEADY, **options}
    return parse_recipe(table, "test")


def test_a_cosine_is_not_bent_when_a_run_goes_on(cache: Cache, tmp_path: Path) -> None:
    trained = train(steady_recipe(), cache, tmp_path / "run", device="cpu")
    assert trained.recipe.train.decay_epochs == 2
    before = (trained.root / "recipe.toml").read_bytes()
    with pytest.raises(RunError, match=r"train\.decay_epochs: found 2, wanted 4"):
        train(steady_recipe(epochs=4), cache, trained.root, device="cpu")
    assert (trained.root / "recipe.toml").read_bytes() == before
    longer = train(steady_recipe(epochs=3, decay_epochs=2), cache, trained.root, device="cpu")
    assert [entry["factor"] for entry in longer.history] == pytest.approx([1.0, 0.55, 0.1])


def test_a_run_is_scored_with_its_averaged_weights(cache: Cache, tmp_path: Path) -> None:
    trained = train(steady_recipe(epochs=1), cache, tmp_path / "run", device="cpu")
    tensors = checkpoints.load(trained.checkpoints / "last.safetensors")[0]
    for which in ("last", "abs_rel"):
        head, _ = open_run(trained.root).load_head(which, torch.device("cpu"))
        assert all(torch.equal(value, tensors[f"weights.{name}"]) for name, value in head.state_dict().items())
        assert any(not torch.equal(value, tensors[f"live.{name}"]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.ema=1.0", "less than 1"),
        ("train.grad_clip=-1.0", "greater than or equal to 0"),
        ("train.switch_warmup=1.5", "integer"),
        ("train.decay=linear", "'plateau', 'cosine', 'step' or 'onecycle'"),
        ("train.joint=1", "boolean"),
        ("train.decay_epochs=3", 'decay_epochs belongs to decay = "cosine" or "onecycle"'),
    ],
)
def test_impossible_values_are_refused(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe("nyu", [override])
    assert f"--set {override}" in str(error.value)


def test_the_faithful_recipes_use_none_of_this() -> None:
    for name in ("nyu", "kitti", "nyu-released", "kitti-released", "folder", "demo"):
        found = load_recipe(name).train
        assert (found.switch_warmup, found.grad_clip, found.decay, found.decay_epochs) == (0, 0.0, "plateau", None)
        assert (found.ema, found.joint) == (0.0, False)
