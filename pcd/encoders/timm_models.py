"""The `timm` encoder: any vision transformer or hierarchical network of timm that has a feature interface.

    timm:MODEL[.TAG]        e.g. timm:vit_small_patch14_dinov2.lvd142m, timm:convnext_tiny.dinov3_lvd1689m

Weights are `auto` (what TAG, or timm's default tag, stands for, from the hub's cache or the hub), the path of a file
(.safetensors, or .pt, .pth, .bin read as weights only) or `random`. Mean and standard deviation of the input are those of the
tag. A view may have any size that is a multiple of the patch size (of the last stride); timm resamples position embeddings.

`timm/patch` are the patch tokens that timm's `forward_features` gives: final block, final norm. In models that average tokens
before their norm (`fc_norm`) timm has no norm there, and neither do these. `timm/cls` is the class token, if the model has one.
Columns that are made when a head reads them:

    timm/patch@N, timm/cls@N    block N, counted from 1, through the model's final norm, as forward_intermediates(norm=True)
    timm/registers              the other tokens before the patches: registers, DeiT's distillation token
    timm/stageN                 of hierarchical models the N-th feature map, counted from 1, without a norm

A hierarchical model has `timm/patch` too: its final map, flattened. The prefix `timm` is another with the option `prefix`.
There is no text. Importing this module, and `TimmEncoder.request`, import neither torch nor timm.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pcd.columns import ColumnSpec
from pcd.device import resolve_device, resolve_precision
from pcd.encoders.base import EncoderOptions
from pcd.encoders.checks import encoded
from pcd.encoders.weights import describe_file, find_weights, read_state
from pcd.errors import TextTowerError, UsageError
from pcd.fingerprint import file_digest

if TYPE_CHECKING:
    from pathlib import Path

    import torch

PREFIX = "timm"
_NAME = re.compile(r"(?P<what>patch@|cls@|stage)(?P<number>[1-9]\d*)|registers")


class TimmEncoder:
    """A frozen timm model; see `pcd.encoders.base.Encoder` for the interface.

    Construction raises `UsageError` for a model, tag, device or view size that cannot be used and `WeightsError` for weights
    that cannot be had, read or put into the model.
    """

    Options: ClassVar[type[EncoderOptions]] = EncoderOptions
    has_text = False

    def __init__(self, model: str, options: EncoderOptions, view_size: tuple[int, int], device: str) -> None:
        from pcd.encoders import timm_names as names
        from pcd.encoders import timm_towers as towers

        _require_model(model)
        self.device = resolve_device(device)
        self.precision = resolve_precision(options.precision, self.device)
        self.view_size = view_size
        self._prefix = options.prefix or PREFIX
        self._architecture = architecture = names.find_architecture(model)
        self.random_weights = options.weights == "random"
        self._file: Path | None = None
        if self.random_weights:
            state, digest = towers.random_state(architecture, options.seed)
            self._weights, source = {"kind": "random", "digest": digest, "seed": options.seed}, "timm's random initialisation"
        else:
            self._file = names.published_file(architecture) if options.weights == "auto" else find_weights(options.weights)
            state, source = read_state(self._file), str(self._file)
            self._weights = {"kind": "file", "digest": file_digest(self._file)}
        network, self.grid = towers.load_network(architecture, view_size, self.precision, state, source)
        self._model = network.to(self.device)
        self._anatomy = towers.examine(self._model, architecture, view_size, self.grid, self.device)
        self._ask(())

    def _ask(self, names: Sequence[str]) -> None:
        """Make the columns `names`, all of them offered, beside those that are always made."""
        from pcd.encoders.timm_towers import ColumnNetwork

        asked = {name: self._parsed(name) for name in names}
        self._network = ColumnNetwork(self._model, self._anatomy, self._prefix, asked).eval()
        self.outputs: Mapping[str, Mapping[str, Any]] = {name: self._output(name) for name in names}
        self.columns = (*self._always(), *(self._spec(name) for name in names))

    def _parsed(self, name: str) -> tuple[str, int]:
        """`timm/patch@6` to (`patch@`, 6), `timm/registers` to (`registers`, 0), another encoder's name to (``, 0)."""
        prefix, _, rest = name.partition("/")
        match = _NAME.fullmatch(rest) if prefix == self._prefix else None
        if match is None:
            return "", 0
        return match["what"] or "registers", int(match["number"] or 0)

    def offers(self, name: str) -> bool:
        """Whether `name` is one of the columns made when asked for: see `pcd.encoders.base.Extendable`.

        Raises `UsageError` for a block, stage or token that the model does not have.
        """
        what, number = self._parsed(name)
        if not what:
            return False
        anatomy, layers = self._anatomy, len(self._anatomy.layers)
        kind = "blocks" if anatomy.tokens else "stages"
        has = f"column {name}: {self._architecture.name} has {kind} 1 to {layers}"
        if (what == "stage") == anatomy.tokens or number > layers:
            column = f"{self._prefix}/patch@N" if anatomy.tokens else f"{self._prefix}/stageN"
            raise UsageError(f"{has} ({column}).")
        if (what == "cls@" and not anatomy.cls) or (what == "registers" and not anatomy.registers):
            raise UsageError(f"{has} and no {'class' if what == 'cls@' else 'register'} token.")
        return True

    def with_columns(self, names: Sequence[str]) -> TimmEncoder:
        """This encoder, its weights shared, that makes these columns as well: see `pcd.encoders.base.Extendable`."""
        other = copy.copy(self)
        other._ask(tuple(dict.fromkeys([*self.outputs, *(name for name in names if self.offers(name))])))
        return other

    def _output(self, name: str) -> dict[str, Any]:
        what, number = self._parsed(name)
        tokens = {"patch@": "patch", "cls@": "cls", "registers": "registers"}
        if what == "stage":
            return {"stage": number}
        return {"tokens": tokens[what], **({"layer": number} if number else {})}

    def _always(self) -> tuple[ColumnSpec, ...]:
        anatomy, how = self._anatomy, "final norm" if self._anatomy.tokens else "final features, flattened"
        shape = (anatomy.grid[0] * anatomy.grid[1], anatomy.width)
        meaning = f"final patch tokens in reading order, {how}, not normalised"
        patch = ColumnSpec(f"{self._prefix}/patch", shape, "float16", ("patch", "channel"), meaning)
        meaning = "class token of the same forward pass, final norm, not normalised"
        cls = ColumnSpec(f"{self._prefix}/cls", (anatomy.width,), "float32", ("channel",), meaning)
        return (patch, cls) if anatomy.cls else (patch,)

    def _spec(self, name: str) -> ColumnSpec:
        (what, number), anatomy = self._parsed(name), self._anatomy
        if what == "stage":
            meaning = f"feature map of stage {number}, as timm's feature interface gives it"
            return ColumnSpec(name, anatomy.layers[number - 1], "float16", ("y", "x", "channel"), meaning)
        if what == "registers":
            shape, meaning = (anatomy.registers, anatomy.width), "final register tokens, final norm, not normalised"
            return ColumnSpec(name, shape, "float32", ("register", "channel"), meaning)
        if what == "cls@":
            meaning = f"class token of block {number} through the final norm, not normalised"
            return ColumnSpec(name, (anatomy.width,), "float32", ("channel",), meaning)
        meaning = f"patch tokens of block {number} in reading order, through the final norm, not normalised"
        return ColumnSpec(name, anatomy.layers[number - 1], "float16", ("patch", "channel"), meaning)

    @staticmethod
    def request(model: str, options: EncoderOptions) -> dict[str, Any]:
        """What was asked for, in plain values and without paths; reads no weights, imports no torch.

        A file is described by name, size and modification time. Raises `WeightsError` if it is not there and `UsageError`
        without a model.
        """
        _require_model(model)
        asked: dict[str, Any] = {"model": model, "weights": options.weights, "file": None, "prefix": options.prefix or PREFIX}
        if options.weights == "random":
            asked["seed"] = options.seed
        elif options.weights != "auto":
            asked |= {"weights": "file", "file": describe_file(find_weights(options.weights))}
        return {**asked, "precision": options.precision}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the columns, as plain JSON without paths or versions.

        `weights.digest` is the SHA-256 of the weights file, or of the initial values for `random` ones. The tag is left out;
        what depends on it is `mean` and `std`. `norm` is the class of the final norm (`Identity` in models that have none
        there). `layer` is that of the columns that are always made; those of the others are in `outputs`.
        """
        mean, std = self._architecture.normalisation
        return {
            "encoder": "timm",
            "model": self._architecture.name,
            "weights": dict(self._weights),
            "layer": "final",
            "norm": type(getattr(self._model.model, "norm", None)).__name__,
            "precision": self.precision,
            "view_size": list(self.view_size),
            "positions": "resampled by timm",
            "grid": list(self.grid),
            "width": self._anatomy.width,
            "text": False,
            "mean": list(mean),
            "std": list(std),
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)` on any device, to all columns, on the encoder's device, from one forward pass.

        Raises `UsageError` for views of another shape or dtype and `WeightsError` if a value is not a number or does not fit
        float16.
        """
        return encoded(self._network, views, self.view_size, self.device)

    def network(self) -> torch.nn.Module:
        """What `encode` computes, as a network without checks: see `pcd.encoders.base.Exportable`."""
        return self._network

    def image_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights as their file holds them: see `pcd.encoders.base.Exportable`."""
        return None if self._file is None else read_state(self._file)

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Raises `TextTowerError`: these networks know no words."""
        raise TextTowerError(f'timm:{self._architecture.name} has no text tower. Set head.table_init to "tokens" or "random".')


def _require_model(model: str) -> None:
    if not model:
        raise UsageError("timm: say which model, as timm:MODEL or timm:MODEL.TAG, e.g. timm:vit_small_patch14_dinov2.lvd142m.")
