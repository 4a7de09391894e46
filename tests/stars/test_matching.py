"""Maps between frames, solutions handed on, pointings checked."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS

from scenes.star_fields import SHAPE, brightest, errors, make_wcs, night, observe, rms
from zemosaic_pipeline.stars.alignment import align_frames
from zemosaic_pipeline.stars.matching import Affine, fit_affine, moved_wcs, pointing_disagrees, transfer_wcs


def test_moving_a_wcs_is_exact():
    wcs = make_wcs(angle=30)
    turn = Affine(np.array([[1.001, 0.002], [-0.0015, 0.9995]]), np.array([0.7, -3.2]))
    points = np.random.default_rng(0).uniform(0, 1000, (50, 2))
    for version in (wcs, WCS(wcs.to_header())):  # CD, and PC with CDELT
        moved = moved_wcs(version, turn)
        assert moved.all_world2pix(version.all_pix2world(points, 0), 0) == pytest.approx(turn(points), abs=1e-6)
    sip = make_wcs(sip=True)
    shift = Affine(np.eye(2), np.array([12.3, -4.5]))
    moved = moved_wcs(sip, shift)
    assert moved.all_world2pix(sip.all_pix2world(points, 0), 0) == pytest.approx(shift(points), abs=1e-4)


@pytest.mark.parametrize("model", ["shift", "rigid", "similar", "affine"])
def test_fits_find_their_own_model(model):
    c, s = np.cos(0.1), np.sin(0.1)
    matrix = {"shift": np.eye(2), "rigid": [[c, -s], [s, c]], "similar": [[1.2 * c, -1.2 * s], [1.2 * s, 1.2 * c]]}
    truth = Affine(np.array(matrix.get(model, [[1.1, 0.2], [0.0, 0.8]])), np.array([5.0, -7.0]))
    points = np.random.default_rng(0).uniform(0, 100, (8, 2))
    weight = np.r_[np.ones(7), 0]
    target = truth(points)
    target[7] += 100
    found = fit_affine(points, target, weight, model)
    assert found.matrix == pytest.approx(truth.matrix) and found.shift == pytest.approx(truth.shift)


@pytest.mark.parametrize("sip", [False, True])
@pytest.mark.parametrize("spurious,lost", [(30, 0.1), (150, 0.4)])
def test_a_solution_is_handed_on(sip, spurious, lost):
    rng = np.random.default_rng(8)
    reference = make_wcs(sip=sip)
    stars = observe(reference, 1)
    times = []
    for k in range(8):
        truth = make_wcs(315.4 + rng.normal(0, 0.3), 68.15 + rng.normal(0, 0.15), rng.uniform(0, 360), sip)
        mine = observe(truth, 10 + k, spurious, lost)
        start = time.perf_counter()
        found = transfer_wcs(mine, stars, reference)
        times.append(time.perf_counter() - start)
        assert found is not None and rms(errors(found, truth)) < 0.12
        assert (found.sip is not None) == sip
    assert np.median(times) < 0.05


def test_a_frame_of_another_scale_or_with_few_stars_is_solved():
    reference = make_wcs()
    stars = observe(reference, 1)
    other = make_wcs(315.45, 68.2, 77, scale=4.78)
    found = transfer_wcs(observe(other, 2), stars, reference, 4.7)
    assert rms(errors(found, other)) < 0.15
    near = make_wcs(315.42, 68.16, 77)
    few = observe(near, 3, spurious=0)
    few = brightest(few, 40)
    assert rms(errors(transfer_wcs(few, stars, reference), near)) < 0.2


def test_unrelated_fields_are_refused():
    rng = np.random.default_rng(9)
    for count in (3, 9, 15, 50, 400):
        for _ in range(12):
            a, b = night(2, int(rng.integers(2**31)), stars=count)
            assert transfer_wcs(a, b, make_wcs()) is None
            # and are not aligned with each other either
            reasons = [item.reason for item in align_frames([a, b], [make_wcs(), make_wcs()], [(1000, 1000)] * 2)]
            assert sum(reason is not None for reason in reasons) == (count >= 9)


def test_a_mirrored_frame_is_refused():
    reference = make_wcs()
    stars = observe(reference, 1)
    assert transfer_wcs(replace(stars, x=1079 - stars.x), stars, reference) is None


def test_a_pointing_outside_the_frame_contradicts_its_wcs():
    wcs = make_wcs(0.1, 60)
    assert pointing_disagrees(wcs, 359.7, 60.3, SHAPE) is None
    assert pointing_disagrees(wcs, None, None, SHAPE) is None
    assert "1.00 degrees" in pointing_disagrees(wcs, 0.1, 61.0, SHAPE)
