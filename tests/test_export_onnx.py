"""Exports to ONNX: what other runtimes compute from the file, against `Predictor`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcd.errors import PcdError, UsageError
from pcd.export.graph import DepthNetwork
from pcd.export.onnx import OnnxModel, write_onnx
from pcd.heads.base import Head
from pcd.stages import export_onnx as export_stage
from pcd.stages.export_onnx import Difference, OnnxExport, export_onnx
from pcd.stages.predict import Predictor
from pcd.stages.run_encoder import load_exportable
from pcd.stages.runs import Run
from pcd.views import ViewPlan
from tests.export_support import as_input, picture, train_tiny
from tests.test_cli import TOY, Command, pcd

__all__ = ["pcd"]

onnx: Any = importlib.import_module("onnx")
reference: Any = importlib.import_module("onnx.reference")

FRAME, OTHERS = (24, 40), [(40, 24), (7, 9), (120, 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("onnx"), "openclip:pcd-demo", "random")[0]


@pytest.fixture(scope="module")
def exported(run: Run) -> OnnxExport:
    return export_onnx(run, run.root.parent / "out" / "tiny.onnx")


@pytest.fixture
def written_before(exported: OnnxExport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the same run with the same options take the file that is there: tracing takes seconds."""

    def copy(network: DepthNetwork, path: Path, metadata: Mapping[str, str]) -> list[Path]:
        assert metadata == exported.metadata
        shutil.copyfile(exported.files[0], path)
        return [path]

    monkeypatch.setattr(export_stage, "write_onnx", copy)


def network(run: Run, **options: Any) -> DepthNetwork:
    head, _ = run.load_head("abs_rel", torch.device("cpu"))
    frame = (run.info["frame"][0], run.info["frame"][1])
    return DepthNetwork(load_exportable(run, None).network(), head, run.plan, frame, **options)


@pytest.mark.parametrize("size", [FRAME, *OTHERS])
def test_onnxruntime_gives_what_predict_gives(run: Run, exported: OnnxExport, size: tuple[int, int]) -> None:
    """Cropped for the size of the dataset's frames, whole for others; two images at once; tiles and mirrored views."""
    predictor = Predictor(run, device="cpu", uncertainty=True)
    assert predictor.plan_for(*size).crop == ((2, 21, 3, 36) if size == FRAME else None)
    images = [picture(*size, seed) for seed in (1, 2)]
    found = OnnxModel(exported.files[0]).predict(as_input(*images))
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(("depth", "uncertainty"), (2, 1, *size))
    for number, image in enumerate(images):
        expected = predictor.predict(image)
        assert expected.depth.std() > 1e-3  # a constant would be easy
        np.testing.assert_allclose(found["depth"][number, 0], expected.depth, rtol=1e-4)
        np.testing.assert_allclose(found["uncertainty"][number, 0], expected.std, rtol=1e-3)


def test_the_specification_gives_what_onnxruntime_gives(exported: OnnxExport) -> None:
    """ONNX's own evaluator, operator by operator in NumPy."""
    onnx.checker.check_model(str(exported.files[0]), full_check=True)
    inputs = as_input(picture(*FRAME, 3))
    found = reference.ReferenceEvaluator(str(exported.files[0])).run(None, {"image": inputs})
    for values, expected in zip(found, OnnxModel(exported.files[0]).predict(inputs).values(), strict=True):
        np.testing.assert_allclose(values, expected, rtol=2e-4)


def test_the_file_says_what_it_is_and_where_it_was_made_is_nowhere(run: Run, exported: OnnxExport) -> None:
    facts = OnnxModel(exported.files[0]).metadata
    assert facts == exported.metadata
    assert (facts["units"], facts["run"], facts["frame"], facts["tta"]) == ("metres", "run", "[24,40]", "true")
    assert json.loads(facts["labels"]) == ["random encoder weights", "synthetic scenes"]
    assert json.loads(facts["depth_range"]) == [0.001, 10.0]
    assert json.loads(facts["encoder_weights"])["digest"] == run.info["columns"]["clip/cls"]["encoder"]["weights"]["digest"]
    content = exported.files[0].read_bytes()
    for folder in (run.root, Path(torch.__file__).parent, Path(__file__).parent.parent):
        assert str(folder).encode() not in content
    model = onnx.load(exported.files[0])
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "depth", "uncertainty"]
    assert [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    weights = [value for value in model.graph.initializer if np.prod(value.dims) > 100]
    assert {value.data_type for value in weights} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bilinear-align-corners"])
@pytest.mark.parametrize("tta", [True, False])
def test_the_network_follows_every_option(run: Run, upsample: Any, tta: bool) -> None:
    predictor, made = Predictor(run, device="cpu", upsample=upsample, tta=tta), network(run, upsample=upsample, tta=tta)
    for size in [FRAME, *OTHERS]:
        image = picture(*size)
        with torch.inference_mode():
            depth = made(torch.from_numpy(as_input(image)))[0]
        np.testing.assert_allclose(depth[0, 0], predictor.predict(image).depth, rtol=1e-4)
    with pytest.raises(UsageError, match="upsample = 'cubic': known are nearest"):
        network(run, upsample="cubic")


@pytest.mark.usefixtures("written_before")
def test_a_file_that_differs_is_not_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "it.onnx"
    out.write_bytes(b"what was there before")
    with pytest.raises(PcdError, match=r"was not written: its depth differs from pcd's by up to .* m, .*\(allowed: 0\)"):
        export_onnx(run, out, tolerance=0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"it.onnx": b"what was there before"}
    with pytest.raises(UsageError, match=r"ends in \.onnx"):
        export_onnx(run, tmp_path / "it")


def test_differences_are_measured(exported: OnnxExport) -> None:
    assert 0 < exported.differences["depth"].relative < 1e-4
    depth = np.full((20, 50), 4, dtype=np.float32)
    other = depth.copy()
    other[0, :9] += 2.0**-9  # fewer than one pixel in a hundred
    found = Difference.of(other, depth, depth)
    assert (found.metres, found.relative, found.relative_99) == (2.0**-9, 2.0**-11, 0)
    assert found.is_within(1e-4)
    assert not found.is_within(4e-5)
    other[0, 9:12] += 2.0**-9
    assert not Difference.of(other, depth, depth).is_within(1e-4)
    assert found.or_worse(Difference(1, 0, 0.5)) == Difference(1, 2.0**-11, 0.5)
    assert not Difference(float("nan"), float("nan"), float("nan")).is_within(1)


class _Mean(Head):
    """A head without a distribution."""

    grid = (2, 2)

    def depth(self, columns: Mapping[str, Tensor]) -> Tensor:
        return columns["colour"].mean(dim=1)


class _Colours(torch.nn.Module):
    def forward(self, views: Tensor) -> dict[str, Tensor]:
        return {"colour": torch.nn.functional.avg_pool2d(views, 8).flatten(2)}


def test_a_head_without_a_distribution_gives_depth_alone_and_weights_may_lie_beside(tmp_path: Path) -> None:
    made = DepthNetwork(_Colours(), _Mean(), ViewPlan(canvas=(16, 16)), (16, 16))
    made.register_buffer("unused", torch.zeros(3), persistent=True)
    files = write_onnx(made, tmp_path / "mean.onnx", {"units": "metres"}, inline_bytes=1)
    assert [file.name for file in files] == ["mean.onnx", "mean.onnx.data"]
    image = picture(16, 16)
    found = OnnxModel(files[0]).predict(as_input(image))
    assert list(found) == ["depth"]
    corner = (image[:8, :8].mean() / 255 + image[:8, :8].mean() / 255) / 2  # mirrored and mirrored back
    np.testing.assert_allclose(found["depth"][0, 0, 0, 0], corner, rtol=1e-5)


def test_missing_packages_and_encoders_that_cannot(pcd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pcd("extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu")[0] == 0
    assert pcd("train", "--cache", "cache/toy", "--run", "runs/one", *TOY)[0] == 0
    code, _, err = pcd("export", "runs/one", "--to", "onnx", "--out", "toy.onnx")
    assert code == 2
    assert "encoder 'toy:toy' cannot be exported: ToyEncoder has no network()" in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = pcd("export", "runs/one", "--to", "onnx", "--out", "toy.onnx")
    assert code == 2
    assert 'needs the package onnxscript, which is not installed: pip install "pcd-depth[onnx]"' in err
    assert not Path("toy.onnx").exists()


@pytest.mark.usefixtures("written_before")
def test_the_command_line(run: Run, pcd: Command) -> None:
    code, out, err = pcd("export", str(run.root), "--to", "onnx", "--out", "out/it.onnx", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["files"] == {"out/it.onnx": Path("out/it.onnx").stat().st_size}
    assert result["differences"]["depth"]["relative"] < 1e-4
    assert "note: random encoder weights" in err
    code, out, _ = pcd("export", str(run.root), "--to", "onnx", "--out", "out/it.onnx")
    assert code == 0
    assert "of the depth there" in out
    assert [file.name for file in Path("out").iterdir()] == ["it.onnx"]
