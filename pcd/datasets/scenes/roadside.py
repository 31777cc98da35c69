"""Things that stand along roads. Pieces as in `furniture`: x to the right, y from the back (0) to the front, z up.

Cars, buses and people are centred in x; a car's front is its +y end.
"""

from __future__ import annotations

import math

from pcd.datasets.scenes.furniture import DARK, WHITE, WOODS, Piece, Random, ball, block, phase, pick, pillar
from pcd.datasets.scenes.materials import Colour, Material, scaled
from pcd.datasets.scenes.raycast import Solid

PAINTWORK: tuple[Colour, ...] = (
    (0.65, 0.65, 0.66),
    (0.05, 0.05, 0.06),
    (0.3, 0.31, 0.33),
    (0.4, 0.04, 0.04),
    (0.05, 0.1, 0.32),
    (0.75, 0.74, 0.7),
    (0.1, 0.2, 0.12),
    (0.55, 0.4, 0.08),
)
WALLS: tuple[Colour, ...] = (
    (0.55, 0.48, 0.38),
    (0.42, 0.2, 0.13),
    (0.62, 0.6, 0.56),
    (0.35, 0.33, 0.32),
    (0.6, 0.42, 0.3),
    (0.5, 0.5, 0.42),
    (0.3, 0.17, 0.12),
    (0.66, 0.58, 0.42),
)
ROOFS: tuple[Colour, ...] = ((0.3, 0.1, 0.06), (0.12, 0.11, 0.12), (0.22, 0.14, 0.1))
FOLIAGE: tuple[Colour, ...] = ((0.07, 0.15, 0.03), (0.12, 0.2, 0.04), (0.05, 0.11, 0.04), (0.2, 0.19, 0.04))
GLASS = Material((0.05, 0.065, 0.08), "art", (0.14, 0.17, 0.2), (2.0, 1.0), grain=0.0)


def car(rng: Random, fine: bool = True) -> Piece:
    """A car of ordinary size; `fine` adds what cannot be seen from afar."""
    length, half = rng.uniform(3.8, 4.8), rng.uniform(0.84, 0.93)
    belt, roof = rng.uniform(0.82, 0.95), rng.uniform(1.4, 1.6)
    paint, dark = Material(pick(rng, PAINTWORK), grain=0.02), Material(DARK)
    start, end = rng.uniform(0.02, 0.18) * length, rng.uniform(0.7, 0.78) * length
    slant = rng.uniform(0.62, 0.78)
    solids = [
        block((-half, half), (0, length), (0.28, belt), paint, taper=0.97),
        block((-half + 0.06, half - 0.06), (start, end), (belt, roof - 0.05), GLASS, taper=slant),
    ]
    middle, reach = (start + end) / 2, (end - start) / 2 * slant
    solids.append(block((-half + 0.06, half - 0.06), (middle - reach, middle + reach), (roof - 0.05, roof), paint))
    for x in (-half + 0.05, half - 0.05):
        solids += [ball((x, length * share, 0.32), (0.12, 0.32, 0.32), dark) for share in (0.19, 0.81)]
    if fine:
        solids += _lights(half, length, belt)
    return Piece(tuple(solids), 2 * half, length)


def _lights(half: float, length: float, belt: float) -> list[Solid]:
    """Lights and number plate at the back, lights and grille in front."""
    red, white = Material((0.5, 0.02, 0.02), grain=0.0, glow=0.4), Material((0.9, 0.9, 0.85), grain=0.0, glow=0.5)
    plate, grille, edge = Material(WHITE), Material(DARK), half - 0.1
    solids = [
        block((-0.26, 0.26), (-0.02, 0.02), (0.48, 0.6), plate, casts_shadow=False),
        block((-edge, edge), (length - 0.03, length + 0.01), (0.42, 0.56), grille, casts_shadow=False),
    ]
    for x in (0.2 - half, half - 0.2):
        rear, front = (belt - 0.27, belt - 0.1), (belt - 0.27, belt - 0.13)
        solids.append(block((x - 0.16, x + 0.16), (-0.02, 0.03), rear, red, casts_shadow=False))
        solids.append(block((x - 0.18, x + 0.18), (length - 0.04, length + 0.01), front, white, casts_shadow=False))
    return solids


def van(rng: Random) -> Piece:
    """A van, truck or bus."""
    length, half, height = rng.uniform(5.5, 11.0), rng.uniform(1.0, 1.25), rng.uniform(2.3, 3.3)
    paint, dark = Material(pick(rng, PAINTWORK), grain=0.03), Material(DARK)
    windows = Material(paint.colour, "panes", (0.05, 0.06, 0.08), (1.4, height), (0.85, 0.36), grain=0.02)
    side = windows if length > 8 else paint
    solids = [
        block((-half, half), (0, length), (0.4, height), side, top=paint, front=paint),
        block((-half + 0.1, half - 0.1), (length - 0.3, length + 0.02), (height * 0.45, height * 0.8), GLASS),
        block((-half + 0.12, half - 0.12), (-0.02, 0.1), (height * 0.5, height * 0.85), GLASS),
    ]
    for x in (-half + 0.06, half - 0.06):
        solids += [ball((x, length * share, 0.45), (0.15, 0.45, 0.45), dark) for share in (0.15, 0.82)]
    return Piece((*solids, *_lights(half, length, 1.1)), 2 * half, length)


def person(rng: Random) -> Piece:
    """Somebody standing or walking."""
    tall = rng.uniform(1.5, 1.9)
    coat, trousers = Material(pick(rng, PAINTWORK), grain=0.08), Material(pick(rng, PAINTWORK[:5]), grain=0.05)
    skin = Material(pick(rng, ((0.55, 0.36, 0.26), (0.3, 0.17, 0.1))), grain=0.0)
    stride = rng.uniform(0.0, 0.16)
    solids = (
        pillar(-0.1, stride, (0, tall * 0.48), 0.075, trousers),
        pillar(0.1, -stride, (0, tall * 0.48), 0.075, trousers),
        ball((0, 0, tall * 0.66), (0.24, 0.15, tall * 0.21), coat),
        ball((0, 0, tall - 0.12), (0.095, 0.11, 0.13), skin),
    )
    return Piece(solids, 0.5, 0.3)


def tree(rng: Random, fine: bool = True) -> Piece:
    """A trunk and a crown of leaves, or a fir."""
    leaves = Material(pick(rng, FOLIAGE), grain=0.5, fibre=(1.8, 1.8), phase=phase(rng))
    bark, tall = Material(WOODS[2], grain=0.2, fibre=(0.3, 1.5)), rng.uniform(4.0, 10.0)
    girth = tall * rng.uniform(0.016, 0.028)
    solids = [pillar(0, 0, (0, tall * 0.6), girth, bark)]
    for _ in range(int(rng.integers(4, 7)) if fine else 2):
        size = tall * rng.uniform(0.13, 0.22)
        away, turn = tall * rng.uniform(0.0, 0.15), rng.uniform(0, 2 * math.pi)
        at = (away * math.cos(turn), away * math.sin(turn), tall * rng.uniform(0.55, 0.85))
        solids.append(ball(at, (size, size, size * rng.uniform(0.75, 1.2)), leaves))
    return Piece(tuple(solids), tall * 0.4, tall * 0.4)


def street_lamp(rng: Random) -> Piece:
    """A lamp post whose arm reaches over the road (towards +x)."""
    tall, metal = rng.uniform(5.0, 8.5), Material((0.22, 0.23, 0.23), grain=0.05)
    arm = rng.uniform(0.8, 2.0)
    solids = (
        pillar(0, 0, (0, tall), 0.075, metal),
        block((0, arm), (-0.04, 0.04), (tall - 0.08, tall), metal),
        block((arm - 0.5, arm), (-0.11, 0.11), (tall - 0.14, tall - 0.04), Material((0.7, 0.7, 0.68), grain=0.0)),
    )
    return Piece(solids, 0.2, 0.2)


def sign(rng: Random) -> Piece:
    """A road sign on its post."""
    metal, tall = Material((0.4, 0.41, 0.42), grain=0.03), rng.uniform(2.1, 2.7)
    colour = pick(rng, ((0.55, 0.04, 0.04), (0.05, 0.12, 0.45), (0.7, 0.55, 0.05), (0.75, 0.75, 0.75)))
    half = rng.uniform(0.28, 0.38)
    board = Material(colour, "panes", WHITE, (2 * half, 2 * half), (0.6, rng.uniform(0.2, 0.7)), grain=0.0)
    plate = block((-half, half), (-0.02, 0.02), (tall - 2 * half, tall), Material((0.35, 0.35, 0.36)), front=board)
    return Piece((pillar(0, -0.05, (0, tall), 0.035, metal), plate), 2 * half, 0.1)


def facade(rng: Random, width: float, depth: float, floors: int) -> Piece:
    """A town house of some floors: windows, often a shop front, a cornice, sometimes a roof. Its front is +y."""
    colour, storey = pick(rng, WALLS), rng.uniform(2.9, 3.6)
    height, bay = floors * storey, width / max(round(width / rng.uniform(1.8, 3.4)), 1)
    glass = pick(rng, ((0.06, 0.08, 0.1), (0.16, 0.2, 0.25), (0.04, 0.05, 0.06)))
    gap = (rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.65))
    walls = Material(colour, "panes", glass, (bay, storey), gap, tone=1.1, grain=0.08, fibre=(9.0, 9.0), phase=phase(rng))
    trim = Material(scaled(colour, 1.3), grain=0.05)
    half = width / 2
    solids = [
        block((-half, half), (0, depth), (0, height), walls, top=Material((0.25, 0.24, 0.24))),
        block((-half - 0.1, half + 0.1), (depth - 0.5, depth + 0.25), (height - 0.1, height + 0.3), trim),
    ]
    if rng.random() < 0.5:
        size, gap = (bay * 1.5, storey), (0.82, 0.66)
        shop = Material(pick(rng, PAINTWORK), "panes", (0.1, 0.12, 0.13), size, gap, tone=0.9, phase=phase(rng))
        solids.append(block((-half + 0.1, half - 0.1), (depth, depth + 0.12), (0, storey * 0.95), shop))
        if rng.random() < 0.6:
            awning = Material(pick(rng, PAINTWORK), "stripes", WHITE, (0.5, 1.0), (0.5, 0.0))
            solids.append(block((-half + 0.3, half - 0.3), (depth, depth + 1.2), (storey * 0.88, storey * 0.95), awning))
    if floors < 5 and rng.random() < 0.5:
        tiles = _tiles(rng)
        solids.append(
            block((-half, half), (0, depth), (height + 0.2, height + 0.2 + depth * 0.3), walls, taper=0.1, front=tiles)
        )
    return Piece(tuple(solids), width, depth)


def _tiles(rng: Random) -> Material:
    colour = pick(rng, ROOFS)
    return Material(
        colour, "bond", scaled(colour, 0.5), (0.3, 0.3), (0.08, 0.16), shift=0.5, tone=0.3, grain=0.15, phase=phase(rng)
    )


def house(rng: Random) -> Piece:
    """A detached house with a gable roof and a door. Its front is +y."""
    width, depth = rng.uniform(7.0, 12.0), rng.uniform(7.0, 9.0)
    floors, half = int(rng.integers(1, 3)), width / 2
    height, colour = floors * 2.8, pick(rng, WALLS)
    bay = width / round(width / rng.uniform(2.2, 3.2))
    gap = (rng.uniform(0.4, 0.6), rng.uniform(0.42, 0.5))
    walls = Material(
        colour, "panes", (0.07, 0.09, 0.11), (bay, 2.8), gap, tone=0.9, grain=0.06, fibre=(6.0, 6.0), phase=phase(rng)
    )
    tiles, plain = _tiles(rng), Material(colour, grain=0.06)
    door = rng.uniform(-half + 1, half - 1)
    ridge = height + depth * rng.uniform(0.32, 0.5)
    solids = [
        block((-half, half), (0, depth), (0, height), walls),
        block((-half - 0.3, half + 0.3), (-0.4, depth + 0.4), (height, ridge), plain, taper=0.0, front=tiles),
        block((door - 0.5, door + 0.5), (depth, depth + 0.06), (0, 2.15), Material(pick(rng, PAINTWORK))),
        block((door - 0.7, door + 0.7), (depth, depth + 0.9), (0, 0.15), Material((0.4, 0.39, 0.37))),
        block((half * 0.4, half * 0.4 + 0.6), (depth * 0.4, depth * 0.4 + 0.6), (height, ridge + 0.5), plain),
    ]
    return Piece(tuple(solids), width, depth)


def hedge(rng: Random, length: float) -> Piece:
    """A hedge, wooden fence or low wall along y, in the middle of x."""
    kind, tall = rng.integers(3), rng.uniform(0.8, 1.6)
    if kind == 0:
        thick, material = 0.4, Material(pick(rng, FOLIAGE), grain=0.45, fibre=(1.0, 1.0), phase=phase(rng))
    elif kind == 1:
        wood = pick(rng, WOODS)
        thick, material = 0.06, Material(wood, "bond", scaled(wood, 0.3), (0.16, 9.0), (0.12, 0.0), tone=0.3, grain=0.1)
    else:
        thick = 0.25
        brick = pick(rng, WALLS)
        material = Material(brick, "bond", (0.5, 0.48, 0.45), (0.3, 0.12), (0.06, 0.12), shift=0.5, tone=0.4, grain=0.1)
    return Piece((block((-thick / 2, thick / 2), (0, length), (0, tall), material),), thick, length)
