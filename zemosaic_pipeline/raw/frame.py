"""Raw frames: subs of a colour or mono camera (or RGB images) whose rows come calibrated, repaired and debayered.

A frame is never held in full: its pixels are a row reader, which reads the sensor's rows from the file with a margin,
takes off dark and bias, divides by the flat, repairs hot pixels behind the colour filters, and debayers. Rows are the
same bit by bit however they are cut into strips. All is linear float32 in ADU: no stretch, no clipping, no rounding;
saturated pixels stay what they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_pipeline.arrays import page_array
from zemosaic_pipeline.fits.headers import frame_count
from zemosaic_pipeline.fits.rows import Pixels, RowReader
from zemosaic_pipeline.fits.tile import StoredImage, Tile, open_image
from zemosaic_pipeline.raw.calibration import Calibration, Correction
from zemosaic_pipeline.raw.header import Facts, read_facts, red_position, stored_pattern

_CHUNK_ROWS = 128
"""Rows that are worked on at once: they stay in the processor's cache."""
_LUMINANCE_ROWS = 256
_ROUNDING = 0.3
"""Standard deviation of rounding to integers."""


@dataclass(frozen=True, eq=False)
class _SensorRows:
    """Rows of a sensor, calibrated, repaired and debayered: float32 (3, rows, W), or (1, rows, W) without filters."""

    rows: RowReader
    shape: tuple[int, int]
    correction: Correction | None
    red: tuple[int, int] | None
    edge_aware: bool
    hot_pixel_sigma: float
    least_noise: float

    def read(self, y0: int, y1: int) -> np.ndarray:
        out = page_array((1 if self.red is None else 3, y1 - y0, self.shape[1]))
        work = _Workspace.of(min(_CHUNK_ROWS, y1 - y0), self.shape[1], len(out))
        for first in range(y0, y1, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, y1)
            out[:, first - y0 : last - y0] = self._chunk(first, last, work)
        return out

    def _chunk(self, y0: int, y1: int, work: _Workspace) -> np.ndarray:
        from zemosaic_pipeline.raw.cfa import MARGIN, debayer, pad_strip, repair

        height = self.shape[0]
        first = max(0, y0 - MARGIN)
        rows = self.rows.read(first, min(height, y1 + MARGIN))[0]
        if self.correction is not None:
            self.correction.apply(rows, first)
        strip, repaired, colours = work.arrays(y1 - y0)
        missing = pad_strip(rows, first, height, y0, strip)
        if self.hot_pixel_sigma > 0 or missing:
            repair(strip, np.float32(self.hot_pixel_sigma), np.float32(self.least_noise), repaired)
            strip = repaired
        if self.red is None:
            return strip[None, MARGIN:-MARGIN, MARGIN:-MARGIN]
        debayer(strip, (self.red[0] + y0) % 2, self.red[1], self.edge_aware, colours)
        return colours


@dataclass(frozen=True, eq=False)
class _Workspace:
    """Arrays for a chunk of rows, made once for all: the system fills new pages slower than the pixels are worked on.

    Debayered rows go through an array that stays in the cache, too, and are copied in one piece: written to three
    planes side by side, each line of the cache would first be fetched from memory, which takes four times as long.
    """

    strips: np.ndarray
    colours: np.ndarray
    width: int

    @classmethod
    def of(cls, rows: int, width: int, channels: int) -> _Workspace:
        from zemosaic_pipeline.raw.cfa import MARGIN

        strips = np.empty((2, rows + 2 * MARGIN, width + 2 * MARGIN), np.float32)
        return cls(strips, np.empty(3 * rows * width if channels == 3 else 0, np.float32), width)

    def arrays(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Padded strip, repaired padded strip, and planes (3, rows, W), for so many rows."""
        from zemosaic_pipeline.raw.cfa import MARGIN

        strip, repaired = self.strips[:, : rows + 2 * MARGIN]
        planes = self.colours[: 3 * rows * self.width]
        return strip, repaired, planes.reshape((3, rows, self.width) if planes.size else (3, 0, self.width))


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: what its header says; the pixels stay on disk.

    Attributes
    ----------
    name : str
        Path relative to the input folder, with forward slashes.
    path : Path
        The file.
    shape : tuple of int
        (H, W).
    channels : int
        3 (R, G, B), or 1.
    pixels : Pixels
        Row reader and mask, as in `Tile`.
    header : Header
        Of the image's HDU.
    wcs : WCS or None
        The header's celestial WCS where it works.
    exposure : float or None
        Seconds.
    ra, dec : float or None
        Pointing, degrees.
    scale : float or None
        Arcseconds per stored pixel, by the WCS, or by focal length and pixel size.
    mount : str or None
        'altaz' or 'eq'.
    date : str or None
        DATE-OBS, as written.
    n_frames : int
        Number of frames stacked into it; 1 for a sub.
    temperature : float or None
        Of the sensor, degrees Celsius.
    saturation : float or None
        The stored value that no pixel can exceed (ADU before calibration); None for floating point.
    """

    name: str
    path: Path
    shape: tuple[int, int]
    channels: int
    pixels: Pixels = field(repr=False)
    header: fits.Header = field(repr=False)
    wcs: WCS | None
    exposure: float | None
    ra: float | None
    dec: float | None
    scale: float | None
    mount: str | None
    date: str | None
    n_frames: int = 1
    temperature: float | None = None
    saturation: float | None = None
    zero_is_blank: bool = False

    def tile(self, wcs: WCS) -> Tile:
        """Make a tile of the frame with a WCS, which is copied and gets the frame's size."""
        wcs = copy.copy(wcs)
        wcs.pixel_shape = self.shape[::-1]
        return Tile(
            name=self.name,
            path=self.path,
            shape=self.shape,
            channels=self.channels,
            wcs=wcs,
            n_frames=self.n_frames,
            pixels=self.pixels,
            zero_is_blank=self.zero_is_blank,
            ceilings=() if self.saturation is None else (self.saturation,),
        )

    def luminance(self) -> np.ndarray:
        """Read the whole frame as the mean of its channels: float32 (H, W), NaN where there is no data.

        Raises
        ------
        UnusableFile
            The file can no longer be read.
        """
        tile = self.tile(WCS(naxis=2))
        height = self.shape[0]
        out = np.empty(self.shape, np.float32)
        for y0 in range(0, height, _LUMINANCE_ROWS):
            y1 = min(y0 + _LUMINANCE_ROWS, height)
            np.mean(tile.read_rows(y0, y1), axis=0, out=out[y0:y1])
        return out


def open_frame(path: Path | str, name: str, calibration: Calibration, scratch_dir: Path | str) -> Frame:
    """Open a FITS file as a frame; no pixel of the image is read.

    The image is the first HDU, plain or compressed, that is mono or RGB, as with `open_tile`; it needs no WCS. A mono
    image with a Bayer pattern becomes RGB; its masters, and the repair of hot pixels, also go to a single mono frame,
    not to what has colours or is a stack already.

    Parameters
    ----------
    path : Path or str
        The file; gzipped files are known by their content.
    name : str
        Name of the frame.
    calibration : Calibration
        Masters, and how to repair and debayer.
    scratch_dir : Path or str
        An existing folder into which gzipped files are unpacked.

    Raises
    ------
    UnusableFile
        The file cannot be used, and why.
    UsageError
        A master has another size than the frame.
    RunError
        The disk is full while a file is unpacked.
    """
    image = open_image(path, scratch_dir)
    channels, height, width = image.stored.shape
    facts = read_facts(image.header, image.primary, image.wcs)
    n_frames = frame_count(image.header, image.primary)
    pattern = None
    if channels == 1:
        uint16 = image.stored.dtype.kind == "i" and image.stored.dtype.itemsize == 2
        pattern = stored_pattern(
            image.header, image.primary, image.path, (height, width), uint16, calibration.bayer_pattern
        )
    pixels = image.pixels
    if pattern is not None or (channels == 1 and n_frames == 1):
        pixels = replace(pixels, image=_sensor_rows(image, name, pattern, facts, calibration))
    elif calibration.masters:
        calibration.notice("stacked", f"{name} is RGB or stacked: dark, flat and bias are not applied to such files.")
    return Frame(
        name=name,
        path=image.path,
        shape=(height, width),
        channels=channels if pattern is None else 3,
        pixels=pixels,
        header=image.header,
        wcs=image.wcs,
        exposure=facts.exposure,
        ra=facts.ra,
        dec=facts.dec,
        scale=facts.scale,
        mount=facts.mount,
        date=facts.date,
        n_frames=n_frames,
        temperature=facts.temperature,
        saturation=_saturation(image),
        zero_is_blank=image.zero_is_blank and pattern is None,
    )


def _sensor_rows(
    image: StoredImage, name: str, pattern: str | None, facts: Facts, calibration: Calibration
) -> _SensorRows:
    stored = image.stored
    return _SensorRows(
        rows=image.pixels.image,
        shape=stored.shape[1:],
        correction=calibration.correction(name, stored.shape[1:], facts),
        red=None if pattern is None else red_position(pattern),
        edge_aware=calibration.debayer_method == "edge_aware",
        hot_pixel_sigma=calibration.hot_pixel_sigma,
        least_noise=_ROUNDING * abs(stored.scale) if stored.dtype.kind in "iu" else 0.0,
    )


def _saturation(image: StoredImage) -> float | None:
    stored = image.stored
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return None
    return float(np.iinfo(stored.dtype).max) * stored.scale + stored.zero
