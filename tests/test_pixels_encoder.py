"""The view itself as a column, bit for bit, through a real extraction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pcd.cache.verify import verify_cache
from pcd.encoders import create_encoder, request_of
from pcd.encoders.pixels import PixelEncoder
from pcd.errors import TextTowerError, UsageError
from pcd.stages.extract import extract
from pcd.stages.inspect import inspect_cache
from tests.test_extract import toy_recipe
from tests.toy import ToyDataset

SIZE = (8, 12)


def make(size: tuple[int, int] = SIZE, **options: Any) -> PixelEncoder:
    encoder = create_encoder("pixels", options, size, "cpu")
    assert isinstance(encoder, PixelEncoder)
    return encoder


def as_views(rgb: np.ndarray) -> torch.Tensor:
    """As `pcd.views.image_canvas` scales them, channels first."""
    return torch.from_numpy((rgb.astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2).copy())


def test_every_8_bit_value_comes_out_as_it_was():
    rgb = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    rgb[..., 1], rgb[..., 2] = rgb[..., 1][:, ::-1], rgb[..., 2].transpose(0, 2, 1)
    found = make((16, 16)).encode(as_views(rgb))["pixels/rgb"]
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), rgb)


def test_values_between_are_rounded_half_to_even():
    levels = torch.tensor([0.0, 0.2, 0.499, 0.501, 254.4, 254.6, 255.0, 17.3])
    views = (levels / 255).reshape(1, 1, 2, 4).repeat(1, 3, 1, 1)
    assert make((2, 4)).encode(views)["pixels/rgb"][0, :, :, 0].flatten().tolist() == [0, 0, 0, 1, 254, 255, 255, 17]


@pytest.mark.parametrize("stride", [2, 4])
def test_a_stride_is_the_mean_of_pixels_rounded_half_up(stride):
    rgb = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    encoder = make(stride=stride)
    found = encoder.encode(as_views(rgb))["pixels/rgb"].numpy()
    assert encoder.grid == (SIZE[0] // stride, SIZE[1] // stride)
    assert found.shape == (3, *encoder.grid, 3)
    for view in range(3):
        for row in range(encoder.grid[0]):
            for column in range(encoder.grid[1]):
                cell = rgb[view, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
                expected = np.floor(cell.reshape(-1, 3).sum(axis=0) / stride**2 + 0.5)
                np.testing.assert_array_equal(found[view, row, column], expected)


def test_what_cannot_be_used_is_refused():
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("pixels:big", {}, "there are no models of it"),
        ("pixels", {"weights": "random"}, "has no weights, but encoder.weights is 'random'"),
        ("pixels", {"stride": 5}, r"cells of 5 pixels, .* height 8; the nearest that fits is 5 or 10"),
    ]
    for name, options, message in wrong:
        with pytest.raises(UsageError, match=message):
            create_encoder(name, options, SIZE, "cpu")
    views = torch.rand(2, 3, *SIZE)
    for value in (1.01, -0.01, torch.nan):
        views[1, 2, 3, 4] = value
        with pytest.raises(UsageError, match=r"not numbers in \[0, 1\]"):
            make().encode(views)
    with pytest.raises(UsageError, match=r"expected torch\.float32 \(B, 3, 8, 12\)"):
        make().encode(torch.rand(2, 3, 12, 8))
    with pytest.raises(TextTowerError):
        make().embed_text(["red"])


def test_what_it_says_of_itself():
    encoder = make(stride=2, prefix="half")
    assert [(spec.name, spec.shape, spec.dtype, spec.dims) for spec in encoder.columns] == [
        ("half/rgb", (4, 6, 3), "uint8", ("y", "x", "channel"))
    ]
    assert (encoder.has_text, encoder.random_weights) == (False, False)
    assert encoder.fingerprint()["weights"] == {"kind": "none", "digest": ""}
    assert encoder.fingerprint() != make(prefix="half").fingerprint()
    assert request_of("pixels", {"stride": 2}) != request_of("pixels", {})
    views = torch.rand(1, 3, *SIZE)
    assert torch.equal(encoder.network()(views)["half/rgb"], encoder.encode(views)["half/rgb"])


def test_an_extraction_holds_the_tiles_and_their_mirror_images(tmp_path):
    """Canvas and frame have one size, so nothing is resized: the rows are the frame's own pixels."""
    recipe = toy_recipe(views={"canvas": [24, 40], "grid": [1, 2]}, encoder={"name": "pixels"})
    recipe = recipe.model_copy(update={"encoder": {"name": "pixels"}})
    cache = extract(recipe, tmp_path, device="cpu", batch_views=3).cache
    assert verify_cache(cache) == []
    table = cache.table("test")
    dataset = ToyDataset(ToyDataset.Options())
    for number, key in enumerate(table.keys):
        rgb = dataset.load("test", key).rgb
        left, right = rgb[:, :20], rgb[:, 20:]
        rows = table.column("pixels/rgb").read(table.view_rows(np.array([number]))[0])
        expected = np.stack([left, right, right[:, ::-1], left[:, ::-1]])
        np.testing.assert_array_equal(rows, expected)
    facts = inspect_cache(cache)["facts"]
    assert facts["encoder 1"].startswith("pixels:rgb, none weights")
    assert "random" not in facts["notes"]
