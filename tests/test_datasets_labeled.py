"""The official labelled NYU file, as a small file in the same format."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from pcd.datasets.nyu import NyuDataset, NyuOptions
from pcd.errors import DatasetError, MissingFileError, SampleError, UsageError

h5py = pytest.importorskip("h5py", reason="needs the extra nyu-mat")
scipy_io = pytest.importorskip("scipy.io", reason="needs the extra nyu-mat")

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
FRAMES, HEIGHT, WIDTH = 5, 480, 640


def value(frame: int, row: int, column: int, channel: int) -> int:
    return (frame * 50 + row + 3 * column + 7 * channel) % 256


def metres(frame: int, row: int, column: int) -> float:
    return 1.0 + frame + row / 1000 + column / 10000


def write_splits(path: Path, train=(1, 4, 5), test=(2, 3)) -> None:
    column = {"trainNdxs": train, "testNdxs": test}
    scipy_io.savemat(path, {name: np.array(list(numbers), dtype=np.uint16)[:, None] for name, numbers in column.items()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The axes are reversed, as MATLAB writes them: (frame, channel, column, row)."""
    frame, channel, column, row = np.ogrid[:FRAMES, :3, :WIDTH, :HEIGHT]
    images = ((frame * 50 + row + 3 * column + 7 * channel) % 256).astype(np.uint8)
    frame, column, row = np.ogrid[:FRAMES, :WIDTH, :HEIGHT]
    filled = (1.0 + frame + row / 1000 + column / 10000).astype(np.float32)
    raw = filled.copy()
    raw[:, 20, 10] = 0
    raw[3] = 0
    with h5py.File(tmp_path / MAT, "w") as file:
        file["images"], file["depths"], file["rawDepths"] = images, filled, raw
    write_splits(tmp_path / SPLITS)
    return tmp_path


def open_nyu(root: Path, **options) -> NyuDataset:
    return NyuDataset(NyuOptions(root=root, **options))


def test_official_split_and_axes(root):
    dataset = open_nyu(root)
    assert dataset.notes == ("labeled layout",)
    assert dataset.keys("train") == ("labeled/0001", "labeled/0004", "labeled/0005")
    assert dataset.keys("test") == ("labeled/0002", "labeled/0003")
    assert dataset.size("test", "labeled/0002") == (480, 640)
    sample = dataset.load("test", "labeled/0003")
    assert sample.rgb.shape == (480, 640, 3)
    assert sample.rgb.dtype == np.uint8
    assert sample.depth.shape == (480, 640)
    assert sample.depth.dtype == np.float32
    for row, column in [(0, 0), (479, 0), (0, 639), (123, 456)]:
        assert sample.rgb[row, column].tolist() == [value(2, row, column, channel) for channel in range(3)]
        assert sample.depth[row, column] == pytest.approx(metres(2, row, column), rel=1e-6)
    assert sample.intrinsics is not None
    assert sample.intrinsics.fy == pytest.approx(519.469611)


def test_raw_has_holes_and_filled_has_not(root):
    raw, filled = open_nyu(root), open_nyu(root, depth="filled")
    assert np.argwhere(np.isnan(raw.load("test", "labeled/0002").depth)).tolist() == [[10, 20]]
    assert np.isfinite(filled.load("test", "labeled/0002").depth).all()
    assert raw.identity()["lists"] == filled.identity()["lists"]
    assert raw.identity() != filled.identity()
    with pytest.raises(SampleError, match=r"rawDepths, frame 4\) has no valid pixel"):
        raw.load("train", "labeled/0004")


def test_lists_beside_it_make_it_the_sync_layout(root):
    (root / "nyudepthv2_train_files_with_gt.txt").write_text("a/rgb_1.jpg a/d_1.png 518\n")
    (root / "nyudepthv2_test_files_with_gt.txt").write_text("a/rgb_2.jpg a/d_2.png 518\n")
    assert open_nyu(root).identity()["layout"] == "sync"
    assert open_nyu(root, layout="labeled").keys("test") == ("labeled/0002", "labeled/0003")


def test_files_elsewhere(root, tmp_path):
    expected = open_nyu(root, limit=2).identity()
    (root / MAT).rename(root / "other.mat")
    (root / SPLITS).rename(root / "s.mat")
    dataset = NyuDataset(NyuOptions(mat=root / "other.mat", splits=root / "s.mat", limit=2))
    assert dataset.identity() == expected
    assert dataset.missing_files("train") == []
    (root / "other.mat").unlink()
    assert dataset.missing_files("train") == [(key, root / "other.mat") for key in dataset.keys("train")]
    with pytest.raises(MissingFileError, match=r"other\.mat is not there; set dataset\.mat"):
        dataset.load("train", "labeled/0001")


def test_missing_files(root):
    (root / SPLITS).unlink()
    with pytest.raises(MissingFileError, match=r"splits\.mat is not there.*Set dataset\.splits"):
        open_nyu(root)
    (root / MAT).unlink()
    with pytest.raises(MissingFileError, match=r"nyu_depth_v2_labeled\.mat is not there.*Set dataset\.mat"):
        open_nyu(root, layout="labeled")
    with pytest.raises(UsageError, match=r"dataset\.test_root has no meaning for the labeled layout"):
        open_nyu(root, layout="labeled", test_root="x")


@pytest.mark.parametrize(
    ("train", "message"),
    [((0, 1), "trainNdxs holds index 0"), ((1, 6), "trainNdxs holds index 6; expected .* 1 to 5"), ((1, 1), "an index twice")],
)
def test_wrong_indices(root, train, message):
    write_splits(root / SPLITS, train=train)
    with pytest.raises(DatasetError, match=message):
        open_nyu(root)


def test_broken_files(root):
    scipy_io.savemat(root / SPLITS, {"other": np.ones(3)})
    with pytest.raises(DatasetError, match=r"splits\.mat has no variable trainNdxs"):
        open_nyu(root)
    (root / SPLITS).write_bytes(b"nothing of the kind" * 20)
    with pytest.raises(DatasetError, match=r"splits\.mat is not a MATLAB 5 file"):
        open_nyu(root)
    with h5py.File(root / MAT, "w") as file:
        file["images"] = np.zeros((2, 3, 4, 5), dtype=np.uint8)
    with pytest.raises(DatasetError, match=r"found arrays .*'rawDepths': None.*expected images \(1449, 3, 640, 480\)"):
        open_nyu(root)
    (root / MAT).write_bytes((root / MAT).read_bytes()[:100])
    with pytest.raises(DatasetError, match="is not a whole HDF5 file"):
        open_nyu(root)


def test_a_damaged_frame_names_the_file(root):
    with h5py.File(root / MAT, "w") as file:
        file["images"] = np.zeros((FRAMES, 3, 4, 4), dtype=np.uint8)
        depth = np.arange(1, FRAMES * 16 + 1, dtype=np.float32).reshape(FRAMES, 4, 4)
        frames = file.create_dataset("rawDepths", data=depth, chunks=(1, 4, 4), fletcher32=True)
        file.flush()
        place = frames.id.get_chunk_info(1).byte_offset
    with (root / MAT).open("r+b") as handle:
        handle.seek(place)
        handle.write(b"damage")
    dataset = open_nyu(root)
    assert dataset.load("train", "labeled/0001").depth.shape == (4, 4)
    with pytest.raises(SampleError, match=r"nyu_depth_v2_labeled\.mat: frame 2 cannot be read"):
        dataset.load("test", "labeled/0002")


@pytest.mark.parametrize("package", ["h5py", "scipy"])
def test_without_the_extra(root, monkeypatch, package):
    real = importlib.import_module

    def import_module(name: str) -> object:
        if name.startswith(package):
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UsageError, match=rf'need {package}, which is not installed .*pip install "pcd-depth\[nyu-mat\]"'):
        open_nyu(root)
