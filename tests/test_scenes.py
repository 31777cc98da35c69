"""The ray caster, the patterns and the shadows, each against plain arithmetic on one number at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from pcd.datasets.base import Intrinsics
from pcd.datasets.scenes.materials import Material, MaterialTable, Patch, noise, pulse
from pcd.datasets.scenes.raycast import Camera, Solid, trace
from pcd.datasets.scenes.roads import random_road
from pcd.datasets.scenes.rooms import random_room
from pcd.datasets.scenes.scene import Light, Scene
from pcd.datasets.scenes.sensor import SCAN_BOTTOM, SCAN_RINGS, SCAN_TOP, punch_holes, scan
from pcd.datasets.scenes.shading import render, smooth_edges
from pcd.datasets.scenes.shadows import Samples
from pcd.datasets.scenes.surface import BOTTOM, FRONT, SIDE, TOP, find_surface

GREY = Material((0.5, 0.5, 0.5), grain=0.0)
WIDE = Intrinsics(40.0, 44.0, 31.5, 23.5)
TINY = 1e-9


class Ray(NamedTuple):
    start: tuple[float, float, float]
    way: tuple[float, float, float]


def turned(point: tuple[float, float, float], yaw: float, pitch: float, roll: float) -> tuple[float, float, float]:
    """Camera axes (x right, y down, z forward) to the world: roll about z, pitch about x, then stand up and yaw."""
    x, y, z = point
    x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
    right, forward, up = x, z * math.cos(pitch) + y * math.sin(pitch), z * math.sin(pitch) - y * math.cos(pitch)
    return right * math.cos(yaw) - forward * math.sin(yaw), right * math.sin(yaw) + forward * math.cos(yaw), up


def pixel_ray(camera: Camera, row: float, column: float) -> Ray:
    k = camera.intrinsics
    way = ((column - k.cx) / k.fx, (row - k.cy) / k.fy, 1.0)
    return Ray(camera.position, turned(way, camera.yaw, camera.pitch, camera.roll))


def own_frame(solid: Solid, ray: Ray) -> Ray:
    """The ray in metres in the solid's own axes."""

    def turn(v: tuple[float, float, float]) -> tuple[float, float, float]:
        return (
            v[0] * math.cos(-solid.yaw) - v[1] * math.sin(-solid.yaw),
            v[0] * math.sin(-solid.yaw) + v[1] * math.cos(-solid.yaw),
            v[2],
        )

    a, b, c = (p - q for p, q in zip(ray.start, solid.centre, strict=True))
    return Ray(turn((a, b, c)), turn(ray.way))


def candidates(solid: Solid, ray: Ray) -> list[float]:
    """Where the ray meets the solid's surface: roots of its faces' equations whose points lie on the solid."""
    (ox, oy, oz), (dx, dy, dz) = ray
    a, b, c = solid.half

    def at(t: float) -> tuple[float, float, float]:
        return ox + t * dx, oy + t * dy, oz + t * dz

    if solid.shape == "ball":
        p = (dx / a) ** 2 + (dy / b) ** 2 + (dz / c) ** 2
        q = 2 * (ox * dx / a**2 + oy * dy / b**2 + oz * dz / c**2)
        r = (ox / a) ** 2 + (oy / b) ** 2 + (oz / c) ** 2 - 1
        return quadratic(p, q, r)
    found = [(side * c - oz) / dz for side in (-1, 1) if dz]
    if solid.shape == "pillar":
        found = [t for t in found if math.hypot(at(t)[0] / a, at(t)[1] / b) <= 1]
        p, q = (dx / a) ** 2 + (dy / b) ** 2, 2 * (ox * dx / a**2 + oy * dy / b**2)
        return found + [t for t in quadratic(p, q, (ox / a) ** 2 + (oy / b) ** 2 - 1) if abs(at(t)[2]) <= c]
    found += [(side * a - ox) / dx for side in (-1, 1) if dx]
    lean = b * (1 - solid.taper) / (2 * c)
    for side in (-1, 1):
        speed, room = side * dy + lean * dz, b - lean * c - side * oy - lean * oz
        found += [room / speed] if speed else []
    near = 1e-7 * (1 + max(abs(ox), abs(oy), abs(oz)))

    def on_box(t: float) -> bool:
        x, y, z = at(t)
        return abs(x) <= a + near and abs(z) <= c + near and abs(y) <= b - lean * (z + c) + near

    return [t for t in found if on_box(t)]


def quadratic(p: float, q: float, r: float) -> list[float]:
    inside = q * q - 4 * p * r
    return [] if inside < 0 or not p else [(-q + sign * math.sqrt(inside)) / (2 * p) for sign in (-1, 1)]


def depth_of(camera: Camera, solids: tuple[Solid, ...], row: float, column: float) -> tuple[float, int]:
    """Planar depth and solid of one ray, by trying everything; infinity and -1 for nothing."""
    ray, best = pixel_ray(camera, row, column), (math.inf, -1)
    for number, solid in enumerate(solids):
        hits = [t for t in candidates(solid, own_frame(solid, ray)) if t > 0.1]
        if solid.shape != "shell" and len(hits) == 1:
            continue  # entered before the near plane
        if hits and min(hits) < best[0]:
            best = (min(hits), number)
    return best


@pytest.mark.parametrize(("make", "focal"), [(random_room, 55.0), (random_road, 45.0)])
@pytest.mark.parametrize("seed", [3, 4])
def test_depth_agrees_with_a_ray_caster_of_single_numbers(make, focal, seed):
    rng = np.random.default_rng(seed)
    scene = make(rng, Intrinsics(focal, focal, 31.5, 23.5), 48, 64)
    hits = trace(scene.camera, scene.solids)
    compared = 0
    for row, column in zip(rng.integers(0, 48, 30).tolist(), rng.integers(0, 64, 30).tolist(), strict=True):
        around = {
            depth_of(scene.camera, scene.solids, row + dy, column + dx)[1] for dy in (-0.01, 0.01) for dx in (-0.01, 0.01)
        }
        depth, number = depth_of(scene.camera, scene.solids, row, column)
        if around != {number}:
            continue  # on the rim of something, where rounding decides
        compared += 1
        assert hits.solid[row, column] == number, (row, column)
        assert hits.depth[row, column] == pytest.approx(depth, rel=2e-5), (row, column)
    assert compared >= 24


def test_every_shape_agrees_with_its_equation_pixel_by_pixel():
    solids = (
        Solid("box", (-1.6, 6.0, 1.0), (0.7, 0.5, 0.6), GREY, yaw=0.4, taper=0.3),
        Solid("box", (0.2, 7.0, 0.6), (0.5, 0.9, 0.5), GREY, yaw=-0.6),
        Solid("pillar", (1.6, 5.0, 1.2), (0.4, 0.4, 0.8), GREY),
        Solid("ball", (0.4, 5.0, 2.2), (0.8, 0.5, 0.4), GREY, yaw=0.3),
        Solid("shell", (0.0, 4.0, 2.0), (4.0, 6.0, 2.0), GREY),
    )
    camera = Camera((0.1, -1.0, 1.5), 0.05, -0.1, 0.08, WIDE, 48, 64)
    hits = trace(camera, solids)
    expected = np.array([[depth_of(camera, solids, row, column) for column in range(64)] for row in range(48)])
    same = hits.solid == expected[..., 1]
    assert set(np.unique(expected[..., 1])) == {0, 1, 2, 3, 4}
    assert same.mean() > 0.998
    np.testing.assert_allclose(hits.depth[same], expected[..., 0][same], rtol=2e-5)


def test_depth_is_planar_and_integer_pixels_are_centres():
    """A wall 4 m ahead of a level camera is 4 m deep everywhere; the floor's depth is height * fy / (row - cy)."""
    wall = Solid("box", (0.0, 5.0, 0.0), (50.0, 1.0, 50.0), GREY)
    floor = Solid("box", (0.0, 0.0, -1.0), (50.0, 50.0, 1.0), GREY)
    camera = Camera((0.3, 0.0, 1.5), 0.0, 0.0, 0.0, WIDE, 48, 64)
    np.testing.assert_allclose(trace(camera, [wall]).depth, 4.0, rtol=1e-6)
    depth = trace(camera, [floor]).depth
    for row in range(28, 48):
        np.testing.assert_allclose(depth[row], 1.5 * WIDE.fy / (row - WIDE.cy), rtol=1e-5)
    assert np.isinf(depth[:23]).all()


def test_nothing_behind_the_camera_is_seen():
    behind = Solid("ball", (0.0, -3.0, 1.5), (1.0, 1.0, 1.0), GREY)
    across = Solid("box", (1.0, 0.0, 0.0), (0.2, 100.0, 1.0), GREY)
    hits = trace(Camera((0.0, 0.0, 1.5), 0.0, -0.1, 0.0, WIDE, 48, 64), [behind, across])
    assert set(np.unique(hits.solid)) == {-1, 1}
    assert hits.depth.min() > 0.1


def test_surface_points_normals_and_faces():
    """Central differences of the hit points span the tangent plane: normals are orthogonal to it and face the camera."""
    solids = (
        Solid("box", (-1.4, 6.0, 1.0), (0.8, 0.5, 0.6), GREY, yaw=0.4, taper=0.3),
        Solid("ball", (0.9, 5.0, 1.7), (0.9, 0.5, 0.6), GREY, yaw=0.3),
        Solid("shell", (0.0, 4.0, 2.0), (4.0, 6.0, 2.0), GREY),
    )
    camera = Camera((0.1, -1.0, 2.5), 0.05, -0.2, 0.0, Intrinsics(160.0, 160.0, 99.5, 79.5), 160, 200)
    hits, rays = trace(camera, solids), camera.directions()
    surface = find_surface(camera, solids, hits, rays)
    points = surface.point.reshape(3, 160, 200).astype(np.float64)
    normals, number = surface.normal.reshape(3, 160, 200), hits.solid
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    expected = np.cross(across, down, axis=0)
    expected /= np.sqrt((expected**2).sum(axis=0))
    cosine = np.abs((expected * normals[:, 1:-1, 1:-1]).sum(axis=0))
    assert np.quantile(cosine, 0.05) > 0.999
    assert ((rays * normals).sum(axis=0) < 0).mean() > 0.999
    np.testing.assert_allclose((normals**2).sum(axis=0), 1, atol=1e-4)
    faces = surface.face.reshape(160, 200)
    gaps = np.array([4.0, 6.0, 2.0])[:, None, None] - np.abs(points - np.array([0.0, 4.0, 2.0])[:, None, None])
    room = (number == 2) & ((gaps < 0.01).sum(axis=0) == 1)
    for part, face in (
        ((points[2] < 0.01), BOTTOM),
        (points[2] > 3.99, TOP),
        (points[1] > 9.99, FRONT),
        (gaps[0] < 0.01, SIDE),
    ):
        assert (room & part).any()
        assert (faces[room & part] == face).all()


@pytest.mark.parametrize("width", [0.01, 0.3, 0.97, 2.4])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_pulse_is_the_mean_over_the_pixel(width, share):
    x = np.linspace(-2.3, 2.9, 41, dtype=np.float32)
    spread = (np.arange(4000) + 0.5) / 4000 - 0.5
    expected = ((x[:, None].astype(np.float64) + width * spread) % 1 < share).mean(axis=1)
    np.testing.assert_allclose(pulse(x, np.full_like(x, width), share), expected, atol=2e-3)


def test_patterns_fade_to_their_mean_far_away():
    materials = [
        Material((0.2, 0.2, 0.2), "checker", (0.6, 0.6, 0.6), (0.1, 0.1), grain=0.0),
        Material((0.2, 0.2, 0.2), "stripes", (0.6, 0.6, 0.6), (0.1, 0.1), (0.25, 0.0), grain=0.0),
        Material((0.2, 0.2, 0.2), "bond", (0.6, 0.6, 0.6), (0.1, 0.1), (0.5, 0.0), tone=0.5, grain=0.3, fibre=(0.2, 0.2)),
    ]
    table, rng = MaterialTable(materials), np.random.default_rng(0)
    u, v = rng.uniform(0, 50, (2, 600)).astype(np.float32)
    index = np.repeat(np.arange(3), 200)
    near = table.reflectance(index, Patch(u, v, np.full_like(u, 0.001), np.full_like(u, 0.001)))[0]
    far = table.reflectance(index, Patch(u, v, np.full_like(u, 9.7), np.full_like(u, 9.7)))[0]
    for number, mean in enumerate((0.4, 0.3, 0.4)):
        assert near[index == number].std() > 0.1
        np.testing.assert_allclose(far[index == number], mean, atol=0.02)


def test_noise_repeats_is_continuous_and_averages_out():
    rng = np.random.default_rng(1)
    u, v = rng.random((2, 4000), dtype=np.float32)
    fine = np.zeros_like(u)
    values = noise(u, v, fine)
    assert abs(values.mean()) < 0.1
    assert 0.8 < values.std() < 1.2
    np.testing.assert_allclose(noise(u + 1, v - 2, fine), values, atol=0.02)
    assert np.abs(noise(u + np.float32(1e-5), v, fine) - values).max() < 0.02
    assert noise(u, v, np.full_like(u, 0.25)).std() < 0.8 * values.std()
    assert noise(u, v, np.full_like(u, 1.0)).std() < 1e-6
    assert values.dtype == np.float32


@pytest.mark.parametrize("sun", [False, True])
def test_shadows_agree_with_a_line_of_sight(sun):
    solids = (
        Solid("box", (0.0, 4.0, -1.0), (20.0, 20.0, 1.0), GREY, casts_shadow=False),
        Solid("box", (-0.5, 4.0, 0.5), (0.4, 0.3, 0.5), GREY, yaw=0.4),
        Solid("ball", (0.9, 4.5, 0.7), (0.4, 0.4, 0.4), GREY),
        Solid("ball", (0.6, 3.0, 3.4), (0.6, 0.6, 0.6), GREY),  # above the lamp, so it darkens nothing in its light
    )
    position = (0.8, 0.1, 0.5) if sun else (0.6, 3.0, 2.4)
    camera = Camera((0.0, 0.0, 2.0), 0.0, -0.4, 0.0, Intrinsics(90.0, 90.0, 63.5, 47.5), 96, 128)
    hits = trace(camera, solids)
    samples = Samples(find_surface(camera, solids, hits, camera.directions()), solids)
    lit = samples.lit(Light(position, (1, 1, 1), reach=math.inf if sun else 1.0))
    floor = np.flatnonzero(samples.solid == 0)
    expected = []
    for point in samples.point[:, floor].T.tolist():
        way = position if sun else tuple(p - q for p, q in zip(position, point, strict=True))
        ray, end = Ray(tuple(point), tuple(way)), math.inf if sun else 1.0
        blocked = any(0 < t < end for solid in solids[1:] for t in candidates(solid, own_frame(solid, ray)))
        expected.append(not blocked)
    assert 0.02 < 1 - np.mean(expected) < 0.9
    assert (lit[floor] == expected).mean() > 0.995


def test_brightness_follows_the_lamp_and_the_display_curve():
    """Lambert's cosine and the inverse square of the distance, on a grey floor under one lamp."""
    floor = Solid("box", (0.0, 4.0, -1.0), (20.0, 20.0, 1.0), GREY, casts_shadow=False)
    camera, (x, y, z) = Camera((0.0, 0.0, 2.0), 0.0, -0.6, 0.0, WIDE, 48, 64), (0.3, 1.5, 1.5)
    lamp = Light((x, y, z), (1.5, 1.0, 0.5), reach=1.2)
    image, _ = render(Scene(camera, (floor,), (lamp,), ((0.1,) * 3, (0.0,) * 3), exposure=0.45, metering=0.0))
    for row, column in [(20, 5), (30, 31), (40, 60), (47, 0), (25, 40)]:
        ray = pixel_ray(camera, row, column)
        reach = -2.0 / ray.way[2]
        square = (x - reach * ray.way[0]) ** 2 + (y - reach * ray.way[1]) ** 2 + z**2
        for channel, power in enumerate((1.5, 1.0, 0.5)):
            falling = 0.1 + power * z / math.sqrt(square) * 1.2**2 / (1.2**2 + square)
            light = 0.5 * falling * 0.45 / 0.3
            shown = math.sqrt(light * (1 + 0.15 * light) / (1 + 0.8 * light))
            assert image[row, column, channel] == pytest.approx(shown, rel=1e-3), (row, column)


def test_a_post_darkens_the_floor_behind_it():
    floor = Solid("box", (0.0, 4.0, -1.0), (20.0, 20.0, 1.0), GREY, casts_shadow=False)
    camera, dim = Camera((0.0, 0.0, 2.0), 0.0, -0.5, 0.0, WIDE, 48, 64), ((0.02,) * 3, (0.02,) * 3)
    lamp = Light((-1.5, 2.5, 1.5), (1.0, 1.0, 1.0), reach=1.0)
    images = []
    for casts_shadow in (False, True):
        post = Solid("box", (0.0, 2.5, 0.6), (0.1, 0.3, 0.6), GREY, casts_shadow=casts_shadow)
        image, hits = render(Scene(camera, (floor, post), (lamp,), dim, metering=0.0))
        images.append(image[..., 0])
    row, column = 31, 45  # the floor about 1 m to the right of the post
    ray = pixel_ray(camera, row, column)
    assert hits.solid[row, column] == 0
    assert -2.0 / ray.way[2] * ray.way[0] > 0.3
    assert images[1][row, column] < 0.6 * images[0][row, column]
    assert (images[1] <= images[0] + 1e-6).all()


def test_edges_are_softened_and_nothing_else():
    solids = (Solid("ball", (0.0, 4.0, 1.5), (0.8, 0.8, 0.8), GREY),)
    hits = trace(Camera((0.0, 0.0, 1.5), 0.0, 0.0, 0.0, WIDE, 48, 64), solids)
    image = np.random.default_rng(0).random((3, 48, 64), dtype=np.float32)
    soft, number = smooth_edges(image, hits), hits.solid
    for row in range(1, 47):
        for column in range(1, 63):
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            at_edge = any(number[place] != number[row, column] for place in around)
            mean = image[:, row, column] / 2 + sum(image[:, r, c] for r, c in around) / 8
            np.testing.assert_allclose(soft[:, row, column], mean if at_edge else image[:, row, column], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_holes_take_the_share_asked_for_and_edges_first(share):
    depth = np.full((60, 80), 4.0, dtype=np.float32)
    depth[20:40, 30:50] = 2.0
    depth[:5] = np.nan
    holed = punch_holes(depth, share, np.random.default_rng(0))
    assert np.isnan(holed).sum() == 5 * 80 + round(share * 55 * 80)
    np.testing.assert_array_equal(holed[~np.isnan(holed)], depth[~np.isnan(holed)])
    if share == 0.03:
        near_edge = np.zeros_like(depth, dtype=bool)
        near_edge[18:42, 28:52], near_edge[22:38, 32:48] = True, False
        assert np.isnan(holed[near_edge]).mean() > 3 * np.isnan(holed[5:][~near_edge[5:]]).mean()


def test_the_scanner_keeps_its_rings_only():
    """Between two rings lie `fy * tan` pixels: the kept rows of the middle column are spaced so, within the scanned angles."""
    camera = Camera((0.0, 0.0, 1.7), 0.0, 0.0, 0.0, Intrinsics(900.0, 900.0, 619.5, 187.5), 376, 1240)
    kept = np.isfinite(scan(np.full((376, 1240), 9.0, dtype=np.float32), camera, np.random.default_rng(0)))
    middle = 600 + int(kept[:, 600:640].sum(axis=0).argmax())
    rows = np.flatnonzero(kept[:, middle])
    step = (SCAN_TOP - SCAN_BOTTOM) / (SCAN_RINGS - 1)
    angles = np.degrees(np.arctan((rows - 187.5) / 900))
    assert angles.min() > -SCAN_TOP - step
    assert angles.max() < -SCAN_BOTTOM + step
    rings = np.diff(angles) / step
    assert np.abs(rings - np.rint(rings)).max() < 1.1 * math.degrees(1 / 900) / step
    assert rings.min() > 0.8
    assert 0.85 < rows.size / ((angles.max() + SCAN_TOP) / step) < 1.05
    assert 0.02 < kept.mean() < 0.08
