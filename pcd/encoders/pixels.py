"""The `pixels` encoder: the view itself as a column, for heads that read the image beside tokens.

`pixels/rgb` is uint8 `(h, w, 3)`: every value of the view, which lies in [0, 1], times 255, rounded to the nearest (half to
even). A view that was cut from an 8-bit image without resizing comes out as it was, bit for bit. With the option `stride` n it
is the mean over n x n of those pixels, rounded half up, in integers: the same on every device. There are no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pcd.columns import ColumnSpec
from pcd.encoders.base import EncoderOptions
from pcd.encoders.checks import check_divides, check_views
from pcd.errors import TextTowerError, UsageError

if TYPE_CHECKING:
    import torch

LARGEST = 255
PREFIX = "pixels"


class PixelOptions(EncoderOptions):
    """There are no weights: `weights` stays `auto`, seed and precision mean nothing."""

    stride: Annotated[int, Field(gt=0)] = 1
    """Pixels of a view, in both directions, that become one of the column."""


class PixelEncoder:
    """Views as they are; see `pcd.encoders.base.Encoder` for the interface.

    Construction raises `UsageError` for a model or weights, and for a stride that does not divide the views.
    """

    Options = PixelOptions
    has_text = False
    random_weights = False

    def __init__(self, model: str, options: PixelOptions, view_size: tuple[int, int], device: str) -> None:
        from pcd.device import resolve_device

        _refuse(model, options)
        self.device, self.view_size, self._stride = resolve_device(device), view_size, options.stride
        self.grid = check_divides("encoder pixels (stride)", (options.stride, options.stride), view_size)
        self._name = f"{options.prefix or PREFIX}/rgb"
        how = "the view in 8 bits" if options.stride == 1 else f"mean of {options.stride}x{options.stride} pixels in 8 bits"
        self.columns = (ColumnSpec(self._name, (*self.grid, 3), "uint8", ("y", "x", "channel"), f"RGB, {how}"),)

    @staticmethod
    def request(model: str, options: PixelOptions) -> dict[str, Any]:
        """What was asked for. Raises `UsageError` for a model or weights."""
        _refuse(model, options)
        return {"model": "rgb", "stride": options.stride, "prefix": options.prefix or PREFIX}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the column: the size of a view and the stride."""
        return {
            "encoder": "pixels",
            "model": "rgb",
            "weights": {"kind": "none", "digest": ""},
            "precision": "uint8",
            "view_size": list(self.view_size),
            "stride": self._stride,
            "grid": list(self.grid),
            "text": False,
        }

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB float32 in [0, 1], `(B, 3, h, w)`, to uint8 `(B, h / stride, w / stride, 3)`.

        Raises `UsageError` for views of another shape or dtype, and for values that are no number or lie outside [0, 1].
        """
        import torch

        check_views(views, self.view_size)
        wide = (views * LARGEST).round()
        if not bool(((wide >= 0) & (wide <= LARGEST)).all()):
            raise UsageError("views hold values that are not numbers in [0, 1]; encoder pixels cannot store them in 8 bits.")
        with torch.no_grad():
            return _pixels(views.to(self.device), self._stride, self._name)

    def network(self) -> torch.nn.Module:
        """What `encode` computes, as a network without checks: see `pcd.encoders.base.Exportable`."""
        import torch

        stride, name = self._stride, self._name

        class PixelNetwork(torch.nn.Module):
            def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
                return _pixels(views, stride, name)

        return PixelNetwork()

    def image_weights(self) -> None:
        """None: there are none."""

    def embed_text(self, phrases: Sequence[str]) -> torch.Tensor:
        """Raises `TextTowerError`: pixels know no words."""
        raise TextTowerError('encoder pixels has no text tower. Set head.table_init to "tokens" or "random".')


def _pixels(views: torch.Tensor, stride: int, name: str) -> dict[str, torch.Tensor]:
    import torch

    pixels = (views * LARGEST).round().to(torch.int32)
    batch, channels, height, width = pixels.shape
    cells = pixels.reshape(batch, channels, height // stride, stride, width // stride, stride)
    area = stride * stride
    mean = (cells.sum(dim=(3, 5), dtype=torch.int32) + area // 2) // area
    return {name: mean.to(torch.uint8).permute(0, 2, 3, 1).contiguous()}


def _refuse(model: str, options: PixelOptions) -> None:
    if model:
        raise UsageError(f"encoder pixels:{model}: there are no models of it; say pixels, and options as encoder.stride.")
    if options.weights != "auto":
        raise UsageError(f"encoder pixels has no weights, but encoder.weights is {options.weights!r}; leave it out.")
