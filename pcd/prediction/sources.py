"""What is predicted: images, folders, patterns, videos and NumPy arrays, read one frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from pcd.datasets.files import read_rgb
from pcd.errors import MissingFileError, SampleError, UsageError

Rgb = npt.NDArray[np.uint8]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
ARRAYS = (".npy",)
NOT_PHOTOGRAPHS = (".depth.png", ".depth.tiff", ".picture.png", ".side-by-side.png", ".side-by-side.mp4", ".uncertainty.png")
"""Endings of files that pcd writes and datasets keep beside their images: left out of folders and patterns."""

STACK_RATE = 10.0
"""Frames per second of stacks of images, and of videos that do not say."""
BATCH_PIXELS = 2**25
"""Frames wait for each other up to this many pixels: 100 MB."""


@dataclass(frozen=True)
class Source:
    """One input file. An image is a single frame; a video or a stack holds `frames` of them, at `rate` frames per second.

    `frames` of a video is what its header says; what can be read may differ.
    """

    path: Path
    frames: int = 1
    several: bool = False
    rate: float = STACK_RATE

    def read(self) -> Iterator[Rgb]:
        """The frames in order, RGB uint8 `(H, W, 3)`, each read when it is asked for.

        Raises `SampleError` for a file that cannot be decoded.
        """
        yield read_rgb(self.path)


class Video(Source):
    """A video file, decoded by OpenCV."""

    @staticmethod
    def open(path: Path) -> Video:
        """Look at the header. Raises `SampleError` if there is none."""
        capture = _capture(path)
        frames, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        return Video(path, max(int(frames), 1), several=True, rate=rate if 0 < rate <= 1000 else STACK_RATE)

    def read(self) -> Iterator[Rgb]:
        """See `Source.read`; a video without a single frame that can be decoded is an error, too."""
        capture, count = _capture(self.path), 0
        try:
            while True:
                there, frame = capture.read()
                if not there:
                    break
                count += 1
                yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        finally:
            capture.release()
        if not count:
            raise SampleError(f"video {self.path} holds no frame that can be decoded.")


class Stack(Source):
    """A `.npy` file of one RGB image `(H, W, 3)` or several `(N, H, W, 3)`, uint8; read through a memory map."""

    @staticmethod
    def open(path: Path) -> Stack:
        """Look at the header. Raises `SampleError` for anything else."""
        array = _mapped(path)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
            raise SampleError(f"array {path} is {array.dtype} {array.shape}; expected RGB uint8 (H, W, 3) or (N, H, W, 3).")
        return Stack(path, 1 if array.ndim == 3 else len(array), several=array.ndim == 4)

    def read(self) -> Iterator[Rgb]:
        """See `Source.read`."""
        array = _mapped(self.path)
        for frame in array if self.several else array[None]:
            yield np.ascontiguousarray(frame)


def _capture(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise SampleError(
            f"video {path} cannot be opened: it is cut short, damaged or of a format that OpenCV's decoder does not know."
        )
    return capture


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        array: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SampleError(f"array {path} is not a whole NumPy file of numbers: {error}.") from error
    return array


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The inputs in the order given: files, folders (searched to the bottom, sorted) and patterns with `*`, `?`, `[]`, `**`.

    Folders give their images and videos, patterns also arrays; what pcd or a dataset writes beside images is left out of both.
    Raises `MissingFileError` for what is not there, `UsageError` for a folder or pattern without anything to predict, and
    `SampleError` for videos and arrays that cannot be read.
    """
    sources: list[Source] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            paths = _inside(path)
            if not paths:
                raise UsageError(f"no image or video in {path}; looked for {', '.join(IMAGES + VIDEOS)}.")
        elif path.is_file():
            paths = [path]
        elif any(character in str(path) for character in "*?["):
            paths = _matching(path)
        else:
            raise MissingFileError(f"{path} is not there; give image, video or .npy files, folders or quoted patterns.")
        sources += [_source(file) for file in paths]
    if not sources:
        raise UsageError("nothing to predict: give image, video or .npy files, folders or quoted patterns.")
    return sources


def _source(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        return Video.open(path)
    return Stack.open(path) if suffix in ARRAYS else Source(path)


def _is_wanted(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.lower().endswith(NOT_PHOTOGRAPHS) and path.is_file()


def _inside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_wanted(file, IMAGES + VIDEOS))


def _matching(pattern: Path) -> list[Path]:
    """Files that match, and what lies in folders that match; each once."""
    parts = pattern.parts
    first = next(at for at, part in enumerate(parts) if any(character in part for character in "*?["))
    matches = sorted(Path(*parts[:first]).glob(str(Path(*parts[first:]))))
    if not matches:
        raise MissingFileError(f"{pattern} matches no file.")
    found: dict[Path, None] = {}
    for match in matches:
        if match.is_dir():
            found |= dict.fromkeys(_inside(match))
        elif _is_wanted(match, IMAGES + VIDEOS + ARRAYS):
            found[match] = None
    if not found:
        raise UsageError(
            f"{pattern} matches {len(matches)} files or folders, but nothing to predict among them; "
            f"looked for {', '.join(IMAGES + VIDEOS + ARRAYS)}."
        )
    return list(found)


class Names:
    """Names for what is written: the second `photo` becomes `photo-2`, so that nothing is overwritten."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def claim(self, stem: str) -> str:
        """A name that no one else has, upper and lower case taken as equal."""
        name, number = stem, 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.casefold())
        return name


@dataclass(frozen=True)
class Frame:
    """One image to predict: its pixels, where it comes from, its number there, and the name of what is written.

    `group` is the name of the source: that of the frame without its number.
    """

    rgb: Rgb
    source: Source
    number: int
    name: str
    group: str


def read_frames(sources: Iterable[Source], say: Callable[[str], None] = lambda text: None) -> Iterator[Frame]:
    """The frames of all sources, named `STEM` for images and `STEM-000000` onwards for videos and stacks.

    `say` hears of videos whose header promised another number of frames.
    """
    names = Names()
    for source in sources:
        group, number = names.claim(source.path.stem), -1
        for number, rgb in enumerate(source.read()):
            name = names.claim(f"{group}-{number:06d}") if source.several else group
            frame = Frame(rgb, source, number, name, group)
            del rgb  # these names would keep a large image in memory while the next one is read
            yield frame
            del frame
        if number + 1 != source.frames:
            say(f"{source.path}: its header says {source.frames} frames, {number + 1} could be read.")


def batched(frames: Iterable[Frame], size: int, pixels: int = BATCH_PIXELS) -> Iterator[list[Frame]]:
    """Lists of up to `size` frames; large frames come in smaller lists, down to one, to hold no more than `pixels`."""
    batch: list[Frame] = []
    held = 0
    for frame in frames:
        new = frame.rgb.shape[0] * frame.rgb.shape[1]
        if batch and held + new > pixels:
            yield batch
            batch, held = [], 0
        batch.append(frame)
        held += new
        del frame  # as in read_frames
        if len(batch) == size or held >= pixels:  # now, not when the next frame is there: it may be a large one
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
