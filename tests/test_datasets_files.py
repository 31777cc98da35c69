"""Readers of images and depth maps."""

import numpy as np
import pytest
from PIL import Image

from pcd.datasets.files import (
    checked_sample,
    depth_size,
    find_file,
    read_depth,
    read_depth_png,
    read_rgb,
    read_text,
    require_root,
)
from pcd.errors import DatasetError, MissingFileError, SampleError, UsageError
from tests.datasets_support import metres_of, read_pillow, read_png16, some_depth, some_rgb, write_jpeg, write_png


def test_rgb_has_the_channels_in_order(tmp_path):
    rgb = some_rgb()
    assert np.array_equal(read_rgb(write_png(tmp_path / "a.png", rgb)), rgb)


def test_rgb_of_a_jpeg_agrees_with_another_decoder(tmp_path):
    path = write_jpeg(tmp_path / "a.jpg", some_rgb(40, 56))
    found = read_rgb(path)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - read_pillow(path)).max() <= 1


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_ignored_as_for_the_depth_map(tmp_path, orientation):
    path = write_jpeg(tmp_path / "a.jpg", some_rgb(40, 56), orientation)
    assert read_rgb(path).shape == (40, 56, 3)
    assert np.array_equal(read_rgb(path), read_rgb(write_jpeg(tmp_path / "b.jpg", some_rgb(40, 56))))


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey = some_rgb()[..., 0]
    assert np.array_equal(read_rgb(write_png(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, axis=2))
    rgba = np.dstack([some_rgb(), np.full((6, 8), 128, dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(read_rgb(tmp_path / "rgba.png"), rgba[..., :3])


@pytest.mark.parametrize("units", [1000, 256, 5000.5])
def test_depth_png_in_metres(tmp_path, units):
    stored = some_depth()
    path = write_png(tmp_path / "d.png", stored)
    found = read_depth_png(path, units)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, metres_of(stored, units), rtol=1e-6)
    assert np.isnan(found[0, 0])
    assert np.isfinite(found).sum() == stored.size - 1


def test_further_invalid_values(tmp_path):
    stored = some_depth()
    stored[2, 3], stored[4, 5] = 65535, 7
    found = read_depth_png(write_png(tmp_path / "d.png", stored), 1000, [65535, 7])
    assert set(zip(*np.nonzero(np.isnan(found)), strict=True)) == {(0, 0), (2, 3), (4, 5)}
    assert np.isnan(read_depth_png(tmp_path / "d.png", 1000, invalid=65535)).sum() == 2


def test_depth_png_of_the_wrong_kind(tmp_path):
    eight = write_png(tmp_path / "eight.png", some_rgb()[..., 0])
    with pytest.raises(SampleError, match=r"eight\.png is 8-bit \(uint8\), 1 channel; expected 16-bit, 1 channel"):
        read_depth_png(eight, 1000)
    colour = write_png(tmp_path / "colour.png", some_rgb().astype(np.uint16))
    with pytest.raises(SampleError, match=r"colour\.png is 16-bit \(uint16\), 3 channels; expected 16-bit, 1 channel"):
        read_depth_png(colour, 1000)


@pytest.mark.parametrize("keep", [0, 5, 60, -4])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_images_are_refused(tmp_path, keep, suffix):
    write = write_png if suffix == ".png" else write_jpeg
    path = write(tmp_path / f"a{suffix}", some_rgb(40, 56))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SampleError, match=rf"a\{suffix} .*cannot be decoded"):
        read_rgb(path)
    with pytest.raises(SampleError, match=rf"a\{suffix} .*cannot be decoded"):
        read_depth_png(path, 1000)


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    path = write_png(tmp_path / "d.png", some_depth(40, 56))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(SampleError, match="cannot be decoded"):
        read_depth_png(path, 1000)


@pytest.mark.parametrize(
    "reader", [read_rgb, depth_size, lambda path: read_depth_png(path, 256), lambda path: read_depth(path, 256)]
)
def test_missing_and_unreadable_files(tmp_path, reader):
    with pytest.raises(MissingFileError, match=r"nowhere\.png is not there"):
        reader(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SampleError, match=r"folder\.png cannot be read"):
        reader(tmp_path / "folder.png")


def test_size_needs_the_header_only(tmp_path):
    path = write_png(tmp_path / "d.png", some_depth(30, 50))
    assert depth_size(path) == (30, 50)
    path.write_bytes(path.read_bytes()[:40])
    assert depth_size(path) == (30, 50)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SampleError, match=r"d\.png does not start as a PNG"):
        depth_size(path)
    np.save(tmp_path / "d.npy", np.ones((7, 9), dtype=np.float32))
    assert depth_size(tmp_path / "d.npy") == (7, 9)
    Image.fromarray(np.ones((7, 9), dtype=np.float32)).save(tmp_path / "d.tiff")
    assert depth_size(tmp_path / "d.tiff") == (7, 9)
    np.save(tmp_path / "d.npy", np.ones((7, 9, 2), dtype=np.float32))
    with pytest.raises(SampleError, match="expected one channel"):
        depth_size(tmp_path / "d.npy")


def test_float_depth_files_are_metres(tmp_path):
    depth = np.array([[1.5, 0, -1], [np.nan, np.inf, 200.25]], dtype=np.float32)
    np.save(tmp_path / "d.npy", depth)
    Image.fromarray(depth).save(tmp_path / "d.tiff")
    for name in ("d.npy", "d.tiff"):
        found = read_depth(tmp_path / name, None)
        assert found[0, 0] == 1.5
        assert found[1, 2] == 200.25
        assert np.isnan(found).sum() == 4
    assert read_depth(tmp_path / "d.npy", 100, invalid=200.25)[0, 0] == np.float32(0.015)
    assert np.isnan(read_depth(tmp_path / "d.npy", 100, invalid=200.25)[1, 2])


def test_depth_files_of_other_kinds(tmp_path):
    np.save(tmp_path / "i.npy", np.array([[1000, 0]], dtype=np.uint16))
    assert read_depth(tmp_path / "i.npy", 1000)[0, 0] == 1.0
    with pytest.raises(SampleError, match=r"i\.npy holds integers \(uint16\) and no unit is known"):
        read_depth(tmp_path / "i.npy", None)
    with pytest.raises(SampleError, match=r"holds integers \(uint16\) and no unit is known"):
        read_depth(write_png(tmp_path / "d.png", some_depth()), None)
    np.save(tmp_path / "b.npy", np.array([[1, 0]], dtype=np.uint8))
    with pytest.raises(SampleError, match="8-bit"):
        read_depth(tmp_path / "b.npy", 1000)
    np.save(tmp_path / "o.npy", np.array([[None]], dtype=object), allow_pickle=True)
    with pytest.raises(SampleError, match=r"o\.npy is not a whole NumPy file"):
        read_depth(tmp_path / "o.npy", 1000)
    (tmp_path / "i.npy").write_bytes((tmp_path / "i.npy").read_bytes()[:-1])
    with pytest.raises(SampleError, match=r"i\.npy is not a whole NumPy file"):
        read_depth(tmp_path / "i.npy", 1000)
    with pytest.raises(SampleError, match=r"'\.exr' file cannot be read; convert it to \.png, \.npy"):
        read_depth(tmp_path / "d.exr", 1)


def test_sizes_must_agree(tmp_path):
    image, depth = tmp_path / "image.jpg", tmp_path / "depth.png"
    rgb, metres = some_rgb(6, 8), np.ones((6, 9), dtype=np.float32)
    with pytest.raises(SampleError, match=r"image\.jpg is 6x8 .*depth\.png 6x9; they must be equal\.$"):
        checked_sample("k", (image, rgb), (depth, metres), None)
    with pytest.raises(SampleError, match="lies on its side"):
        checked_sample("k", (image, rgb), (depth, np.ones((8, 6), dtype=np.float32)), None)


def test_a_frame_without_depth_is_refused(tmp_path):
    with pytest.raises(SampleError, match=r"depth\.png has no valid pixel"):
        checked_sample("k", (tmp_path, some_rgb()), (tmp_path / "depth.png", np.full((6, 8), np.nan, dtype=np.float32)), None)


def test_roots_and_places(tmp_path):
    with pytest.raises(UsageError, match=r"x: no folder given; set --root or dataset\.root to one with lists"):
        require_root(None, "x", "lists")
    with pytest.raises(
        MissingFileError, match=r"gone is not there \(set by dataset\.depth_root\); expected a folder with lists"
    ):
        require_root(tmp_path / "gone", "x", "lists", "depth_root")
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError, match="file is not a folder"):
        require_root(tmp_path / "file", "x", "lists")
    assert find_file([tmp_path / "gone", tmp_path / "file"], "it", "") == tmp_path / "file"
    with pytest.raises(MissingFileError, match=r"it is not there: no file .*one, nor .*two\. Do this\."):
        find_file([tmp_path / "one", tmp_path / "two"], "it", "Do this.")


def test_text_files(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa b\r\nc")
    assert read_text(path) == "a b\nc"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"list\.txt cannot be read as text"):
        read_text(path)
    with pytest.raises(MissingFileError, match=r"gone\.txt"):
        read_text(tmp_path / "gone.txt")


def test_the_decoder_of_these_tests_reads_what_pillow_reads(tmp_path):
    """Pillow filters rows, so this exercises the filters of `read_png16`."""
    noisy = np.random.default_rng(0).integers(0, 65536, (20, 30)).cumsum(axis=1).astype(np.uint16)
    Image.fromarray(noisy).save(tmp_path / "p.png")
    assert np.array_equal(read_png16(tmp_path / "p.png"), noisy)
