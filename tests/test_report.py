"""The report: its pieces by hand and in loops, and the stage on toy runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from pcd.errors import RunError, UsageError
from pcd.evaluation.protocols import CATALOGUE
from pcd.evaluation.statistics import holm
from pcd.evaluation.tables import read_scores
from pcd.progress import SILENT
from pcd.recipe import parse_recipe
from pcd.reports.contents import best_of, differences_table, number, protocols_table, scores_table
from pcd.reports.drawing import GRID, INK, inline, new_figure, style
from pcd.reports.panels import Predicted, Sample, layers, scales_of, shrink, thicken
from pcd.reports.published import published
from pcd.stages.export_bundle import export_bundle
from pcd.stages.extract import extract
from pcd.stages.report import evaluated, report
from pcd.stages.runs import Run, open_run
from pcd.stages.train import train
from tests.runs_support import runs
from tests.test_cli import Command, pcd
from tests.test_extract import toy_recipe

__all__ = ["pcd", "runs"]


def test_holm_by_hand_and_in_any_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.01]) == pytest.approx([0.6, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_published_rows_name_protocols_we_have_and_say_what_differs() -> None:
    names = {protocol.name for protocol in CATALOGUE}
    for family in ("nyu", "kitti"):
        rows = published(family)
        assert len(rows) > 8
        for row in rows:
            assert row.protocol in names | {""}
            assert (row.comparable == "no") == (row.protocol == "")
            assert row.note
            assert row.source
            assert row.values["delta1"] < row.values["delta2"] < row.values["delta3"] < 1
    ours = {row.method: row for row in published("kitti")}["PureCLIP-Depth (ViT-L/14@336)"]
    metres = ours.values["rmse"] * 1000 / 256
    assert f"about {metres:.2f} m" in ours.note
    assert published("generic") == []


def test_log10_beside_delta3_shows_which_printed_columns_cannot_be_log10() -> None:
    """Pixels within 1.25^3 add less than log10(1.25^3) each: the others would have to be off by more than a factor of ten."""
    limit = 3 * math.log10(1.25)
    for row in published("kitti"):
        if "log10" in row.values:
            rest = (row.values["log10"] - row.values["delta3"] * limit) / (1 - row.values["delta3"])
            assert (rest > 1) == ("RMSElog" in row.note)


def test_the_best_value_depends_on_the_metric() -> None:
    assert best_of("abs_rel", [0.3, 0.2, None]) == {1}
    assert best_of("delta1", [0.3, 0.2]) == {0}
    assert best_of("bias", [-0.3, 0.2, -0.2]) == {1, 2} or best_of("bias", [-0.3, 0.2]) == {1}
    assert best_of("abs_rel", [0.3]) == set()
    assert [number(value) for value in (None, -0.0001, -0.5)] == ["–", "0.000", "-0.500"]


def test_shrinking_keeps_sparse_depth() -> None:
    depth = np.random.default_rng(0).uniform(1, 9, (9, 12)).astype(np.float32)
    depth[np.random.default_rng(1).random(depth.shape) < 0.7] = np.nan
    small = shrink(depth, 4)  # cells of 3 x 3
    assert small.shape == (3, 4)
    for row in range(3):
        for column in range(4):
            cell = depth[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            valid = [float(v) for v in cell.ravel() if not math.isnan(v)]
            if valid:
                assert small[row, column] == pytest.approx(math.fsum(valid) / len(valid), rel=1e-6)
            else:
                assert math.isnan(small[row, column])
    assert shrink(depth, 12) is depth


def test_thickening_changes_no_known_depth() -> None:
    depth = np.full((5, 5), np.nan, dtype=np.float32)
    depth[2, 2], depth[2, 3] = 3.0, 1.0
    thick = thicken(depth)
    assert (thick[2, 2], thick[2, 3]) == (3.0, 1.0)
    assert np.isfinite(thick).sum() == 12
    assert thick[1, 4] == 1.0
    assert math.isnan(thick[0, 0])


def test_all_samples_share_their_scales_and_errors_are_signed() -> None:
    truth = np.full((8, 8), 4.0, dtype=np.float32)
    near, far = truth - 1, truth + 1
    samples = [
        Sample("a", "best", None, truth, {"r": Predicted(near, None, {"abs_rel": 0.25})}),
        Sample("b", "worst", None, truth, {"r": Predicted(far, None, {"abs_rel": 0.25})}),
    ]
    scales = scales_of(samples)
    assert list(scales.depth) == pytest.approx([3.0, 5.0])
    assert scales.error == pytest.approx(1.0)
    first, second = (layers(sample, sample.predicted["r"], scales) for sample in samples)
    assert set(first) == {"truth", "prediction", "error"}
    assert (first["truth"] == second["truth"]).all()
    assert first["error"][0, 0, 0] > first["error"][0, 0, 2]  # too near: red
    assert second["error"][0, 0, 2] > second["error"][0, 0, 0]  # too far: blue


def test_inlined_figures_take_the_colours_of_the_page_and_keep_their_ids_apart() -> None:
    svgs = []
    for prefix in ("one", "two"):
        with style():
            figure, (axis,) = new_figure(1)
            axis.fill_between([0, 1], [0, 0], [1, 1])
        svgs.append(inline(figure, prefix, 'a "b" & <c>'))
    assert all(colour not in svg for svg in svgs for colour in (INK, GRID))
    assert "currentColor" in svgs[0]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, known in zip(svgs, ids, strict=True):
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert used <= known
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == 'a "b" & <c>'
        assert root.get("width") is None


def test_a_report_of_two_runs(runs: list[Run], tmp_path: Path) -> None:
    made = report(runs, tmp_path / "out", samples=1, device="cpu")
    names = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    stems = ["by-distance", "differences", "joint-1", "joint-2", "samples-1", "samples-2", "training"]
    stems += ["uncertainty-1", "uncertainty-2"]
    assert names == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg"))
    for name in names:
        path = tmp_path / "out" / "figures" / name
        if path.suffix == ".svg":
            ElementTree.parse(path)
        else:
            picture = cv2.imread(str(path))
            assert picture is not None
            assert len(np.unique(picture)) > 3
    contents = made.contents
    assert contents.protocols == ["pureclip", "eigen", "pureclip-paper"]
    assert contents.labels == ["random encoder weights", "synthetic scenes"]
    assert [sample.rule for sample in contents.samples] == ["best", "median", "worst"]
    assert [len(contents.differences), {item.run for item in contents.differences}] == [4, {"second"}]
    text = made.page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#|figures/)', text)
    for label in contents.labels:
        assert label in text


def test_tables_hold_what_the_evaluation_says(runs: list[Run], tmp_path: Path) -> None:
    contents = report(runs, tmp_path, samples=0, device="cpu").contents
    stored = json.loads((runs[1].root / "evaluations" / "test-abs_rel" / "metrics.json").read_text())
    scores = stored["protocols"]["eigen"]
    row = scores_table(contents, "eigen")[1][1]
    assert row[0].text == "second"
    assert row[1].text == f"{scores['metrics']['abs_rel']:.3f}"
    low, high = scores["intervals"]["abs_rel"]
    assert row[1].small == f"{low:.3f}–{high:.3f}"
    assert low <= scores["metrics"]["abs_rel"] <= high
    span = [stored["protocols"][label]["metrics"]["abs_rel"] for label in contents.protocols]
    assert protocols_table(contents, contents.runs[1])[1][-1][1].text == f"{min(span):.3f}–{max(span):.3f}"
    table = read_scores(runs[1].root / "evaluations" / "test-abs_rel" / "samples.csv")
    mean = math.fsum(table["eigen"]["abs_rel"].values()) / 5
    assert mean == pytest.approx(scores["metrics"]["abs_rel"])
    item = next(item for item in contents.differences if item.metric == "abs_rel")
    first = read_scores(runs[0].root / "evaluations" / "test-abs_rel" / "samples.csv")["pureclip"]["abs_rel"]
    pairs = [table["pureclip"]["abs_rel"][key] - value for key, value in first.items()]
    assert item.found.difference == pytest.approx(math.fsum(pairs) / len(pairs))
    wins = {row[1].text: row[6].text for row in differences_table(contents)[1]}
    shares = read_scores(runs[0].root / "evaluations" / "test-abs_rel" / "samples.csv")["pureclip"]["delta1"]
    more = sum(table["pureclip"]["delta1"][key] > value for key, value in shares.items())
    assert wins["AbsRel ↓"] == f"{sum(pair < 0 for pair in pairs)} of 5"
    assert wins["δ < 1.25 ↑"] == f"{more} of 5"


def test_an_evaluation_that_answers_the_question_is_not_made_again(runs: list[Run]) -> None:
    cache = runs[0].open_cache()

    def made_at(*protocols: str, checkpoint: str = "abs_rel") -> int:
        folder = evaluated(runs[0], cache, "test", list(protocols), checkpoint, "cpu", SILENT)
        assert json.loads((folder / "metrics.json").read_text())["order"] == list(protocols)
        return (folder / "analysis.json").stat().st_mtime_ns

    first = made_at("eigen", "pureclip")
    assert made_at("eigen", "pureclip") == first
    second = made_at("pureclip", "eigen")
    assert second > first  # the analysis is under another protocol
    assert made_at("eigen", "pureclip", checkpoint="last") > second
    stored = runs[0].root / "evaluations" / "test-abs_rel" / "metrics.json"
    for key in ("weights", "cache"):
        before = made_at("pureclip", "eigen")
        stored.write_text(json.dumps({**json.loads(stored.read_text()), key: "other"}))
        assert made_at("pureclip", "eigen") > before


def test_what_cannot_stand_in_one_report(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        report([runs[0], runs[0]], tmp_path, device="cpu")
    with pytest.raises(UsageError, match="val or test"):
        report(runs[:1], tmp_path, split="train", device="cpu")
    with pytest.raises(UsageError, match="not each"):
        report(runs[:1], tmp_path, checkpoint="each", device="cpu")


def test_runs_scored_on_other_images_are_refused_by_name(runs: list[Run], tmp_path: Path) -> None:
    recipe = toy_recipe(dataset={"test": 3})
    other = extract(recipe, tmp_path / "cache", device="cpu").cache
    moved = Run(runs[1].root, runs[1].recipe, {**runs[1].info, "cache": str(other.root)})
    with pytest.raises(RunError, match=r"second and first: .*not scored on the same images"):
        report([runs[0], moved], tmp_path / "out", samples=0, device="cpu")


def test_a_cache_without_mirrored_views_is_reported_without_tta(tmp_path: Path) -> None:
    table = toy_recipe().model_dump(exclude_none=True)
    table["views"]["flips"], table["evaluate"]["tta"] = False, False
    table["head"] |= {"table_init": "random"}
    table["train"] |= {"epochs": 1}
    recipe = parse_recipe(table, "test")
    run = train(recipe, extract(recipe, tmp_path / "cache", device="cpu").cache, tmp_path / "run", device="cpu")
    contents = report([run], tmp_path / "out", samples=1, device="cpu").contents
    assert contents.protocols == ["pureclip[tta=no]", "eigen[tta=no]", "pureclip-paper[tta=no]"]


def test_without_images_the_report_says_why(runs: list[Run], tmp_path: Path) -> None:
    provenance = Path(runs[0].info["cache"]) / "provenance.jsonl"
    text = provenance.read_text()
    provenance.unlink()
    try:
        made = report(runs[:1], tmp_path, samples=1, device="cpu")
    finally:
        provenance.write_text(text)
    assert all(sample.rgb is None for sample in made.contents.samples)
    assert "give --root DIR" in made.page.read_text()


def test_a_bundle_is_reported_without_its_training(runs: list[Run], tmp_path: Path) -> None:
    export_bundle(runs[0], tmp_path / "bundle")
    made = report([open_run(tmp_path / "bundle")], tmp_path / "out", cache=runs[0].open_cache(), samples=0, device="cpu")
    assert "training" not in {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert "not known: an exported bundle" in made.page.read_text()


def test_the_command(runs: list[Run], pcd: Command, tmp_path: Path) -> None:
    code, out, err = pcd(
        "report", str(runs[0].root), "--out", str(tmp_path / "here"), "--samples", "1", "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["page"] == str(tmp_path / "here" / "index.html")
    assert json.loads(out)["notes"] == ["random encoder weights", "synthetic scenes"]
    code, _, err = pcd("report", str(tmp_path))
    assert code == 2
    assert "is not a run" in err
