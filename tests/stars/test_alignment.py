"""WCS of a panel's frames aligned, lying ones named: against skies whose truth is known, and real frames."""

from __future__ import annotations

import time

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.places import real_files
from scenes.star_fields import NOISE, SHAPE, brightest, errors, make_wcs, observe, rms
from zemosaic_pipeline.stars.alignment import align_frames as align
from zemosaic_pipeline.stars.detection import Stars, find_stars
from zemosaic_pipeline.stars.matching import Affine, moved_wcs, transfer_wcs
from zemosaic_pipeline.stars.quality import frame_quality


def align_frames(stars, given, pointings=None):
    return align(stars, given, [SHAPE] * len(stars), pointings)


@pytest.fixture(scope="module", params=[False, True], ids=["TAN", "TAN-SIP"])
def panel(request):
    """True WCS of 16 frames (four of them another night, turned), the stars seen, and WCS that are somewhat off."""
    rng = np.random.default_rng(6)
    truth, given, stars = [], [], []
    for k in range(16):
        angle = rng.uniform(-3, 3) + (121 if k >= 12 else 0)
        wcs = make_wcs(315.4 + rng.normal(0, 0.05), 68.15 + rng.normal(0, 0.02), angle, request.param)
        truth.append(wcs)
        stars.append(observe(wcs, 100 + k))
        given.append(moved_wcs(wcs, Affine(np.eye(2) + rng.normal(0, 2e-4, (2, 2)), rng.normal(0, 0.5, 2))))
    return truth, given, stars


def test_frames_are_aligned(panel):
    truth, given, stars = panel
    kept = [wcs.to_header_string(relax=True) for wcs in given]
    start = time.perf_counter()
    found = align_frames(stars, given)
    assert time.perf_counter() - start < 2
    assert kept == [wcs.to_header_string(relax=True) for wcs in given], "what was given is not changed"
    before = np.array([errors(g, t) for g, t in zip(given, truth, strict=True)])
    after = np.array([errors(f.wcs, t) for f, t in zip(found, truth, strict=True)])
    assert rms(before) > 0.7
    # frames of one night share what no star can tell: where the panel as a whole lies
    assert rms(after[:12] - after[:12].mean(axis=0)) < 0.03
    assert rms(after[12:] - after[12:].mean(axis=0)) < 0.03
    assert rms(after) < 0.3
    for item, wcs, step in zip(found, given, before - after, strict=True):
        assert item.reason is None and item.matched > 200 and item.rms_px < 0.15
        assert item.shift_px == pytest.approx(rms(step), rel=0.1, abs=0.01)
        if wcs.sip is not None:
            assert np.array_equal(item.wcs.sip.a, wcs.sip.a) and np.array_equal(item.wcs.sip.b, wcs.sip.b)
            again = WCS(item.wcs.to_header(relax=True))
            assert rms(errors(again, item.wcs)) < 1e-6, "the header tells the same"


def test_the_order_of_the_frames_does_not_matter(panel):
    _, given, stars = panel
    order = np.random.default_rng(1).permutation(16)
    straight = align_frames(stars, given)
    shuffled = align_frames([stars[k] for k in order], [given[k] for k in order])
    assert max(rms(errors(shuffled[n].wcs, straight[k].wcs)) for n, k in enumerate(order)) < 0.02


def test_a_panel_that_agrees_stays(panel):
    truth, _, stars = panel
    assert max(item.shift_px for item in align_frames(stars, truth)) < 0.06


def test_an_offset_of_many_pixels_is_brought_back(panel):
    truth, given, stars = panel
    off = [*given[:5], moved_wcs(given[5], Affine(np.eye(2), np.array([25.0, -17.0])))]
    found = align_frames(stars[:6], off)
    after = np.array([errors(f.wcs, t) for f, t in zip(found, truth, strict=False)])
    assert found[5].reason is None and found[5].shift_px == pytest.approx(np.hypot(25, 17), abs=2)
    assert rms(after - np.median(after, axis=0)) < 0.05


def test_lying_frames_are_named(panel):
    truth, given, stars = panel
    given = list(given)
    ra, dec = truth[3].wcs.crval
    sip = truth[3].sip is not None
    given[3] = make_wcs(ra, dec + 0.3, sip=sip)
    given[7] = make_wcs(*truth[7].wcs.crval, 180, sip=sip)
    given[9] = make_wcs(*truth[9].wcs.crval, -1.5, scale=2.6, sip=sip)
    found = align_frames(stars, given)
    assert [k for k, item in enumerate(found) if item.reason] == [3, 7, 9]
    assert "not where its WCS says" in found[3].reason and found[3].wcs is given[3]


def test_of_two_that_disagree_the_pointing_decides_else_the_number_of_stars(panel):
    truth, given, stars = panel
    ra, dec = truth[0].wcs.crval
    lying = make_wcs(ra + 0.3, dec + 0.3)
    pair = [stars[0], stars[1]], [lying, given[1]]
    assert [bool(r.reason) for r in align_frames(*pair, [(ra, dec), (ra, dec)])] == [True, False]
    more = brightest(stars[1], 200)
    assert [bool(r.reason) for r in align_frames([stars[0], more], pair[1])] == [False, True]


def test_what_cannot_be_judged_keeps_its_wcs(panel):
    _, given, stars = panel
    far = make_wcs(315.4, 66.7)
    empty = Stars.none(500.0, NOISE)
    found = align_frames([*stars[:3], observe(far, 50), empty], [*given[:3], far, given[3]])
    assert [item.reason for item in found] == [None] * 5
    assert found[3].wcs is far and found[4].wcs is given[3] and found[4].matched == 0 and found[0].matched > 200
    assert align_frames([], []) == []
    assert align_frames(stars[:1], given[:1])[0].wcs is given[0]


@pytest.fixture(scope="module")
def real():
    cv2 = pytest.importorskip("cv2")
    paths = real_files("ngc7023_seestar")
    stars = []
    for path in paths:
        colour = cv2.cvtColor(fits.getdata(path).astype(np.uint16), cv2.COLOR_BayerGB2RGB)
        stars.append(find_stars(colour.astype(np.float32).mean(axis=2)))
    return stars, [WCS(fits.getheader(path)) for path in paths]


@pytest.mark.realdata
def test_real_frames_of_two_nights(real):
    stars, given = real
    assert all(len(s) > 150 and 2 < np.median(s.fwhm) < 5 for s in stars)
    assert frame_quality(stars) == [None] * 6
    found = align_frames(stars, given)
    assert all(item.reason is None and item.matched > 150 and item.rms_px < 0.3 for item in found)
    for reference in (0, 4):
        for k in range(6):
            wcs = transfer_wcs(stars[k], stars[reference], found[reference].wcs)
            assert rms(errors(wcs, found[k].wcs)) < 0.2
    turned = [*given[:4], given[4], moved_wcs(given[5], Affine(-np.eye(2), np.array([1079.0, 1919.0])))]
    assert [bool(item.reason) for item in align_frames(stars, turned)] == [False] * 5 + [True]
