"""Pixels of tiles, read when they are needed, kept as far as the memory budget goes."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from zemosaic_photometry import Normalisation, apply_photometric_normalization
from zemosaic_pipeline.fits.tile import Tile

#: A plain file is read so many times in one pass rather than kept in memory.
MOST_READINGS = 4.0


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
            return _normalised(tile.read_rows(y0, y1), normalisation, y0, tile.shape[0])
        with self._lock:
            gate = self._reading.setdefault(id(tile.pixels), threading.Lock())
        with gate:
            data = self._find(tile, normalisation)
            if data is None:
                raw = self._take(tile) if normalisation else None
                crowded = self._size + size > self._budget
                if raw is None and crowded and (y1 - y0) * 2 < tile.shape[0]:
                    return _normalised(tile.read_rows(y0, y1), normalisation, y0, tile.shape[0])
                raw = tile.read_rows(0, tile.shape[0]) if raw is None else raw
                data = _normalised(raw, normalisation, 0, tile.shape[0])
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


def _normalised(data: np.ndarray, normalisation: Normalisation | None, first_row: int, height: int) -> np.ndarray:
    """The pixels of some rows of a tile, which are nobody else's any more, normalised in place."""
    if normalisation is None:
        return data
    return apply_photometric_normalization(data, *normalisation, out=data, first_row=first_row, height=height)
