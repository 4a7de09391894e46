"""What the stars of two frames say about their WCS: maps between frames, solutions handed on, pointings checked.

`transfer_wcs`
    Solves a frame by one that is solved: triangles of stars are recognised by the lengths of their sides, in less than
    10 ms. (astroalign, which does the same for any two lists, took 40 to 90 ms for lists of 400 stars, and 400 ms to
    find that two have nothing in common, which takes 3 ms here: the scale is known.)
`pointing_disagrees`
    Compares a WCS with where the telescope says it pointed.

Limitation: `transfer_wcs` takes the distortion (SIP) of the reference as that of the frame: both are of one camera.
astropy's WCS objects must not be shared between threads; nothing here changes one that it was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from astropy.wcs import WCS, Sip

from zemosaic_pipeline.sky import (
    image_centre,
    median_direction,
    pixel_scale,
    pixel_to_sky,
    separation,
    sky_to_pixel,
    tangent_plane,
)
from zemosaic_pipeline.stars.detection import Stars

# ------------------------------------------------------------------------------------------- linear maps of pixels


Model = Literal["shift", "rigid", "similar", "affine"]
"""A shift; rotation and shift; these and a scale; any linear map and shift."""


@dataclass(frozen=True)
class Affine:
    """``p' = matrix @ p + shift`` of 0-based pixel coordinates (x, y)."""

    matrix: np.ndarray
    shift: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (N, 2)."""
        return points @ self.matrix.T + self.shift


def fit_affine(source: np.ndarray, target: np.ndarray, weight: np.ndarray, model: Model) -> Affine:
    """Fit the map that takes `source` to `target` (N, 2) in weighted least squares."""
    w = weight / weight.sum()
    centre, goal = w @ source, w @ target
    a, b = source - centre, target - goal
    matrix = np.eye(2)
    if model == "affine":
        root = np.sqrt(w)[:, None]
        matrix = np.linalg.lstsq(a * root, b * root, rcond=None)[0].T
    elif model != "shift":
        za, zb = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
        turn = (w * zb * za.conj()).sum()
        turn = turn / abs(turn) if model == "rigid" else turn / (w * abs(za) ** 2).sum()
        matrix = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return Affine(matrix, goal - matrix @ centre)


def moved_wcs(wcs: WCS, affine: Affine) -> WCS:
    """Return a copy of `wcs` in which what was at pixel p is at ``affine(p)``.

    CRPIX and the CD (or PC) matrix change; the distortion (SIP) stays as it is about the new CRPIX. For a WCS without
    distortion that is exact; with it, for a shift; a matrix M errs by (M - 1) times the distortion, 1e-3 pixel for the
    small corrections that this is for.
    """
    moved = wcs.deepcopy()
    # FITS counts pixels from 1
    moved.wcs.crpix = affine(wcs.wcs.crpix[None] - 1)[0] + 1
    inverse = np.linalg.inv(affine.matrix)
    if wcs.wcs.has_cd():
        moved.wcs.cd = wcs.wcs.cd @ inverse
    else:
        moved.wcs.pc = wcs.wcs.get_pc() @ inverse
    if wcs.sip is not None:
        # astropy keeps a second CRPIX with the distortion
        moved.sip = Sip(wcs.sip.a, wcs.sip.b, wcs.sip.ap, wcs.sip.bp, moved.wcs.crpix)
    moved.wcs.set()
    return moved


def mutual_matches(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the points of `a` and `b` (N, 2) that are each other's nearest, within `radius`."""
    from scipy.spatial import KDTree

    if not len(a) or not len(b):
        return np.zeros(0, int), np.zeros(0, int)
    distance, there = map(np.asarray, KDTree(b).query(a, distance_upper_bound=radius))
    back = np.asarray(KDTree(a).query(b)[1])
    mine = np.flatnonzero(np.isfinite(distance))
    mine = mine[back[there[mine]] == mine]
    return mine, there[mine]


# ------------------------------------------------------------------------------------------------ transferred WCS

_STARS_USED = 300
_FEWEST = 8
_CORNERSTONES = 80
_ALL_AMONG = 14
_NEIGHBOURS = 5
_SCALE_SLACK = 0.04
"""How far the scale of a frame may be from what its header says (fraction)."""


def transfer_wcs(stars: Stars, reference_stars: Stars, reference_wcs: WCS, scale: float | None = None) -> WCS | None:
    """Solve a frame by a solved frame that overlaps it.

    Triangles of bright stars are recognised by the lengths of their sides; what several of them agree on (a rotation
    and a shift) is tried on all stars. It is believed where at least 8 stars match, a quarter of those that should,
    and far more than chance has it. Mirrored frames are not recognised.

    Parameters
    ----------
    stars, reference_stars : Stars
        Of the frame and of the reference, 400 are plenty.
    reference_wcs : WCS
        Celestial, two axes. CRPIX and distortion (SIP) of the result are the reference's.
    scale : float, optional
        Of the frame, arcsec per pixel; None: the reference's.

    Returns
    -------
    WCS or None
        TAN or TAN-SIP; None where the stars do not match.
    """
    if min(len(stars.x), len(reference_stars.x)) < _FEWEST:
        return None
    mine = np.stack([stars.x, stars.y], axis=1)[:_STARS_USED]
    theirs = np.stack([reference_stars.x, reference_stars.y], axis=1)[: 2 * _STARS_USED]
    ratio = 1.0 if scale is None else scale / (3600 * pixel_scale(reference_wcs))
    for guess in _guesses(_triangles(mine), _triangles(theirs), ratio, mine.mean(axis=0)):
        found = _verified(guess, mine, theirs)
        if found is not None:
            return _solution(*found, mine, theirs, reference_wcs)
    return None


def _triangles(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return triangles as vertices (T, 3), each opposite to the longest, middle, shortest side, and those sides (T, 3).

    Among the brightest stars all triangles; among the bright ones those of a star with two of its neighbours. The
    vertices run clockwise in all triangles or the sides are negative, so that mirror images differ.
    """
    from scipy.spatial import KDTree

    bright = points[:_CORNERSTONES]
    found = list(combinations(range(min(_ALL_AMONG, len(bright))), 3))
    near = KDTree(bright).query(bright, k=min(_NEIGHBOURS + 1, len(bright)))[1]
    for row in np.asarray(near):
        found += [(row[0], a, b) for a, b in combinations(row[1:], 2)]
    corners = np.unique(np.sort(np.array(found), axis=1), axis=0)
    a, b, c = (bright[corners[:, k]] for k in range(3))
    sides = np.stack([np.hypot(*(q - p).T) for p, q in ((b, c), (c, a), (a, b))], axis=1)
    order = np.argsort(-sides, axis=1)
    corners, sides = np.take_along_axis(corners, order, 1), np.take_along_axis(sides, order, 1)
    # where two sides are nearly alike their order is chance; small triangles know neither angle nor scale
    clear = (sides[:, 1] < 0.98 * sides[:, 0]) & (sides[:, 2] < 0.98 * sides[:, 1]) & (sides[:, 2] > 12)
    corners, sides = corners[clear], sides[clear]
    a, b, c = (bright[corners[:, k]] for k in range(3))
    u, v = b - a, c - a
    sign = np.sign(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
    return bright[corners], sides * sign[:, None]


def _guesses(
    mine: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray], ratio: float, middle: np.ndarray
) -> list[Affine]:
    """Return the maps from frame to reference that most pairs of like triangles agree on, at most five."""
    from scipy.spatial import KDTree

    if not len(mine[0]) or not len(theirs[0]):
        return []

    def features(sides: np.ndarray, factor: float) -> np.ndarray:
        length = np.abs(sides)
        shape = length[:, 1:] / length[:, :1]
        # units of the tolerance: the scale's slack, and half a pixel's error of a side of 100
        return np.column_stack(
            [np.log(length[:, 0] * factor) / _SCALE_SLACK, shape / 0.006, 1e3 * np.sign(sides[:, 0])]
        )

    pairs = KDTree(features(mine[1], ratio)).sparse_distance_matrix(
        KDTree(features(theirs[1], 1.0)), 1.0, p=np.inf, output_type="ndarray"
    )
    a, b = mine[0][pairs["i"]] @ (1, 1j), theirs[0][pairs["j"]] @ (1, 1j)
    za, zb = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    turn = (zb * za.conj()).sum(axis=1) / (np.abs(za) ** 2).sum(axis=1)
    place = b.mean(axis=1) + turn * (complex(*middle) - a.mean(axis=1))
    # small triangles err by some pixels in the frame's middle
    votes = np.column_stack([turn.real / 0.02, turn.imag / 0.02, place.real / 12, place.imag / 12])
    left = np.ones(len(votes), bool)
    found = []
    while left.any() and len(found) < 5:
        index = np.flatnonzero(left)
        near = KDTree(votes[index]).query_ball_point(votes[index], 1.0)
        most = max(range(len(near)), key=lambda k: len(near[k]))
        members = index[near[most]]
        if len(members) < 2 and found:
            break
        t, p = np.median(votes[members], axis=0).reshape(2, 2) * ((0.02,), (12,))
        matrix = np.array([[t[0], -t[1]], [t[1], t[0]]])
        found.append(Affine(matrix, p - matrix @ middle))
        left[members] = False
    return found


def _verified(guess: Affine, mine: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Try a map on all stars; gives the indices of the matching ones, None if they are too few."""
    affine = guess
    for radius in (12.0, 6.0, 3.0, 2.0, 2.0):
        i, j = mutual_matches(affine(mine), theirs, radius)
        if len(i) < 5:
            return None
        affine = fit_affine(mine[i], theirs[j], np.ones(len(i)), "affine" if len(i) >= 20 else "similar")
    i, j = mutual_matches(affine(mine), theirs, 2.0)
    moved = affine(mine)
    low, high = theirs.min(axis=0), theirs.max(axis=0)
    inside = ((moved >= low) & (moved <= high)).all(axis=1).sum()
    back = Affine(np.linalg.inv(affine.matrix), -np.linalg.solve(affine.matrix, affine.shift))(theirs)
    seen = ((back >= mine.min(axis=0)) & (back <= mine.max(axis=0))).all(axis=1).sum()
    chance = inside * len(theirs) * math.pi * 2.0**2 / np.prod(high - low)
    enough = max(_FEWEST, 0.25 * min(inside, seen), 5 + chance + 6 * math.sqrt(chance))
    return (i, j) if len(i) >= enough else None


def _solution(i: np.ndarray, j: np.ndarray, mine: np.ndarray, theirs: np.ndarray, reference: WCS) -> WCS | None:
    """Fit a TAN WCS with the reference's CRPIX and SIP to matched stars; None where it does not fit to a pixel."""
    pixels, sky = mine[i], pixel_to_sky(reference, theirs[j])
    if len(i) < 20:
        # too few for a free fit: the rotation and shift between the frames, put on a grid
        similar = fit_affine(mine[i], theirs[j], np.ones(len(i)), "similar")
        low, high = theirs.min(axis=0), theirs.max(axis=0)
        grid = np.stack(np.meshgrid(*np.linspace(low, high, 4).T), axis=-1).reshape(-1, 2)
        pixels = (grid - similar.shift) @ np.linalg.inv(similar.matrix).T
        sky = pixel_to_sky(reference, grid)
    wcs = WCS(naxis=2)
    wcs.wcs.crpix = reference.wcs.crpix
    wcs.wcs.crval = median_direction(sky)
    wcs.wcs.radesys, wcs.wcs.equinox = reference.wcs.radesys, reference.wcs.equinox
    suffix = "" if reference.sip is None else "-SIP"
    wcs.wcs.ctype = ["RA---TAN" + suffix, "DEC--TAN" + suffix]
    wcs.sip = reference.sip
    # steps from CRPIX after the distortion; with origin 0 astropy would subtract 1 from them, too
    steps = pixels + 1 - reference.wcs.crpix if wcs.sip is None else np.asarray(wcs.sip_pix2foc(pixels + 1, 1))
    left = _fit_plane(wcs, steps, sky)
    wcs.wcs.set()
    return wcs if left < pixel_scale(reference) else None


def _fit_plane(wcs: WCS, steps: np.ndarray, sky: np.ndarray) -> float:
    """Set CRVAL and the CD matrix so that steps (N, 2) from CRPIX fall on the sky (N, 2).

    CRVAL is near already. Returns what is left (rms, degrees) without the stars that are off by 4 medians.
    """
    good, off = np.ones(len(steps), bool), np.zeros(len(steps))
    for _ in range(4):
        ra, dec = wcs.wcs.crval
        plane = tangent_plane(ra, dec, 1.0)
        aim = sky_to_pixel(plane, sky) * (-1, 1)
        affine = fit_affine(steps[good], aim[good], np.ones(good.sum()), "affine")
        # where CRPIX lies on this plane is the next plane's middle
        wcs.wcs.crval = pixel_to_sky(plane, affine.shift[None] * (-1, 1))[0]
        wcs.wcs.cd = affine.matrix
        off = np.hypot(*(aim - affine(steps)).T)
        good = off <= 4 * np.median(off) + 1e-12
    return float(np.sqrt(np.mean(off[good] ** 2)))


# ------------------------------------------------------------------------------------------------------- pointing


def pointing_disagrees(wcs: WCS, ra: float | None, dec: float | None, shape: tuple[int, int]) -> str | None:
    """Compare a WCS with where the telescope says it pointed.

    They disagree where the two are further apart than half the frame's diagonal: then the frame does not show what
    the telescope pointed at, however it is turned. Closer is not judged: mounts are off by arcminutes, and some headers
    give the target instead.

    Parameters
    ----------
    wcs : WCS
    ra, dec : float or None
        Pointing in degrees; None: nothing to compare with.
    shape : (H, W)

    Returns
    -------
    str or None
        The contradiction, in words that follow the frame's name.
    """
    if ra is None or dec is None or not (math.isfinite(ra) and math.isfinite(dec)):
        return None
    away = separation(*image_centre(wcs, shape), ra, dec)
    if away <= math.hypot(*shape) / 2 * pixel_scale(wcs):
        return None
    return f"has a WCS that is {away:.2f} degrees from where its header says that the telescope pointed"
