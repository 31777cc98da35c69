"""The multi-scale adapter of paper 001, section 4.3: a U-Net over the stages of a frozen RN50 and the picture.

    bridge   2 x [conv 3x3, BatchNorm, ReLU] on layer4
    up       5 x: ConvTranspose 2x2 stride 2, the skip beside it, 2 x [conv 3x3, BatchNorm, ReLU];
             skips are layer3, layer2, layer1, the stem before its pooling, and the normalised picture
    delta    conv 1x1 to one map of the size of the view
    depth    clip_weight * CLIP's depth, bilinear, + delta

With RN50 (layer4 has C = 2048 channels) the widths are C to C / 32: 2048, 1024, 512, 256, 128, 64. At `clip_weight = 0`, the
released configuration, this is a plain U-Net on frozen features, and no text is needed. With a weight above 0 the released
code squashes delta to -1 ... 1 metres, `2 sigmoid(delta) - 1`, which neither paper nor configuration mention: with CLIP's 1 to
3 m no prediction can then leave 0 to 4 m, whatever is learned. That alone may be why the paper's table 3 finds CLIP harmful:
its supervised rows with CLIP have delta1 0.379 to 0.385, CLIP's depth alone has 0.394. `bounded = false` leaves it out.

With `segments` the picture's skip has three channels more: a bridge of 3 maps on the segments' colours, 180 parameters. The
released code has these always and counts them: 124,300,789 without segments.

The released code learns from the mean of a view and its mirror image, cut to 0 to 10 m, in float16; here mirrored views are
rows of their own (`train.flips`), the loss sees the depth as it is unless `cut` says otherwise (a cell that a cut holds back
gets no gradient), and weights are float32. SGD 2e-3, momentum 0.9, weight decay 1e-5, batches of 8, 90 epochs, a tenth of the
rate after every 30.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from pcd.errors import RecipeError
from pcd.heads import dense
from pcd.heads.base import Batch, Context, Head, HeadOptions, Phase
from pcd.heads.clip_prior import ClipDepth, ClipDepthOptions
from pcd.heads.self_supervision import PhotometricLoss, SelfSupervision
from pcd.recipe import Positive

Widths = Annotated[
    tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
LEVELS = 6


class MsaOptions(HeadOptions):
    """`[head]` of `name = "msa"`. The defaults are the released configuration's, but for the masked loss without a cut."""

    stages: str = "clip"
    """Prefix of the columns layer1 to layer4 and stem."""
    rgb: str = "pixels/rgb"
    segments: str = ""
    """A column of segments as a further input: numbers `(h, w)`, 0 for none, or colours `(h, w, 3)`. Absent: none."""
    widths: Widths = ()
    """Of the bridge and the five up blocks; absent: C, C / 2 ... C / 32 of layer4's C channels."""
    clip_weight: Annotated[float, Field(ge=0)] = 0.0
    """alpha, the share of CLIP's depth. The paper's rows with CLIP do not say theirs; 1 takes it as the initial prediction."""
    bounded: bool = True
    """With CLIP's depth, whether delta stays within 1 metre, as in the released code."""
    clip: ClipDepthOptions = ClipDepthOptions(temperature=0.001)
    loss: dense.Error = "l1"
    mask: bool = True
    """False: pixels without ground truth count as 0 metres, as in the released code, whose ground truth is dense."""
    cut: bool = False
    """Whether the loss sees the depth cut to 0 ... `max_depth`, as in the released code."""
    supervision: Literal["depth", "self"] = "depth"
    """Ground truth depth, or a second view: then `[head.self_supervision]` holds instead of `loss`, `mask` and `cut`."""
    self_supervision: SelfSupervision = SelfSupervision()
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    optimiser: Literal["adamw", "sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""

    @property
    def features(self) -> tuple[str, ...]:
        """The columns from the coarsest, which the bridge sees, to the picture."""
        return (*(f"{self.stages}/{name}" for name in ("layer4", "layer3", "layer2", "layer1", "stem")), self.rgb)


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """2 x [conv 3x3, BatchNorm, ReLU]."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UpBlock(nn.Module):
    """To twice the size, with a skip: `(B, inputs, h, w)` and `(B, skip, 2 h, 2 w)` to `(B, outputs, 2 h, 2 w)`."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.convolutions = convolutions(outputs + skip, outputs)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """The finer map."""
        larger = self.up(coarse)
        found: Tensor = self.convolutions(torch.cat([larger, skip.to(larger)], dim=1))
        return found


class UNet(nn.Module):
    """A bridge, up blocks and one map: features from coarse to fine, `(B, C, h, w)` each, to `(B, H, W)` of the finest."""

    def __init__(self, channels: tuple[int, ...], widths: tuple[int, ...]) -> None:
        """`channels` of the features and `widths` of bridge and up blocks, as many of either."""
        super().__init__()
        self.bridge = convolutions(channels[0], widths[0])
        self.blocks = nn.ModuleList(
            UpBlock(before, skip, after) for before, skip, after in zip(widths, channels[1:], widths[1:], strict=False)
        )
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The map."""
        found: Tensor = self.bridge(features[0])
        for block, skip in zip(self.blocks, features[1:], strict=True):
            found = block(found, skip)
        out: Tensor = self.out(found)
        return out[:, 0]


class MsaHead(Head):
    """The multi-scale adapter: 124,300,609 parameters with RN50, 1,908 more with segments. Depths are pixels of the view."""

    Options = MsaOptions

    def __init__(self, options: MsaOptions, shapes: dense.Shapes, grid: tuple[int, int]) -> None:
        """`shapes` gives the stages `(h, w, C)`, each twice the size of the one before, and the picture `(H, W, 3)`.

        Raises `RecipeError` for columns that do not fit together.
        """
        super().__init__()
        self.options = options
        self.grid = self.output_grid(options, shapes, grid)
        maps = [dense.map_shape(shapes, name) for name in options.features]
        _require_pyramid(options.features, maps)
        channels = [shape[2] for shape in maps]
        if options.segments:
            _require_segments(options.segments, shapes[options.segments], self.grid)
            channels[-1] += 3
        self.image = dense.Normalised()
        self.segments = convolutions(3, 3) if options.segments else None
        self.unet = UNet(tuple(channels), _widths(options, channels[0]))
        self.clip = ClipDepth(options.clip, shapes, maps[0][:2]) if options.clip_weight else None
        by_itself = options.supervision == "self"
        self.photometric = PhotometricLoss(options.self_supervision, shapes, self.grid, options) if by_itself else None

    @staticmethod
    def output_grid(options: MsaOptions, shapes: dense.Shapes, grid: tuple[int, int]) -> tuple[int, int]:
        """The pixels of the picture."""
        return dense.map_shape(shapes, options.rgb, 3)[:2]

    @staticmethod
    def reads(options: MsaOptions) -> tuple[str, ...]:
        """The stages, the picture, the segments if there are any, and what CLIP's depth is computed from if it has a weight."""
        names = (*options.features, options.segments, options.clip.token_column if options.clip_weight else "")
        return tuple(dict.fromkeys(name for name in names if name))

    @classmethod
    def learns_from(cls, options: MsaOptions) -> tuple[str, ...]:
        """And what a second view is made of."""
        more = options.self_supervision.columns if options.supervision == "self" else ()
        return tuple(dict.fromkeys((*cls.reads(options), *more)))

    @staticmethod
    def phrases(options: MsaOptions) -> tuple[str, ...]:
        """The sentences of CLIP's depth; none without a weight."""
        return options.clip.sentences if options.clip_weight else ()

    def initialise(self, context: Context) -> None:
        """Fill the texts of CLIP's depth, if it has a weight. Raises `TextTowerError` if there is no text tower.

        Before it learns from second views a network without CLIP's depth starts at `self_supervision.start` metres; raises
        `RecipeError` without cameras for them.
        """
        if self.photometric is not None:
            self.photometric.check(context)
        if self.clip is not None:
            self.clip.initialise(context)
        elif self.photometric is not None and self.unet.out.bias is not None:
            nn.init.constant_(self.unet.out.bias, self.options.self_supervision.start)

    def metres(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Depth `(B, H, W)`, not cut to any range."""
        names = self.options.features
        features = [dense.channels_first(columns[name]) for name in names[:-1]]
        skip = self.image(columns[names[-1]])
        if self.segments is not None:
            skip = torch.cat([skip, self.segments(colours(columns[self.options.segments])).to(skip)], dim=1)
        delta: Tensor = self.unet([*features, skip]).float()
        if self.clip is None:
            return delta
        prior: Tensor = F.interpolate(self.clip.maps(columns)[:, None], self.grid, mode="bilinear", align_corners=True)[:, 0]
        prior = self.options.clip_weight * prior
        return prior + (2 * delta.sigmoid() - 1 if self.options.bounded else delta)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Metres `(B, P)` of every pixel of the view, cut to the depth range."""
        return dense.in_range(self.metres(columns), self.options)

    def phases(self) -> tuple[Phase, ...]:
        """One."""
        options = self.options
        chosen = tuple(self.named_parameters())
        return (Phase("depth", 1, chosen, options.lr, options.weight_decay, options.optimiser, options.momentum),)

    def losses(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """Equation 8 or 9 over the pixels that count, or equation 6."""
        options, target = self.options, batch.targets["depth"]
        if self.photometric is not None:
            return self.photometric.losses(self.metres(batch.columns), batch.columns, target)
        if options.mask and not len(target.flat):
            return {"total": target.mean.new_zeros(())}
        depth = self.metres(batch.columns)
        depth = depth.clamp(0, options.max_depth) if options.cut else depth
        return {"total": dense.map_error(depth, target, options.loss, options.mask)}


def colours(segments: Tensor) -> Tensor:
    """Segments as `(B, 3, h, w)` in [0, 1]: colours `(B, h, w, 3)` uint8 as they are, numbers `(B, h, w)` as fixed colours.

    A number always has the same colour, whatever picture it is from, 0 is black, and neighbouring numbers look nothing alike:
    the three upper bytes of the number times Knuth's 2654435761, modulo 2^32.
    """
    if segments.dim() == 3:
        mixed = segments.to(torch.int64) * 2654435761 % 2**32
        segments = torch.stack([mixed // 2**shift % 256 for shift in (24, 16, 8)], dim=-1)
    return dense.channels_first(segments) / 255


def _widths(options: MsaOptions, channels: int) -> tuple[int, ...]:
    widths = options.widths or tuple(channels // 2**level for level in range(LEVELS))
    if len(widths) != LEVELS or min(widths) < 1:
        raise RecipeError(
            f"head: widths = {list(widths)}, layer4 has {channels} channels; give {LEVELS}, of the bridge and five up blocks."
        )
    return widths


def _require_pyramid(names: tuple[str, ...], maps: list[tuple[int, int, int]]) -> None:
    for before, name, (rows, columns, _), (finer, wider, _) in zip(names, names[1:], maps, maps[1:], strict=False):
        if (finer, wider) != (2 * rows, 2 * columns):
            raise RecipeError(
                f"head: column {name} is {finer}x{wider} and {before} {rows}x{columns}; expected twice the size at each step, "
                "up to the picture: views whose sides are multiples of 32, and pixels without a stride."
            )


def _require_segments(name: str, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    if shape not in (grid, (*grid, 3)):
        raise RecipeError(f"head: column {name} is {shape}; expected segment numbers {grid} or colours {(*grid, 3)}.")
