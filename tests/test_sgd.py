"""SGD with momentum as a phase's optimiser: its steps, its checkpoints, joint phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pcd.cache import Cache
from pcd.errors import RecipeError
from pcd.heads.base import Phase
from pcd.training import checkpoints
from pcd.training.steps import Turns
from tests.test_extract import run
from tests.training_support import Plain, interrupted, phase, plain_loop, plain_rows, same, state

SGD: dict[str, Any] = {"optimiser": "sgd", "momentum": 0.9}


@pytest.fixture(scope="module", name="cache")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run(tmp_path_factory.mktemp("toy")).cache


def by_hand(cache: Cache, phases: list[Phase], epochs: int) -> dict[str, torch.Tensor]:
    """Weights in float64 after old-fashioned loops over parameters; phases of adamw take torch's."""
    torch.manual_seed(7)
    head = Plain(phases).double()
    adams = {p.name: torch.optim.AdamW([v for _, v in head.of(p.name)], p.lr, weight_decay=p.weight_decay) for p in phases}
    momenta: dict[str, torch.Tensor] = {}
    cycle = [p for p in phases for _ in range(p.steps)]
    step = 0
    for epoch in range(epochs):
        for batch in plain_rows(cache).epoch(epoch):
            turn = cycle[step % len(cycle)]
            names, values = zip(*head.of(turn.name), strict=True)
            target = batch.targets[turn.name]
            tokens = batch.columns["clip/patch"].flatten(0, 1)[target.flat].double()
            away = head.maps[turn.name](tokens)[:, 0] - target.mean.reshape(-1)[target.flat].double().log()
            gradients = torch.autograd.grad((away * away).mean(), values)
            for name, value, gradient in zip(names, values, gradients, strict=True):
                value.grad = gradient
                if turn.optimiser == "adamw":
                    continue
                whole = gradient + turn.weight_decay * value.detach()
                momenta[name] = whole if name not in momenta else turn.momentum * momenta[name] + whole
                with torch.no_grad():
                    value -= turn.lr * momenta[name]
            if turn.optimiser == "adamw":
                adams[turn.name].step()
            step += 1
    return {name: value.detach() for name, value in head.state_dict().items()}


@pytest.mark.parametrize(
    "phases",
    [
        [phase("depth", 0.05, **SGD, weight_decay=0.1)],
        [phase("depth", 0.05, optimiser="sgd")],
        [phase("embedding", 0.02, weight_decay=0.01, momentum=0.9), phase("depth", 0.05, **SGD)],
        [phase("embedding", 0.1, **SGD), phase("depth", 0.05, optimiser="sgd", momentum=0.5)],
    ],
    ids=["L2", "without momentum", "beside adamw", "two of them"],
)
def test_steps_against_a_loop_by_hand(cache: Cache, tmp_path: Path, phases: list[Phase]) -> None:
    loop = plain_loop(cache, tmp_path, phases)
    first = state(loop)
    loop.run(lambda report: None)
    expected = by_hand(cache, phases, 3)
    for name, value in state(loop).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(value, first[name]) == (not any(name.startswith(f"maps.{p.name}.") for p in phases)), name


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_resumed_is_uninterrupted(cache: Cache, tmp_path: Path, momentum: float) -> None:
    phases = [phase("embedding", 0.02), phase("depth", 0.05, optimiser="sgd", momentum=momentum, weight_decay=0.01)]
    first, second, broken = (plain_loop(cache, tmp_path / name, phases, 4) for name in "abc")
    first.run(lambda report: None)
    interrupted(second, 2)
    resumed = plain_loop(cache, tmp_path / "b", phases, 4)
    assert resumed.resume()
    resumed.run(lambda report: None)
    assert same(state(resumed), state(first))
    found = [checkpoints.load(tmp_path / name / "last.safetensors")[0] for name in "ab"]
    assert same(found[0], found[1])
    kept = {name for name in found[0] if name.startswith("optimiser.depth.")}
    parameters = {"maps.depth.weight", "maps.depth.bias"}
    assert kept == ({f"optimiser.depth.{name}.momentum_buffer" for name in parameters} if momentum else set())
    interrupted(broken, 2)
    path = tmp_path / "c" / "last.safetensors"
    tensors, where = checkpoints.load(path)
    checkpoints.save(path, {name: value for name, value in tensors.items() if name not in kept}, where)
    forgetful = plain_loop(cache, tmp_path / "c", phases, 4)
    assert forgetful.resume()
    forgetful.run(lambda report: None)
    assert same(state(forgetful), state(first)) == (not momentum), "momentum is part of the truth"


def test_checkpoints_of_adamw_are_what_they_were(cache: Cache, tmp_path: Path) -> None:
    plain_loop(cache, tmp_path, [phase("depth")], 1).run(lambda report: None)
    names = {name.rpartition(".")[2] for name in safetensors.torch.load_file(tmp_path / "last.safetensors") if "optim" in name}
    assert names == {"step", "exp_avg", "exp_avg_sq"}


def test_joint_phases_take_one_sgd(cache: Cache, tmp_path: Path) -> None:
    """Both maps step at once: as if each were alone, with the rates of the first."""
    phases = [phase("embedding", 0.05, **SGD), phase("depth", 0.5, **SGD)]
    joint = plain_loop(cache, tmp_path / "joint", phases, joint=True)
    joint.run(lambda report: None)
    for name in ("embedding", "depth"):
        alone = plain_loop(cache, tmp_path / name, [phase(name, 0.05, **SGD)])
        alone.run(lambda report: None)
        for key, _ in alone.head.of(name):  # type: ignore[operator]
            torch.testing.assert_close(state(joint)[key], state(alone)[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({}, "embedding has sgd with momentum 0.9, depth has adamw"),
        ({"optimiser": "sgd", "momentum": 0.5}, "embedding has sgd with momentum 0.9, depth has sgd with momentum 0.5"),
    ],
)
def test_joint_phases_with_different_optimisers_are_refused(
    cache: Cache, tmp_path: Path, second: dict[str, Any], words: str
) -> None:
    phases = [phase("embedding", **SGD), phase("depth", **second)]
    with pytest.raises(RecipeError, match=words) as error:
        plain_loop(cache, tmp_path, phases, joint=True)
    assert "train.joint" in str(error.value)
    plain_loop(cache, tmp_path, phases)


def test_momentum_of_adamw_means_nothing() -> None:
    phases = [phase("embedding", momentum=0.9), phase("depth")]
    assert len(Turns(Plain(phases).phases(), joint=True).phases) == 1
