"""The `openclip` encoder: the vision transformers and ResNets of open_clip, by model name and published weights.

    openclip:MODEL/TAG      e.g. openclip:ViT-L-14-336-quickgelu/openai, which is what plain `openclip` means

Weights are `auto` (what TAG stands for, from the hub's cache or the hub), the path of a file (.safetensors, or .pt, .pth, .bin
read as weights only) or `random`. TAG may be left out unless weights are `auto`; with a file it says which normalisation the
weights expect. A file holds both towers under open_clip's names, or the image tower alone (`visual.*`): then texts cannot be
embedded. Whether its weights were trained with QuickGELU cannot be seen in a file: for OpenAI's take a `-quickgelu` model, or
give the tag as well, which is checked.

Its columns are `PREFIX/...`; the prefix is the option of that name, `clip` by default. `clip/patch` and `clip/cls` are always
made, the others when a head reads them:

    clip/patch              patch tokens in the joint space of image and text, float16 (P, D)
    clip/cls                the image's embedding, float32 (D,)
    clip/patch@N            those of transformer block N, from 1, brought to the joint space as the final ones are
    clip/tokens@N           the same as they are, in the width of the tower
    clip/cls@N              CLS token of block N, brought to the joint space
    clip/maskclip           patch tokens by the last block's value path alone (MaskCLIP)
    clip/stem, clip/layer1 ... clip/layer4      of ResNets: feature maps, float16 (h, w, C)

How exactly each is defined is written in `openclip_vit` and `openclip_resnet`.

No published model was trained to be read at earlier blocks; how much their tokens mean in the joint space is for an experiment
to find.

Importing this module, and `OpenClipEncoder.request`, import neither torch nor open_clip.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pcd.columns import ColumnSpec
from pcd.device import resolve_device, resolve_precision
from pcd.encoders.base import EncoderOptions
from pcd.encoders.checks import encoded
from pcd.encoders.weights import describe_file, find_weights, read_state
from pcd.errors import TextTowerError
from pcd.fingerprint import digest, file_digest

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pcd.encoders.openclip_network import ImageNetwork, Tap
    from pcd.encoders.openclip_text import OpenClipText
    from pcd.encoders.openclip_towers import Towers

DEFAULT_MODEL = "ViT-L-14-336-quickgelu/openai"
PREFIX = "clip"
TEXT_BATCH = 256
TEXT_FACTS = ("encoder", "model", "quick_gelu", "weights", "precision")
"""What of the fingerprint determines the text tower."""
WITH_TEXT = "weights with a text tower (--weights auto, or a file with both towers)"


class OpenClipEncoder:
    """A frozen open_clip vision transformer or ResNet; see `pcd.encoders.base.Encoder` for the interface.

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
        self._place(towers, options.prefix or PREFIX)

    def _place(self, towers: Towers, prefix: str) -> None:
        from pcd.encoders.openclip_network import Reading
        from pcd.encoders.openclip_towers import network_of

        self._text: Any = towers.text.to(self.device) if towers.text is not None else None
        self.has_text = self._text is not None
        self._width = int(cast(Any, towers.visual).output_dim)
        network = network_of(self._architecture, towers.visual, Reading(self.mean, self.std, self.precision, prefix))
        self._set_network(network.to(self.device).eval())

    def _set_network(self, network: ImageNetwork) -> None:
        self._network = network
        self.outputs: Mapping[str, Mapping[str, Any]] = network.outputs()
        self.columns: tuple[ColumnSpec, ...] = network.specs(self.grid)

    def _tap(self, name: str) -> Tap | None:
        prefix, _, rest = name.partition("/")
        return self._network.find(rest) if prefix == self._network.reading.prefix else None

    def offers(self, name: str) -> bool:
        """Whether `name` is a column that it makes on demand: see `pcd.encoders.base.Extendable`.

        Raises `UsageError` for a block or stage that the network does not have.
        """
        return self._tap(name) is not None

    def with_columns(self, names: Sequence[str]) -> OpenClipEncoder:
        """This encoder, its weights shared, that makes these columns as well: see `pcd.encoders.base.Extendable`."""
        other, taps = copy.copy(self), (self._tap(name) for name in names)
        other._set_network(self._network.with_taps(tap for tap in taps if tap is not None))
        return other

    @staticmethod
    def request(model: str, options: EncoderOptions) -> dict[str, Any]:
        """What was asked for, in plain values and without paths; reads no weights, imports no torch.

        A file is described by name, size and modification time, the prefix if one is given. Raises `WeightsError` if the file
        is not there.
        """
        asked: dict[str, Any] = {"model": model or DEFAULT_MODEL, "weights": options.weights, "file": None}
        if options.weights == "random":
            asked["seed"] = options.seed
        elif options.weights != "auto":
            asked |= {"weights": "file", "file": describe_file(find_weights(options.weights))}
        named = {"prefix": options.prefix} if options.prefix else {}
        return {**asked, "precision": options.precision, **named}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the columns (and the text embeddings, if `text`), as plain JSON without paths or versions.

        `weights.digest` is the SHA-256 of the weights file (`kind` is `file`, from the hub or not: the same bytes are the same
        weights), or of the initial values for `random` ones. The tag is left out; what depends on it is `mean` and `std`.
        `layer` and `projection` are those of `clip/patch` and `clip/cls`; those of the other columns are in `outputs`. The
        prefix is not in it: it is part of the columns' names.
        """
        return {
            "encoder": "openclip",
            "model": self._architecture.name,
            "quick_gelu": self._architecture.quick_gelu,
            "weights": dict(self._weights),
            **self._network.identity(),
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

        Returns `clip/patch` float16 `(B, P, D)`, `clip/cls` float32 `(B, D)` and the columns that were asked for, from one
        forward pass. Raises `UsageError` for views of another shape or dtype and `WeightsError` if a value is not a number or
        does not fit float16.
        """
        return encoded(self._network, views, self.view_size, self.device)

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
        from pcd.encoders.openclip_text import check_lengths

        if self._text is None:
            raise TextTowerError(
                f'Texts cannot be embedded: {self._why_no_text()}. Set head.table_init to "tokens" or "random", which need no '
                f"text, or use {WITH_TEXT}."
            )
        tokenizer = find_tokenizer(self._architecture)
        check_lengths(phrases, tokenizer)
        embedded = [torch.empty(0, self._width)]
        with torch.no_grad():
            for start in range(0, len(phrases), TEXT_BATCH):
                tokens = tokenizer(list(phrases[start : start + TEXT_BATCH])).to(self.device)
                embedded.append(self._text.encode_text(tokens).float().cpu())
        return torch.cat(embedded)

    def text_tower(self) -> OpenClipText:
        """A copy of its text tower that gradients pass through, float32 on the CPU: see `pcd.encoders.base.Worded`.

        Raises `TextTowerError` as `embed_text` does, and for a text tower in front of which words cannot be learned.
        """
        from pcd.encoders.openclip_text import OpenClipText

        if self._text is None:
            raise TextTowerError(f"Words cannot be learned: {self._why_no_text()}. Use {WITH_TEXT}.")
        facts = {key: value for key, value in self.fingerprint().items() if key in TEXT_FACTS}
        return OpenClipText(self._architecture, self._text, digest({**facts, "tower": "text"}))

    def _why_no_text(self) -> str:
        name = self._architecture.name
        if not self._architecture.native_text:
            return f"the text tower of {name} belongs to the transformers library, which pcd does not use"
        return f"the weights of {name} hold the image tower alone (visual.*)"


def split_model(model: str) -> tuple[str, str | None]:
    """`MODEL/TAG` to (`MODEL`, `TAG`), `MODEL` to (`MODEL`, None), and nothing to the default."""
    name, _, tag = (model or DEFAULT_MODEL).partition("/")
    return name, tag or None
