"""Side-by-side pictures of a video as one video."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt


class VideoWriter:
    """An MP4 file (codec mp4v) that grows frame by frame. Close it, or its index is missing and nothing plays it."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        """`rate` frames per second of `size` (height, width); the codec needs even sizes, so an odd one grows by a pixel.

        Raises `OSError` if the file or the codec cannot be had.
        """
        self.path = path
        self._size = size
        self._odd = size[0] % 2, size[1] % 2
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), code, rate, (size[1] + self._odd[1], size[0] + self._odd[0]))
        if not self._writer.isOpened():
            raise OSError(f"{path} cannot be written: OpenCV has no mp4v encoder here, or the folder cannot be written to")

    def add(self, rgb: npt.NDArray[np.uint8]) -> None:
        """One frame, RGB uint8 `(H, W, 3)`. Raises `ValueError` for another size than the first: OpenCV would drop it."""
        if rgb.shape[:2] != self._size:
            raise ValueError(f"{self.path}: a frame of {rgb.shape[:2]} in a video of {self._size}")
        frame = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        self._writer.write(cv2.copyMakeBorder(frame, 0, self._odd[0], 0, self._odd[1], cv2.BORDER_REPLICATE))

    def close(self) -> None:
        """Write the index and close."""
        self._writer.release()
