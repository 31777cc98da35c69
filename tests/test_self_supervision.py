"""The photometric loss: what it learns from parallax, why the published one cannot, and two heads that use it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.heads.base import Batch, HeadOptions, PatchTargets
from pcd.heads.depthclip_adapter import DepthClipAdapterHead
from pcd.heads.msa import MsaHead
from pcd.heads.self_supervision import PhotometricLoss, SelfSupervision, between
from pcd.recipe import parse_recipe
from pcd.recipe_files import load_recipe
from pcd.stages.extract import extract
from pcd.stages.train import train
from tests import test_head_msa as msa
from tests.dense_support import RANGE, targets
from tests.test_extract import toy_recipe
from tests.test_head_options import NothingWaits
from tests.words_support import Texts, made, make_batch

B, H, W, TRUE = 3, 24, 32, 3.0
PUBLISHED: dict[str, Any] = {"second_view": "image-motion", "focal": "published", "ssim_sign": "published"}
NO_PARALLAX: dict[str, Any] = {"second_view": "image-motion"}
CPU = torch.device("cpu")


def texture() -> Tensor:
    """Soft random blobs `(B, H, W, 3)`."""
    random = np.random.default_rng(0).random((B, H, W, 3))
    soft = np.stack([cv2.GaussianBlur(image, (0, 0), 1.7) for image in random])
    return torch.from_numpy(np.rint(255 * np.clip((soft - soft.mean()) / soft.std() * 0.2 + 0.5, 0, 1)).astype(np.uint8))


COLUMNS = {"pixels/rgb": texture(), "view/intrinsics": torch.tensor([[40.0, 40.0, W / 2, H / 2]]).repeat(B, 1)}


def known(metres: float | Tensor, valid: Tensor | None = None) -> PatchTargets:
    depth = (torch.zeros(B, H, W) + metres).reshape(B, -1).numpy()
    there = np.ones_like(depth, dtype=bool) if valid is None else valid.reshape(B, -1).numpy()
    return PatchTargets.from_host(there.astype(np.float32), depth, 0 * depth, there, device=CPU)


def photometric(grid: tuple[int, int] = (H, W), **settings: Any) -> PhotometricLoss:
    options = HeadOptions.model_validate(RANGE)
    return PhotometricLoss(SelfSupervision.model_validate(settings), {"pixels/rgb": (H, W, 3)}, grid, options)


def mean_loss(metres: float, draws: int = 8, term: str = "photometric", truth: float = TRUE, **settings: Any) -> float:
    """Of a constant depth, over the same motions each time."""
    loss, depth = photometric(**settings), torch.full((B, H * W), metres)
    torch.manual_seed(1)
    return float(np.mean([float(loss.losses(depth, COLUMNS, known(truth))[term]) for _ in range(draws)]))


def learnt(start: float, **settings: Any) -> float:
    """The constant depth that gradients lead to."""
    loss, target = photometric(**settings), known(TRUE)
    log = torch.tensor(math.log(start), requires_grad=True)
    optimiser = torch.optim.Adam([log], lr=0.05)
    torch.manual_seed(2)
    for _ in range(70):
        optimiser.zero_grad()
        loss.losses(log.exp().expand(B, H * W), COLUMNS, target)["total"].backward()
        optimiser.step()
    return math.exp(float(log.detach()))


def test_true_depth_is_the_best_with_parallax() -> None:
    best = mean_loss(TRUE, translation=0.3)
    assert best < 0.02
    assert mean_loss(0.9 * TRUE, translation=0.3) > 1.5 * best
    assert mean_loss(1.1 * TRUE, translation=0.3) > 1.5 * best


@pytest.mark.parametrize("start", [2.0, 4.5])
def test_metric_depth_of_a_plane_follows_from_parallax(start: float) -> None:
    assert learnt(start, translation=0.3) == pytest.approx(TRUE, rel=0.02)


def test_the_published_loss_says_nothing_about_the_scene() -> None:
    """It is the same for any true depth, its true depth is no minimum, and the constant it knows, 1, is where it is worst."""
    around = [mean_loss(factor * TRUE, **PUBLISHED) for factor in (0.9, 1.0, 1.1)]
    assert around[0] > around[1] > around[2]
    assert mean_loss(2.0, **PUBLISHED) == mean_loss(2.0, truth=7.0, **PUBLISHED)
    depths = [0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0]
    assert max(depths, key=lambda depth: mean_loss(depth, **PUBLISHED)) == 1.0
    assert min(depths, key=lambda depth: mean_loss(depth, **{**PUBLISHED, "ssim_sign": "right"})) == 1.0
    assert mean_loss(1.0, term="ssim", **NO_PARALLAX) < 0.01


def test_the_published_loss_does_not_find_the_plane() -> None:
    assert learnt(TRUE, **PUBLISHED) > 1.2 * TRUE  # away from where it would have been right
    assert learnt(0.8, **PUBLISHED) < 0.6
    assert learnt(2.0, **{**PUBLISHED, "ssim_sign": "right"}) == pytest.approx(1.0, rel=0.02)


def test_a_turn_of_the_image_has_no_gradient_by_depth() -> None:
    sizes = []
    for shift in (0.0, 5.0):
        depth = (1 + 3 * torch.rand(B, H * W, generator=torch.Generator().manual_seed(3))).requires_grad_()
        photometric(image_shift=shift, smoothness=0.0, **NO_PARALLAX).losses(depth, COLUMNS, known(TRUE))["total"].backward()
        assert depth.grad is not None
        sizes.append(float(depth.grad.abs().sum()))
    assert sizes[0] < 1e-4 * sizes[1]


def test_the_focal_length_cancels() -> None:
    for depth in (0.7, 1.0, 3.0):
        assert mean_loss(depth, focal="published", **NO_PARALLAX) == pytest.approx(mean_loss(depth, **NO_PARALLAX), abs=2e-3)


def test_the_motion_is_among_those_that_opencv_finds_in_the_homography() -> None:
    loss = photometric(**PUBLISHED)
    cameras = loss.cameras({}, torch.zeros(B, H, W))
    assert cameras.tolist() == [pytest.approx([0.015, 0.015, W / 2, H / 2])] * B
    draws = 2 * torch.rand(B, 6, generator=torch.Generator().manual_seed(4)) - 1
    motion = loss.image_motion(draws, cameras)
    for view in range(B):
        angle = float(draws[view, 2]) * 10
        pixels = np.vstack([cv2.getRotationMatrix2D((W / 2, H / 2), -angle, 1.0), [0, 0, 1]])
        pixels[:2, 2] += 10 * draws[view, :2].numpy()
        k = np.array([[0.015, 0, W / 2], [0, 0.015, H / 2], [0, 0, 1]])
        _, rotations, translations, normals = cv2.decomposeHomographyMat(pixels, k)
        own = motion.rotation[view].double().numpy(), motion.translation[view].double().numpy()
        fits = [
            np.allclose(r, own[0], atol=1e-4)
            and np.allclose(t[:, 0], own[1], atol=1e-2)
            and np.allclose(n[:, 0], [0, 0, 1], atol=1e-4)
            for r, t, n in zip(rotations, translations, normals, strict=True)
        ]
        assert sum(fits) == 1


@pytest.mark.parametrize("ssim", ["right", "published"])
@pytest.mark.parametrize("sign", ["minus", "paper"])
def test_terms_add_up_as_equations_6_and_7(ssim: str, sign: str) -> None:
    depth = 2 + 2 * torch.rand(B, H * W, generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {"ssim_sign": ssim, "smoothness_sign": sign, "smoothness": 0.3, "alpha": 0.7}
    found = {name: float(value) for name, value in photometric(**settings).losses(depth, COLUMNS, known(TRUE)).items()}
    structure = found["ssim"] if ssim == "right" else (1 - found["ssim"]) / 2
    assert found["photometric"] == pytest.approx(0.7 * structure + 0.3 * found["l1"], rel=1e-5)
    assert found["total"] == pytest.approx(found["photometric"] + 0.3 * found["smoothness"], rel=1e-5)
    maps, image = depth.reshape(B, H, W).double().numpy(), COLUMNS["pixels/rgb"].double().numpy() / 255
    power = -1 if sign == "minus" else 1
    beside = np.abs(np.diff(maps, axis=2)) * np.exp(power * np.linalg.norm(np.diff(image, axis=2), axis=-1))
    below = np.abs(np.diff(maps, axis=1)) * np.exp(power * np.linalg.norm(np.diff(image, axis=1), axis=-1))
    assert found["smoothness"] == pytest.approx((beside.sum() + below.sum()) / maps.size, rel=1e-5)


def test_coarse_depths_come_to_the_view_by_the_centres_of_cells() -> None:
    maps = torch.rand(B, 6, 4, generator=torch.Generator().manual_seed(6))
    expected = F.interpolate(maps[:, None], size=(H, W), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(photometric((6, 4)).on_view(maps), expected)
    assert torch.equal(between(5, 5), torch.eye(5))


def coarse(metres: float) -> PatchTargets:
    """Cells of 6x8 with one depth, and one that has none."""
    valid = np.ones((B, 6 * 8), dtype=bool)
    valid[:, 2 * 8 + 3] = False
    mean = np.where(valid, metres, 0.0).astype(np.float32)
    return PatchTargets.from_host(valid.astype(np.float32), mean, 0 * mean, valid, device=CPU)


def test_ground_truth_between_cells_is_that_of_the_known_ones() -> None:
    depth, there = photometric((6, 8)).truth(coarse(4.0))
    torch.testing.assert_close(depth[there], torch.full_like(depth[there], 4.0))
    assert not there[:, 9:11, 13:15].any()
    assert there[:, :8].all()


def test_pixels_without_ground_truth_do_not_count() -> None:
    valid = torch.ones(B, H, W, dtype=torch.bool)
    valid[:, :, W // 2 :] = False
    depth = torch.full((B, H, W), TRUE, requires_grad=True)
    loss = photometric(smoothness=0.0)
    loss.losses((1.2 * depth).flatten(1), COLUMNS, known(TRUE, valid))["total"].backward()
    assert depth.grad is not None
    assert depth.grad[:, 2:-2, 4 : W // 2 - 4].abs().sum() > 0
    assert not depth.grad[:, :, W // 2 + 1 :].any()
    nothing = known(TRUE, torch.zeros_like(valid))
    assert not loss.losses(depth.flatten(1), COLUMNS, nothing)["total"].requires_grad


def test_hidden_pixels_and_holes_do_not_count() -> None:
    """With a square at 2 m before a wall at 4 m true depths rebuild all that a second camera sees."""
    depth = torch.full((B, H, W), 4.0)
    depth[:, 8:16, 10:20] = 2.0
    loss = photometric(translation=0.3, rotation=0.0)
    torch.manual_seed(1)
    assert np.mean([float(loss.losses(depth.flatten(1), COLUMNS, known(depth))["ssim"]) for _ in range(10)]) < 0.012


def test_nothing_is_nearer_than_what_the_second_view_can_show() -> None:
    loss = PhotometricLoss(SelfSupervision(), {"pixels/rgb": (H, W, 3)}, (H, W), HeadOptions(min_depth=0.001, max_depth=10.0))
    found = []
    for metres in (0.001, 0.1):
        torch.manual_seed(1)
        found.append(float(loss.losses(torch.full((B, H * W), metres), COLUMNS, known(TRUE))["total"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_depths_beyond_the_range_still_learn() -> None:
    found = []
    for metres in (10.0, 25.0):
        torch.manual_seed(7)
        depth = torch.full((B, H * W), metres, requires_grad=True)
        total = photometric(translation=0.5).losses(depth, COLUMNS, known(TRUE))["total"]
        total.backward()
        assert depth.grad is not None
        found.append((float(total.detach()), float(depth.grad.sum())))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][1] > 0  # nearer is better


class Rows(Texts):
    """A context of batches."""

    def batches(self) -> Iterator[Batch]:
        yield from self.rows


def test_views_without_a_camera_are_refused() -> None:
    cameras = COLUMNS["view/intrinsics"].clone()
    fine, lost = (
        Batch({"view/intrinsics": c}, {}) for c in (cameras, torch.where(torch.arange(B)[:, None] == 1, math.nan, cameras))
    )
    photometric().check(Rows(batches=[fine]))
    with pytest.raises(
        RecipeError, match=r"unknown \(NaN\) in 1 of 6 training views: the dataset does not give its intrinsics"
    ):
        photometric().check(Rows(batches=[fine, lost]))
    photometric(**PUBLISHED).check(Rows(batches=[lost]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"focal": "published"}, "a second camera of 0.015 pixels sees no parallax"),
        ({"second_view": "none"}, "second_view"),
        ({"alpha": 2.0}, "alpha"),
    ],
)
def test_settings_that_cannot_be_used(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        head_options({"name": "msa", **RANGE, "supervision": "self", "self_supervision": table})


def test_the_picture_must_be_a_picture() -> None:
    options = HeadOptions.model_validate(RANGE)
    for shape, grid in (((H, W), (2, 2)), ((H, W, 4), (2, 2)), ((H, W, 3), (H, W + 1))):
        with pytest.raises(RecipeError, match="expected the view"):
            PhotometricLoss(SelfSupervision(), {"pixels/rgb": shape}, grid, options)


@pytest.mark.parametrize("name", ["depthclip-adapter-self", "msa-self", "msa-self-published"])
def test_recipes_name_the_columns(name: str) -> None:
    cls, options = head_options(load_recipe(f"prior-art/{name}").head)
    extra = {"pixels/rgb"} if name.endswith("published") else {"pixels/rgb", "view/intrinsics"}
    assert extra <= set(cls.learns_from(options))
    assert "view/intrinsics" not in cls.reads(options)


def msa_head(**settings: Any) -> tuple[MsaHead, Batch]:
    torch.manual_seed(0)
    options = MsaHead.Options.model_validate({**RANGE, "supervision": "self", "self_supervision": settings})
    head = MsaHead(options, msa.SHAPES, msa.GRID)
    cameras = torch.tensor([[50.0, 50.0, 31.5, 15.5]]).repeat(msa.B, 1)
    batch = Batch({**msa.make_columns(), "view/intrinsics": cameras}, {"depth": targets(msa.B, msa.OUT, share=0.95)})
    if "focal" not in settings:
        lost = Batch({"view/intrinsics": cameras * math.nan}, {})
        with pytest.raises(RecipeError, match="needs the camera of every view"):
            head.initialise(Rows(batches=[lost]))
    head.initialise(Rows(batches=[batch]))
    return head, batch


@pytest.mark.parametrize("settings", [{}, PUBLISHED])
def test_the_multi_scale_adapter_learns_by_itself(settings: dict[str, Any]) -> None:
    head, batch = msa_head(start=4.0, **settings)
    assert head.state_dict().keys() == msa.make_head().state_dict().keys()
    assert float(head.metres(batch.columns).detach().mean()) == pytest.approx(4.0, abs=1.0)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        head.zero_grad()
        with NothingWaits():
            losses = head.losses(batch, "depth")
            losses["total"].backward()
        found.append(float(losses["total"].detach()))
        assert all(value.grad is not None and value.grad.isfinite().all() for value in head.parameters())
    assert found[0] == found[1]
    assert float(head.losses(batch, "depth")["total"].detach()) != found[0]  # another motion


def test_the_adapter_learns_by_itself() -> None:
    shapes = {"clip/layer4": (2, 3, 12), "pixels/rgb": (16, 24, 3)}
    options: dict[str, Any] = {"image": {"reduction": 4}, "text": {"reduction": 3}, "upsample": 4, "supervision": "self"}
    batch = make_batch(shapes, cells=8 * 12)
    columns = {**batch.columns, "view/intrinsics": torch.tensor([[20.0, 20.0, 11.5, 7.5]]).repeat(3, 1)}
    batch = Batch(columns, batch.targets)
    head = made(DepthClipAdapterHead, shapes, Rows(batches=[batch]), **options)
    with NothingWaits():
        losses = head.losses(batch, "depth")
        losses["total"].backward()
    assert losses.keys() == {"total", "photometric", "ssim", "l1", "smoothness"}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in head.parameters())
    lost = Batch({**columns, "view/intrinsics": torch.full((3, 4), math.nan)}, batch.targets)
    with pytest.raises(RecipeError, match="needs the camera of every view"):
        made(DepthClipAdapterHead, shapes, Rows(batches=[lost]), **options)


def test_places_keep_their_precision_under_autocast() -> None:
    found = []
    for enabled in (False, True):
        torch.manual_seed(9)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = photometric((6, 8)).losses(torch.full((B, 48), 2.9), COLUMNS, coarse(TRUE))["total"]
        found.append(float(total))
    assert found[0] == found[1]


def test_trained_from_a_cache_and_resumed(tmp_path: Path) -> None:
    adapters = {"image": {"reduction": 1, "weight": 0.8}, "text": {"reduction": 1}, "upsample": 4}
    words = {"name": "depthclip-adapter", "space": "joint", **RANGE, "depths": [1, 2, 3, 4, 5, 7, 9]}
    table = {**words, **adapters, "supervision": "self", "self_supervision": {"translation": 0.4}}
    recipe = toy_recipe(head=table, encoders={"pixels": {"name": "pixels"}}, train={"epochs": 3, "batch_size": 8})
    cache = extract(recipe, tmp_path / "cache", device="cpu").cache
    run = train(recipe, cache, tmp_path / "run", device="cpu")
    assert all(math.isfinite(epoch["losses"]["depth/photometric"]) for epoch in run.history)
    shorter = parse_recipe({**recipe.model_dump(exclude_none=True), "train": {"epochs": 1, "batch_size": 8}}, "test")
    train(shorter, cache, tmp_path / "other", device="cpu")
    train(recipe, cache, tmp_path / "other", device="cpu")
    first, second = (load_file(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("run", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
