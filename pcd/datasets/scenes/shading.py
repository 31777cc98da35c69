"""From what each pixel sees to its colour: patterns, lamps, sun, shadows, corners, haze, exposure.

Arrays are planar, `(3, H, W)` or `(3, N)`, and hold linear light until the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pcd.datasets.scenes.materials import Colour, Floats, MaterialTable, Patch, noise
from pcd.datasets.scenes.raycast import Camera, Hits, Solid, trace
from pcd.datasets.scenes.scene import Light, Scene, Sky
from pcd.datasets.scenes.shadows import Samples
from pcd.datasets.scenes.surface import Surface, find_surface

CORNER = 0.3
"""Metres from a wall, floor or ceiling over which the darkening of corners fades."""

AVERAGE = 0.3
"""Mean brightness of an average scene, for which a camera that does not meter is set."""


def render(scene: Scene) -> tuple[Floats, Hits]:
    """The scene as its camera sees it: `(H, W, 3)` display values in [0, 1] without sensor noise, and what every pixel hit."""
    hits = trace(scene.camera, scene.solids)
    rays = scene.camera.directions()
    surface = find_surface(scene.camera, scene.solids, hits, rays)
    image = np.zeros((3, hits.depth.size), dtype=np.float32)
    if scene.sky is not None:
        image[:] = _sky(scene.sky, rays).reshape(3, -1)
    seen = _radiance(scene, surface)
    if scene.sky is not None:
        seen = _hazy(scene.sky, seen, surface, scene.camera)
    image[:, surface.pixel] = seen
    image *= np.float32(_gain(scene, float(seen.mean()) if seen.size else AVERAGE))
    return _display(smooth_edges(image.reshape(3, *hits.depth.shape), hits), scene.tint), hits


def _gain(scene: Scene, brightness: float) -> float:
    """What the camera multiplies light by."""
    return scene.exposure / AVERAGE * math.pow(AVERAGE / max(brightness, 1e-3), scene.metering)


def _column(colour: Colour) -> Floats:
    return np.array(colour, dtype=np.float32)[:, None]


def _radiance(scene: Scene, surface: Surface) -> Floats:
    """Light `(3, N)` that leaves the visible points towards the camera."""
    materials, lookup = _material_lookup(scene.solids)
    index = lookup[surface.solid, surface.face]
    colour = materials.reflectance(index, Patch(surface.u, surface.v, surface.widths(surface.u), surface.widths(surface.v)))
    return colour * (_illumination(scene, surface) + materials.glow[index])


def _material_lookup(solids: Sequence[Solid]) -> tuple[MaterialTable, npt.NDArray[np.intp]]:
    """All materials, and `(K, 4)` the number of each solid's side, front, top and bottom among them."""
    faces = [(s.material, s.front or s.material, s.top or s.material, s.bottom or s.material) for s in solids]
    numbers = {material: number for number, material in enumerate(dict.fromkeys(m for face in faces for m in face))}
    return MaterialTable(list(numbers)), np.array([[numbers[material] for material in face] for face in faces])


def _illumination(scene: Scene, surface: Surface) -> Floats:
    """Light `(3, N)` that falls on the visible points."""
    above, below = _column(scene.ambient[0]), _column(scene.ambient[1])
    total: Floats = below + (surface.normal[2] + 1) / 2 * (above - below)
    samples = Samples(surface, scene.solids)
    total *= samples.spread(samples.openness())
    if scene.solids[0].shape == "shell":
        total *= _corners(scene.solids[0], surface.point)
    for light in scene.lights:
        strength = _strength(light, surface)
        if light.casts_shadow:
            strength *= samples.spread(samples.lit(light))
        total += _column(light.colour) * strength
    return total


def _strength(light: Light, surface: Surface) -> Floats:
    """Lambert's cosine, weakened with the square of the distance for lamps: `(N,)`."""
    position = _column(light.position)
    if np.isinf(light.reach):
        towards = (position / np.sqrt((position**2).sum()))[:, 0]
        return np.asarray(np.maximum(np.einsum("i,in->n", towards, surface.normal), 0), dtype=np.float32)
    apart = position - surface.point
    square = np.einsum("in,in->n", apart, apart)
    cosine = np.maximum(np.einsum("in,in->n", apart, surface.normal), np.float32(0)) / np.sqrt(square)
    near = np.float32(light.reach**2)
    return np.asarray(cosine * (near / (near + square)), dtype=np.float32)


def _corners(room: Solid, point: Floats) -> Floats:
    """Darkening where walls, floor and ceiling meet, for there less of the room is in sight: `(N,)`."""
    darkness = np.full(point.shape[1], -1, dtype=np.float32)
    for axis in range(3):
        inside = np.float32(room.half[axis]) - np.abs(point[axis] - np.float32(room.centre[axis]))
        darkness += np.exp(inside * np.float32(-1 / CORNER))
    return np.asarray(1 - np.float32(0.4) * np.clip(darkness, 0, 1.3), dtype=np.float32)


def smooth_edges(image: Floats, hits: Hits) -> Floats:
    """Soften `(3, H, W)` where neighbouring pixels see different solids: a cheap stand-in for several rays a pixel."""
    edge = np.zeros(hits.solid.shape, dtype=np.bool_)
    across, down = hits.solid[:, 1:] != hits.solid[:, :-1], hits.solid[1:] != hits.solid[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    height, width = hits.depth.shape
    pixel = np.flatnonzero(edge)
    rows, columns = np.divmod(pixel, width)
    neighbours = (
        np.maximum(rows - 1, 0) * width + columns,
        np.minimum(rows + 1, height - 1) * width + columns,
        rows * width + np.maximum(columns - 1, 0),
        rows * width + np.minimum(columns + 1, width - 1),
    )
    flat = image.reshape(3, -1)
    softened = flat.copy()
    cross = sum((np.take(flat, there, axis=1) for there in neighbours), np.float32(0))
    softened[:, pixel] = np.take(flat, pixel, axis=1) * np.float32(0.5) + cross * np.float32(0.125)
    return softened.reshape(image.shape)


def _sky(sky: Sky, rays: Floats) -> Floats:
    """Light from beyond everything, `(3, H, W)`: a gradient by height, and clouds on a plane far above."""
    slope = rays[2] / np.sqrt(rays[0] ** 2 + rays[1] ** 2)
    horizon, zenith = _column(sky.horizon)[:, None], _column(sky.zenith)[:, None]
    light = horizon + np.sqrt(np.clip(slope * np.float32(1.6), 0, 1)) * (zenith - horizon)
    plane = np.float32(0.042) / np.maximum(rays[2], np.float32(0.02))
    u, v = (rays[0] * plane).ravel() + np.float32(sky.phase), (rays[1] * plane).ravel()
    cloud = noise(u, v, plane.ravel() * np.float32(0.017)).reshape(slope.shape)
    cover = np.clip(cloud * np.float32(0.55) + np.float32(sky.clouds * 2 - 0.9), 0, 1) * np.clip(slope * 6, 0, 1)
    grey = np.float32(0.95) * horizon.max() + np.float32(0.08) * cloud
    return np.asarray(light + cover * (grey - light), dtype=np.float32)


def _hazy(sky: Sky, seen: Floats, surface: Surface, camera: Camera) -> Floats:
    """The more air between a point and the camera, the more of the horizon's colour: `(3, N)`."""
    apart = surface.point - _column(camera.position)
    clear = np.exp(np.sqrt(np.einsum("in,in->n", apart, apart)) * np.float32(-1 / sky.haze))
    horizon = _column(sky.horizon)
    return np.asarray(horizon + clear * (seen - horizon), dtype=np.float32)


def _display(image: Floats, tint: Colour) -> Floats:
    """White balance, a soft shoulder for highlights and the display curve: `(3, H, W)` to `(H, W, 3)` in [0, 1]."""
    light = image * _column(tint)[:, None]
    shown = np.sqrt(light * (1 + light * np.float32(0.15)) / (1 + light * np.float32(0.8)))
    return np.ascontiguousarray(np.moveaxis(np.clip(shown, 0, 1), 0, 2))
