"""Bundles: opened again they predict and score as the run does; damaged, foreign and edited ones are refused."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import pcd as package
from pcd.cache import Cache
from pcd.errors import CorruptError, FingerprintError, RunError, UsageError, WeightsError
from pcd.export import bundle
from pcd.export.card import model_card
from pcd.fingerprint import file_digest
from pcd.stages.evaluate import evaluate
from pcd.stages.export_bundle import export_bundle
from pcd.stages.predict import Predictor
from pcd.stages.runs import Run, open_run
from pcd.stages.train import train
from tests.export_support import picture, train_tiny
from tests.test_cli import Command, pcd
from tests.tiny_clip import tiny_model, tiny_weights

__all__ = ["pcd"]

yaml: Any = importlib.import_module("yaml")
SIZES = [(24, 40), (31, 17)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Cache]:
    """A run on weights of both towers, so that the image tower alone is another file; scored."""
    root = tmp_path_factory.mktemp("trained")
    weights = tiny_weights(root / "both.safetensors", tiny_model())
    run, cache = train_tiny(root, f"openclip:{tiny_model()}", str(weights))
    evaluate(run, cache, protocols=["eigen"], device="cpu")
    return run, cache


@pytest.fixture
def out(trained: tuple[Run, Cache], tmp_path: Path) -> Path:
    """A bundle with its encoder."""
    export_bundle(trained[0], tmp_path / "bundle", with_encoder=True)
    return tmp_path / "bundle"


def depths(run: Run, **options: Any) -> list[Any]:
    predictor = Predictor(run, device="cpu", **options)
    return [predictor.predict(picture(*size)).depth for size in SIZES]


def test_a_bundle_predicts_bit_for_bit_as_its_run(trained: tuple[Run, Cache], out: Path, tmp_path: Path) -> None:
    run, expected = trained[0], depths(trained[0])
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    found = package.open_run(moved)
    for mine, theirs in zip(depths(found), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    export_bundle(run, tmp_path / "head")
    weights = run.info["encoders"]["openclip"]["table"]["weights"]
    for mine, theirs in zip(depths(open_run(tmp_path / "head"), weights=weights), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(WeightsError, match=r"weights file both\.safetensors is not there"):
        Predictor(open_run(tmp_path / "head"), device="cpu")
    with pytest.raises(FingerprintError, match=r"weights\.kind: found 'random', wanted 'file'"):
        Predictor(open_run(tmp_path / "head"), weights="random", device="cpu")
    assert (found.name, found.labels, found.identity) == ("run", ["synthetic scenes"], run.identity)


def test_what_is_in_it(trained: tuple[Run, Cache], out: Path) -> None:
    run = trained[0]
    assert sorted(file.name for file in out.iterdir()) == sorted(bundle.FILES)
    head = run.load_head("abs_rel", Predictor(run, device="cpu")._device)[0].state_dict()
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == head.keys()
    assert all(bool((stored[name] == head[name]).all()) for name in head)
    visual = load_file(out / "encoder.safetensors")
    original = load_file(run.info["encoders"]["openclip"]["table"]["weights"])
    assert visual.keys() == {name for name in original if name.startswith("visual.")}
    assert all(bool((visual[name] == original[name]).all()) for name in visual)
    listed = json.loads((out / "run.json").read_text())["bundle"]["files"]
    assert {name: item["sha256"] for name, item in listed.items()} == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in bundle.FILES if name != "run.json"
    }
    assert {(out / name).stat().st_mode & 0o444 for name in bundle.FILES} == {0o444}  # others may read it


def test_nothing_tells_of_the_machine(trained: tuple[Run, Cache], out: Path) -> None:
    home, root = str(Path.home()).encode(), str(trained[0].root.parent).encode()
    for file in out.iterdir():
        content = file.read_bytes()
        assert root not in content
        assert str(out.parent).encode() not in content
        assert home + b"/" not in content
    value = {"a": ["/data/w.pt", {"b": "~/x/y"}, "C:\\w\\v.bin", "weights/w.pt", "/"], "n": 3, "t": ("file:///a/b",)}
    expected = {"a": ["w.pt", {"b": "y"}, "v.bin", "weights/w.pt", ""], "n": 3, "t": ["b"]}
    assert bundle.without_paths(value) == expected


def test_a_bundle_is_scored_as_its_run(trained: tuple[Run, Cache], out: Path) -> None:
    run, cache = trained
    expected = evaluate(run, cache, protocols=["eigen"], device="cpu").metrics("eigen")
    found = evaluate(open_run(out), cache, protocols=["eigen"], device="cpu")
    assert found.metrics("eigen") == expected
    assert found.folder == out / "evaluations" / "test-abs_rel"
    assert json.loads((out / "metrics.json").read_text())["test-abs_rel"]["protocols"]["eigen"]["metrics"] == expected
    with pytest.raises(RunError, match="is an exported bundle, which does not know where a cache is; say it with --cache"):
        evaluate(open_run(out), device="cpu")
    with pytest.raises(RunError, match="holds no history"):
        _ = open_run(out).history
    with pytest.raises(RunError, match="is an exported bundle, which cannot be trained on"):
        train(run.recipe, cache, out, device="cpu")


def test_only_its_own_epoch_can_be_asked_for(trained: tuple[Run, Cache], tmp_path: Path) -> None:
    run = trained[0]
    export_bundle(run, tmp_path / "last", checkpoint="last")
    opened = open_run(tmp_path / "last")
    assert opened.best.keys() == {name for name, value in run.best.items() if value["epoch"] == 2}
    assert opened.checkpoint_file("last") == (tmp_path / "last" / "model.safetensors", 2)
    with pytest.raises(RunError, match="of epoch 2 alone, which is not that of checkpoint 'silog'; give --checkpoint last"):
        opened.checkpoint_file("silog")


def test_the_card_is_read_by_the_hubs_library(trained: tuple[Run, Cache], out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("pcd", "depth-estimation", None)
    assert {"depth-estimation", "synthetic-scenes"} <= set(card.data.tags)
    text = (out / "README.md").read_text()
    assert text.splitlines()[1].startswith("# license: say here")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "depth-estimation"
    assert "model-index" not in front  # the hub's table of results would leave out that the scenes are synthetic
    scores = json.loads((out / "metrics.json").read_text())["test-abs_rel"]["protocols"]["eigen"]
    assert f"| RMSE (m), lower is better | {scores['metrics']['rmse']:.4f} |" in text
    for words in (scores["description"], "> **synthetic scenes**", "5 images (synthetic scenes)", "0.001 and 10 m", "toy"):
        assert words in text


def test_scores_without_labels_are_listed_for_the_hub(trained: tuple[Run, Cache], out: Path) -> None:
    info, evaluations = json.loads((out / "run.json").read_text()), json.loads((out / "metrics.json").read_text())
    text = model_card({**info, "labels": []}, trained[0].recipe, evaluations, "mit")
    data: Any = ModelCard(text).data
    assert data.license == "mit"
    results = {item.metric_type: item.metric_value for item in data.eval_results or []}
    assert results["abs_rel"] == evaluations["test-abs_rel"]["protocols"]["eigen"]["metrics"]["abs_rel"]
    assert "license: say" not in text
    unscored = model_card({**info, "labels": ["random encoder weights"]}, trained[0].recipe, {})
    assert "Not scored" in unscored
    assert "> **random encoder weights**: the encoder was never trained" in unscored


@pytest.mark.parametrize("name", ["model.safetensors", "encoder.safetensors"])
def test_damaged_weights_are_refused(out: Path, name: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[-3] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{name} is not the file that was exported: SHA-256 [0-9a-f]{{64}}, recorded"):
        open_run(out)
    (out / name).unlink()
    with pytest.raises(CorruptError, match=rf"{name} is not there; the bundle is incomplete"):
        open_run(out)


def test_foreign_and_later_bundles_are_refused(out: Path) -> None:
    good = json.loads((out / "run.json").read_text())

    def fails(words: str, **change: Any) -> None:
        (out / "run.json").write_text(json.dumps({**copy.deepcopy(good), **change}))
        with pytest.raises(RunError, match=words):
            open_run(out)

    fails("a bundle of format 2; this pcd reads format 1", bundle={**good["bundle"], "format": 2})
    fails("a bundle of format 'x'", bundle="x")
    fails("the bundle lacks epoch, files", bundle={k: v for k, v in good["bundle"].items() if k not in ("epoch", "files")})
    fails(r"lists no model\.safetensors", bundle={**good["bundle"], "files": {}})
    (out / "run.json").write_text('{"hello": 1}')
    with pytest.raises(RunError, match=r"not that of a run \(without columns, .*\); was it written by something else"):
        open_run(out)
    (out / "run.json").write_text("[]")
    with pytest.raises(RunError, match="not that of a run; was"):
        open_run(out)
    (out / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    good["bundle"]["files"]["model.safetensors"]["sha256"] = file_digest(out / "model.safetensors")
    (out / "run.json").write_text(json.dumps(good))
    with pytest.raises(CorruptError, match="the weights are damaged"):
        open_run(out).load_head("abs_rel", Predictor(open_run(out), device="cpu")._device)


def test_only_an_earlier_bundle_of_the_run_is_written_over(trained: tuple[Run, Cache], out: Path, tmp_path: Path) -> None:
    run = trained[0]
    (out / "mine.txt").write_text("kept")
    export_bundle(run, out)
    assert not (out / "encoder.safetensors").exists()  # of the export before
    assert (out / "mine.txt").read_text() == "kept"
    with (out / "README.md").open("a") as card:
        card.write("My own words.\n")
    with pytest.raises(UsageError, match=r"README\.md was edited since it was written; save your text, then give --force"):
        export_bundle(run, out)
    export_bundle(run, out, force=True)
    assert "My own words" not in (out / "README.md").read_text()
    other = json.loads((out / "run.json").read_text())
    other["bundle"] |= {"identity": "another", "run": "theirs"}
    (out / "run.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"is a bundle of another run \(theirs\)"):
        export_bundle(run, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("words")
    with pytest.raises(UsageError, match="is not empty and holds no bundle"):
        export_bundle(run, tmp_path / "full")
    for force in (False, True):
        with pytest.raises(UsageError, match="is a run with its checkpoints"):
            export_bundle(run, run.root, force=force)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bundle", "full"]


def test_the_command_line(trained: tuple[Run, Cache], pcd: Command) -> None:
    run, cache = trained
    code, printed, err = pcd("export", str(run.root), "--to", "bundle", "--out", "mine", "--with-encoder", "--license", "mit")
    assert code == 0, err
    assert "scores in the card: test-abs_rel" in printed
    assert "note: synthetic scenes" in err
    code, printed, err = pcd("evaluate", "--run", "mine", "--cache", str(cache.root), "--protocol", "eigen", "--json")
    assert code == 0, err
    assert json.loads(printed)["labels"] == ["synthetic scenes"]
    code, _, err = pcd("export", "mine", "--to", "bundle", "--out", "again")
    assert code == 2
    assert "mine is a bundle already; copy the folder" in err
    code, printed, _ = pcd("export", str(run.root), "--to", "bundle", "--out", "mine", "--checkpoint", "last", "--json")
    assert code == 0
    result = json.loads(printed)
    same = run.best["abs_rel"]["epoch"] == 2
    assert (result["evaluations"], result["left_out"]) == ((["test-abs_rel"], []) if same else ([], ["test-abs_rel"]))


def test_random_weights_need_no_file(tmp_path: Path) -> None:
    run, _ = train_tiny(tmp_path, "openclip:pcd-demo", "random", ["views.canvas=[32,64]", "views.grid=[1,2]"])
    made = export_bundle(run, tmp_path / "bundle", with_encoder=True)
    assert "encoder.safetensors" not in made.files
    assert "drawn from their seed" in made.notes[0]
    shutil.rmtree(tmp_path / "cache")
    expected = depths(run)
    shutil.rmtree(run.root)
    for mine, theirs in zip(depths(open_run(tmp_path / "bundle")), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "drawn anew from their seed" in text
    assert "Not scored" in text
