"""The `openclip` encoder: the vision transformers of open_clip, by model name and published weights.

    openclip:MODEL/TAG      e.g. openclip:ViT-L-14-336-quickgelu/openai, which is what plain `openclip` means

Weights are `auto` (what TAG stands for, from the hub's cache or the hub), the path of a file (.safetensors, or .pt, .pth, .bin
read as weights only) or `random`. TAG may be left out unless weights are `auto`; with a file it says which normalisation the
weights expect. A file holds both towers under open_clip's names, or the image tower alone (`visual.*`): then texts cannot be
embedded. Whether its weights were trained with QuickGELU cannot be seen in a file: for OpenAI's take a `-quickgelu` model, or
give the tag as well, which is checked.

Beside `clip/patch` and `clip/cls` it makes, when a head reads them, columns `clip/patch@N`: the patch tokens of transformer
block N, counted from 1, after the same `ln_post` and `visual.proj` as the final ones, which puts them into the joint space of
image and text. No published model was trained to be read there; how much they mean in it is for an experiment to find.

Importing this module, and `OpenClipEncoder.request`, import neither torch nor open_clip.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pcd.columns import ColumnSpec
from pcd.device import resolve_device, resolve_precision
from pcd.encoders.base import EncoderOptions
from pcd.encoders.weights import describe_file, find_weights, read_state
from pcd.errors import TextTowerError, UsageError, WeightsError
from pcd.fingerprint import file_digest

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pcd.encoders.openclip_towers import Towers

DEFAULT_MODEL = "ViT-L-14-336-quickgelu/openai"
TEXT_BATCH = 256


class OpenClipEncoder:
    """A frozen open_clip vision transformer; see `pcd.encoders.base.Encoder` for the interface.

    Construction raises `UsageError` for a model, tag, device or view size that cannot be used and `WeightsError` for weights
    that cannot be had, read or put into the model. The cheap checks come first.
    """

    Options: ClassVar[type[EncoderOptions]] = EncoderOptions

    def __init__(self, model: str, options: EncoderOptions, view_size: tuple[int, int], device: str) -> None:
        from pcd.encoders import openclip_names as names
        from pcd.encoders import openclip_towers

        self.device = resolve_device(device)
        self.precision = resolve_precision(options.precision, self.device)
        self.view_size = view_size
        name, tag = split_model(model)
        self._architecture = names.find_architecture(name)
        self.mean, self.std = names.normalisation(names.find_tag(self._architecture, tag) if tag else {})
        self.grid = names.grid_of_view(self._architecture, view_size)
        self.random_weights = options.weights == "random"
        self._file: Path | None = None
        if self.random_weights:
            towers = openclip_towers.random_towers(self._architecture, view_size, self.precision, options.seed)
            self._weights = {"kind": "random", "digest": towers.digest, "seed": options.seed}
        else:
            named = options.weights != "auto"
            file = find_weights(options.weights) if named else names.published_file(self._architecture, tag)
            towers = openclip_towers.load_towers(self._architecture, view_size, self.precision, read_state(file), file)
            self._weights, self._file = {"kind": "file", "digest": file_digest(file)}, file
        self._place(towers)

    def _place(self, towers: Towers) -> None:
        self._text: Any = towers.text.to(self.device) if towers.text is not None else None
        self.has_text = self._text is not None
        self._set_network(towers.visual, ())

    def _set_network(self, visual: Any, layers: tuple[int, ...]) -> None:
        """`layers` are the blocks whose tokens are columns as well, ascending."""
        from pcd.encoders.openclip_names import layer_column
        from pcd.encoders.openclip_towers import ImageNetwork

        self._network = ImageNetwork(visual, self.mean, self.std, self.precision, layers).to(self.device).eval()
        self._width = int(visual.output_dim)
        self.outputs: Mapping[str, Mapping[str, Any]] = {layer_column(layer): {"layer": layer} for layer in layers}
        self.columns = self._columns()

    def offers(self, name: str) -> bool:
        """Whether `name` is `clip/patch@N`: see `pcd.encoders.base.Extendable`. Raises `UsageError` for a block it has not."""
        from pcd.encoders.openclip_names import layer_of

        layer, blocks = layer_of(name), len(self._network.visual.transformer.resblocks)
        if layer is not None and not 1 <= layer <= blocks:
            raise UsageError(f"column {name}: {self._architecture.name} has transformer blocks 1 to {blocks}.")
        return layer is not None

    def with_columns(self, names: Sequence[str]) -> OpenClipEncoder:
        """This encoder, its weights shared, that makes these `clip/patch@N` as well: see `pcd.encoders.base.Extendable`."""
        from pcd.encoders.openclip_names import layer_of

        other, asked = copy.copy(self), {layer_of(name) for name in names if self.offers(name)}
        other._set_network(self._network.visual, tuple(sorted({*self._network.layers, *(n for n in asked if n is not None)})))
        return other

    def _columns(self) -> tuple[ColumnSpec, ...]:
        patches, width = self.grid[0] * self.grid[1], self._width
        layers = tuple(
            ColumnSpec(
                name,
                (patches, width),
                "float16",
                ("patch", "channel"),
                f"patch tokens of block {output['layer']} in reading order, ln_post then visual.proj, not normalised",
            )
            for name, output in self.outputs.items()
        )
        return (
            ColumnSpec(
                "clip/patch",
                (patches, width),
                "float16",
                ("patch", "channel"),
                "final-layer patch tokens in reading order, ln_post then visual.proj, not normalised",
            ),
            ColumnSpec(
                "clip/cls",
                (width,),
                "float32",
                ("channel",),
                "CLS token of the same forward pass, ln_post then visual.proj, not normalised",
            ),
            *layers,
        )

    @staticmethod
    def request(model: str, options: EncoderOptions) -> dict[str, Any]:
        """What was asked for, in plain values and without paths; reads no weights, imports no torch.

        A file is described by name, size and modification time. Raises `WeightsError` if it is not there.
        """
        asked: dict[str, Any] = {"model": model or DEFAULT_MODEL, "weights": options.weights, "file": None}
        if options.weights == "random":
            asked["seed"] = options.seed
        elif options.weights != "auto":
            asked |= {"weights": "file", "file": describe_file(find_weights(options.weights))}
        return {**asked, "precision": options.precision}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the columns (and the text embeddings, if `text`), as plain JSON without paths or versions.

        `weights.digest` is the SHA-256 of the weights file (`kind` is `file`, from the hub or not: the same bytes are the same
        weights), or of the initial values for `random` ones. The tag is left out; what depends on it is `mean` and `std`.
        `layer` is that of `clip/patch` and `clip/cls`; those of the other columns are in `outputs`.
        """
        return {
            "encoder": "openclip",
            "model": self._architecture.name,
            "quick_gelu": self._architecture.quick_gelu,
            "weights": dict(self._weights),
            "layer": "final",
            "projection": "ln_post+proj",
            "precision": self.precision,
            "view_size": list(self.view_size),
            "patch": list(self._architecture.patch),
            "grid": list(self.grid),
            "width": self._width,
            "text": self.has_text,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)` on any device, to all columns, on the encoder's device.

        Returns `clip/patch` float16 `(B, P, D)` and `clip/cls` float32 `(B, D)` from one forward pass (PureCLIP-Depth,
        section 2.4 and its released code: final-layer tokens), and the `clip/patch@N` that were asked for. Raises `UsageError`
        for views of another shape or dtype and `WeightsError` if a token is not a number or does not fit float16.
        """
        import torch

        if views.ndim != 4 or views.shape[1:] != (3, *self.view_size) or views.dtype != torch.float32:
            raise UsageError(
                f"views are {views.dtype} {tuple(views.shape)}; expected torch.float32 (B, 3, {self.view_size[0]}, "
                f"{self.view_size[1]}), RGB in [0, 1]."
            )
        with torch.no_grad():
            columns: dict[str, torch.Tensor] = self._network(views.to(self.device, non_blocking=True))
        _check_finite(columns)
        return columns

    def network(self) -> torch.nn.Module:
        """What `encode` computes, as a network without checks: see `pcd.encoders.base.Exportable`."""
        return self._network

    def image_weights(self) -> dict[str, torch.Tensor] | None:
        """The image tower as its file holds it, before interpolation and conversion: see `pcd.encoders.base.Exportable`."""
        if self._file is None:
            return None
        return {key: value for key, value in read_state(self._file).items() if key.startswith("visual.")}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Embeddings of `phrases`, float32 `(len(phrases), D)` on the CPU, not normalised.

        Raises `TextTowerError` if the weights hold no text tower or its tokenizer is not available, and `UsageError` for a
        phrase that is longer than the tower's context.
        """
        import torch

        from pcd.encoders.openclip_names import find_tokenizer

        if self._text is None:
            raise TextTowerError(self._why_no_text())
        tokenizer = find_tokenizer(self._architecture)
        _check_lengths(phrases, tokenizer)
        embedded = [torch.empty(0, self._width)]
        with torch.no_grad():
            for start in range(0, len(phrases), TEXT_BATCH):
                tokens = tokenizer(list(phrases[start : start + TEXT_BATCH])).to(self.device)
                embedded.append(self._text.encode_text(tokens).float().cpu())
        return torch.cat(embedded)

    def _why_no_text(self) -> str:
        name = self._architecture.name
        if not self._architecture.native_text:
            found = f"the text tower of {name} belongs to the transformers library, which pcd does not use"
        else:
            found = f"the weights of {name} hold the image tower alone (visual.*)"
        return (
            f'Texts cannot be embedded: {found}. Set head.table_init to "tokens" or "random", which need no text, or use '
            "weights with a text tower (--weights auto, or a file with both towers)."
        )


def split_model(model: str) -> tuple[str, str | None]:
    """`MODEL/TAG` to (`MODEL`, `TAG`), `MODEL` to (`MODEL`, None), and nothing to the default."""
    name, _, tag = (model or DEFAULT_MODEL).partition("/")
    return name, tag or None


def _check_finite(columns: dict[str, torch.Tensor]) -> None:
    """Values beyond 65504 have become infinite on the way to float16."""
    bad = {name: int((~values.isfinite()).sum()) for name, values in columns.items()}
    if any(bad.values()):
        found = ", ".join(f"{count} of {columns[name].numel()} in {name}" for name, count in bad.items() if count)
        raise WeightsError(
            f"token values that are not finite or do not fit float16 (up to 65504): {found}. Nothing was stored. Either the "
            'weights are damaged, or fp16 is too narrow for this network: set encoder.precision to "bf16" or "fp32".'
        )


def _check_lengths(phrases: Sequence[str], tokenizer: Any) -> None:
    if isinstance(phrases, str):
        raise UsageError("embed_text takes a list of phrases, not one string.")
    if not hasattr(tokenizer, "encode"):
        return
    for phrase in phrases:
        length = len(tokenizer.encode(phrase)) + 2  # start and end of text
        if length > tokenizer.context_length:
            raise UsageError(
                f"phrase of {length} tokens, but the text tower takes {tokenizer.context_length}: {phrase[:60]!r}..."
            )
