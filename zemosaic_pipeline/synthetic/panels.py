"""A known sky and panels of it: the scenes of the demonstration, of the tests and of the benchmarks.

The sky is stars (positions and fluxes per channel) over a nebula (a sum of Gaussians), given in pixels of a reference
tangent plane. A panel sees it through its own WCS, point spread function, gain, offset, gradient, vignetting and noise:
``y = vignetting * (gain * sky + offset + gradient) + noise``. Nothing here is shared with the code under test: positions
and solid angles come from astropy alone.

Panels are divided by a flat of the sky, and so by the solid angle of their pixels: the nebula keeps its brightness, and
the sum over a star's pixels goes with the inverse of the solid angle of a pixel where the star lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, Sip

from zemosaic_pipeline.synthetic.gradients import gradient_image, random_gradient, vignetting_image

FWHM_TO_SIGMA = 1 / 2.3548200450309493


@dataclass(frozen=True)
class Sky:
    """Stars and nebula on the tangent plane of ``wcs``; fluxes and amplitudes are per channel.

    A flux is the sum over the pixels of a star where these are as large as a pixel in the middle of that plane.
    """

    wcs: WCS
    stars: np.ndarray  # (n, 2) reference pixels, x then y
    fluxes: np.ndarray  # (n, C)
    blobs: np.ndarray  # (m, 3): x, y, sigma
    amplitudes: np.ndarray  # (m, C)
    level: np.ndarray  # (C,)
    disc: tuple[float, ...] = ()  # radius, then the brightness in each channel, of a disc in the middle; or nothing

    @property
    def channels(self) -> int:
        return len(self.level)

    @property
    def pixel(self) -> float:
        """Solid angle of a reference pixel, steradian."""
        return float(pixel_solid_angle(self.wcs, *(np.asarray(self.wcs.wcs.crpix) - 1)))

    def scale_of(self, wcs: WCS, shape: tuple[int, int]) -> float:
        """Side of a pixel in the middle of an image, in reference pixels."""
        return float(np.sqrt(pixel_solid_angle(wcs, (shape[1] - 1) / 2, (shape[0] - 1) / 2) / self.pixel))

    def stars_on(self, wcs: WCS, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Stars on and around an image: their numbers (n,), pixels x and y (n,), and the sums (n, C) over their pixels."""
        ra, dec = self.wcs.pixel_to_world_values(*self.stars.T)
        x, y = wcs.wcs_world2pix(ra, dec, 0)
        # far from the image a distortion has no inverse
        margin = max(shape) / 4
        near = (x > -margin) & (y > -margin) & (x < shape[1] + margin) & (y < shape[0] + margin)
        x, y = wcs.world_to_pixel_values(ra[near], dec[near])
        return np.flatnonzero(near), x, y, self.fluxes[near] * (self.pixel / pixel_solid_angle(wcs, x, y))[:, None]

    def image(self, wcs: WCS, shape: tuple[int, int], fwhm: float = 3.0) -> np.ndarray:
        """Noiseless sky as an instrument with this WCS sees it, float64 (C, H, W); stars are Gaussians."""
        return self.nebula(wcs, shape) + self.star_field(wcs, shape, fwhm)

    def nebula(self, wcs: WCS, shape: tuple[int, int]) -> np.ndarray:
        """Sky level and nebula, evaluated on every eighth pixel and interpolated with a cubic spline."""
        from scipy.interpolate import RectBivariateSpline

        ys, xs = (np.linspace(0, n - 1, max(n // 8, 4)) for n in shape)
        rx, ry = self.wcs.world_to_pixel_values(*wcs.pixel_to_world_values(*np.meshgrid(xs, ys)))
        out = np.empty((self.channels, *shape))
        rows, columns = np.arange(shape[0]), np.arange(shape[1])
        for c in range(self.channels):
            coarse = np.full(rx.shape, float(self.level[c]))
            for (x, y, sigma), amplitude in zip(self.blobs, self.amplitudes[:, c], strict=True):
                coarse += amplitude * np.exp(-((rx - x) ** 2 + (ry - y) ** 2) / (2 * sigma**2))
            if self.disc:
                # an edge that samples eight pixels apart can tell
                coarse += self.disc[1 + c] * np.exp(-((self._from_middle(rx, ry) / self.disc[0]) ** 8))
            out[c] = RectBivariateSpline(ys, xs, coarse)(rows, columns)
        return out

    def _from_middle(self, rx: np.ndarray, ry: np.ndarray) -> np.ndarray:
        """Distance from the reference point, in reference pixels."""
        x, y = np.asarray(self.wcs.wcs.crpix) - 1
        return np.hypot(rx - x, ry - y)

    def star_field(self, wcs: WCS, shape: tuple[int, int], fwhm: float) -> np.ndarray:
        """The stars alone, float64 (C, H, W)."""
        out = np.zeros((self.channels, *shape))
        sigma = fwhm * FWHM_TO_SIGMA
        reach = int(np.ceil(5 * sigma))
        _, xs, ys, fluxes = self.stars_on(wcs, shape)
        near = (xs > -reach) & (xs < shape[1] + reach) & (ys > -reach) & (ys < shape[0] + reach)
        for x, y, flux in zip(xs[near], ys[near], fluxes[near], strict=True):
            i, j = round(float(x)), round(float(y))
            rows = np.arange(max(j - reach, 0), min(j + reach + 1, shape[0]))
            columns = np.arange(max(i - reach, 0), min(i + reach + 1, shape[1]))
            if not rows.size or not columns.size:
                continue
            profile = np.exp(-((rows - y) ** 2)[:, None] / (2 * sigma**2)) * np.exp(
                -((columns - x) ** 2)[None, :] / (2 * sigma**2)
            )
            window = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            out[window] += flux[:, None, None] * profile / (2 * np.pi * sigma**2)
        return out


@dataclass(frozen=True)
class Panel:
    """One panel: pixels (C, H, W) float32 with NaN for "no data", and the truth about it, in the panel's own units.

    ``polynomial`` (C, 5) holds the coefficients of its gradient (`synthetic.gradients`), ``vignetting`` what is missing
    in the corner, ``ceiling`` the highest value that a pixel can have, ``fwhm`` is in its own pixels.
    """

    data: np.ndarray
    wcs: WCS
    gain: np.ndarray  # (C,)
    offset: np.ndarray  # (C,)
    noise: float
    fwhm: float
    polynomial: np.ndarray | None = None
    vignetting: float = 0.0
    ceiling: float | None = None

    @property
    def gradient(self) -> np.ndarray:
        """What was added to the sky besides the offset, float64 (C, H, W)."""
        shape = self.data.shape[-2:]
        return np.zeros((len(self.gain), *shape)) if self.polynomial is None else gradient_image(self.polynomial, shape)

    @property
    def true_sky(self) -> np.ndarray:
        """The sky with the panel's noise, float32 (C, H, W): all that the instrument did to it is taken back."""
        light = self.data / vignetting_image(self.data.shape[-2:], self.vignetting)
        light = light - self.offset[:, None, None] - self.gradient
        return (light / self.gain[:, None, None]).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """How a set of panels is taken; see :func:`make_panels`.

    Lengths are in pixels of the sky's reference plane, or of a panel (``shape``, ``nan_border``, ``sip_pixels``, with
    relative ``pixel_scales`` other than 1 ``shape`` is that of a panel of scale 1). ``noise`` is one pixel's; ``plane``,
    ``curvature`` and ``common_curvature`` are ranges over a tile in units of it (`synthetic.gradients.random_gradient`).
    ``vignetting`` is the part of the light that is missing in the corner. ``exposures`` and ``clouds`` (a range, the
    logarithm is uniform) multiply gains, ``units`` all that a panel holds, its noise and ``ceiling`` included.
    Sequences are gone through again and again, panel by panel.
    """

    rows: int = 3
    columns: int = 3
    shape: tuple[int, int] = (480, 640)
    overlap: float = 0.18
    gain_sigma: float = 0.15
    offset_sigma: float = 120.0
    noise: float = 12.0
    rotation_deg: float = 0.0
    sip: bool = False
    nan_border: int = 0
    fwhm: Sequence[float] = (3.0,)
    noise_factor: dict[int, float] = field(default_factory=dict)
    gap_after_column: int | None = None
    channels: int = 3
    sip_pixels: float = 2.0
    pixel_scales: Sequence[float] = (1.0,)
    plane: float = 0.0
    curvature: float = 0.0
    common_curvature: float = 0.0
    vignetting: float = 0.0
    exposures: Sequence[float] = (1.0,)
    clouds: tuple[float, float] = (1.0, 1.0)
    ceiling: float | None = None
    units: dict[int, float] = field(default_factory=dict)


def pixel_solid_angle(wcs: WCS, x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """Solid angle in steradian of the pixels at some positions.

    The parallelogram of the displacements on the unit sphere from x - 1/2 to x + 1/2 and from y - 1/2 to y + 1/2.
    """

    def direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        ra, dec = (np.deg2rad(angle) for angle in wcs.pixel_to_world_values(x, y))
        return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)

    x, y = np.asarray(x, float), np.asarray(y, float)
    across = direction(x + 0.5, y) - direction(x - 0.5, y)
    up = direction(x, y + 0.5) - direction(x, y - 0.5)
    return np.linalg.norm(np.cross(across, up), axis=-1)


def tangent_wcs(
    shape: tuple[int, int],
    centre_deg: tuple[float, float],
    scale_arcsec: float = 4.0,
    rotation_deg: float = 0.0,
) -> WCS:
    """TAN WCS with its reference point in the middle of the image, north up, east left, then rotated."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = centre_deg
    wcs.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    a = np.deg2rad(rotation_deg)
    scale = scale_arcsec / 3600
    wcs.wcs.cd = scale * np.array([[-np.cos(a), np.sin(a)], [np.sin(a), np.cos(a)]])
    wcs.wcs.set()
    return wcs


def add_sip(wcs: WCS, shape: tuple[int, int], pixels: float = 2.0) -> WCS:
    """The same WCS with a SIP distortion that reaches ``pixels`` at the edge (cubic barrel plus a quadratic term)."""
    half = max(shape) / 2
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    a[3, 0] = a[1, 2] = pixels / half**3
    b[0, 3] = b[2, 1] = pixels / half**3
    a[1, 1], b[2, 0] = 0.4 * pixels / half**2, -0.3 * pixels / half**2
    header = wcs.to_header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    distorted = WCS(header)
    distorted.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    distorted.wcs.set()
    return distorted


def make_sky(
    shape: tuple[int, int],
    seed: int = 1,
    stars: int = 4000,
    centre_deg: tuple[float, float] = (83.8, -5.4),
    scale_arcsec: float = 4.0,
    channels: int = 3,
    nebula: float = 1.0,
    disc: tuple[float, float] | None = None,
) -> Sky:
    """A sky that fills ``shape`` pixels: star fluxes follow a power law (dN/dF ~ F^-1.7) between 5e3 and 5e5.

    ``nebula`` scales the brightness of the nebula, 0 is none; ``disc`` adds one of this radius (pixels) and brightness
    to the middle, in all channels alike.
    """
    rng = np.random.default_rng(seed)
    height, width = shape
    positions = rng.uniform([-20, -20], [width + 20, height + 20], (stars, 2))
    low, high, slope = 5e3, 5e5, -0.7
    u = rng.uniform(size=stars)
    flux = (low**slope + u * (high**slope - low**slope)) ** (1 / slope)
    colour = np.exp(rng.normal(0, 0.3, (stars, channels)))
    count = 60
    size = min(shape)
    blobs = np.column_stack(
        [
            rng.uniform(0, width, count),
            rng.uniform(0, height, count),
            size * np.exp(rng.uniform(np.log(0.02), np.log(0.25), count)),
        ]
    )
    amplitudes = rng.uniform(20, 250, (count, 1)) * rng.uniform(0.4, 1.6, (count, channels))
    level = np.array([1000.0, 1150.0, 900.0, 1050.0])[:channels]
    return Sky(
        tangent_wcs(shape, centre_deg, scale_arcsec),
        positions,
        flux[:, None] * colour,
        blobs,
        nebula * amplitudes,
        level,
        () if disc is None else (disc[0], *[disc[1]] * channels),
    )


def mosaic_shape(layout: Layout) -> tuple[int, int]:
    """Shape in pixels of the sky that a layout covers, with a margin for rotation."""
    pitch = [n * (1 - layout.overlap) for n in layout.shape]
    height = pitch[0] * (layout.rows - 1) + layout.shape[0]
    width = pitch[1] * (layout.columns - 1) + layout.shape[1]
    if layout.gap_after_column is not None:
        width += layout.shape[1]
    return int(height) + 40, int(width) + 40


def panel_shape(layout: Layout, number: int) -> tuple[int, int]:
    """Rows and columns of a panel, whatever its pixels the same field."""
    scale = layout.pixel_scales[number % len(layout.pixel_scales)]
    return round(layout.shape[0] / scale), round(layout.shape[1] / scale)


def panel_wcs(layout: Layout, sky: Sky, row: int, column: int, rotation_deg: float) -> WCS:
    """WCS of the panel in this row and column."""
    pitch = [n * (1 - layout.overlap) for n in layout.shape]
    y = 20 + layout.shape[0] / 2 + row * pitch[0]
    x = 20 + layout.shape[1] / 2 + column * pitch[1]
    if layout.gap_after_column is not None and column > layout.gap_after_column:
        x += layout.shape[1]
    number = row * layout.columns + column
    shape = panel_shape(layout, number)
    scale = 3600 * abs(sky.wcs.wcs.cd[0, 0]) * layout.pixel_scales[number % len(layout.pixel_scales)]
    ra, dec = sky.wcs.pixel_to_world_values(x, y)
    # the sub-pixel phase of every panel is its own, as it is on the sky
    wcs = tangent_wcs(shape, (float(ra), float(dec)), scale, rotation_deg)
    return add_sip(wcs, shape, layout.sip_pixels) if layout.sip else wcs


def make_panels(layout: Layout, sky: Sky, seed: int = 2) -> list[Panel]:
    """Panels of a sky, row by row; the rotation alternates between plus and minus half of ``rotation_deg``."""
    rng = np.random.default_rng(seed)
    # of its own: gradients and clouds leave all else as it is
    weather = np.random.default_rng([seed, 1])
    return [_make_panel(layout, sky, k, rng, weather) for k in range(layout.rows * layout.columns)]


def _make_panel(layout: Layout, sky: Sky, k: int, rng: np.random.Generator, weather: np.random.Generator) -> Panel:
    """Panel ``k`` of a layout."""
    row, column = divmod(k, layout.columns)
    wcs = panel_wcs(layout, sky, row, column, layout.rotation_deg * (0.5 if k % 2 else -0.5))
    shape = panel_shape(layout, k)
    gain = np.exp(rng.normal(0, layout.gain_sigma, sky.channels))
    gain = gain * layout.exposures[k % len(layout.exposures)] * np.exp(weather.uniform(*np.log(layout.clouds)))
    offset = rng.normal(0, layout.offset_sigma, sky.channels)
    sizes = layout.noise * np.array([layout.plane, layout.curvature, layout.common_curvature])
    polynomial = random_gradient(shape, sky.channels, weather, *sizes)
    fwhm = layout.fwhm[k % len(layout.fwhm)] / layout.pixel_scales[k % len(layout.pixel_scales)]
    noise = layout.noise * layout.noise_factor.get(k, 1.0)
    light = sky.image(wcs, shape, fwhm) * gain[:, None, None] + offset[:, None, None]
    light += gradient_image(polynomial, shape)
    data = light * vignetting_image(shape, layout.vignetting) + rng.normal(0, noise, light.shape)
    data = (np.minimum(data, layout.ceiling or np.inf) * (unit := layout.units.get(k, 1.0))).astype(np.float32)
    if layout.nan_border:
        _blank_border(data, layout.nan_border, rng)
    top = layout.ceiling and unit * layout.ceiling
    return Panel(data, wcs, unit * gain, unit * offset, unit * noise, fwhm, unit * polynomial, layout.vignetting, top)


def _blank_border(data: np.ndarray, width: int, rng: np.random.Generator) -> None:
    """Set an uneven border of up to ``width`` pixels to NaN, as registration leaves it."""
    top, bottom, left, right = rng.integers(width // 3, width + 1, 4)
    data[:, :top] = np.nan
    data[:, data.shape[1] - bottom :] = np.nan
    data[:, :, :left] = np.nan
    data[:, :, data.shape[2] - right :] = np.nan


def write_panels(panels: Sequence[Panel], folder: Path, dtype: str = "float32") -> list[Path]:
    """Write panels as ``panel_00.fits`` ... in ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, panel in enumerate(panels):
        header = panel.wcs.to_header(relax=True)
        header["HIERARCH MT_NFRAMES"] = (1, "frames in this panel")
        path = folder / f"panel_{k:02d}.fits"
        data = panel.data if dtype == "float32" else np.clip(np.rint(np.nan_to_num(panel.data)), 0, 65535)
        fits.PrimaryHDU(data.astype(dtype), header).writeto(path, overwrite=True)
        paths.append(path)
    return paths


def write_demo(folder: Path) -> tuple[Path, Path]:
    """A 3 x 3 set of panels with different gain, offset and rotation in ``folder/panels``.

    Returns
    -------
    input_dir, output_dir : Path
    """
    layout = Layout(gain_sigma=0.2, rotation_deg=8.0)
    sky = make_sky(mosaic_shape(layout), seed=7)
    write_panels(make_panels(layout, sky, seed=8), folder / "panels")
    return folder / "panels", folder / "mosaic"
