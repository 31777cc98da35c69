"""Segments from masks, and the encoder around a tiny Segment Anything network where transformers is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcd.encoders import create_encoder, request_of
from pcd.encoders.segments import Masks, Rules, boxes, distinct, numbered, point_grid, stable
from pcd.errors import RecipeError, TextTowerError, UsageError, WeightsError

SIZE = (48, 64)
LOOSE: dict[str, Any] = {"weights": "random", "points": 6, "min_score": -9.0, "min_stability": 0.0}


def random_masks(number: int, size: tuple[int, int] = (7, 9), seed: int = 0) -> Masks:
    """Rectangles and single pixels, some of them equal."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((number, *size), dtype=bool)
    for mask in pixels:
        (y0, y1), (x0, x1) = (np.sort(generator.integers(0, side, 2)) for side in size)
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
        mask[y0, x0 : (x0 + x1) // 2] = False
    return Masks(torch.tensor(pixels), torch.tensor(generator.integers(0, 6, number) / 6))


def box_of(mask: Any) -> tuple[int, int, int, int]:
    found = [(y, x) for y, x in np.ndindex(*mask.shape) if mask[y, x]]
    return min(x for _, x in found), max(x for _, x in found), min(y for y, _ in found), max(y for y, _ in found)


def overlap(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes, counted pixel by pixel."""
    first, second = ({(x, y) for x in range(b[0], b[1] + 1) for y in range(b[2], b[3] + 1)} for b in (one, two))
    return len(first & second) / len(first | second)


def test_numbers_are_those_of_painting_from_the_largest_on() -> None:
    pixels = random_masks(12).pixels
    areas = [int(mask.sum()) for mask in pixels]
    expected = np.zeros((7, 9), dtype=int)
    for number, place in enumerate(sorted(range(12), key=lambda m: -areas[m]), start=1):
        for y, x in np.ndindex(7, 9):
            if pixels[place, y, x]:
                expected[y, x] = number
    found = numbered(pixels)
    assert found.dtype == torch.uint16
    np.testing.assert_array_equal(found.numpy(), expected)
    assert not numbered(torch.zeros(0, 7, 9, dtype=torch.bool)).to(torch.int64).any()
    whole, half = torch.ones(7, 9, dtype=torch.bool), torch.arange(9).expand(7, 9) < 4
    assert numbered(torch.stack([half, whole])).tolist() == [[2] * 4 + [1] * 5] * 7


def test_boxes_hold_their_masks() -> None:
    masks = random_masks(20).pixels
    assert boxes(masks).tolist() == [list(box_of(mask)) for mask in masks]
    assert boxes(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("limit", [0.3, 0.7, 1.0])
def test_of_masks_with_one_box_the_surest_stays(limit: float) -> None:
    masks = random_masks(25)
    order = sorted(range(25), key=lambda m: -float(masks.scores[m]))
    stays: list[int] = []
    for place in order:
        if all(overlap(box_of(masks.pixels[place]), box_of(masks.pixels[other])) <= limit for other in stays):
            stays.append(place)
    found = distinct(masks, limit)
    assert torch.equal(found.pixels, masks.pixels[stays])
    assert torch.equal(found.scores, masks.scores[stays])
    assert (len(stays) < 25) == (limit < 1)


def test_masks_that_hang_on_the_threshold_go() -> None:
    logits = torch.randn(30, 6, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 9, 30)[:, None, None]
    logits[3] = -5.0
    kept = []
    for number, mask in enumerate(logits.tolist()):
        values = [value for row in mask for value in row]
        inner, outer = sum(value > 1 for value in values), sum(value > -1 for value in values)
        if inner >= 0.6 * outer and any(value > 0 for value in values):
            kept.append(number)
    found = stable(logits, torch.arange(30.0), Rules(0.0, 0.6, 0.7))
    assert 3 < len(kept) < 30
    assert found.scores.tolist() == kept
    assert torch.equal(found.pixels, logits[kept] > 0)


def test_points_are_the_centres_of_cells() -> None:
    assert point_grid(2, (4, 12)).tolist() == [[3, 1], [9, 1], [3, 3], [9, 3]]


def test_what_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Unknown model 'vit-bas' of encoder sam\. Did you mean 'vit-base'"):
        request_of("sam:vit-bas", {})
    with pytest.raises(WeightsError, match="is not there"):
        request_of("sam", {"weights": str(tmp_path / "sam.safetensors")})
    with pytest.raises(RecipeError, match="min_stability = 2"):
        request_of("sam", {"min_stability": 2})
    assert request_of("sam", {"weights": "random", "seed": 4})["model"] == "vit-base"
    assert request_of("sam", {}) != request_of("sam", {"points": 16})
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else known(name, *rest))
    with pytest.raises(UsageError, match=r"needs the package transformers.*pip install \"pcd-depth\[sam\]\""):
        create_encoder("sam:pcd-demo", LOOSE, SIZE, "cpu")


def make(**options: Any) -> Any:
    pytest.importorskip("tokenizers", reason="transformers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return create_encoder("sam:pcd-demo", {**LOOSE, **options}, SIZE, "cpu")


def test_a_view_becomes_a_map_of_numbers() -> None:
    encoder, views = make(), torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    (column,) = encoder.columns
    found = encoder.encode(views)[column.name]
    assert (column.name, column.shape, column.dtype, encoder.grid) == ("sam/segments", SIZE, "uint16", SIZE)
    assert (found.dtype, found.shape) == (torch.uint16, (2, *SIZE))
    assert found.to(torch.int64).max() > 0
    assert torch.equal(encoder.encode(views[1:])[column.name][0], found[1])  # a view's masks do not depend on its company
    assert not make(min_score=99.0).encode(views)[column.name].to(torch.int64).any()
    with pytest.raises(TextTowerError):
        encoder.embed_text(["far"])
    with pytest.raises(UsageError, match=r"expected torch\.float32"):
        encoder.encode(views[:, :, :-1])


def test_masks_come_back_to_where_the_points_are() -> None:
    """A network that answers every point with a disc around it, in the coordinates that Segment Anything uses."""
    encoder = make(points=3, min_score=0.5)
    side = encoder._side

    class Discs(torch.nn.Module):
        def get_image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.shape[-2:] == (side, side)
            assert not pixels[:, :, encoder._resized[0] :].any()
            return pixels

        def forward(self, image_embeddings: Any, input_points: Any, input_labels: Any, multimask_output: bool) -> Any:
            place = (torch.arange(32) + 0.5) * side / 32
            x, y = input_points[..., 0, 0], input_points[..., 0, 1]
            away = ((place - x[..., None, None]) ** 2 + (place[:, None] - y[..., None, None]) ** 2).sqrt()
            logits = (9 - away)[:, :, None].expand(-1, -1, 3, -1, -1)
            scores = torch.tensor([0.9, 0.4, 0.3]).expand(*logits.shape[:3])
            return type("Answer", (), {"pred_masks": logits, "iou_scores": scores})

    encoder._network = Discs()
    found = encoder.encode(torch.rand(1, 3, *SIZE))["sam/segments"][0].numpy()
    centres = [(8 + 16 * row, round((column + 0.5) * 64 / 3)) for row in range(3) for column in range(3)]
    assert len({int(found[y, x]) for y, x in centres}) == 9
    assert all(found[y, x] > 0 for y, x in centres)
    assert found[16, 32] == 0  # between them
    assert found.max() == 9


def test_input_points_and_masks_are_those_of_transformers() -> None:
    """Its own processing of images (8-bit, so one step of 255 apart), points and masks, for a view that is wider than high."""
    encoder = make()
    theirs = pytest.importorskip("transformers.models.sam.image_processing_pil_sam", reason="another transformers")
    sizes = {"pad_size": {"height": 128, "width": 128}, "mask_size": {"longest_edge": 32}}
    processor = theirs.SamImageProcessorPil(size={"longest_edge": 128}, mask_pad_size={"height": 32, "width": 32}, **sizes)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")
    found = encoder._input(image[None].float() / 255)
    assert float((found - expected["pixel_values"]).abs().max()) <= 1.01 / 255 / 0.224
    logits = torch.randn(1, 5, 32, 32, generator=torch.Generator().manual_seed(1))
    sizes_of = (expected["original_sizes"], expected["reshaped_input_sizes"])
    (masks,) = processor.post_process_masks([logits], *sizes_of, binarize=False)
    torch.testing.assert_close(encoder._on_view(logits[0]), masks[0])
    grid = theirs._build_point_grid(6) * np.array([[128, 96]])
    np.testing.assert_allclose(point_grid(6, encoder._resized).numpy(), grid, atol=1e-4)


def test_weights_are_found_again(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint()["weights"] != other.fingerprint()["weights"]
    file, views = tmp_path / "tiny.safetensors", torch.rand(1, 3, *SIZE)
    state = {name: value.clone() for name, value in first._network.state_dict().items()}
    del state["prompt_encoder.shared_embedding.positional_embedding"]  # one tensor under two names
    save_file(state, file)
    loaded = make(weights=str(file), seed=3)
    assert torch.equal(loaded.encode(views)["sam/segments"], first.encode(views)["sam/segments"])
    assert not loaded.random_weights
    state.pop("mask_decoder.iou_token.weight")
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"does not fit sam:pcd-demo: tensors 1 missing \(mask_decoder\.iou_token\.weight\)"):
        make(weights=str(file))
    with pytest.raises(UsageError, match="no published weights"):
        make(weights="auto")
