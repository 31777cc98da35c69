"""Which device computes, and in which precision."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pcd.errors import UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

_DEVICE = re.compile(r"auto|cpu|mps|cuda(?::(?P<index>\d+))?")


def resolve_device(name: str) -> str:
    """The name of the torch device meant by `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    `auto` is the current CUDA device if there is one, else the CPU; `mps` is used only when asked for.
    Raises `UsageError` for another name and for a device that is not there.
    """
    import torch

    match = _DEVICE.fullmatch(name)
    if match is None:
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps.")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        _check_cuda(name, match["index"])
    elif name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps': PyTorch finds no Metal device here; use --device cpu or auto.")
    return name


def _check_cuda(name: str, index: str | None) -> None:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UsageError(
            f"device {name!r}: PyTorch {torch.__version__} ({built}) finds no usable GPU here; use --device cpu or auto."
        )
    count = torch.cuda.device_count()
    if index is not None and int(index) >= count:
        raise UsageError(f"device {name!r}: there are {count} GPUs here, the last is cuda:{count - 1}.")


def resolve_precision(precision: str, device: str) -> Precision:
    """The precision in which a frozen network runs on a resolved device: `auto` is fp16 on CUDA and fp32 elsewhere.

    fp16 on a CPU is correct but some five times slower than fp32, so `auto` never takes it; it may be asked for by name, to
    run a head on a CPU that was trained on fp16 tokens. bf16 is allowed everywhere and costs accuracy: it moves the patch
    tokens of CLIP ViT-B/16 by 6 % (fp16 by 2 %). Raises `UsageError` for another name.
    """
    if precision == "auto":
        return "fp16" if device.startswith("cuda") else "fp32"
    for known in PRECISIONS:
        if precision == known:
            return known
    raise UsageError(f"precision {precision!r}: expected auto, {', '.join(PRECISIONS)}.")


def without_autocast(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Around small products whose rounding would show: in the type of their inputs, also where autocast is on.

    Where it is off this does nothing at all, which an exporter need not trace.
    """
    import torch

    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
