"""Where the pixels of a tile come from: readers of rows, from files and from memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.arrays import page_array
from zemosaic_pipeline.fits.headers import Stored, hdu_at, one_line


class RowReader(Protocol):
    """Where pixels come from: rows as float32 (C, rows, W), 'no data' as NaN or infinity."""

    def read(self, y0: int, y1: int) -> np.ndarray: ...


def _convert(raw: np.ndarray, stored: Stored, out: np.ndarray) -> None:
    """Scale stored values into float32 `out` of the same shape; through float64 where float32 rounds."""
    scale, zero = stored.scale, stored.zero
    exact_shift = scale == 1 and zero.is_integer() and abs(zero) <= 2**23
    small_int = raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2
    with np.errstate(over="ignore", invalid="ignore"):
        if (scale == 1 and zero == 0) or (small_int and exact_shift):
            np.copyto(out, raw, casting="same_kind")
            if zero:
                out += np.float32(zero)
        else:
            np.copyto(out, raw.astype(np.float64) * scale + zero, casting="same_kind")
    if stored.blank is not None:
        out[raw == stored.blank] = np.nan


@dataclass(frozen=True)
class PlainImage:
    """The rows of an uncompressed image, read straight from the file."""

    path: Path
    offset: int
    stored: Stored

    def read(self, y0: int, y1: int) -> np.ndarray:
        channels, height, width = self.stored.shape
        rows = y1 - y0
        out = page_array((channels, rows, width))
        with self.path.open("rb") as stream:
            if self.stored.interleaved:
                raw = np.empty((rows, width, channels), self.stored.dtype)
                self._fill(stream, y0 * width * channels, raw)
                _convert(np.moveaxis(raw, 2, 0), self.stored, out)
                return out
            for c in range(channels):
                self._read_plane(stream, (c * height + y0) * width, out[c])
        return out

    def _read_plane(self, stream: BufferedReader, first: int, out: np.ndarray) -> None:
        stored = self.stored
        if stored.dtype == np.dtype(">f4") and stored.scale == 1 and stored.zero == 0:
            self._fill(stream, first, out)  # no second array for the most common case
            if sys.byteorder == "little":
                out.byteswap(inplace=True)
            return
        raw = np.empty(out.shape, stored.dtype)
        self._fill(stream, first, raw)
        _convert(raw, stored, out)

    def _fill(self, stream: BufferedReader, first: int, array: np.ndarray) -> None:
        stream.seek(self.offset + first * self.stored.dtype.itemsize)
        if stream.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise OSError("it became shorter while it was in use")


@dataclass(frozen=True)
class CompressedImage:
    """The rows of a tile-compressed image: only the compression tiles that they touch are decoded."""

    path: Path
    index: int
    stored: Stored

    def read(self, y0: int, y1: int) -> np.ndarray:
        pick = {"c": slice(None), "y": slice(y0, y1), "x": slice(None), "-": 0}
        try:
            with fits.open(self.path, memmap=False, do_not_scale_image_data=True) as hdul:
                raw = hdu_at(hdul, self.index).section[tuple(pick[axis] for axis in self.stored.axes)]
        except MemoryError:
            raise
        except Exception as error:  # the decoder has errors of many kinds for a broken file
            raise OSError(one_line(error)) from error
        if self.stored.interleaved:
            raw = np.moveaxis(raw, 2, 0)
        out = np.empty((self.stored.shape[0], y1 - y0, self.stored.shape[2]), np.float32)
        _convert(np.reshape(raw, out.shape), self.stored, out)
        return out


@dataclass(frozen=True)
class ArrayRows:
    """Rows of an array in memory, (C, H, W)."""

    data: np.ndarray

    def read(self, y0: int, y1: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.data[:, y0:y1].astype(np.float32)


@dataclass(frozen=True)
class Window:
    """A rectangle of another image."""

    rows: RowReader
    y0: int
    columns: slice

    def read(self, y0: int, y1: int) -> np.ndarray:
        return np.ascontiguousarray(self.rows.read(y0 + self.y0, y1 + self.y0)[..., self.columns])


@dataclass(frozen=True)
class Pixels:
    """Image and mask of a tile; the mask's weight is its value divided by `alpha_full`."""

    image: RowReader
    alpha: RowReader | None = None
    alpha_full: float = 1.0
