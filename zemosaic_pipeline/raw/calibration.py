"""Master dark, flat and bias: made of one file or a folder of frames, checked, and taken off raw pixels.

What is done to a raw pixel, with masters as they come from the camera (that is, dark and flat contain the bias):

==============  =============================================================
given           calibrated pixel
==============  =============================================================
bias            raw - bias
dark            raw - dark
dark and bias   raw - bias - (dark - bias) t(frame) / t(dark)
and flat        all that, divided by (flat - bias) normalised to median 1
==============  =============================================================

With a bias the dark current alone is scaled by the exposure times (it grows linearly, the bias does not grow); without
one nothing can be scaled, and a dark whose exposure differs by more than 10 % is named in a warning, as is in both
cases a sensor temperature that differs by more than 5 degrees (dark current doubles every 6). A master whose CALSTAT
holds a 'B' has its bias taken off already.

The flat is normalised for each colour of the Bayer pattern by itself, to median 1. It is there to take out what differs
*from place to place* (vignetting, dust, pixel sensitivity). Its colour is that of the twilight sky or of a lamp:
normalised as a whole, it would divide that colour into every frame. Both greens together are one colour, so that a
difference between them is flattened; without a known pattern each of the four positions is normalised by itself.

Pixels in which the flat saw no light (below 1 % of the median) have no data: a lone one is later taken from its
neighbours of the same colour, as is a hot pixel; where these have none, it stays 'no data'.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zemosaic_pipeline.errors import UnusableFile, UsageError
from zemosaic_pipeline.fits.find import find_fits_files
from zemosaic_pipeline.fits.tile import StoredImage, open_image
from zemosaic_pipeline.raw.header import Facts, header_text, read_facts, red_position, stored_pattern
from zemosaic_pipeline.settings.settings import Settings

_BLOCK_BYTES = 64 << 20
"""Memory for the block of rows of all frames that are combined; statistics need twice as much again."""
_CLIP_SIGMA = 3.0
_DARK_EXPOSURE = 0.1
_DARK_DEGREES = 5.0
_BLIND = 0.01
"""A flat below this fraction of its median saw no light."""


@dataclass(frozen=True, eq=False)
class Master:
    """A calibration image.

    Attributes
    ----------
    kind : str
        'dark', 'flat' or 'bias'.
    path : Path
        The file or folder that it was made of.
    data : ndarray, float32 (H, W)
        ADU; of a flat, what a pixel is multiplied by (NaN: no data).
    exposure, temperature : float or None
        Seconds; degrees Celsius.
    pattern : str or None
        Bayer pattern as stored.
    has_bias : bool
        It contains the bias.
    """

    kind: str
    path: Path
    data: np.ndarray = field(repr=False)
    exposure: float | None = None
    temperature: float | None = None
    pattern: str | None = None
    has_bias: bool = True


class _Once:
    """Passes each text on once, on any thread."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn, self._seen, self._lock = warn, set(), threading.Lock()

    def __call__(self, key: str, text: str) -> None:
        with self._lock:
            new = key not in self._seen
            self._seen.add(key)
        if new:
            self._warn(text)


@dataclass(frozen=True, eq=False)
class Correction:
    """What calibration means for the rows of one frame; `dark_factor` is t(frame) / t(dark)."""

    bias: np.ndarray | None
    dark: np.ndarray | None
    dark_factor: float
    gain: np.ndarray | None

    def apply(self, rows: np.ndarray, y0: int) -> None:
        """Calibrate rows `y0` and following, float32 (n, W), in place."""
        window = slice(y0, y0 + rows.shape[0])
        if self.bias is not None:
            rows -= self.bias[window]
        if self.dark is not None:
            rows -= self.dark[window] if self.dark_factor == 1 else self.dark[window] * np.float32(self.dark_factor)
        if self.gain is not None:
            rows *= self.gain[window]


@dataclass(frozen=True, eq=False)
class Calibration:
    """How raw frames become calibrated ones. `load_calibration` makes one; ``Calibration()`` does nothing but repair.

    Attributes
    ----------
    debayer_method : str
        'edge_aware' or 'bilinear'.
    bayer_pattern : str
        'auto', or the pattern as stored, whatever the header says.
    hot_pixel_sigma : float
        Threshold of the repair; 0: none.
    bias, dark, flat : Master or None
        `dark` is without its bias where there is a bias.
    notice : callable
        ``notice(key, text)`` warns, once for each key.
    """

    debayer_method: str = "bilinear"
    bayer_pattern: str = "auto"
    hot_pixel_sigma: float = 5.0
    bias: Master | None = None
    dark: Master | None = None
    flat: Master | None = None
    notice: Callable[[str, str], object] = field(default=lambda key, text: None, repr=False)

    @property
    def masters(self) -> tuple[Master, ...]:
        """Those that there are."""
        return tuple(master for master in (self.bias, self.dark, self.flat) if master is not None)

    def correction(self, name: str, shape: tuple[int, int], facts: Facts) -> Correction | None:
        """Work out what is taken off a frame; None: nothing.

        Parameters
        ----------
        name : str
            The frame, for messages.
        shape : tuple of int
            (H, W).
        facts : Facts
            Its exposure and temperature.

        Raises
        ------
        UsageError
            A master has another size.
        """
        if not self.masters:
            return None
        for master in self.masters:
            _require_size(master, f"the frame {name}", shape)
        factor = 1.0 if self.dark is None else self._dark_factor(self.dark, name, facts)
        bias, dark, gain = (None if master is None else master.data for master in (self.bias, self.dark, self.flat))
        return Correction(bias, dark, factor, gain)

    def _dark_factor(self, dark: Master, name: str, facts: Facts) -> float:
        """Return t(frame) / t(dark) where the dark can be scaled, else 1; what does not fit is said."""
        if dark.temperature is not None and facts.temperature is not None:
            apart = abs(dark.temperature - facts.temperature)
            if apart > _DARK_DEGREES:
                self.notice(
                    "dark temperature",
                    f"The dark {dark.path.name} was taken at {dark.temperature:.1f} degrees, frames at "
                    f"{facts.temperature:.1f} ({name}): their dark current differs.",
                )
        if dark.exposure is None or facts.exposure is None:
            return 1.0
        if self.bias is not None:
            return facts.exposure / dark.exposure
        if abs(dark.exposure - facts.exposure) > _DARK_EXPOSURE * facts.exposure:
            self.notice(
                "dark exposure",
                f"The dark {dark.path.name} was exposed for {dark.exposure:g} s, frames for {facts.exposure:g} s "
                f"({name}): give a dark of the same exposure, or a bias, too, so that the dark can be scaled.",
            )
        return 1.0


def _require_size(master: Master, other: str, shape: tuple[int, int]) -> None:
    if master.data.shape != shape:
        height, width = master.data.shape
        raise UsageError(
            f"The {master.kind} {master.path} is {width} x {height} pixels large, but {other} is {shape[1]} x "
            f"{shape[0]}: give a {master.kind} of the same camera, binning and crop."
        )


def load_calibration(settings: Settings, scratch_dir: Path | str, warn: Callable[[str], object]) -> Calibration:
    """Make the calibration that the settings ask for; masters are combined here.

    Parameters
    ----------
    settings : Settings
        Its fields `dark`, `flat`, `bias`, `debayer_method`, `bayer_pattern` and `hot_pixel_sigma`.
    scratch_dir : Path or str
        An existing folder for unpacked ``.gz`` files.
    warn : callable
        Called with one sentence for each warning, now and, once for each kind, while frames are opened.

    Raises
    ------
    UsageError
        A master cannot be used, or they do not fit each other.
    RunError
        The disk is full while a file is unpacked.
    """
    pattern = settings.bayer_pattern
    bias = _load("bias", settings.bias, pattern, scratch_dir, warn)
    dark = _load("dark", settings.dark, pattern, scratch_dir, warn)
    if dark and bias and dark.has_bias:
        _require_size(dark, f"the bias {bias.path}", bias.data.shape)
        np.subtract(dark.data, bias.data, out=dark.data)
    elif dark and not bias and not dark.has_bias:
        warn(f"The dark {dark.path.name} is without its bias (CALSTAT): give the bias, too, or an offset remains.")
    flat = _load("flat", settings.flat, pattern, scratch_dir, warn, bias)
    return Calibration(
        debayer_method=settings.debayer_method,
        bayer_pattern=pattern,
        hot_pixel_sigma=settings.hot_pixel_sigma,
        bias=bias,
        dark=dark,
        flat=flat and _normalised(flat, warn),
        notice=_Once(warn),
    )


# --------------------------------------------------------------------------------------------- combining frames


def _load(
    kind: str,
    given: str,
    pattern: str,
    scratch_dir: Path | str,
    warn: Callable[[str], object],
    bias: Master | None = None,
) -> Master | None:
    """Make a master of a file or a folder; '' is none. The bias is taken off flats, which are scaled alike."""
    if not given:
        return None
    path = Path(given)
    if not path.exists():
        raise UsageError(f"The {kind} {path} does not exist.")
    files = find_fits_files(path) if path.is_dir() else [path]
    images: list[StoredImage] = []
    for file in files:
        try:
            images.append(_open_frame_of(kind, file, scratch_dir))
        except UnusableFile as error:
            if not path.is_dir():
                raise UsageError(f"The {kind} {file} cannot be used: it {error.reason}.") from error
            warn(f"{file.name} is left out of the {kind}: it {error.reason}.")
    if not images:
        raise UsageError(f"The folder {path} holds no FITS file that can be used as a {kind}.")
    return _master(kind, path, images, pattern, bias)


def _open_frame_of(kind: str, file: Path, scratch_dir: Path | str) -> StoredImage:
    image = open_image(file, scratch_dir)
    if image.stored.shape[0] != 1:
        raise UnusableFile(file, f"is an RGB image, not a raw {kind} frame")
    return image


def _master(kind: str, path: Path, images: list[StoredImage], pattern: str, bias: Master | None) -> Master:
    """Combine the frames of one master."""
    first, shape = images[0], images[0].stored.shape[1:]
    for image in images:
        if image.stored.shape[1:] != shape:
            raise UsageError(
                f"The {kind} frames {first.path} and {image.path} differ in size: give frames of one size."
            )
    facts = [read_facts(image.header, image.primary) for image in images]
    exposures = {fact.exposure for fact in facts if fact.exposure is not None}
    if kind == "dark" and exposures and max(exposures) > (1 + _DARK_EXPOSURE) * min(exposures):
        times = ", ".join(f"{time:g} s" for time in sorted(exposures))
        raise UsageError(f"The darks in {path} have different exposures ({times}): give a folder with one of them.")
    temperatures = [fact.temperature for fact in facts if fact.temperature is not None]
    has_bias = "B" not in (header_text(first.header, first.primary, "CALSTAT") or "").upper()
    master = Master(
        kind=kind,
        path=path,
        data=np.empty(shape, np.float32),
        exposure=float(np.median(list(exposures))) if exposures else None,
        temperature=float(np.median(temperatures)) if temperatures else None,
        pattern=_pattern_of(first, shape, pattern, kind),
        has_bias=has_bias,
    )
    offset = None
    if bias is not None and has_bias:
        _require_size(bias, f"the {kind} {path}", shape)
        offset = bias.data
    try:
        _combine(images, master.data, offset, alike=kind == "flat")
    except OSError as error:
        raise UsageError(f"The {kind} {path} cannot be read ({error}).") from error
    return master


def _pattern_of(image: StoredImage, shape: tuple[int, int], override: str, kind: str) -> str | None:
    uint16 = image.stored.dtype.kind == "i" and image.stored.dtype.itemsize == 2
    try:
        return stored_pattern(image.header, image.primary, image.path, shape, uint16, override)
    except UnusableFile as error:
        raise UsageError(f"The {kind} {image.path} cannot be used: it {error.reason}.") from error


def _combine(images: list[StoredImage], out: np.ndarray, offset: np.ndarray | None, alike: bool) -> None:
    """Combine frames into `out`, block by block, after subtraction of `offset` and, if `alike`, scaling to one level."""
    height, width = out.shape
    rows = max(1, _BLOCK_BYTES // (4 * len(images) * width))
    levels = [_level(image, offset) for image in images] if alike and len(images) > 1 else None
    for y0 in range(0, height, rows):
        y1 = min(y0 + rows, height)
        block = np.empty((len(images), y1 - y0, width), np.float32)
        for k, image in enumerate(images):
            block[k] = image.pixels.image.read(y0, y1)[0]
            if offset is not None:
                block[k] -= offset[y0:y1]
            if levels is not None and levels[k] > 0:
                block[k] *= np.float32(levels[0] / levels[k]) if levels[0] > 0 else 1
        out[y0:y1] = combine(block)


def _level(image: StoredImage, offset: np.ndarray | None) -> float:
    """Median of a frame, by some forty pairs of rows spread over it."""
    height = image.stored.shape[1]
    samples = []
    for y0 in range(0, height - 1, max(2, height // 40 // 2 * 2)):
        rows = image.pixels.image.read(y0, y0 + 2)[0]
        samples.append(rows if offset is None else rows - offset[y0 : y0 + 2])
    return float(np.nanmedian(samples))


def combine(stack: np.ndarray) -> np.ndarray:
    """Combine frames pixel by pixel: sigma-clipped mean of five and more, median of three and four, mean of two.

    Values off the median by more than 3 sigma are left out; sigma is 1.4826 times the median absolute deviation of the
    pixel's own values, or the median of those of its row where that is larger (with few frames a pixel's own is
    sometimes far too small by chance). A pixel with a NaN is NaN.

    Parameters
    ----------
    stack : ndarray, float32 (N, rows, W)
        The frames; overwritten.

    Returns
    -------
    ndarray, float32 (rows, W)
    """
    if len(stack) < 3:
        return stack.mean(axis=0, dtype=np.float64).astype(np.float32)
    middle = np.median(stack, axis=0)
    if len(stack) < 5:
        return middle
    stack -= middle
    own = np.median(np.abs(stack), axis=0)
    typical = np.median(np.nan_to_num(own), axis=-1, keepdims=True)
    limit = np.float32(_CLIP_SIGMA * 1.4826) * np.maximum(own, typical)
    keep = np.abs(stack) <= limit
    total = np.sum(stack, axis=0, where=keep, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return (middle + total / keep.sum(axis=0)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- flat


def _normalised(flat: Master, warn: Callable[[str], object]) -> Master:
    """Turn a flat, in place, into what pixels are multiplied by: 1 / (flat / median of its colour)."""
    data = flat.data
    blind = np.zeros(data.shape, bool)
    for cells in _colours(flat.pattern):
        values = np.concatenate([data[y::2, x::2].ravel() for y, x in cells])
        lit = values[values > 0]  # NaN is not
        if lit.size == 0:
            raise UsageError(f"The flat {flat.path} is 0 or less everywhere: give a flat that was exposed to light.")
        level = np.median(lit)
        for y, x in cells:
            part = data[y::2, x::2]
            dark = ~(part > _BLIND * level)
            blind[y::2, x::2] = dark
            part[dark] = np.nan
            np.divide(level, part, out=part)
    count = int(blind.sum())
    if count:
        warn(
            f"The flat {flat.path.name} has {count} pixels without light (0, negative or below 1 % of its median): "
            "they are taken from their neighbours, or hold no data where these have none."
        )
    return replace(flat, data=data)


def _colours(pattern: str | None) -> list[list[tuple[int, int]]]:
    """The positions (y, x) in a 2 x 2 cell that have one colour."""
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    if pattern is None:
        return [[cell] for cell in cells]
    y, x = red_position(pattern)
    return [[(y, x)], [(1 - y, 1 - x)], [(y, 1 - x), (1 - y, x)]]
