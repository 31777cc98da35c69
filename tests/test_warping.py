"""Warping against closed forms, loops over its definitions, and scenes drawn from two places."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.datasets.scenes.shading import render
from pcd.datasets.synthetic import SyntheticDataset, SyntheticOptions
from pcd.warping import Motion, Splatted, differences, dissimilarity, inside, inverse_warp, project, sample, splat, turns
from tests.test_head_options import NothingWaits

H, W = 12, 16
CAMERA = torch.tensor([[20.0, 25.0, 7.2, 5.9]], dtype=torch.float64)
STILL = torch.eye(3, dtype=torch.float64)[None]


def moved(x: float, y: float, z: float, rotation: Tensor = STILL) -> Motion:
    return Motion(rotation, torch.tensor([[x, y, z]], dtype=torch.float64))


def plane(metres: float) -> Tensor:
    return torch.full((1, H, W), metres, dtype=torch.float64)


def grid() -> tuple[Tensor, Tensor]:
    return torch.arange(W, dtype=torch.float64).expand(H, W), torch.arange(H, dtype=torch.float64)[:, None].expand(H, W)


def picture(views: int = 1, height: int = H, width: int = W, seed: int = 0) -> Tensor:
    """Random bytes `(views, 3, height, width)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (views, 3, height, width), dtype=torch.uint8, generator=generator)


def everywhere(views: int = 1) -> Tensor:
    return torch.ones(views, H, W, dtype=torch.bool)


@pytest.mark.parametrize("angles", [(0.3, 0, 0), (0, -0.4, 0), (0, 0, 1.2)])
def test_turns_are_rotations_about_the_axes(angles: tuple[float, float, float]) -> None:
    found = turns(torch.tensor([angles], dtype=torch.float64))[0]
    np.testing.assert_allclose(found, cv2.Rodrigues(np.array(angles))[0], atol=1e-12)


def test_turns_follow_each_other() -> None:
    angles = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]], dtype=torch.float64)
    only = [turns(torch.where(torch.arange(3) == axis, angles, 0.0)) for axis in range(3)]
    torch.testing.assert_close(turns(angles), only[2] @ only[1] @ only[0])
    torch.testing.assert_close(turns(angles) @ turns(angles).mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_a_plane_is_shifted_by_focal_length_times_translation_over_depth() -> None:
    pixels, z = project(plane(4.0), CAMERA, moved(0.1, -0.2, 0.0))
    x, y = grid()
    torch.testing.assert_close(pixels[0, 0], x + 20 * 0.1 / 4)
    torch.testing.assert_close(pixels[0, 1], y - 25 * 0.2 / 4)
    assert torch.equal(z, plane(4.0))


def test_coming_nearer_enlarges_about_the_principal_point() -> None:
    pixels, z = project(plane(4.0), CAMERA, moved(0, 0, -1.0))
    x, y = grid()
    torch.testing.assert_close(pixels[0, 0], 7.2 + (x - 7.2) * 4 / 3)
    torch.testing.assert_close(pixels[0, 1], 5.9 + (y - 5.9) * 4 / 3)
    torch.testing.assert_close(z, plane(3.0))


def test_a_turn_about_the_axis_turns_the_image_whatever_the_depth() -> None:
    camera, angle = torch.tensor([[20.0, 20.0, 7.2, 5.9]], dtype=torch.float64), 0.3
    turn = moved(0, 0, 0, turns(torch.tensor([[0, 0, angle]], dtype=torch.float64)))
    depth = 1 + 5 * torch.rand(1, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pixels, _ = project(depth, camera, turn)
    x, y = grid()[0] - 7.2, grid()[1] - 5.9
    torch.testing.assert_close(pixels[0, 0], 7.2 + math.cos(angle) * x - math.sin(angle) * y)
    torch.testing.assert_close(pixels[0, 1], 5.9 + math.sin(angle) * x + math.cos(angle) * y)


def test_projection_is_equation_5() -> None:
    """K (R D K^-1 p + t), pixel by pixel, another camera and motion for each view."""
    generator = torch.Generator().manual_seed(2)
    cameras = torch.tensor([[20.0, 25.0, 7.2, 5.9], [31.0, 28.0, -4.0, 20.0]], dtype=torch.float64)
    depth = 1 + 5 * torch.rand(2, H, W, dtype=torch.float64, generator=generator)
    motion = Motion(turns(torch.tensor([[0.1, 0.2, -0.3], [-0.2, 0.05, 0.1]]).double()), torch.randn(2, 3).double() * 0.2)
    pixels, z = project(depth, cameras, motion)
    for view, row, column in np.ndindex(2, H, W):
        fx, fy, cx, cy = cameras[view].tolist()
        k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        point = float(depth[view, row, column]) * np.linalg.inv(k) @ np.array([column, row, 1.0])
        there = motion.rotation[view].numpy() @ point + motion.translation[view].numpy()
        expected = k @ there
        np.testing.assert_allclose(pixels[view, :, row, column], expected[:2] / expected[2], rtol=1e-10)
        np.testing.assert_allclose(float(z[view, row, column]), there[2], rtol=1e-12)
    back = motion.inverse()
    torch.testing.assert_close(back.rotation @ motion.rotation, torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close((back.rotation @ motion.translation[..., None])[..., 0], -back.translation)


def test_samples_are_bilinear_between_centres() -> None:
    image = picture().double()
    generator = torch.Generator().manual_seed(3)
    pixels = torch.stack([v + 2 * torch.rand(H, W, dtype=torch.float64, generator=generator) - 1 for v in grid()])[None]
    found = sample(image, pixels)
    for row, column in np.ndindex(H, W):
        x = min(max(float(pixels[0, 0, row, column]), 0), W - 1)
        y = min(max(float(pixels[0, 1, row, column]), 0), H - 1)
        left, top = min(int(x), W - 2), min(int(y), H - 2)
        expected = sum(
            (1 - abs(x - i)) * (1 - abs(y - j)) * image[0, :, j, i] for i in (left, left + 1) for j in (top, top + 1)
        )
        torch.testing.assert_close(found[0, :, row, column], expected)


def test_standing_still_changes_nothing() -> None:
    image = picture().double()
    found, shown = inverse_warp(image, plane(2.0), CAMERA, moved(0, 0, 0))
    torch.testing.assert_close(found, image, rtol=0, atol=1e-9)
    second = splat(picture(), plane(2.0), everywhere(), CAMERA, moved(0, 0, 0))
    torch.testing.assert_close(second.image, image / 255, rtol=0, atol=2e-3)
    inner = (0, slice(1, -1), slice(1, -1))  # rounding may put the outermost outside by a hair
    assert shown[inner].all()
    assert second.filled.all()
    assert second.visible[inner].all()


def test_what_is_outside_or_behind_is_not_shown() -> None:
    pixels, z = project(plane(4.0), CAMERA, moved(0.5, 0, 0))  # 2.5 pixels to the right
    assert inside(pixels, z)[0].sum(dim=1).tolist() == [W - 3] * H
    assert not inside(*project(plane(4.0), CAMERA, moved(0, 0, -4.0))).any()


def slow_splat(image: Any, depth: Any, known: Any, camera: Any, motion: Motion) -> Any:
    """One view, point by point: for each pixel the points that land within 1 of it, those of the nearest surface averaged."""
    fx, fy, cx, cy = camera
    landed: dict[tuple[int, int], list[tuple[float, float, Any]]] = {}
    for row, column in np.ndindex(*depth.shape):
        if known[row, column]:
            d = depth[row, column]
            point = (
                motion.rotation[0].numpy() @ [(column - cx) / fx * d, (row - cy) / fy * d, d] + motion.translation[0].numpy()
            )
            x, y = fx * point[0] / point[2] + cx, fy * point[1] / point[2] + cy
            for i in (math.floor(x), math.floor(x) + 1):
                for j in (math.floor(y), math.floor(y) + 1):
                    if 0 <= i < W and 0 <= j < H:
                        share = (1 - abs(x - i)) * (1 - abs(y - j))
                        landed.setdefault((j, i), []).append((point[2], share, image[:, row, column]))
    seen, filled = np.zeros((3, H, W)), np.zeros((H, W), dtype=bool)
    for (j, i), points in landed.items():
        front = min((z for z, share, _ in points if share >= 0.2), default=math.inf)
        kept = [(share, colour) for z, share, colour in points if abs(z / front - 1) <= 0.05]
        if sum(share for share, _ in kept) >= 0.5:
            filled[j, i] = True
            seen[:, j, i] = sum(share * colour for share, colour in kept) / sum(share for share, _ in kept) / 255
    return seen, filled


def test_splatting_is_what_points_one_by_one_give() -> None:
    image, generator = picture(seed=4), torch.Generator().manual_seed(5)
    depth = 4 + 0.05 * torch.rand(1, H, W, dtype=torch.float64, generator=generator)
    depth[0, 3:8, 5:10] -= 2
    known = torch.rand(1, H, W, generator=generator) < 0.9
    motion = moved(0.31, -0.17, 0.2, turns(torch.tensor([[0.01, 0.02, 0.1]]).double()))
    found = splat(image, depth, known, CAMERA, motion)
    seen, filled = slow_splat(image[0].numpy(), depth[0].numpy(), known[0].numpy(), CAMERA[0].tolist(), motion)
    assert 0.4 < filled.mean() < 0.95
    np.testing.assert_array_equal(found.filled[0], filled)
    np.testing.assert_allclose(found.image[0], seen, atol=2e-3)


def test_near_things_hide_far_ones_and_leave_holes() -> None:
    """A square at 2 m in front of a wall at 4 m; a camera that goes left sees them moved by 4 and by 2 pixels."""
    depth, image = plane(4.0), picture(seed=6)
    depth[0, 4:8, 5:9] = 2.0
    found = splat(image, depth, everywhere(), CAMERA, moved(0.4, 0, 0))
    expected = np.full((H, W), -1)  # the column each pixel comes from
    expected[:, 2:] = np.arange(W - 2)
    expected[4:8, 7:11] = -1  # the wall behind the square was never seen
    expected[4:8, 9:13] = np.arange(5, 9)
    np.testing.assert_array_equal(found.filled[0], expected >= 0)
    for row, column in np.ndindex(H, W):
        source = expected[row, column]
        colour = image[0, :, row, source].double() / 255 if source >= 0 else torch.zeros(3).double()
        torch.testing.assert_close(found.image[0, :, row, column], colour, rtol=0, atol=1e-3)
    hidden = np.zeros((H, W), dtype=bool)
    hidden[:, -2:] = True  # out of the frame
    hidden[4:8, 9:11] = True  # behind the square: columns 9 and 10 would land on 11 and 12
    np.testing.assert_array_equal(found.visible[0], ~hidden)


def test_views_of_a_batch_do_not_meet() -> None:
    image, depth = picture(2, seed=7), plane(4.0).repeat(2, 1, 1)
    motion = Motion(STILL.repeat(2, 1, 1), torch.tensor([[0.3, 0.1, 0.0], [-0.2, 0.0, 0.3]]).double())
    both = splat(image, depth, everywhere(2), CAMERA.repeat(2, 1), motion)
    for view in range(2):
        one = slice(view, view + 1)
        single = Motion(motion.rotation[one], motion.translation[one])
        alone = splat(image[one], depth[one], everywhere(), CAMERA, single)
        assert all(torch.equal(getattr(both, name)[one], getattr(alone, name)) for name in ("image", "filled", "visible"))


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor, Tensor, Tensor, Motion]:
    """A room drawn from two places: the first image and its depth, the second image, the camera, the motion between."""
    dataset = SyntheticDataset(SyntheticOptions(seed=3, train=2, test=0, height=120, width=160))
    first = replace(dataset.scene("train", "indoor-train-00001"), metering=0.0)
    one = first.camera
    turned = replace(one, yaw=one.yaw + 0.03, pitch=one.pitch - 0.02, roll=one.roll + 0.03)
    two = replace(turned, position=tuple(one.position + one.rotation() @ np.array([0.07, -0.04, 0.05])))
    (image, hits), (other, _) = render(first), render(replace(first, camera=two))
    rotation = two.rotation().T @ one.rotation()
    translation = two.rotation().T @ (np.array(one.position) - np.array(two.position))
    motion = Motion(torch.from_numpy(rotation)[None].float(), torch.from_numpy(translation)[None].float())
    k = one.intrinsics
    to_tensor: Callable[[Any], Tensor] = lambda x: torch.from_numpy(np.rint(x * 255).astype(np.uint8)).permute(2, 0, 1)[None]  # noqa: E731
    camera = torch.tensor([[k.fx, k.fy, k.cx, k.cy]], dtype=torch.float32)
    return to_tensor(image), torch.from_numpy(hits.depth)[None], to_tensor(other), camera, motion


def away(one: Tensor, other: Tensor, where: Tensor) -> float:
    return float((one - other).abs().mean(dim=1)[where].mean())


def test_a_splatted_view_is_what_the_moved_camera_sees(scene: Any) -> None:
    image, depth, other, camera, motion = scene
    second: Splatted = splat(image, depth, torch.ones_like(depth, dtype=torch.bool), camera, motion)
    assert second.filled.float().mean() > 0.8
    unmoved = away(image / 255, other / 255, second.filled)
    assert away(second.image, other / 255, second.filled) < 0.25 * unmoved


def test_true_depth_rebuilds_the_view_from_either(scene: Any) -> None:
    """There and back again, by the splatted and by the drawn second view: better than any other depth."""
    image, depth, other, camera, motion = scene
    second = splat(image, depth, torch.ones_like(depth, dtype=torch.bool), camera, motion)
    for seen in (second.image, other / 255):
        errors = {}
        for factor in (0.7, 0.9, 1.0, 1.1, 1.5):
            found, shown = inverse_warp(seen, depth * factor, camera, motion)
            there = sample(second.filled[:, None].float(), project(depth, camera, motion)[0])[:, 0] > 0.999
            errors[factor] = away(found, image / 255, shown & there & second.visible)
        assert min(errors, key=lambda factor: errors[factor]) == 1.0
        assert errors[1.0] < 0.015
        assert errors[0.9] > 1.3 * errors[1.0]
        assert errors[1.1] > 1.3 * errors[1.0]


def test_gradients_by_depth() -> None:
    generator = torch.Generator().manual_seed(8)
    rough = torch.rand(1, 3, 6, 7, dtype=torch.float64, generator=generator)
    depth = (2 + torch.rand(1, 6, 7, dtype=torch.float64, generator=generator)).requires_grad_()
    camera = torch.tensor([[9.0, 8.0, 3.1, 2.4]], dtype=torch.float64)
    motion = moved(0.11, -0.07, 0.05, turns(torch.tensor([[0.02, -0.03, 0.05]]).double()))
    assert torch.autograd.gradcheck(lambda d: inverse_warp(rough, d, camera, motion)[0], (depth,))
    view = torch.rand(1, 3, 6, 7, dtype=torch.float64, generator=generator)
    shown = torch.ones(1, 6, 7, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda d: differences(view, inverse_warp(rough, d, camera, motion)[0], shown), (depth,))


def test_dissimilarity_window_by_window() -> None:
    one, other = (torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    other[:, :, :3] = one[:, :, :3] * 0.9 + 0.05
    found = dissimilarity(one, other)
    assert found.shape == (2, 3, 3, 4)
    for view, channel, row, column in np.ndindex(*found.shape):
        a, b = (v[view, channel, row : row + 3, column : column + 3].numpy().ravel() for v in (one, other))
        cov = np.mean((a - a.mean()) * (b - b.mean()))
        luminance = (2 * a.mean() * b.mean() + 0.01**2) / (a.mean() ** 2 + b.mean() ** 2 + 0.01**2)
        structure = (2 * cov + 0.03**2) / (a.var() + b.var() + 0.03**2)
        expected = min(max((1 - luminance * structure) / 2, 0), 1)
        assert float(found[view, channel, row, column]) == pytest.approx(expected, abs=1e-12)
    assert not dissimilarity(one, one).any()


def test_pixels_that_are_not_shown_do_not_count() -> None:
    view, rebuilt = torch.rand(1, 3, 6, 6), torch.rand(1, 3, 6, 6)
    shown = torch.ones(1, 6, 6, dtype=torch.bool)
    shown[0, :, 4:] = False
    unlike, away_ = differences(view, rebuilt, shown)
    assert float(away_) == pytest.approx(float((view - rebuilt).abs()[..., :4].mean()), rel=1e-5)
    mixed = torch.cat([rebuilt[..., :4], view[..., 4:]], dim=-1)
    assert float(unlike) == pytest.approx(float(dissimilarity(view, mixed)[..., :3].mean()), rel=1e-5)
    assert [float(value) for value in differences(view, rebuilt, ~shown & shown)] == [0, 0]


def test_nothing_waits_for_the_device() -> None:
    depth = plane(3.0).float().requires_grad_()
    with NothingWaits():
        second = splat(picture(), depth, everywhere(), CAMERA, moved(0.1, 0.1, 0.1))
        found, shown = inverse_warp(second.image, depth, CAMERA, moved(0.1, 0.1, 0.1))
        sum(differences(picture() / 255, found, shown)).backward()  # type: ignore[union-attr]
    assert depth.grad is not None
    assert depth.grad.abs().sum() > 0
