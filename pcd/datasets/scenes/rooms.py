"""Random furnished rooms."""

from __future__ import annotations

import math
from dataclasses import replace

from pcd.datasets.base import Intrinsics
from pcd.datasets.scenes.furniture import (
    ANYWHERE,
    AT_WALLS,
    CLOTHS,
    DARK,
    WHITE,
    Piece,
    Random,
    ball,
    block,
    phase,
    pick,
    pillar,
    place,
    wood,
)
from pcd.datasets.scenes.materials import Colour, Material, Pattern, scaled
from pcd.datasets.scenes.raycast import Camera, Solid, Vector
from pcd.datasets.scenes.scene import Light, Scene

LONGEST = 9.85
"""Metres from corner to opposite corner: nothing in a room is farther than the indoor depth range."""
PAINTS: tuple[Colour, ...] = (
    (0.72, 0.7, 0.65),
    (0.6, 0.53, 0.4),
    (0.4, 0.48, 0.5),
    (0.5, 0.55, 0.42),
    (0.62, 0.42, 0.34),
    (0.3, 0.37, 0.45),
    (0.74, 0.73, 0.72),
    (0.68, 0.6, 0.38),
)
FLASH = (1.9, 2.2)
"""Strength of the lamp on the camera: what is near is bright, the strongest cue to distance that a plain room can give."""
FLASH_REACH = 1.5
EXPOSURE = 0.42
METERING = 0.05
Footprint = tuple[float, float, float, float]
WALLS = 4


class _Plan:
    """The floor of a room while it is furnished: its size, what stands on it, and where the camera is."""

    def __init__(self, size: Vector, camera: Vector) -> None:
        self.size, self.camera = size, camera
        self.solids: list[Solid] = []
        self.taken: list[Footprint] = []

    def free(self, area: Footprint, away: float = 0.45) -> bool:
        """Whether an area lies in the room, touches nothing and keeps `away` metres from the camera."""
        left, back, right, front = area
        x, y, _ = self.camera
        if left < 0 or back < 0 or right > self.size[0] or front > self.size[1]:
            return False
        if left - away < x < right + away and back - away < y < front + away:
            return False
        return all(right < a or left > c or front < b or back > d for a, b, c, d in self.taken)

    def add(self, piece: Piece, x: float, y: float, yaw: float) -> bool:
        """Put a piece there unless something is in the way."""
        cos, sin = math.cos(yaw), math.sin(yaw)
        corners = [
            (a * cos - b * sin, a * sin + b * cos) for a in (-piece.width / 2, piece.width / 2) for b in (0, piece.depth)
        ]
        xs, ys = [x + a for a, _ in corners], [y + b for _, b in corners]
        area = (min(xs), min(ys), max(xs), max(ys))
        if not self.free(area):
            return False
        self.solids += place(piece, x, y, yaw)
        self.taken.append(area)
        return True

    def at_wall(self, wall: int, share: float) -> tuple[float, float, float]:
        """A point on a wall (0 to 3: back, left, front, right; `share` along it) and the yaw that faces the room from it."""
        gap, (width, length, _) = 0.01, self.size
        if wall in (0, 2):
            return share * width, gap if wall == 0 else length - gap, 0.0 if wall == 0 else math.pi
        return gap if wall == 1 else width - gap, share * length, -math.pi / 2 if wall == 1 else math.pi / 2


def random_room(rng: Random, intrinsics: Intrinsics, height: int, width: int) -> Scene:
    """A room with furniture along its walls and in its middle, seen by a camera held at 1 to 1.7 m."""
    size = _size(rng)
    camera = _camera(rng, size, intrinsics, height, width)
    plan = _Plan(size, camera.position)
    lights = _openings(rng, plan)
    _furnish(rng, plan)
    shell = _shell(rng, size)
    lights.append(_ceiling_lamp(rng, plan))
    flash = rng.uniform(*FLASH)
    lights.append(Light(camera.position, (flash, flash, flash), FLASH_REACH, casts_shadow=False))
    warm = rng.uniform(0.85, 1.0)
    sky = rng.uniform(0.06, 0.11)
    return Scene(
        camera=camera,
        solids=(shell, *plan.solids, *_skirting(rng, size)),
        lights=tuple(lights),
        ambient=((sky, sky * 0.98, sky * 0.95), (sky * 0.7, sky * 0.66, sky * 0.6)),
        exposure=EXPOSURE * rng.uniform(0.9, 1.1),
        metering=METERING,
        tint=(1.0, (1 + warm) / 2, warm),
    )


def _size(rng: Random) -> Vector:
    while True:
        size = (rng.uniform(2.5, 7.0), rng.uniform(2.5, 9.0), rng.uniform(2.3, 3.1))
        if math.hypot(*size) < LONGEST:
            return size if rng.random() < 0.5 else (size[1], size[0], size[2])


def _camera(rng: Random, size: Vector, intrinsics: Intrinsics, height: int, width: int) -> Camera:
    """Somewhere near the edge of the room more often than not, looking towards its middle."""
    margin = 0.35
    across, along = (rng.uniform(margin, side - margin) for side in size[:2])
    if rng.random() < 0.75:
        if rng.random() < 0.5:
            across = float(rng.choice([margin, size[0] - margin]))
        else:
            along = float(rng.choice([margin, size[1] - margin]))
    aim = [side * rng.uniform(0.25, 0.75) for side in size[:2]]
    while math.hypot(aim[0] - across, aim[1] - along) < 0.8:
        aim = [side * rng.uniform(0.15, 0.85) for side in size[:2]]
    yaw = math.atan2(-(aim[0] - across), aim[1] - along)
    pitch, roll = rng.uniform(-0.38, 0.04), rng.normal(0, 0.02)
    return Camera((across, along, rng.uniform(1.0, 1.7)), yaw, pitch, roll, intrinsics, height, width)


def _floor(rng: Random) -> Material:
    kind = rng.choice(6, p=(0.2, 0.2, 0.18, 0.12, 0.18, 0.12))
    if kind <= 1:
        wooden = wood(rng)
        joint = scaled(wooden.colour, 0.35)
        size = (rng.uniform(0.8, 1.6), rng.uniform(0.09, 0.16))
        return replace(wooden, pattern="bond", second=joint, size=size, gap=(0.004, 0.03), shift=0.37, tone=0.5)
    if kind == 2:
        side = rng.uniform(0.25, 0.6)
        return Material(pick(rng, PAINTS), "bond", (0.2, 0.2, 0.2), (side, side), (0.02, 0.02), tone=0.12, phase=phase(rng))
    if kind == 3:
        side = rng.uniform(0.25, 0.5)
        return Material(pick(rng, PAINTS), "checker", pick(rng, (*CLOTHS, (0.1, 0.1, 0.1))), (side, side), phase=phase(rng))
    if kind == 4:
        return Material(pick(rng, CLOTHS), grain=0.14, fibre=(0.35, 0.35), phase=phase(rng))
    return Material((0.38, 0.37, 0.35), grain=0.12, fibre=(2.5, 2.5), phase=phase(rng))


def _walls(rng: Random) -> Material:
    kind, paint = rng.random(), pick(rng, PAINTS)
    if kind < 0.1:
        mortar = (0.55, 0.52, 0.48)
        brick = pick(rng, ((0.4, 0.16, 0.09), (0.62, 0.6, 0.56)))
        return Material(brick, "bond", mortar, (0.26, 0.085), (0.05, 0.14), shift=0.5, tone=0.5, grain=0.1, phase=phase(rng))
    if kind < 0.22:
        second = scaled(paint, rng.uniform(0.72, 0.88))
        return Material(paint, "stripes", second, (rng.uniform(0.12, 0.4), 1.0), (0.5, 0.0), grain=0.02)
    if kind < 0.3:
        return Material(WHITE, "bond", (0.45, 0.45, 0.45), (0.2, 0.2), (0.03, 0.03), tone=0.06, phase=phase(rng))
    return Material(paint, grain=0.035, fibre=(2.5, 2.5), phase=phase(rng))


def _shell(rng: Random, size: Vector) -> Solid:
    half = (size[0] / 2, size[1] / 2, size[2] / 2)
    ceiling = Material((0.8, 0.79, 0.77), grain=0.015)
    if rng.random() < 0.15:
        ceiling = replace(ceiling, pattern="bond", second=(0.45, 0.45, 0.45), size=(0.6, 0.6), gap=(0.025, 0.025))
    return Solid("shell", half, half, _walls(rng), top=ceiling, bottom=_floor(rng), casts_shadow=False)


def _skirting(rng: Random, size: Vector) -> list[Solid]:
    board = Material(WHITE, grain=0.01) if rng.random() < 0.6 else wood(rng)
    width, length, tall = size[0], size[1], (0.0, rng.uniform(0.06, 0.12))
    spans = [
        ((0.0, width), (0.0, 0.015)),
        ((0.0, width), (length - 0.015, length)),
        ((0.0, 0.015), (0.0, length)),
        ((width - 0.015, width), (0.0, length)),
    ]
    return [block(x, y, tall, board, casts_shadow=False) for x, y in spans]


def _openings(rng: Random, plan: _Plan) -> list[Light]:
    """Windows (which light the room), a door, pictures: on different walls or different parts of them."""
    lights: list[Light] = []
    windows = int(rng.integers(1, 3))
    door = int(rng.integers(WALLS))
    for wall in range(WALLS):
        span = plan.size[0] if wall in (0, 2) else plan.size[1]
        shares = [rng.uniform(0.2, 0.35), rng.uniform(0.62, 0.8)] if span > 3.2 else [rng.uniform(0.4, 0.6)]
        for share in shares:
            if wall == door and share == shares[0]:
                _door(rng, plan, wall, share)
            elif windows and rng.random() < 0.45:
                windows -= 1
                lights.append(_window(rng, plan, wall, share))
            elif rng.random() < 0.65:
                _picture(rng, plan, wall, share)
    return lights


def _hang(plan: _Plan, piece: Piece, wall: int, share: float, z: float) -> tuple[float, float, float]:
    x, y, yaw = plan.at_wall(wall, share)
    plan.solids += place(piece, x, y, yaw, z)
    return x, y, yaw


def _door(rng: Random, plan: _Plan, wall: int, share: float) -> None:
    leaf = wood(rng) if rng.random() < 0.6 else Material(WHITE, grain=0.02)
    dark = scaled(leaf.colour, 0.6)
    panels = replace(leaf, pattern="panes", colour=leaf.colour, second=dark, size=(0.425, 1.0), gap=(0.62, 0.75))
    frame = Material(WHITE, grain=0.01)
    solids = (
        block((-0.5, 0.5), (-0.01, 0.03), (0, 2.08), frame, casts_shadow=False),
        block((-0.425, 0.425), (0.0, 0.045), (0.01, 2.0), leaf, front=panels, casts_shadow=False),
        ball((0.34, 0.075, 1.02), (0.03, 0.03, 0.03), Material(DARK)),
    )
    x, y, _ = _hang(plan, Piece(solids, 1.0, 0.1), wall, share, 0.0)
    reach = 0.6
    plan.taken.append((x - reach, y - reach, x + reach, y + reach))


def _window(rng: Random, plan: _Plan, wall: int, share: float) -> Light:
    half, low, high = rng.uniform(0.45, 0.9), rng.uniform(0.75, 1.0), rng.uniform(1.9, 2.15)
    bright = rng.uniform(1.2, 3.0)
    columns = 1 if half < 0.6 else 2
    cell = (2 * half / columns, (high - low) / int(rng.integers(1, 3)))
    glass = Material((0.6, 0.72, 0.86), "art", (0.86, 0.9, 0.95), (1.6, 1.1), grain=0.0, glow=bright, phase=phase(rng))
    frame = Material(WHITE, grain=0.0)
    bars = [
        block((x - 0.025, x + 0.025), (0, 0.05), (low, high), frame, casts_shadow=False) for x in _steps(-half, half, cell[0])
    ]
    bars += [
        block((-half, half), (0, 0.045), (z - 0.025, z + 0.025), frame, casts_shadow=False) for z in _steps(low, high, cell[1])
    ]
    sill = block((-half - 0.06, half + 0.06), (0, 0.16), (low - 0.05, low - 0.02), frame, casts_shadow=False)
    solids = [block((-half, half), (-0.01, 0.012), (low, high), glass, casts_shadow=False), *bars, sill]
    if rng.random() < 0.5:
        colour_of = pick(rng, CLOTHS)
        curtain = Material(colour_of, "stripes", scaled(colour_of, 0.7), (0.11, 1.0), (0.3, 0.0), grain=0.06)
        for side in (-1, 1):
            edges = sorted((side * (half - 0.08), side * (half + 0.25)))
            solids.append(block((edges[0], edges[1]), (0.05, 0.12), (0.15, high + 0.12), curtain))
    x, y, yaw = _hang(plan, Piece(tuple(solids), 2 * half, 0.2), wall, share, 0.0)
    inwards = (-math.sin(yaw) * 0.3, math.cos(yaw) * 0.3)
    strength = bright * 0.15
    colour = (strength * 0.92, strength * 0.98, strength * 1.05)
    return Light((x + inwards[0], y + inwards[1], (low + high) / 2), colour, reach=1.3, casts_shadow=False)


def _steps(low: float, high: float, step: float) -> list[float]:
    return [low + step * count for count in range(round((high - low) / step) + 1)]


def _picture(rng: Random, plan: _Plan, wall: int, share: float) -> None:
    half, tall = rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.7)
    art = Material(pick(rng, CLOTHS), "art", pick(rng, (*PAINTS, *CLOTHS)), (half * 2, tall), grain=0.05, phase=phase(rng))
    frame = Material(DARK) if rng.random() < 0.5 else wood(rng)
    solids = (
        block((-half - 0.04, half + 0.04), (-0.01, 0.03), (-0.04, tall + 0.04), frame),
        block((-half, half), (0.0, 0.035), (0, tall), art, casts_shadow=False),
    )
    _hang(plan, Piece(solids, 2 * half, 0.03), wall, share, rng.uniform(1.25, 1.5))


def _furnish(rng: Random, plan: _Plan) -> None:
    area = plan.size[0] * plan.size[1]
    for _ in range(int(10 + area * 0.6)):
        piece = AT_WALLS[int(rng.integers(len(AT_WALLS)))](rng)
        wall, share = int(rng.integers(WALLS)), rng.uniform(0.08, 0.92)
        x, y, yaw = plan.at_wall(wall, share)
        plan.add(piece, x, y, yaw)
        if len(plan.taken) > 3 + area / 6:
            break
    if area > 14 and rng.random() < 0.7:
        _rug(rng, plan)
    for _ in range(int(rng.integers(4, 7 + int(area / 3)))):
        piece = ANYWHERE[int(rng.integers(len(ANYWHERE)))](rng)
        plan.add(piece, rng.uniform(0.3, plan.size[0] - 0.3), rng.uniform(0.3, plan.size[1] - 0.3), rng.uniform(0, 2 * math.pi))


def _rug(rng: Random, plan: _Plan) -> None:
    half = (plan.size[0] * rng.uniform(0.15, 0.3), plan.size[1] * rng.uniform(0.15, 0.3))
    x, y = plan.size[0] * rng.uniform(0.4, 0.6), plan.size[1] * rng.uniform(0.4, 0.6)
    colour, second = pick(rng, CLOTHS), pick(rng, CLOTHS)
    patterns: tuple[Pattern, ...] = ("checker", "stripes", "art")
    pattern, size = patterns[int(rng.integers(len(patterns)))], (rng.uniform(0.1, 0.3), 0.3)
    wool = Material(colour, pattern, second, size, (0.4, 0.0), grain=0.12, fibre=(0.3, 0.3), phase=phase(rng))
    plan.solids.append(block((x - half[0], x + half[0]), (y - half[1], y + half[1]), (0, 0.012), wool, casts_shadow=False))


def _ceiling_lamp(rng: Random, plan: _Plan) -> Light:
    width, length, height = plan.size
    x, y = width * rng.uniform(0.35, 0.65), length * rng.uniform(0.35, 0.65)
    bulb = Material((0.95, 0.9, 0.8), grain=0.0, glow=rng.uniform(1.5, 3.5))
    if rng.random() < 0.5:
        z = height - rng.uniform(0.06, 0.1)
        plan.solids.append(replace(pillar(x, y, (z, height), rng.uniform(0.14, 0.24), bulb), casts_shadow=False))
    else:
        z, radius = height - rng.uniform(0.3, 0.6), rng.uniform(0.1, 0.18)
        plan.solids.append(replace(pillar(x, y, (z, height), 0.008, Material(DARK)), casts_shadow=False))
        plan.solids.append(replace(ball((x, y, z), (radius, radius, radius), bulb), casts_shadow=False))
    power = rng.uniform(0.15, 0.4)
    return Light((x, y, z - 0.2), (power, power * 0.92, power * 0.78), reach=2.2)
