"""Stored depths and benchmark regions."""

from __future__ import annotations

import numpy as np
import pytest

from pcd import depths, regions
from pcd.errors import DatasetError, SampleError


def test_units_follow_the_range() -> None:
    assert depths.units_for(10) == 1000
    assert depths.units_for(65.5) == 1000
    assert depths.units_for(80) == 256
    with pytest.raises(DatasetError, match="300"):
        depths.units_for(300)


@pytest.mark.parametrize("units", [1000, 256, 5000])
def test_every_stored_integer_survives(units: int) -> None:
    stored = np.arange(65536, dtype=np.uint16)
    metres = depths.decode(stored, units)
    assert np.isnan(metres[0])
    np.testing.assert_array_equal(metres[1:], (np.arange(1, 65536) / units).astype(np.float32))
    np.testing.assert_array_equal(depths.encode(metres, units), stored)


def test_what_does_not_fit_is_refused_not_clipped() -> None:
    with pytest.raises(SampleError, match=r"70\.000 m cannot be stored"):
        depths.encode(np.array([70.0, np.nan], dtype=np.float32), 1000)
    with pytest.raises(SampleError, match=r"-1\.000 m"):
        depths.encode(np.array([-1.0], dtype=np.float32), 1000)


def test_regions_are_those_of_the_published_codes() -> None:
    assert regions.garg(375, 1242) == (153, 371, 44, 1197)
    assert regions.garg(352, 1216) == (143, 349, 43, 1172)
    assert regions.garg(336, 1344) == (137, 333, 48, 1295)
    assert regions.eigen_kitti(375, 1242) == (124, 342, 44, 1197)
    assert regions.eigen_kitti(352, 1216) == (117, 321, 43, 1172)
    assert regions.EIGEN_NYU == (45, 471, 41, 601)
    assert regions.kb(375, 1242) == (23, 375, 13, 1229)
    with pytest.raises(ValueError, match="352x1216"):
        regions.kb(300, 1242)


def test_inside_marks_rows_and_columns() -> None:
    mask = regions.inside((1, 3, 2, 5), 4, 6)
    assert mask.sum() == 6
    assert mask[1:3, 2:5].all()
