"""Rows in the making: every view arrives where it belongs, batches end where ranges end, and little is decoded ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pcd.datasets import Sample, Split
from pcd.errors import SampleError
from pcd.stages import rows as stage
from pcd.stages.plan import plan_columns, plan_manifest, plan_tables
from pcd.stages.rows import OnError, RowMaker
from tests.toy import ToyDataset, ToyEncoder

VIEWS = 4  # of a sample: two tiles, and those of the mirrored canvas


class Counting(ToyDataset):
    """Knows how many of its samples are decoded and not yet encoded, and the most there were."""

    held = most = 0
    lock = threading.Lock()

    def load(self, split: Split, key: str) -> Sample:
        with self.lock:
            self.held += 1
            self.most = max(self.most, self.held)
        return super().load(split, key)


class Watching(ToyEncoder):
    """Keeps the views it is given."""

    def __init__(self, dataset: Counting, pause: float) -> None:
        super().__init__("toy", self.Options(), (16, 16), "cpu")
        self.seen: list[torch.Tensor] = []
        self._dataset, self._pause = dataset, pause

    def encode(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        assert views.is_contiguous()
        self.seen.append(views.clone())
        time.sleep(self._pause)
        with self._dataset.lock:
            self._dataset.held -= len(views) // VIEWS
        return super().encode(views)


def maker(frames: Counting, network: Watching, batch_views: int, on_error: OnError = "stop") -> RowMaker:
    dataset: Any = frames
    encoder: Any = network
    plan = frames.view_plan()
    manifest = plan_manifest(dataset, plan, plan_tables(dataset))
    entries = plan_columns(manifest, encoder, ["masked-bilinear"], None)
    return RowMaker(dataset, plan, encoder, entries, ["masked-bilinear"], on_error, batch_views)


def by_hand(dataset: ToyDataset, key: str) -> npt.NDArray[np.float32]:
    """Views `(4, 3, 16, 16)` of a sample: left and right half of the canvas, then of its mirror image."""
    canvas = cv2.resize(dataset.load("train", key).rgb.astype(np.float32) / np.float32(255), (32, 16))
    views = []
    for image in (canvas, canvas[:, ::-1]):
        for left in (0, 16):
            views.append([[[image[y, left + x, c] for x in range(16)] for y in range(16)] for c in range(3)])
    return np.array(views, dtype=np.float32)


@pytest.mark.parametrize(
    ("batch_views", "sizes"),
    [(1, [1] * 28), (3, [3, 1] * 7), (4, [4] * 7), (8, [8, 8, 8, 4]), (11, [8, 8, 8, 4]), (100, [28])],
)
def test_every_view_in_its_place_and_none_beyond_the_range(batch_views: int, sizes: Sequence[int]) -> None:
    dataset = Counting(Counting.Options(train=9, broken=("train-3",)))
    encoder = Watching(dataset, 0)
    keys = dataset.keys("train")[1:8]
    columns = {"clip/patch", "clip/cls", "sample/ok", "depth/count"}
    made = list(maker(dataset, encoder, batch_views, "skip").rows("train", keys, columns, set()))
    assert [len(views) for views in encoder.seen] == sizes
    blank = np.zeros((VIEWS, 3, 16, 16), np.float32)
    wanted = np.concatenate([blank if key == "train-3" else by_hand(Counting(Counting.Options()), key) for key in keys])
    assert torch.cat(encoder.seen).numpy().tobytes() == wanted.tobytes()
    assert sum(number for number, _ in made) == len(keys)
    assert all(set(arrays) == columns for _, arrays in made)
    assert np.concatenate([arrays["sample/ok"] for _, arrays in made]).tolist() == [1, 1, 0, 1, 1, 1, 1]
    tokens = np.concatenate([arrays["clip/patch"] for _, arrays in made])
    means = wanted.reshape(-1, 3, 4, 4, 4, 4).mean(axis=(3, 5)).transpose(0, 2, 3, 1).reshape(-1, 16, 3)
    np.testing.assert_allclose(tokens[:, :, :3], means, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_decoded_ahead_than_is_said(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is slower than decoding by far: 3 g + T + 1 samples, g = 2."""
    monkeypatch.setattr(stage, "DECODE_THREADS", threads)
    dataset = Counting(Counting.Options(train=40))
    encoder = Watching(dataset, 0.01)
    keys = dataset.keys("train")
    for _ in maker(dataset, encoder, 2 * VIEWS).rows("train", keys, {"clip/patch", "clip/cls"}, set()):
        pass
    assert len(encoder.seen) == 20
    assert 4 < dataset.most <= 3 * 2 + threads + 1


def test_columns_without_the_encoder_need_none() -> None:
    dataset = Counting(Counting.Options())
    encoder = Watching(dataset, 0)
    (whole,) = maker(dataset, encoder, 100).rows("train", dataset.keys("train"), {"depth/count", "sample/ok"}, set())
    assert whole[0] == 12
    assert set(whole[1]) == {"depth/count", "sample/ok"}
    assert not encoder.seen


def test_an_error_comes_when_the_turn_of_its_sample_comes() -> None:
    dataset = Counting(Counting.Options(broken=("train-5",)))
    encoder, done = Watching(dataset, 0), 0
    with pytest.raises(SampleError, match=r"sample train-5: train-5\.png is broken"):
        for number, _ in maker(dataset, encoder, 2 * VIEWS).rows("train", dataset.keys("train"), {"clip/patch"}, set()):
            done += number
    assert done == 4
