"""Judges of a stacked night: master tiles and mosaic against the true sky of `synthetic.night`.

Each judge is a function from pixels and truth to numbers; `raw_to_tiles.py` runs the worker and prints them. An image is
first brought to the truth with one scale and one offset per channel (`match`), as no program can know the absolute
ones. All numbers in "sigma" are in units of one master tile's noise per pixel.

How noise is measured. Debayering and resampling spread each sample over its neighbours, so that the scatter of the pixels
says little: a smooth kernel lowers it and gains nothing. What no kernel of unit sum changes is the noise *at low
frequency*: the sum of the autocovariance over all lags, which is the variance of the mean of a large area times that
area. For a frame it is k times the variance of one raw sample, where 1 of k pixels has the colour (2 for green, 4 for
red and blue). The sum is taken over lags of up to ``LAGS`` pixels, from pairs of star-free pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from scipy.ndimage import gaussian_filter
from scipy.optimize import root_scalar
from scipy.spatial import KDTree

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from photometry_judge import aperture_sums, fit_to_truth  # noqa: E402

from zemosaic_pipeline.synthetic.night import FrameTruth, Truth  # noqa: E402

LAGS = 5
#: Raw pixels per sample of a colour: red, green, blue.
PIXELS_PER_SAMPLE = (4, 2, 4)
#: Smallest region of the mosaic whose sky is judged (pixels), fewest stars for its colour and for a bin of fluxes.
MIN_PIXELS, COLOUR_STARS, BIN_STARS = 4000, 20, 12
#: Brightest star (ADU in its brightest channel) that no frame saturates, and the range of fluxes that is judged.
BRIGHTEST, DECADES = 5e5, 3


@dataclass(frozen=True, eq=False)
class Picture:
    """A mosaic or a master tile: float (3, H, W) with NaN for "no data", its WCS and name."""

    data: np.ndarray
    wcs: WCS
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[1:]


@dataclass(frozen=True, eq=False)
class Matched:
    """A picture in the truth's units, beside the truth.

    ``values`` and ``image`` (stars and nebula, stars as wide as in the picture) and ``nebula`` are (3, H, W);
    ``star_free`` (H, W) is where no star matters and there are data; ``sigma`` (3,) the picture's noise per pixel.
    """

    picture: Picture
    values: np.ndarray
    image: np.ndarray
    nebula: np.ndarray
    star_free: np.ndarray
    sigma: np.ndarray
    fwhm: float

    @property
    def residual(self) -> np.ndarray:
        """Difference from the truth where no star matters, NaN elsewhere."""
        return np.where(self.star_free, self.values - self.image, np.nan)


@dataclass(frozen=True)
class Verdict:
    """One number, what it may be at most, and what else is to be said."""

    name: str
    value: float
    limit: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.limit)

    def __str__(self) -> str:
        return (
            f"{'PASS' if self.passed else 'FAIL'}  {self.name:34} {self.value:8.3f} {self.unit:6} "
            f"(wanted <= {self.limit:g})  {self.note}"
        )


def read_picture(path: Path) -> Picture:
    """A master tile or science mosaic; NaN where its ALPHA extension is 0."""
    data = np.array(fits.getdata(path), np.float64)
    with fits.open(path) as hdul:
        masked = "ALPHA" in hdul
    if masked:
        data[:, np.asarray(fits.getdata(path, "ALPHA")) == 0] = np.nan
    return Picture(data, WCS(fits.getheader(path), naxis=2), path.name)


def mad_sigma(values: np.ndarray) -> float:
    """Standard deviation of Gaussian noise by the median absolute deviation; NaN are left out."""
    return float(1.4826 * np.nanmedian(np.abs(values - np.nanmedian(values))))


def match(picture: Picture, truth: Truth) -> Matched:
    """Bring a picture to the truth's units and width of stars."""
    nebula = truth.nebula(picture.wcs, picture.shape).astype(np.float64)
    # differences of distant neighbours: the noise without the sky
    rough = np.array([mad_sigma(c[:, 7:] - c[:, :-7]) / np.sqrt(2) for c in picture.data])
    halo = truth.star_field(picture.wcs, picture.shape, 1.3 * truth.night.fwhm).max(axis=0)
    star_free = (halo < 0.05 * rough.min()) & np.isfinite(picture.data).all(axis=0)
    if star_free.sum() < MIN_PIXELS:
        raise ValueError(f"{picture.name}: no star-free sky to match to the truth")
    triples = zip(picture.data, nebula, rough, strict=True)
    values = np.stack([fit_to_truth(v, n, star_free, s) for v, n, s in triples])
    fwhm = width_of_stars(values - nebula, picture.wcs, truth)
    image = nebula + truth.star_field(picture.wcs, picture.shape, fwhm)
    sigma = np.array([mad_sigma(r) for r in np.where(star_free, values - image, np.nan)])
    return Matched(picture, values, image, nebula, star_free, sigma, fwhm)


def whole_pixels(image: np.ndarray) -> np.ndarray:
    """Pixels (H, W) of an image (C, H, W) that hold data in all channels."""
    return np.asarray(np.isfinite(image).all(axis=0))


def stars_inside(truth: Truth, wcs: WCS, good: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Unsaturated stars alone in their aperture and inside ``good`` (H, W): int (n, 2) row, column; fluxes (n, 3)."""
    x, y, flux = truth.stars_on(wcs, good.shape)
    xy, total = np.column_stack([x, y]), flux.mean(axis=1)
    near = KDTree(xy).query_ball_point(xy, 1.7 * radius)
    alone = np.array([total[n].sum() < 1.1 * total[k] for k, n in enumerate(near)], bool)
    at = np.rint(xy[:, ::-1]).astype(int)
    reach = int(radius) + 2
    inside = (at >= reach).all(axis=1) & (at < np.array(good.shape) - reach).all(axis=1)
    pick = alone & inside & (flux.max(axis=1) < BRIGHTEST)
    at, flux = at[pick], flux[pick]
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    whole = good[at[:, :1] + dy, at[:, 1:] + dx].all(axis=1)
    return at[whole], flux[whole]


def width_of_stars(stars: np.ndarray, wcs: WCS, truth: Truth) -> float:
    """Full width at half maximum at which rendered stars are as concentrated as those of a picture (nebula removed)."""
    small, large = 0.75 * truth.night.fwhm, 2.5 * truth.night.fwhm
    at, flux = stars_inside(truth, wcs, whole_pixels(stars), large)
    at = at[np.argsort(flux.mean(axis=1))[::-1][:60]]
    if len(at) < 5:
        return truth.night.fwhm

    def concentration(image: np.ndarray) -> float:
        ratio = aperture_sums(image, at, small).sum(axis=1) / aperture_sums(image, at, large).sum(axis=1)
        return float(np.median(ratio))

    found, shape = concentration(stars), stars.shape[1:]
    low, high = 0.7 * truth.night.fwhm, 2 * truth.night.fwhm

    def excess(fwhm: float) -> float:
        return concentration(truth.star_field(wcs, shape, fwhm)) - found

    if not excess(low) > 0 > excess(high):
        return truth.night.fwhm
    return root_scalar(excess, bracket=(low, high), method="brentq", xtol=0.01).root


# ---- Phase 1: the plate solutions


def solve_rms(frame: FrameTruth, wcs: WCS, shape: tuple[int, int]) -> float:
    """Root mean square distance in pixels between a solution and the truth, over a grid of the frame."""
    y, x = np.meshgrid(*(np.linspace(0, n - 1, 9) for n in shape), indexing="ij")
    found = frame.wcs.world_to_pixel_values(*wcs.pixel_to_world_values(x, y))
    return float(np.sqrt(np.mean((found[0] - x) ** 2 + (found[1] - y) ** 2)))


def judge_solving(truth: Truth, solutions: Mapping[str, WCS]) -> Verdict:
    """The worst good frame; a good frame without a solution is infinitely wrong."""
    good = [f for f in truth.frames if f.kind == "good"]
    rms = {f.name: solve_rms(f, solutions[f.name], truth.night.shape) for f in good if f.name in solutions}
    missing = len(good) - len(rms)
    worst = np.inf if missing else max(rms.values())
    middle = np.median(list(rms.values())) if rms else np.nan
    note = f"{len(rms)} of {len(good)} good frames solved, median {middle:.3f}, worst solved {max(rms.values(), default=np.nan):.3f}"
    return Verdict("solving, rms against truth", worst, 0.3, "px", note)


# ---- Phase 3: the master tiles


def judge_trails(tile: Matched, truth: Truth, panel: int, segment: int = 50) -> Verdict | None:
    """Brightest segment of any satellite's trail, against the sky on both sides; None where the panel has none."""
    residual = tile.residual / tile.sigma[:, None, None]
    worst, whole, count = 0.0, [], 0
    for frame in truth.frames:
        for trail in frame.trails if frame.panel == panel else ():
            length = int(np.hypot(trail.x1 - trail.x0, trail.y1 - trail.y0))
            t = np.linspace(0, 1, length)
            along = np.array([trail.x1 - trail.x0, trail.y1 - trail.y0]) / length
            lines = {}
            for d in (-1, 0, 1, *range(12, 22), *range(-21, -11)):
                x = trail.x0 + t * (trail.x1 - trail.x0) - d * along[1]
                y = trail.y0 + t * (trail.y1 - trail.y0) + d * along[0]
                lines[d] = _sample(
                    residual, *tile.picture.wcs.world_to_pixel_values(*frame.wcs.pixel_to_world_values(x, y))
                )
            on = np.stack([v for d, v in lines.items() if abs(d) <= 1])
            off = np.stack([v for d, v in lines.items() if abs(d) > 1])
            pieces = [
                _mean(on[..., s : s + segment]) - _mean(off[..., s : s + segment]) for s in range(0, length, segment)
            ]
            worst = max(worst, float(np.nanmax(np.abs(pieces), initial=0)))
            whole.append(float(np.nanmax(np.abs(_mean(on) - _mean(off)))))
            count += 1
    if not count:
        return None
    note = f"{count} trails; the worst as a whole {max(whole):.3f}"
    return Verdict(f"satellite trails, worst {segment} px", worst, 2.0, "sigma", note)


def _sample(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nearest pixels (C, n); NaN outside."""
    i, j = np.rint(y).astype(int), np.rint(x).astype(int)
    inside = (i >= 0) & (j >= 0) & (i < values.shape[1]) & (j < values.shape[2])
    return np.where(inside, values[:, np.where(inside, i, 0), np.where(inside, j, 0)], np.nan)


def _mean(lines: np.ndarray, least: int = 40) -> np.ndarray:
    """Mean over lines and positions (n, C, m) -> (C,); NaN where too few of them have data."""
    count = np.isfinite(lines).sum(axis=(0, 2))
    return np.where(count >= least, np.nansum(lines, axis=(0, 2)) / np.maximum(count, 1), np.nan)


def judge_hot_pixels(tile: Matched, truth: Truth, panel: int) -> Verdict:
    """Brightest hot pixel: its mean residual along the way that the drift led it over the tile, in its own colour.

    The same at places 7 pixels aside tells what noise alone does.
    """
    residual = tile.residual / tile.sigma[:, None, None]
    frames = [f for f in truth.frames if f.panel == panel and f.kind == "good"]
    at = truth.hot[: truth.night.hot]

    def tracks(dx: int, dy: int) -> np.ndarray:
        found = []
        for frame in frames:
            sky = frame.wcs.pixel_to_world_values(at[:, 1] + dx, at[:, 0] + dy)
            found.append(_sample(residual, *tile.picture.wcs.world_to_pixel_values(*sky)))
        stack = np.stack(found)
        count = np.isfinite(stack).sum(axis=0)
        return np.where(count >= len(frames) / 2, np.nansum(stack, axis=0) / np.maximum(count, 1), np.nan)

    hot, control = tracks(0, 0), tracks(7, -7)
    note = (
        f"mean {np.nanmean(hot):+.3f} (aside {np.nanmean(control):+.3f}), "
        f"worst aside {np.nanmax(control):.2f}, {np.isfinite(hot[0]).sum()} hot pixels"
    )
    return Verdict("hot pixels, worst track", float(np.nanmax(hot)), 2.0, "sigma", note)


def ideal_level(truth: Truth, weights: Mapping[str, float], nebula: np.ndarray) -> np.ndarray:
    """Noise at low frequency (variance times area, truth's units squared) of a weighted mean of frames, (3, H, W)."""
    night = truth.night
    total = sum(weights.values())
    out = np.zeros_like(nebula)
    for name, weight in weights.items():
        frame = truth.frame(name)
        g = frame.transparency
        for c, k in enumerate(PIXELS_PER_SAMPLE):
            variance = (g * nebula[c] + frame.glow[c]) / night.electrons_per_adu + night.read_noise**2 + 1 / 12
            out[c] += (weight / total) ** 2 * k * variance / g**2
    return out


def best_weights(truth: Truth, panel: int) -> dict[str, float]:
    """Weights of least noise for a panel's good frames: the inverse variance of green sky."""
    night = truth.night
    return {
        f.name: f.transparency**2 / (f.glow[1] / night.electrons_per_adu + night.read_noise**2)
        for f in truth.frames
        if f.panel == panel and f.kind == "good"
    }


def judge_noise(tile: Matched, truth: Truth, weights: Mapping[str, float]) -> Verdict:
    """Noise at low frequency against the ideal of these weights (names of frames), worst channel: 1 is ideal."""
    shape = tile.picture.shape
    seen = tile.star_free & _seen_by_all(tile.picture, [truth.frame(name) for name in weights], truth.night.shape)
    if seen.sum() < MIN_PIXELS:
        raise ValueError(f"{tile.picture.name}: no sky that all the frames saw")
    ratios = []
    ideal = np.sqrt(ideal_level(truth, weights, tile.nebula))
    for c in range(3):
        z = np.where(seen, (tile.values[c] - tile.image[c]) / ideal[c], 0)
        box = 24.0
        count = gaussian_filter(seen.astype(float), box)
        z = np.where(seen, z - gaussian_filter(z, box) / np.maximum(count, 1e-6), 0)
        limit = 5 * mad_sigma(z[seen])
        # the Gaussian h that was subtracted took 2 h(0) - (h * h)(0) from each lag
        lost = (2 * LAGS + 1) ** 2 * 3 / (4 * np.pi * box**2 * count[seen].mean())
        ratios.append(np.sqrt(_covariance_sum(np.clip(z, -limit, limit), seen) / (1 - lost)))
    note = "R G B " + " ".join(f"{r:.3f}" for r in ratios) + f"; {seen.sum() / (shape[0] * shape[1]):.0%} of the pixels"
    return Verdict("noise / ideal for the weights", float(max(ratios)), 1.10, "", note)


def _seen_by_all(picture: Picture, frames: Sequence[FrameTruth], shape: tuple[int, int], rim: int = 4) -> np.ndarray:
    """Pixels of a picture that lie inside every frame, by the frames' true WCS; judged on cells of 8 pixels."""
    y, x = np.mgrid[4 : picture.shape[0] : 8, 4 : picture.shape[1] : 8]
    ra, dec = picture.wcs.pixel_to_world_values(x, y)
    inside = np.ones(x.shape, bool)
    for frame in frames:
        fx, fy = frame.wcs.world_to_pixel_values(ra, dec)
        margin = rim + 8
        inside &= (fx > margin) & (fy > margin) & (fx < shape[1] - margin) & (fy < shape[0] - margin)
    full = np.zeros(picture.shape, bool)
    big = np.kron(inside, np.ones((8, 8), bool))[: picture.shape[0], : picture.shape[1]]
    full[: big.shape[0], : big.shape[1]] = big
    return full


def _covariance_sum(z: np.ndarray, seen: np.ndarray) -> float:
    """Sum of the autocovariance over lags of up to `LAGS` pixels, each from the pairs of seen pixels; z is 0 elsewhere."""
    weight = seen.astype(np.float32)
    z = (z * weight).astype(np.float32)
    height, width = z.shape
    total = 0.0
    for dy in range(LAGS + 1):
        for dx in range(-LAGS if dy else 0, LAGS + 1):
            a = np.s_[: height - dy, max(-dx, 0) : width - max(dx, 0)]
            b = np.s_[dy:, max(dx, 0) : width + min(dx, 0)]
            pairs = float(np.sum(weight[a] * weight[b], dtype=np.float64))
            covariance = float(np.sum(z[a] * z[b], dtype=np.float64)) / max(pairs, 1)
            total += covariance if dx == dy == 0 else 2 * covariance
    return total


# ---- the mosaic


def regions(mosaic: Picture, tiles: Sequence[Picture]) -> np.ndarray:
    """Number of the set of tiles that cover each pixel of the mosaic; -1 where there is none or it is too small."""
    y, x = np.mgrid[: mosaic.shape[0], : mosaic.shape[1]]
    ra, dec = mosaic.wcs.pixel_to_world_values(x, y)
    bits = np.zeros(mosaic.shape, np.int64)
    for k, tile in enumerate(tiles):
        seen = np.isfinite(tile.data).all(axis=0).astype(float)[None]
        covered = _sample(seen, *tile.wcs.world_to_pixel_values(ra.ravel(), dec.ravel()))[0].reshape(bits.shape)
        bits |= (np.nan_to_num(covered) > 0).astype(np.int64) << k
    sets, number, size = np.unique(bits, return_inverse=True, return_counts=True)
    return np.where((sets != 0) & (size >= MIN_PIXELS), np.arange(len(sets)), -1)[number.reshape(bits.shape)]


def judge_sky_step(mosaic: Matched, region: np.ndarray, sigma: np.ndarray) -> Verdict:
    """Largest difference of the sky between two regions, in units of a master tile's noise ``sigma`` (3,)."""
    residual = mosaic.residual / sigma[:, None, None]
    order = np.argsort(region, axis=None, kind="stable")
    numbers, first = np.unique(region.ravel()[order], return_index=True)
    flat = residual.reshape(3, -1)
    groups = {n: g for n, g in zip(numbers, np.split(order, first[1:]), strict=True) if n >= 0}
    groups = {n: g for n, g in groups.items() if np.isfinite(flat[0, g]).sum() >= MIN_PIXELS / 2}
    sky = np.array([np.nanmedian(flat[:, g], axis=1) for g in groups.values()])
    step = np.ptp(sky, axis=0)
    note = f"{len(sky)} regions; R G B " + " ".join(f"{s:.3f}" for s in step)
    return Verdict("sky step between panels", float(step.max()), 0.2, "sigma", note)


@dataclass(frozen=True, eq=False)
class StarFluxes:
    """Stars of a mosaic: int (n, 2) row, column; true fluxes (n, 3); measured over true (n, 3), one scale a channel.

    ``error`` (n, 3) is what noise leaves of uncertainty in ``ratio``: as one over the flux, at the size that the scatter
    of the faint stars shows (the noise per pixel says too little where resampling has smoothed it).
    """

    at: np.ndarray
    flux: np.ndarray
    ratio: np.ndarray
    error: np.ndarray


def star_fluxes(mosaic: Matched, truth: Truth) -> StarFluxes:
    """Aperture photometry of a mosaic against the same apertures on the rendered truth; the sky is taken around.

    Apertures have a radius of 1.7 times the stars' width. Each channel is divided by one number, the robust mean ratio
    of its bright stars.
    """
    radius = 1.7 * mosaic.fwhm
    at, flux = stars_inside(truth, mosaic.picture.wcs, whole_pixels(mosaic.values), radius)
    weight = gaussian_filter(mosaic.star_free.astype(float), 16)
    residual = np.nan_to_num(mosaic.residual)
    sky = np.stack([gaussian_filter(r, 16) / np.maximum(weight, 1e-3) for r in residual])
    expected = aperture_sums(mosaic.image - mosaic.nebula, at, radius)
    ratio = aperture_sums(mosaic.values - mosaic.nebula - sky, at, radius) / expected
    bright = (flux > 0.02 * BRIGHTEST).all(axis=1)
    scale = np.array([np.median(r) for r in ratio[bright].T])
    faint = flux < 0.01 * BRIGHTEST
    noise = np.array(
        [mad_sigma(((r - 1) * e)[f]) for r, e, f in zip((ratio / scale).T, expected.T, faint.T, strict=True)]
    )
    return StarFluxes(at, flux, ratio / scale, noise / expected)


def judge_linearity(stars: StarFluxes) -> Verdict:
    """How far the measured fluxes are from proportional to the true ones, over `DECADES` decades, in percent.

    Half a decade is one bin: the mean of the ratios, weighted with the flux squared (the noise is the sky's) and
    clipped at 4 sigma, with its standard error. A straight line through the bins gives the trend over all decades; the
    figure is the largest trend of a channel, or the largest distance of a bin from the common level beyond twice
    its standard error.
    """
    edges = BRIGHTEST / 10 ** np.linspace(DECADES, 0, 2 * DECADES + 1)
    worst, notes = 0.0, []
    for c in range(3):
        x, mean, error = _bins(stars.flux[:, c], stars.ratio[:, c], edges)
        w = 1 / (error**2 + 0.1**2)
        level = np.sum(w * mean) / np.sum(w)
        slope, _ = np.polyfit(x, mean, 1, w=np.sqrt(w))
        beyond = np.maximum(np.abs(mean - level) - 2 * error, 0).max()
        worst = max(worst, abs(DECADES * slope), beyond)
        bins = " ".join(f"{m - level:+.2f}({e:.2f})" for m, e in zip(mean, error, strict=True))
        notes.append(f"{'RGB'[c]}: trend {DECADES * slope:+.2f}, bins {bins}")
    return Verdict("star flux linearity, 3 decades", worst, 0.5, "%", f"{len(stars.at)} stars; " + "; ".join(notes))


def _bins(flux: np.ndarray, ratio: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log10 flux, deviation from 1 and its standard error in percent of each bin that has stars enough."""
    rows = []
    for low, high in pairwise(edges):
        pick = (flux >= low) & (flux < high) & np.isfinite(ratio)
        if pick.sum() < BIN_STARS:
            raise ValueError(f"only {pick.sum()} stars with a flux of {low:.0f} to {high:.0f}: too few to judge")
        f, r = flux[pick], ratio[pick]
        keep, mean = np.ones(len(f), bool), 1.0
        for _ in range(5):
            mean = float(np.average(r[keep], weights=f[keep] ** 2))
            pull = (r - mean) * f
            keep = np.abs(pull) < 4 * max(mad_sigma(pull[keep]), 1e-9)
        w = f[keep] ** 2 / np.sum(f[keep] ** 2)
        error = np.sqrt(np.sum(w**2 * (r[keep] - mean) ** 2))
        rows.append((np.log10(np.sqrt(low * high)), 100 * (mean - 1), 100 * error))
    return tuple(np.array(rows).T)


def judge_colour(stars: StarFluxes, region: np.ndarray) -> Verdict:
    """Largest error of a ratio of two channels, mean over the brighter stars of a region, in percent.

    A star weighs by its noise, and by the 0.3 percent that its place within the pixels costs one star.
    """
    home = np.where((stars.flux > 0.006 * BRIGHTEST).all(axis=1), region[tuple(stars.at.T)], -1)
    numbers = [n for n in np.unique(home) if n >= 0 and np.sum(home == n) >= COLOUR_STARS]
    if not numbers:
        raise ValueError("no region has stars enough to judge its colour")
    log = 100 * np.log(np.maximum(stars.ratio, 1e-3))
    found = []
    for n in numbers:
        pick = home == n
        for a, b in ((0, 1), (1, 2), (2, 0)):
            colour = log[pick, a] - log[pick, b]
            w = 1 / (stars.error[pick, a] ** 2 + stars.error[pick, b] ** 2 + 0.003**2)
            middle = np.median(colour)
            w *= np.abs(colour - middle) < 4 * max(mad_sigma(colour), 1e-9)
            mean = np.average(colour, weights=w)
            found.append((mean, np.sqrt(np.sum((w * (colour - mean)) ** 2)) / w.sum()))
    mean, error = np.array(found).T
    note = f"{len(numbers)} regions, {int(np.isin(home, numbers).sum())} stars, standard error up to {error.max():.2f}"
    return Verdict("colour of stars, worst region", float(np.abs(mean).max()), 0.3, "%", note)
