"""What a scene is: solids, lights, a sky and the camera that looks at them."""

from __future__ import annotations

from dataclasses import dataclass

from pcd.datasets.scenes.materials import Colour
from pcd.datasets.scenes.raycast import Camera, Solid, Vector


@dataclass(frozen=True)
class Light:
    """A lamp at `position` (`reach`: metres within which it hardly weakens), or with `reach` inf the sun in that direction."""

    position: Vector
    colour: Colour
    reach: float = float("inf")
    casts_shadow: bool = True


@dataclass(frozen=True)
class Sky:
    """What is seen beyond everything: colours at the horizon and overhead, clouds (0 to 1), `haze` metres to lose 63 %."""

    horizon: Colour
    zenith: Colour
    clouds: float
    haze: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """A camera and what is in front of it. `ambient` is the light from above and from below.

    `exposure` is the mean brightness (linear) that the camera aims at, and `metering` how far it gets there: 1 always, 0 not
    at all, its exposure being set for an average scene. `tint` is its white balance. In a room, solid 0 is the shell around
    everything.
    """

    camera: Camera
    solids: tuple[Solid, ...]
    lights: tuple[Light, ...]
    ambient: tuple[Colour, Colour]
    sky: Sky | None = None
    exposure: float = 0.3
    metering: float = 1.0
    tint: Colour = (1.0, 1.0, 1.0)
