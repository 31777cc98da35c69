"""Makes `import torchvision` work beside a PyTorch it was not built for.

open_clip imports torchvision for its image transforms. A torchvision wheel built for CUDA beside a CPU-only PyTorch (or any
pair whose binaries do not fit) cannot load its compiled operators, and then fails at import, where it registers shape
functions for two of them, with `operator torchvision::nms does not exist`. Declaring the schemas of these two is enough to
get past that line. The operators themselves stay absent: pcd calls neither, and calling them says what is missing.
"""

from __future__ import annotations

import importlib

from pcd.errors import PcdError

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def make_torchvision_importable() -> bool:
    """Import torchvision, declaring the missing schemas if that is what it takes; True if it was.

    A healthy pair is imported and not touched; later calls find it imported. Raises `PcdError` if torchvision fails for
    another reason, e.g. different CUDA versions.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not _lacks_an_operator(error):
            raise _unusable(error) from error
    except (ImportError, OSError) as error:
        raise _unusable(error) from error
    else:
        return False
    _declare_schemas()
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError) as error:
        raise _unusable(error) from error
    return True


def _lacks_an_operator(error: RuntimeError) -> bool:
    return any(f"torchvision::{name} does not exist" in str(error) for name in SCHEMAS)


def _declare_schemas() -> None:
    import torch

    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


def _unusable(error: Exception) -> PcdError:
    import torch

    return PcdError(
        f"torchvision cannot be imported beside PyTorch {torch.__version__}: {error}. Install the torchvision of the same "
        "release and CUDA version as PyTorch, from the same package index."
    )
