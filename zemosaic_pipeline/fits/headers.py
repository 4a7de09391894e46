"""What a FITS header says: how the pixels are stored, how many frames went in, and the WCS.

Whatever a header gets wrong is an `UnusableFile` with its reason in one sentence. No pixel is read here.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS, FITSFixedWarning

from zemosaic_pipeline.errors import UnsolvedImage, UnusableFile, UsageError

PRODUCT_KEYWORD = "ZMPROD"
"""In the primary header of every image that this program writes: 'science', 'aesthetic' or 'coverage'."""
BROKEN = (OSError, EOFError, zlib.error, fits.VerifyError, ValueError, TypeError, LookupError, AttributeError)
"""What astropy raises on headers, tables and gzipped files that are not what they say."""
ImageHDU = fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU
"""What may hold an image."""
_FRAME_KEYWORDS = ("MT_NFRAMES", "NCOMBINE", "STACKCNT")
_CEILING_KEYWORDS = ("SATURATE", "DATAMAX")


# --------------------------------------------------------------------------------------- opening with astropy


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks, and without wcslib's lines of its C code."""
    text = re.sub(r"ERROR \d+ in \w+\(\) at line \d+ of file \S+:", "", str(error))
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence astropy where it repairs WCS keywords, or reports what is reported here in one sentence.

    Python's filters belong to all threads: where several enter and leave, one that leaves restores the filters under the
    others. That does no harm within another `quiet` of the thread that waits for them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        warnings.filterwarnings("ignore", ".*truncated.*", AstropyUserWarning)
        warnings.filterwarnings("ignore", "Error validating header for HDU #0", AstropyUserWarning)
        yield


def first_bytes(path: Path) -> bytes:
    """Read enough of a file to tell FITS, gzip and text apart."""
    with path.open("rb") as stream:
        return stream.read(2880)


@contextmanager
def open_fits(plain: Path, path: Path) -> Iterator[fits.HDUList]:
    """Open `plain` without memory mapping, all headers parsed; what astropy cannot parse is set aside."""
    with ExitStack() as stack:
        try:
            hdul = stack.enter_context(fits.open(plain, memmap=False))
            parsed = [hdu.header for hdu in hdus_of(hdul)]
        except BROKEN as error:
            raise UnusableFile(path, f"has a broken FITS header ({one_line(error)})") from error
        if not parsed:
            raise UnusableFile(path, "has a broken FITS header")
        yield hdul


def hdu_at(hdul: fits.HDUList, index: int) -> ImageHDU:
    """One HDU of a file (astropy declares that it may be a list of them)."""
    return cast(ImageHDU, hdul[index])


def hdus_of(hdul: fits.HDUList) -> Iterator[ImageHDU]:
    """The HDUs of a file in turn; each is read when it is asked for."""
    return cast(Iterator[ImageHDU], iter(hdul))


# -------------------------------------------------------------------------------------- how pixels are stored


@dataclass(frozen=True)
class Stored:
    """How an image HDU stores its pixels.

    Attributes
    ----------
    axes : str
        One letter per numpy axis: c, y, x, or '-' for an axis of length 1 that is dropped.
    shape : tuple of int
        (C, H, W).
    dtype : dtype
        As stored, big-endian.
    scale, zero : float
        BSCALE, BZERO.
    blank : int or None
        BLANK, of integer images only.
    """

    axes: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    scale: float
    zero: float
    blank: int | None

    @property
    def interleaved(self) -> bool:
        """The channels of a pixel lie side by side: (H, W, 3)."""
        return self.axes[-1] == "c"


def has_pixels(hdu: ImageHDU) -> bool:
    """Tell whether an HDU is an image with pixels."""
    try:
        return bool(hdu.is_image and hdu.shape) and all(isinstance(n, int) and n > 0 for n in hdu.shape)
    except (AttributeError, fits.VerifyError):  # astropy's stand-in for an HDU that it cannot make out
        return False


def _layout(shape: tuple[int, ...], path: Path) -> tuple[str, tuple[int, int, int]]:
    """Tell what each numpy axis is (see `Stored.axes`), and (C, H, W); drop spare axes of length 1."""
    if len(shape) < 2:
        raise UnusableFile(path, "holds one-dimensional data, not an image")
    spare = [axis for axis, length in enumerate(shape[:-2]) if length == 1]
    dropped = spare[: max(len(shape) - 3, 0)]
    kept = [length for axis, length in enumerate(shape) if axis not in dropped]
    if len(kept) > 3:
        size = " x ".join(str(length) for length in reversed(shape))
        raise UnusableFile(path, f"holds data with {len(shape)} axes ({size}), not an image")
    if len(kept) == 2:
        letters, size3 = "yx", (1, kept[0], kept[1])
    elif kept[0] in (1, 3):
        letters, size3 = "cyx", (kept[0], kept[1], kept[2])
    elif kept[2] in (1, 3):
        letters, size3 = "yxc", (kept[2], kept[0], kept[1])
    else:
        raise UnusableFile(path, f"has {min(kept)} channels; only mono (1) and RGB (3) images can be used")
    if min(size3[1:]) < 2:
        raise UnusableFile(path, f"is only {size3[2]} x {size3[1]} pixels large")
    given = iter(letters)
    return "".join("-" if axis in dropped else next(given) for axis in range(len(shape))), size3


_Number = TypeVar("_Number", int, float)


def _number(header: fits.Header, key: str, default: _Number, path: Path) -> _Number:
    """A keyword's value, as a number of the default's type."""
    value = _value(header, key, default, path)
    try:
        return type(default)(value)
    except (ValueError, TypeError) as error:
        raise _unreadable(key, path) from error


def _value(header: fits.Header, key: str, default: object, path: Path) -> Any:
    """A keyword's value, whatever it is."""
    try:
        return header.get(key, default)
    except (fits.VerifyError, ValueError, TypeError) as error:
        raise _unreadable(key, path) from error


def _unreadable(key: str, path: Path) -> UnusableFile:
    return UnusableFile(path, f"has an unreadable {key} in its header")


def how_stored(hdu: ImageHDU, path: Path) -> Stored:
    """Read off a header how the pixels are stored; must come before ``hdu.data`` is touched."""
    header = hdu.header
    axes, shape = _layout(hdu.shape, path)
    bitpix = _number(header, "BITPIX", 0, path)
    if bitpix not in (8, 16, 32, 64, -32, -64):
        raise UnusableFile(path, f"has an impossible BITPIX of {bitpix}")
    kind = "f" if bitpix < 0 else "u" if bitpix == 8 else "i"
    blank = _value(header, "BLANK", None, path) if bitpix > 0 else None
    return Stored(
        axes=axes,
        shape=shape,
        dtype=np.dtype(f">{kind}{abs(bitpix) // 8}"),
        scale=_number(header, "BSCALE", 1.0, path),
        zero=_number(header, "BZERO", 0.0, path),
        blank=blank if isinstance(blank, int) else None,
    )


def frame_count(*headers: fits.Header) -> int:
    """Return the number of stacked frames by the first header that tells it, else 1."""
    for header in headers:
        for key in _FRAME_KEYWORDS:
            try:
                value: Any = header.get(key, 0)
                count = int(float(value))
            except (fits.VerifyError, ValueError, TypeError, OverflowError):
                continue
            if count > 0:
                return count
    return 1


def ceilings_of(stored: Stored, *headers: fits.Header) -> tuple[float, ...]:
    """Values that may clip the brightest pixels, in the image's units, ascending.

    The largest number of an integer type, and what SATURATE and DATAMAX say, true or not: who uses them asks the pixels.
    """
    found = {float(np.iinfo(stored.dtype).max) * stored.scale + stored.zero} if stored.dtype.kind in "iu" else set()
    for header in headers:
        for key in _CEILING_KEYWORDS:
            try:
                value: Any = header.get(key)
                found.add(float(value))
            except (fits.VerifyError, ValueError, TypeError):
                continue
    return tuple(sorted(value for value in found if 0 < value < np.inf))


def looks_stacked(header: fits.Header) -> bool:
    """Tell a stacked image from a raw frame of a colour sensor: RGB, or mono without BAYERPAT."""
    if header.get("NAXIS") == 3 and 3 in (header.get("NAXIS1"), header.get("NAXIS3")):
        return True
    return str(header.get("BAYERPAT", "")).strip().upper() in ("", "NONE")


# -------------------------------------------------------------------------------------------------------- WCS


def wcs_header(hdu: ImageHDU, primary: ImageHDU) -> fits.Header:
    """Return the header that holds the WCS: the image's, else that of a primary HDU without data."""
    if "CTYPE1" not in hdu.header and hdu is not primary and not primary.shape:
        return primary.header
    return hdu.header


def celestial_wcs(
    header: fits.Header, path: Path, hdul: fits.HDUList | None = None, stored: Stored | None = None
) -> WCS:
    """Make the two-dimensional celestial WCS of a header, and try it at the image's centre.

    Parameters
    ----------
    header : Header
        What holds the WCS.
    path : Path
        Its file, for messages.
    hdul : HDUList, optional
        Where distortion tables are looked up.
    stored : Stored, optional
        The image; None where its size is not known, and nothing is tried.

    Returns
    -------
    WCS
        Longitude first; with ``pixel_shape`` where `stored` is given.

    Raises
    ------
    UnusableFile
        There is no celestial WCS, or none that works.
    """
    kinds = [str(_value(header, f"CTYPE{axis}", "", path)).strip() for axis in (1, 2)]
    if not any(kinds):
        raise UnsolvedImage(path, _no_wcs_reason(header), raw=not looks_stacked(header))
    if not any(re.match(r"(CD|PC)[12]_[12]$|CDELT[12]$|CROTA2$", key) for key in header):
        raise UnusableFile(path, "has a WCS without a pixel scale (no CD, PC or CDELT)")
    try:
        if stored is not None and stored.interleaved and "CTYPE3" in header:
            wcs = WCS(header, hdul).celestial  # the channels may be the first axis, the sky the other two
        else:
            wcs = WCS(header, hdul, naxis=2)
    except (*BROKEN, MemoryError) as error:
        raise UnusableFile(path, f"has a WCS that cannot be used ({one_line(error)})") from error
    if not wcs.has_celestial:
        raise UnusableFile(path, f"has a WCS that is not celestial ({', '.join(kinds)})")
    _require_regular(wcs, path)
    if wcs.wcs.lng == 1:
        wcs = _longitude_first(wcs, header, hdul, path)
    if stored is not None:
        _set_size(wcs, stored.shape[1:], path)
    return wcs


def _no_wcs_reason(header: fits.Header) -> str:
    if not looks_stacked(header):
        return f"is a raw sub (BAYERPAT {header['BAYERPAT']}) without a WCS, not a plate-solved panel"
    return "has no WCS in its header; plate-solve it first"


def _require_regular(wcs: WCS, path: Path) -> None:
    """Refuse a matrix without an inverse, relative to its size; astropy notices only exact zeros."""
    matrix = wcs.pixel_scale_matrix
    size = np.prod(np.linalg.norm(matrix, axis=1))
    if not np.isfinite(size) or not abs(np.linalg.det(matrix)) > 1e-10 * size:
        raise UnusableFile(path, "has a WCS whose matrix is singular (zero determinant)")


def _set_size(wcs: WCS, size: tuple[int, int], path: Path) -> None:
    """Give a WCS its (H, W); refuse one that does not know where the centre lies, or does not find the way back."""
    height, width = size
    wcs.pixel_shape = (width, height)
    centre = np.array([[(width - 1) / 2, (height - 1) / 2]])
    try:
        sky = wcs.all_pix2world(centre, 0)
        back = wcs.wcs_world2pix(sky, 0)
    except (ValueError, RuntimeError) as error:
        raise UnusableFile(path, f"has a WCS that cannot be used ({one_line(error)})") from error
    if not (np.isfinite(sky).all() and np.isfinite(back).all()):
        raise UnusableFile(path, "has a WCS that gives no position for the image's centre")


def _longitude_first(wcs: WCS, header: fits.Header, hdul: fits.HDUList | None, path: Path) -> WCS:
    """Make the WCS of a header with the latitude first again, world axes swapped; the pixel axes stay."""
    swapped = header.copy()
    for key in header:
        if re.match(r"(PC|CD)\d_\d$|CDELT\d$|CROTA\d$", key):
            swapped.remove(key, ignore_missing=True)
    for i, j in ((1, 2), (2, 1)):
        for stem in ("CTYPE", "CRVAL", "CUNIT"):
            if f"{stem}{j}" in header:
                swapped[f"{stem}{i}"] = header[f"{stem}{j}"]
        for column in (1, 2):
            swapped[f"CD{i}_{column}"] = wcs.pixel_scale_matrix[j - 1, column - 1]
    new = WCS(swapped, hdul, naxis=2)
    points = wcs.wcs.crpix + np.array([[0, 0], [300, 0], [0, 300], [-300, -300]])
    # PV terms mean different things in the other order
    before = np.asarray(wcs.all_pix2world(points, 1))
    if not np.allclose(new.all_pix2world(points, 1), before[:, ::-1], rtol=0, atol=1e-9):
        raise UnusableFile(path, "has a distorted WCS with the latitude axis first, which cannot be read safely")
    return new


def read_wcs_file(path: Path | str) -> tuple[WCS, tuple[int, int] | None]:
    """Read a WCS from a FITS file, or from a text file of header cards as SWarp and Montage use them.

    Returns
    -------
    WCS
        Celestial, two-dimensional, longitude first.
    tuple of int or None
        (H, W) where the header tells it.

    Raises
    ------
    UsageError
        The file cannot be read or holds no usable celestial WCS.
    """
    path = Path(path)
    try:
        first = first_bytes(path)
        with quiet():
            if (first[:6] == b"SIMPLE" and b"\n" not in first) or first[:2] == b"\x1f\x8b":
                return _wcs_of_fits(path)
            return _wcs_of_cards(_text_cards(path.read_bytes()), path)
    except OSError as error:
        raise UsageError(f"The WCS file {path} cannot be read ({error.strerror or error}).") from error
    except UnusableFile as error:
        raise UsageError(f"The WCS file {path} {error.reason}; give a FITS header with a WCS.") from error


def _wcs_of_fits(path: Path) -> tuple[WCS, tuple[int, int] | None]:
    with open_fits(path, path) as hdul:
        with_wcs = (hdu.header for hdu in hdus_of(hdul) if "CTYPE1" in hdu.header)
        return _wcs_of_cards(next(with_wcs, hdu_at(hdul, 0).header), path, hdul)


def _wcs_of_cards(
    header: fits.Header, path: Path, hdul: fits.HDUList | None = None
) -> tuple[WCS, tuple[int, int] | None]:
    sizes = [_number(header, f"NAXIS{axis}", 0, path) for axis in (1, 2, 3)]
    if header.get("NAXIS") == 3 and sizes[0] == 3:
        sizes = sizes[1:]
    wcs = celestial_wcs(header, path, hdul)
    if min(sizes[:2]) < 1:
        return wcs, None
    size = (sizes[1], sizes[0])
    _set_size(wcs, size, path)
    return wcs, size


def _text_cards(content: bytes) -> fits.Header:
    """Parse header cards, one a line or 80 characters each; lines that are no cards are passed over."""
    text = content[: 1 << 20].decode("latin-1")
    lines = text.splitlines() if "\n" in text else [text[i : i + 80] for i in range(0, len(text), 80)]
    header = fits.Header()
    for line in lines:
        found = re.match(r"([A-Z0-9_-]{1,8})\s*=\s*(.+)", line)
        if line.split() == ["END"]:
            break
        if found:
            header.append(fits.Card.fromstring(f"{found[1]:<8}= {found[2].strip()}"), end=True)
    return header
