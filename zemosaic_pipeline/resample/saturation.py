"""Which pixels of a tile are saturated: a clipped star says nothing of a gain.

Where the ceiling lies is seen in passing, strip by strip, for each channel by itself: white balance and debayering
raise the channels to different heights. Clipped stars pile up at one value in many places; what the header says counts
where the data reach it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zemosaic_pipeline.arrays import connected_groups

#: Rows of a band: the height of the cells of a survey.
BAND = 8
#: A pixel at or above this part of its channel's ceiling is saturated.
SATURATED = 0.97
#: Pixels at or above this part of the maximum may have piled up there.
PILED_UP = 0.99
#: A pile-up has at least so many, in at least so many places: 38 to 208 places in clipped panels, one in others.
LEAST, LEAST_PLACES = 5, 3
#: Where more than this part of a strip is so bright, it is the sky, which no ceiling cuts.
CROWDED = 1 / 4


class BrightestPixels:
    """The brightest pixels of one channel, collected strip by strip, and the ceiling that they tell.

    It sees the maxima of the columns in bands of rows: what is needed to name the cells as high as a band that are
    saturated, at an eighth of the cost of a look at every pixel.

    Parameters
    ----------
    width : int
        Of the image, in pixels.
    known : sequence of float
        Ceilings that the header names. One that lies beyond the data, or in the midst of them, has no effect.
    """

    def __init__(self, width: int, known: Sequence[float] = ()) -> None:
        self._width = width
        self._known = sorted(value for value in known if value > 0)
        self._top = self._crowded = -np.inf
        self._spots = np.empty(0, np.int64)  # band * width + column
        self._values = np.empty(0, np.float32)

    @property
    def _limit(self) -> float:
        """Least brightness that may turn out to be saturated, by what was seen so far."""
        return SATURATED * min([self._top, *self._known[:1]])

    def add(self, tops: np.ndarray, first: int) -> None:
        """See the maxima ``tops`` (bands, W) of the columns from the band ``first`` on; NaN where there is no data."""
        highest = float(np.fmax.reduce(tops, axis=None))
        if highest > self._top:
            self._top = highest
            bright = self._values >= self._limit
            self._spots, self._values = self._spots[bright], self._values[bright]
        tops = tops.reshape(-1)
        while True:
            bright = tops >= self._limit
            if np.count_nonzero(bright) <= CROWDED * tops.size:
                break
            if not self._known or self._known[0] > self._top:
                self._crowded = max(self._crowded, highest)
                return
            self._known.pop(0)  # in other units, or the sky itself reaches it
        spots = np.flatnonzero(bright)
        self._spots = np.append(self._spots, first * self._width + spots)
        self._values = np.append(self._values, tops[spots])

    def ceiling(self) -> float | None:
        """The value that clips the brightest pixels, after the last strip; None where nothing was clipped."""
        found = [value for value in self._known if SATURATED * value <= self._top]
        if self._piled_up():
            found.append(self._top)
        lowest = min(found, default=None)
        return None if lowest is None or SATURATED * lowest <= self._crowded else lowest

    def _piled_up(self) -> bool:
        """Whether the brightest lie in several places, and are more than those a little fainter.

        Of stars that are not clipped, of the summits of nebulae and of the noise, the brighter are the fewer.
        """
        near = self._values >= PILED_UP * self._top
        fainter = ~near & (self._values >= SATURATED * self._top)
        count = np.count_nonzero(near)
        if self._top <= 0 or count < LEAST or count <= np.count_nonzero(fainter):
            return False
        bands, columns = np.divmod(self._spots[near], self._width)
        return places(bands, columns // BAND) >= LEAST_PLACES

    def saturated(self) -> tuple[np.ndarray, np.ndarray]:
        """Bands and columns of saturated pixels, after the last strip."""
        ceiling = self.ceiling()
        bright = self._values >= (np.inf if ceiling is None else SATURATED * ceiling)
        bands, columns = np.divmod(self._spots[bright], self._width)
        return bands, columns


def column_maxima(strip: np.ndarray) -> np.ndarray:
    """Maxima (C, bands, W) of the columns of a strip (C, rows, W) in bands of :data:`BAND` rows; NaN for no data."""
    channels, rows, width = strip.shape
    whole = rows // BAND * BAND
    tops = np.fmax.reduce(strip[:, :whole].reshape(channels, -1, BAND, width), axis=2)
    if whole == rows:
        return tops
    return np.concatenate([tops, np.fmax.reduce(strip[:, whole:], axis=1, keepdims=True)], axis=1)


def places(rows: np.ndarray, columns: np.ndarray) -> int:
    """In how many places these cells lie: those that touch, be it at a corner, are in one."""
    marked = np.zeros((rows.max() + 3, columns.max() + 3), bool)
    marked[rows + 1, columns + 1] = True
    y, x = np.nonzero(marked)
    count = len(y)
    number = np.full(marked.shape, -1)
    number[y, x] = np.arange(count)
    others = np.concatenate([number[y + dy, x + dx] for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1))])
    pairs = np.stack([np.tile(np.arange(count), 4), others], axis=1)[others >= 0]
    return int(connected_groups(count, pairs).max()) + 1
