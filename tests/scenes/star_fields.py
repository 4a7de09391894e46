"""Stars as `find_stars` gives them of a known sky, and WCS of a telescope that sees it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS, Sip

from zemosaic_pipeline.stars.detection import Stars, position_error

SHAPE = (1920, 1080)
NOISE = 20.0


def make_wcs(ra=315.4, dec=68.15, angle=0.0, sip=False, scale=2.39):
    """A WCS of the telescope; with `sip` its distortion is 3 pixels in the corners."""
    wcs = WCS(naxis=2)
    suffix = "-SIP" if sip else ""
    wcs.wcs.ctype = ["RA---TAN" + suffix, "DEC--TAN" + suffix]
    wcs.wcs.crval, wcs.wcs.crpix = (ra, dec), (540.5, 960.5)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs.wcs.cd = scale / 3600 * np.array([[-c, s], [s, c]])
    if sip:
        a, b = np.zeros((4, 4)), np.zeros((4, 4))
        a[2, 0], a[0, 2], a[3, 0], a[1, 2] = 3e-6, -2e-6, 2e-9, 2e-9
        b[1, 1], b[0, 3], b[2, 1] = 3e-6, 2e-9, 2e-9
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    wcs.array_shape = SHAPE
    return wcs


@cache
def star_field():
    """Positions (N, 2) and fluxes of the stars of a sky."""
    rng = np.random.default_rng(5)
    away, angle = np.sqrt(rng.uniform(0, 1, 4000)) * 1.6, rng.uniform(0, 360, 4000)
    place = SkyCoord(315.4, 68.15, unit="deg").directional_offset_by(angle * u.deg, away * u.deg)
    return np.stack([place.ra.deg, place.dec.deg], axis=1), 1e3 * (rng.pareto(1.0, 4000) + 1)


def stars_at(x, y, flux, fwhm=3.0, elongation=1.0, background=500.0):
    """Stars of one shape, none of them saturated."""
    one = np.ones(len(x))
    return Stars(x, y, flux, fwhm * one, elongation * one, background, NOISE, np.zeros(len(x), bool))


def brightest(stars, count):
    columns = ("x", "y", "flux", "fwhm", "elongation", "saturated")
    return replace(stars, **{name: getattr(stars, name)[:count] for name in columns})


def observe(wcs, seed, spurious=30, lost=0.1, shape=SHAPE):
    """What `find_stars` gives of a frame: noisy positions, some stars lost, some that are none."""
    rng = np.random.default_rng(seed)
    places, fluxes = star_field()
    xy = wcs.all_world2pix(places, 0)
    seen = ((xy > 5) & (xy < np.array(shape[::-1]) - 6)).all(axis=1) & (rng.uniform(size=len(xy)) > lost)
    xy, flux = np.concatenate([xy[seen], rng.uniform((0, 0), shape[::-1], (spurious, 2))]), fluxes[seen]
    flux = np.concatenate([flux, 1e3 * (rng.pareto(1.0, spurious) + 1)])
    order = np.argsort(-flux)[:400]
    stars = stars_at(*xy[order].T, flux[order])
    noise = rng.normal(0, position_error(stars), (2, len(order)))
    return replace(stars, x=stars.x + noise[0], y=stars.y + noise[1])


def night(count, seed=0, stars=200, fwhm=3.0, elongation=1.1, light=1.0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        flux = np.sort(1e3 * (rng.pareto(1.2, stars) + 1))[::-1] * light * rng.normal(1, 0.05)
        shape = fwhm * rng.normal(1, 0.03), elongation * rng.normal(1, 0.02)
        x, y = rng.uniform(0, 1000, (2, stars))
        frames.append(stars_at(x, y, flux, *shape, background=1000.0))
    return frames


def errors(wcs, truth):
    """Where `truth` has what `wcs` says, in pixels, over the frame (N, 2)."""
    grid = np.stack(np.meshgrid(np.linspace(0, 1079, 6), np.linspace(0, 1919, 8)), axis=-1).reshape(-1, 2)
    return truth.all_world2pix(wcs.all_pix2world(grid, 0), 0) - grid


def rms(steps):
    return float(np.sqrt((np.asarray(steps) ** 2).sum(axis=-1).mean()))
