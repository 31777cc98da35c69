"""The named protocols, and how to get one.

A name may have a variant per family of datasets (`nyu`, `kitti`, `generic`): `pureclip` on KITTI is another procedure than on
NYU. The ranges of the NYU and KITTI variants are part of the name; the generic ones take the dataset's. Sources are the
papers' evaluation codes, as read from their repositories.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from pcd.errors import UsageError, suggest
from pcd.evaluation.protocol import Protocol
from pcd.regions import NYU_SIZE

__all__ = ["ALIASES", "CATALOGUE", "Protocol", "get_protocol", "protocols_for", "usual_protocols"]

_NYU: dict[str, Any] = {"family": "nyu", "min_depth": 1e-3, "max_depth": 10.0}
_KITTI: dict[str, Any] = {"family": "kitti", "min_depth": 1e-3, "max_depth": 80.0}
_CANVAS: dict[str, Any] = {"resolution": "canvas", "upsample": "nearest"}
_PAPER: dict[str, Any] = {**_CANVAS, "min_inclusive": True, "max_inclusive": True}
_EIGEN_NYU: dict[str, Any] = {**_NYU, "region": "eigen-nyu", "frame": NYU_SIZE}
_KB_GARG: dict[str, Any] = {**_KITTI, "gt_crop": "kb", "region": "garg"}
_KB_EIGEN: dict[str, Any] = {**_KITTI, "min_depth": 1e-5, "gt_crop": "kb", "region": "eigen-kitti"}
_TR2M: dict[str, Any] = {"upsample": "bilinear-align-corners", "tta": False}
_TR2M_ZERO: dict[str, Any] = {**_TR2M, "family": "generic", "min_depth": 1e-3}
_MARIGOLD: dict[str, Any] = {"tta": False, "alignment": "lsq-depth"}
_DEPTHMASTER: dict[str, Any] = {"tta": False, "alignment": "lsq-sqrt-disparity"}
_MILLIMETRE_SCENES = "the paper's 0.1 to 100 mm, so its RMSE is 1000 times the one shown here"

CATALOGUE: tuple[Protocol, ...] = (
    Protocol(
        name="pureclip",
        words="PureCLIP-Depth as its released code scores NYU (which drops the last incomplete batch: 648 of 654 images)",
        **_NYU,
        **_CANVAS,
        min_prediction=1e-3,
    ),
    Protocol(
        name="pureclip",
        words=(
            "PureCLIP-Depth as its released code scores KITTI, in true metres: the code divides by 1000 instead of 256, so its "
            "30 is 117.19 m and its RMSE 1.062 about 4.15 m (it counts tiles without valid pixels as 0; here they are left out)"
        ),
        family="kitti",
        **_CANVAS,
        region="garg",
        min_depth=1e-3 * 1000 / 256,
        max_depth=30 * 1000 / 256,
        max_inclusive=True,
        min_prediction=1e-3 * 1000 / 256,
        max_prediction=30 * 1000 / 256,
        clamp=False,
        averaging="tile",
    ),
    Protocol(
        name="pureclip",
        words="PureCLIP-Depth's way of scoring NYU, with this dataset's range",
        family="generic",
        **_CANVAS,
        min_prediction=0.0,  # becomes the dataset's smallest depth
    ),
    Protocol(name="pureclip-paper", words="PureCLIP-Depth as its paper describes it", **_NYU, **_PAPER),
    Protocol(
        name="pureclip-paper",
        words="PureCLIP-Depth as its paper describes it: tiles merged, true metres",
        **{**_KITTI, "max_depth": 30.0},
        **_PAPER,
        region="garg",
    ),
    Protocol(
        name="pureclip-paper",
        words="PureCLIP-Depth's paper, with this dataset's range",
        family="generic",
        **_PAPER,
    ),
    Protocol(name="eigen-nyu", words="the usual NYU protocol (BTS, AdaBins, ZoeDepth, Depth Anything)", **_EIGEN_NYU),
    Protocol(
        name="eigen-kitti-garg",
        words="the Garg crop of the full frame (the published numbers of BTS)",
        **_KITTI,
        region="garg",
    ),
    Protocol(
        name="eigen-kitti-garg-kb",
        words="benchmark crop first, then the Garg crop of it (AdaBins, NeWCRFs, ZoeDepth, Depth Anything, TR2M, BTS online)",
        **_KB_GARG,
    ),
    Protocol(
        name="eigen-kitti-eigen",
        words="benchmark crop first, then the Eigen crop of it (Marigold and DepthMaster, which also align)",
        **_KB_EIGEN,
    ),
    Protocol(name="eigen", words="all of the stored frame, with this dataset's range", family="generic"),
    Protocol(
        name="depthclip-nyu",
        words="DepthCLIP: what its prediction window leaves of the usual region less one column",
        **_NYU,
        region="depthclip-nyu",
        frame=NYU_SIZE,
        min_prediction=1e-3,
        upsample="bilinear-align-corners",
        outside="zero",
    ),
    Protocol(name="marigold-nyu", words="Marigold", **_EIGEN_NYU, **_MARIGOLD),
    Protocol(name="marigold-kitti", words="Marigold", **_KB_EIGEN, **_MARIGOLD),
    Protocol(name="depthmaster-nyu", words="DepthMaster", **_EIGEN_NYU, **_DEPTHMASTER),
    Protocol(name="depthmaster-kitti", words="DepthMaster", **_KB_EIGEN, **_DEPTHMASTER),
    Protocol(name="tr2m-nyu", words="TR2M on NYU", **{**_EIGEN_NYU, **_TR2M}),
    Protocol(name="tr2m-kitti", words="TR2M on KITTI", **_KB_GARG, **_TR2M),
    Protocol(
        name="tr2m-void",
        words="TR2M on VOID",
        **{**_TR2M_ZERO, "min_depth": 0.2},
        max_depth=5.0,
        region="eigen-nyu",
    ),
    Protocol(name="tr2m-c3vd", words=f"TR2M on C3VD, {_MILLIMETRE_SCENES}", **{**_TR2M_ZERO, "min_depth": 1e-4}, max_depth=0.1),
    Protocol(name="tr2m-sunrgbd", words="TR2M, zero-shot on SUN RGB-D", **_TR2M_ZERO, max_depth=8.0, region="eigen-nyu"),
    Protocol(name="tr2m-ibims", words="TR2M, zero-shot on iBims-1", **_TR2M_ZERO, max_depth=10.0, region="eigen-nyu"),
    Protocol(name="tr2m-hypersim", words="TR2M, zero-shot on HyperSim (planar depth)", **_TR2M_ZERO, max_depth=80.0),
    Protocol(
        name="tr2m-diode-outdoor",
        words="TR2M, zero-shot on DIODE outdoors (its validity mask is not used)",
        **_TR2M_ZERO,
        max_depth=80.0,
        region="garg",
    ),
    Protocol(
        name="tr2m-simcol",
        words=f"TR2M, zero-shot on SimCol, {_MILLIMETRE_SCENES}",
        **{**_TR2M_ZERO, "min_depth": 1e-4},
        max_depth=0.1,
    ),
)
"""Every protocol, once per family it has a variant for; a generic one without a range takes the dataset's."""

ALIASES: dict[str, dict[str, str]] = {
    "eigen": {"nyu": "eigen-nyu", "kitti": "eigen-kitti-garg", "generic": "eigen"},
    "marigold": {"nyu": "marigold-nyu", "kitti": "marigold-kitti"},
    "depthmaster": {"nyu": "depthmaster-nyu", "kitti": "depthmaster-kitti"},
    "tr2m": {"nyu": "tr2m-nyu", "kitti": "tr2m-kitti"},
}
"""Names that stand for another one, by family."""


def get_protocol(name: str, family: str, depth_range: tuple[float, float]) -> Protocol:
    """The protocol called `name` as it applies to a family of datasets; `depth_range` (metres) is used by the generic family.

    `name` may be a label with changes, such as `eigen[upsample=nearest,tta=no]`: `upsample`, `tta`, `alignment` and `averaging`
    can be changed.
    Raises `UsageError` for an unknown name or change, and for a protocol that does not fit the family.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", name.strip())
    base = match.group(1) if match else name
    known = {protocol.name for protocol in CATALOGUE} | set(ALIASES)
    if match is None or base not in known:
        raise UsageError(f"Unknown protocol {name!r}.{suggest(base, known)}")
    target = ALIASES.get(base, {}).get(family, base)
    found = [protocol for protocol in CATALOGUE if protocol.name == target]
    fitting = [protocol for protocol in found if protocol.family == family]
    if not fitting:
        families = sorted({p.family for p in found} or ALIASES[base])
        usable = ", ".join(sorted({p.name for p in CATALOGUE if p.family == family}))
        raise UsageError(
            f"protocol {base!r} is for {' and '.join(families)} data, this is {family}. Usable here: {usable or 'none'}."
        )
    return _changed(_ranged(fitting[0], depth_range), match.group(2))


def protocols_for(family: str, depth_range: tuple[float, float]) -> list[Protocol]:
    """Every protocol that applies to a family, in the order of the catalogue."""
    return [_ranged(protocol, depth_range) for protocol in CATALOGUE if protocol.family == family]


def usual_protocols(family: str, depth_range: tuple[float, float]) -> list[Protocol]:
    """Those of `protocols_for` that are meant for any data of the family: not the ranges of named zero-shot datasets."""
    usual = [p for p in CATALOGUE if p.family == family and (family != "generic" or math.isnan(p.max_depth))]
    return [_ranged(protocol, depth_range) for protocol in usual]


def _ranged(protocol: Protocol, depth_range: tuple[float, float]) -> Protocol:
    """Fill in the dataset's range where the catalogue leaves it open; a smallest depth of 0 becomes 1 mm, for logarithms."""
    if not math.isnan(protocol.min_depth):
        return protocol
    low, high = max(float(depth_range[0]), 1e-3), float(depth_range[1])
    masked = low if protocol.min_prediction is not None else None
    return dataclasses.replace(protocol, min_depth=low, max_depth=high, min_prediction=masked, declared=())


def _changed(protocol: Protocol, changes: str | None) -> Protocol:
    values: dict[str, Any] = {}
    for change in filter(None, (changes or "").split(",")):
        key, _, value = (part.strip() for part in change.partition("="))
        if key not in ("upsample", "tta", "alignment", "averaging"):
            raise UsageError(
                f"protocol {protocol.name}[{changes}]: {key!r} cannot be changed."
                f"{suggest(key, ('upsample', 'tta', 'alignment', 'averaging'))}"
            )
        if key == "tta" and value not in ("yes", "no"):
            raise UsageError(f"protocol {protocol.name}[{changes}]: tta = {value!r}; known: yes, no.")
        values[key] = value == "yes" if key == "tta" else value
    return dataclasses.replace(protocol, **values) if values else protocol
