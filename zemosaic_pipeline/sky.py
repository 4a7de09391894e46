"""Angles, pixel scales, tangent planes: one definition of each."""

from __future__ import annotations

import math

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales


def least_rectangle(points: np.ndarray) -> float:
    """Direction of the rectangle of least area around ``points`` (N, 2): radians, from -pi/4 to pi/4.

    One of its sides lies along a side of the convex hull (Freeman & Shapira 1975).
    """
    hull = convex_hull(points)
    sides = np.roll(hull, -1, axis=0) - hull
    angles = np.arctan2(sides[:, 1], sides[:, 0])
    along, across = (
        np.ptp(np.outer(u, hull[:, 0]) + np.outer(v, hull[:, 1]), axis=1)
        for u, v in ((np.cos(angles), np.sin(angles)), (-np.sin(angles), np.cos(angles)))
    )
    angle = angles[np.argmin(along * across)] % (np.pi / 2)
    return float(angle - np.pi / 2 if angle > np.pi / 4 else angle)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of ``points`` (N, 2), counter-clockwise (Andrew 1979, "monotone chain")."""
    ordered = np.unique(points, axis=0)
    chains = []
    for run in (ordered, ordered[::-1]):
        chain: list[np.ndarray] = []
        for point in run:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        chains += chain[:-1]
    return np.array(chains)


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Above 0 where the way from ``a`` by ``b`` to ``c`` turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def pixel_scale(wcs: WCS) -> float:
    """Geometric mean pixel scale in degrees."""
    return float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs.celestial))))


def image_centre(wcs: WCS, shape: tuple[int, int]) -> SkyCoord:
    """Sky position of the middle of an image of ``shape`` (H, W), in ICRS."""
    height, width = shape
    centre = wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
    return SkyCoord(centre.ra, centre.dec)  # without the attributes of the frame it came from


def middle_of(centres: SkyCoord) -> SkyCoord:
    """The centre whose median distance to all others is smallest: one wrong tile cannot move it."""
    if len(centres) > 500:
        centres = centres[:: len(centres) // 500 + 1]
    medians = [np.median(centre.separation(centres).deg) for centre in centres]
    return centres[int(np.argmin(medians))]


def tangent_plane(ra: float, dec: float, scale: float) -> WCS:
    """Return a TAN WCS, north up, whose pixel (0, 0) is at (ra, dec); `scale` in degrees per pixel."""
    plane = WCS(naxis=2)
    plane.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    plane.wcs.crval, plane.wcs.crpix = (ra, dec), (1, 1)
    plane.wcs.cdelt = (-scale, scale)
    plane.wcs.set()
    return plane


def scale_of(wcs: WCS) -> float:
    """Return the size of a pixel in degrees (geometric mean of its sides)."""
    return math.sqrt(abs(np.linalg.det(wcs.pixel_scale_matrix)))


def sky_of(wcs: WCS, points: np.ndarray) -> np.ndarray:
    """Return ra, dec (degrees, (N, 2)) of 0-based pixels (N, 2)."""
    return wcs.all_pix2world(points, 0)


def separation(ra: float, dec: float, other_ra: float, other_dec: float) -> float:
    """Return the angle between two directions, all in degrees (Vincenty's formula)."""
    a, b = np.radians(dec), np.radians(other_dec)
    step = np.radians(other_ra - ra)
    x = np.cos(b) * np.sin(step)
    y = np.cos(a) * np.sin(b) - np.sin(a) * np.cos(b) * np.cos(step)
    z = np.sin(a) * np.sin(b) + np.cos(a) * np.cos(b) * np.cos(step)
    return float(np.degrees(np.arctan2(np.hypot(x, y), z)))
