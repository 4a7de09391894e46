"""Angles, pixel scales, tangent planes: one definition of each. Directions and angles are in degrees.

The worker's entrance imports this module, so that astropy, which takes a second, is imported where it is needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from astropy.coordinates import BaseCoordinateFrame
    from astropy.wcs import WCS

# ------------------------------------------------------------------------------------------------------ directions


def separation(ra: ArrayLike, dec: ArrayLike, other_ra: ArrayLike, other_dec: ArrayLike) -> np.ndarray:
    """Return the angle between directions, float64 of the shape that the arguments make together."""
    from astropy.coordinates import angular_separation

    return np.degrees(angular_separation(*(np.radians(angle) for angle in (ra, dec, other_ra, other_dec))))


def chord(angle: float) -> float:
    """Return the distance of two points of the unit sphere that are an angle apart; at most the sphere's diameter."""
    return 2 * math.sin(math.radians(min(angle, 180.0)) / 2)


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> np.ndarray:
    """Return the points of the unit sphere, float64 (..., 3), that directions are."""
    a, d = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=-1)


def directions_of(vectors: ArrayLike) -> np.ndarray:
    """Return right ascension and declination, float64 (..., 2), of vectors (..., 3) of any length but 0."""
    x, y, z = np.moveaxis(np.asarray(vectors, float), -1, 0)
    return np.degrees(np.stack([np.arctan2(y, x) % (2 * np.pi), np.arctan2(z, np.hypot(x, y))], axis=-1))


def median_direction(directions: np.ndarray) -> tuple[float, float]:
    """Return the direction of the median unit vector of directions (N, 2)."""
    ra, dec = directions_of(np.median(unit_vectors(*directions.T), axis=0))
    return float(ra), float(dec)


def most_central(directions: np.ndarray) -> tuple[float, float]:
    """Return the one of the directions (N, 2) whose median distance to all is least: one wrong one cannot move it."""
    if len(directions) > 500:
        directions = directions[:: len(directions) // 500 + 1]
    ra, dec = directions.T
    away = separation(ra[:, None], dec[:, None], ra, dec)
    ra, dec = directions[np.argmin(np.median(away, axis=1))]
    return float(ra), float(dec)


# -------------------------------------------------------------------------------------------------- images on the sky


def pixel_scale(wcs: WCS) -> float:
    """Return the size of a pixel: the root of its area (astropy's `proj_plane_pixel_area`, without a copy of the WCS)."""
    return math.sqrt(abs(np.linalg.det(wcs.pixel_scale_matrix)))


def pixel_to_sky(wcs: WCS, pixels: ArrayLike) -> np.ndarray:
    """Return the directions (N, 2), in the celestial frame of `wcs`, of 0-based pixels (N, 2)."""
    return np.asarray(wcs.all_pix2world(pixels, 0))


def sky_to_pixel(plane: WCS, directions: np.ndarray) -> np.ndarray:
    """Return the 0-based pixels (N, 2) of a WCS without distortion that show directions (N, 2); NaN where none does."""
    return np.asarray(plane.wcs_world2pix(directions, 0))


def image_centre(wcs: WCS, shape: tuple[int, int]) -> tuple[float, float]:
    """Return where the middle of an image of `shape` (H, W) lies, in the celestial frame of `wcs`."""
    height, width = shape
    ra, dec = pixel_to_sky(wcs, [[(width - 1) / 2, (height - 1) / 2]])[0]
    return float(ra), float(dec)


def icrs_centre(wcs: WCS, shape: tuple[int, int]) -> tuple[float, float]:
    """Return where the middle of an image of `shape` (H, W) lies, in ICRS; slower by 0.2 ms where `wcs` is not."""
    from astropy import units
    from astropy.coordinates import ICRS, UnitSphericalRepresentation
    from astropy.wcs.utils import wcs_to_celestial_frame

    lon, lat = image_centre(wcs, shape)
    frame = cast("BaseCoordinateFrame", wcs_to_celestial_frame(wcs))
    if isinstance(frame, ICRS):
        return lon, lat
    there = UnitSphericalRepresentation(lon * units.deg, lat * units.deg)
    moved = frame.realize_frame(there).transform_to(ICRS())
    return float(moved.ra.deg), float(moved.dec.deg)


def tangent_plane(ra: float, dec: float, scale: float, shape: tuple[int, int] = (1, 1)) -> WCS:
    """Return a TAN WCS, north up and east to the left, that touches the sky in the middle of an image.

    Parameters
    ----------
    ra, dec : float
        Where it touches the sky, in whatever celestial frame: the WCS names none.
    scale : float
        Size of a pixel.
    shape : (H, W)
        Of the image; by default of one pixel, so that (0, 0) is where the plane touches the sky.
    """
    from astropy.wcs import WCS

    plane = WCS(naxis=2)
    plane.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    plane.wcs.crval, plane.wcs.crpix = (ra, dec), ((shape[1] + 1) / 2, (shape[0] + 1) / 2)
    plane.wcs.cdelt = (-scale, scale)
    plane.wcs.set()
    return plane


# ------------------------------------------------------------------------------------------------ rectangles around


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
