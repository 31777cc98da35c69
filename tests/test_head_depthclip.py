"""DepthCLIP against a re-computation in plain loops from its equations, and the grid of heads with finer depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcd.errors import RecipeError, TextTowerError, UsageError
from pcd.heads import head_options
from pcd.heads.depthclip import DepthClipHead
from pcd.heads.words import DEPTHS, WORDS, stretched
from pcd.recipe_files import load_recipe
from pcd.stages.extract import extract
from pcd.stages.train import train
from tests.test_extract import toy_recipe
from tests.words_support import (
    CHANNELS,
    GRID,
    JOINT,
    RANGE,
    RELEASED,
    WIDTH,
    B,
    NoTexts,
    P,
    Texts,
    made,
    make_batch,
    make_columns,
    rows_of,
    slow_depths,
    unit,
)

RECIPES = Path(__file__).parent.parent / "pipelines" / "prior-art"


@pytest.mark.parametrize("column", [(*GRID, CHANNELS), (P, CHANNELS)])
def test_as_released_every_second_channel_of_unit_tokens(column: tuple[int, ...]) -> None:
    head, columns = made(DepthClipHead, {"clip/layer4": column}, Texts()).eval(), make_columns({"clip/layer4": column})
    tokens = [[unit(token)[at] for at in range(0, CHANNELS, 2)] for token in rows_of(columns["clip/layer4"])]
    texts = [unit(text) for text in rows_of(Texts().text(WORDS))]
    expected = slow_depths(tokens, texts, [1, 1.5, 2, 2.25, 2.5, 2.75, 3], 100 / 0.1)
    np.testing.assert_allclose(head.depth(columns).reshape(-1), expected, rtol=1e-4)


def test_order_put_right_compares_cosines() -> None:
    head = made(DepthClipHead, RELEASED, Texts(), normalise="after", logit_scale=1.0).eval()
    columns = make_columns(RELEASED)
    tokens = [unit(token[::2]) for token in rows_of(columns["clip/layer4"])]
    texts = [unit(text) for text in rows_of(Texts().text(WORDS))]
    expected = slow_depths(tokens, texts, DEPTHS, 1 / 0.1)
    np.testing.assert_allclose(head.depth(columns).reshape(-1), expected, rtol=1e-5)


def test_in_the_joint_space_no_channel_is_left_out() -> None:
    head, columns = made(DepthClipHead, JOINT, Texts(), space="joint").eval(), make_columns(JOINT)
    tokens = [unit(token) for token in rows_of(columns["clip/patch"])]
    texts = [unit(text) for text in rows_of(Texts().text(WORDS))]
    expected = slow_depths(tokens, texts, DEPTHS, 1000)
    np.testing.assert_allclose(head.depth(columns).reshape(-1), expected, rtol=1e-4)


def test_every_second_channel_is_what_nearest_interpolation_takes() -> None:
    """Both released codes resize the channel axis by nearest neighbour, one by a factor and one to a size."""
    tokens = make_columns(RELEASED)["clip/layer4"].flatten(1, 2).float()
    for options in ({"scale_factor": 0.5}, {"size": CHANNELS // 2}):
        assert torch.equal(F.interpolate(tokens, **options), tokens[..., ::2])


def test_the_prompts_are_those_of_the_paper() -> None:
    texts = Texts()
    made(DepthClipHead, RELEASED, texts)
    words = ["giant", "extremely close", "close", "not in distance", "a little remote", "far", "unseen"]
    assert texts.asked == [tuple(f"This object is {word}" for word in words)]


def test_other_words_and_depths() -> None:
    options: dict[str, Any] = {"template": "{depth} from a {object}", "object_word": "camera", "words": ["1 m", "5 m"]}
    texts = Texts()
    head = made(DepthClipHead, RELEASED, texts, **options, depths=[1, 5.0])
    assert texts.asked == [("1 m from a camera", "5 m from a camera")]
    assert head.distribution(make_columns(RELEASED)).centres.tolist() == [1, 5]


def test_nothing_is_trained_and_the_texts_are_saved() -> None:
    head, columns = made(DepthClipHead, RELEASED, Texts()), make_columns(RELEASED)
    assert head.phases() == ()
    assert [(name, tuple(value.shape)) for name, value in head.state_dict().items()] == [("text", (7, WIDTH))]
    other = DepthClipHead(head.options, RELEASED, GRID)
    other.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(other.depth(columns), head.depth(columns))
    with pytest.raises(UsageError, match="not trained"):
        head.losses(make_batch(RELEASED), "depth")


def test_the_distribution_has_the_depth_as_its_mean() -> None:
    head, columns = made(DepthClipHead, RELEASED, Texts(), temperature=10.0).eval(), make_columns(RELEASED)
    found = head.distribution(columns)
    assert found.probabilities.shape == (B, P, 7)
    torch.testing.assert_close(found.probabilities.sum(dim=-1), torch.ones(B, P))
    torch.testing.assert_close(found.mean, head.depth(columns))
    assert float(found.std.min()) > 0


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"clip/layer4": (*GRID, 7)}, {}, "has 7 channels"),
        ({"clip/layer4": (9,)}, {}, "one vector a view"),
        ({"clip/layer4": (*GRID, 8)}, {}, 'are 6 wide, and 7 of width 4.*use space = "joint"'),
        (RELEASED, {"template": "This is far"}, "{depth} is missing"),
    ],
)
def test_what_cannot_be_compared_is_refused(shapes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(DepthClipHead, shapes, Texts(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["near", "far"]}, "7 depths for 2 words"),
        ({"depths": [1, 2, 3, 4, 5, 6, 11]}, "between min_depth = 0.1 and max_depth = 10"),
        ({"tempature": 1.0}, "Did you mean 'temperature'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        head_options({"name": "depthclip", **RANGE, **options})


def test_weights_without_a_text_tower_say_so() -> None:
    with pytest.raises(TextTowerError, match="This object is giant"):
        made(DepthClipHead, RELEASED, NoTexts())


@pytest.mark.parametrize(("count", "factor"), [(13, 32), (2, 2), (1, 3), (5, 1)])
def test_interpolation_is_torchs_with_aligned_corners(count: int, factor: int) -> None:
    values = torch.randn(1, 1, count, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, size=count * factor, mode="linear", align_corners=True)
    torch.testing.assert_close(stretched(count, factor) @ values[0, 0], expected[0, 0])


def test_a_cache_of_the_joint_space_is_scored_without_training(tmp_path: Path) -> None:
    """Extraction stores the texts that the head asks for; training validates and keeps the head; nothing is learned."""
    head = {"name": "depthclip", "space": "joint", **RANGE}
    recipe = toy_recipe(head=head, train={"epochs": 3, "batch_size": 4})
    cache = extract(recipe, tmp_path / "cache", device="cpu").cache
    run = train(recipe, cache, tmp_path / "run", device="cpu")
    assert len(run.history) == 1
    found, _ = run.load_head("last", torch.device("cpu"))
    depths = found.depth({"clip/patch": torch.from_numpy(cache.table("val").column("clip/patch").read([0]))})
    assert 1 <= float(depths.min()) <= float(depths.max()) <= 3
    bare = toy_recipe(head=head, encoder={"text": False})
    bare_cache = extract(bare, tmp_path / "bare", device="cpu").cache
    with pytest.raises(TextTowerError, match="no text tower"):
        train(bare, bare_cache, tmp_path / "bare-run", device="cpu")


@pytest.mark.parametrize("name", ["depthclip", "depthclip-joint", "depthclip-adapter", "auty", "auty-log256", "hu"])
def test_recipes_read_what_an_rn50_gives_and_describe_themselves(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    cls, options = head_options(recipe.head, name)
    shapes = {"rn50/layer4": (13, 17, 2048), "rn50/patch": (221, 1024), "rn50/cls": (1024,)}
    head = cls(options, {column: shapes[column] for column in cls.reads(options)}, (13, 17))
    factor = getattr(options, "upsample", 1)
    assert head.grid == cls.output_grid(options, shapes, (13, 17)) == (13 * factor, 17 * factor)
    assert recipe.views.canvas == (416, 544)
    assert recipe.encoder["prefix"] == "rn50"
    assert recipe.description
