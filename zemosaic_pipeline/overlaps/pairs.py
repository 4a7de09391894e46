"""Pairs of tiles that overlap: their common cells, and what these say about the tiles' gains and levels.

Both tiles are means over the same coarse cells (:class:`CoarseTile`); `overlaps.errors_in_variables` fits one on the other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from zemosaic_pipeline.arrays import connected_groups
from zemosaic_pipeline.overlaps.errors_in_variables import MIN_CELLS, fit_overlap
from zemosaic_pipeline.overlaps.gradients import (
    TileCoordinates,
    polynomial_terms,
    smooth_difference,
    square_coordinates,
)
from zemosaic_pipeline.overlaps.overlap import SMOOTHED_VARIANCE, Overlap, in_units

#: Most cells of one pair that enter its fit.
MAX_CELLS = 3500
#: Fewest cells without saturated pixels that enter the fit alone: correlated as they are, fewer prove no structure.
ENOUGH_CELLS = 180


@dataclass(frozen=True)
class CoarseTile:
    """One tile on the common coarse grid.

    Attributes
    ----------
    name : str
    corner : (int, int)
        Row and column of ``means[:, 0, 0]`` on the coarse grid of the mosaic.
    means : ndarray
        float32 (C, h, w), tile units; NaN where the cell was not measured.
    fraction : ndarray
        float32 (h, w) in 0..1: the part of the cell that holds data.
    noise : ndarray
        float64 (C,), standard deviation of one cell's mean, tile units.
    pixel_noise : ndarray
        float64 (C,), standard deviation of one of the tile's pixels.
    sky : ndarray
        float64 (C,), the tile's own sky level: the pivot.
    coordinates : TileCoordinates, optional
        Where the cells lie on the tile; None: the cells are its pixels.
    scale : float
        Size of a pixel, in any unit: what tells the tiles of one camera.
    saturated : ndarray, optional
        bool (h, w): cells that a saturated pixel of the tile reaches.
    """

    name: str
    corner: tuple[int, int]
    means: np.ndarray
    fraction: np.ndarray
    noise: np.ndarray
    pixel_noise: np.ndarray
    sky: np.ndarray
    coordinates: TileCoordinates | None = None
    scale: float = 1.0
    saturated: np.ndarray | None = None

    def terms(self, rows: np.ndarray, columns: np.ndarray, order: int) -> np.ndarray:
        """Terms (M, n) of the tile's polynomial at cells (n,) of its own window, whole or broken numbers."""
        place = self.coordinates or square_coordinates(self.fraction.shape)
        u, v = place.at(rows, columns)
        return polynomial_terms(u, v, place.half, order)

    def sample_cells(self) -> np.ndarray:
        """Some cells (36, 2) spread over the tile's window, row and column on the mosaic's coarse grid."""
        at = [
            first + np.array([0.5, 2, 4, 6, 8, 9.5]) * n / 10
            for first, n in zip(self.corner, self.fraction.shape, strict=True)
        ]
        return np.stack(np.meshgrid(*at, indexing="ij"), axis=-1).reshape(-1, 2)

    def terms_within(self, cells: np.ndarray, order: int) -> np.ndarray:
        """Terms (n, M) of the polynomial at cells (n, 2) of the mosaic's coarse grid; 0 where the tile does not reach."""
        place = self.coordinates or square_coordinates(self.fraction.shape)
        rows, columns = (cells - np.array(self.corner)).T
        u, v = place.at(rows, columns)
        within = (np.abs(u) <= place.half[1]) & (np.abs(v) <= place.half[0])
        return np.where(within, polynomial_terms(u, v, place.half, order), 0.0).T


@dataclass(frozen=True)
class PairRelation:
    """What the overlap of tiles ``i`` and ``j`` says, per channel.

    ``log_ratio`` = ln(g_i / g_j), with its standard error (inf where the overlap has too little structure);
    ``stars`` is the effective number of stars that decide it and ``star_scatter`` the rms deviation of their log ratios,
    ``star_noise`` what of that noise explains;
    ``scatter`` is the robust scatter of the cells about the fit in units of what the pixel noise explains;
    ``samples`` the number of common cells. ``smooth_i`` and ``smooth_j`` (C, M) are what both tiles show of the modes of
    their overlap, less each tile's own sky, ``smooth_se`` (C,) the standard error of their difference in units of tile i,
    ``modes_i`` and ``modes_j`` (M, M) the modes of a tile's polynomial: see `overlaps.gradients`.
    ``step_before`` is the difference of the sky of the tiles as they came, in units of one tile's pixel noise.
    """

    i: int
    j: int
    log_ratio: np.ndarray
    log_ratio_se: np.ndarray
    stars: np.ndarray
    star_scatter: np.ndarray
    star_noise: np.ndarray
    scatter: np.ndarray
    samples: int
    smooth_i: np.ndarray
    smooth_j: np.ndarray
    smooth_se: np.ndarray
    modes_i: np.ndarray
    modes_j: np.ndarray
    step_before: np.ndarray


# ---------------------------------------------------------------------------------------------------- common cells


def overlap_windows(a: CoarseTile, b: CoarseTile) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Slices of the common cells in ``a`` and in ``b``; None where their rectangles do not meet."""
    slices = []
    for axis in (0, 1):
        low = max(a.corner[axis], b.corner[axis])
        high = min(a.corner[axis] + a.fraction.shape[axis], b.corner[axis] + b.fraction.shape[axis])
        if low >= high:
            return None
        slices.append([slice(low - t.corner[axis], high - t.corner[axis]) for t in (a, b)])
    return (slices[0][0], slices[1][0]), (slices[0][1], slices[1][1])


def common_cells(
    a: CoarseTile, b: CoarseTile, fraction: float = 0.9
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Means of both tiles (C, h, w) over their common rectangle and the mask (h, w) of cells that both fill.

    None where there are fewer than :data:`MIN_CELLS`.
    """
    windows = overlap_windows(a, b)
    if windows is None:
        return None
    (ya, xa), (yb, xb) = windows
    both = (a.fraction[ya, xa] >= fraction) & (b.fraction[yb, xb] >= fraction)
    if np.count_nonzero(both) < MIN_CELLS:
        return None
    return a.means[:, ya, xa], b.means[:, yb, xb], both


def measure_pairs(tiles: Sequence[CoarseTile], order: int = 2) -> list[PairRelation]:
    """Relations of the overlapping pairs, in the order of the tiles; ``order`` of the gradients that they may have."""
    found = (pair_relation(tiles, i, j, order) for i, j in overlapping_pairs(tiles))
    return [relation for relation in found if relation is not None]


class PairsInPassing:
    """Measures each pair as soon as both tiles are there, on a thread of its own, while others are being measured.

    A context manager; :meth:`add` may be called from many threads, in any order. With ``hubs``, tiles of one field need
    not all be compared with one another: only pairs that hold a hub are measured. ``order`` is that of the gradients
    that the tiles may have.
    """

    def __init__(self, count: int, hubs: Sequence[int] = (), order: int = 2) -> None:
        self._count, self._order = count, order
        self._tiles: dict[int, CoarseTile] = {}
        self._hubs = set(hubs) or set(range(count))
        self._pending: dict[tuple[int, int], Future] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pairs")

    def __enter__(self) -> PairsInPassing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, k: int, tile: CoarseTile) -> None:
        """Tile ``k`` is measured."""
        with self._lock:
            self._tiles[k] = tile
            for j in self._tiles:
                if j != k and (j in self._hubs or k in self._hubs):
                    self._measure(min(j, k), max(j, k))

    def _measure(self, i: int, j: int) -> None:
        if (i, j) not in self._pending and overlap_windows(self._tiles[i], self._tiles[j]) is not None:
            self._pending[i, j] = self._pool.submit(pair_relation, self._tiles, i, j, self._order)

    def relations(self) -> list[PairRelation]:
        """What `measure_pairs` gives for all tiles, which must be there, or for the pairs that hold a hub.

        All pairs are measured where those with a hub fall apart into more groups than they form together.
        """
        if len(self._hubs) < self._count:
            everything = overlapping_pairs([self._tiles[k] for k in range(self._count)])
            apart, together = (connected_groups(self._count, p).max() for p in (list(self._pending), everything))
            if apart > together:
                for pair in everything:
                    self._measure(*pair)
        found = (self._pending[pair].result() for pair in sorted(self._pending))
        return [relation for relation in found if relation is not None]


def overlapping_pairs(tiles: Sequence[CoarseTile]) -> list[tuple[int, int]]:
    """All pairs of tiles whose rectangles meet."""
    boxes = np.array([[*t.corner, t.corner[0] + t.fraction.shape[0], t.corner[1] + t.fraction.shape[1]] for t in tiles])
    pairs: list[tuple[int, int]] = []
    for i in range(len(tiles)):
        meets = ((boxes[i + 1 :, :2] < boxes[i, 2:]) & (boxes[i + 1 :, 2:] > boxes[i, :2])).all(axis=1)
        pairs += [(i, int(j)) for j in i + 1 + np.flatnonzero(meets)]
    return pairs


def pair_relation(
    tiles: Sequence[CoarseTile] | Mapping[int, CoarseTile], i: int, j: int, order: int = 2
) -> PairRelation | None:
    """Measure the overlap of two tiles, whose gradients are of an order; None where they have no common cells."""
    a, b = tiles[i], tiles[j]
    common = common_cells(a, b)
    if common is None:
        return None
    means_a, means_b, both = common
    overlap = make_overlap(a, b, means_a, means_b, both)
    fit = fit_overlap(overlap, order)
    smooth = smooth_difference(overlap, fit, *terms_of_both(a, b, overlap, order))
    return PairRelation(
        i,
        j,
        log_ratio=-np.log(fit.ratio),
        log_ratio_se=fit.error,
        stars=fit.stars,
        star_scatter=fit.star_scatter,
        star_noise=fit.star_noise,
        scatter=fit.scatter,
        samples=int(np.count_nonzero(both)),
        smooth_i=smooth.x,
        smooth_j=smooth.y,
        smooth_se=smooth.error,
        modes_i=smooth.modes_x,
        modes_j=smooth.modes_y,
        step_before=in_units(
            smooth.x[:, 0] + a.sky - smooth.y[:, 0] - b.sky,
            np.sqrt((np.square(a.pixel_noise) + np.square(b.pixel_noise)) / 2),
        ),
    )


def make_overlap(a: CoarseTile, b: CoarseTile, means_a: np.ndarray, means_b: np.ndarray, both: np.ndarray) -> Overlap:
    """Smooth both tiles alike, so that no star is cut by a cell's edge.

    The kernel is normalised by the common mask: at the edge of the overlap it is cut for both alike.
    """
    empty = None if both.all() else ~both
    norm = 1.0 / np.maximum(binomial_sums(both[None], np.zeros(1), None), 1.0)
    images = [binomial_sums(m, t.sky, empty) * norm for m, t in ((means_a, a), (means_b, b))]
    unclipped = without_saturated(a, b, both)
    down, across = thinning(unclipped)
    used = unclipped[::down, ::across]
    rows, columns = np.nonzero(used)
    rows, columns = rows * down, columns * across
    cells = rows * both.shape[1] + columns
    x, y = (image.reshape(len(image), -1).take(cells, axis=1) for image in images)
    vx, vy = (smoothed_variance(t, image) for t, image in zip((a, b), images, strict=True))
    return Overlap(images[0], images[1], x, y, used, (down, across), vx, vy)


def smoothed_variance(tile: CoarseTile, image: np.ndarray) -> np.ndarray:
    """Variance (C,) of the noise of a smoothed cell of an image (C, h, w): at least that of rounding the cells' means.

    Where the noise is said to be 0 (a constant channel), rounding would pass for structure.
    """
    rounding = np.finfo(np.float32).eps * (np.abs(image).max(axis=(1, 2)) + np.abs(tile.sky))
    return np.maximum(np.square(tile.noise) * SMOOTHED_VARIANCE, np.maximum(np.square(rounding), 1e-30))


def terms_of_both(a: CoarseTile, b: CoarseTile, overlap: Overlap, order: int) -> list[np.ndarray]:
    """Terms (M, n) of both tiles' polynomials at the cells that enter the fit."""
    windows = overlap_windows(a, b)
    assert windows is not None
    rows, columns = np.nonzero(overlap.used)
    rows, columns = rows * overlap.step[0], columns * overlap.step[1]
    return [t.terms(rows + y.start, columns + x.start, order) for t, (y, x) in zip((a, b), windows, strict=True)]


def without_saturated(a: CoarseTile, b: CoarseTile, both: np.ndarray) -> np.ndarray:
    """The common cells (h, w) where neither tile is saturated; all of them where too few would remain."""
    windows = overlap_windows(a, b)
    if windows is None:
        return both
    unclipped = both
    for tile, window in zip((a, b), windows, strict=True):
        if tile.saturated is not None:
            unclipped = unclipped & ~tile.saturated[window]
    return unclipped if np.count_nonzero(unclipped) >= ENOUGH_CELLS else both


def thinning(both: np.ndarray) -> tuple[int, int]:
    """Of how many rows and columns one is used, so that at most about :data:`MAX_CELLS` of the common cells are."""
    thin = -(-int(np.count_nonzero(both)) // MAX_CELLS)
    across = int(np.sqrt(thin))
    down = -(-thin // across)
    return (down, across) if np.count_nonzero(both[::down, ::across]) >= MIN_CELLS else (1, 1)


def binomial_sums(image: np.ndarray, sky: np.ndarray, empty: np.ndarray | None) -> np.ndarray:
    """(1 2 1) along both axes over an image (C, h, w) less its sky, zero where ``empty`` (h, w) and beyond the edge."""
    smooth = np.empty(image.shape)
    padded = np.zeros((image.shape[1] + 2, image.shape[2] + 2))
    inner = padded[1:-1, 1:-1]
    for c, plane in enumerate(image):
        np.subtract(plane, sky[c], out=inner)
        if empty is not None:
            np.copyto(inner, 0.0, where=empty)
        rows = padded[:-1] + padded[1:]
        rows = rows[:-1] + rows[1:]
        columns = rows[:, :-1] + rows[:, 1:]
        np.add(columns[:, :-1], columns[:, 1:], out=smooth[c])
    return smooth
