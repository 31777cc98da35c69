"""Things that stand in rooms. Each is a `Piece` in its own frame: x to the right, y from its back (0) to its front, z up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pcd.datasets.scenes.materials import Colour, Material, scaled
from pcd.datasets.scenes.raycast import Solid, Vector

Random = np.random.Generator
Limits = tuple[float, float]

WOODS: tuple[Colour, ...] = ((0.36, 0.2, 0.09), (0.5, 0.33, 0.17), (0.2, 0.1, 0.05), (0.62, 0.47, 0.29), (0.7, 0.66, 0.6))
CLOTHS: tuple[Colour, ...] = (
    (0.12, 0.16, 0.3),
    (0.35, 0.08, 0.07),
    (0.3, 0.3, 0.3),
    (0.1, 0.24, 0.2),
    (0.5, 0.42, 0.3),
    (0.55, 0.34, 0.06),
    (0.06, 0.06, 0.07),
    (0.3, 0.14, 0.28),
)
DARK: Colour = (0.03, 0.03, 0.035)
WHITE: Colour = (0.78, 0.77, 0.74)
GREEN: Colour = (0.06, 0.2, 0.04)


@dataclass(frozen=True)
class Piece:
    """Solids in a frame of their own and the floor they cover: x in `[-width / 2, width / 2]`, y in `[0, depth]`."""

    solids: tuple[Solid, ...]
    width: float
    depth: float


def place(piece: Piece, x: float, y: float, yaw: float, z: float = 0.0) -> list[Solid]:
    """The solids of a piece whose back centre is put at `(x, y, z)` and turned by `yaw`."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    moved = []
    for solid in piece.solids:
        a, b, c = solid.centre
        moved.append(replace(solid, centre=(x + a * cos - b * sin, y + a * sin + b * cos, z + c), yaw=solid.yaw + yaw))
    return moved


def block(
    x: Limits,
    y: Limits,
    z: Limits,
    material: Material,
    *,
    front: Material | None = None,
    top: Material | None = None,
    yaw: float = 0.0,
    taper: float = 1.0,
    casts_shadow: bool = True,
) -> Solid:
    """A box between the given limits."""
    centre, half = (
        ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2, (z[0] + z[1]) / 2),
        ((x[1] - x[0]) / 2, (y[1] - y[0]) / 2, (z[1] - z[0]) / 2),
    )
    return Solid("box", centre, half, material, yaw, taper, top=top, front=front, casts_shadow=casts_shadow)


def pillar(x: float, y: float, z: tuple[float, float], radius: float, material: Material) -> Solid:
    """An upright cylinder."""
    return Solid("pillar", (x, y, (z[0] + z[1]) / 2), (radius, radius, (z[1] - z[0]) / 2), material)


def ball(centre: Vector, half: Vector, material: Material) -> Solid:
    """An ellipsoid."""
    return Solid("ball", centre, half, material)


def pick(rng: Random, colours: tuple[Colour, ...]) -> Colour:
    """One of the colours, a little lighter or darker."""
    return scaled(colours[int(rng.integers(len(colours)))], rng.uniform(0.75, 1.2))


def phase(rng: Random) -> int:
    """A random start for a pattern."""
    return int(rng.integers(4096))


def wood(rng: Random) -> Material:
    """Veneer with its fibre along the surface's first axis."""
    return Material(pick(rng, WOODS), grain=0.16, fibre=(2.2, 0.25), phase=phase(rng))


def cloth(rng: Random) -> Material:
    """Plain, striped or checked fabric."""
    colour, second = pick(rng, CLOTHS), pick(rng, CLOTHS)
    style = rng.random()
    if style < 0.15:
        return Material(colour, "stripes", second, (rng.uniform(0.05, 0.15), 1.0), (0.4, 0), grain=0.08, fibre=(0.4, 0.4))
    if style < 0.25:
        return Material(colour, "checker", second, (0.09, 0.09), grain=0.08, fibre=(0.4, 0.4))
    return Material(colour, grain=0.1, fibre=(0.5, 0.5), phase=phase(rng))


def _legs(width: float, depth: float, height: float, thick: float, material: Material) -> list[Solid]:
    return [
        block((x, x + thick), (y, y + thick), (0, height), material)
        for x in (-width / 2, width / 2 - thick)
        for y in (0.0, depth - thick)
    ]


def table(rng: Random) -> Piece:
    """A dining table or desk, with a few things on it."""
    width, depth, height = rng.uniform(0.9, 1.8), rng.uniform(0.6, 0.95), rng.uniform(0.7, 0.77)
    top = wood(rng)
    frame = top if rng.random() < 0.6 else Material(DARK)
    solids = [block((-width / 2, width / 2), (0, depth), (height - 0.04, height), top)]
    solids += _legs(width, depth, height - 0.04, rng.uniform(0.04, 0.07), frame)
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(-width / 2 + 0.2, width / 2 - 0.2), rng.uniform(0.15, depth - 0.15)
        solids += place(thing(rng), x, y, rng.uniform(0, 6.3), height)
    return Piece(tuple(solids), width, depth)


def thing(rng: Random) -> Piece:
    """Something small: a vase, a box, a bowl, a pile of books or a screen."""
    colour = Material(pick(rng, CLOTHS), grain=0.05)
    kind = rng.integers(5)
    if kind == 0:
        solids = [pillar(0, 0, (0, 0.2), 0.06, colour), ball((0, 0, 0.34), (0.13, 0.13, 0.16), _leaves(rng))]
    elif kind == 1:
        size = rng.uniform(0.08, 0.18)
        solids = [block((-size, size), (-size * 0.7, size * 0.7), (0, size * 1.2), colour)]
    elif kind == 2:
        solids = [ball((0, 0, 0.08), (0.13, 0.13, 0.08), colour)]
    elif kind == 3:
        solids = [
            block(
                (-0.13, 0.13),
                (-0.1, 0.1),
                (step * 0.035, step * 0.035 + 0.034),
                Material(pick(rng, CLOTHS)),
                yaw=rng.uniform(-0.3, 0.3),
            )
            for step in range(int(rng.integers(2, 5)))
        ]
    else:
        screen = Material((0.05, 0.1, 0.16), "art", (0.3, 0.4, 0.5), (0.5, 0.4), glow=0.7, phase=phase(rng))
        solids = [
            block((-0.12, 0.12), (-0.09, 0.09), (0, 0.02), Material(DARK)),
            block((-0.03, 0.03), (-0.03, 0.0), (0.02, 0.15), Material(DARK)),
            block((-0.3, 0.3), (-0.02, 0.02), (0.12, 0.47), Material(DARK), front=screen),
        ]
    return Piece(tuple(solids), 0.3, 0.3)


def _leaves(rng: Random) -> Material:
    return Material(pick(rng, (GREEN, (0.13, 0.24, 0.05), (0.05, 0.14, 0.08))), grain=0.45, fibre=(0.5, 0.5), phase=phase(rng))


def chair(rng: Random) -> Piece:
    """A chair with a back."""
    frame, seat = wood(rng), cloth(rng)
    width = rng.uniform(0.42, 0.5)
    solids = [
        block((-width / 2, width / 2), (0.03, 0.47), (0.43, 0.48), seat),
        block((-width / 2, width / 2), (0, 0.04), (0.6, rng.uniform(0.85, 1.0)), seat if rng.random() < 0.5 else frame),
        block((-width / 2, -width / 2 + 0.04), (0, 0.04), (0.43, 0.8), frame),
        block((width / 2 - 0.04, width / 2), (0, 0.04), (0.43, 0.8), frame),
    ]
    return Piece((*solids, *_legs(width, 0.46, 0.43, 0.04, frame)), width, 0.48)


def shelf(rng: Random) -> Piece:
    """An open bookcase: boards, sides and rows of books of different heights."""
    width, depth, height = rng.uniform(0.7, 1.4), rng.uniform(0.26, 0.36), rng.uniform(1.1, 2.1)
    body = wood(rng)
    boards = int(height / 0.36) + 1
    solids = [block((-width / 2, width / 2), (0, 0.02), (0, height), body)]
    solids += [block((x, x + 0.03), (0, depth), (0, height), body) for x in (-width / 2, width / 2 - 0.03)]
    for board in range(boards):
        z = 0.06 + board * (height - 0.1) / (boards - 1)
        solids.append(block((-width / 2 + 0.03, width / 2 - 0.03), (0, depth - 0.005), (z, z + 0.03), body))
        if board < boards - 1 and rng.random() < 0.85:
            end = rng.uniform(-0.1, width / 2 - 0.04)
            tall = (height - 0.1) / (boards - 1) * 0.82
            books = Material((0.3, 0.3, 0.3), "books", DARK, (rng.uniform(0.025, 0.045), tall), phase=phase(rng))
            x, y, paper = (-width / 2 + 0.04, end), (0.03, depth - 0.06), Material(WHITE)
            solids.append(block(x, y, (z + 0.03, z + 0.03 + tall), books, top=paper, casts_shadow=False))
    return Piece(tuple(solids), width, depth)


def cabinet(rng: Random) -> Piece:
    """A wardrobe, dresser or sideboard: a box whose front is doors or drawers."""
    width = rng.uniform(0.7, 1.9)
    low = rng.random() < 0.55
    height, depth = (rng.uniform(0.6, 1.0), rng.uniform(0.38, 0.5)) if low else (rng.uniform(1.6, 2.1), rng.uniform(0.45, 0.62))
    body = wood(rng) if rng.random() < 0.7 else Material(WHITE, grain=0.02)
    cell = (width / int(rng.integers(2, 4)), (height - 0.06) / (int(rng.integers(2, 4)) if low else 1))
    gap = (1 - 0.03 / cell[0], 1 - 0.03 / cell[1])
    colours = scaled(body.colour, 0.35), scaled(body.colour, 1.12)
    doors = replace(body, pattern="panes", colour=colours[0], second=colours[1], size=cell, gap=gap, tone=0.1)
    knob = Material(DARK if rng.random() < 0.5 else WHITE)
    solids = [
        block((-width / 2 + 0.03, width / 2 - 0.03), (0.02, depth - 0.04), (0, 0.07), Material(DARK)),
        block((-width / 2, width / 2), (0, depth), (0.06, height), body, front=doors),
    ]
    solids += [
        block((x - 0.04, x + 0.04), (depth, depth + 0.025), (z - 0.01, z + 0.01), knob, casts_shadow=False)
        for x in (np.arange(-width / 2, width / 2 - 0.1, cell[0]) + cell[0] / 2).tolist()
        for z in [height * 0.55 if not low else 0.06 + cell[1] * 0.75]
    ]
    if low and rng.random() < 0.8:
        solids += place(thing(rng), rng.uniform(-width / 3, width / 3), depth / 2, 0.0, height)
    return Piece(tuple(solids), width, depth)


def sofa(rng: Random) -> Piece:
    """A sofa or an armchair with cushions."""
    seats = int(rng.integers(1, 4))
    width, fabric = 0.4 + 0.65 * seats, cloth(rng)
    cushion = replace(fabric, colour=pick(rng, CLOTHS)) if rng.random() < 0.4 else fabric
    edge = width / 2
    solids = [
        block((-edge, edge), (0.0, 0.85), (0.08, 0.3), fabric),
        block((-edge, edge), (0, 0.22), (0.3, 0.82), fabric),
        block((-edge, -edge + 0.18), (0, 0.85), (0.3, 0.6), fabric),
        block((edge - 0.18, edge), (0, 0.85), (0.3, 0.6), fabric),
    ]
    for seat in range(seats):
        left = -edge + 0.2 + seat * 0.65
        solids.append(block((left + 0.01, left + 0.63), (0.22, 0.88), (0.3, 0.45), cushion))
    if rng.random() < 0.6:
        solids.append(ball((rng.uniform(-edge + 0.4, edge - 0.4), 0.33, 0.62), (0.24, 0.1, 0.2), cloth(rng)))
    return Piece(tuple(solids), width, 0.88)


def bed(rng: Random) -> Piece:
    """A bed with its headboard at the wall."""
    width, length, frame = rng.uniform(0.9, 1.8), 2.05, wood(rng)
    pillows = [-width / 4, width / 4] if width > 1.3 else [0.0]
    solids = [
        block((-width / 2, width / 2), (0, 0.06), (0, rng.uniform(0.8, 1.1)), frame),
        block((-width / 2, width / 2), (0.06, length), (0.1, 0.3), frame),
        block((-width / 2 + 0.03, width / 2 - 0.03), (0.06, length - 0.03), (0.3, 0.48), Material(WHITE)),
        block((-width / 2, width / 2), (0.65, length), (0.28, 0.53), cloth(rng)),
        *(ball((x, 0.32, 0.54), (0.3, 0.2, 0.09), Material(WHITE)) for x in pillows),
    ]
    return Piece(tuple(solids), width, length)


def plant(rng: Random) -> Piece:
    """A pot with a bush."""
    height, leaves = rng.uniform(0.5, 1.3), _leaves(rng)
    solids = [
        pillar(0, 0.2, (0, 0.32), 0.17, Material(pick(rng, CLOTHS))),
        pillar(0, 0.2, (0.32, height), 0.02, Material(WOODS[2])),
    ]
    for _ in range(int(rng.integers(2, 5))):
        size = rng.uniform(0.14, 0.26)
        at = (rng.uniform(-0.14, 0.14), 0.2 + rng.uniform(-0.14, 0.14), height + rng.uniform(-0.15, 0.25))
        solids.append(ball(at, (size, size, size * rng.uniform(0.8, 1.3)), leaves))
    return Piece(tuple(solids), 0.4, 0.4)


def lamp(rng: Random) -> Piece:
    """A standing lamp."""
    height, metal = rng.uniform(1.35, 1.7), Material(DARK)
    shade = Material((0.8, 0.66, 0.45), grain=0.03, glow=rng.uniform(0.3, 1.0))
    solids = (
        pillar(0, 0.16, (0, 0.03), 0.14, metal),
        pillar(0, 0.16, (0.03, height), 0.014, metal),
        pillar(0, 0.16, (height - 0.05, height + 0.25), rng.uniform(0.14, 0.22), shade),
    )
    return Piece(solids, 0.32, 0.32)


def boxes(rng: Random) -> Piece:
    """Cardboard boxes or crates, one on another."""
    size = rng.uniform(0.3, 0.5)
    card = Material(pick(rng, ((0.45, 0.3, 0.16), (0.6, 0.58, 0.5), (0.2, 0.25, 0.32))), grain=0.1, phase=phase(rng))
    solids = [block((-size / 2, size / 2), (0, size * 0.8), (0, size * 0.8), card)]
    if rng.random() < 0.5:
        top = size * rng.uniform(0.5, 0.8)
        box = block(
            (-top / 2, top / 2),
            (0.05, 0.05 + top * 0.8),
            (size * 0.8, size * 0.8 + top * 0.7),
            card,
            yaw=rng.uniform(-0.3, 0.3),
        )
        solids.append(box)
    return Piece(tuple(solids), size, size * 0.8)


def football(rng: Random) -> Piece:
    """A ball on the floor."""
    radius = rng.uniform(0.11, 0.32)
    skin = Material(pick(rng, CLOTHS), "stripes", WHITE, (radius * 0.9, 1.0), (float(rng.choice([0.0, 0.35])), 0.0), grain=0.04)
    return Piece((ball((0, radius, radius), (radius, radius, radius), skin),), 2 * radius, 2 * radius)


AT_WALLS: tuple[Callable[[Random], Piece], ...] = (shelf, cabinet, sofa, bed, table, cabinet, shelf)
"""What stands with its back to a wall."""
ANYWHERE: tuple[Callable[[Random], Piece], ...] = (table, chair, chair, plant, lamp, boxes, football, sofa)
"""What stands anywhere."""
