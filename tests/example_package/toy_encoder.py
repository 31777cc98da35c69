"""An encoder for pcd: mean and standard deviation of the colours of each patch."""

from collections.abc import Sequence
from typing import Any

import torch

from pcd.columns import ColumnSpec
from pcd.encoders.base import EncoderOptions
from pcd.errors import TextTowerError


class ColourEncoder:
    class Options(EncoderOptions):
        patch: int = 8  # pixels; views must be multiples of it

    has_text = random_weights = False

    def __init__(self, model: str, options: Options, view_size: tuple[int, int], device: str) -> None:
        self.patch, self.grid = options.patch, (view_size[0] // options.patch, view_size[1] // options.patch)
        shape = (self.grid[0] * self.grid[1], 6)
        self.columns = (ColumnSpec("colour/patch", shape, "float16", ("patch", "channel"), "mean and deviation of R, G, B"),)

    @staticmethod
    def request(model: str, options: Options) -> dict[str, Any]:
        return {"patch": options.patch}

    def fingerprint(self) -> dict[str, Any]:
        weights = {"kind": "none", "digest": ""}
        about = {"encoder": "colours", "model": "mean-std", "weights": weights, "precision": "fp32", "text": False}
        return {**about, "patch": self.patch, "grid": list(self.grid)}

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        cells = torch.nn.functional.unfold(views, self.patch, stride=self.patch).unflatten(1, (3, -1))  # (B, 3, pixels, P)
        return {"colour/patch": torch.cat([cells.mean(2), cells.std(2)], dim=1).transpose(1, 2).half()}

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        raise TextTowerError("colours have no words")
