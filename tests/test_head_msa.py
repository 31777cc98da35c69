"""The multi-scale adapter against loops over its definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pcd.errors import RecipeError
from pcd.heads import head_options
from pcd.heads.base import Batch
from pcd.heads.msa import MsaHead, MsaOptions, colours
from tests import dense_support as by_hand
from tests.dense_support import RANGE
from tests.test_head_options import NothingWaits

B, GRID, OUT, C = 2, (1, 2), (32, 64), 32
SHAPES = {
    "clip/layer4": (1, 2, C),
    "clip/layer3": (2, 4, 16),
    "clip/layer2": (4, 8, 8),
    "clip/layer1": (8, 16, 4),
    "clip/stem": (16, 32, 2),
    "pixels/rgb": (*OUT, 3),
    "sam/segments": OUT,
    "sam/colours": (*OUT, 3),
    "clip/patch": (2, 6),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"segments": "sam/segments", "widths": [8, 4, 4, 6, 4, 8]},
    {"segments": "sam/colours", "widths": [5, 4, 3, 6, 2, 7]},
    {"clip_weight": 1.0},
    {"clip_weight": 0.5, "bounded": False, "clip": {"space": "joint", "temperature": 0.01}},
]


def make_head(**options: Any) -> MsaHead:
    torch.manual_seed(0)
    head = MsaHead(MsaOptions.model_validate({**RANGE, **options}), SHAPES, GRID)
    head.initialise(by_hand.Words(6 if options.get("clip") else C // 2))
    return head


def make_columns() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    columns = {name: torch.randn(B, *shape, generator=generator).half() for name, shape in SHAPES.items()}
    columns["pixels/rgb"] = by_hand.pictures(B, *OUT)
    columns["sam/colours"] = by_hand.pictures(B, *OUT, seed=8)
    columns["sam/segments"] = torch.randint(0, 900, (B, *OUT), generator=generator).to(torch.uint16)
    return columns


def make_batch(share: float = 0.7) -> Batch:
    return Batch(make_columns(), {"depth": by_hand.targets(B, OUT, share=share)})


def block(layers: Any, x: Any) -> Any:
    """2 x [conv 3x3, BatchNorm as in evaluation, ReLU]."""
    for conv, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
        x = by_hand.conv(x, conv.weight, conv.bias, padding=1)
        mean, var, scale, shift = (
            value.detach().double().numpy()[:, None, None]
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = by_hand.relu((x - mean) / np.sqrt(var + 1e-5) * scale + shift)
    return x


def larger(layer: Any, x: Any) -> Any:
    """A transposed convolution 2x2 of stride 2: every cell becomes 2x2 cells, which no other touches."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    out = np.empty((weight.shape[1], 2 * x.shape[1], 2 * x.shape[2]))
    for a in (0, 1):
        for b in (0, 1):
            out[:, a::2, b::2] = np.einsum("ihw,io->ohw", x, weight[:, :, a, b]) + bias[:, None, None]
    return out


def delta(head: MsaHead, columns: dict[str, torch.Tensor], view: int) -> Any:
    names = [f"clip/{name}" for name in ("layer4", "layer3", "layer2", "layer1", "stem")]
    maps = [columns[name][view].double().numpy().transpose(2, 0, 1) for name in names]
    skip = by_hand.normalised(columns["pixels/rgb"][view])
    if head.options.segments == "sam/colours":
        values = columns["sam/colours"][view].double().numpy().transpose(2, 0, 1) / 255
        skip = np.concatenate([skip, block(head.segments, values)])
    elif head.options.segments:
        values = colours(columns["sam/segments"][view : view + 1])[0].double().numpy()
        skip = np.concatenate([skip, block(head.segments, values)])
    x = block(head.unet.bridge, maps[0])
    for part, beside in zip(head.unet.blocks, [*maps[1:], skip], strict=True):
        layers: Any = part
        x = block(layers.convolutions, np.concatenate([larger(layers.up, x), beside]))
    out: Any = head.unet.out
    return by_hand.conv(x, out.weight, out.bias)[0]


def prior(head: MsaHead, columns: dict[str, torch.Tensor], view: int) -> Any:
    """CLIP's depth of the two patches, then linear from one to the other, ends included (aligned corners)."""
    clip: Any = head.clip
    joint = head.options.clip.space == "joint"
    tokens = columns["clip/patch"][view].double() if joint else columns["clip/layer4"][view].double().reshape(2, C)[:, ::2]
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(clip.text.double(), dim=-1).T
    weights = np.exp((cosines - cosines.max(dim=1, keepdim=True).values).numpy() / head.options.clip.temperature)
    left, right = weights @ np.array([1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0]) / weights.sum(axis=1)
    return np.tile(np.linspace(left, right, OUT[1]), (OUT[0], 1))


@pytest.mark.parametrize("options", VARIANTS)
def test_forward_is_that_of_the_paper(options: dict[str, Any]) -> None:
    head, columns = by_hand.stirred(make_head(**options, min_depth=-999.0, max_depth=999.0)).eval(), make_columns()
    found = head(columns)
    assert head.grid == MsaHead.output_grid(head.options, SHAPES, GRID) == OUT
    for view in range(B):
        expected = delta(head, columns, view)
        assert np.ptp(expected) > 0.01
        if head.options.clip_weight:
            expected = 2 / (1 + np.exp(-expected)) - 1 if head.options.bounded else expected
            expected = head.options.clip_weight * prior(head, columns, view) + expected
        np.testing.assert_allclose(found[view].detach().numpy().reshape(OUT), expected, rtol=2e-3, atol=2e-3)


def test_sizes_are_the_published_ones() -> None:
    """Counted from the architecture: widths 2048 to 64, skips of RN50's stages, a bias in every convolution."""
    shapes: dict[str, tuple[int, ...]] = {f"clip/layer{n}": (416 >> n + 1, 544 >> n + 1, 128 << n) for n in (1, 2, 3, 4)}
    shapes |= {"clip/stem": (208, 272, 64), "pixels/rgb": (416, 544, 3), "sam/segments": (416, 544)}
    assert shapes["clip/layer4"] == (13, 17, 2048)
    with torch.device("meta"):
        head = MsaHead(MsaOptions(**RANGE), shapes, (13, 17))
        seen = MsaHead(MsaOptions(**RANGE, segments="sam/segments"), shapes, (13, 17))
    pair = lambda a, b: (9 * a * b + 3 * b) + (9 * b * b + 3 * b)  # noqa: E731
    ups = [(2048, 1024, 1024), (1024, 512, 512), (512, 256, 256), (256, 64, 128), (128, 3, 64)]
    expected = pair(2048, 2048) + sum(4 * a * b + b + pair(b + skip, b) for a, skip, b in ups) + 65
    assert by_hand.count_of(head) == expected == 124_300_609
    assert by_hand.count_of(seen) == expected + pair(3, 3) + 9 * 3 * 64
    assert pair(3, 3) == 180
    assert head.grid == (416, 544)
    (phase,) = head.phases()
    assert (phase.optimiser, phase.momentum, phase.lr, phase.weight_decay) == ("sgd", 0.9, 2e-3, 1e-5)


def test_texts_are_asked_for_only_if_clip_has_a_weight() -> None:
    assert MsaHead.phrases(MsaOptions(**RANGE)) == ()
    words = by_hand.Words(1)
    make_head().initialise(words)
    assert not words.asked
    assert "clip/patch" not in MsaHead.reads(MsaOptions(**RANGE))
    options = MsaOptions.model_validate({**RANGE, "clip_weight": 1.0, "clip": {"space": "joint", "temperature": 0.001}})
    assert MsaHead.reads(options)[0] == "clip/layer4"
    assert MsaHead.reads(options)[-1] == "clip/patch"
    assert len(MsaHead.phrases(options)) == 7
    assert MsaOptions(**RANGE).clip.temperature == 0.001


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("mask", [True, False])
def test_losses_are_means_over_pixels(kind: str, mask: bool) -> None:
    """In evaluation mode, so that the forward pass is the one tested above."""
    head, batch = by_hand.stirred(make_head(loss=kind, mask=mask), 0.1).eval(), make_batch()
    target, errors = batch.targets["depth"], []
    for view in range(B):
        depth = delta(head, dict(batch.columns), view).reshape(-1)
        for pixel in range(OUT[0] * OUT[1]):
            if target.valid[view, pixel] or not mask:
                errors.append(abs(depth[pixel] - float(target.mean[view, pixel])))
    expected = np.mean(errors) if kind == "l1" else np.mean(np.square(errors))
    assert head.losses(batch, "depth")["total"].item() == pytest.approx(expected, rel=1e-4)


def test_a_cut_holds_back_what_lies_outside() -> None:
    batch = make_batch(share=1.0)
    found, held = (by_hand.stirred(make_head(cut=cut), 0.1).eval() for cut in (False, True))
    depth, truth = found.metres(batch.columns).detach().flatten(1), batch.targets["depth"].mean
    assert (depth < 0).any()
    assert held.losses(batch, "depth")["total"].item() == pytest.approx(float((depth.clamp(0, 10) - truth).abs().mean()))
    nothing = Batch(batch.columns, {"depth": by_hand.nowhere(batch.targets["depth"])})
    assert not found.losses(nothing, "depth")["total"].requires_grad


@pytest.mark.parametrize("options", VARIANTS)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    head, batch = make_head(**options).train(), make_batch()
    with NothingWaits():
        head.losses(batch, "depth")["total"].backward()
    assert all(value.grad is not None for value in head.parameters())
    with NothingWaits(), torch.inference_mode():
        head.eval().depth(batch.columns)


def test_a_batch_is_learnt_by_heart() -> None:
    options: dict[str, Any] = {"clip_weight": 1.0, "bounded": False, "segments": "sam/segments"}
    head = make_head(optimiser="adamw", lr=0.02, widths=[16, 8, 8, 8, 4, 4], **options)
    losses = by_hand.trained(head, Batch(make_columns(), {"depth": by_hand.ramps(B, OUT)}), 25)
    assert losses[-1] < 0.3 * losses[0]


def test_a_segment_has_one_colour() -> None:
    numbers = torch.arange(4096).to(torch.uint16).reshape(1, 64, 64)
    found = (colours(numbers) * 255).round().long()[0].flatten(1).T.tolist()
    knuth = [n * 2654435761 & 0xFFFFFFFF for n in range(4096)]
    assert found == [[n >> 24, n >> 16 & 255, n >> 8 & 255] for n in knuth]
    assert found[0] == [0, 0, 0]
    assert len({tuple(colour) for colour in found}) == 4096
    assert min(max(abs(a - b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(found)) > 64
    given = by_hand.pictures(1, 2, 3)
    torch.testing.assert_close(colours(given), given.permute(0, 3, 1, 2) / 255)


def test_columns_that_do_not_fit_are_refused() -> None:
    cls, options = head_options({"name": "msa", **RANGE})
    for change, words in (
        ({"clip/stem": (8, 16, 2)}, r"clip/stem is 8x16 and clip/layer1 8x16; expected twice the size"),
        ({"pixels/rgb": (16, 32, 3)}, r"pixels/rgb is 16x32 and clip/stem 16x32; .* pixels without a stride"),
        ({"clip/layer2": (32, 8)}, r"clip/layer2 is \(32, 8\) a row; expected \(h, w, channels\)"),
        ({"clip/layer4": (1, 2, 16)}, r"widths = \[16, 8, 4, 2, 1, 0\], layer4 has 16 channels"),
    ):
        with pytest.raises(RecipeError, match=words):
            cls(options, {**SHAPES, **change}, GRID)
    with pytest.raises(RecipeError, match=r"sam/segments is \(16, 32\); expected segment numbers \(32, 64\) or colours"):
        MsaHead(MsaOptions(**RANGE, segments="sam/segments"), {**SHAPES, "sam/segments": (16, 32)}, GRID)
    with pytest.raises(RecipeError, match=r"7 texts are 9 wide"):
        make_head(clip_weight=1.0).initialise(by_hand.Words(9))
