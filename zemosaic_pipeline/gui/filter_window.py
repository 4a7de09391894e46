"""What ZeMosaic's filter window looks up by name; works on its dictionaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zemosaic_pipeline.phases.clustering import (
    _UNKNOWN_FIELD,
    _by_position,
    _chord,
    _split_to_cap,
    _unit_vectors,
    group_frames,
)

Progress = Callable[..., object] | None


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
    groups = group_frames(
        places[:, 0],
        places[:, 1],
        threshold_deg=threshold,
        orientation_deg=[_orientation(item) for item in items],
        orientation_split_deg=max(float(orientation_split_threshold_deg or 0), 0.0),
        field_deg=_field_side(items) or _UNKNOWN_FIELD * threshold,
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
        xyz = _unit_vectors(*np.transpose([place or (0.0, 0.0) for place in places]))
        side = _field_side(ordered) or 1.0
        same_place = _chord(180.0 if None in places else side / 10)
        parts = _split_to_cap(np.arange(len(ordered)), xyz, int(cap), int(min_cap or 0), same_place)
        result += [[ordered[k] for k in part] for part in _by_position(parts, xyz)]
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
    places = [place for place in map(_as_place, coords) if place is not None]
    if len(places) < 2:
        return 0.0
    xyz = np.unique(_unit_vectors(*np.transpose(places)), axis=0)
    best = 0.0
    for start in range(0, len(xyz), 1000):
        cosines = xyz[start : start + 1000] @ xyz.T
        i, j = np.unravel_index(np.argmin(cosines), cosines.shape)
        a, b = xyz[start + i], xyz[j]
        best = max(best, math.degrees(math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b))))
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
    try:
        return float(getattr(value, "value", value))
    except (TypeError, ValueError):
        pass
    from astropy.coordinates import Angle

    try:
        return float(Angle(str(value), unit="hourangle" if hours else "deg").deg)
    except ValueError:
        return math.nan


def _position(item: Mapping[str, Any]) -> tuple[float, float] | None:
    found = next((p for key in _PLACE_KEYS if (p := _as_place(item.get(key))) is not None), None)
    if found is None:
        found = next((p for wcs in _wcs_of(item) if (p := _as_place(_wcs_centre(wcs))) is not None), None)
    sources = [(item, (*_RA_DEC_KEYS, *_HEADER_KEYS))]
    if _header_of(item) is not None:
        sources.append((_header_of(item), _HEADER_KEYS))
    for source, keys in sources:
        for a, d in keys:
            if found is None and source.get(a) is not None and source.get(d) is not None:
                found = _as_place((source[a], source[d]))
    return found


def _header_of(item: Mapping[str, Any]) -> Any:
    header = item.get("header")
    return header if hasattr(header, "get") else None


def _wcs_of(item: Mapping[str, Any]) -> list[Any]:
    candidates = (item.get(key) for key in _WCS_KEYS)
    return [wcs for wcs in candidates if getattr(wcs, "has_celestial", False) and hasattr(wcs, "wcs")]


def _wcs_centre(wcs: Any) -> tuple[float, float]:
    wcs = wcs.celestial
    shape = wcs.array_shape
    if shape is None:
        return float(wcs.wcs.crval[0]), float(wcs.wcs.crval[1])
    ra, dec = wcs.all_pix2world((shape[1] - 1) / 2, (shape[0] - 1) / 2, 0)
    return float(ra), float(dec)


def _orientation(item: Mapping[str, Any]) -> float:
    """Return the position angle of the frame's y axis, east of north, in degrees; NaN if unknown."""
    for wcs in _wcs_of(item):
        matrix = wcs.celestial.pixel_scale_matrix
        if np.isfinite(matrix).all() and matrix.any():
            return math.degrees(math.atan2(matrix[0, 1], matrix[1, 1]))
    for source in (item, _header_of(item) or {}):
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
            wcs, header = wcs.celestial, _header_of(item) or {}
            shape = wcs.array_shape or item.get("shape") or (header.get("NAXIS2"), header.get("NAXIS1"))
            if len(shape) >= 2 and all(isinstance(n, int | np.integer) for n in shape[:2]):
                sides.append(min(shape[:2]) * math.sqrt(abs(np.linalg.det(wcs.pixel_scale_matrix))))
                break
    return float(np.median(sides)) if sides else None


def _stable_name(item: Mapping[str, Any]) -> str:
    return next((str(item[key]) for key in _NAME_KEYS if item.get(key)), "")
