"""The columns of open_clip's vision transformers.

Beside `patch` and `cls`, the final tokens in the joint space of image and text, for blocks N counted from 1:

    patch@N     patch tokens of block N through the same ln_post and visual.proj as the final ones
    tokens@N    patch tokens of block N as they are, in the width of the tower
    cls@N       CLS token of block N through ln_post and visual.proj
    maskclip    patch tokens whose last block attends to nothing, through ln_post and visual.proj

`maskclip` follows the code released with MaskCLIP (Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022): with x the
patch tokens before the last block, y = x + out_proj(v_proj(ln_1(x))), z = y + mlp(ln_2(y)), so residual and MLP stay and only
the attention weights go: every token takes its own value, and the CLS token plays no part. The paper's text speaks of the value
projection and the last linear layer alone; works that leave out residual and MLP under the same name compute something else.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F

from pcd.columns import ColumnSpec
from pcd.encoders.openclip_names import open_clip
from pcd.encoders.openclip_network import ImageNetwork, Kind, Size, Tap
from pcd.errors import UsageError

MASKCLIP = "maskclip"
RESNET_ONLY = re.compile(r"stem|layer[1-9]\d*")
_BLOCK = re.compile(r"(patch|tokens|cls)@([1-9]\d*)")
_JOINT = "ln_post then visual.proj, not normalised"


def is_name(name: str) -> bool:
    """Whether a name without prefix is that of a column which vision transformers make on demand."""
    return name == MASKCLIP or _BLOCK.fullmatch(name) is not None


class VitNetwork(ImageNetwork):
    """A vision transformer with a CLS token; `patch` and `cls` are of PureCLIP-Depth, section 2.4 and its released code."""

    kinds: tuple[Kind, ...] = ("patch", "tokens", "cls", "maskclip")
    patch_meaning = f"final-layer patch tokens in reading order, {_JOINT}"
    cls_meaning = f"CLS token of the same forward pass, {_JOINT}"

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.visual.transformer.resblocks)

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """`patch`, `cls`, and of the taps float16 `(B, P, D)`, `tokens@N` in the tower's width, `cls@N` float32 `(B, D)`."""
        tokens = self._tokens(views)
        normed = {n: self.visual.ln_post(tokens[n]) for n in {self.blocks, *self._layers("patch", "cls")}}
        final = normed[self.blocks]
        columns = {self.column("patch"): self._joint(final[:, 1:]), self.column("cls"): self._cls(final)}
        for tap in self.taps:
            match tap.kind:
                case "patch":
                    found = self._joint(normed[tap.layer][:, 1:])
                case "cls":
                    found = self._cls(normed[tap.layer])
                case "maskclip":
                    found = self._joint(self.visual.ln_post(self._own_values(tokens[tap.layer - 1][:, 1:])))
                case _:
                    found = tokens[tap.layer][:, 1:].to(torch.float16, memory_format=torch.contiguous_format)
            columns[self.column(tap.name)] = found
        return columns

    def _layers(self, *kinds: Kind) -> set[int]:
        return {tap.layer for tap in self.taps if tap.kind in kinds}

    def _tokens(self, views: torch.Tensor) -> dict[int, torch.Tensor]:
        """All tokens `(B, 1 + P, W)` behind the blocks that are needed, CLS first, as the blocks give them."""
        before = {layer - 1 for layer in self._layers("maskclip")}
        taken = sorted({self.blocks, *before, *self._layers("patch", "tokens", "cls")})
        found = self.visual.forward_intermediates(
            self.normalised(views),
            indices=[block - 1 for block in taken],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
        return {block: torch.cat(pair, dim=1) for block, pair in zip(taken, pairs, strict=True)}

    def _joint(self, normed: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = normed @ self.visual.proj
        return found.to(torch.float16)

    def _cls(self, normed: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = normed[:, :1] @ self.visual.proj
        return found[:, 0].float()

    def _own_values(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last block on patch tokens `(B, P, W)` with each token's own value in place of what it attends to."""
        block, width = self.visual.transformer.resblocks[-1], tokens.shape[-1]
        attention = block.attn
        value = F.linear(block.ln_1(tokens), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
        tokens = tokens + block.ls_1(attention.out_proj(value))
        found: torch.Tensor = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return found

    def find(self, name: str) -> Tap | None:
        """See `ImageNetwork.find`: `patch@N`, `tokens@N`, `cls@N` and `maskclip`."""
        if RESNET_ONLY.fullmatch(name):
            raise UsageError(
                f"column {self.column(name)}: {self.model_name} is a vision transformer and has no stages; it makes "
                f"{self.column('patch')}@N, {self.column('tokens')}@N, {self.column('cls')}@N and {self.column(MASKCLIP)}."
            )
        if name == MASKCLIP:
            self._check_maskclip()
            return Tap("maskclip", self.blocks, name)
        if not (match := _BLOCK.fullmatch(name)):
            return None
        layer = int(match[2])
        if not 1 <= layer <= self.blocks:
            raise UsageError(f"column {self.column(name)}: {self.model_name} has transformer blocks 1 to {self.blocks}.")
        kinds: dict[str, Kind] = {"patch": "patch", "tokens": "tokens", "cls": "cls"}
        return Tap(kinds[match[1]], layer, name)

    def _check_maskclip(self) -> None:
        block = self.visual.transformer.resblocks[-1]
        if self.blocks < 2 or not isinstance(block, open_clip.transformer.ResidualAttentionBlock):
            raise UsageError(
                f"column {self.column(MASKCLIP)}: it is defined for two or more blocks of CLIP's own kind; {self.model_name} "
                f"has {self.blocks}, the last a {type(block).__name__}. Read {self.column('patch')} instead."
            )

    def output(self, tap: Tap) -> dict[str, Any]:
        """The layer, and beside it the space and the variant unless they are those of the final patch tokens."""
        if tap.kind == "patch":
            return {"layer": tap.layer}
        if tap.kind == "tokens":
            return {"layer": tap.layer, "space": "tower"}
        if tap.kind == "cls":
            return {"layer": tap.layer, "space": "joint", "token": "cls"}
        parts = {"attention": "out_proj(v_proj)", "residual": True, "mlp": True}
        return {"layer": tap.layer, "space": "joint", "variant": "maskclip", **parts}

    def identity(self) -> dict[str, Any]:
        """Layer and projection of the final tokens."""
        return {"layer": "final", "projection": "ln_post+proj"}

    def spec(self, tap: Tap, grid: Size) -> ColumnSpec:
        """Tokens in the joint space, or in the tower's width; of the CLS token one vector."""
        patches, width = grid[0] * grid[1], int(self.visual.output_dim)
        if tap.kind == "cls":
            meaning = f"CLS token of block {tap.layer}, {_JOINT}"
            return ColumnSpec(self.column(tap.name), (width,), "float32", ("channel",), meaning)
        if tap.kind == "tokens":
            meaning = f"patch tokens of block {tap.layer} in reading order as they are, before ln_post and visual.proj"
            return self.tokens_spec(tap.name, (patches, int(self.visual.transformer.width)), meaning)
        which = f"of block {tap.layer}" if tap.kind == "patch" else "by the last block's value path alone (MaskCLIP)"
        return self.tokens_spec(tap.name, (patches, width), f"patch tokens {which} in reading order, {_JOINT}")
