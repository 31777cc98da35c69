"""Image networks of open_clip as ONNX: every column they can make, from a batch of another size than the exported one."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pcd.encoders import create_encoder, with_columns
from pcd.encoders.openclip import OpenClipEncoder
from tests.export_support import train_tiny
from tests.tiny_clip import tiny_model, tiny_weights
from tests.tiny_resnet import resnet_weights, tiny_resnet

TOWERS = {
    "pcd-tiny": [f"clip/{name}" for name in ("patch@1", "tokens@2", "cls@2", "maskclip")],
    "pcd-tiny-resnet": [f"clip/{name}" for name in ("stem", "layer1", "layer2", "layer3", "layer4")],
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_network_is_one_of_tensor_operations(tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    resnet = name.endswith("resnet")
    file = (resnet_weights if resnet else tiny_weights)(tmp_path / "w.safetensors", (tiny_resnet if resnet else tiny_model)())
    encoder = with_columns(create_encoder(f"openclip:{name}", {"weights": str(file)}, (64, 96), "cpu"), TOWERS[name])
    assert isinstance(encoder, OpenClipEncoder)
    names = [spec.name for spec in encoder.columns]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter speaks of its own code
        torch.onnx.export(
            encoder.network(), (torch.zeros(2, 3, 64, 96),), str(tmp_path / "n.onnx"), dynamo=True, verbose=False,
            input_names=["views"], output_names=names, dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    views = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    found = onnxruntime.InferenceSession(str(tmp_path / "n.onnx")).run(names, {"views": views.numpy()})
    for (column, expected), values in zip(encoder.encode(views).items(), found, strict=True):
        assert values.dtype == expected.numpy().dtype
        np.testing.assert_allclose(values.astype(np.float64), expected.double().numpy(), rtol=2e-3, atol=3e-3, err_msg=column)


def test_a_run_on_a_resnet_is_exported_with_its_image_weights(tmp_path: Path) -> None:
    from pcd.stages.export_bundle import export_bundle
    from pcd.stages.predict import Predictor
    from pcd.stages.runs import open_run
    from tests.export_support import picture

    weights = resnet_weights(tmp_path / "w.safetensors", tiny_resnet())
    run, _ = train_tiny(tmp_path, "openclip:pcd-tiny-resnet", str(weights), ["views.canvas=[32,64]", "views.grid=[1,2]"])
    assert [*run.info["columns"]] == ["clip/patch", "clip/cls"]
    bundle, image = export_bundle(run, tmp_path / "bundle", with_encoder=True), picture(24, 40)
    expected = Predictor(run, device="cpu").predict(image).depth
    np.testing.assert_array_equal(Predictor(open_run(bundle.root), device="cpu").predict(image).depth, expected)
