"""The synthetic panels against the formulas that they are made by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zemosaic_pipeline.synthetic.gradients import gradient_image, random_gradient, term_ranges
from zemosaic_pipeline.synthetic.panels import (
    Layout,
    add_sip,
    make_panels,
    make_sky,
    mosaic_shape,
    pixel_solid_angle,
    tangent_wcs,
)

SHAPE = (120, 160)
LAYOUT = Layout(rows=1, columns=2, shape=SHAPE, overlap=0.4, noise=2.0)
ARCSEC = np.deg2rad(1 / 3600)


def test_solid_angle_of_a_pixel_on_the_tangent_plane():
    """cos^3 of the distance from the middle (Calabretta & Greisen 2002): twice 1/cos^2, once 1/cos to the sphere."""
    wcs = tangent_wcs((1, 1), (83.8, -5.4), 60.0, rotation_deg=20)
    x, y = np.array([0.0, 300.0, -200.0]), np.array([0.0, 100.0, 500.0])
    theta = np.arctan(np.hypot(x, y) * 60 * ARCSEC)
    assert pixel_solid_angle(wcs, x, y) == pytest.approx((60 * ARCSEC) ** 2 * np.cos(theta) ** 3, rel=1e-6)


def test_distorted_pixels_cover_their_part_of_the_sky():
    """All pixels of an image together are as large as a fine mesh of its outline says, and they differ."""
    wcs = add_sip(tangent_wcs(SHAPE, (10.0, 40.0), 4.0), SHAPE, 3.0)
    y, x = np.indices(SHAPE)
    areas = pixel_solid_angle(wcs, x, y)
    assert areas.max() / areas.min() > 1.1
    edge = np.linspace(-0.5, 0.5, 400)
    height, width = SHAPE
    right, left = np.full(400, width - 0.5), np.full(400, -0.5)
    px = np.concatenate([(width - 1) / 2 + width * edge, right, (width - 1) / 2 - width * edge, left])
    bottom, top = np.full(400, -0.5), np.full(400, height - 0.5)
    py = np.concatenate([bottom, (height - 1) / 2 + height * edge, top, (height - 1) / 2 - height * edge])
    xi, eta = tangent_wcs((1, 1), (10.0, 40.0), 4.0).world_to_pixel_values(*wcs.pixel_to_world_values(px, py))
    outline = abs(np.sum(xi * np.roll(eta, -1) - eta * np.roll(xi, -1))) / 2 * (4 * ARCSEC) ** 2
    assert areas.sum() == pytest.approx(outline, rel=1e-5)


def test_smaller_pixels_hold_more_of_a_star_and_as_much_nebula():
    """Data divided by a flat of the sky keep surface brightness: a pixel of half the size, four times the sum."""
    sky = make_sky(SHAPE, stars=1)
    sky = replace(sky, stars=np.array([[70.3, 55.8]]), fluxes=np.array([[1e4, 2e4, 3e4]]))
    ra, dec = sky.wcs.pixel_to_world_values(79.5, 59.5)
    for scale, fwhm in ((4.0, 3.0), (2.0, 6.0)):
        shape = (round(480 / scale), round(640 / scale))
        wcs = tangent_wcs(shape, (float(ra), float(dec)), scale)
        image, nebula = sky.image(wcs, shape, fwhm), sky.nebula(wcs, shape)
        assert (image - nebula).sum(axis=(1, 2)) == pytest.approx(sky.fluxes[0] * (4 / scale) ** 2, rel=1e-5)
        assert nebula.mean(axis=(1, 2)) == pytest.approx(sky.nebula(sky.wcs, SHAPE).mean(axis=(1, 2)), rel=1e-3)
        assert sky.scale_of(wcs, shape) == pytest.approx(scale / 4)


def test_gradients_have_the_ranges_asked_for_and_no_mean():
    rng = np.random.default_rng(1)
    for k, size in enumerate(term_ranges(SHAPE)):
        one = np.zeros((1, 5))
        one[0, k] = 1
        image = gradient_image(one, SHAPE)
        assert np.ptp(image) == pytest.approx(size, rel=0.03) and abs(image.mean()) < 1e-12
    planes = gradient_image(random_gradient(SHAPE, 2000, rng, 5.0, 0.0, 0.0), (30, 40))
    ranges = np.ptp(planes, axis=(1, 2))
    assert np.sqrt(np.mean(ranges**2)) == pytest.approx(5.0, rel=0.06)
    bowl = gradient_image(random_gradient(SHAPE, 3, rng, 0.0, 0.0, 2.0), SHAPE)
    assert np.ptp(bowl, axis=(1, 2)) == pytest.approx(2.0, rel=0.03)
    assert (bowl[:, 0, 0] > bowl[:, 60, 80]).all()


def test_what_the_instrument_did_can_be_taken_back():
    """Everything at once; the panel without noise is the sky again."""
    layout = replace(
        LAYOUT, noise=1.0, plane=20.0, curvature=5.0, common_curvature=3.0, vignetting=0.1, exposures=(1.0, 4.0),
        clouds=(0.4, 0.9), units={1: 1 / 65535}, pixel_scales=(1.0, 1.5), sip=True,
    )  # fmt: skip
    sky = make_sky(mosaic_shape(layout), stars=40)
    panels = make_panels(layout, sky)
    assert [p.data.shape for p in panels] == [(3, 120, 160), (3, 80, 107)]
    assert panels[1].fwhm == 2.0 and panels[1].data.max() < 1
    for panel in panels:
        error = panel.true_sky - sky.image(panel.wcs, panel.data.shape[1:], panel.fwhm)
        middle = error[:, 30:50, 40:60] * panel.gain[:, None, None] / panel.noise
        assert np.std(middle) == pytest.approx(1, abs=0.1) and np.abs(middle.mean(axis=(1, 2))).max() < 0.2


def test_gradients_and_clouds_leave_the_rest_of_a_panel_as_it_was():
    sky = make_sky(mosaic_shape(LAYOUT), stars=40)
    plain, other = (make_panels(layout, sky) for layout in (LAYOUT, replace(LAYOUT, plane=5.0, vignetting=1e-9)))
    for a, b in zip(plain, other, strict=True):
        assert (a.gain == b.gain).all() and (a.offset == b.offset).all()
        assert np.abs(b.data - b.gradient - a.data).max() < 1e-2
    dim = make_panels(replace(LAYOUT, clouds=(0.4, 0.6)), sky)
    factor = np.stack([d.gain / p.gain for d, p in zip(dim, plain, strict=True)])
    assert ((factor > 0.4) & (factor < 0.6)).all() and np.ptp(factor, axis=1).max() < 1e-12


def test_a_ceiling_cuts_the_brightest_pixels():
    sky = make_sky(mosaic_shape(LAYOUT), stars=300)
    free, cut = (make_panels(layout, sky)[0].data for layout in (LAYOUT, replace(LAYOUT, ceiling=3000.0)))
    assert free.max() > 3000 and (cut == np.minimum(free, 3000)).all()


def test_a_disc_stands_on_the_nebula():
    with_disc, without = (make_sky(SHAPE, stars=0, nebula=0.0, disc=disc) for disc in ((40.0, 24.0), None))
    light = with_disc.nebula(with_disc.wcs, SHAPE) - without.nebula(without.wcs, SHAPE)
    assert light[:, 60, 80] == pytest.approx(24, rel=1e-3) and np.abs(light[:, 3, 3]).max() < 0.1
    assert np.count_nonzero(light[0] > 12) == pytest.approx(np.pi * 40**2, rel=0.1)
