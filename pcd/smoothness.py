"""How much a depth map changes between neighbouring pixels, more or less where the image does."""

from __future__ import annotations

import torch
from torch import Tensor

from pcd.device import without_autocast


def smoothness(depth: Tensor, image: Tensor | None = None, *, sign: int = -1) -> Tensor:
    """Mean over all pixels of `|dx D| exp(sign |dx I|) + |dy D| exp(sign |dy I|)`, for depths D `(B, h, w)` in metres.

    `image` I is `(B, C, h, w)` with values in [0, 1]; differences are to the next pixel to the right and below, 0 at the
    border, and `|dx I|` is the Euclidean norm over channels. `sign` -1 forgives steps of depth where the image has an edge
    (monodepth); +1, as equation 7 of "Unveiling the Efficacy" is printed, punishes them. Without an image both weights are 1.
    """
    with without_autocast(depth):
        total = depth.new_zeros(())
        for axis in (-1, -2):
            steps = depth.diff(dim=axis).abs()
            if image is not None:
                steps = steps * torch.exp(sign * torch.linalg.vector_norm(image.diff(dim=axis), dim=1))
            total = total + steps.sum()
        return total / depth.numel()
