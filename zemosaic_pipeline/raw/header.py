"""What the header of a raw frame says: exposure, pointing, scale, mount, colour filters.

Facts that help but are not needed are None where the header does not tell them or tells nonsense; only what would turn
the pixels into something wrong (the colour filters) is an `UnusableFile`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat, TypeVar

from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_pipeline.errors import UnusableFile
from zemosaic_pipeline.fits.headers import frame_count
from zemosaic_pipeline.sky import icrs_centre, pixel_scale

PATTERNS = ("RGGB", "GRBG", "GBRG", "BGGR")
"""Bayer patterns: colours of the pixels (0, 0), (0, 1), (1, 0), (1, 1) as (row, column)."""
_MOUNTS: dict[float | None, str] = {0.0: "altaz", 1.0: "eq"}
"""By the Seestar's EQMODE."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Facts:
    """What `read_facts` finds in a header.

    Attributes
    ----------
    exposure : float or None
        Seconds, above 0.
    temperature : float or None
        Of the sensor, degrees Celsius.
    ra, dec : float or None
        Pointing, degrees; both or none.
    scale : float or None
        Arcseconds per pixel as stored.
    mount : str or None
        'altaz' or 'eq'.
    date : str or None
        DATE-OBS.
    """

    exposure: float | None
    temperature: float | None
    ra: float | None
    dec: float | None
    scale: float | None
    mount: str | None
    date: str | None


def read_facts(header: fits.Header, primary: fits.Header, wcs: WCS | None = None) -> Facts:
    """Collect the facts of a frame.

    Parameters
    ----------
    header, primary : Header
        Of the image's HDU, which goes first, and of the primary one.
    wcs : WCS, optional
        Where it is there, the scale is its own; so is the pointing, if no keyword tells it.
    """
    ra, dec = _pointing(header, primary)
    if ra is None and wcs is not None and wcs.array_shape is not None:
        ra, dec = icrs_centre(wcs, wcs.array_shape)
    return Facts(
        exposure=_positive(_number(header, primary, "EXPTIME", "EXPOSURE")),
        temperature=_number(header, primary, "CCD-TEMP", "CCD_TEMP", "SENSTEMP"),
        ra=ra,
        dec=dec,
        scale=_optical_scale(header, primary) if wcs is None else 3600 * pixel_scale(wcs),
        mount=_MOUNTS.get(_number(header, primary, "EQMODE")),
        date=header_text(header, primary, "DATE-OBS"),
    )


# ---------------------------------------------------------------------------------------------- single keywords


def _cards(header: fits.Header, primary: fits.Header, keys: tuple[str, ...]) -> Iterator[tuple[object, str]]:
    """Value and comment of every card of these keywords that can be read."""
    for key in keys:
        for source in (header, primary):
            try:
                if key in source:
                    yield source[key], str(source.comments[key])
            except (fits.VerifyError, ValueError):
                continue


def _number(header: fits.Header, primary: fits.Header, *keys: str) -> float | None:
    """The first finite number among the keywords; texts such as '10.0' count."""
    for value, _ in _cards(header, primary, keys):
        number = _to_float(value)
        if number is not None:
            return number
    return None


def _to_float(value: object) -> float | None:
    if not isinstance(value, str | SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _positive(number: float | None) -> float | None:
    return number if number is not None and number > 0 else None


def header_text(header: fits.Header, primary: fits.Header, *keys: str) -> str | None:
    """Return the first text that is not empty among the keywords."""
    for value, _ in _cards(header, primary, keys):
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


# ------------------------------------------------------------------------------------------- pointing and scale


def _pointing(header: fits.Header, primary: fits.Header) -> tuple[float, float] | tuple[None, None]:
    """Pointing in degrees; (0, 0) stands for 'unknown' in some programs and is taken as that."""
    for keys in (("RA", "DEC"), ("OBJCTRA", "OBJCTDEC")):
        ra = _first(_right_ascension(*card) for card in _cards(header, primary, keys[:1]))
        dec = _first(_angle(value) for value, _ in _cards(header, primary, keys[1:]))
        if ra is not None and dec is not None and -90 <= dec <= 90 and (ra, dec) != (0, 0):
            return ra % 360, dec
    return None, None


def _first(numbers: Iterator[float | None]) -> float | None:
    return next((number for number in numbers if number is not None), None)


def _right_ascension(value: object, comment: str) -> float | None:
    """Degrees from a number of degrees, or from hours: a text with minutes, or a comment that says hours."""
    angle = _angle(value)
    hours = _to_float(value) is None or re.search(r"\bhours?\b|\[h(ours?)?\]|\bin h\b", comment, re.IGNORECASE)
    limit = 24 if hours else 360
    return None if angle is None or not 0 <= angle <= limit else angle * (15 if hours else 1)


def _angle(value: object) -> float | None:
    """A number, or 'degrees (or hours), minutes, seconds' with any of blank, colon and letters between them."""
    number = _to_float(value)
    if number is not None or not isinstance(value, str):
        return number
    found = re.fullmatch(r"([+-]?)(\d+)[\s:hd°]+(\d+)[\s:m']*(\d+(\.\d*)?)?[s\"]?", value.strip(), re.IGNORECASE)
    if not found:
        return None
    minutes, seconds = float(found[3]), float(found[4] or 0)
    if minutes >= 60 or seconds > 60:
        return None
    size = float(found[2]) + minutes / 60 + seconds / 3600
    return -size if found[1] == "-" else size


def _optical_scale(header: fits.Header, primary: fits.Header) -> float | None:
    """206.265 x pixel size (micrometres) / focal length (mm), arcseconds per pixel.

    XPIXSZ holds the size with binning, as SBFITSEXT defines it and as the Seestar writes it; where its comment says
    that it does not, and for PIXSIZE1 (INDI: of the sensor), it is multiplied by XBINNING.
    """
    focal = _positive(_number(header, primary, "FOCALLEN"))
    binning = _positive(_number(header, primary, "XBINNING")) or 1.0
    size = _positive(_number(header, primary, "XPIXSZ"))
    comments = " ".join(comment for _, comment in _cards(header, primary, ("XPIXSZ",)))
    if size is None:
        size, times = _positive(_number(header, primary, "PIXSIZE1")), binning
    else:
        times = binning if re.search(r"unbinned|without bin|before bin", comments, re.IGNORECASE) else 1.0
    if focal is None or size is None:
        return None
    return math.degrees(size * times * 1e-3 / focal) * 3600


# --------------------------------------------------------------------------------------------------- Bayer pattern


def is_seestar(header: fits.Header, primary: fits.Header) -> bool:
    """Tell whether a Seestar took the frame."""
    cards = _cards(header, primary, ("INSTRUME", "CREATOR", "TELESCOP"))
    return any("seestar" in str(value).casefold() for value, _ in cards)


def red_position(pattern: str) -> tuple[int, int]:
    """Row and column (0 or 1) of the red pixel in a Bayer pattern."""
    return divmod(pattern.index("R"), 2)


def stored_pattern(
    header: fits.Header, primary: fits.Header, path: Path, shape: tuple[int, int], uint16: bool, override: str = "auto"
) -> str | None:
    """Find the colours of the first two rows and columns of a mono image *as they are stored in the file*.

    BAYERPAT is read as the programs that write it mean it (and as Siril reads it): from the top of the picture. Its
    top is the file's first row, unless ROWORDER says BOTTOM-UP; then it is the last one. XBAYROFF and YBAYROFF are
    how many columns and rows of the pattern are missing at the first stored pixel.

    Parameters
    ----------
    header, primary : Header
        Of the image's HDU and of the primary one.
    path : Path
        The file, for messages.
    shape : tuple of int
        (H, W).
    uint16 : bool
        The pixels are 16-bit integers: a single such frame of a Seestar without BAYERPAT is GRBG.
    override : str
        'auto', or the pattern as stored, which goes before all that the header says.

    Returns
    -------
    str or None
        One of `PATTERNS`; None for a monochrome sensor.

    Raises
    ------
    UnusableFile
        BAYERPAT, XBAYROFF or YBAYROFF makes no sense.
    """
    if override != "auto":
        return override
    given = _strict(header, primary, "BAYERPAT", "", path, str).strip().upper()
    if given in ("", "NONE"):
        single = frame_count(header, primary) == 1
        return "GRBG" if uint16 and single and is_seestar(header, primary) else None
    if given not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise UnusableFile(path, f"has an unknown BAYERPAT of '{given}' (known: {known}); set bayer_pattern")
    dx, dy = (_strict(header, primary, key, 0, path, _whole) for key in ("XBAYROFF", "YBAYROFF"))
    bottom_up = (header_text(header, primary, "ROWORDER") or "").upper().replace("_", "-") == "BOTTOM-UP"
    if bottom_up and shape[0] % 2 == 0:  # the last row begins the pattern: with an odd height, so does the first
        dy += 1
    return "".join(given[(y + dy) % 2 * 2 + (x + dx) % 2] for y in (0, 1) for x in (0, 1))


def _whole(value: object) -> int:
    number = _to_float(value)
    if number is None or not number.is_integer():
        raise ValueError(value)
    return int(number)


def _strict(
    header: fits.Header, primary: fits.Header, key: str, default: object, path: Path, kind: Callable[[object], _T]
) -> _T:
    """Value of a keyword that must be readable where it is there."""
    try:
        return kind(header[key] if key in header else primary.get(key, default))
    except (fits.VerifyError, ValueError, TypeError, OverflowError) as error:
        raise UnusableFile(path, f"has an unreadable {key} in its header") from error
