"""Rectangles, arrays on pages of their own, the median of sorted numbers, groups of what pairs connect."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

#: Arrays of at least so many bytes get pages of their own.
PAGED_BYTES = 4 << 20
#: Bytes of a large page of memory, on most systems.
LARGE_PAGE = 2 << 20


def median_of_sorted(ordered: np.ndarray) -> np.ndarray:
    """Median along the last axis of ascending numbers, of which there is at least one."""
    count = ordered.shape[-1]
    return ordered[..., (count - 1) // 2 : count // 2 + 1].mean(axis=-1)


def connected_groups(count: int, pairs: ArrayLike) -> np.ndarray:
    """Number (count,) of the group of each node that the pairs connect, in the order of their first nodes.

    As fast as `scipy.sparse.csgraph.connected_components` up to some 20 000 nodes, and without its import, which takes
    longer than all the groups of a run.
    """
    i, j = np.asarray(pairs, int).reshape(-1, 2).T
    label = np.arange(count)
    while True:
        low = np.minimum(label[i], label[j])
        lower = label.copy()
        np.minimum.at(lower, label[i], low)
        np.minimum.at(lower, label[j], low)
        lower = lower[lower]
        if np.array_equal(lower, label):
            return np.unique(label, return_inverse=True)[1]
        label = lower


# ---------------------------------------------------------------------------------------------- large arrays


def page_array(shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of zeros, float32, on memory pages of its own, which go back to the system when it is freed.

    The C library keeps freed arrays of some megabytes for itself and cuts them up: tiles that come and go on many threads
    would take twice their memory. Small arrays come from numpy.
    """
    count = math.prod(shape)
    if 4 * count < PAGED_BYTES:
        return np.zeros(shape, np.float32)
    # whole large pages: the system would fill a rest with hundreds of small ones, one by one
    size = -(-4 * count // LARGE_PAGE) * LARGE_PAGE
    if hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32, count).reshape(shape)


Rect = tuple[int, int, int, int]


def make_radial_weight_map(
    height: int,
    width: int,
    feather_fraction: float = 0.8,
    shape_power: float = 2.0,
    min_weight_floor: float = 0.05,
    progress_callback: Callable[..., object] | None = None,
) -> np.ndarray:
    """Make a map of weights that falls from the centre of an image to its corners.

    ``w = cos(pi/2 * min(r / R, 1)) ** shape_power``, where r is the distance from the image's centre and R is
    `feather_fraction` times the distance of a corner; nowhere below `min_weight_floor`.

    Parameters
    ----------
    height, width : int
        Size in pixels, at least 1.
    feather_fraction : float
        Where the fall-off ends, as a fraction of the half diagonal, above 0.
    shape_power : float
        Steepness of the fall-off, above 0.
    min_weight_floor : float
        Smallest weight, 0 to 1. With 0, pixels beyond R have weight 0, that is, no data.
    progress_callback : callable, optional
        Accepted for the callers' sake; the map is made at once and there is no progress to tell.

    Returns
    -------
    ndarray, float32, (height, width)
        Weights from 0 to 1; 1 at the centre.

    Raises
    ------
    ValueError
        A size or a parameter is out of its range.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a weight map of {height} x {width} pixels cannot be made")
    if not feather_fraction > 0 or not shape_power > 0 or not 0 <= min_weight_floor <= 1:
        raise ValueError("feather_fraction and shape_power must be above 0, min_weight_floor from 0 to 1")
    y = np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    reach = np.float32(max(feather_fraction * math.hypot(height / 2, width / 2), 1e-6))
    radius = np.minimum(np.hypot(y[:, None], x[None, :]) / reach, np.float32(1))
    # the float32 next to pi/2 lies beyond it: its cosine is negative, and a power of that no number
    weight = np.maximum(np.cos(radius * np.float32(np.pi / 2)), np.float32(0)) ** np.float32(shape_power)
    centre = weight.max()  # with an even size the centre lies between the pixels
    if centre == 0:  # of two or four pixels, each lies beyond R
        return np.ones((height, width), np.float32)
    return np.clip(weight / centre, min_weight_floor, 1).astype(np.float32, copy=False)
