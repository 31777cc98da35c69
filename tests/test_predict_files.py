"""The files of a prediction, read back by other libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import OpenEXR
import plyfile
import pytest
import tifffile
import torch

from pcd.datasets.base import Intrinsics
from pcd.errors import PredictionError, UsageError
from pcd.evaluation.pictures import paint
from pcd.prediction import colours, result
from pcd.prediction.colours import survey
from pcd.prediction.png import write_png
from pcd.prediction.pointcloud import intrinsics_from_fov, parse_intrinsics, write_ply
from pcd.prediction.result import Prediction
from pcd.prediction.saves import Save
from pcd.prediction.sources import Frame, Source
from pcd.prediction.writers import Output, Writer
from pcd.views import ViewPlan

PLAN = ViewPlan((32, 32), flips=False)
CAMERA = Intrinsics(50.0, 60.0, 21.5, 11.25)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of 41 pixels or so: every file is written in several strips."""
    monkeypatch.setattr(result, "STRIP_PIXELS", 300)


def predicted(size: tuple[int, int] = (30, 41), patches: torch.Tensor | None = None, std: bool = True) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    patches = 1 + 4 * torch.rand(1, 4, 4, generator=generator) if patches is None else patches
    return Prediction([patches], PLAN, size, "bilinear", [patches / 10] if std else None)


def framed(size: tuple[int, int] = (30, 41), name: str = "photo", source: Source | None = None, number: int = 0) -> Frame:
    rgb = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Frame(rgb, source or Source(Path(f"{name}.png")), number, name, name.split("-")[0])


def written(tmp_path: Path, *saves: Save, prediction: Prediction | None = None, **options: Any) -> dict[str, Any]:
    with Writer(Output(tmp_path, saves, **options)) as writer:
        prediction = prediction or predicted()
        return writer.write(framed(prediction.size), prediction)


def test_rows_are_those_of_the_whole() -> None:
    maps = [1 + torch.rand(1, 4, 4), 1 + torch.rand(1, 6, 6)]
    several = Prediction(maps, PLAN, (30, 41), "bilinear", [part / 10 for part in maps])
    alone = [Prediction([part], PLAN, (30, 41), "bilinear").depth for part in maps]
    np.testing.assert_allclose(several.depth, (alone[0] + alone[1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(several.depth_rows(3, 17), several.depth[3:17])
    np.testing.assert_array_equal(several.std_rows(3, 17), several.std[3:17])
    variance = (alone[0] + alone[1]) / 20 + np.var(alone, axis=0)  # within, and between the scales
    np.testing.assert_allclose(several.std**2, variance, rtol=1e-5)
    with pytest.raises(UsageError, match="holds no uncertainty"):
        _ = predicted(std=False).std


def test_maps_in_metres_are_read_by_others(tmp_path: Path) -> None:
    prediction = predicted()
    item = written(tmp_path, Save.npy, Save.tiff, Save.exr, Save.png, prediction=prediction)
    depth = prediction.depth
    for array in (np.load(item["npy"]), tifffile.imread(item["tiff"]), OpenEXR.File(item["exr"]).channels()["Z"].pixels):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, depth)
    assert set(OpenEXR.File(item["exr"]).channels()) == {"Z"}
    stored = np.asarray(cv2.imread(item["png"], cv2.IMREAD_UNCHANGED))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored / 1000, depth, atol=5e-4 + 1e-6)
    assert item["units_per_metre"] == 1000
    assert (item["min"], item["max"]) == (depth.min(), depth.max())
    assert Path(item["exr"]).name == "photo.depth.exr"


def test_far_depths_change_the_unit(tmp_path: Path) -> None:
    far = predicted(patches=torch.linspace(1, 200, 16).reshape(1, 4, 4))
    item = written(tmp_path, Save.png, prediction=far)
    assert item["units_per_metre"] == 256
    np.testing.assert_allclose(np.asarray(cv2.imread(item["png"], cv2.IMREAD_UNCHANGED)) / 256, far.depth, atol=1 / 512 + 1e-4)


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (1, 16), (3, 8), (3, 16)])
def test_pngs_are_written_in_strips(tmp_path: Path, channels: int, bits: int) -> None:
    kind = np.uint8 if bits == 8 else np.uint16
    shape = (23, 17) if channels == 1 else (23, 17, 3)
    pixels = np.random.default_rng(0).integers(0, 2**bits, shape).astype(kind)
    path = tmp_path / "a.png"
    write_png(path, (23, 17), channels, bits, (pixels[top : top + 5] for top in range(0, 23, 5)))
    read = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    np.testing.assert_array_equal(read if channels == 1 else read[..., ::-1], pixels)
    with pytest.raises(ValueError, match="5 rows for a picture of 23"):
        write_png(path, (23, 17), channels, bits, [pixels[:5]])


def test_colours_are_those_of_matplotlib() -> None:
    values = np.random.default_rng(0).uniform(0, 6, (20, 30)).astype(np.float32)
    scale = mpl.colors.Normalize(1.0, 5.0, clip=True)
    expected = mpl.colormaps["turbo_r"](scale(values), bytes=True)[..., :3].astype(int)
    assert np.abs(paint(values, (1.0, 5.0)).astype(int) - expected).max() <= 8  # one entry of the table
    ends = paint(np.array([[1.0, 5.0]], dtype=np.float32), (1.0, 5.0))[0]
    np.testing.assert_array_equal(ends, mpl.colormaps["turbo_r"]([0, 255], bytes=True)[:, :3])


@pytest.mark.parametrize("size", [(30, 41), (20, 41)])
def test_side_by_side_shows_the_image_and_its_depth_at_full_size(tmp_path: Path, size: tuple[int, int]) -> None:
    prediction = predicted(size)
    item = written(tmp_path, Save.side_by_side, prediction=prediction, span=(1.0, 5.0))
    picture = np.asarray(cv2.imread(item["side-by-side"]))[..., ::-1]
    (height, width), axis = size, 0 if size == (20, 41) else 1
    assert picture.shape == ((2 * height, width, 3) if axis == 0 else (height, 2 * width, 3))
    image, painted = np.split(picture, 2, axis=axis)
    np.testing.assert_array_equal(image, framed(size).rgb)
    np.testing.assert_array_equal(painted, paint(prediction.depth, (1.0, 5.0)))


def test_pictures_of_large_images_are_drawn_from_fewer_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colours, "THUMBNAIL", 20)
    prediction = predicted((61, 85))
    found = survey(prediction.depth_rows, prediction.size)
    np.testing.assert_array_equal(found.small, prediction.depth[2::5, 2::5])
    assert (found.low, found.high) == (prediction.depth.min(), prediction.depth.max())
    item = written(tmp_path, Save.picture, Save.uncertainty, prediction=prediction)
    for kind in ("picture", "uncertainty-picture"):
        drawn = cv2.imread(item[kind])
        assert drawn is not None
        assert drawn.shape[1] > 600
    np.testing.assert_array_equal(np.load(item["uncertainty"]), prediction.std)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    patches = torch.full((1, 4, 4), 2.0)
    patches[0, 2, 2] = bad
    with pytest.raises(PredictionError, match=r"photo\.png: the prediction holds values that are not finite"):
        written(tmp_path, Save.npy, prediction=predicted(patches=patches))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stride", [1, 3, 50])
def test_a_plane_across_the_axis_is_a_plane_of_points(tmp_path: Path, stride: int) -> None:
    """A plane at 2.5 m: pixel (row, column) lies at ((column - cx) 2.5 / fx, (row - cy) 2.5 / fy, 2.5)."""
    prediction = predicted(patches=torch.full((1, 4, 4), 2.5))
    rgb = framed().rgb
    number = write_ply(tmp_path / "plane.ply", rgb, prediction, CAMERA, stride, ("random encoder weights",))
    file = plyfile.PlyData.read(tmp_path / "plane.ply")
    assert (file.text, file.byte_order) == (False, "<")
    vertex = file["vertex"]
    assert len(vertex.data) == number == len(range(0, 30, stride)) * len(range(0, 41, stride))
    expected = [
        ((column - 21.5) * 2.5 / 50, (row - 11.25) * 2.5 / 60, 2.5, *rgb[row, column])
        for row in range(0, 30, stride)
        for column in range(0, 41, stride)
    ]
    names = ("x", "y", "z", "red", "green", "blue")
    found = np.stack([np.asarray(vertex[name], dtype=float) for name in names], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    comments = " ".join(file.comments)
    for words in ("x right, y down, z forward", "z is depth along the optical axis", "at u = column, v = row", "fx 50 fy 60"):
        assert words in comments
    assert "random encoder weights" in comments


def test_points_of_a_tilted_plane_lie_on_it(tmp_path: Path) -> None:
    """The plane n . X = d seen by a pinhole has depth d / (n . ray); the points must satisfy its equation."""
    normal, distance, camera = np.array([0.1, -0.2, 1.0]), 3.0, Intrinsics(40.0, 40.0, 8.0, 6.0)
    v, u = np.mgrid[:16, :16]
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], axis=-1)
    depth = (distance / (rays @ normal)).astype(np.float32)
    prediction = Prediction([torch.from_numpy(depth)[None]], PLAN, (16, 16), "nearest")  # a patch per pixel
    write_ply(tmp_path / "plane.ply", framed((16, 16)).rgb, prediction, camera)
    vertex = plyfile.PlyData.read(tmp_path / "plane.ply")["vertex"]
    points = np.stack([vertex["x"], vertex["y"], vertex["z"]], axis=1).astype(float)
    np.testing.assert_allclose(points @ normal, distance, rtol=1e-6)


def test_the_field_of_view_spans_the_outer_pixel_edges() -> None:
    camera = intrinsics_from_fov(90.0, (30, 40))
    assert camera.fx == camera.fy == pytest.approx(20.0)
    for edge in (-0.5, 39.5):
        assert math.degrees(math.atan(abs(edge - camera.cx) / camera.fx)) == pytest.approx(45.0)
    assert camera.cy == 14.5
    assert parse_intrinsics("500, 501,320.5,-3") == Intrinsics(500.0, 501.0, 320.5, -3.0)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "", "0,1,2,3", "1,-1,2,3", "1,1,nan,2"])
def test_intrinsics_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="intrinsics"):
        parse_intrinsics(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"saves": (Save.ply,)}, "--save ply needs the camera"),
        ({"saves": (Save.ply,), "fov": 60.0, "intrinsics": CAMERA}, "give one of them"),
        ({"fov": 60.0}, "are for point clouds: add --save ply"),
        ({"stride": 2}, "are for point clouds: add --save ply"),
        ({"saves": (Save.ply,), "fov": 180.0}, "field of view 180: expected"),
        ({"saves": (Save.ply,), "fov": 60.0, "stride": 0}, "stride 0: expected"),
        ({"span": (3.0, 2.0)}, "range 3,2: expected NEAR,FAR in metres"),
        ({"span": (0.0, math.inf)}, "range 0,inf: expected"),
    ],
)
def test_outputs_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Output(tmp_path, **options)


def test_intrinsics_in_pixels_hold_for_one_size(tmp_path: Path) -> None:
    with Writer(Output(tmp_path, (Save.ply,), intrinsics=CAMERA)) as writer:
        writer.write(framed(), predicted())
        with pytest.raises(UsageError, match=r"other.png is 20x41 \(height x width\), the first image 30x41"):
            writer.write(framed((20, 41), "other"), predicted((20, 41)))


@pytest.mark.parametrize("size", [(48, 64), (31, 41), (21, 45)])
def test_a_video_is_written_beside_its_depth(tmp_path: Path, size: tuple[int, int]) -> None:
    source = Source(Path("clip.mp4"), 4, several=True, rate=8.0)
    shades = [(200, 30, 40), (30, 200, 40), (30, 40, 200), (120, 120, 120)]
    with Writer(Output(tmp_path, (Save.video, Save.npy), span=(1.0, 5.0))) as writer:
        for number, shade in enumerate(shades):
            rgb = np.broadcast_to(np.array(shade, dtype=np.uint8), (*size, 3))
            plane = predicted(size, patches=torch.full((1, 4, 4), 1.0 + number))
            item = writer.write(Frame(rgb, source, number, f"clip-{number:06d}", "clip"), plane)
            assert item["frame"] == number
            assert Path(item["npy"]).name == f"clip-{number:06d}.npy"
    assert Path(item["video"]).name == "clip.side-by-side.mp4"
    capture = cv2.VideoCapture(item["video"])
    assert capture.get(cv2.CAP_PROP_FPS) == 8.0
    for number, shade in enumerate(shades):
        there, frame = capture.read()
        assert there
        shape = (2 * size[0], size[1]) if size == (21, 45) else (size[0], 2 * size[1])
        assert frame.shape == (shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
        painted = paint(np.full((1, 1), 1.0 + number, dtype=np.float32), (1.0, 5.0))[0, 0]
        np.testing.assert_allclose(frame[5, 5, ::-1], shade, atol=12)
        np.testing.assert_allclose(frame[-6, -6, ::-1].astype(int), painted.astype(int), atol=12)
    assert not capture.read()[0]
    capture.release()


def test_the_colours_of_a_video_do_not_flicker(tmp_path: Path) -> None:
    """One scale for all frames, from the first; images have their own."""
    first, second = predicted(patches=torch.linspace(1, 5, 16).reshape(1, 4, 4)), predicted(patches=torch.full((1, 4, 4), 3.0))
    for several in (True, False):
        source = Source(Path("clip.mp4"), 2, several=several)
        with Writer(Output(tmp_path, (Save.side_by_side,))) as writer:
            writer.write(framed(source=source), first)
            item = writer.write(framed(source=source, number=1, name="photo-2"), second)
        colour = np.asarray(cv2.imread(item["side-by-side"]))[3, -3, ::-1]
        low, high = np.percentile(first.depth, (2, 98))
        reach = 0.25 * (high - low)
        wide = paint(np.full((1, 1), 3.0, dtype=np.float32), (low - reach, high + reach))[0, 0]
        assert (np.abs(colour.astype(int) - wide).max() <= 8) == several
