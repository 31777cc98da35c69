"""What can be written of a prediction, by name. Imports nothing heavy: the command line lists these names in its help."""

from __future__ import annotations

from enum import StrEnum


class Save(StrEnum):
    """One kind of output; `NAME` is the name of the image, with the number of the frame for videos and stacks."""

    png = "png"
    """`NAME.depth.png`: 16 bit, millimetres, or 1/256 m beyond 65 m."""
    npy = "npy"
    """`NAME.npy`: float32 metres."""
    tiff = "tiff"
    """`NAME.depth.tiff`: float32 metres."""
    exr = "exr"
    """`NAME.depth.exr`: float32 metres in the channel `Z`, OpenEXR's name for depth."""
    picture = "picture"
    """`NAME.picture.png`: image and coloured depth with a scale in metres."""
    side_by_side = "side-by-side"
    """`NAME.side-by-side.png`: image and coloured depth at full size and nothing else."""
    ply = "ply"
    """`NAME.ply`: a point cloud with colours."""
    uncertainty = "uncertainty"
    """`NAME.uncertainty.npy` and `.png`: standard deviation in metres."""
    video = "video"
    """`NAME.side-by-side.mp4`: the side-by-side pictures of a video or stack as one video."""


DEFAULT = (Save.png, Save.npy, Save.picture)
"""What is written unless something else is asked for."""
