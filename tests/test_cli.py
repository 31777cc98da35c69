"""The command line as a person uses it, in process, on toy data."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pcd import cli
from pcd.cache import Cache
from tests.toy import ToyEncoder

Command = Callable[..., tuple[int, str, str]]
TOY = ["--set", "train.epochs=2", "--set", "head.table_init=tokens", "--set", "head.max_depth=10.0"]


@pytest.fixture
def pcd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `pcd ARGS` in a scratch folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pcd", *args])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def extracted(pcd: Command) -> Command:
    code, _, err = pcd("extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--device", "cpu")
    assert code == 0, err
    return pcd


@pytest.fixture
def trained(extracted: Command) -> Command:
    code, _, err = extracted("train", "--cache", "cache/toy", "--run", "runs/one", *TOY)
    assert code == 0, err
    return extracted


def test_the_three_commands(trained: Command) -> None:
    code, out, err = trained("evaluate")
    assert code == 0, err
    assert "eigen" in out
    assert "synthetic scenes" in err
    assert "random encoder weights" in err
    assert (Path("runs/one/evaluations/test-abs_rel") / "samples.csv").read_text().count("\n") > 5


def test_json_is_one_document_on_standard_output(trained: Command) -> None:
    code, out, _ = trained("evaluate", "--run", "runs/one", "--split", "test", "--protocol", "eigen", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["labels"] == ["random encoder weights", "synthetic scenes"]
    assert set(result["protocols"]) == {"eigen"}
    scores = result["protocols"]["eigen"]
    assert scores["images"] == 5
    assert 0 < scores["metrics"]["abs_rel"] < 2
    assert "flip TTA" in scores["description"]
    assert json.loads(Path("runs/one/evaluations/test-abs_rel/metrics.json").read_text()) == result


def test_another_option_reuses_the_cache_and_makes_another_run(extracted: Command) -> None:
    calls = ToyEncoder.calls
    for dropout in ("0.1", "0.3"):
        code, _, err = extracted("train", "--cache", "cache/toy", *TOY, "--set", f"head.dropout={dropout}")
        assert code == 0, err
    assert ToyEncoder.calls == calls
    assert len(list(Path("runs").iterdir())) == 2
    code, _, err = extracted("train", "--cache", "cache/toy", *TOY, "--set", "head.dropout=0.1")
    assert code == 0
    assert "is complete: epoch 2" in err
    assert len(list(Path("runs").iterdir())) == 2


def test_more_epochs_continue_the_same_run(trained: Command) -> None:
    more = [*TOY[2:], "--set", "train.epochs=3"]
    code, _, err = trained("train", "--cache", "cache/toy", "--run", "runs/one", "--resume", *more)
    assert code == 0, err
    assert "continuing after epoch 2" in err
    code, _, err = trained("train", "--cache", "cache/toy", "--run", "runs/straight", *more)
    assert code == 0
    first, second = (Path(f"runs/{name}/checkpoints/last.safetensors") for name in ("one", "straight"))
    from pcd.training.checkpoints import load

    a, b = load(first)[0], load(second)[0]
    assert a.keys() == b.keys()
    assert all(bool((a[name] == b[name]).all()) for name in a)


def test_checkpoints_and_overrides_are_named_in_the_result(trained: Command) -> None:
    code, out, _ = trained("evaluate", "--checkpoint", "each", "--upsample", "nearest", "--no-tta", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result["epoch"]) >= {"rmse", "abs_rel", "delta1"}
    assert any("upsample=nearest" in label and "tta=" in label for label in result["protocols"])
    code, out, _ = trained("evaluate", "--protocol", "eigen", "--upsample", "nearest")
    assert out.count("eigen[upsample=nearest]") == 2  # in the table and beside the words
    code, out, _ = trained("evaluate", "--checkpoint", "last", "--split", "val", "--json")
    assert json.loads(out)["epoch"] == 2


def test_predict_writes_metres_in_three_forms(trained: Command) -> None:
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for name, size in {"a.png": (24, 40), "b.jpg": (61, 33)}.items():
        cv2.imwrite(f"photos/{name}", generator.integers(0, 255, (*size, 3), dtype=np.uint8))
    code, out, err = trained("predict", "photos", "--run", "runs/one", "--out", "depth", "--json")
    assert code == 0, err
    written = json.loads(out)
    assert [Path(item["image"]).name for item in written] == ["a.png", "b.jpg"]
    for item, size in zip(written, [(24, 40), (61, 33)], strict=True):
        metres = np.load(item["npy"])
        stored = np.asarray(cv2.imread(item["png"], cv2.IMREAD_UNCHANGED))
        assert metres.shape == stored.shape == size
        assert stored.dtype == np.uint16
        np.testing.assert_allclose(stored / item["units_per_metre"], metres, atol=0.5 / item["units_per_metre"] + 1e-6)
        assert Path(item["picture"]).stat().st_size > 1000
        assert 0.1 <= metres.min() <= metres.max() <= 10
    code, out, _ = trained("predict", "photos/a.png", "--out", "depth", "--no-tta", "--upsample", "nearest")
    assert code == 0
    assert " m -> " in out
    code, _, err = trained("predict", "nowhere.png", "--out", "depth")
    assert code == 2
    assert "nowhere.png is not there" in err


def test_inspect_and_verify(extracted: Command) -> None:
    code, out, _ = extracted("cache", "inspect", "cache/toy")
    assert code == 0
    assert "complete" in out
    assert "random weights" in out
    assert json.loads(extracted("cache", "inspect", "cache/toy", "--json")[1])["complete"] is True
    assert extracted("cache", "verify", "cache/toy")[0] == 0
    shard = next(Path("cache/toy/test/clip/patch").glob("c/*/0/0"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    code, out, err = extracted("cache", "verify", "cache/toy")
    assert code == 1
    assert "1 of 20 rows fail their checksum: 0" in out
    assert "pcd cache verify cache/toy --repair" in err
    assert extracted("cache", "verify", "cache/toy", "--repair", "--device", "cpu")[0] == 0
    assert extracted("cache", "verify", "cache/toy")[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["extract", "--dataset", "toi"], "Unknown dataset 'toi'. Did you mean 'toy'"),
        (["extract", "--dataset", "toy", "--encoder", "opencip:x"], "Unknown encoder 'opencip'. Did you mean 'openclip'"),
        (["train", "--cache", "nowhere"], "nowhere is not a pcd cache"),
        (["evaluate"], "no run with a finished epoch under runs/"),
        (["evaluate", "--run", "nowhere"], "nowhere is not a run"),
        (["run", "nyuu"], "Unknown recipe 'nyuu'. Did you mean 'nyu'"),
        (["cache", "verify", "nowhere"], "nowhere is not a pcd cache"),
    ],
)
def test_errors_are_one_message_without_traceback(pcd: Command, args: list[str], words: str) -> None:
    code, out, err = pcd(*args)
    assert code in (1, 2)
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_wrong_options_of_a_trained_run(trained: Command) -> None:
    code, _, err = trained("train", "--cache", "cache/toy", "--run", "runs/one", *TOY, "--set", "head.dropout=0.5")
    assert code == 2
    assert "head.dropout: found 'nothing', wanted 0.5" in err
    code, _, err = trained("train", "--cache", "cache/toy", "--run", "runs/two", "--resume", *TOY)
    assert code == 2
    assert "holds no run to continue" in err
    code, _, err = trained("train", "--cache", "cache/toy", *TOY, "--set", 'train.monitor=["rmsee"]')
    assert code == 2
    assert "unknown metric 'rmsee'" in err
    code, _, err = trained("evaluate", "--protocol", "eigen-nyu")
    assert code == 2
    code, _, err = trained("evaluate", "--checkpoint", "speed")
    assert code == 2
    assert "no best epoch for 'speed'" in err


def test_a_run_is_not_scored_on_another_encoders_cache(trained: Command) -> None:
    code, _, err = trained("extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "file", "--cache", "cache/other")
    assert code == 0, err
    code, _, err = trained("evaluate", "--run", "runs/one", "--cache", "cache/other")
    assert code == 2
    assert "weights.kind: found 'file', wanted 'random'" in err


def test_a_run_that_never_finished_an_epoch_can_be_begun_with_other_options(extracted: Command) -> None:
    common = ["train", "--cache", "cache/toy", "--run", "runs/one", "--set", "train.epochs=1"]
    code, _, err = extracted(*common, "--set", "head.bins=7")  # no texts for these bins
    assert code == 1
    assert "lacks the text embeddings" in err
    code, _, err = extracted(*common, "--set", "head.table_init=tokens")
    assert code == 0, err


def test_a_complete_run_reads_no_columns(trained: Command) -> None:
    code, _, err = trained("train", "--cache", "cache/toy", "--run", "runs/one", *TOY)
    assert code == 0
    assert err.startswith("runs/one is complete: epoch 2.")
    assert "of columns" not in err


def test_a_run_whose_cache_has_moved_says_so(trained: Command) -> None:
    Path("cache/toy").rename("elsewhere")
    code, _, err = trained("evaluate", "--run", "runs/one")
    assert code == 2
    assert "which is not there; say where it is with --cache" in err
    assert trained("evaluate", "--run", "runs/one", "--cache", "elsewhere")[0] == 0


def test_text_tables_need_a_text_tower(pcd: Command) -> None:
    code, _, err = pcd("extract", "--dataset", "toy", "--encoder", "toy:toy", "--set", "encoder.text=false")
    assert code == 0, err
    assert "no text tower" in err
    code, _, err = pcd("train", "--cache", "cache/toy", "--set", "train.epochs=1", "--set", "head.table_init=text")
    assert code == 2
    assert 'head.table_init = "tokens" or "random"' in err


def test_missing_texts_say_which_command_adds_them(extracted: Command) -> None:
    code, _, err = extracted("train", "--cache", "cache/toy", "--set", "head.bins=7", "--set", "train.epochs=1")
    assert code == 1
    assert "lacks the text embeddings" in err
    assert "--recipe NAME" in err


def test_help_and_version(pcd: Command) -> None:
    for args in (["-h"], ["--help"], ["train", "-h"], ["cache", "verify", "-h"]):
        code, out, _ = pcd(*args)
        assert code == 0
        assert "Usage" in out
    assert "Example: pcd train" in pcd("train", "-h")[1]
    assert pcd("--version")[1].startswith("pcd 0.")


def test_interrupting_says_that_nothing_is_lost(extracted: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from pcd.training.loop import Loop

    def stop(self: Loop, on_epoch: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Loop, "run", stop)
    code, _, err = extracted("train", "--cache", "cache/toy", *TOY)
    assert code == 130
    assert "the same command continues" in err


def test_defects_are_called_so(extracted: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Cache, "open", broken)
    code, _, err = extracted("cache", "verify", "cache/toy")
    assert code == 1
    assert "unexpected ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
    assert "Traceback" in extracted("--debug", "cache", "verify", "cache/toy")[2]


def test_doctor_tells_versions_and_names(pcd: Command) -> None:
    code, out, err = pcd("doctor", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert "openclip" in facts["names"]["encoders"]
    assert facts["versions"]["torch"].startswith("2.")
    assert "versions" in pcd("doctor")[1]


def test_protocols_are_listed_in_words(pcd: Command) -> None:
    code, out, _ = pcd("protocols", "--family", "kitti")
    assert code == 0
    assert "eigen-kitti-garg (kitti, also eigen)" in out
    assert "117.188" in out
    assert "eigen-nyu" not in out
    assert {item["family"] for item in json.loads(pcd("protocols", "--json")[1])} == {"nyu", "kitti", "generic"}
    assert pcd("protocols", "--family", "kity")[0] == 2


def test_a_cache_without_mirrored_views_is_scored_without_tta(pcd: Command) -> None:
    extract = ["extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", "--no-flips", "--device", "cpu"]
    assert pcd(*extract)[0] == 0
    assert pcd("train", "--cache", "cache/toy", *TOY)[0] == 0
    code, _, err = pcd("evaluate")
    assert code == 2
    assert "--no-tta" in err
    code, out, _ = pcd("evaluate", "--no-tta", "--json")
    assert code == 0
    assert all("no TTA" in scores["description"] for scores in json.loads(out)["protocols"].values())


def test_another_ground_truth_is_another_run(extracted: Command) -> None:
    nearest = ["--set", "views.depth_resize=nearest"]
    code, _, err = extracted("train", "--cache", "cache/toy", *TOY, *nearest)
    assert code == 1
    assert "holds no ground truth resized by views.depth_resize = 'nearest'" in err
    assert extracted("extract", "--dataset", "toy", "--encoder", "toy:toy", "--weights", "random", *nearest)[0] == 0
    for options in ([], nearest):
        assert extracted("train", "--cache", "cache/toy", *TOY, *options)[0] == 0
    assert len(list(Path("runs").iterdir())) == 2
