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

`cluster_seestar_stacks_connected`, `_auto_split_groups` and `_compute_max_angular_separation_deg` are what the filter
window of ZeMosaic looks up by name; they work on its dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

AUTO_CAP = 400
"""Frames of a panel where the limit is left open: the same on every machine, so that the panels are.

Two things grow with the number of frames combined at once. Each is an open file, of which Windows allows a process
512. And a block of the stack holds values and weights of them all (8 bytes a sample): 400 frames of three channels
fill a third of the default memory budget (2 GB) with blocks of 256 x 256 pixels, and smaller ones spend their time
on their borders.
"""
_EXTENT_IN_FIELDS = 0.5
_UNKNOWN_FIELD = 20.0
"""Size of the field in thresholds where nobody tells it."""


# ------------------------------------------------------------------------------------------------ on plain arrays


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


def group_frames(
    ra: ArrayLike,
    dec: ArrayLike,
    *,
    threshold_deg: float,
    orientation_deg: ArrayLike | None = None,
    orientation_split_deg: float = 0.0,
    mount: Sequence[Any] | None = None,
    target_groups: int = 0,
    field_deg: float | None = None,
    cap: int = 0,
    auto_cap: bool = False,
    min_cap: int = 0,
    order: Sequence[Any] | None = None,
) -> list[np.ndarray]:
    """Gather frames into panels.

    Parameters
    ----------
    ra, dec : array_like of float, shape (N,)
        Centres in degrees. Frames with a position that is not finite form one group, the last.
    threshold_deg : float
        Frames nearer to each other than this (degrees) are linked; 0 links equal positions only.
    orientation_deg : array_like of float, shape (N,), optional
        Position angles; frames whose angle is not finite are kept apart where the split is on.
    orientation_split_deg : float
        0: frames are not split by orientation.
    mount : sequence of hashable, optional
        Code of the mount of each frame (its text is compared).
    target_groups : int
        The threshold grows (to within 1 %) until at most so many components are left; 0: any number. It never grows
        above `field_deg`, so that fields that do not overlap stay apart even so. Steps 3 and 5 may split further.
    field_deg : float, optional
        Shorter side of a frame. The centres of a panel spread over half of it at most, along any direction; None: over
        any distance.
    cap : int
        Most frames of a panel; 0: `AUTO_CAP` with `auto_cap`, else any number.
    min_cap : int
        The fewest frames that a split may leave; it goes before the cap.
    order : sequence, optional
        Sortable key of each frame, such as its date.

    Returns
    -------
    list of ndarray of int
        Indices of the frames of each panel, in the order of `order`; panels by right ascension and declination of
        their centre.

    Raises
    ------
    ValueError
        If the arrays differ in length, or a threshold is negative or not finite.
    """
    ra, dec = np.asarray(ra, float).ravel(), np.asarray(dec, float).ravel()
    n = len(ra)
    angles = np.full(n, np.nan) if orientation_deg is None else np.asarray(orientation_deg, float).ravel()
    mounts = np.array([""] * n if mount is None else [str(m) for m in mount])
    if not len(dec) == len(angles) == len(mounts) == n or (order is not None and len(order) != n):
        raise ValueError("ra, dec, orientation, mount and order must have the same length")
    if not (math.isfinite(threshold_deg) and threshold_deg >= 0 and orientation_split_deg >= 0):
        raise ValueError("thresholds must be finite and not negative")
    sequence = _canonical_order(ra, dec, angles, order)
    known = np.isfinite(ra) & np.isfinite(dec)
    placed, lost = sequence[known[sequence]], sequence[~known[sequence]]
    xyz = _unit_vectors(ra[placed], dec[placed])
    _, codes = np.unique(mounts[placed], return_inverse=True)
    threshold = _threshold_for(xyz, codes, threshold_deg, target_groups, field_deg)
    # all that follows holds positions in `placed`, ascending
    groups = _components_of_mounts(xyz, codes, threshold)
    if orientation_split_deg > 0:
        groups = [part for g in groups for part in _split_by_angle(g, angles[placed], orientation_split_deg)]
    if field_deg is not None and field_deg > 0 and target_groups <= 0:
        groups = [part for g in groups for part in _cut_to_extent(g, xyz, _chord(_EXTENT_IN_FIELDS * field_deg))]
    cap = AUTO_CAP if auto_cap and cap == 0 else cap
    if cap > 0:
        groups = [part for g in groups for part in _split_to_cap(g, xyz, cap, min_cap, _chord(threshold))]
    result = [placed[g] for g in _by_position(groups, xyz)]
    return [*result, lost] if len(lost) else result


def _canonical_order(ra: np.ndarray, dec: np.ndarray, angles: np.ndarray, order: Sequence[Any] | None) -> np.ndarray:
    keys = range(len(ra)) if order is None else sorted(set(order))
    rank = {key: k for k, key in enumerate(keys)}
    first = np.zeros(len(ra)) if order is None else np.array([rank[key] for key in order], float)
    return np.lexsort((angles, dec, ra, first))


def _unit_vectors(ra: ArrayLike, dec: ArrayLike) -> np.ndarray:
    a, d = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=-1)


def _chord(degrees: float) -> float:
    """Return the length of the chord of an angle, a little longer, so that equal distances count as within."""
    return 2 * math.sin(math.radians(min(degrees, 180.0)) / 2) * (1 + 1e-9) + 1e-13


def _components_of_mounts(xyz: np.ndarray, codes: np.ndarray, threshold: float) -> list[np.ndarray]:
    groups = []
    for code in range(codes.max(initial=-1) + 1):
        members = np.flatnonzero(codes == code)
        labels = _connected(xyz[members], _chord(threshold))
        by_label = np.argsort(labels, kind="stable")
        edges = np.flatnonzero(np.diff(labels[by_label])) + 1
        groups += [members[part] for part in np.split(by_label, edges)]
    return groups


def _connected(xyz: np.ndarray, chord: float) -> np.ndarray:
    """Return the component of each point (N,), where points nearer than `chord` are linked.

    The points are put into cubes with the diagonal `chord`: those of one cube are linked, whatever their number, and
    only cubes nearer than two diagonals can be linked to each other, a bounded number. So the work grows with N,
    not with the number of links, which is N^2 / 2 where all frames have one position.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    side = chord / math.sqrt(3) * (1 - 1e-9)
    cubes, first, cube = np.unique(np.floor(xyz / side), axis=0, return_index=True, return_inverse=True)
    cube = cube.ravel()
    pairs = cKDTree(cubes * side).query_pairs(2 * chord, output_type="ndarray")
    distance = np.linalg.norm(xyz[first[pairs[:, 0]]] - xyz[first[pairs[:, 1]]], axis=1)

    def label(links: np.ndarray) -> np.ndarray:
        graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(len(cubes),) * 2)
        return connected_components(graph, directed=False)[1]

    links = pairs[distance <= chord]
    labels = label(links)
    # what the first points of two cubes did not link, any two of their points may
    count = np.bincount(cube)
    open_ = (labels[pairs[:, 0]] != labels[pairs[:, 1]]) & (count[pairs].max(axis=1, initial=0) > 1)
    more = _links_between(xyz, cube, pairs[open_][np.argsort(distance[open_], kind="stable")], labels, chord)
    return label(np.concatenate([links, more]))[cube]


def _links_between(
    xyz: np.ndarray, cube: np.ndarray, pairs: np.ndarray, labels: np.ndarray, chord: float
) -> np.ndarray:
    """Return those of `pairs` (of cubes) that hold two points nearer than `chord`, as far as they join anything."""
    from scipy.spatial import cKDTree

    if not len(pairs):
        return pairs.reshape(0, 2)
    by_cube = np.split(np.argsort(cube, kind="stable"), np.cumsum(np.bincount(cube))[:-1])
    parent = list(range(int(labels.max()) + 1))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    found = []
    for a, b in pairs:
        ra, rb = root(labels[a]), root(labels[b])
        if ra == rb:
            continue
        nearest, _ = cKDTree(xyz[by_cube[a]]).query(xyz[by_cube[b]], distance_upper_bound=chord * (1 + 1e-12))
        if np.isfinite(nearest).any():
            parent[ra] = rb
            found.append((a, b))
    return np.array(found, pairs.dtype).reshape(-1, 2)


def _threshold_for(xyz: np.ndarray, codes: np.ndarray, threshold: float, target: int, largest: float | None) -> float:
    """Return the smallest threshold (to 1 %) from `threshold` on that leaves at most `target` components."""
    largest = 180.0 if largest is None else max(largest, threshold)

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


def _split_to_cap(group: np.ndarray, xyz: np.ndarray, cap: int, min_cap: int, same_place: float) -> list[np.ndarray]:
    """Split evenly into as few parts of at most `cap` as possible, each of at least `min_cap`."""
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


def _by_position(groups: list[np.ndarray], xyz: np.ndarray) -> list[np.ndarray]:
    def key(group: np.ndarray) -> tuple[float, float, int]:
        x, y, z = xyz[group].mean(axis=0)
        ra, dec = math.degrees(math.atan2(y, x)) % 360, math.degrees(math.atan2(z, math.hypot(x, y)))
        return round(ra, 6) % 360, round(dec, 6), int(group[0])

    return sorted(groups, key=key)
