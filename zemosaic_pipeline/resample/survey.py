"""What the pixels of a tile are like: where it has data, its noise, where it is saturated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from zemosaic_pipeline.arrays import median_of_sorted
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.saturation import BAND, BrightestPixels, column_maxima

#: Side in tile pixels of the cells of a weight map.
WEIGHT_CELL = BAND
#: Side in tile pixels of the cells whose means tell the noise of smoothed pixels.
NOISE_CELL = 4
#: Rows read at a time by a survey.
SURVEY_ROWS = 512


@dataclass(frozen=True)
class TileSurvey:
    """What the pixels of a tile are like.

    ``valid`` is bool (h, w) on cells of :data:`WEIGHT_CELL` tile pixels: the cell holds data. ``noise`` is float64
    (C,), the standard deviation of a pixel, or, of pixels that debayering or resampling has smoothed, of independent
    ones whose means over cells would be as noisy; ``pixels`` the number of pixels with data; ``spread`` is the
    difference of the highest and the lowest value. ``saturated`` is bool like ``valid``: a pixel of the cell is
    saturated in some channel (`resample.saturation`).
    """

    valid: np.ndarray
    noise: np.ndarray
    pixels: int
    spread: float
    saturated: np.ndarray


def survey_tile(tile: Tile, store: PixelStore) -> TileSurvey:
    """Read a tile once, in strips, and see what its pixels are like."""
    height = tile.shape[0]
    strips = (store.rows(tile, y0, min(y0 + SURVEY_ROWS, height)) for y0 in range(0, height, SURVEY_ROWS))
    return survey_strips(strips, tile.shape, tile.channels, tile.ceilings)


def survey_pixels(data: np.ndarray, ceilings: Sequence[float] = ()) -> TileSurvey:
    """What pixels in memory, (C, H, W), are like; ``ceilings`` as in `Tile`."""
    strips = (data[:, y0 : y0 + SURVEY_ROWS] for y0 in range(0, data.shape[1], SURVEY_ROWS))
    return survey_strips(strips, data.shape[1:], len(data), ceilings)


def survey_strips(
    strips: Iterable[np.ndarray], shape: tuple[int, int], channels: int, ceilings: Sequence[float] = ()
) -> TileSurvey:
    """What the strips of :data:`SURVEY_ROWS` rows each are like together, from the first row on."""
    height, width = shape
    rows, columns = -(-height // WEIGHT_CELL), -(-width // WEIGHT_CELL)
    valid = np.zeros((rows, columns), bool)
    differences: list[np.ndarray] = []
    coarse: list[np.ndarray] = []
    bright = [BrightestPixels(width, ceilings) for _ in range(channels)]
    pixels, low, high = 0, np.inf, -np.inf
    for number, strip in enumerate(strips):
        y0 = number * SURVEY_ROWS
        good = np.isfinite(strip[0])
        count = int(np.count_nonzero(good))
        pixels += count
        if not count:
            continue
        low = min(low, float(np.fmin.reduce(strip, axis=None)))
        tops = column_maxima(strip)
        high = max(high, float(np.fmax.reduce(tops, axis=None)))
        for channel, plane in zip(bright, tops, strict=True):
            channel.add(plane, y0 // BAND)
        cells = valid[y0 // WEIGHT_CELL : -(-(y0 + good.shape[0]) // WEIGHT_CELL)]
        cells[:] = True if count == good.size else cells_with(good)  # most strips are full
        differences.append(curvature(strip[:, :: max(height // 128, 1)]))
        coarse.append(NOISE_CELL * curvature(cells_of_bands(strip)))
    spread = float(high - low) if pixels else 0.0
    noise = noise_of(differences, channels, spread)
    # what debayering or resampling has smoothed hides its noise from the differences of neighbours
    hidden = noise_of(coarse, channels, spread)
    if valid.all():  # one value instead of a map, which thousands of frames share
        valid = np.broadcast_to(np.True_, valid.shape)
    noise = np.where(hidden > 1.25 * noise, hidden, noise)
    return TileSurvey(valid, noise, pixels, spread, saturated_map(bright, valid.shape))


def cells_with(good: np.ndarray) -> np.ndarray:
    """Cells of :data:`WEIGHT_CELL` pixels, bool (h, w), that hold one of the pixels ``good`` (H, W)."""
    edges = [np.arange(0, length, WEIGHT_CELL) for length in good.shape]
    return np.logical_or.reduceat(np.logical_or.reduceat(good, edges[0], axis=0), edges[1], axis=1)


def saturated_map(bright: Sequence[BrightestPixels], shape: tuple[int, int]) -> np.ndarray:
    """Cells of :data:`WEIGHT_CELL` pixels, bool ``shape``, that hold a saturated pixel of some channel."""
    cells = np.zeros(shape, bool)
    for channel in bright:
        bands, columns = channel.saturated()
        cells[bands, columns // WEIGHT_CELL] = True
    return cells if cells.any() else np.broadcast_to(np.False_, shape)


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
    total = reduce(np.add, [columns[..., k::NOISE_CELL] for k in range(NOISE_CELL)])
    return total / np.float32(NOISE_CELL**2)


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
