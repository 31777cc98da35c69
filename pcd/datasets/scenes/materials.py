"""Materials and the patterns on them, filtered to the pixel so that far patterns fade instead of flickering.

Patterns are functions of surface coordinates in metres, `(N,)` each, and of the width of a pixel on the surface. Lines and
cells are integrated over that width (a box filter, in closed form); noise is read from a pyramid of averaged noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Colour = tuple[float, float, float]
"""Linear reflectance of red, green and blue, 0 to 1."""
Pattern = Literal["plain", "checker", "stripes", "bond", "panes", "books", "art", "road"]

NOISE_SIZE = 256
_LEVELS = 9
_TONES = 4096


@dataclass(frozen=True)
class Material:
    """What a surface is made of.

    `pattern` mixes `colour` and `second`: `checker`; `stripes` (second covers `gap[0]`); `bond` for planks, bricks and tiles
    (`gap`: share of joints, in `second`; `shift` between rows; `tone`: how much cells differ); `panes` (openings in `second`
    that cover `gap` of each cell); `books` (spines of many colours); `art` (soft blobs); `road` (lane lines `gap[0]` metres
    wide every `size[0]` metres, the outermost of `tone` lanes solid, dashes every `size[1]` metres).
    `size` is one cell in metres; `grain` how strong the noise is, `fibre` metres it spans along both axes; `glow` is emitted
    light as a multiple of the colour.
    """

    colour: Colour
    pattern: Pattern = "plain"
    second: Colour = (0.0, 0.0, 0.0)
    size: tuple[float, float] = (1.0, 1.0)
    gap: tuple[float, float] = (0.0, 0.0)
    shift: float = 0.0
    tone: float = 0.0
    grain: float = 0.05
    fibre: tuple[float, float] = (1.5, 1.5)
    glow: float = 0.0
    phase: int = 0


def scaled(colour: Colour, factor: float) -> Colour:
    """A lighter or darker colour, at most 0.95 in each channel."""
    red, green, blue = (min(channel * factor, 0.95) for channel in colour)
    return red, green, blue


@dataclass(frozen=True)
class Patch:
    """Surface coordinates `u`, `v` in metres and the widths of a pixel along them, `(N,)` each."""

    u: Floats
    v: Floats
    wide: Floats
    high: Floats


@functools.cache
def _noise() -> Floats:
    """A tileable cloud, 256 x 256, of zero mean and unit variance within [-3, 3], and its averages down to one value, flat."""
    generator = np.random.Generator(np.random.PCG64(20240607))
    frequency = np.fft.fftfreq(NOISE_SIZE, 1 / NOISE_SIZE)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = np.inf
    spectrum = np.fft.fft2(generator.standard_normal((NOISE_SIZE, NOISE_SIZE))) / radius**1.15
    level = np.fft.ifft2(spectrum).real
    levels = [np.clip(level / level.std(), -3, 3)]
    while len(levels) < _LEVELS:
        half = len(levels[-1]) // 2
        levels.append(levels[-1].reshape(half, 2, half, 2).mean(axis=(1, 3)))
    return np.concatenate([level.ravel() for level in levels]).astype(np.float32)


_STARTS = np.concatenate([[0], np.cumsum([(NOISE_SIZE >> level) ** 2 for level in range(_LEVELS - 1)])]).astype(np.int32)


@functools.cache
def _tones() -> Floats:
    return np.random.Generator(np.random.PCG64(20240608)).random(_TONES, dtype=np.float32)


def noise(u: Floats, v: Floats, width: Floats) -> Floats:
    """Cloud noise of period 1 at `(u, v)`, averaged over about `width`; zero mean, unit variance when not averaged."""
    finest = np.maximum(width * NOISE_SIZE, np.float32(1))
    level = np.minimum(np.log2(finest), np.float32(_LEVELS - 1)).astype(np.int32)
    count = np.right_shift(NOISE_SIZE, level)
    mask, start = count - 1, _STARTS[level]
    scale = count.astype(np.float32)
    x, y = u * scale, v * scale
    x0, y0 = np.floor(x), np.floor(y)
    right, up = x - x0, y - y0
    column, row = x0.astype(np.int32), y0.astype(np.int32)
    low, high = start + (row & mask) * count, start + ((row + 1) & mask) * count
    first, second = column & mask, (column + 1) & mask
    cloud = _noise()
    near, far = cloud[low + first], cloud[high + first]
    near += right * (cloud[low + second] - near)
    far += right * (cloud[high + second] - far)
    blended: Floats = near + up * (far - near)
    return blended


def tone(column: Floats, row: Floats, phase: npt.NDArray[np.int32]) -> Floats:
    """A fixed random number in [0, 1) for each cell (whole numbers) of a pattern."""
    index = column.astype(np.int32) * 73 + row.astype(np.int32) * 179 + phase
    return np.take(_tones(), index & (_TONES - 1))


def pulse(x: Floats, width: Floats, share: Floats | float) -> Floats:
    """The share of `[x - width / 2, x + width / 2]` in which the fractional part is below `share`."""
    width = np.maximum(width, np.float32(1e-3))
    high, low = x + width / 2, x - width / 2
    whole_high, whole_low = np.floor(high), np.floor(low)
    covered = (whole_high - whole_low) * share + np.minimum(high - whole_high, share) - np.minimum(low - whole_low, share)
    result: Floats = np.clip(covered / width, 0, 1).astype(np.float32)
    return result


class MaterialTable:
    """The materials of a scene as arrays, one entry each, to be looked up by pixel."""

    def __init__(self, materials: Sequence[Material]) -> None:
        self.patterns = [material.pattern for material in materials]
        self.colour = np.array([material.colour for material in materials], dtype=np.float32).T
        self.second = np.array([material.second for material in materials], dtype=np.float32).T
        self.size = np.array([material.size for material in materials], dtype=np.float32).T
        self.gap = np.array([material.gap for material in materials], dtype=np.float32).T
        self.shift = np.array([material.shift for material in materials], dtype=np.float32)
        self.tone = np.array([material.tone for material in materials], dtype=np.float32)
        self.grain = np.array([material.grain for material in materials], dtype=np.float32)
        self.fibre = np.array([material.fibre for material in materials], dtype=np.float32).T
        self.glow = np.array([material.glow for material in materials], dtype=np.float32)
        self.phase = np.array([material.phase for material in materials], dtype=np.int32)

    def reflectance(self, index: npt.NDArray[np.intp], at: Patch) -> Floats:
        """Colours `(3, N)` of surface points made of materials `index (N,)`."""
        colours = np.take(self.colour, index, axis=1)
        code = np.array([list(_PATTERNS).index(pattern) if pattern in _PATTERNS else -1 for pattern in self.patterns])[index]
        for number, paint in enumerate(_PATTERNS.values()):
            pixels = np.flatnonzero(code == number)
            if pixels.size:
                part = Patch(at.u[pixels], at.v[pixels], at.wide[pixels], at.high[pixels])
                colours[:, pixels] = paint(self, index[pixels], part)
        fibre_u, fibre_v = self.fibre[0][index], self.fibre[1][index]
        shift = (self.phase.astype(np.float32) * np.float32(0.618034))[index]
        width = np.maximum(at.wide / fibre_u, at.high / fibre_v)
        colours *= np.maximum(1 + self.grain[index] * noise(at.u / fibre_u + shift, at.v / fibre_v - shift, width), 0.1)
        return colours


def _mix(table: MaterialTable, index: npt.NDArray[np.intp], share: Floats, shade: Floats | None = None) -> Floats:
    """`second` where `share` is 1, `colour` (times `shade`) where it is 0."""
    first = np.take(table.colour, index, axis=1)
    if shade is not None:
        first *= shade
    mixed: Floats = first + share * (np.take(table.second, index, axis=1) - first)
    return mixed


def _cells(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Patch:
    across, along = table.size[0][index], table.size[1][index]
    return Patch(at.u / across, at.v / along, at.wide / across, at.high / along)


def _fade(cell: Patch) -> Floats:
    """How much of the difference between cells is left at this pixel width."""
    left: Floats = np.clip(np.float32(1.5) - np.maximum(cell.wide, cell.high), 0, 1)
    return left


def _checker(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell = _cells(table, index, at)
    two = np.float32(2)
    across, along = pulse(cell.u / two, cell.wide / two, 0.5), pulse(cell.v / two, cell.high / two, 0.5)
    return _mix(table, index, across + along - two * across * along)


def _stripes(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell = _cells(table, index, at)
    return _mix(table, index, pulse(cell.u, cell.wide, table.gap[0][index]))


def _bond(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell = _cells(table, index, at)
    row, phase = np.floor(cell.v), table.phase[index]
    u = cell.u + table.shift[index] * row
    shade = 1 + table.tone[index] * _fade(cell) * (tone(np.floor(u), row, phase) - np.float32(0.5))
    joints = 1 - (1 - pulse(u, cell.wide, table.gap[0][index])) * (1 - pulse(cell.v, cell.high, table.gap[1][index]))
    return _mix(table, index, joints, shade)


def _panes(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell = _cells(table, index, at)
    across, along = table.gap[0][index], table.gap[1][index]
    u, v = cell.u - (1 - across) / 2, cell.v - (1 - along) / 2
    opening = pulse(u, cell.wide, across) * pulse(v, cell.high, along)
    shade = 1 + table.tone[index] * _fade(cell) * (tone(np.floor(u), np.floor(v), table.phase[index]) - np.float32(0.5))
    wall = np.take(table.colour, index, axis=1)
    return np.asarray(wall + opening * (np.take(table.second, index, axis=1) * shade - wall), dtype=np.float32)


def _books(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell = _cells(table, index, at)
    column, phase, fade = np.floor(cell.u), table.phase[index], _fade(cell)
    spine = np.stack([tone(column, np.full_like(column, 11 + channel), phase) for channel in range(3)])
    grey = spine.mean(axis=0)
    spine = np.float32(0.16) + fade * (np.float32(0.55) * grey * grey + np.float32(0.45) * spine * spine - np.float32(0.13))
    tall = cell.v < np.float32(0.72) + np.float32(0.25) * tone(column, np.full_like(column, 5), phase)
    edge = 1 - np.float32(0.6) * pulse(cell.u, cell.wide, 0.1)
    return np.asarray(np.where(tall, spine * edge, np.take(table.second, index, axis=1)), dtype=np.float32)


def _art(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    cell, shift = _cells(table, index, at), (table.phase.astype(np.float32) * np.float32(0.37))[index]
    width = np.maximum(cell.wide, cell.high)
    clouds = [
        noise(cell.u * scale + shift, cell.v * scale - shift, width * scale) for scale in (np.float32(0.3), np.float32(0.9))
    ]
    share = np.clip(np.float32(0.5) + clouds[0] * np.float32(0.6), 0, 1)
    return _mix(table, index, share, 1 + np.float32(0.3) * clouds[1])


def _road(table: MaterialTable, index: npt.NDArray[np.intp], at: Patch) -> Floats:
    lane, dash, lanes = table.size[0][index], table.size[1][index], table.tone[index]
    line = np.rint(at.u / lane)
    wide, thick = np.maximum(at.wide, np.float32(1e-3)), table.gap[0][index]
    reach = np.minimum(np.minimum(wide, thick), (wide + thick) / 2 - np.abs(at.u - line * lane)) / wide
    edge = (line < np.float32(0.5)) | (line > lanes - np.float32(0.5))
    paint = np.where(edge, np.float32(1), pulse(at.v / dash, at.high / dash, 0.4))
    return _mix(table, index, np.clip(reach, 0, 1) * paint)


_PATTERNS: dict[str, Callable[[MaterialTable, npt.NDArray[np.intp], Patch], Floats]] = {
    "checker": _checker,
    "stripes": _stripes,
    "bond": _bond,
    "panes": _panes,
    "books": _books,
    "art": _art,
    "road": _road,
}
