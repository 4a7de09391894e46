"""What the filter window looks up by name, on its dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from hypothesis import given

from scenes.pointings import few, separations, skies
from scenes.star_fields import make_wcs
from zemosaic_pipeline.gui.filter_window import (
    _auto_split_groups,
    _compute_max_angular_separation_deg,
    cluster_seestar_stacks_connected,
)


def test_positions_are_read_wherever_they_stand():
    header = fits.Header({"RA": 40.001, "DEC": 10.0})
    texts = fits.Header({"OBJCTRA": "02 40 00.2", "OBJCTDEC": "+10 00 01"})
    items = [
        {"path": "b", "center": SkyCoord(40.0, 10.0, unit="deg")},
        {"path": "a", "phase0_center": (40.002, 10.0)},
        {"path": "c", "RA": 40.003, "DEC": "10.0"},
        {"path": "d", "wcs": make_wcs(40.004, 10.0)},
        {"path": "e", "center": None, "wcs": None, "header": header},
        {"path": "f", "header": texts},
        {"path": "g", "CRVAL1": 40.0, "CRVAL2": 10.001},
        {"path": "h"},
        {"path": "i", "center": (None, None), "RA": 200.0, "DEC": 10.0},
    ]
    heard = []
    groups = cluster_seestar_stacks_connected(items, 0.03, lambda *message: heard.append(message))
    assert [[item["path"] for item in group] for group in groups] == [list("abcdefg"), ["i"], ["h"]]
    assert all(any(member is item for item in items) for group in groups for member in group)
    assert [message[1:] for message in heard] == [(None, "INFO")]


def test_the_filter_window_splits_by_orientation_of_the_wcs():
    items = [{"path": str(k), "wcs": make_wcs(40, 60, angle)} for k, angle in enumerate((0, 121, 1, 359, 122))]
    groups = cluster_seestar_stacks_connected(items, 0.1, None, orientation_split_threshold_deg=5)
    assert {frozenset(item["path"] for item in g) for g in groups} == {frozenset("023"), frozenset("14")}
    assert len(cluster_seestar_stacks_connected(items, 0.1, None)) == 1


def test_the_filter_window_cuts_a_scan_into_fields():
    scan = [{"path": f"{k:03d}", "wcs": make_wcs(ra, 0.0)} for k, ra in enumerate(np.linspace(0, 1.4, 141))]
    sides = 2.39 / 3600 * 1080 / 2
    groups = cluster_seestar_stacks_connected(scan, 0.03, None)
    assert len(groups) == int(np.ceil(1.4 / sides))


def test_auto_split_keeps_the_dictionaries_and_small_groups():
    small = [{"path": "x"}]
    crowd = [{"path": f"{k:02d}", "center": (10.0, 20.0)} for k in range(30)]
    parts = _auto_split_groups([crowd, small], cap=12, min_cap=5)
    assert [len(p) for p in parts] == [10, 10, 10, 1]
    assert parts[-1][0] is small[0]
    assert [item["path"] for p in parts[:-1] for item in p] == [f"{k:02d}" for k in range(30)]
    assert [len(p) for p in _auto_split_groups([[{} for _ in range(30)]], cap=12)] == [10, 10, 10]
    assert _auto_split_groups([crowd], cap=0) == [crowd]


@few
@given(skies())
def test_largest_separation(sky):
    ra, dec, _ = sky
    found = _compute_max_angular_separation_deg(zip(ra, dec, strict=True))
    assert found == pytest.approx(separations(ra, dec).max(), abs=2e-6)


def test_largest_separation_of_nothing():
    assert _compute_max_angular_separation_deg([]) == 0
    assert _compute_max_angular_separation_deg([(1, 2), None, (np.nan, 0)]) == 0
    assert _compute_max_angular_separation_deg([(0, 0), (180, 0)]) == pytest.approx(180)
