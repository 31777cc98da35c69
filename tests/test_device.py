from __future__ import annotations

import pytest
import torch

from pcd.device import resolve_device, resolve_precision
from pcd.errors import UsageError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
def test_with_gpus():
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(UsageError, match=r"'cuda:2': there are 2 GPUs here, the last is cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_without_gpus():
    assert [resolve_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=rf"device '{name}': PyTorch .* finds no usable GPU here; use --device cpu"):
            resolve_device(name)
    with pytest.raises(UsageError, match="no Metal device"):
        resolve_device("mps")


def test_metal_is_taken_only_when_asked_for(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (resolve_device("mps"), resolve_device("auto")) == ("mps", "cpu")


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda 0", ""])
def test_names_that_are_no_device(name):
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


def test_a_resolved_name_is_a_torch_device():
    assert torch.zeros(1, device=resolve_device("auto")).device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cpu", "fp32"),
        ("auto", "mps", "fp32"),
        ("auto", "cuda", "fp16"),
        ("auto", "cuda:1", "fp16"),
        ("fp32", "cuda", "fp32"),
        ("fp16", "cpu", "fp16"),
        ("bf16", "cpu", "bf16"),
    ],
)
def test_precision(precision, device, expected):
    assert resolve_precision(precision, device) == expected


def test_unknown_precision():
    with pytest.raises(UsageError, match="'half': expected auto, fp32, fp16, bf16"):
        resolve_precision("half", "cpu")
