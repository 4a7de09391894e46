"""The frames of a panel are aligned on their stars, and those whose WCS lies are named.

The WCS of a panel's frames, each by itself off by a fraction of a pixel, are brought to agree: the stars of all frames
form one catalogue on the panel's tangent plane (weighted means of their positions), each frame is fitted to it, and the
catalogue is made anew, three times over. The panel as a whole stays where the median of its frames was. 25 frames with
errors of 0.8 pixel (rms, shift and linear terms) agree to 0.01 pixel after it.

Frames whose stars are not where their WCS puts them cannot be found by their residuals, for they match nothing: every
frame's offset is first looked for by a vote of all pairs of stars within 40 pixels, and a frame without one, though it
should have one, contradicts the others.

Limitations: an error that all frames of a panel share cannot be told, nor can a frame be judged that overlaps no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from astropy.wcs import WCS

from zemosaic_pipeline.sky import (
    image_centre,
    median_direction,
    pixel_scale,
    pixel_to_sky,
    separation,
    sky_to_pixel,
    tangent_plane,
)
from zemosaic_pipeline.stars.detection import Stars, position_error
from zemosaic_pipeline.stars.matching import Affine, Model, fit_affine, moved_wcs, mutual_matches

_STARS_USED = 300
_VOTERS = 150
_SEARCH = 40.0
"""How far (pixels) a frame may be off and still be brought back."""
_FEWEST = 5
"""Stars below which nothing is decided about a frame."""
_JUDGED = 8
"""Stars of the others that must lie in a frame before it can be contradicted by them."""
_SEEDS = 12
_FOUNDERS = 30
"""Frames whose stars make the catalogue; the others are only measured against it."""


@dataclass(frozen=True, eq=False)
class Refined:
    """What the stars say about one frame's WCS.

    Attributes
    ----------
    wcs : WCS
        The better one; the given one where nothing could be done.
    shift_px : float
        By how much it moved the pixels (rms over the frame).
    rms_px : float
        What is left between the frame's stars and the catalogue (rms of both axes together); NaN without matches.
    matched : int
        Stars that both have.
    reason : str or None
        Why the frame is to be set aside, in words that follow its name.
    """

    wcs: WCS
    shift_px: float = 0.0
    rms_px: float = math.nan
    matched: int = 0
    reason: str | None = None


@dataclass(eq=False)
class _View:
    """One frame on its way: its stars on its pixels and on the plane (units of a pixel), its outline there."""

    wcs: WCS
    pixels: np.ndarray
    plane: np.ndarray
    weight: np.ndarray
    shape: tuple[int, int]
    outline: np.ndarray

    def corrected(self, affine: Affine, plane: WCS) -> None:
        """Let the WCS follow when its frame's stars are at ``affine(p)`` instead of p."""
        self.wcs = moved_wcs(self.wcs, affine)
        self.plane, self.outline = _on(plane, self.wcs, self.pixels), _on(plane, self.wcs, _corners(self.shape))

    def to_pixels(self) -> np.ndarray:
        """Return the matrix (2, 2) that turns steps on the plane into steps in pixels."""
        return np.linalg.inv(fit_affine(_corners(self.shape), self.outline, np.ones(4), "affine").matrix)

    def sees(self, points: np.ndarray) -> np.ndarray:
        """Tell which points of the plane (N, 2) lie in the frame (a convex quadrilateral)."""
        ahead = np.roll(self.outline, -1, axis=0) - self.outline
        away = points[:, None] - self.outline
        side = ahead[:, 0] * away[..., 1] - ahead[:, 1] * away[..., 0]
        return np.logical_or(np.all(side >= 0, axis=1), np.all(side <= 0, axis=1))


def align_frames(
    stars: Sequence[Stars],
    wcs: Sequence[WCS],
    shapes: Sequence[tuple[int, int]],
    pointings: Sequence[tuple[float, float] | None] | None = None,
) -> list[Refined]:
    """Bring the WCS of a panel's frames to agree on their stars.

    With 12 matched stars that are spread over the frame an affine map is fitted, with 4 a rotation and a shift, else a
    shift. Frames fall into groups that agree with each other. Where groups overlap and contradict each other, the
    largest is believed; where two are as large (two frames, and they disagree), the one whose WCS is nearer to where
    its frames' headers point, and without that the one with more stars: keeping one of them is right as often as not,
    keeping both never. A frame that no other overlaps, or with fewer than 5 stars, keeps its WCS, unjudged.

    Parameters
    ----------
    stars : sequence of Stars
    wcs : sequence of WCS
        Celestial, two axes; not changed.
    shapes : sequence of (H, W)
    pointings : sequence of (ra, dec) or None, optional
        Where the headers say that the telescope pointed, degrees.

    Returns
    -------
    list of Refined
    """
    if not stars:
        return []
    scale = float(np.median([pixel_scale(w) for w in wcs]))
    centres = np.array([image_centre(w, s) for w, s in zip(wcs, shapes, strict=True)])
    plane = tangent_plane(*median_direction(centres), scale)
    views = [_view(s, w, h, plane) for s, w, h in zip(stars, wcs, shapes, strict=True)]
    result = [Refined(w) for w in wcs]
    groups, against = _groups(views, plane)
    ranks = {id(g): _rank(g, centres, views, pointings) for g in groups}
    believed: list[list[int]] = []
    for group in sorted(groups, key=lambda g: ranks[id(g)]):
        enemy = next((g for g in believed if _contradict(g, group, against)), None)
        if enemy is None:
            believed.append(group)
            for k, refined in zip(
                group, _refine([views[k] for k in group], [wcs[k] for k in group], plane), strict=True
            ):
                result[k] = refined
            continue
        others = f"{len(enemy)} other frames" if len(enemy) > 1 else "the other frame"
        doubt = " (which of the two is wrong, only their pointings or numbers of stars tell)" if len(enemy) == 1 else ""
        for k in group:
            result[k] = replace(result[k], reason=f"has stars that are not where its WCS says, beside {others}{doubt}")
    return result


def _view(stars: Stars, wcs: WCS, shape: tuple[int, int], plane: WCS) -> _View:
    pixels = np.stack([stars.x, stars.y], axis=1)[:_STARS_USED]
    weight = 1 / position_error(stars)[:_STARS_USED] ** 2
    return _View(wcs, pixels, _on(plane, wcs, pixels), weight, shape, _on(plane, wcs, _corners(shape)))


def _corners(shape: tuple[int, int]) -> np.ndarray:
    height, width = shape
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], float)


def _on(plane: WCS, wcs: WCS, pixels: np.ndarray) -> np.ndarray:
    """Return pixels (N, 2) of a frame on the plane; far away what the plane does not show."""
    if not len(pixels):
        return pixels.reshape(0, 2)
    found = sky_to_pixel(plane, pixel_to_sky(wcs, pixels))
    return np.where(np.isfinite(found), found, 1e9)


def _groups(views: list[_View], plane: WCS) -> tuple[list[list[int]], set[tuple[int, int]]]:
    """Return groups of frames that agree, and (first of a group, frame) for what disagrees with it.

    A group grows from the frame with most stars that is left. Every frame is compared with what the group has gathered.
    """
    left = sorted(
        (k for k, v in enumerate(views) if len(v.pixels) >= _FEWEST), key=lambda k: (-len(views[k].pixels), k)
    )
    groups: list[list[int]] = []
    against: set[tuple[int, int]] = set()
    while left and len(groups) < _SEEDS:
        seed = left[0]
        group, catalogue, rest = [seed], views[seed].plane[:_VOTERS], []
        for k in left[1:]:
            offset, judged = _vote(views[k], catalogue, [views[m] for m in group[:8]])
            if offset is None:
                rest.append(k)
                if judged:
                    against.add((seed, k))
                continue
            group.append(k)
            views[k].corrected(Affine(np.eye(2), -views[k].to_pixels() @ offset), plane)
            fresh = views[k].plane[:_VOTERS]
            if len(group) <= 8:
                known, _ = mutual_matches(fresh, catalogue, 3.0)
                catalogue = np.concatenate([catalogue, np.delete(fresh, known, axis=0)])
        groups.append(group)
        left = rest
    # more than a dozen opinions: what is left is believed only where nobody contradicts it
    return groups + [[k] for k in left], against


def _vote(view: _View, catalogue: np.ndarray, others: list[_View]) -> tuple[np.ndarray | None, bool]:
    """Return the offset (2,) that brings a frame's stars onto the catalogue, None if there is none.

    The second value tells whether there should be one: enough stars lie in the overlap.
    """
    from scipy.ndimage import uniform_filter

    mine = view.plane[:_VOTERS]
    shared = np.zeros(len(mine), bool)
    for other in others:
        shared |= other.sees(mine)
    mine, theirs = mine[shared], catalogue[view.sees(catalogue)]
    fewest = min(len(mine), len(theirs))
    if len(mine) < _FEWEST or len(theirs) < _FEWEST:
        return None, False
    difference = (theirs[None] - mine[:, None]).reshape(-1, 2)
    difference = difference[(np.abs(difference) < _SEARCH).all(axis=1)]
    bins = int(_SEARCH)
    votes = np.histogram2d(*difference.T, bins=bins, range=[[-_SEARCH, _SEARCH]] * 2)[0]
    summed = uniform_filter(votes, 3, mode="constant") * 9
    chance = 9 * votes.mean()
    peak = np.unravel_index(np.argmax(summed), summed.shape)
    if summed[peak] < max(_FEWEST, 0.3 * fewest, chance + 5 * math.sqrt(chance)):
        return None, fewest >= _JUDGED
    offset = (np.array(peak) + 0.5) * 2 * _SEARCH / bins - _SEARCH
    for radius in (3.5, 2.0):
        near = difference[np.hypot(*(difference - offset).T) < radius]
        offset = np.median(near, axis=0) if len(near) else offset
    return offset, True


def _rank(
    group: list[int], centres: np.ndarray, views: list[_View], pointings: Sequence[tuple[float, float] | None] | None
) -> tuple[float, float, float, int]:
    """Return the key by which groups are believed, smaller first."""
    away = []
    for k in group:
        if pointings is not None and pointings[k] is not None:
            away.append(separation(*centres[k], *pointings[k]))
    # a hundredth of a degree is no difference
    distance = round(float(np.median(away)), 2) if away else 0.0
    return (-len(group), distance, -float(np.median([len(views[k].pixels) for k in group])), group[0])


def _contradict(one: list[int], other: list[int], against: set[tuple[int, int]]) -> bool:
    """Tell whether of two groups the later frames, for the most part, contradicted the earlier group."""
    said = sum((one[0], k) in against for k in other), sum((other[0], k) in against for k in one)
    return 2 * said[0] >= len(other) or 2 * said[1] >= len(one)


def _refine(group: list[_View], given: list[WCS], plane: WCS) -> list[Refined]:
    """Align the frames of one group; the median frame stays where it was given."""
    if len(group) < 2:
        return [Refined(w) for w in given]
    for radius in (3.0, 2.0, 1.5):
        catalogue = _catalogue(group, radius)
        for view in group:
            _fit(view, catalogue, radius, plane)
    catalogue = _anchored(_catalogue(group, 1.5), group, given, plane)
    result = []
    for view, before in zip(group, given, strict=True):
        # the anchor moves all frames alike, by some pixels at most
        _fit(view, catalogue, _SEARCH / 4, plane)
        matched, rms = _fit(view, catalogue, 1.5, plane)
        result.append(Refined(view.wcs, _displacement(before, view.wcs, view.shape), rms, matched))
    return result


def _catalogue(group: list[_View], radius: float) -> np.ndarray:
    """Return the stars (N, 2) on the plane that two frames have at least: weighted means of their positions."""
    points = np.zeros((0, 2))
    for view in sorted(group, key=lambda v: -len(v.pixels))[:_FOUNDERS]:
        mine, _ = mutual_matches(view.plane, points, radius)
        points = np.concatenate([points, np.delete(view.plane, mine, axis=0)])
    total, weight, count = np.zeros_like(points), np.zeros(len(points)), np.zeros(len(points), int)
    for view in group:
        mine, there = mutual_matches(view.plane, points, radius)
        total[there] += view.weight[mine, None] * view.plane[mine]
        weight[there] += view.weight[mine]
        count[there] += 1
    return (total / np.maximum(weight, 1e-300)[:, None])[count >= 2]


def _fit(view: _View, catalogue: np.ndarray, radius: float, plane: WCS) -> tuple[int, float]:
    """Fit a frame's WCS to the catalogue; gives the number of matches and what is left (rms, pixels)."""
    mine, there = mutual_matches(view.plane, catalogue, radius)
    if len(mine) < 2:
        return 0, math.nan
    measured = view.pixels[mine]
    expected = measured + (catalogue[there] - view.plane[mine]) @ view.to_pixels().T
    affine, good = _robust_fit(expected, measured, view.weight[mine], view.shape)
    view.corrected(affine, plane)
    left = (catalogue[there] - view.plane[mine])[good]
    return int(good.sum()), float(np.sqrt(np.mean((left**2).sum(axis=1))))


def _robust_fit(
    expected: np.ndarray, measured: np.ndarray, weight: np.ndarray, shape: tuple[int, int]
) -> tuple[Affine, np.ndarray]:
    """Fit a map three times, each time without the stars that are off; gives it and the stars that are not."""

    def fitted(good: np.ndarray) -> Affine:
        return fit_affine(expected[good], measured[good], weight[good], _model(expected[good], shape))

    def near(affine: Affine, good: np.ndarray) -> np.ndarray:
        # in units of each star's own error
        off = np.hypot(*(measured - affine(expected)).T) * np.sqrt(weight)
        return off <= 3.5 * np.median(off[good]) + 1e-9

    good = np.ones(len(expected), bool)
    affine = fitted(good)
    for _ in range(2):
        good = near(affine, good)
        affine = fitted(good)
    return affine, near(affine, good)


def _model(points: np.ndarray, shape: tuple[int, int]) -> Model:
    """Return what can be fitted to stars at these pixels without tilting the part of the frame that has none."""
    spread = points.std(axis=0) / (shape[1], shape[0])
    if len(points) >= 12 and spread.min() > 0.15:
        return "affine"
    return "rigid" if len(points) >= 4 and spread.max() > 0.1 else "shift"


def _anchored(catalogue: np.ndarray, group: list[_View], given: list[WCS], plane: WCS) -> np.ndarray:
    """Return the catalogue moved to where the median of the given WCS has it."""
    centre = np.median(catalogue, axis=0) if len(catalogue) else np.zeros(2)
    matrices, shifts = [], []
    for view, before in zip(group, given, strict=True):
        now, then = view.outline, _on(plane, before, _corners(view.shape))
        back = fit_affine(now - centre, then - centre, np.ones(4), "affine")
        matrices.append(back.matrix)
        shifts.append(back.shift)
    return Affine(np.median(matrices, axis=0), np.median(shifts, axis=0))(catalogue - centre) + centre


def _displacement(before: WCS, after: WCS, shape: tuple[int, int]) -> float:
    """Return the rms distance (pixels) between where two WCS see the same sky, over a frame."""
    ra, dec = before.wcs.crval
    plane = tangent_plane(ra, dec, pixel_scale(before))
    height, width = shape
    grid = np.stack(np.meshgrid(np.linspace(0, width - 1, 4), np.linspace(0, height - 1, 4)), axis=-1).reshape(-1, 2)
    step = _on(plane, after, grid) - _on(plane, before, grid)
    return float(np.sqrt(np.mean((step**2).sum(axis=1))))
