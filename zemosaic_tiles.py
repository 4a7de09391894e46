"""Tiles on their way through Phase 5: where they lie on the output, what their pixels are like, and their pixels.

The pixels stay on disk; :class:`PixelStore` reads them when a block needs them and keeps what the memory budget allows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from zemosaic_fits import Tile
from zemosaic_grid import CoordinateMesh, OutputGrid, coordinate_mesh
from zemosaic_photometry import Normalisation, apply_photometric_normalization
from zemosaic_utils import median_of_sorted

Rect = tuple[int, int, int, int]

#: Side in tile pixels of the cells of a weight map.
WEIGHT_CELL = 8
#: Side in tile pixels of the cells whose means tell the noise of smoothed pixels.
NOISE_CELL = 4
#: Rows read at a time by a survey.
SURVEY_ROWS = 512
#: A plain file is read so many times in one pass rather than kept in memory.
MOST_READINGS = 4.0
#: A weight map or alpha plane that says nothing.
NO_MAP = np.ones((1, 1), np.float32)


@dataclass(frozen=True, eq=False)
class PlacedTile:
    """A tile with its place on the output grid and its weights.

    ``weight`` multiplies all its pixels; ``feather`` is the width in tile pixels of the ramp at its edge;
    ``weight_map`` is float32 (h, w) on cells of :data:`WEIGHT_CELL` pixels, or 1 x 1 for none.
    """

    tile: Tile
    mesh: CoordinateMesh
    weight: float = 1.0
    feather: float = 0.0
    weight_map: np.ndarray = None  # type: ignore[assignment]

    @property
    def rect(self) -> tuple[int, int, int, int]:
        """Output rectangle (y0, y1, x0, x1) that the tile can touch."""
        return self.mesh.rect

    def map(self) -> np.ndarray:
        return NO_MAP if self.weight_map is None else self.weight_map


@dataclass(frozen=True)
class TileSurvey:
    """What the pixels of a tile are like.

    ``valid`` is bool (h, w) on cells of :data:`WEIGHT_CELL` tile pixels: the cell holds data. ``noise`` is float64
    (C,), the standard deviation of a pixel, or, of pixels that debayering or resampling has smoothed, of independent ones
    whose means over cells would be as noisy; ``pixels`` the number of pixels with data; ``spread`` is the difference of the highest and the lowest value.
    """

    valid: np.ndarray
    noise: np.ndarray
    pixels: int
    spread: float


class PixelStore:
    """Rows of tiles as float32 (C, rows, W), whole tiles kept in memory while the budget lasts.

    Of a plain file the system keeps what its memory allows; it is read again, which costs no more than the pages that a
    second copy would need, unless a pass would read it more than :data:`MOST_READINGS` times.

    Safe to use from many threads; the least recently used tile goes first. Tiles with the same reader of pixels (a frame
    with one WCS and with another) are one.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._kept: OrderedDict[tuple, tuple[Tile, np.ndarray]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._reading: dict[int, threading.Lock] = {}

    def rows(
        self, tile: Tile, y0: int, y1: int, normalisation: Normalisation | None = None, readings: float = 1.0
    ) -> np.ndarray:
        """Rows ``y0:y1`` of a tile, as they are or normalised; a view (not to be written) where the tile is kept.

        ``readings`` is how often the pass that needs them would read the tile as a whole, piece by piece.
        """
        size = 4 * tile.channels * tile.shape[0] * tile.shape[1]
        if size > self._budget // 2 or (tile.plain and readings <= MOST_READINGS):
            return _normalised(tile.read_rows(y0, y1), normalisation)
        with self._lock:
            gate = self._reading.setdefault(id(tile.pixels), threading.Lock())
        with gate:
            data = self._find(tile, normalisation)
            if data is None:
                raw = self._take(tile) if normalisation else None
                crowded = self._size + size > self._budget
                if raw is None and crowded and (y1 - y0) * 2 < tile.shape[0]:
                    return _normalised(tile.read_rows(y0, y1), normalisation)
                raw = tile.read_rows(0, tile.shape[0]) if raw is None else raw
                data = _normalised(raw, normalisation)
                self._keep(tile, normalisation, data)
            return data[:, y0:y1]

    def offer(self, tile: Tile, data: np.ndarray) -> None:
        """Keep pixels (C, H, W) of a whole tile that somebody has read already, where the budget allows."""
        if data.nbytes <= self._budget // 2:
            self._keep(tile, None, data)

    def _find(self, tile: Tile, normalisation: Normalisation | None) -> np.ndarray | None:
        with self._lock:
            key = (id(tile.pixels), normalisation)
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][1]

    def _take(self, tile: Tile) -> np.ndarray | None:
        """The tile's pixels as they are, which are not needed again once they are normalised."""
        with self._lock:
            entry = self._kept.pop((id(tile.pixels), None), None)
            if entry is None:
                return None
            self._size -= entry[1].nbytes
            return entry[1]

    def _keep(self, tile: Tile, normalisation: Normalisation | None, data: np.ndarray) -> None:
        with self._lock:
            self._kept[id(tile.pixels), normalisation] = (tile, data)
            self._size += data.nbytes
            while self._size > self._budget and len(self._kept) > 1:
                _, (_, old) = self._kept.popitem(last=False)
                self._size -= old.nbytes


def _normalised(data: np.ndarray, normalisation: Normalisation | None) -> np.ndarray:
    """The pixels, which are nobody else's any more, normalised in place."""
    if normalisation is None:
        return data
    return apply_photometric_normalization(data, *normalisation, out=data)


def readings(item: PlacedTile, piece: Rect, rows: tuple[int, int]) -> float:
    """How often a tile is read as a whole by a pass in pieces of the output like this one, which needs those rows."""
    y0, y1, x0, x1 = item.rect
    pieces = max((y1 - y0) / (piece[1] - piece[0]), 1.0) * max((x1 - x0) / (piece[3] - piece[2]), 1.0)
    return pieces * (rows[1] - rows[0]) / item.tile.shape[0]


def place_tiles(tiles: Sequence[Tile], grid: OutputGrid) -> list[PlacedTile | None]:
    """Certified coordinate mesh of every tile; None for tiles that lie outside the output.

    Call it from one thread: astropy's WCS objects are not safe to share.
    """
    placed = []
    for tile in tiles:
        mesh = coordinate_mesh(tile, grid)
        placed.append(None if mesh is None else PlacedTile(tile, mesh))
    return placed


def survey_tile(tile: Tile, store: PixelStore) -> TileSurvey:
    """Read a tile once, in strips, and see what its pixels are like."""
    height = tile.shape[0]
    strips = (store.rows(tile, y0, min(y0 + SURVEY_ROWS, height)) for y0 in range(0, height, SURVEY_ROWS))
    return survey_strips(strips, tile.shape, tile.channels)


def survey_pixels(data: np.ndarray) -> TileSurvey:
    """What pixels in memory, (C, H, W), are like."""
    strips = (data[:, y0 : y0 + SURVEY_ROWS] for y0 in range(0, data.shape[1], SURVEY_ROWS))
    return survey_strips(strips, data.shape[1:], len(data))


def survey_strips(strips: Iterable[np.ndarray], shape: tuple[int, int], channels: int) -> TileSurvey:
    """What the strips of :data:`SURVEY_ROWS` rows each are like together, from the first row on."""
    height, width = shape
    rows, columns = -(-height // WEIGHT_CELL), -(-width // WEIGHT_CELL)
    valid = np.zeros((rows, columns), bool)
    differences: list[np.ndarray] = []
    coarse: list[np.ndarray] = []
    pixels, low, high = 0, np.inf, -np.inf
    for number, strip in enumerate(strips):
        y0 = number * SURVEY_ROWS
        good = np.isfinite(strip[0])
        count = int(np.count_nonzero(good))
        pixels += count
        if not count:
            continue
        low = min(low, float(np.fmin.reduce(strip, axis=None)))
        high = max(high, float(np.fmax.reduce(strip, axis=None)))
        cells = valid[y0 // WEIGHT_CELL : -(-(y0 + good.shape[0]) // WEIGHT_CELL)]
        if count == good.size:  # as most strips are
            cells[:] = True
        else:
            edges = np.arange(0, good.shape[0], WEIGHT_CELL), np.arange(0, width, WEIGHT_CELL)
            cells[:] = np.logical_or.reduceat(np.logical_or.reduceat(good, edges[0], axis=0), edges[1], axis=1)
        differences.append(curvature(strip[:, :: max(height // 128, 1)]))
        coarse.append(NOISE_CELL * curvature(cells_of_bands(strip)))
    spread = float(high - low) if pixels else 0.0
    noise = noise_of(differences, channels, spread)
    # what debayering or resampling has smoothed hides its noise from the differences of neighbours
    hidden = noise_of(coarse, channels, spread)
    if valid.all():  # one value instead of a map, which thousands of frames share
        valid = np.broadcast_to(np.True_, valid.shape)
    return TileSurvey(valid, np.where(hidden > 1.25 * noise, hidden, noise), pixels, spread)


def curvature(image: np.ndarray) -> np.ndarray:
    """Differences (C, n) of an image (C, h, w) and the mean of its left and right neighbours."""
    out = image[..., :-2] + image[..., 2:]
    out *= -0.5  # in place: each new array is hundreds of pages that the system clears
    out += image[..., 1:-1]
    return out.reshape(len(image), -1)


def cells_of_bands(strip: np.ndarray) -> np.ndarray:
    """Means (C, bands, w) over cells of :data:`NOISE_CELL` pixels squared, in one band of rows of every 32."""
    channels, height, width = strip.shape
    tops = range(0, height - NOISE_CELL + 1, 32)
    across = width // NOISE_CELL
    bands = [strip[:, y : y + NOISE_CELL, : across * NOISE_CELL] for y in tops]
    if not bands or not across:
        return np.empty((channels, 0, across), np.float32)
    # rows first, then columns: sums along whole rows are many times faster than sums of four numbers
    columns = np.stack([band.sum(axis=1) for band in bands], axis=1)
    return sum(columns[..., k::NOISE_CELL] for k in range(NOISE_CELL)) / np.float32(NOISE_CELL**2)


def noise_of(differences: Sequence[np.ndarray], channels: int, spread: float) -> np.ndarray:
    """Noise of a pixel, float64 (C,), from the differences of pixels and their neighbours' means.

    Where most of them are 0 (whole numbers coarser than the noise, a rounded or a synthetic image), the noise is that
    of the rounding; it is 0 only where the tile is constant, since the solver divides by it.
    """
    if not differences:
        return np.zeros(channels)
    sizes = np.concatenate(differences, axis=1)
    np.abs(sizes, out=sizes)
    sizes.sort(axis=1)  # which numpy does faster than it finds a median
    return np.array([_noise_of_sizes(line[: np.searchsorted(line, np.inf)], spread) for line in sizes])


def _noise_of_sizes(sizes: np.ndarray, spread: float) -> float:
    """Noise of a pixel from the sizes of differences, in order."""
    median = float(median_of_sorted(sizes)) if len(sizes) else 0.0
    if median > 0:
        return 1.4826 * median / np.sqrt(1.5)  # variance of the difference: (1 + 1/4 + 1/4) sigma^2
    # the smallest difference is half a step of q, and the rounding's noise q / sqrt(12)
    positive = sizes[np.searchsorted(sizes, 0, side="right") :]
    return max(float(positive[0]) / np.sqrt(3) if len(positive) else 0.0, 1e-6 * spread)


def weighted(
    placed: PlacedTile,
    survey: TileSurvey | None,
    weight: float,
    feather: float,
    radial: np.ndarray | None = None,
) -> PlacedTile:
    """The tile with its weight, its feather, and a weight map where its data do not reach its edge.

    The edge of the array is feathered exactly by the pixel functions; the map does the same for an edge of the data
    within the array. Holes smaller than a cell get no feather.
    """
    weight_map = None
    if survey is not None and feather > 0 and not survey.valid.all():
        from scipy.ndimage import distance_transform_edt

        padded = np.pad(survey.valid, 1, constant_values=True)
        distance = distance_transform_edt(padded)[1:-1, 1:-1] * WEIGHT_CELL
        # half a cell less: the edge of the data lies somewhere within the outermost cell
        weight_map = np.clip((distance - WEIGHT_CELL) / feather, 0.0, 1.0).astype(np.float32)
        weight_map = np.where(survey.valid, np.maximum(weight_map, 0.02), 0.0).astype(np.float32)
    if radial is not None:
        weight_map = radial if weight_map is None else weight_map * radial
    return replace(placed, weight=weight, feather=feather, weight_map=weight_map)
