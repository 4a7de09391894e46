"""Phase 2: frames are gathered into panels by where they point.

A panel is what one master tile is made of. `group_frames` works on plain arrays, in this order:

1. frames of different mounts (alt-az, equatorial) never share a panel;
2. frames whose centres are nearer to each other than the threshold are linked; panels are the connected
   components of these links on the sphere, exactly (RA wrap and poles are ordinary places);
3. where asked for, a panel is split by orientation: first where the circle of angles has a gap wider than the
   limit, then until no two frames of a panel are turned against each other by more than it;
4. a panel whose centres spread further than half the shorter side of a frame is cut into pieces that do not. Links
   make chains: a telescope that scans a large field in small steps leaves one component of any length, and a tile
   of it would be a mosaic of its own, thinly covered. Within half a side all frames of a panel overlap by half,
   and so do neighbouring panels. As few pieces as the length asks for, cut where the centres leave the widest gap.
   Where the user asks for a number of panels, that goes before this step, and it is left out;
5. a panel of more frames than `cap` is split evenly: spatially where its frames differ in place, else in order
   (of time), so that seeing, sky and field rotation change little within a part.

Groups are never joined for being small. The result depends on the frames alone, not on the order in which they
come: everything is computed in the order of `order` (name or time), then position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from zemosaic_pipeline.arrays import connected_groups
from zemosaic_pipeline.sky import chord, directions_of, unit_vectors

AUTO_CAP = 400
"""Frames of a panel where the limit is left open: the same on every machine, so that the panels are.

Two things grow with the number of frames combined at once. Each is an open file, of which Windows allows a process
512. And a block of the stack holds values and weights of them all (8 bytes a sample): 400 frames of three channels
fill a third of the default memory budget (2 GB) with blocks of 256 x 256 pixels, and smaller ones spend their time
on their borders.
"""
_EXTENT_IN_FIELDS = 0.5


def linking_length(threshold_deg: float | None, fields_deg: Sequence[float]) -> float:
    """Return the threshold in degrees: as set, else a tenth of the median of the frames' shorter sides.

    A tenth is more than dithering and drift move a telescope, and less than the step of any mosaic.

    Raises
    ------
    ValueError
        If neither is given.
    """
    if threshold_deg is not None:
        return float(threshold_deg)
    if not len(fields_deg):
        raise ValueError("without a threshold the size of the field is needed")
    return float(np.median(fields_deg)) / 10


@dataclass(frozen=True)
class Grouping:
    """What frames of one panel have in common.

    Attributes
    ----------
    threshold_deg : float
        Frames nearer to each other than this (degrees) are linked; 0 links equal positions only.
    orientation_split_deg : float
        The largest difference of position angles; 0: any.
    target_groups : int
        The threshold grows (to within 1 %) until at most so many components are left; 0: any number. It never grows
        above `field_deg`, so that fields that do not overlap stay apart even so. Steps 3 and 5 may split further.
    field_deg : float or None
        Shorter side of a frame. The centres of a panel spread over half of it at most, along any direction; None: over
        any distance.
    cap : int
        Most frames of a panel; 0: `AUTO_CAP` with `auto_cap`, else any number.
    min_cap : int
        The fewest frames that a split may leave; it goes before the cap.

    Raises
    ------
    ValueError
        A threshold is negative or not finite.
    """

    threshold_deg: float
    orientation_split_deg: float = 0.0
    target_groups: int = 0
    field_deg: float | None = None
    cap: int = 0
    auto_cap: bool = False
    min_cap: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold_deg) and self.threshold_deg >= 0 and self.orientation_split_deg >= 0):
            raise ValueError("thresholds must be finite and not negative")

    @property
    def largest(self) -> int:
        """Most frames of a panel; 0: any number."""
        return AUTO_CAP if self.auto_cap and self.cap == 0 else self.cap

    @property
    def extent_deg(self) -> float:
        """How far the centres of a panel spread at most, degrees; infinite where nothing limits it."""
        if self.field_deg is None or self.field_deg <= 0 or self.target_groups > 0:
            return math.inf
        return _EXTENT_IN_FIELDS * self.field_deg


def group_frames(
    ra: ArrayLike,
    dec: ArrayLike,
    grouping: Grouping,
    *,
    orientation_deg: ArrayLike | None = None,
    mount: Sequence[object] | None = None,
    order: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Gather frames into panels.

    Parameters
    ----------
    ra, dec : array_like of float, shape (N,)
        Centres in degrees. Frames with a position that is not finite form one group, the last.
    grouping : Grouping
        What frames of one panel have in common.
    orientation_deg : array_like of float, shape (N,), optional
        Position angles; frames whose angle is not finite are kept apart where the split is on.
    mount : sequence, optional
        Code of the mount of each frame (its text is compared).
    order : sequence of str, optional
        Key by which the frames are ordered, such as their dates.

    Returns
    -------
    list of ndarray of int
        Indices of the frames of each panel, in the order of `order`; panels by right ascension and declination of
        their centre.

    Raises
    ------
    ValueError
        The arrays differ in length.
    """
    ra, dec = np.asarray(ra, float).ravel(), np.asarray(dec, float).ravel()
    n = len(ra)
    angles = np.full(n, np.nan) if orientation_deg is None else np.asarray(orientation_deg, float).ravel()
    mounts = np.array([""] * n if mount is None else [str(m) for m in mount])
    if not len(dec) == len(angles) == len(mounts) == n or (order is not None and len(order) != n):
        raise ValueError("ra, dec, orientation, mount and order must have the same length")
    sequence = _canonical_order(ra, dec, angles, order)
    known = np.isfinite(ra) & np.isfinite(dec)
    placed, lost = sequence[known[sequence]], sequence[~known[sequence]]
    groups = _panels(unit_vectors(ra[placed], dec[placed]), mounts[placed], angles[placed], grouping)
    result = [placed[group] for group in groups]
    return [*result, lost] if len(lost) else result


def _panels(xyz: np.ndarray, mounts: np.ndarray, angles: np.ndarray, grouping: Grouping) -> list[np.ndarray]:
    """Return the panels of frames at places (N, 3) that are in their final order: ascending indices of each."""
    _, codes = np.unique(mounts, return_inverse=True)
    threshold = _threshold_for(xyz, codes, grouping)
    groups = _components_of_mounts(xyz, codes, threshold)
    if grouping.orientation_split_deg > 0:
        groups = [part for g in groups for part in _split_by_angle(g, angles, grouping.orientation_split_deg)]
    if math.isfinite(grouping.extent_deg):
        groups = [part for g in groups for part in _cut_to_extent(g, xyz, reach(grouping.extent_deg))]
    if grouping.largest > 0:
        cap, fewest, same_place = grouping.largest, grouping.min_cap, reach(threshold)
        groups = [part for g in groups for part in split_to_cap(g, xyz, cap, fewest, same_place)]
    return by_position(groups, xyz)


def _canonical_order(ra: np.ndarray, dec: np.ndarray, angles: np.ndarray, order: Sequence[str] | None) -> np.ndarray:
    keys = range(len(ra)) if order is None else sorted(set(order))
    rank = {key: k for k, key in enumerate(keys)}
    first = np.zeros(len(ra)) if order is None else np.array([rank[key] for key in order], float)
    return np.lexsort((angles, dec, ra, first))


def reach(degrees: float) -> float:
    """Return the chord of an angle, a little longer, so that equal distances count as within."""
    return chord(degrees) * (1 + 1e-9) + 1e-13


def _components_of_mounts(xyz: np.ndarray, codes: np.ndarray, threshold: float) -> list[np.ndarray]:
    groups = []
    for code in range(codes.max(initial=-1) + 1):
        members = np.flatnonzero(codes == code)
        labels = _linked(xyz[members], reach(threshold))
        by_label = np.argsort(labels, kind="stable")
        edges = np.flatnonzero(np.diff(labels[by_label])) + 1
        groups += [members[part] for part in np.split(by_label, edges)]
    return groups


def _linked(xyz: np.ndarray, distance: float) -> np.ndarray:
    """Return the number of the component of each point (N,), where points nearer than `distance` are linked.

    The points are put into cubes with the diagonal `distance`: those of one cube are linked, whatever their number, and
    only cubes nearer than two diagonals can be linked to each other, a bounded number. So the work grows with N,
    not with the number of links, which is N^2 / 2 where all frames have one position.
    """
    from scipy.spatial import KDTree

    side = distance / math.sqrt(3) * (1 - 1e-9)
    cubes, first, cube = np.unique(np.floor(xyz / side), axis=0, return_index=True, return_inverse=True)
    cube = cube.ravel()
    pairs = KDTree(cubes * side).query_pairs(2 * distance, output_type="ndarray")
    apart = np.linalg.norm(xyz[first[pairs[:, 0]]] - xyz[first[pairs[:, 1]]], axis=1)
    labels = connected_groups(len(cubes), pairs[apart <= distance])
    # what the first points of two cubes did not link, any two of their points may
    undecided = (labels[pairs[:, 0]] != labels[pairs[:, 1]]) & (np.bincount(cube)[pairs].max(axis=1, initial=0) > 1)
    nearest_first = pairs[undecided][np.argsort(apart[undecided], kind="stable")]
    return _joined(labels, nearest_first, xyz, cube, distance)[cube]


def _joined(labels: np.ndarray, pairs: np.ndarray, xyz: np.ndarray, cube: np.ndarray, distance: float) -> np.ndarray:
    """Return the labels of cubes, those of `pairs` made one where two of their points are nearer than `distance`."""
    from scipy.spatial import KDTree

    if not len(pairs):
        return labels
    by_cube = np.split(np.argsort(cube, kind="stable"), np.cumsum(np.bincount(cube))[:-1])
    labels = labels.copy()
    for a, b in pairs:
        if labels[a] == labels[b]:
            continue
        nearest, _ = KDTree(xyz[by_cube[a]]).query(xyz[by_cube[b]], distance_upper_bound=distance * (1 + 1e-12))
        if np.isfinite(nearest).any():
            labels[labels == labels[b]] = labels[a]
    return labels


def _threshold_for(xyz: np.ndarray, codes: np.ndarray, grouping: Grouping) -> float:
    """Return the smallest threshold (to 1 %) from that of `grouping` on that leaves few enough components."""
    threshold, target, field = grouping.threshold_deg, grouping.target_groups, grouping.field_deg
    largest = 180.0 if field is None else max(field, threshold)

    def enough(value: float) -> bool:
        return len(_components_of_mounts(xyz, codes, value)) <= target

    if target <= 0 or enough(threshold):
        return threshold
    low, high = threshold, min(max(2 * threshold, 1e-3), largest)
    while not enough(high):
        if high >= largest:
            return largest
        low, high = high, min(2 * high, largest)
    while high > low * 1.01 and high > 1e-3:
        middle = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# --------------------------------------------------------------------------------------------------- splits


def _cut_position(values: np.ndarray, limit: float) -> int:
    """Return where to cut sorted `values` in two so that the halves still need no more pieces than the whole.

    A length of n limits (rounded up) falls into parts of n // 2 and n - n // 2 limits; what the rounding leaves is the
    room within which the widest gap is taken, the middlemost of equals.
    """
    n = math.ceil((values[-1] - values[0]) / limit * (1 - 1e-9))
    low, high = values[-1] - (n - n // 2) * limit, values[0] + (n // 2) * limit
    gaps = np.diff(values)
    allowed = np.flatnonzero((values[:-1] <= high * (1 + 1e-12) + 1e-15) & (values[1:] >= low - 1e-15))
    middle = (values[allowed] + values[allowed + 1] - low - high) / 2
    best = np.lexsort((np.abs(middle), -np.round(gaps[allowed] / limit, 6)))[0]
    return int(allowed[best]) + 1


def _split_by_angle(group: np.ndarray, angles: np.ndarray, limit: float) -> list[np.ndarray]:
    mine = angles[group] % 360.0
    unknown = group[~np.isfinite(mine)]
    known = group[np.isfinite(mine)]
    parts = [unknown] if len(unknown) else []
    if not len(known):
        return parts
    mine = mine[np.isfinite(mine)]
    by_angle = np.argsort(mine, kind="stable")
    values = mine[by_angle]
    start = int(np.argmax(np.append(np.diff(values), values[0] + 360 - values[-1]))) + 1
    by_angle, values = np.roll(by_angle, -start), np.roll(values, -start)
    values = values + 360.0 * (values < values[0])
    open_ = np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > limit) + 1)
    while open_:
        arc = open_.pop()
        if values[arc[-1]] - values[arc[0]] > limit * (1 + 1e-9):
            cut = _cut_position(values[arc], limit)
            open_ += [arc[:cut], arc[cut:]]
        else:
            parts.append(np.sort(known[by_angle[arc]]))
    return parts


def _along_longest(points: np.ndarray) -> np.ndarray:
    """Return the coordinates (N,) of points (N, 3) along that of their principal axes on which they spread most."""
    centred = points - points.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    projected = centred @ axes
    return projected[:, np.argmax(np.ptp(projected, axis=0))]


def _cut_to_extent(group: np.ndarray, xyz: np.ndarray, limit: float) -> list[np.ndarray]:
    if len(group) == 1:  # most groups of the whole sky
        return [group]
    done, open_ = [], [group]
    while open_:
        part = open_.pop()
        along = _along_longest(xyz[part])
        if np.ptp(along) <= limit:
            done.append(part)
            continue
        by_place = np.argsort(along, kind="stable")
        cut = _cut_position(along[by_place], limit)
        open_ += [np.sort(by_place_part) for by_place_part in (part[by_place[:cut]], part[by_place[cut:]])]
    return done


def split_to_cap(group: np.ndarray, xyz: np.ndarray, cap: int, min_cap: int, same_place: float) -> list[np.ndarray]:
    """Split a group of places (N, 3) evenly into as few parts of at most `cap` as possible, each of at least `min_cap`.

    By place, but in order where the places spread by no more than `same_place`.
    """
    count = math.ceil(len(group) / cap)
    if min_cap > 0:
        count = max(1, min(count, len(group) // min(min_cap, cap)))
    if count == 1:
        return [group]
    if np.ptp(_along_longest(xyz[group])) <= same_place:
        return list(np.array_split(group, count))
    done, open_ = [], [(group, count)]
    while open_:
        part, count = open_.pop()
        if count == 1:
            done.append(np.sort(part))
            continue
        by_place = part[np.argsort(_along_longest(xyz[part]), kind="stable")]
        cut = sum(len(p) for p in np.array_split(by_place, count)[: count // 2])
        open_ += [(np.sort(by_place[:cut]), count // 2), (np.sort(by_place[cut:]), count - count // 2)]
    return done


def by_position(groups: Sequence[np.ndarray], xyz: np.ndarray) -> list[np.ndarray]:
    """Return groups of places (N, 3) by right ascension and declination of their centres."""
    centres = np.array([xyz[group].mean(axis=0) for group in groups]).reshape(-1, 3)
    ra, dec = np.round(directions_of(centres), 6).T
    order = np.lexsort(([group[0] for group in groups], dec, ra % 360))
    return [groups[k] for k in order]
