"""The picture of a mosaic: gathered block by block, stretched for the eye, saved as PNG.

Nothing here goes back into the science: `stretch` moves each channel's background and scale to the same grey and then
applies one function to all of them.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zemosaic_pipeline.arrays import median_of_sorted, page_array
from zemosaic_pipeline.files import atomic_path, not_written

_PATCH = 4  # side in pixels of the small squares from which levels and noise are measured
_PATCHES = 16384  # about so many of them, spread evenly: a quarter of a million pixels per channel
_SKY = (0.02, 0.2)  # the sky lies in the patches between these quantiles of brightness
_KNEE = 12.0  # with this asinh_a, the stretch turns from linear to logarithmic at the level of the background
_MIN_DEPTH = 4.0  # the black point is at least so many times the noise below the background
_MIN_RANGE = 40.0  # white lies at least so many times the background's height above black
_STRIPS = 16  # pieces of a picture that are compressed side by side
_TABLE = 1 << 18  # entries of the look-up table: a step is far below one grey level where the curve is steepest


class PreviewAccumulator:
    """Bins the blocks of a mosaic into a small picture; the mosaic itself is never held.

    A preview pixel is the mean of the mosaic's pixels with data in its square of ``factor`` x ``factor``. Its bits
    depend neither on how the mosaic is cut into blocks nor on their order: a square is summed as a whole, and the
    pixels of one that lies in several blocks wait in a strip of ``factor`` rows until the strip is complete. Memory is
    bounded by `max_dim`, whatever the mosaic: 4 bytes x C x max_dim**2, and the strips between the blocks under way.

    Parameters
    ----------
    shape : tuple of int
        (H, W) of the mosaic, each at least 1.
    channels : int
        Channels C of the mosaic, at least 1.
    max_dim : int
        The longest side that the picture may have, in pixels.

    Attributes
    ----------
    factor : int
        Pixels of the mosaic per pixel of the picture, along each axis.

    Raises
    ------
    ValueError
        A size is below 1.
    """

    def __init__(self, shape: tuple[int, int], channels: int, max_dim: int = 3200) -> None:
        if min(*shape, channels, max_dim) < 1:
            raise ValueError(f"a preview of {channels} x {shape} within {max_dim} pixels cannot be made")
        self.shape = (int(shape[0]), int(shape[1]))
        self.factor = math.ceil(max(self.shape) / max_dim)
        size = (channels, *(math.ceil(n / self.factor) for n in self.shape))
        self._means = page_array(size)
        self._means.fill(np.nan)
        self._missing = np.full(size[1], self.factor * self.shape[1], np.int64)  # pixels of each strip not yet given
        self._missing[-1] = (self.shape[0] - self.factor * (size[1] - 1)) * self.shape[1]
        self._strips: dict[int, _Strip] = {}
        self._lock = threading.Lock()

    def add(self, y0: int, x0: int, block: np.ndarray) -> None:
        """Add one block of the mosaic; blocks may come in any order and from several threads.

        Parameters
        ----------
        y0, x0 : int
            Row and column of the block's first pixel in the mosaic.
        block : ndarray, float32, (C, h, w)
            Pixels; NaN where there is no data. Every pixel of the mosaic is given at most once.

        Raises
        ------
        ValueError
            The block has other channels than the mosaic, or reaches beyond it.
        """
        channels, h, w = block.shape
        if channels != len(self._means) or min(y0, x0) < 0 or y0 + h > self.shape[0] or x0 + w > self.shape[1]:
            raise ValueError(f"a block of {block.shape} at {(y0, x0)} does not fit a mosaic of {self.shape}")
        if h == 0 or w == 0:
            return
        f = self.factor
        rows, columns = _whole_bins(y0, h, self.shape[0], f), _whole_bins(x0, w, self.shape[1], f)
        if rows and columns:
            self._fill(block, rows.start * f - y0, columns.start * f - x0, rows, columns)
        for number in range(y0 // f, (y0 + h - 1) // f + 1):
            low, high = max(number * f, y0), min((number + 1) * f, y0 + h)
            inside = columns if rows and rows.start <= number < rows.stop else None
            self._take(number, low, x0, block[:, low - y0 : high - y0], inside)

    def _take(self, number: int, y0: int, x0: int, rows: np.ndarray, summed: slice | None) -> None:
        """Rows of a block that lie in one strip, of which the squares ``summed`` are done already."""
        f, width = self.factor, rows.shape[2]
        spans = [(x0, x0 + width)]
        if summed is not None:
            spans = [(x0, summed.start * f), (summed.stop * f, x0 + width)]
        with self._lock:  # blocks that are neighbours share strips
            self._missing[number] -= rows.shape[1] * width
            for a, b in spans:
                if a < b:
                    strip = self._strip(number)
                    top = y0 - number * f
                    strip.pixels[:, top : top + rows.shape[1], a:b] = rows[:, :, a - x0 : b - x0]
                    strip.mine[a // f : (b - 1) // f + 1] = True
            if not self._missing[number] and number in self._strips:
                self._fill_from_strip(number, self._strips.pop(number))

    def _strip(self, number: int) -> _Strip:
        if number not in self._strips:
            channels, _, width = self._means.shape
            rows = min(self.factor, self.shape[0] - number * self.factor)
            pixels = np.full((channels, rows, self.shape[1]), np.nan, np.float32)
            self._strips[number] = _Strip(pixels, np.zeros(width, bool))
        return self._strips[number]

    def _fill_from_strip(self, number: int, strip: _Strip) -> None:
        self._fill(strip.pixels, 0, 0, slice(number, number + 1), slice(0, len(strip.mine)), strip.mine)

    def _fill(
        self, block: np.ndarray, y: int, x: int, rows: slice, columns: slice, wanted: np.ndarray | None = None
    ) -> None:
        """Fill squares of the picture with the means of a block's pixels, of which the first square starts at y, x."""
        from zemosaic_pipeline.pixels.cpu_loops import means_of_squares

        if wanted is None:
            wanted = np.ones(columns.stop - columns.start, bool)
        pixels = np.ascontiguousarray(block, np.float32)
        place = rows.start, columns.start, rows.stop - rows.start
        means_of_squares(pixels, y, x, self.factor, wanted, self._means, *place)

    def image(self) -> np.ndarray:
        """Return the picture so far, float32 (C, h, w), NaN where nothing was seen; row 0 is the mosaic's row 0.

        It is the accumulator's own memory, to be looked at: blocks that come later show in it.
        """
        with self._lock:
            for number, strip in self._strips.items():  # squares of which only a part was given
                self._fill_from_strip(number, strip)
        return self._means


@dataclass
class _Strip:
    """One row of squares: pixels (C, rows, W), NaN where none came, and the squares (w,) that lie in several blocks."""

    pixels: np.ndarray
    mine: np.ndarray


def _whole_bins(start: int, length: int, size: int, factor: int) -> slice | None:
    """Bins that lie wholly within ``length`` pixels from ``start``; the last one may be cut by the mosaic's edge."""
    end = start + length
    first, last = -(-start // factor), (-(-end // factor) if end == size else end // factor)
    return slice(first, last) if first < last else None


# ---------------------------------------------------------------------------------------------------- stretch


@dataclass(frozen=True)
class _Levels:
    """How pixel values map to the stretch: ``x = (value - black) / unit``, 0 is black, 1 the background."""

    black: np.ndarray  # (C,) float64
    unit: np.ndarray  # (C,) float64, the background's height above black
    white: float  # x that becomes white


def stretch(image: np.ndarray, p_low: float = 1.0, p_high: float = 99.9, asinh_a: float = 12.0) -> np.ndarray:
    """Make a picture that is worth looking at out of linear pixels.

    Each channel's background is brought to the same level and its noise to the same scale, so that the background
    is grey. Then one function serves all channels, ``asinh(k x) / asinh(k x_white)``, where x is the height above
    black in units of the background's, and ``k = asinh_a / 12``: near the background it is linear, above it
    logarithmic, so that faint nebulae are seen and bright stars keep their colour.

    Parameters
    ----------
    image : ndarray, float, (H, W) or (C, H, W)
        Pixels on any linear scale, C 1 or 3; NaN and infinities are no data.
    p_low : float
        Percentile of the pixels at which black lies, 0 to 100; black never comes closer to the background than four
        times the noise.
    p_high : float
        Percentile of the pixels (of each one's brightest channel) at which white lies, above `p_low`, to 100.
    asinh_a : float
        Strength of the stretch, above 0: the more, the brighter the faint.

    Returns
    -------
    ndarray, uint8, (H, W) for one channel or (H, W, 3)
        The picture; 0 where there is no data. Row 0 is the image's row 0.

    Raises
    ------
    ValueError
        The image has another number of channels, or a parameter is out of its range.
    """
    planes = image[None] if image.ndim == 2 else image
    planes = planes if planes.dtype.kind == "f" else planes.astype(np.float32)
    if planes.ndim != 3 or len(planes) not in (1, 3):
        raise ValueError(f"an image of shape {image.shape} cannot be shown; it must have 1 or 3 channels")
    if not 0 <= p_low < p_high <= 100 or not 0 < asinh_a < math.inf:
        raise ValueError("p_low < p_high must lie within 0 to 100, and asinh_a above 0")
    out = np.zeros((*planes.shape[1:], len(planes)), np.uint8)
    levels = _measure(planes, p_low, p_high)
    if levels is not None:
        _apply(planes, levels, _table(levels.white, asinh_a / _KNEE), out)
    return out[..., 0] if len(planes) == 1 else out


def _table(white: float, k: float) -> np.ndarray:
    """Tabulate the stretch from black (entry 0) to white (last entry), uint8."""
    x = np.linspace(0, k * white, _TABLE)
    return np.round(np.arcsinh(x) * (255 / math.asinh(k * white))).astype(np.uint8)


def _apply(planes: np.ndarray, levels: _Levels, table: np.ndarray, out: np.ndarray) -> None:
    """Look every pixel up in the table, some rows at a time so that the work stays in the cache."""
    last = np.float32(len(table) - 1)
    rows = max(1, 65536 // max(planes.shape[2], 1))
    for channel, plane in enumerate(planes):
        black = plane.dtype.type(levels.black[channel])
        steps = plane.dtype.type(last / (levels.unit[channel] * levels.white))
        for y in range(0, len(plane), rows):
            strip = plane[y : y + rows]
            with np.errstate(over="ignore", invalid="ignore"):  # an absurd pixel is white, and inf is no data
                x = np.clip((strip - black) * steps, 0, last)
            x[~np.isfinite(strip)] = 0
            out[y : y + rows, :, channel] = table[x.astype(np.int32)]


def _sample(planes: np.ndarray) -> np.ndarray:
    """Take small squares spread evenly over the image, float64 (C, n, k, k); those without gaps where there are any."""
    _, h, w = planes.shape
    k = min(_PATCH, h, w)
    step = max(k, round(math.sqrt(h * w / _PATCHES))) if k else 1
    for size, stride in ((k, step), (1, 1)):
        ny, nx = h // stride, w // stride
        grid = planes[:, : ny * stride, : nx * stride].reshape(len(planes), ny, stride, nx, stride)
        patches = grid[:, :, :size, :, :size].swapaxes(2, 3).reshape(len(planes), ny * nx, size, size)
        whole = patches[:, np.isfinite(patches).all(axis=(0, 2, 3))]
        if whole.shape[1] >= 64:
            break
    return whole.astype(np.float64)


def _measure(planes: np.ndarray, p_low: float, p_high: float) -> _Levels | None:
    """Find black, background and white; None where the image holds no data."""
    sample = _sample(planes)
    if not sample.size:
        return None
    scale = _noise(sample)[:, None]
    # so few numbers are sorted many times faster than numpy finds their median
    medians = median_of_sorted(np.sort(sample.reshape(*sample.shape[:2], -1), axis=-1)) / scale
    brightness = medians.sum(axis=0)
    low, high = np.quantile(brightness, _SKY)
    sky = np.median(medians[:, (brightness >= low) & (brightness <= high)], axis=1)[:, None]
    heights = sample.reshape(len(sample), -1) / scale - sky  # noise 1 and background 0 in every channel
    depth = max(-float(np.percentile(heights.min(axis=0), p_low)), _MIN_DEPTH)
    top = float(np.percentile(heights.max(axis=0), p_high))
    return _Levels(((sky - depth) * scale)[:, 0], (depth * scale)[:, 0], max(top / depth + 1, _MIN_RANGE))


def _noise(sample: np.ndarray) -> np.ndarray:
    """Estimate each channel's noise, (C,), from differences of neighbours, which nebulae and gradients hardly touch."""
    flat = sample.reshape(len(sample), -1)
    pairs = np.diff(sample, axis=-1) if sample.shape[-1] > 1 else np.diff(sample, axis=1)
    noise = np.zeros(len(sample))
    if pairs.size:
        noise = np.median(np.abs(pairs).reshape(len(sample), -1), axis=1) / (0.6745 * math.sqrt(2))
    if (noise > 0).all():
        return noise
    spread = np.ptp(np.percentile(flat, (16, 84), axis=1), axis=0) / 2
    noise = np.where(noise > 0, noise, spread)
    noise = np.where(noise > 0, noise, np.ptp(flat, axis=1) / 1000)
    return np.where(noise > 0, noise, noise.max() if noise.max() > 0 else 1)


def save_png(image_u8: np.ndarray, path: Path | str) -> None:
    """Save a picture, complete or not at all, the right way up.

    Parameters
    ----------
    image_u8 : ndarray, uint8, (H, W) or (H, W, 3)
        The picture; its first row is the lowest, as in FITS, and becomes the last of the PNG.
    path : Path or str
        The file; its folder must exist.

    Raises
    ------
    RunError
        The file cannot be written.
    """
    try:
        with atomic_path(path) as part:
            part.write_bytes(_png(np.ascontiguousarray(image_u8[::-1])))
    except OSError as error:
        raise not_written(path, error) from error


def _png(image: np.ndarray) -> bytes:
    """PNG file of a picture, uint8 (H, W) or (H, W, 3), its first row on top (ISO/IEC 15948).

    Every row is stored as its difference to the one above; the strips are compressed on all cores, without the search
    for the best of five filters that takes longer than the mosaic's own pixels.
    """
    height = len(image)
    lines = image.reshape(height, -1)
    filtered = np.empty((height, lines.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # filter type Up
    filtered[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    step = -(-height // _STRIPS)
    with ThreadPoolExecutor() as pool:
        strips = pool.map(_deflate, (filtered[y : y + step] for y in range(0, height, step)))
        data = b"".join([b"\x78\x01", *strips, b"\x03\x00", struct.pack(">I", zlib.adler32(filtered.data))])
    colour = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", image.shape[1], height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _deflate(lines: np.ndarray) -> bytes:
    """A run of whole deflate blocks that another may follow."""
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return coder.compress(lines.data) + coder.flush(zlib.Z_FULL_FLUSH)
