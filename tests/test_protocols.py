"""Protocols: the published rows and columns, names, families, and labels that show every change."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from pcd.errors import SampleError, UsageError
from pcd.evaluation.protocols import ALIASES, CATALOGUE, Protocol, get_protocol, protocols_for
from pcd.regions import eigen_kitti, garg, kb

NYU, KITTI, OWN = (1e-3, 10.0), (1e-3, 80.0), (0.25, 6.0)


def test_published_rows_and_columns() -> None:
    assert garg(375, 1242) == (153, 371, 44, 1197)
    assert garg(352, 1216) == (143, 349, 43, 1172)
    assert garg(336, 1344) == (137, 333, 48, 1295)
    assert eigen_kitti(375, 1242) == (124, 342, 44, 1197)
    assert eigen_kitti(352, 1216) == (117, 321, 43, 1172)
    assert kb(375, 1242) == (23, 375, 13, 1229)


@pytest.mark.parametrize(
    ("name", "family", "size", "region"),
    [
        ("eigen-nyu", "nyu", (480, 640), (45, 471, 41, 601)),
        ("depthclip-nyu", "nyu", (480, 640), (56, 471, 60, 601)),
        ("pureclip", "nyu", (336, 336), (0, 336, 0, 336)),
        ("pureclip", "kitti", (336, 1344), (137, 333, 48, 1295)),
        ("pureclip-paper", "kitti", (336, 1344), (137, 333, 48, 1295)),
        ("eigen-kitti-garg", "kitti", (375, 1242), (153, 371, 44, 1197)),
        ("eigen-kitti-garg-kb", "kitti", (375, 1242), (166, 372, 56, 1185)),
        ("eigen-kitti-eigen", "kitti", (375, 1242), (23 + 117, 23 + 321, 13 + 43, 13 + 1172)),
        ("tr2m-sunrgbd", "generic", (530, 730), (45, 471, 41, 601)),
        ("tr2m-sunrgbd", "generic", (441, 591), (45, 441, 41, 591)),
        ("tr2m-ibims", "generic", (30, 20), (30, 30, 20, 20)),
        ("eigen", "generic", (33, 77), (0, 33, 0, 77)),
    ],
)
def test_scored_regions(name: str, family: str, size: tuple[int, int], region: tuple[int, int, int, int]) -> None:
    assert get_protocol(name, family, OWN).region_in(*size) == region


def test_released_kitti_range_is_in_true_metres() -> None:
    protocol = get_protocol("pureclip", "kitti", KITTI)
    assert (protocol.min_depth, protocol.max_depth) == (0.00390625, 117.1875)
    assert (protocol.min_prediction, protocol.max_prediction) == (0.00390625, 117.1875)
    assert (protocol.min_inclusive, protocol.max_inclusive, protocol.clamp) == (False, True, False)
    assert protocol.averaging == "tile"
    assert "4.15 m" in protocol.describe()


def test_ranges_belong_to_the_name_except_for_generic_data() -> None:
    assert get_protocol("eigen", "nyu", (1.0, 2.0)).max_depth == 10.0
    assert get_protocol("pureclip-paper", "kitti", KITTI).max_depth == 30.0
    assert get_protocol("eigen-kitti-garg", "kitti", (1.0, 2.0)).max_depth == 80.0
    assert get_protocol("eigen-kitti-eigen", "kitti", KITTI).min_depth == 1e-5
    own = get_protocol("pureclip", "generic", OWN)
    assert (own.min_depth, own.max_depth, own.min_prediction) == (0.25, 6.0, 0.25)
    assert get_protocol("eigen", "generic", (0.0, 6.0)).min_depth == 1e-3
    assert get_protocol("tr2m-void", "generic", OWN).min_depth == 0.2


def test_aliases_follow_the_family() -> None:
    assert get_protocol("eigen", "nyu", NYU).label == "eigen-nyu"
    assert get_protocol("eigen", "kitti", KITTI).label == "eigen-kitti-garg"
    assert get_protocol("eigen", "generic", OWN).label == "eigen"
    assert get_protocol("tr2m", "kitti", KITTI).label == "tr2m-kitti"
    assert get_protocol("marigold", "nyu", NYU).alignment == "lsq-depth"
    assert get_protocol("depthmaster", "kitti", KITTI).alignment == "lsq-sqrt-disparity"
    for name, targets in ALIASES.items():
        for family, target in targets.items():
            assert any(p.name == target and p.family == family for p in CATALOGUE), name


def test_a_name_is_unique_in_its_family_and_says_all_of_it() -> None:
    assert len({(p.name, p.family) for p in CATALOGUE}) == len(CATALOGUE)
    for family in ("nyu", "kitti", "generic"):
        for protocol in protocols_for(family, OWN):
            assert get_protocol(protocol.label, family, OWN) == protocol
            words = protocol.describe()
            assert f"{protocol.max_depth:g} m" in words
            assert ("flip TTA" in words) == protocol.tta
            assert ("canvas" in words) == (protocol.resolution == "canvas")
            assert ("fitted" in words) == (protocol.alignment != "none")
            document = json.loads(json.dumps(protocol.as_json(), allow_nan=False))
            assert document["label"] == protocol.name
            assert document["description"] == words


def test_every_change_shows_in_the_label_and_the_label_reads_back() -> None:
    protocol = get_protocol("eigen", "nyu", NYU)
    changed = replace(protocol, upsample="nearest", tta=False)
    assert changed.label == "eigen-nyu[upsample=nearest,tta=no]"
    assert get_protocol(changed.label, "nyu", NYU) == changed
    assert replace(changed, tta=True).label == "eigen-nyu[upsample=nearest]"
    assert replace(protocol, upsample="bilinear").label == "eigen-nyu"
    assert replace(protocol, max_depth=80.0).label == "eigen-nyu[max_depth=80.0]"
    assert changed.as_json()["label"] == changed.label
    assert get_protocol("eigen[ alignment = median , averaging=pixels ]", "kitti", KITTI).label == (
        "eigen-kitti-garg[alignment=median,averaging=pixels]"
    )
    assert "median" in get_protocol("eigen[alignment=median]", "nyu", NYU).describe()


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("eigen_nyu", "nyu", "Unknown protocol 'eigen_nyu'. Did you mean 'eigen-nyu'"),
        ("eigen-nyu", "kitti", "protocol 'eigen-nyu' is for nyu data, this is kitti. Usable here: .*eigen-kitti-garg"),
        ("depthclip-nyu", "generic", "is for nyu data, this is generic"),
        ("marigold", "generic", "protocol 'marigold' is for kitti and nyu data"),
        ("eigen-nyu[max_depth=3]", "nyu", "'max_depth' cannot be changed"),
        ("eigen-nyu[tta=maybe]", "nyu", "known: yes, no"),
        ("eigen-nyu[upsample=bicubic]", "nyu", "upsample = 'bicubic'; known: nearest, bilinear"),
        ("eigen-nyu[tta=no", "nyu", "Unknown protocol"),
        ("eigen-nyu[averaging=tile]", "nyu", "tiles exist on the canvas only"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, family: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_protocol(name, family, OWN)


def test_listing_protocols_does_not_wait_for_torch() -> None:
    code = "import sys, pcd.evaluation.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="in pixels of the stored frame"):
        Protocol(name="x", words="", family="nyu", resolution="canvas", region="eigen-nyu", min_depth=1e-3, max_depth=1.0)
    with pytest.raises(UsageError, match="clamped or masked from below"):
        replace(get_protocol("eigen", "nyu", NYU), clamp=False)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(SampleError, match="240x320 cannot be scored under eigen-nyu, which is defined on 480x640"):
        get_protocol("eigen-nyu", "nyu", NYU).region_in(240, 320)
    with pytest.raises(SampleError, match="smaller than the 352x1216 crop of eigen-kitti-garg-kb"):
        get_protocol("eigen-kitti-garg-kb", "kitti", KITTI).region_in(350, 1242)
