"""The `sam` encoder: Segment Anything's automatic masks as a map of segment numbers.

    sam:vit-base, sam:vit-large, sam:vit-huge       plain `sam` is vit-base, as published by facebook/sam-vit-base
    sam:pcd-demo                                    a tiny network for trials with random weights

`sam/segments` is `(h, w)` uint16: 0 where there is no segment, 1 for the largest mask, smaller ones on top. Numbers say
nothing across views, and those of a mirrored view are its own. The network is that of the package transformers, which is
optional: `pip install "pcd-depth[sam]"`; the search for masks is in `pcd.encoders.segments`. Weights are `auto`, the path of a
file with transformers' names, or `random`.

A view costs one pass of the image encoder at 1024x1024 and a pass of the small decoder per 32 of the `points` x `points`
points. Segments of other networks, such as MobileSAM, which transformers does not have, come through the encoder `folder`.

Importing this module, and `SamEncoder.request`, import neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pcd.columns import ColumnSpec
from pcd.device import resolve_device, resolve_precision
from pcd.encoders.base import EncoderOptions
from pcd.encoders.checks import check_views
from pcd.encoders.weights import describe_file, fetch_published, find_weights, read_state, some, state_digest
from pcd.errors import TextTowerError, UsageError, WeightsError, suggest
from pcd.fingerprint import file_digest

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pcd.encoders.segments import Rules

PREFIX = "sam"
DEFAULT_MODEL = "vit-base"
POINTS_AT_ONCE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
"""One tensor under two names, of which a file may have either."""

Config = Mapping[str, Mapping[str, Any]]
MODELS: dict[str, Config] = {
    "vit-base": {"vision": {}},
    "vit-large": {
        "vision": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "global_attn_indexes": [5, 11, 17, 23],
        }
    },
    "vit-huge": {
        "vision": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": [7, 15, 23, 31],
        }
    },
    "pcd-demo": {
        "vision": {
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 128,
            "global_attn_indexes": [1],
            "window_size": 4,
            "num_pos_feats": 8,
            "initializer_range": 0.2,
        },
        "prompt_encoder": {"hidden_size": 16, "image_size": 128, "mask_input_channels": 4},
        "mask_decoder": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    },
}


class SamOptions(EncoderOptions):
    """Keys of `sam`: how masks are searched for. The defaults are Segment Anything's."""

    points: Annotated[int, Field(gt=0, le=128)] = 32
    """Points per side of the grid that asks for masks."""
    min_score: float = 0.88
    min_stability: Annotated[float, Field(ge=0, le=1)] = 0.95
    max_overlap: Annotated[float, Field(gt=0, le=1)] = 0.7
    """See `pcd.encoders.segments.Rules`."""


class SamEncoder:
    """A frozen Segment Anything network; see `pcd.encoders.base.Encoder` for the interface.

    Construction raises `UsageError` for a model that is not known or without transformers, and `WeightsError` for weights that
    cannot be had, read or put into the network.
    """

    Options = SamOptions
    has_text = False

    def __init__(self, model: str, options: SamOptions, view_size: tuple[int, int], device: str) -> None:
        self._model = _known(model)
        self.device = resolve_device(device)
        self.precision = resolve_precision(options.precision, self.device)
        self.view_size = self.grid = view_size
        self.random_weights = options.weights == "random"
        self._options = options
        network = build(self._model, options.seed)
        if self.random_weights:
            self._weights = {"kind": "random", "digest": state_digest(network.state_dict()), "seed": options.seed}
        else:
            file = published(self._model) if options.weights == "auto" else find_weights(options.weights)
            load(network, file, self._model)
            self._weights = {"kind": "file", "digest": file_digest(file)}
        self._place(network)
        name, meaning = f"{options.prefix or PREFIX}/segments", "segment numbers, 0 for none, 1 for the largest, smaller on top"
        self.columns = (ColumnSpec(name, view_size, "uint16", ("y", "x"), meaning, compress=True),)

    def _place(self, network: Any) -> None:
        import torch

        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        self._network = network.to(self.device, self._dtype).eval().requires_grad_(False)
        self._side = int(network.config.vision_config.image_size)

    @staticmethod
    def request(model: str, options: SamOptions) -> dict[str, Any]:
        """What was asked for. Raises `UsageError` for an unknown model and `WeightsError` for a file that is not there."""
        asked: dict[str, Any] = {"model": _known(model), "weights": options.weights, "file": None, **_search(options)}
        if options.weights == "random":
            asked["seed"] = options.seed
        elif options.weights != "auto":
            asked |= {"weights": "file", "file": describe_file(find_weights(options.weights))}
        return {**asked, "precision": options.precision, "prefix": options.prefix or PREFIX}

    def fingerprint(self) -> dict[str, Any]:
        """Network, weights, size of its input, and how masks are searched for."""
        return {
            "encoder": "sam",
            "model": self._model,
            "weights": dict(self._weights),
            "precision": self.precision,
            "view_size": list(self.view_size),
            "input": self._side,
            "grid": list(self.grid),
            "text": False,
            "mean": list(MEAN),
            "std": list(STD),
            **_search(self._options),
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)`, to uint16 `(B, h, w)`. Raises `UsageError` for views of another kind."""
        import torch

        from pcd.encoders import segments

        check_views(views, self.view_size)
        rules = segments.Rules(self._options.min_score, self._options.min_stability, self._options.max_overlap)
        found = []
        with torch.no_grad():
            embedded = self._network.get_image_embeddings(self._input(views.to(self.device)))
            for image in embedded:
                parts = list(self._proposals(image[None], rules))
                masks = segments.Masks(torch.cat([p.pixels for p in parts]), torch.cat([p.scores for p in parts]))
                found.append(segments.numbered(segments.distinct(masks, rules.max_overlap).pixels))
        return {self.columns[0].name: torch.stack(found)}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Raises `TextTowerError`: segments know no words."""
        raise TextTowerError('encoder sam has no text tower. Set head.table_init to "tokens" or "random".')

    @property
    def _resized(self) -> tuple[int, int]:
        """Rows and columns of a view whose longer side is the network's."""
        scale = self._side / max(self.view_size)
        return int(self.view_size[0] * scale + 0.5), int(self.view_size[1] * scale + 0.5)

    def _input(self, views: torch.Tensor) -> torch.Tensor:
        """Views `(B, 3, h, w)` as `(B, 3, side, side)`: the longer side fits, the rest is zeros to the right and below."""
        import torch
        import torch.nn.functional as F

        mean, std = (torch.tensor(value, device=views.device).view(3, 1, 1) for value in (MEAN, STD))
        rows, columns = self._resized
        image = F.interpolate(views, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return F.pad((image - mean) / std, (0, self._side - columns, 0, self._side - rows)).to(self._dtype)

    def _proposals(self, image: torch.Tensor, rules: Rules) -> Iterator[Any]:
        """`Masks` on the view, for an embedded image `(1, C, h, w)`, a batch of points at a time."""
        import torch

        from pcd.encoders import segments

        points = segments.point_grid(self._options.points, self._resized).to(self.device, self._dtype)
        for start in range(0, len(points), POINTS_AT_ONCE):
            asked = points[None, start : start + POINTS_AT_ONCE, None]
            here = torch.ones(asked.shape[:3], dtype=torch.int64, device=self.device)
            out = self._network(image_embeddings=image, input_points=asked, input_labels=here, multimask_output=True)
            logits, scores = out.pred_masks[0].flatten(0, 1).float(), out.iou_scores[0].flatten().float()
            sure = scores >= rules.min_score
            yield segments.stable(self._on_view(logits[sure]), scores[sure], rules)

    def _on_view(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(M, low, low)` of the padded square as `(M, h, w)` of the view."""
        import torch.nn.functional as F

        if not len(logits):
            return logits.new_zeros((0, *self.view_size))
        rows, columns = self._resized
        square = F.interpolate(logits[:, None], (self._side, self._side), mode="bilinear", align_corners=False)
        return F.interpolate(square[:, :, :rows, :columns], self.view_size, mode="bilinear", align_corners=False)[:, 0]


def build(model: str, seed: int) -> Any:
    """The network with random weights from `seed`. Raises `UsageError` without transformers."""
    import torch

    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            'encoder sam needs the package transformers, which is not installed: pip install "pcd-depth[sam]". '
            "Segments that were made elsewhere come through the encoder folder."
        )
    from pcd.encoders.torchvision_schemas import make_torchvision_importable

    make_torchvision_importable()
    library, parts = importlib.import_module("transformers"), MODELS[model]
    config = library.SamConfig(
        vision_config=library.SamVisionConfig(**parts["vision"]),
        prompt_encoder_config=library.SamPromptEncoderConfig(**parts.get("prompt_encoder", {})),
        mask_decoder_config=library.SamMaskDecoderConfig(**parts.get("mask_decoder", {})),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return library.SamModel(config)


def load(network: Any, file: Path, model: str) -> None:
    """Put the weights of a file into the network. Raises `WeightsError` unless names and shapes are the network's."""
    state, own = read_state(file), network.state_dict()
    for name, other in (TIED, TIED[::-1]):
        if name not in state and other in state:
            state[name] = state[other]
    wrong = sorted(name for name in own if name in state and state[name].shape != own[name].shape)
    problems = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys())}
    lines = [f"{len(names)} {what} ({some(names)})" for what, names in {**problems, "of another shape": wrong}.items() if names]
    if lines:
        raise WeightsError(
            f"{file} does not fit sam:{model}: tensors {'; '.join(lines)}. Expected the model.safetensors of "
            f"facebook/sam-{model}, or another file with transformers' names."
        )
    network.load_state_dict(state)


def published(model: str) -> Path:
    """The published weights, from the hub's cache or the hub. Raises `UsageError` if there are none, `WeightsError`."""
    if model == "pcd-demo":
        raise UsageError("encoder sam:pcd-demo has no published weights; give --weights random (encoders.NAME.weights).")
    return fetch_published(f"sam:{model}", f"facebook/sam-{model}", ["model.safetensors"])


def _known(model: str) -> str:
    if (model or DEFAULT_MODEL) not in MODELS:
        raise UsageError(f"Unknown model {model!r} of encoder sam.{suggest(model, MODELS)}")
    return model or DEFAULT_MODEL


def _search(options: SamOptions) -> dict[str, Any]:
    return {
        "points": options.points,
        "min_score": options.min_score,
        "min_stability": options.min_stability,
        "max_overlap": options.max_overlap,
    }
