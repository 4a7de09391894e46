"""Angles, scales and tangent planes against astropy's SkyCoord."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from hypothesis import given

from scenes.pointings import few, skies
from scenes.star_fields import SHAPE, make_wcs
from zemosaic_pipeline import sky

PLACES = np.array([[0.0, 0.0], [359.999, 45.0], [180.0, -89.9], [83.8, -5.4], [10.0, 90.0]])
COORDS = SkyCoord(*PLACES.T, unit="deg")


@few
@given(skies())
def test_separations_and_chords_are_astropy_s(places):
    ra, dec, _ = places
    coords = SkyCoord(ra, dec, unit="deg")
    found = sky.separation(ra[:, None], dec[:, None], ra, dec)
    assert found == pytest.approx(coords[:, None].separation(coords).deg, abs=1e-13)
    apart = np.linalg.norm(coords.cartesian.xyz.value[:, :1].T - coords.cartesian.xyz.value.T, axis=1)
    assert [sky.chord(angle) for angle in found[0]] == pytest.approx(apart, abs=1e-13)


def test_a_chord_ends_at_the_other_side():
    assert [sky.chord(angle) for angle in (0, 60, 180, 270)] == pytest.approx([0, 1, 2, 2])


def test_unit_vectors_there_and_back():
    assert sky.unit_vectors(*PLACES.T) == pytest.approx(COORDS.cartesian.xyz.value.T, abs=1e-15)
    back = SkyCoord(*sky.directions_of(7.5 * sky.unit_vectors(*PLACES.T)).T, unit="deg")
    assert back.separation(COORDS).deg == pytest.approx(0, abs=1e-13)
    opposite = sky.directions_of(-sky.unit_vectors([10, 300], [20, -30]))
    assert opposite == pytest.approx(np.array([[190, -20], [120, 30]]))


def test_middles_are_not_moved_by_one_that_is_far_away():
    ring = SkyCoord(359.99, 60, unit="deg").directional_offset_by(np.arange(0, 360, 40) * u.deg, 0.5 * u.deg)
    around = np.stack([[*ring.ra.deg, 359.99, 120.0], [*ring.dec.deg, 60.0, -45.0]], axis=1)
    assert sky.most_central(around) == (359.99, 60.0)
    assert sky.most_central(np.repeat(around, 200, axis=0)) == (359.99, 60.0)
    assert SkyCoord(*sky.median_direction(around), unit="deg").separation(ring).deg.max() < 0.7


@pytest.mark.parametrize("ctype,radesys", [("RA DEC", "ICRS"), ("RA DEC", "FK5"), ("RA DEC", "FK4"), ("GLON GLAT", "")])
def test_the_centre_of_an_image_is_where_astropy_sees_it(ctype, radesys):
    wcs = make_wcs(359.999, 60.0, angle=30)
    wcs.wcs.ctype = [f"{name:-<4}-TAN" for name in ctype.split()]
    wcs.wcs.radesys, wcs.wcs.crpix = radesys, (100, 300)
    wcs.wcs.set()
    there = wcs.pixel_to_world((SHAPE[1] - 1) / 2, (SHAPE[0] - 1) / 2)
    own, icrs = sky.image_centre(wcs, SHAPE), sky.icrs_centre(wcs, SHAPE)
    assert own == pytest.approx((there.spherical.lon.deg, there.spherical.lat.deg), abs=1e-12)
    assert SkyCoord(*icrs, unit="deg").separation(there.icrs).deg < 1e-12
    assert (own == icrs) == (radesys == "ICRS")


def test_the_scale_of_a_pixel_is_the_root_of_its_solid_angle():
    wcs = make_wcs(scale=2.39, angle=20)
    wcs.wcs.cd = wcs.wcs.cd @ [[1, 0.5], [0, 1.44]]
    origin, x, y = SkyCoord(*sky.pixel_to_sky(wcs, [[539, 959], [540, 959], [539, 960]]).T, unit="deg")
    angle = origin.position_angle(x) - origin.position_angle(y)
    area = origin.separation(x).deg * origin.separation(y).deg * abs(np.sin(angle.rad))
    assert sky.pixel_scale(wcs) == pytest.approx(np.sqrt(area), rel=1e-5)
    assert sky.pixel_scale(wcs) == pytest.approx(2.39 * 1.2 / 3600, rel=1e-9)


def test_a_tangent_plane_touches_the_middle_with_north_up_and_east_left():
    plane = sky.tangent_plane(359.99, 60.0, 0.001, (5, 7))
    assert sky.image_centre(plane, (5, 7)) == pytest.approx((359.99, 60.0), abs=1e-12)
    assert sky.pixel_scale(plane) == pytest.approx(0.001)
    middle = SkyCoord(359.99, 60, unit="deg")
    north_east = middle.directional_offset_by([0, 90] * u.deg, np.degrees(np.arctan(np.radians(0.002))) * u.deg)
    pixels = sky.sky_to_pixel(plane, np.stack([north_east.ra.deg, north_east.dec.deg], axis=1))
    assert pixels == pytest.approx(np.array([[3, 4], [1, 2]]), abs=1e-8)
    assert sky.pixel_to_sky(plane, pixels)[:, 1] == pytest.approx(north_east.dec.deg, abs=1e-10)
    assert sky.image_centre(sky.tangent_plane(10, 20, 1.0), (1, 1)) == pytest.approx((10, 20))
    assert np.isnan(sky.sky_to_pixel(plane, np.array([[179.99, -60.0]]))).all()


def test_a_rectangle_around_points_finds_its_direction():
    box = np.array([[0, 0], [40, 0], [40, 10], [0, 10], [20, 5], [20, 0]], float)
    assert len(sky.convex_hull(box)) == 4
    for angle in (-0.7, 0.0, 0.3):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        assert sky.least_rectangle(box @ turn.T) == pytest.approx(angle, abs=1e-12)
