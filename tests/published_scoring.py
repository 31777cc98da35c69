"""Scoring written a second time, straightforwardly, from the published definitions: what the package must agree with.

Nothing of the package is used. One frame at a time, whole maps in float64, crops as literal slices, bilinear resizing by
one-dimensional linear interpolation (`np.interp`), metrics as the papers' formulas on the selected pixels.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import linregress

GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
EIGEN = (0.3324324, 0.91351351, 0.0359477, 0.96405229)


def errors(gt, pred):
    """The usual function of the field on selected pixels; NaN if there are none."""
    names = ("abs_rel sq_rel rmse rmse_log log10 silog abs_diff bias delta1 delta2 delta3 delta_105 delta_110").split()
    if gt.size == 0:
        return dict.fromkeys(names, math.nan) | {"pixels": 0}
    thresh = np.maximum(gt / pred, pred / gt)
    e = np.log(pred) - np.log(gt)
    return {
        "abs_rel": np.mean(np.abs(gt - pred) / gt),
        "sq_rel": np.mean((gt - pred) ** 2 / gt),
        "rmse": np.sqrt(np.mean((gt - pred) ** 2)),
        "rmse_log": np.sqrt(np.mean((np.log(gt) - np.log(pred)) ** 2)),
        "log10": np.mean(np.abs(np.log10(gt) - np.log10(pred))),
        "silog": 100 * np.std(e),
        "abs_diff": np.mean(np.abs(gt - pred)),
        "bias": np.mean(pred) - np.mean(gt),
        "delta1": (thresh < 1.25).mean(),
        "delta2": (thresh < 1.25 * 1.25).mean(),
        "delta3": (thresh < 1.25 * 1.25 * 1.25).mean(),
        "delta_105": (thresh < 1.05).mean(),
        "delta_110": (thresh < 1.1).mean(),
        "pixels": gt.size,
    }


def merged(views, grid, flips):
    """Views of one sample, tile after tile, the mirrored ones behind, to one or two canvases of patches as the image lies."""
    rows, columns = grid
    canvases = []
    for half in range(2 if flips else 1):
        lines = []
        for row in range(rows):
            tiles = [views[half * rows * columns + row * columns + column] for column in range(columns)]
            lines.append(np.concatenate(tiles, axis=1))
        canvas = np.concatenate(lines, axis=0).astype(np.float64)
        canvases.append(canvas[:, ::-1] if half else canvas)
    return canvases


def averaged(views, grid, flips, tta):
    canvases = merged(views, grid, flips)
    return (canvases[0] + canvases[1]) / 2 if tta else canvases[0]


def nearest(patches, size):
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            out[i, j] = patches[i * patches.shape[0] // size[0], j * patches.shape[1] // size[1]]
    return out


def line(values, size, corners):
    """One-dimensional linear interpolation of cell values to `size` samples, constant beyond the outer centres."""
    cells = np.arange(len(values))
    if corners:
        return np.interp(np.linspace(0, len(values) - 1, size), cells, values)
    return np.interp((np.arange(size) + 0.5) * len(values) / size, cells + 0.5, values)


def bilinear(patches, size, corners=False):
    wide = np.array([line(row, size[1], corners) for row in patches])
    return np.array([line(column, size[0], corners) for column in wide.T]).T


def in_frame(window, crop, shape, outside):
    """Paste a prediction of the crop into a frame; outside of it the nearest row and column, or zeros."""
    top, bottom, left, right = crop
    frame = np.zeros(shape)
    frame[top:bottom, left:right] = window
    if outside == "edge":
        frame[:top, left:right], frame[bottom:, left:right] = window[0], window[-1]
        frame[:, :left], frame[:, right:] = frame[:, left : left + 1], frame[:, right - 1 : right]
    return frame


def box(fractions, shape):
    """A mask by fractions of height and width."""
    height, width = shape
    mask = np.zeros(shape, dtype=bool)
    mask[int(fractions[0] * height) : int(fractions[1] * height), int(fractions[2] * width) : int(fractions[3] * width)] = True
    return mask


def kb_crop(depth):
    height, width = depth.shape
    left = int((width - 1216) / 2)
    return depth[height - 352 : height, left : left + 1216]


def fitted(x, y):
    """Least squares line; level where all x are equal."""
    if np.ptp(x) == 0:
        return 0.0, np.mean(y)
    line_fit = linregress(x, y)
    return line_fit.slope, line_fit.intercept


def aligned(pred, gt, valid, how):
    if not valid.any():
        return pred
    p, g = pred[valid], gt[valid].astype(np.float64)
    if how == "median":
        return pred * np.median(g) / np.median(p)
    if how == "lsq-depth":
        s, t = fitted(p, g)
        return s * pred + t
    if how == "lsq-disparity":
        s, t = fitted(1 / p, 1 / g)
        return 1 / np.maximum(s / pred + t, 1e-3)
    if how == "lsq-sqrt-disparity":
        s, t = fitted(np.sqrt(1 / p), np.sqrt(1 / g))
        return 1 / np.maximum((s * np.sqrt(1 / pred) + t) ** 2, 1e-3)
    assert how is None
    return pred


def usual(pred, gt, low, high, mask=None, how=None):
    """Strict range, optional mask and alignment, clamping, errors: what nearly all codes do."""
    valid = (gt > np.float32(low)) & (gt < np.float32(high))
    if mask is not None:
        valid &= mask
    pred = np.clip(aligned(pred, gt, valid, how), low, high)
    return errors(gt[valid].astype(np.float64), pred[valid])


def nyu_rows(shape):
    mask = np.zeros(shape, dtype=bool)
    mask[45:471, 41:601] = True
    return mask


def score(name, family, views, canvas_gt, native_gt, plan, depth_range, how=None):
    """Errors of one sample under a named protocol: a list with one entry, or one per tile."""
    grid, flips, canvas = plan.grid, plan.flips, canvas_gt.shape
    low, high = depth_range
    if name == "pureclip":
        pred = nearest(averaged(views, grid, flips, True), canvas)
        if family == "kitti":
            return released_kitti_tiles(pred, canvas_gt)
        low, high = (0.001, 10.0) if family == "nyu" else (low, high)
        gt = np.clip(canvas_gt, np.float32(low), np.float32(high))
        valid = (gt > np.float32(low)) & (gt < np.float32(high)) & (pred > low)
        return [errors(gt[valid].astype(np.float64), np.clip(pred[valid], low, high))]
    if name == "pureclip-paper":
        pred = nearest(averaged(views, grid, flips, True), canvas)
        low, high = {"nyu": (0.001, 10.0), "kitti": (0.001, 30.0)}.get(family, (low, high))
        valid = (canvas_gt >= np.float32(low)) & (canvas_gt <= np.float32(high))
        if family == "kitti":
            valid &= box(GARG, canvas)
        return [errors(canvas_gt[valid].astype(np.float64), np.clip(pred[valid], low, high))]
    return [native(name, views, native_gt, plan, depth_range, how)]


def released_kitti_tiles(pred, gt):
    """PureCLIP-Depth's KITTI function, its 1e-3 and 30 turned into the metres that they mean."""
    low, high = 0.001 * 1000 / 256, 30 * 1000 / 256
    mask = box(GARG, gt.shape)
    width = gt.shape[1] // 4
    rows = []
    for tile in range(4):
        columns = slice(tile * width, (tile + 1) * width)
        g, p, m = gt[:, columns], pred[:, columns], mask[:, columns]
        valid = m & np.isfinite(g) & (g > low) & (g <= high) & (p > low) & (p <= high)
        rows.append(errors(g[valid].astype(np.float64), p[valid]))
    return rows


def native(name, views, gt, plan, depth_range, how):
    height, width = gt.shape
    crop = plan.crop or (0, height, 0, width)
    size = (crop[1] - crop[0], crop[3] - crop[2])
    tta = not name.startswith(("tr2m", "marigold", "depthmaster"))
    corners = name.startswith(("tr2m", "depthclip"))
    outside = "zero" if name == "depthclip-nyu" else "edge"
    pred = in_frame(bilinear(averaged(views, plan.grid, plan.flips, tta), size, corners), crop, gt.shape, outside)
    how = how or {"marigold": "lsq-depth", "depthmaster": "lsq-sqrt-disparity"}.get(name.split("-")[0])
    if name in ("eigen-nyu", "tr2m-nyu", "marigold-nyu", "depthmaster-nyu"):
        return usual(pred, gt, 1e-3, 10, nyu_rows(gt.shape), how)
    if name == "depthclip-nyu":
        mask = np.zeros(gt.shape, dtype=bool)
        mask[45:471, 46:601] = True
        window = np.zeros(gt.shape, dtype=bool)
        window[56:472, 60:604] = True
        mask &= window & (pred > 1e-3)
        return usual(pred, gt, 1e-3, 10, mask)
    if name == "eigen-kitti-garg":
        return usual(pred, gt, 1e-3, 80, box(GARG, gt.shape))
    if name in ("eigen-kitti-garg-kb", "tr2m-kitti"):
        return usual(kb_crop(pred), kb_crop(gt), 1e-3, 80, box(GARG, (352, 1216)))
    if name in ("eigen-kitti-eigen", "marigold-kitti", "depthmaster-kitti"):
        return usual(kb_crop(pred), kb_crop(gt), 1e-5, 80, box(EIGEN, (352, 1216)), how)
    if name == "eigen":
        low, high = depth_range
        return usual(pred, gt, low, high, None, how)
    return tr2m_zero_shot(name, pred, gt)


def tr2m_zero_shot(name, pred, gt):
    if name == "tr2m-void":
        return usual(pred, gt, 0.2, 5, nyu_rows(gt.shape))
    if name == "tr2m-sunrgbd":
        return usual(pred, gt, 1e-3, 8, nyu_rows(gt.shape))
    if name == "tr2m-ibims":
        return usual(pred, gt, 1e-3, 10, nyu_rows(gt.shape))
    if name == "tr2m-hypersim":
        return usual(pred, gt, 1e-3, 80)
    if name == "tr2m-diode-outdoor":
        return usual(pred, gt, 1e-3, 80, box(GARG, gt.shape))
    assert name in ("tr2m-c3vd", "tr2m-simcol"), f"no independent script for {name}"
    return usual(pred, gt, 0.1e-3, 100e-3)
