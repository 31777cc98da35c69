"""Where frames come from."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pcd.errors import MissingFileError, SampleError, UsageError
from pcd.prediction.sources import Names, Source, batched, find_sources, read_frames


def image(path: Path, shade: int = 0, size: tuple[int, int] = (6, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), shade, dtype=np.uint8))
    return path


def video(path: Path, shades: list[tuple[int, int, int]], rate: float = 5.0, code: str = "mp4v") -> Path:
    """Frames of one colour each (RGB), 64x48."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, (64, 48))
    assert writer.isOpened()
    for red, green, blue in shades:
        writer.write(np.full((48, 64, 3), (blue, green, red), dtype=np.uint8))
    writer.release()
    return path


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.jpg", "sub/deep/c.PNG", "sub/a.depth.png", "sub/a.picture.png"):
        image(tmp_path / name)
    (tmp_path / "sub/notes.txt").write_text("no image")
    np.save(tmp_path / "sub/d.npy", np.zeros((2, 2, 3), dtype=np.uint8))

    def found(*inputs: str) -> list[str]:
        return [str(source.path.relative_to(tmp_path)) for source in find_sources([tmp_path / given for given in inputs])]

    everything = ["a.png", "sub/b.jpg", "sub/deep/c.PNG"]
    assert found(".") == everything
    assert found("**/*.png") == ["a.png"]
    assert found("**") == [*everything[1:], *everything[:1]] or found("**") == everything
    assert found("sub/*") == ["sub/b.jpg", "sub/d.npy", "sub/deep/c.PNG"]
    assert found("su[a-c]/?.jpg", "a.png", "a.png") == ["sub/b.jpg", "a.png", "a.png"]
    assert found("sub/a.depth.png") == ["sub/a.depth.png"]  # named outright
    assert find_sources([str(tmp_path / "a.png")]) == [Source(tmp_path / "a.png")]
    odd = image(tmp_path / "what [is] this?.png")
    assert find_sources([odd])[0].path == odd


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.png", "nowhere.png is not there; give image"),
        ("*.jpg", r"\*.jpg matches no file"),
        ("*.txt", "matches 1 files or folders, but nothing to predict among them; looked for .png"),
        ("empty", "no image or video in .*empty; looked for .png"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, given: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises((MissingFileError, UsageError), match=words):
        find_sources([tmp_path / given])


def test_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing to predict"):
        find_sources([])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4), dtype=np.uint8), r"bad.npy is uint8 \(4, 4\); expected RGB uint8"),
        (np.zeros((4, 4, 3), dtype=np.float32), r"bad.npy is float32 \(4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), dtype=np.uint8), r"bad.npy is uint8 \(0, 4, 4, 3\)"),
        (np.array([{}]), "bad.npy is not a whole NumPy file of numbers"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(SampleError, match=words):
        find_sources([tmp_path / "bad.npy"])


def test_broken_files_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = video(tmp_path / "clip.mp4", [(9, 9, 9)] * 4).read_bytes()
    for name, data in {"cut.mp4": whole[: len(whole) // 2], "text.avi": b"no video", "text.png": b"no image"}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("cut.mp4", "text.avi"):
        with pytest.raises(SampleError, match=f"video .*{name} cannot be opened"):
            find_sources([tmp_path / name])
    with pytest.raises(SampleError, match=r"image .*text.png \(8 bytes\) cannot be decoded"):
        list(read_frames(find_sources([tmp_path / "text.png"])))
    capfd.readouterr()  # the decoder complains on standard error


@pytest.mark.parametrize(
    ("name", "code"), [("clip.mp4", "mp4v"), ("clip.avi", "MJPG"), ("clip.mov", "mp4v"), ("clip.mkv", "mp4v")]
)
def test_videos_are_frames_in_order_and_in_rgb(tmp_path: Path, name: str, code: str) -> None:
    shades = [(200, 30, 40), (30, 200, 40), (30, 40, 200), (120, 120, 120)]
    (source,) = find_sources([video(tmp_path / name, shades, rate=7.0, code=code)])
    assert (source.frames, source.several, source.rate) == (4, True, 7.0)
    frames = list(read_frames([source]))
    assert [frame.name for frame in frames] == [f"clip-{number:06d}" for number in range(4)]
    for frame, shade in zip(frames, shades, strict=True):
        assert frame.rgb.shape == (48, 64, 3)
        np.testing.assert_allclose(frame.rgb.reshape(-1, 3).mean(axis=0), shade, atol=8)


def test_videos_and_stacks_are_read_one_frame_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "stack.npy", stack)
    np.save(tmp_path / "one.npy", stack[0])
    reads = []
    whole = cv2.VideoCapture

    class Counting:
        def __init__(self, path: str) -> None:
            self._inner = whole(path)

        def read(self) -> object:
            reads.append(1)
            return self._inner.read()

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    clip = video(tmp_path / "clip.mp4", [(9, 9, 9)] * 6)
    frames = read_frames(find_sources([tmp_path / "stack.npy", tmp_path / "one.npy", clip]))
    first = [next(frames) for _ in range(6)]
    np.testing.assert_array_equal(np.stack([frame.rgb for frame in first[:5]]), stack)
    assert [frame.name for frame in first[4:]] == ["stack-000004", "one"]
    next(frames)
    next(frames)
    assert len(reads) == 2
    frames.close()  # type: ignore[attr-defined]


def test_a_video_that_holds_less_than_it_says_is_reported(tmp_path: Path) -> None:
    source = find_sources([video(tmp_path / "clip.mp4", [(9, 9, 9)] * 4)])[0]
    said: list[str] = []
    list(read_frames([type(source)(source.path, 9, several=True)], said.append))
    assert said == [f"{source.path}: its header says 9 frames, 4 could be read."]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    names = Names()
    claimed = [names.claim(stem) for stem in ("a", "a", "a-2", "A", "b", "a")]
    assert claimed == ["a", "a-2", "a-2-2", "A-3", "b", "a-4"]
    stack = tmp_path / "s.npy"
    np.save(stack, np.zeros((2, 3, 3, 3), dtype=np.uint8))
    twice = [frame.name for frame in read_frames(find_sources([image(tmp_path / "s-000001.png"), stack, stack]))]
    assert twice == ["s-000001", "s-000000", "s-000001-2", "s-2-000000", "s-2-000001"]


def test_batches_are_limited_in_images_and_in_pixels(tmp_path: Path) -> None:
    paths = [image(tmp_path / f"{number}.png", size=(10, 100 if number == 3 else 10)) for number in range(7)]

    def sizes(size: int, pixels: int) -> list[int]:
        return [len(batch) for batch in batched(read_frames(find_sources(paths)), size, pixels)]

    assert sizes(3, 10_000) == [3, 3, 1]
    assert sizes(3, 250) == [2, 1, 1, 2, 1]
    assert sizes(1, 250) == [1] * 7
