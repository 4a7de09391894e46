"""A synthetic night of a smart telescope: raw Bayer frames of a known sky, and the truth about them.

The sky is real stars (`synthetic.night_stars`: a plate solver knows them), fainter random ones and a smooth coloured
nebula. A frame sees it through its own WCS, transparency and sky glow::

    adu = bias + flat * (transparency * (nebula + stars) + glow + trails) + hot pixels + noise

sampled once per pixel in the colour that the Bayer pattern has there; the noise is Gaussian with the variance of photons
and of reading. Nothing here is shared with the code under test: positions come from astropy alone, no pixel is ever
interpolated, and each frame depends on the seed and its own number, not on the frames before it.

Frames are as a flat of the sky leaves them, divided by the solid angle of their pixels: the nebula keeps its brightness
everywhere, and a star's pixel sum goes with the inverse of the solid angle of a pixel where it lies.

Limitations: the point spread function is the same in all colours and all over the frame.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_pipeline.synthetic.night_stars import field_stars
from zemosaic_pipeline.synthetic.panels import add_sip, pixel_solid_angle, tangent_wcs

FIELD_DEG = (98.0, 4.9)
#: Half the width and the height of the sky that is filled with stars, degrees.
HALF_SIZE_DEG = (1.4, 1.8)
#: Flux (ADU, all pixels) of a star of magnitude 8 in green; stars of 7.3 and brighter saturate.
FLUX_OF_MAG_8 = 5e5
#: Moffat profile with beta = 4: full width at half maximum over its scale length.
FWHM_OVER_ALPHA = 2 * np.sqrt(2**0.25 - 1)
#: A star's image ends where it is fainter than this (ADU).
FAINTEST_ADU = 0.005
SATURATION = 65535
FOCAL_MM = 250.0
EXPOSURE_S = 10.0
COLOURS = "RGB"


@dataclass(frozen=True)
class Night:
    """What is taken, and how badly; every frame follows from this alone.

    ``shape`` (rows, columns) in pixels of ``scale`` arcsec; brightness and noise in ADU. ``rotation_deg`` is how far an
    alt-az mount turns the field over one panel; ``drift_px`` and ``dither_px`` how far the pointing creeps and jumps;
    ``clouds`` the scatter of the logarithm of the transparency; ``trails`` the satellites. With ``bad_frames`` one frame
    is clouded and one trailed. With ``flip`` the second half of each panel is taken the next night, turned by 180
    degrees. ``with_wcs`` writes the WCS into the headers, shifted at random by ``wcs_error_px`` (sigma).
    """

    rows: int = 2
    columns: int = 2
    frames: int = 25
    shape: tuple[int, int] = (1920, 1080)
    scale: float = 2.39
    overlap: float = 0.18
    seed: int = 1
    pattern: str = "GRBG"
    fwhm: float = 3.0
    faint_per_megapixel: float = 1200.0
    nebula: float = 1.0
    rotation_deg: float = 3.0
    drift_px: float = 14.0
    dither_px: float = 4.0
    clouds: float = 0.06
    bias: float = 256.0
    glow: tuple[float, float, float] = (180.0, 240.0, 150.0)
    electrons_per_adu: float = 1.0
    read_noise: float = 5.0
    hot: int = 3000
    warm: int = 3000
    trails: int = 3
    bad_frames: bool = True
    vignetting: float = 0.0
    sip_px: float = 0.0
    altaz: bool = True
    flip: bool = False
    with_wcs: bool = False
    wcs_error_px: float = 0.0

    @property
    def panels(self) -> int:
        return self.rows * self.columns

    @property
    def total(self) -> int:
        return self.panels * self.frames


#: Small enough to be made, solved and stacked in about a minute: half the pixels of the telescope on a side.
DEMO = Night(frames=8, shape=(960, 540), scale=4.78, hot=1000, warm=1000, drift_px=8.0)


@dataclass(frozen=True)
class Trail:
    """A satellite's trail in the pixels of its frame (0-based): a straight line with a Gaussian profile."""

    x0: float
    y0: float
    x1: float
    y1: float
    peak: float  # ADU
    sigma: float  # pixels


@dataclass(frozen=True, eq=False)
class FrameTruth:
    """What is true of one frame. ``wcs`` is the true one, ``glow`` (3,) and ``transparency`` as in the formula above.

    ``streak`` is how far the stars trail, (dx, dy) in pixels; (0, 0) in all but one frame. ``kind`` is "good", "cloudy"
    or "trailed".
    """

    index: int
    name: str
    panel: int
    kind: str
    wcs: WCS
    transparency: float
    glow: np.ndarray
    fwhm: float
    streak: tuple[float, float]
    trails: tuple[Trail, ...]
    date: datetime
    pointing: tuple[float, float]  # degrees, as the header tells it: some arcmin off


@dataclass(frozen=True, eq=False)
class Truth:
    """The sky of a night and its frames.

    ``ra``, ``dec`` (n,) degrees and ``flux`` (n, 3) ADU of the stars, real ones first; ``hot`` int (m, 2) row and column
    of the bad pixels and ``hot_level`` (m,) their ADU, hot ones before warm ones; ``blobs`` (k, 3) the nebula's
    Gaussians: xi, eta, sigma in degrees on the tangent plane at ``FIELD_DEG``; ``amplitudes`` (k, 3).
    """

    night: Night
    frames: tuple[FrameTruth, ...]
    ra: np.ndarray
    dec: np.ndarray
    flux: np.ndarray
    hot: np.ndarray
    hot_level: np.ndarray
    blobs: np.ndarray
    amplitudes: np.ndarray
    flat: np.ndarray | None = field(default=None)

    def frame(self, name: str) -> FrameTruth:
        """The frame of this file name (with or without folders)."""
        return next(f for f in self.frames if f.name == Path(name).name)

    def sky(self, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
        """Surface brightness of the nebula in ADU a pixel at positions in degrees, float64 (3, ...)."""
        xi, eta = gnomonic(np.asarray(ra, float), np.asarray(dec, float), FIELD_DEG)
        out = np.zeros((3, *xi.shape))
        for (x, y, sigma), amplitude in zip(self.blobs, self.amplitudes, strict=True):
            shape = np.exp(-((xi - x) ** 2 + (eta - y) ** 2) / (2 * sigma**2))
            out += amplitude.reshape(3, *[1] * xi.ndim) * shape
        return out

    def nebula(self, wcs: WCS, shape: tuple[int, int]) -> np.ndarray:
        """The nebula on a pixel grid, float32 (3, H, W): every 16th pixel, and cubic splines between them."""
        from scipy.interpolate import RectBivariateSpline

        ys, xs = (np.linspace(0, n - 1, max(n // 16, 6)) for n in shape)
        coarse = self.sky(*wcs.pixel_to_world_values(*np.meshgrid(xs, ys)))
        rows, columns = np.arange(shape[0]), np.arange(shape[1])
        return np.stack([RectBivariateSpline(ys, xs, c)(rows, columns).astype(np.float32) for c in coarse])

    def star_field(self, wcs: WCS, shape: tuple[int, int], fwhm: float | None = None) -> np.ndarray:
        """The stars on a pixel grid, float64 (3, H, W), unsaturated; ``fwhm`` in its pixels."""
        x, y, flux = self.stars_on(wcs, shape)
        out = np.zeros((3, *shape))
        for c in range(3):
            _add_stars(out[c], x, y, flux[:, c : c + 1], fwhm or self.night.fwhm, np.zeros((2, 2), np.int64))
        return out

    def stars_on(self, wcs: WCS, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels x, y (n,) of the stars on and close around a pixel grid, and their sums (n, 3) over its pixels.

        A star's flux is its sum over pixels of the frames' nominal scale.
        """
        height, width = shape
        centre = wcs.pixel_to_world_values((width - 1) / 2, (height - 1) / 2)
        ra, dec = wcs.pixel_to_world_values([0, 0, width - 1, width - 1], [0, height - 1] * 2)
        corners = gnomonic(ra, dec, centre)
        # far from the grid a distortion has no inverse
        near = np.hypot(*gnomonic(self.ra, self.dec, centre)) < 1.05 * np.hypot(*corners).max()
        x, y = wcs.world_to_pixel_values(self.ra[near], self.dec[near])
        nominal = np.deg2rad(self.night.scale / 3600) ** 2
        return x, y, self.flux[near] * (nominal / pixel_solid_angle(wcs, x, y))[:, None]

    def image(self, wcs: WCS, shape: tuple[int, int], fwhm: float | None = None) -> np.ndarray:
        """Nebula and stars as seen without air, glow or noise, float64 (3, H, W)."""
        return self.nebula(wcs, shape) + self.star_field(wcs, shape, fwhm)


def write_night(
    folder: Path,
    night: Night = DEMO,
    *,
    only: Callable[[FrameTruth], bool] | None = None,
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Truth]:
    """Write the frames of a night into ``folder/lights``; returns that folder and the truth.

    ``only`` picks the frames to be written (the others stay in the truth); ``progress(done, total)`` is called after
    each frame.
    """
    truth = night_truth(night)
    lights = folder / "lights"
    lights.mkdir(parents=True, exist_ok=True)
    wanted = [f for f in truth.frames if only is None or only(f)]

    def write(frame: FrameTruth) -> None:
        fits.PrimaryHDU(render(truth, frame), seestar_header(night, frame)).writeto(lights / frame.name, overwrite=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done, _ in enumerate(pool.map(write, wanted), 1):
            if progress:
                progress(done, len(wanted))
    return lights, truth


def write_calibration(folder: Path, night: Night, count: int = 5) -> dict[str, Path]:
    """Write ``count`` raw darks, flats and biases into folders of these names; returns the folders by name.

    The flats are of a coloured dusk: red and blue are fainter than green.
    """
    truth = night_truth(night)
    channel = pattern_channels(night.pattern)
    flat = (
        20000 * (1.0 if truth.flat is None else truth.flat) * np.array([0.8, 1.0, 0.7])[_mosaic(channel, night.shape)]
    )
    hot = np.zeros(night.shape)
    hot[tuple(truth.hot.T)] = truth.hot_level
    kinds = {"dark": (hot, EXPOSURE_S), "flat": (flat, 1.0), "bias": (np.zeros(night.shape), 0.001)}
    folders = {}
    for number, (kind, (signal, exposure)) in enumerate(kinds.items()):
        folders[kind] = folder / f"{kind}s"
        folders[kind].mkdir(parents=True, exist_ok=True)
        for k in range(count):
            rng = np.random.default_rng([night.seed, 5, number, k])
            header = seestar_header(night, replace(truth.frames[0], trails=()))
            header["IMAGETYP"], header["EXPTIME"], header["EXPOSURE"] = kind.capitalize(), exposure, exposure
            path = folders[kind] / f"{kind}_{k:02d}.fit"
            fits.PrimaryHDU(_expose(signal, night, rng), header).writeto(path, overwrite=True)
    return folders


# ---- the truth


def night_truth(night: Night) -> Truth:
    """All that is known of a night, without making its frames."""
    ra, dec, flux = _stars(night)
    blobs, amplitudes = _nebula(night)
    rng = np.random.default_rng([night.seed, 3])
    bad = rng.choice(night.shape[0] * night.shape[1], night.hot + night.warm, replace=False)
    level = np.concatenate(
        [np.exp(rng.uniform(np.log(300), np.log(30000), night.hot)), rng.uniform(30, 150, night.warm)]
    )
    flat = None
    if night.vignetting:
        y, x = (np.linspace(-1, 1, n) for n in night.shape)
        flat = 1 - night.vignetting * (x[None, :] ** 2 + y[:, None] ** 2) / 2
    frames = tuple(_frame_truth(night, k) for k in range(night.total))
    hot = np.stack(np.unravel_index(bad, night.shape), axis=1)
    return Truth(night, frames, ra, dec, flux, hot, level, blobs, amplitudes, flat)


def gnomonic(ra: np.ndarray, dec: np.ndarray, centre_deg: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Tangent plane coordinates xi (east), eta (north) in degrees (Calabretta & Greisen 2002, section 5.1.3)."""
    a, d = np.deg2rad(ra - centre_deg[0]), np.deg2rad(dec)
    d0 = np.deg2rad(centre_deg[1])
    below = np.sin(d) * np.sin(d0) + np.cos(d) * np.cos(d0) * np.cos(a)
    xi = np.cos(d) * np.sin(a) / below
    eta = (np.sin(d) * np.cos(d0) - np.cos(d) * np.sin(d0) * np.cos(a)) / below
    return np.rad2deg(xi), np.rad2deg(eta)


def _stars(night: Night) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and fluxes: the real stars, then random ones (dN/dF ~ F^-2) of 1/2000 to 1/20 of magnitude 8."""
    rng = np.random.default_rng([night.seed, 1])
    real = field_stars()
    area = 4 * HALF_SIZE_DEG[0] * HALF_SIZE_DEG[1] * (3600 / night.scale) ** 2 / 1e6
    count = int(area * night.faint_per_megapixel)
    x, y = (rng.uniform(-h, h, count) for h in HALF_SIZE_DEG)
    low, high, slope = FLUX_OF_MAG_8 / 2000, FLUX_OF_MAG_8 / 20, -1.0
    faint = (low**slope + rng.uniform(size=count) * (high**slope - low**slope)) ** (1 / slope)
    dec = FIELD_DEG[1] + y
    ra = FIELD_DEG[0] + x / np.cos(np.deg2rad(dec))
    flux = np.concatenate([FLUX_OF_MAG_8 * 10 ** (-0.4 * (real[:, 2] - 8)), faint])
    colour = np.exp(rng.normal(0, 0.25, (len(flux), 3)))
    colour[:, 1] = 1
    return np.concatenate([real[:, 0], ra]), np.concatenate([real[:, 1], dec]), flux[:, None] * colour


def _nebula(night: Night) -> tuple[np.ndarray, np.ndarray]:
    """A reddish ring about the middle of the field, and coloured clouds."""
    rng = np.random.default_rng([night.seed, 2])
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    ring = np.column_stack([0.42 * np.cos(angle), 0.42 * np.sin(angle), rng.uniform(0.09, 0.16, len(angle))])
    clouds = np.column_stack(
        [rng.uniform(-1.1, 1.1, 24), rng.uniform(-1.5, 1.5, 24), np.exp(rng.uniform(np.log(0.07), np.log(0.5), 24))]
    )
    red = rng.uniform(80, 200, (14, 1)) * np.array([1.3, 0.6, 0.7])
    many = rng.uniform(15, 90, (24, 1)) * rng.uniform(0.4, 1.6, (24, 3))
    return np.concatenate([ring, clouds]), night.nebula * np.concatenate([red, many])


def panel_centre(night: Night, panel: int) -> tuple[float, float]:
    """Right ascension and declination of the middle of a panel, degrees; panel 0 is the south-eastern one."""
    row, column = divmod(panel, night.columns)
    pitch = [n * (1 - night.overlap) for n in night.shape]
    reference = tangent_wcs((1, 1), FIELD_DEG, night.scale)
    ra, dec = reference.pixel_to_world_values(
        (column - (night.columns - 1) / 2) * pitch[1], (row - (night.rows - 1) / 2) * pitch[0]
    )
    return float(ra), float(dec)


def _frame_truth(night: Night, index: int) -> FrameTruth:
    """Everything about one frame; depends on the seed and the number alone."""
    panel, k = divmod(index, night.frames)
    rng = np.random.default_rng([night.seed, 4, index])
    part = k / max(night.frames - 1, 1) - 0.5
    kind = _kind(night, index)
    wcs = _true_wcs(night, panel, k, part, rng)
    transparency = np.exp(-abs(rng.normal(0, night.clouds)) - 0.1 * index / night.total)
    glow = np.array(night.glow) * (1 + 0.3 * index / night.total + rng.normal(0, 0.02) + rng.normal(0, 0.005, 3))
    if kind == "cloudy":
        transparency, glow = 0.25 * transparency, 2.5 * glow
    angle = rng.uniform(0, np.pi)
    streak = (12 * np.cos(angle), 12 * np.sin(angle)) if kind == "trailed" else (0.0, 0.0)
    trails = tuple(_trail(night, rng) for _ in range(_trail_count(night, index)))
    fwhm = night.fwhm * (1 + rng.normal(0, 0.03))
    date = datetime(2024, 12, 5, 20, 10) + timedelta(seconds=12 * index + 90 * panel)
    if night.flip and 2 * k >= night.frames:
        date += timedelta(days=1)
    # the telescope's own idea of where it looks: wrong alike for a whole panel
    lie = np.random.default_rng([night.seed, 6, panel]).normal(0, 3 / 60, 2)
    centre = panel_centre(night, panel)
    name = f"Light_NGC 2244_{EXPOSURE_S:.1f}s_IRCUT_{date:%Y%m%d-%H%M%S}.fit"
    pointing = (centre[0] + lie[0], centre[1] + lie[1])
    return FrameTruth(
        index, name, panel, kind, wcs, float(transparency), glow, float(fwhm), streak, trails, date, pointing
    )


def _kind(night: Night, index: int) -> str:
    if night.bad_frames and index == night.total // 3:
        return "cloudy"
    if night.bad_frames and index == 2 * night.total // 3 + 1:
        return "trailed"
    return "good"


def _trail_count(night: Night, index: int) -> int:
    """How many satellites cross a frame: they are spread over the good frames of the night."""
    good = [k for k in range(night.total) if _kind(night, k) == "good"]
    return sum(good[(2 * t + 1) * len(good) // (2 * night.trails)] == index for t in range(night.trails))


def _true_wcs(night: Night, panel: int, k: int, part: float, rng: np.random.Generator) -> WCS:
    """The frame's WCS: the panel's middle, moved by drift and dither, turned as an alt-az mount turns the field."""
    turn = night.rotation_deg * (part + 0.4 * (panel - (night.panels - 1) / 2)) if night.altaz else 0.4
    if night.flip and 2 * k >= night.frames:
        turn += 180.0
    plane = tangent_wcs((1, 1), panel_centre(night, panel), night.scale)
    x, y = night.drift_px * part * np.array([1.0, -0.6]) + rng.normal(0, night.dither_px, 2)
    ra, dec = plane.pixel_to_world_values(x, y)
    wcs = tangent_wcs(night.shape, (float(ra), float(dec)), night.scale, turn)
    return add_sip(wcs, night.shape, night.sip_px) if night.sip_px else wcs


def _trail(night: Night, rng: np.random.Generator) -> Trail:
    """A line from the left to the right edge or from the lower to the upper one."""
    height, width = night.shape
    a, b = rng.uniform(0.15, 0.85, 2)
    ends = (0, a * height, width - 1, b * height) if rng.uniform() < 0.5 else (a * width, 0, b * width, height - 1)
    x0, y0, x1, y1 = map(float, ends)
    return Trail(x0, y0, x1, y1, peak=float(rng.uniform(300, 1500)), sigma=float(rng.uniform(1.2, 2.0)))


# ---- the pixels


def render(truth: Truth, frame: FrameTruth) -> np.ndarray:
    """One raw frame, uint16 (H, W)."""
    night = truth.night
    rng = np.random.default_rng([night.seed, 7, frame.index])
    signal = expected(truth, frame)
    return _expose(signal, night, rng)


def expected(truth: Truth, frame: FrameTruth) -> np.ndarray:
    """What a frame would hold without noise, saturation and bias, float64 (H, W), Bayer."""
    night = truth.night
    channel = pattern_channels(night.pattern)
    nebula = truth.nebula(frame.wcs, night.shape)
    light = np.zeros(night.shape)
    for i, j in np.ndindex(2, 2):
        c = channel[i, j]
        light[i::2, j::2] = frame.transparency * nebula[c, i::2, j::2] + frame.glow[c]
    x, y, flux = truth.stars_on(frame.wcs, night.shape)
    steps = 17 if any(frame.streak) else 1
    for s in np.linspace(-0.5, 0.5, steps) if steps > 1 else [0.0]:
        dx, dy = s * frame.streak[0], s * frame.streak[1]
        _add_stars(light, x + dx, y + dy, flux * (frame.transparency / steps), frame.fwhm, channel)
    for trail in frame.trails:
        light += trail.peak * np.exp(-(_distance(trail, night.shape) ** 2) / (2 * trail.sigma**2))
    if truth.flat is not None:
        light *= truth.flat
    light[tuple(truth.hot.T)] += truth.hot_level
    return light


def _expose(signal: np.ndarray, night: Night, rng: np.random.Generator) -> np.ndarray:
    """Photon and read noise, bias, rounding and saturation."""
    sigma = np.sqrt(signal / night.electrons_per_adu + night.read_noise**2)
    noise = rng.standard_normal(signal.shape, np.float32) * sigma
    return np.clip(np.rint(signal + night.bias + noise), 0, SATURATION).astype(np.uint16)


def pattern_channels(pattern: str) -> np.ndarray:
    """Channel (0 red, 1 green, 2 blue) of the pixel in row i, column j of each 2 x 2 cell, int (2, 2)."""
    return np.array([COLOURS.index(letter) for letter in pattern]).reshape(2, 2)


def _mosaic(channel: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The 2 x 2 cell repeated over an image."""
    return np.tile(channel, [(n + 1) // 2 for n in shape])[: shape[0], : shape[1]]


def _distance(trail: Trail, shape: tuple[int, int]) -> np.ndarray:
    """Distance of every pixel from the line of a trail, pixels."""
    dx, dy = trail.x1 - trail.x0, trail.y1 - trail.y0
    y, x = (np.arange(n, dtype=np.float32) for n in shape)
    return (dy * (x[None, :] - trail.x0) - dx * (y[:, None] - trail.y0)) / np.hypot(dx, dy)


def _add_stars(
    image: np.ndarray, x: np.ndarray, y: np.ndarray, flux: np.ndarray, fwhm: float, channel: np.ndarray
) -> None:
    """Add Moffat stars to an image (H, W) in place; pixel (i, j) sees ``flux[:, channel[i % 2, j % 2]]``."""
    alpha = fwhm / FWHM_OVER_ALPHA
    peak = 3 * flux.max(axis=1) / (np.pi * alpha**2)
    reach = np.ceil(alpha * np.sqrt(np.maximum((peak / FAINTEST_ADU) ** 0.25, 2) - 1))
    near = (x > -reach) & (x < image.shape[1] + reach) & (y > -reach) & (y < image.shape[0] + reach)
    _star_kernel()(image, x[near], y[near], flux[near], reach[near], alpha, channel)


@cache
def _star_kernel() -> Callable:
    """The compiled loop over stars; numba is loaded when the first star is drawn."""
    import numba

    def add(image, xs, ys, flux, reach, alpha, channel):
        height, width = image.shape
        norm = 3 / (np.pi * alpha * alpha)
        for k in range(len(xs)):
            r = int(reach[k])
            j0, i0 = round(xs[k]), round(ys[k])
            for i in range(max(i0 - r, 0), min(i0 + r + 1, height)):
                for j in range(max(j0 - r, 0), min(j0 + r + 1, width)):
                    q = 1 + ((i - ys[k]) ** 2 + (j - xs[k]) ** 2) / (alpha * alpha)
                    image[i, j] += flux[k, channel[i % 2, j % 2]] * norm / (q * q * q * q)

    return numba.njit(nogil=True)(add)


# ---- the header


def seestar_header(night: Night, frame: FrameTruth) -> fits.Header:
    """The header of a Seestar's raw frame: no WCS but the pointing (unless the night is written with it)."""
    header = fits.Header()
    pixel_um = round(night.scale * FOCAL_MM / 206.265, 3)
    cards = {
        "CREATOR": "ZWO Seestar S50", "XORGSUBF": 0, "YORGSUBF": 0, "FOCALLEN": FOCAL_MM,
        "XBINNING": 1, "YBINNING": 1, "CCDXBIN": 1, "CCDYBIN": 1, "XPIXSZ": pixel_um, "YPIXSZ": pixel_um,
        "IMAGETYP": "Light", "EXPOSURE": EXPOSURE_S, "EXPTIME": EXPOSURE_S, "CCD-TEMP": 12.5,
        "RA": round(frame.pointing[0], 6), "DEC": round(frame.pointing[1], 6),
        "DATE-OBS": frame.date.isoformat(timespec="microseconds"), "FILTER": "IRCUT", "INSTRUME": "Seestar S50",
        "BAYERPAT": night.pattern, "GAIN": 80, "FOCUSPOS": 1580, "OBJECT": "NGC 2244",
        "TELESCOP": "S50_synthetic", "EQMODE": 0 if night.altaz else 1,
    }  # fmt: skip
    header.update(cards)
    if night.with_wcs:
        wcs = frame.wcs.deepcopy()
        shift = np.random.default_rng([night.seed, 8, frame.index]).normal(0, 1, 2) * night.wcs_error_px
        wcs.wcs.crpix = wcs.wcs.crpix + shift
        if wcs.sip is not None:
            wcs.sip.crpix[:] = wcs.wcs.crpix
        header.update(wcs.to_header(relax=True))
    return header
