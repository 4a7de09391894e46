"""What ZeMosaic's filter window looks up by name; works on its dictionaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from zemosaic_pipeline.phases.clustering import Grouping, by_position, group_frames, reach, split_to_cap
from zemosaic_pipeline.sky import image_centre, pixel_scale, separation, unit_vectors

if TYPE_CHECKING:
    from astropy.wcs import WCS

Progress = Callable[..., object] | None
_UNKNOWN_FIELD = 20.0
"""Size of the field in thresholds where no item tells it."""


# ------------------------------------------------------------------------------ what the filter window looks up


def cluster_seestar_stacks_connected(
    items: Iterable[dict],
    threshold_deg: float,
    progress_callback: Progress = None,
    orientation_split_threshold_deg: float = 0,
) -> list[list[dict]]:
    """Group the filter window's frames as Phase 2 does (`group_frames`).

    A group spreads over half the shorter side of a frame at most where the items tell it, else over 10 thresholds.

    Parameters
    ----------
    items : iterable of dict
        One dictionary a frame. Its position is looked for under ``center`` and ``phase0_center`` (a SkyCoord or ra, dec
        in degrees), in ``wcs`` and ``phase0_wcs``, under ``RA``/``DEC`` and their like, and in ``header``.
    threshold_deg : float
        Degrees.
    progress_callback : callable, optional
        Called as ``callback(text, progress, level)``.
    orientation_split_threshold_deg : float
        Degrees; 0: no split.

    Returns
    -------
    list of list of dict
        The same dictionaries, each once; those without any position are the last group.
    """
    items = list(items)
    threshold = max(float(threshold_deg or 0), 0.0)
    places = np.array([_position(item) or (np.nan, np.nan) for item in items], float).reshape(-1, 2)
    grouping = Grouping(
        threshold_deg=threshold,
        orientation_split_deg=max(float(orientation_split_threshold_deg or 0), 0.0),
        field_deg=_field_side(items) or _UNKNOWN_FIELD * threshold,
    )
    ra, dec = places.T
    groups = group_frames(
        ra,
        dec,
        grouping,
        orientation_deg=[_orientation(item) for item in items],
        order=[_stable_name(item) for item in items],
    )
    _tell(progress_callback, f"{len(items)} frames form {len(groups)} groups (threshold {threshold:g} degrees)")
    return [[items[k] for k in group] for group in groups]


def _auto_split_groups(
    groups: Iterable[Sequence[dict]], cap: int = 0, min_cap: int = 0, progress_callback: Progress = None
) -> list[list[dict]]:
    """Split groups of more than `cap` frames evenly into parts of at least `min_cap`; the rest stay as they are.

    Parameters
    ----------
    groups : iterable of sequences of dict
        As from `cluster_seestar_stacks_connected`.
    cap, min_cap : int
        Frames; a cap of 0: no split.
    progress_callback : callable, optional
        Called as ``callback(text, progress, level)``.

    Returns
    -------
    list of list of dict
        The same dictionaries.
    """
    result: list[list[dict]] = []
    before = 0
    for group in map(list, groups):
        before += 1
        if not cap or len(group) <= cap:
            result.append(group)
            continue
        ordered = [group[k] for k in sorted(range(len(group)), key=lambda k, g=group: (_stable_name(g[k]), k))]
        places = [_position(item) for item in ordered]
        # a group in which a position is missing cannot be split by place
        xyz = unit_vectors(*np.transpose([place or (0.0, 0.0) for place in places]))
        side = _field_side(ordered) or 1.0
        same_place = reach(180.0 if None in places else side / 10)
        parts = split_to_cap(np.arange(len(ordered)), xyz, int(cap), int(min_cap or 0), same_place)
        result += [[ordered[k] for k in part] for part in by_position(parts, xyz)]
    if len(result) != before:
        _tell(progress_callback, f"{before} groups were split into {len(result)} of at most {cap} frames")
    return result


def _compute_max_angular_separation_deg(coords: Iterable[Any]) -> float:
    """Return the largest distance (degrees) between any two positions; 0 for fewer than two.

    Parameters
    ----------
    coords : iterable of (ra, dec)
        Degrees; what is no position is passed over.
    """
    found = [place for place in map(_as_place, coords) if place is not None]
    places = np.unique(np.reshape(found, (-1, 2)), axis=0)
    xyz = unit_vectors(*places.T)
    best = 0.0
    for start in range(0, len(xyz), 1000):
        cosines = xyz[start : start + 1000] @ xyz.T
        i, j = np.unravel_index(np.argmin(cosines), cosines.shape)
        best = max(best, float(separation(*places[start + i], *places[j])))
    return best


def _tell(progress_callback: Progress, text: str) -> None:
    if progress_callback is not None:
        progress_callback(text, None, "INFO")


# ------------------------------------------------------------------------------------- reading their dictionaries

_PLACE_KEYS = ("center", "phase0_center", "center_coord", "coord", "skycoord")
_WCS_KEYS = ("wcs", "phase0_wcs", "solved_wcs")
_RA_DEC_KEYS = (("RA", "DEC"), ("ra", "dec"), ("ra_deg", "dec_deg"), ("center_ra_deg", "center_dec_deg"))
_HEADER_KEYS = (("CRVAL1", "CRVAL2"), ("RA", "DEC"), ("OBJCTRA", "OBJCTDEC"))
_ANGLE_KEYS = ("orientation_deg", "orientation", "position_angle", "pa_deg", "rotation_deg", "CROTA2")
_NAME_KEYS = ("path", "path_raw", "path_preprocessed_cache", "file", "filename", "name")


def _as_place(value: Any) -> tuple[float, float] | None:
    """Read a SkyCoord, a pair of numbers or a pair of texts as (ra, dec) in degrees."""
    if value is None:
        return None
    icrs = getattr(value, "icrs", value)
    if hasattr(icrs, "ra") and hasattr(icrs, "dec"):
        value = (getattr(icrs.ra, "deg", icrs.ra), getattr(icrs.dec, "deg", icrs.dec))
    if isinstance(value, Mapping):
        value = next(((value[a], value[d]) for a, d in _RA_DEC_KEYS if a in value and d in value), None)
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) < 2:
        return None
    ra, dec = _degrees(value[0], hours=True), _degrees(value[1], hours=False)
    if not (math.isfinite(ra) and math.isfinite(dec) and abs(dec) <= 90):
        return None
    return ra % 360, dec


def _degrees(value: Any, hours: bool) -> float:
    """Read a number or a text in degrees; a sexagesimal text of a right ascension is in hours. NaN if neither."""
    if value is None:
        return math.nan
    try:
        return float(getattr(value, "value", value))
    except (TypeError, ValueError):
        pass
    from astropy.coordinates import Angle

    try:
        return float(np.asarray(Angle(str(value), unit="hourangle" if hours else "deg").deg))
    except ValueError:
        return math.nan


def _position(item: Mapping[str, Any]) -> tuple[float, float] | None:
    return next((place for told in _told_places(item) if (place := _as_place(told)) is not None), None)


def _told_places(item: Mapping[str, Any]) -> Iterator[Any]:
    """What may tell the position of an item, the most trusted first."""
    for key in _PLACE_KEYS:
        yield item.get(key)
    for wcs in _wcs_of(item):
        yield _wcs_centre(wcs)
    for a, d in (*_RA_DEC_KEYS, *_HEADER_KEYS):
        yield item.get(a), item.get(d)
    header = _header_of(item)
    for a, d in _HEADER_KEYS:
        yield header.get(a), header.get(d)


@runtime_checkable
class _Header(Protocol):
    """A FITS header or a dictionary."""

    def get(self, key: str, /) -> Any: ...


def _header_of(item: Mapping[str, Any]) -> _Header:
    header = item.get("header")
    return header if isinstance(header, _Header) else {}


def _wcs_of(item: Mapping[str, Any]) -> list[WCS]:
    from astropy.wcs import WCS  # a second that the entrance need not take

    candidates = (item.get(key) for key in _WCS_KEYS)
    return [wcs for wcs in candidates if isinstance(wcs, WCS) and wcs.has_celestial]


def _wcs_centre(wcs: WCS) -> tuple[float, float]:
    wcs = wcs.celestial
    if wcs.array_shape is None:
        return float(wcs.wcs.crval[0]), float(wcs.wcs.crval[1])
    return image_centre(wcs, wcs.array_shape)


def _orientation(item: Mapping[str, Any]) -> float:
    """Return the position angle of the frame's y axis, east of north, in degrees; NaN if unknown."""
    for wcs in _wcs_of(item):
        matrix = wcs.celestial.pixel_scale_matrix
        if np.isfinite(matrix).all() and matrix.any():
            return math.degrees(math.atan2(matrix[0, 1], matrix[1, 1]))
    for source in (item, _header_of(item)):
        for key in _ANGLE_KEYS:
            angle = _degrees(source.get(key), hours=False)
            if math.isfinite(angle):
                return angle
    return math.nan


def _field_side(items: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median of the shorter sides of the frames in degrees, None where no item tells it."""
    sides = []
    for item in items:
        for wcs in _wcs_of(item):
            wcs, header = wcs.celestial, _header_of(item)
            shape = wcs.array_shape or item.get("shape") or (header.get("NAXIS2"), header.get("NAXIS1"))
            lengths = [n for n in shape[:2] if isinstance(n, int | np.integer)]
            if len(lengths) == 2:
                sides.append(int(min(lengths)) * pixel_scale(wcs))
                break
    return float(np.median(sides)) if sides else None


def _stable_name(item: Mapping[str, Any]) -> str:
    return next((str(item[key]) for key in _NAME_KEYS if item.get(key)), "")
