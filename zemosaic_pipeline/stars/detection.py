"""The stars of a frame: found, measured, and what they say about the frame's quality.

`sep` (Source Extractor as a library) finds them. What is measured on each, and how well, on Gaussian stars of 1.8 to
5 pixels FWHM:

position
    Windowed centroid; its error is within 1.3 times the bound that noise sets where the FWHM is 2.5 pixels or more.
    That bound is ``sqrt(8 pi) * s**2 * noise / flux`` with ``s = FWHM / 2.355`` (`position_error`).
FWHM
    Twice the radius of half the flux, which is exact for a Gaussian (1.16 times the FWHM for a Moffat profile with
    beta = 4); the pixels themselves add 0.24 pixel at 1.8 and 0.06 at 5.
elongation
    Ratio of the axes of the second moments above the threshold.

Background and noise are measured on every third pixel of every third row, which is nine times faster and just as good;
a step of three meets all four positions of a Bayer pattern alike. A frame of 1080 x 1920 takes 23 ms. `sep` holds the
interpreter's lock for 19 of it, so that threads find 50 frames a second together, whatever the number of cores.

What the stars of several frames say about their WCS: `stars.matching`, `stars.alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_THRESHOLD = 4.0
"""Detection limit in sigma, after the matched filter."""
_LEVELS = 8
"""Levels at which stars that touch are told apart; sep's own 32 take two thirds longer, and find 1 % more stars where there
is one in every 400 pixels, 2 % in every 200."""
_STEP, _MESH = 3, 21
"""Every so many-th pixel is used for the background; its mesh in such pixels."""
_PARTS = 3
"""Parts, each way, into which a pixel is cut for the half-flux radius; sep's own 5 take twice as long, and at an FWHM
of 1.8 pixels scatter by 0.06 pixel instead of 0.07."""
_SMALLEST = 1.2
"""FWHM below which it is a pixel, not a star."""
_FLAG_TRUNCATED = 0x0002 | 0x0008


@dataclass(frozen=True, eq=False)
class Stars:
    """The stars of one frame, brightest first.

    Attributes
    ----------
    x, y : ndarray of float64, shape (N,)
        0-based pixel coordinates; the centre of the first pixel is (0, 0).
    flux : ndarray of float64, shape (N,)
        In a circle of 1.5 FWHM, above the background, in units of the image.
    fwhm, elongation : ndarray of float64, shape (N,)
        Pixels; ratio of the axes.
    background, noise : float
        Median level of the frame's background and standard deviation of a pixel's noise, in units of the image.
    saturated : ndarray of bool, shape (N,)
        Stars with a flat top: their position is good, their flux is not.
    """

    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    fwhm: np.ndarray
    elongation: np.ndarray
    background: float
    noise: float
    saturated: np.ndarray

    @classmethod
    def none(cls, background: float, noise: float) -> Stars:
        """No stars, on such a background."""
        x, y, flux, fwhm, elongation = np.zeros((5, 0))
        return cls(x, y, flux, fwhm, elongation, background, noise, np.zeros(0, bool))

    def __len__(self) -> int:
        return len(self.x)


def position_error(stars: Stars) -> np.ndarray:
    """Return the standard error (pixels, float64 (N,)) of each star's position along one axis.

    Photon noise of the sky (Lindegren 1978, "Photoelectric astrometry", for a Gaussian star), and 0.02 pixel for
    what else there is (undersampling, debayering).
    """
    width = stars.fwhm / 2.3548
    return np.hypot(0.02, np.sqrt(8 * np.pi) * width**2 * stars.noise / np.maximum(stars.flux, 1e-30))


# ------------------------------------------------------------------------------------------------------- finding


def find_stars(image: np.ndarray, limit: int = 1500) -> Stars:
    """Find and measure the stars of an image.

    Left out are stars cut by the edge or by missing pixels, single pixels (a FWHM below 1.2 pixels or half
    the median, or two thirds of the light in one pixel of nine), and long objects (pieces of trails).

    Parameters
    ----------
    image : ndarray of float, shape (H, W)
        Any byte order; pixels that are not finite are missing.
    limit : int
        Most stars to return, the brightest.

    Returns
    -------
    Stars
        Without stars where there are none; `background` is NaN where no pixel is finite.
    """
    data = np.array(image, np.float32, order="C")
    if data.ndim != 2:
        raise ValueError(f"an image of shape (H, W) is expected, not {data.shape}")
    missing = ~np.isfinite(data)
    mask = missing if missing.any() else None
    if missing.all() or min(data.shape) < 16:
        return Stars.none(np.nan, 0.0)
    if mask is not None:
        data[missing] = 0
    background, noise = _subtract_background(data, mask)
    if not noise > 0:
        return Stars.none(background, 0.0)
    return _measure(data, mask, _extract(data, mask, noise), limit, background, noise)


def _subtract_background(data: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """Subtract the background of `data` in place; gives its level and the noise."""
    import sep

    step = _STEP if min(data.shape) >= 200 else 1
    few = np.ascontiguousarray(data[::step, ::step])
    few_mask = None if mask is None else np.ascontiguousarray(mask[::step, ::step])
    found = sep.Background(few, mask=few_mask, bw=_MESH * _STEP // step, bh=_MESH * _STEP // step)
    level = found.back(dtype=np.float32)
    wide = level.repeat(step, 1)[:, : data.shape[1]]
    for first in range(step):
        rows = data[first::step]
        rows -= wide[: len(rows)]
    return float(found.globalback), float(found.globalrms)


def _extract(data: np.ndarray, mask: np.ndarray | None, noise: float) -> np.ndarray:
    """Return sep's table of objects; where its buffers overflow, with a higher threshold."""
    import sep

    sep.set_extract_pixstack(max(sep.get_extract_pixstack(), 300_000, data.size // 4))
    threshold = _THRESHOLD
    while True:
        try:
            return sep.extract(data, threshold, err=noise, mask=mask, deblend_nthresh=_LEVELS)
        except Exception as error:  # sep has no class of its own for it
            full = "pixel buffer full" in str(error) or "overflow" in str(error)
            if not full or threshold > 1000:
                raise
            threshold *= 4


def _measure(
    data: np.ndarray, mask: np.ndarray | None, table: np.ndarray, limit: int, background: float, noise: float
) -> Stars:
    import sep

    table = table[(table["flag"] & _FLAG_TRUNCATED) == 0]
    table = table[np.argsort(-table["flux"], kind="stable")][: 2 * limit + 100]
    if not len(table):
        return Stars.none(background, noise)
    first = np.clip(np.median(2.3548 * np.sqrt(table["a"] * table["b"])[:200]), 1.5, 30)
    x, y, cut = _positions(data, mask, table, first)
    reach = np.full(len(x), max(2 * first, 4.0))  # of a Gaussian, all but 2e-5; farther out is noise
    fwhm = 2 * sep.flux_radius(data, x, y, reach, 0.5, mask=mask, subpix=_PARTS)[0]
    elongation = table["a"] / np.maximum(table["b"], 0.3)
    good = ~cut & (fwhm >= _SMALLEST) & ~_single_pixels(data, table)
    if not good.any():
        return Stars.none(background, noise)
    typical = np.median(fwhm[good][:200])
    flux = sep.sum_circle(data, x, y, max(1.5 * typical, 2.0), mask=mask, subpix=5)[0]
    long = (elongation > 3) & (table["a"] > 4 * np.median(table["a"][good][:200]))
    good &= (fwhm >= typical / 2) & ~long & (flux > 0)
    order = np.flatnonzero(good)
    order = order[np.argsort(-flux[order], kind="stable")][:limit]
    x, y, flux, fwhm, elongation = (np.asarray(c, float)[order] for c in (x, y, flux, fwhm, elongation))
    return Stars(x, y, flux, fwhm, elongation, background, noise, _flat_tops(data, table)[order])


def _positions(
    data: np.ndarray, mask: np.ndarray | None, table: np.ndarray, fwhm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return windowed centroids, and which stars are cut by an edge or a missing pixel."""
    import sep

    # narrower windows than a sigma of 1.1 pixels feel the pixel grid: 0.013 pixel instead of 0.003 at 1.8 FWHM
    sigma = max(fwhm / 2.3548, 1.1)
    x, y, flag = sep.winpos(data, table["x"], table["y"], np.full(len(table), sigma), mask=mask, subpix=1)
    # beside a brighter neighbour the window wanders off
    lost = ~(np.hypot(x - table["x"], y - table["y"]) < fwhm / 2)
    cut = (flag & (sep.APER_TRUNC | sep.APER_HASMASKED)) != 0
    return np.where(lost, table["x"], x), np.where(lost, table["y"], y), cut


def _single_pixels(data: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tell which objects have two thirds of their light in one pixel of nine (a star of 1 pixel FWHM: 0.58)."""
    around = _around_peak(data, table, 1)
    return data[table["ypeak"], table["xpeak"]] > 0.67 * around.sum(axis=0)


def _around_peak(data: np.ndarray, table: np.ndarray, radius: int) -> np.ndarray:
    """Return the pixels around each object's brightest one, shape (pixels, N)."""
    rows, columns = (
        np.clip(table[k], radius, n - 1 - radius) for k, n in zip(("ypeak", "xpeak"), data.shape, strict=True)
    )
    steps = range(-radius, radius + 1)
    return np.array([data[rows + a, columns + b] for a in steps for b in steps])


def _flat_tops(data: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tell which objects have a peak whose neighbours are as bright (three of four; a star of 13 pixels has not)."""
    around = _around_peak(data, table, 1)
    # the brightest pixel of a plateau lies on its rim as often as within
    return np.sort(around[1::2], axis=0)[1] >= 0.985 * around[4]
