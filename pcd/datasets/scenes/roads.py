"""Random streets and country roads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from pcd.datasets.base import Intrinsics
from pcd.datasets.scenes.furniture import Piece, Random, ball, block, phase, pick, place
from pcd.datasets.scenes.materials import Colour, Material
from pcd.datasets.scenes.raycast import Camera, Solid
from pcd.datasets.scenes.roadside import FOLIAGE, car, facade, hedge, house, person, sign, street_lamp, tree, van
from pcd.datasets.scenes.scene import Light, Scene, Sky

Style = Literal["town", "suburb", "country"]
STYLES: tuple[Style, ...] = ("town", "suburb", "country")
SHARES = (0.45, 0.35, 0.2)
FAR = 110.0
"""Metres ahead up to which a road is lined; what lies beyond is hills in the haze."""
FINE = 35.0
"""Metres up to which things have small parts."""
BEHIND = -12.0
GRASS: tuple[Colour, ...] = ((0.11, 0.2, 0.05), (0.17, 0.22, 0.07), (0.24, 0.22, 0.1))


@dataclass(frozen=True)
class _Street:
    """Cross-section: carriageway `[-half, half]` of `lanes` lanes, parked cars inside it, a pavement `[half, half + walk]`."""

    style: Style
    lane: float
    lanes: int
    parking: float
    walk: float

    @property
    def half(self) -> float:
        return self.lane * self.lanes / 2 + self.parking

    @property
    def edge(self) -> float:
        return self.half + self.walk


def random_road(rng: Random, intrinsics: Intrinsics, height: int, width: int) -> Scene:
    """A straight road in a town, a suburb or the country, seen from a car's roof in its right-hand lane."""
    street = _street(rng)
    solids = _ground(rng, street)
    for side in (-1, 1):
        solids += _lining(rng, street, side)
    solids += _traffic(rng, street)
    if street.style != "town":
        solids += _hills(rng)
    camera = _camera(rng, street, intrinsics, height, width)
    sun, ambient, sky = _weather(rng)
    warm = rng.uniform(0.9, 1.0)
    tint = (1.0, (1 + warm) / 2, warm)
    solids = [replace(solid, casts_shadow=False) if _slight(solid) else solid for solid in solids]
    return Scene(camera, tuple(solids), sun, ambient, sky, exposure=rng.uniform(0.22, 0.34), tint=tint)


def _slight(solid: Solid) -> bool:
    """Whether a shadow would be too small, or too far behind, to be seen."""
    away = solid.centre[1]
    return max(solid.half) < away / 30 or away < -30


def _street(rng: Random) -> _Street:
    style = STYLES[int(rng.choice(len(STYLES), p=SHARES))]
    lanes = 4 if rng.random() < 0.25 else 2
    parking = 2.2 if style != "country" and rng.random() < 0.65 else 0.0
    walk = {"town": rng.uniform(2.0, 4.5), "suburb": rng.uniform(1.5, 2.5), "country": 0.0}[style]
    return _Street(style, rng.uniform(2.9, 3.7), lanes, parking, walk)


def _camera(rng: Random, street: _Street, intrinsics: Intrinsics, height: int, width: int) -> Camera:
    lane = street.lane * (0.5 + int(rng.integers(street.lanes // 2)))
    position = (lane + rng.normal(0, 0.25), 0.0, rng.uniform(1.35, 2.0))
    yaw = rng.normal(0, 0.06) if rng.random() < 0.75 else rng.uniform(-0.6, 0.6)
    return Camera(position, yaw, rng.uniform(-0.1, 0.01), rng.normal(0, 0.012), intrinsics, height, width)


def _weather(rng: Random) -> tuple[tuple[Light, ...], tuple[Colour, Colour], Sky]:
    """The sun (or none, when overcast), light from sky and ground, and the sky itself."""
    overcast = rng.random() < 0.3
    height, turn = rng.uniform(0.35, 1.1), rng.uniform(0, 2 * math.pi)
    direction = (math.cos(height) * math.cos(turn), math.cos(height) * math.sin(turn), math.sin(height))
    low = 1 - min((height - 0.35) / 0.4, 1.0)
    blue, haze = rng.uniform(0.75, 1.0), rng.uniform(180, 600)
    if overcast:
        grey = rng.uniform(0.75, 1.0)
        sky = Sky((grey, grey, grey), (0.7 * grey, 0.73 * grey, 0.78 * grey), 0.7, rng.uniform(70, 200), rng.uniform(0, 9))
        return (), ((0.9, 0.92, 0.95), (0.35, 0.35, 0.34)), sky
    horizon: Colour = (0.6 + 0.2 * low, 0.72, 0.86 - 0.2 * low)
    sky = Sky(horizon, (0.14 * blue, 0.3 * blue, 0.72 * blue), rng.uniform(0.05, 0.5), haze, rng.uniform(0, 9))
    power = rng.uniform(1.3, 2.4)
    sun = Light(direction, (power, power * (0.95 - 0.2 * low), power * (0.88 - 0.4 * low)))
    return (sun,), ((0.36, 0.43, 0.55), (0.2, 0.19, 0.17)), sky


def _ground(rng: Random, street: _Street) -> list[Solid]:
    """Grass or paving up to the horizon, the carriageway at z = 0 with its lines, kerbs and pavements."""
    span, half = (-50.0, 600.0), street.half
    grey = rng.uniform(0.09, 0.2)
    asphalt = Material((grey, grey, grey * 1.03), grain=0.1, fibre=(3.0, 9.0), phase=phase(rng))
    dash = rng.uniform(5.0, 12.0)
    lines = (street.lane, dash)
    lane = Material(
        asphalt.colour, "road", (0.75, 0.75, 0.7), lines, (0.13, 0.0), tone=street.lanes, grain=0.1, fibre=(3.0, 9.0)
    )
    inner = street.lane * street.lanes / 2
    if street.style == "town":
        field = Material((0.25, 0.24, 0.23), grain=0.1, fibre=(5.0, 5.0))
    else:
        field = Material(pick(rng, GRASS), grain=0.28, fibre=(7.0, 7.0), phase=phase(rng))
    solids = [block((-600, 600), (-600, 600), (-2.04, -0.04), field, casts_shadow=False)]
    if street.parking:
        solids += [
            block((min(a, b), max(a, b)), span, (-1, 0), asphalt, casts_shadow=False)
            for a, b in ((-half, -inner), (inner, half))
        ]
    solids.append(block((-inner, inner), span, (-1, 0), lane, casts_shadow=False))
    solids += _pavements(rng, street, span)
    if street.style != "country" and rng.random() < 0.35:
        at = rng.uniform(7, 30)
        bars = Material((0.72, 0.72, 0.7), "stripes", asphalt.colour, (1.0, 1.0), (0.5, 0.0), grain=0.12)
        solids.append(block((-half + 0.1, half - 0.1), (at, at + 3.2), (0.0, 0.004), bars, casts_shadow=False))
    return solids


def _pavements(rng: Random, street: _Street, span: tuple[float, float]) -> list[Solid]:
    if not street.walk:
        shoulder = Material((0.3, 0.27, 0.22), grain=0.3, fibre=(2.0, 2.0))
        edges = ((-street.half - 0.8, -street.half), (street.half, street.half + 0.8))
        return [block(x, span, (-1, -0.01), shoulder, casts_shadow=False) for x in edges]
    slab, size = rng.uniform(0.28, 0.45), rng.uniform(0.4, 1.0)
    paving = Material(
        (slab, slab * 0.98, slab * 0.94), "bond", (0.12, 0.12, 0.12), (size, size), (0.03, 0.03), shift=0.5, tone=0.15
    )
    kerb = Material((0.42, 0.42, 0.41), "bond", (0.15, 0.15, 0.15), (9.0, 1.0), (0.0, 0.03))
    solids = []
    for side in (-1, 1):
        inner, middle, outer = side * street.half, side * (street.half + 0.15), side * street.edge
        solids.append(block((min(inner, middle), max(inner, middle)), span, (-1, 0.13), kerb, casts_shadow=False))
        solids.append(block((min(middle, outer), max(middle, outer)), span, (-1, 0.125), paving, casts_shadow=False))
    return solids


def _beside(piece: Piece, side: int, x: float, y: float, z: float = 0.0) -> list[Solid]:
    """A piece beside the road whose front (+y in its own frame) faces the road; `x` is where its front stands."""
    yaw = math.pi / 2 if side > 0 else -math.pi / 2
    return place(piece, side * (x + piece.depth), y, yaw, z)


def _lining(rng: Random, street: _Street, side: int) -> list[Solid]:
    """Everything on one side of the road."""
    if street.style == "town":
        solids = _town(rng, street, side)
    elif street.style == "suburb":
        solids = _suburb(rng, street, side)
    else:
        solids = _country(rng, street, side)
    y, z = rng.uniform(4, 20), 0.12 if street.walk else 0.0
    while y < 90 and rng.random() < 0.9:
        if rng.random() < 0.25:
            solids += place(sign(rng), side * (street.half + 0.45), y, math.pi + rng.normal(0, 0.15), z)
        else:
            solids += place(street_lamp(rng), side * (street.half + 0.5), y, math.pi if side > 0 else 0.0, z)
        y += rng.uniform(14, 32)
    if street.walk:
        for _ in range(int(rng.integers(0, 4))):
            x = side * rng.uniform(street.half + 0.5, street.edge - 0.4)
            solids += place(person(rng), x, rng.uniform(5, 40), rng.uniform(0, 6.3), 0.12)
    return solids


def _town(rng: Random, street: _Street, side: int) -> list[Solid]:
    solids: list[Solid] = []
    y, usual = BEHIND, int(rng.integers(2, 7))
    while y < FAR:
        width = rng.uniform(7, 20)
        floors = max(int(usual + rng.integers(-1, 3)), 1)
        if rng.random() < 0.88:
            building = facade(rng, width, rng.uniform(9, 14), floors)
            solids += _beside(building, side, street.edge + rng.uniform(0, 0.5), y + width / 2)
        y += width + (rng.uniform(4, 9) if rng.random() < 0.12 else 0.0)
    if street.walk > 2.6 and rng.random() < 0.6:
        solids += _trees(rng, side * (street.half + 0.9), rng.uniform(8, 15), 0.12)
    return solids


def _trees(rng: Random, x: float, step: float, z: float) -> list[Solid]:
    solids: list[Solid] = []
    y = rng.uniform(3, 12)
    while y < 85:
        solids += place(tree(rng, y < FINE), x, y, 0.0, z)
        y += step * rng.uniform(0.8, 1.4)
    return solids


def _suburb(rng: Random, street: _Street, side: int) -> list[Solid]:
    solids: list[Solid] = []
    y, garden = BEHIND, rng.uniform(3, 8)
    while y < FAR:
        home = house(rng)
        gap = rng.uniform(2, 8)
        if rng.random() < 0.85:
            solids += _beside(home, side, street.edge + garden + rng.uniform(0, 3), y + home.width / 2)
        if rng.random() < 0.7:
            solids += place(hedge(rng, home.width), side * (street.edge + 0.3), y, 0.0)
        if rng.random() < 0.6:
            where = side * (street.edge + rng.uniform(1.2, garden + 1))
            solids += place(tree(rng, y < FINE), where, y + home.width + gap / 2, rng.uniform(0, 6.3))
        y += home.width + gap
    return solids


def _country(rng: Random, street: _Street, side: int) -> list[Solid]:
    solids: list[Solid] = []
    for _ in range(int(rng.integers(4, 16))):
        away = street.half + rng.uniform(2.5, 30)
        solids += place(tree(rng, away < 10), side * away, rng.uniform(5, FAR), rng.uniform(0, 6.3))
    if rng.random() < 0.4:
        solids += _rail(side * (street.half + 0.9))
    if rng.random() < 0.4:
        solids += _trees(rng, side * (street.half + rng.uniform(2.5, 5)), rng.uniform(9, 18), 0.0)
    if rng.random() < 0.5:
        home = house(rng)
        solids += _beside(home, side, street.half + rng.uniform(8, 25), rng.uniform(15, 70))
    if rng.random() < 0.5:
        solids += place(hedge(rng, 90), side * (street.half + rng.uniform(2, 7)), rng.uniform(-5, 30), 0.0)
    return solids


def _rail(x: float) -> list[Solid]:
    metal = Material((0.5, 0.51, 0.52), grain=0.08, fibre=(4.0, 4.0))
    posts = [block((x - 0.06, x + 0.06), (y - 0.05, y + 0.05), (-0.1, 0.7), metal) for y in range(2, 50, 4)]
    return [block((x - 0.04, x + 0.04), (BEHIND, FAR), (0.45, 0.75), metal), *posts]


def _hills(rng: Random) -> list[Solid]:
    solids = []
    for _ in range(int(rng.integers(2, 6))):
        green = Material(pick(rng, FOLIAGE), grain=0.3, fibre=(60.0, 30.0), phase=phase(rng))
        at = (rng.uniform(-260, 260), rng.uniform(260, 420), -8.0)
        size = (rng.uniform(60, 160), rng.uniform(40, 90), rng.uniform(16, 50))
        solids.append(ball(at, size, green))
    return [Solid(s.shape, s.centre, s.half, s.material, casts_shadow=False) for s in solids]


def _traffic(rng: Random, street: _Street) -> list[Solid]:
    """Parked cars on both sides, oncoming ones on the left, others ahead on the right."""
    solids: list[Solid] = []
    for side in (-1, 1):
        y = rng.uniform(-2, 9)
        while street.parking and y < 70:
            if rng.random() < 0.7:
                solids += _drive(rng, car(rng, y < FINE), side * (street.half - 1.15), y, side)
            y += rng.uniform(5.3, 7.5)
    for lane in range(street.lanes):
        x = street.lane * (lane + 0.5 - street.lanes / 2)
        ahead = 1 if x > 0 else -1
        y = rng.uniform(7, 45)
        while y < 80:
            vehicle = van(rng) if rng.random() < 0.15 else car(rng, y < FINE)
            if rng.random() < 0.75:
                solids += _drive(rng, vehicle, x + rng.normal(0, 0.15), y, ahead)
            y += rng.uniform(12, 45)
    return solids


def _drive(rng: Random, vehicle: Piece, x: float, y: float, ahead: int) -> list[Solid]:
    """A vehicle between `y` and `y + depth`, facing away from the camera or towards it."""
    wobble = rng.normal(0, 0.015)
    return place(vehicle, x, y if ahead > 0 else y + vehicle.depth, wobble if ahead > 0 else math.pi + wobble)
