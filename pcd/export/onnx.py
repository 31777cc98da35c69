"""A network as an ONNX file, and that file through onnxruntime.

onnx, onnxscript and onnxruntime are the optional extra `onnx`; nothing is imported before it is needed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcd.errors import UsageError
from pcd.files import sync

if TYPE_CHECKING:
    from pcd.export.graph import DepthNetwork

Floats = npt.NDArray[np.float32]

IMAGE, OUTPUTS = "image", ("depth", "uncertainty")
NEEDS = ("onnx", "onnxscript", "onnxruntime")
INLINE_BYTES = 1_900_000_000
"""Weights up to this size lie in the file itself, larger ones beside it: a protocol buffer ends at 2 GiB."""
DATA_SUFFIX = ".data"

_TREESPEC = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
"""What torch's exporter says of its own code; nothing of ours can answer it."""


def require_onnx() -> None:
    """Raise `UsageError` if a package of the extra `onnx` is missing, naming it and the command that installs it."""
    for name in NEEDS:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f'writing ONNX needs the package {error.name}, which is not installed: pip install "pcd-depth[onnx]"'
            ) from None


def write_onnx(
    network: DepthNetwork, path: Path, metadata: Mapping[str, str], *, inline_bytes: int = INLINE_BYTES
) -> list[Path]:
    """Write `network` to `path` with dynamic batch, height and width; returns the files written, the model first.

    Weights of more than `inline_bytes` go to a second file, `path` + `.data`, which must stay beside it. `metadata` becomes the
    model's `metadata_props`. The file is not checked here; see `check_onnx`.
    """
    import torch
    from torch.export import Dim

    example = torch.zeros(2, 3, network.frame[0] + 1, network.frame[1] + 2)  # no two sides alike: none may be taken for another
    sizes = {0: Dim("batch"), 2: Dim("height", min=2), 3: Dim("width", min=2)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TREESPEC, category=FutureWarning)
        program: Any = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[IMAGE],
            dynamic_shapes={"image": sizes},
        )
    for output, name in zip(program.model.graph.outputs, OUTPUTS, strict=False):  # a head may give depth alone
        output.name = name
    program.model.metadata_props.update(metadata)
    _forget_sources(program.model)
    external = sum(tensor.nbytes for tensor in network.state_dict().values()) > inline_bytes
    program.save(path, external_data=external)
    files = [path, path.with_name(path.name + DATA_SUFFIX)] if external else [path]
    for file in files:
        sync(file)
    return files


def _forget_sources(model: Any) -> None:
    """Take away what the exporter notes of every node: stack traces with the paths of this machine."""
    for function in (model.graph, *model.functions.values()):
        for node in function.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*function.inputs, *getattr(function, "initializers", {}).values()):
            value.metadata_props.clear()
        function.metadata_props.clear()


def check_onnx(path: Path) -> None:
    """Raise `onnx.checker.ValidationError` if the file is not valid ONNX."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


class OnnxModel:
    """An ONNX file opened by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        onnxruntime: Any = importlib.import_module("onnxruntime")
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    @property
    def metadata(self) -> dict[str, str]:
        """The model's `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def predict(self, images: Floats) -> dict[str, Floats]:
        """Images float32 `(N, 3, H, W)`, RGB in [0, 1], to `(N, 1, H, W)` in metres by the name of the output."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {IMAGE: images}), strict=True))
