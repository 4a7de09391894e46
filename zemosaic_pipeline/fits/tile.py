"""Tiles: panels in FITS files, whose pixels stay on disk until they are needed.

`open_tile` reads header and WCS only; `Tile.read_rows` reads pixels, on any thread, with a file handle of its
own and without memory mapping.

One contract for "no data": NaN in pixels and weight 0 in the mask, in all channels of a pixel together.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_pipeline.errors import RunError, UnusableFile
from zemosaic_pipeline.files import is_disk_full
from zemosaic_pipeline.fits.headers import (
    ImageHDU,
    Stored,
    ceilings_of,
    celestial_wcs,
    first_bytes,
    frame_count,
    has_pixels,
    hdu_at,
    how_stored,
    looks_stacked,
    open_fits,
    quiet,
    wcs_header,
)
from zemosaic_pipeline.fits.rows import ArrayRows, CompressedImage, Pixels, PlainImage, RowReader, Window


def _mask_rows(rows: np.ndarray, alpha: np.ndarray | None, zero_is_blank: bool) -> np.ndarray:
    """Set a pixel to NaN in all channels where one channel is not finite or the mask is 0, in place.

    Where ``zero_is_blank``, so are runs of three and more pixels of a row that are exactly 0 in all channels; a single
    one may be a dark sky that was clipped.
    """
    good = np.isfinite(rows[0])
    for channel in rows[1:]:
        good &= np.isfinite(channel)
    if zero_is_blank:
        zero = rows[0] == 0
        if zero.any():
            for channel in rows[1:]:
                zero &= channel == 0
            good &= ~_runs(zero)
    if alpha is not None:
        good &= alpha > 0
    if not good.all():
        rows[:, ~good] = np.nan
    return rows


def _runs(zero: np.ndarray) -> np.ndarray:
    """The pixels (rows, W) that belong to a run of three and more in their row, the image's edge counting as one."""
    padded = np.pad(zero, ((0, 0), (1, 1)), constant_values=True)
    middle = np.pad(padded[:, :-2] & zero & padded[:, 2:], ((0, 0), (1, 1)))
    return zero & (middle[:, :-2] | middle[:, 1:-1] | middle[:, 2:])


# ------------------------------------------------------------------------------------------------------ tiles


@dataclass(frozen=True, eq=False)
class Tile:
    """One panel: what its header says; the pixels stay on disk.

    Attributes
    ----------
    name : str
        Path relative to the input folder, with forward slashes.
    path : Path or None
        The file; None for an array in memory.
    shape : tuple of int
        (H, W).
    channels : int
        1 or 3.
    wcs : WCS
        Two-dimensional, celestial, longitude first; SIP, TPV and any projection kept; ``pixel_shape`` is set.
    n_frames : int
        Number of frames that were stacked into it (MT_NFRAMES, NCOMBINE or STACKCNT), else 1.
    raw_sub : bool
        It is a raw frame of a colour sensor (mono with BAYERPAT), not a stacked panel.
    zero_is_blank : bool
        Runs of pixels that are exactly 0 in all channels hold no data: RGB and floating-point files without ALPHA,
        whose borders many stackers fill with 0.
    ceilings : tuple of float
        What clips the brightest pixels, by the header (see `ceilings_of`).
    """

    name: str
    path: Path | None
    shape: tuple[int, int]
    channels: int
    wcs: WCS
    n_frames: int
    pixels: Pixels = field(repr=False)
    raw_sub: bool = False
    zero_is_blank: bool = False
    ceilings: tuple[float, ...] = ()

    @property
    def plain(self) -> bool:
        """Its pixels lie uncompressed in a file: reading them again costs little more than copying them."""
        image = self.pixels.image
        return isinstance(image.rows if isinstance(image, Window) else image, PlainImage)

    def read_rows(self, y0: int, y1: int) -> np.ndarray:
        """Read rows `y0` to `y1` (excluded) of all channels; safe on any number of threads.

        Returns
        -------
        ndarray, float32, (C, y1 - y0, W)
            In native byte order, the caller's own; NaN in all channels where there is no data.

        Raises
        ------
        UnusableFile
            The file can no longer be read.
        ValueError
            The rows lie outside the tile.
        """
        rows = self._read(self.pixels.image, self.channels, y0, y1)
        return _mask_rows(rows, self.read_alpha_rows(y0, y1), self.zero_is_blank)

    def read_alpha_rows(self, y0: int, y1: int) -> np.ndarray | None:
        """Read rows of the mask: float32 (y1 - y0, W), 0 = no data, 1 = fully weighted; None without a mask.

        Weights of `array_tile` come as they were given. Raises like `read_rows`.
        """
        if self.pixels.alpha is None:
            return None
        alpha = self._read(self.pixels.alpha, 1, y0, y1)[0]
        alpha[~np.isfinite(alpha) | (alpha < 0)] = 0
        if self.path is not None:
            alpha /= np.float32(self.pixels.alpha_full)
            np.minimum(alpha, 1, out=alpha)
        return alpha

    def _read(self, source: RowReader, channels: int, y0: int, y1: int) -> np.ndarray:
        if not 0 <= y0 <= y1 <= self.shape[0]:
            raise ValueError(f"rows {y0} to {y1} lie outside {self.name}, which has {self.shape[0]}")
        if y0 == y1:
            return np.empty((channels, 0, self.shape[1]), np.float32)
        try:
            return source.read(y0, y1)
        except OSError as error:
            raise UnusableFile(self.path or self.name, f"has pixels that cannot be read ({error})") from error


def array_tile(
    data: np.ndarray, wcs: WCS, name: str = "array", weights: np.ndarray | None = None, n_frames: int = 1
) -> Tile:
    """Make a tile of an array in memory, which is not copied.

    Parameters
    ----------
    data : ndarray, (C, H, W) or (H, W)
        Any real dtype; NaN or infinity is no data.
    wcs : WCS
        Celestial, two-dimensional.
    name : str
        For messages.
    weights : ndarray, (H, W), optional
        Weight of every pixel, not below 0; served as the tile's mask, unchanged.
    n_frames : int
        Number of frames that were stacked into it.

    Raises
    ------
    ValueError
        The shapes do not fit.
    """
    data = np.asarray(data)
    cube = data[None] if data.ndim == 2 else data
    if cube.ndim != 3 or 0 in cube.shape:
        raise ValueError(f"a tile is an array (C, H, W) or (H, W), not {data.shape}")
    alpha = None
    if weights is not None:
        if np.shape(weights) != cube.shape[1:]:
            raise ValueError(f"weights of shape {np.shape(weights)} do not fit a tile of {cube.shape[1:]}")
        alpha = ArrayRows(np.asarray(weights)[None])
    pixels = Pixels(ArrayRows(cube), alpha)
    return Tile(name, None, (cube.shape[1], cube.shape[2]), cube.shape[0], wcs, int(n_frames), pixels)


# ---------------------------------------------------------------------------------------------- opening files


def cropped(tile: Tile, percent: float) -> Tile:
    """The tile without ``percent`` of its height and width on each side; its WCS moves along."""
    height, width = tile.shape
    y, x = int(height * percent / 100), int(width * percent / 100)
    if not (y or x):
        return tile
    columns = slice(x, width - x)
    pixels = replace(
        tile.pixels,
        image=Window(tile.pixels.image, y, columns),
        alpha=None if tile.pixels.alpha is None else Window(tile.pixels.alpha, y, columns),
    )
    wcs = tile.wcs[y : height - y, columns]
    return replace(tile, shape=(height - 2 * y, width - 2 * x), wcs=wcs, pixels=pixels)


def open_tile(path: Path | str, name: str | None = None, scratch_dir: Path | str | None = None) -> Tile:
    """Open a FITS file as a tile; no pixel of the image is read.

    The image is the first HDU, plain or compressed, that is mono or RGB, (H, W), (3, H, W) or (H, W, 3), and
    has a celestial WCS (or is in an extension, with the WCS in the primary header). An extension named ALPHA
    is the mask: full weight is 1, or 255, or its maximum, the smallest of these that no value exceeds.

    Parameters
    ----------
    path : Path or str
        The file; gzipped files are known by their content.
    name : str, optional
        Name of the tile; default the file's.
    scratch_dir : Path or str, optional
        An existing folder into which gzipped files are unpacked; the caller removes it when the tiles are no
        longer needed. Default: the system's temporary folder.

    Raises
    ------
    UnusableFile
        The file cannot be used, and why.
    RunError
        The disk is full while a file is unpacked.
    """
    image = open_image(path, scratch_dir, wcs_required=True)
    channels, height, width = image.stored.shape
    stacked = looks_stacked(image.header) and looks_stacked(image.primary)
    return Tile(
        name=image.path.name if name is None else name,
        path=image.path,
        shape=(height, width),
        channels=channels,
        wcs=image.wcs,
        n_frames=frame_count(image.header, image.primary),
        pixels=image.pixels,
        zero_is_blank=image.zero_is_blank,
        raw_sub=not stacked and channels == 1,
        ceilings=ceilings_of(image.stored, image.header, image.primary),
    )


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image in a FITS file; its pixels stay on disk.

    Attributes
    ----------
    path : Path
        The file.
    header, primary : Header
        Of the image's HDU, and of the first one (which may be the same).
    stored : Stored
        Shape (C, H, W) and how the pixels are stored.
    wcs : WCS or None
        As in `Tile`; None where there is none that works.
    zero_is_blank : bool
        As in `Tile`.
    """

    path: Path
    header: fits.Header
    primary: fits.Header
    stored: Stored
    wcs: WCS | None
    pixels: Pixels = field(repr=False)
    zero_is_blank: bool = False


def open_image(path: Path | str, scratch_dir: Path | str | None = None, wcs_required: bool = False) -> StoredImage:
    """Open the first usable image of a FITS file; no pixel is read.

    Parameters and errors are those of `open_tile`; unless ``wcs_required``, a missing or broken WCS is no error.
    """
    path = Path(path)
    plain = _plain_file(path, scratch_dir)
    try:
        with quiet(), open_fits(plain, path) as hdul:
            return _image_of(hdul, path, plain, wcs_required)
    except UnusableFile:
        if plain != path:
            plain.unlink(missing_ok=True)
        raise


def _plain_file(path: Path, scratch_dir: Path | str | None) -> Path:
    """Return a file that starts like FITS: `path`, or what was unpacked from it into `scratch_dir`."""
    plain = path
    try:
        if first_bytes(path)[:2] == b"\x1f\x8b":
            plain = _gunzip(path, scratch_dir)
        first = first_bytes(plain)
    except OSError as error:
        raise UnusableFile(path, f"cannot be opened ({error.strerror or error})") from error
    if first[:6] != b"SIMPLE":
        if plain != path:
            plain.unlink()
        raise UnusableFile(path, "is not a FITS file" if first else "is empty")
    return plain


def _gunzip(path: Path, scratch_dir: Path | str | None) -> Path:
    """Unpack `path` in chunks into a new file of `scratch_dir`."""
    with tempfile.NamedTemporaryFile(dir=scratch_dir, suffix=".fits", delete=False) as target:
        plain = Path(target.name)
        try:
            with gzip.open(path) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            return plain
        except BaseException as error:
            target.close()  # Windows removes no open file
            plain.unlink()
            if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
                raise UnusableFile(path, "is a truncated or broken gzip file") from error
            if isinstance(error, OSError) and is_disk_full(error):
                raise RunError(f"The disk is full: {path.name} cannot be unpacked into {plain.parent}.") from error
            raise


def _image_of(hdul: fits.HDUList, path: Path, plain: Path, wcs_required: bool) -> StoredImage:
    """Find the first usable image; if there is none, tell why the first image is not."""
    reasons: list[UnusableFile] = []
    for index, hdu in enumerate(hdul):
        if not has_pixels(hdu) or hdu.name == "ALPHA":
            continue
        try:
            stored = how_stored(hdu, path)
            _require_complete(hdu, path, plain)
            wcs = _wcs_of(hdu, hdul, path, stored, wcs_required)
        except UnusableFile as error:
            reasons.append(error)
            continue
        image = _rows_of(hdul, index, stored, plain)
        if isinstance(image, CompressedImage):
            _try_decoder(image, path)
        alpha, alpha_full = _find_alpha(hdul, stored.shape[1:], path, plain)
        floating_or_rgb = stored.shape[0] == 3 or stored.dtype.kind == "f"
        pixels = Pixels(image, alpha, alpha_full)
        primary = hdu_at(hdul, 0).header
        return StoredImage(path, hdu.header, primary, stored, wcs, pixels, alpha is None and floating_or_rgb)
    if reasons:
        raise reasons[0]
    raise UnusableFile(path, "holds no image (its header has no pixel axes)")


def _wcs_of(hdu: ImageHDU, hdul: fits.HDUList, path: Path, stored: Stored, required: bool) -> WCS | None:
    try:
        return celestial_wcs(wcs_header(hdu, hdu_at(hdul, 0)), path, hdul, stored)
    except UnusableFile:
        if required:
            raise
        return None


def _require_complete(hdu: ImageHDU, path: Path, plain: Path) -> None:
    """Compare the data's size by the header with the file's size."""
    start, span = _data_in_file(hdu)
    # a compressed table is followed by its heap, and whoever compresses also pads
    length = span if isinstance(hdu, fits.CompImageHDU) else hdu.size
    size, needed = plain.stat().st_size, start + length
    if size <= start:
        raise UnusableFile(path, "has a header but no data")
    if size < needed:
        raise UnusableFile(path, f"is truncated ({size} of {needed} bytes)")


def _data_in_file(hdu: ImageHDU) -> tuple[int, int]:
    """Byte offset of an HDU's data in its file, and their length, padding included."""
    info = cast(dict[str, int], hdu.fileinfo())
    return int(info["datLoc"]), int(info["datSpan"])


def _try_decoder(image: CompressedImage, path: Path) -> None:
    try:
        image.read(0, 1)
    except OSError as error:
        raise UnusableFile(path, f"has compressed pixels that cannot be decoded ({error})") from error


def _rows_of(hdul: fits.HDUList, index: int, stored: Stored, plain: Path) -> RowReader:
    hdu = hdu_at(hdul, index)
    if isinstance(hdu, fits.CompImageHDU):
        return CompressedImage(plain, index, stored)
    return PlainImage(plain, _data_in_file(hdu)[0], stored)


def _find_alpha(hdul: fits.HDUList, size: tuple[int, int], path: Path, plain: Path) -> tuple[RowReader | None, float]:
    """Return the reader of the ALPHA extension, if there is one, and the value that means full weight."""
    for index, hdu in enumerate(hdul):
        if hdu.name != "ALPHA" or not has_pixels(hdu):
            continue
        stored = how_stored(hdu, path)
        if stored.shape != (1, *size):
            got = " x ".join(str(n) for n in hdu.shape[::-1])
            raise UnusableFile(path, f"has an ALPHA mask of {got} for an image of {size[1]} x {size[0]} pixels")
        _require_complete(hdu, path, plain)
        rows = _rows_of(hdul, index, stored, plain)
        return rows, _full_weight(rows, size[0], path)
    return None, 1.0


def _full_weight(alpha: RowReader, height: int, path: Path) -> float:
    """Find the value of a mask that means full weight: masks of 0/1, 0..1, 0..255 and 0..65535 are about."""
    largest = 0.0
    for y0 in range(0, height, 256):
        try:
            rows = alpha.read(y0, min(y0 + 256, height))
        except OSError as error:
            raise UnusableFile(path, f"has an ALPHA mask that cannot be read ({error})") from error
        largest = max(largest, float(np.max(rows, where=np.isfinite(rows), initial=0.0)))
    if largest <= 0:
        raise UnusableFile(path, "has an ALPHA mask that hides every pixel")
    return 1.0 if largest <= 1.001 else max(largest, 255.0)
