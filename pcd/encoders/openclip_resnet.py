"""The columns of open_clip's ModifiedResNets (RN50, RN101, RN50x4, RN50x16, RN50x64).

Views of any size divisible by 32; a patch is a location of layer4, 32x32 pixels.

    patch           c_proj(v_proj(x)) of every location x of layer4: what the attention pool gives a query that attends to that
                    location alone, and so in the joint space of image and text. The positional embedding is not added, as in
                    the code released with MaskCLIP (Zhou et al., ECCV 2022): it would add one pattern to every view
    cls             what the attention pool gives, which is the image's embedding; its positional embedding is resampled to the
                    grid (antialiased bicubic, as for vision transformers), the first position, of the mean, stays
    stem            maps after the third convolution of the stem, its BatchNorm and ReLU, before the pooling: half resolution
    layer1 ... 4    maps after each stage: at 1/4, 1/8, 1/16 and 1/32

Maps are float16 `(h, w, C)`. No positional embedding, attention pool or projection has touched them.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from pcd.columns import ColumnSpec
from pcd.encoders.openclip_network import ImageNetwork, Kind, Size, Tap
from pcd.encoders.openclip_vit import is_name as is_vit_name
from pcd.errors import UsageError

STRIDE = 32
STAGES = 4
_STAGE = re.compile(r"layer([1-9]\d*)")


class ResNetNetwork(ImageNetwork):
    """A ModifiedResNet with its attention pool."""

    kinds: tuple[Kind, ...] = ("stem", "layer")
    patch_meaning = "layer4 in reading order, attnpool's v_proj then c_proj at each location, not normalised"
    cls_meaning = "attention-pooled embedding of the same forward pass, not normalised"

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """`patch`, `cls`, and of the taps float16 `(B, h, w, C)`."""
        visual, maps = self.visual, dict[int, torch.Tensor]()
        x = self.normalised(views)
        for conv, norm, act in (
            (visual.conv1, visual.bn1, visual.act1),
            (visual.conv2, visual.bn2, visual.act2),
            (visual.conv3, visual.bn3, visual.act3),
        ):
            x = act(norm(conv(x)))
        maps[0] = x
        x = visual.avgpool(x)
        for stage in range(1, STAGES + 1):
            maps[stage] = x = self._stage(stage)(x)
        pool = visual.attnpool
        columns = {
            self.column("patch"): pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2))).to(torch.float16),
            self.column("cls"): pool(x).float(),
        }
        taken = {self.column(tap.name): maps[tap.layer].permute(0, 2, 3, 1) for tap in self.taps}
        return columns | {name: value.to(torch.float16).contiguous() for name, value in taken.items()}

    def _stage(self, stage: int) -> Any:
        return getattr(self.visual, f"layer{stage}")

    def find(self, name: str) -> Tap | None:
        """See `ImageNetwork.find`: `stem` and `layer1` to `layer4`."""
        if name == "stem":
            return Tap("stem", 0, name)
        match = _STAGE.fullmatch(name)
        if is_vit_name(name) or (match and int(match[1]) > STAGES):
            raise UsageError(
                f"column {self.column(name)}: {self.model_name} is a ResNet; beside {self.column('patch')} and "
                f"{self.column('cls')} it makes maps, {self.column('stem')} and {self.column('layer1')} to "
                f"{self.column('layer4')}."
            )
        return Tap("layer", int(match[1]), name) if match else None

    def output(self, tap: Tap) -> dict[str, Any]:
        """The stage, by name."""
        return {"layer": tap.name, "space": "tower"}

    def identity(self) -> dict[str, Any]:
        """Layer, both ways through the attention pool, and how its positional embedding comes to the grid of the views."""
        return {
            "layer": "layer4",
            "projection": {"patch": "attnpool.c_proj(v_proj), no positions", "cls": "attnpool"},
            "positions": "antialiased bicubic",
        }

    def spec(self, tap: Tap, grid: Size) -> ColumnSpec:
        """A map: rows, columns and channels of a stage."""
        norm = self._stage(tap.layer)[-1].bn3 if tap.layer else self.visual.bn3
        times = 2 ** (STAGES - tap.layer)
        shape = (grid[0] * times, grid[1] * times, int(norm.num_features))
        what = f"stage {tap.name}" if tap.layer else "the stem before its pooling"
        meaning = f"feature map after {what}, at 1/{STRIDE // times} of the view"
        return ColumnSpec(self.column(tap.name), shape, "float16", ("y", "x", "channel"), meaning)
