"""A mosaic against the known sky it shows: what is wrong with its sky, its stars and their colours.

No program can know the absolute scale and zero, so that a mosaic is first brought to the true sky with one scale and one
constant per channel. Two fits do so: for ``sky`` a straight line through the star-free pixels; for all else a quadratic
over the whole mosaic is fitted along, lest a gradient that was left tilts the scale.

By region of the mosaic that one set of tiles covers:

- ``sky``: median residual of the star-free pixels, in units of one tile's noise; the figure is the largest difference
  between two regions.
- ``star``: median ratio of the stars' fluxes to the true ones (apertures; the true nebula and the sky's residual in the
  blocks about the star subtracted), over the same of all stars; the figure is the largest deviation from 1, in percent.
- ``colour``: ratio of those medians between two channels; the figure is the largest deviation from 1, in percent.

By block of the mosaic, in units of one tile's noise, the worst channel (median residuals of the star-free pixels):

- ``low``: root mean square over blocks of 32 pixels, their mean taken out;
- ``low_q``: the same after one quadratic over the mosaic is taken out: sky that differs from panel to panel;
- ``seam``: 99th percentile of the differences of neighbouring blocks of 64 pixels, after that quadratic.

A star's flux is the surface brightness of its pixels times the area of a pixel of the output, in the truth as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from photometry_scenes import Scene, coverage_regions

#: Smallest region that is judged, in pixels, and fewest stars in it.
MIN_PIXELS, MIN_STARS = 400, 5
#: Sides in pixels of the blocks, and what part of one has to be star-free.
BLOCK, SEAM_BLOCK, MIN_PART = 32, 64, 0.25
#: About so many pixels enter the fit of the scale.
FITTED_PIXELS = 10**6


@dataclass(frozen=True)
class Truth:
    """The true sky on the output grid and where it can be measured.

    ``nebula`` and ``image`` (C, H, W); ``region`` int (H, W) numbers the set of tiles that cover a pixel (-1: none, or a
    region too small); ``stars`` are int (n, 2) pixels, row then column, ``fluxes`` (n, C) and ``radius`` those of their
    apertures.
    """

    nebula: np.ndarray
    image: np.ndarray
    star_free: np.ndarray
    region: np.ndarray
    stars: np.ndarray
    fluxes: np.ndarray
    radius: float


@dataclass(frozen=True)
class Found:
    """What a mosaic is like, per region or block and channel.

    ``sky`` (R, C) in sigma; ``star`` and ``colour`` (S, C) errors in percent; residuals of blocks in sigma, NaN where
    there is too little sky: ``blocks`` (C, h, w) less a constant, ``level`` less a quadratic, ``wide`` the same of the
    larger blocks.
    """

    sky: np.ndarray
    star: np.ndarray
    colour: np.ndarray
    blocks: np.ndarray
    level: np.ndarray
    wide: np.ndarray

    @property
    def figures(self) -> dict[str, float]:
        """The numbers of a mosaic by name."""
        steps = [np.abs(np.diff(self.wide, axis=axis)).reshape(len(self.wide), -1) for axis in (1, 2)]
        return {
            "sky": float(np.max(np.ptp(self.sky, axis=0))),
            "star": float(np.max(np.abs(self.star), initial=0.0)),
            "colour": float(np.max(np.abs(self.colour), initial=0.0)),
            "low": worst_rms(self.blocks),
            "low_q": worst_rms(self.level),
            "seam": float(np.max(np.nanpercentile(np.concatenate(steps, axis=1), 99, axis=1))),
        }


def worst_rms(blocks: np.ndarray) -> float:
    """Root mean square of blocks (C, h, w), NaN left out, in the worst channel."""
    return float(np.max(np.sqrt(np.nanmean(blocks**2, axis=(1, 2)))))


# ---- the truth


def true_sky(scene: Scene) -> Truth:
    """Render the sky on the output grid, find its star-free pixels and the stars fit for photometry."""
    wcs, shape = scene.grid.wcs, scene.grid.shape
    scale = scene.sky.scale_of(wcs, shape)
    first, widest = (fwhm / scale for fwhm in (scene.layout.fwhm[0], max(scene.layout.fwhm)))
    radius = 2.5 * widest
    nebula = scene.sky.nebula(wcs, shape)
    field = scene.sky.star_field(wcs, shape, first)
    wide = scene.sky.star_field(wcs, shape, 1.2 * widest).max(axis=0)
    region = coverage_regions(scene, MIN_PIXELS)
    stars = usable_stars(scene, region, radius)
    fluxes = aperture_sums(field, stars, radius)
    return Truth(nebula, nebula + field, wide < 0.01 * scene.layout.noise, region, stars, fluxes, radius)


def usable_stars(scene: Scene, region: np.ndarray, radius: float) -> np.ndarray:
    """Stars bright enough, alone enough, wholly within one region and unsaturated: int (n, 2), row, column."""
    from scipy.spatial import KDTree

    number, x, y, fluxes = scene.sky.stars_on(scene.grid.wcs, scene.grid.shape)
    xy = np.stack([x, y], axis=1)
    bright = (fluxes > 50 * scene.layout.noise * np.sqrt(np.pi) * radius).all(axis=1)
    near = KDTree(xy).query_ball_point(xy, 1.6 * radius)
    total = fluxes.mean(axis=1)
    alone = np.array([total[n].sum() < 1.1 * total[k] for k, n in enumerate(near)], bool)
    height, width = region.shape
    reach = int(radius) + 1
    at = np.rint(xy[:, ::-1]).astype(int)
    inside = (at >= reach).all(axis=1) & (at[:, 0] < height - reach) & (at[:, 1] < width - reach)
    at = at[bright & alone & inside & ~saturated(scene)[number]]
    rim = np.stack([region[at[:, 0] + dy, at[:, 1] + dx] for dy in (-reach, 0, reach) for dx in (-reach, 0, reach)])
    return at[(rim == rim[4]).all(axis=0) & (rim[4] >= 0)]


def saturated(scene: Scene) -> np.ndarray:
    """Whether a star of the sky reaches the ceiling of a panel, bool (n,)."""
    found = np.zeros(len(scene.sky.stars), bool)
    for panel in scene.panels:
        if panel.ceiling is None:
            continue
        height, width = panel.data.shape[-2:]
        number, x, y, _ = scene.sky.stars_on(panel.wcs, (height, width))
        j, i = np.rint(x).astype(int), np.rint(y).astype(int)
        seen = (i > 0) & (j > 0) & (i < height - 1) & (j < width - 1)
        i, j = i[seen], j[seen]
        peaks = np.stack([panel.data[:, i + dy, j + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        found[number[seen]] |= np.nanmax(peaks, axis=(0, 1)) > panel.ceiling - 5 * panel.noise
    return found


def aperture_sums(image: np.ndarray, stars: np.ndarray, radius: float) -> np.ndarray:
    """Sums (n, C) of an image (C, H, W) over circles about pixels."""
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    dy, dx = (d[np.hypot(dy, dx) <= radius] for d in (dy, dx))
    return image[:, stars[:, :1] + dy, stars[:, 1:] + dx].sum(axis=2).T


# ---- a mosaic brought to the truth


def fit_to_truth(values: np.ndarray, truth: np.ndarray, star_free: np.ndarray, noise: float) -> np.ndarray:
    """The mosaic brought to the true sky with one scale and one offset: a robust straight line through the nebula.

    Through the star-free pixels alone: a fit would waver between the stars and the nebula where one of them is wrong.
    """
    pick = np.isfinite(values) & star_free
    x, y = truth[pick].astype(float), values[pick].astype(float)
    middle = np.median(x)
    a, b = robust_fit(np.stack([x - middle, np.ones_like(x)]), y, noise)
    return (values - b) / a + middle


def fit_with_quadratic(values: np.ndarray, truth: np.ndarray, star_free: np.ndarray, noise: float) -> np.ndarray:
    """The same, with a quadratic over the whole image fitted along and left in."""
    i, j = np.nonzero(np.isfinite(values) & star_free)
    thin = max(len(i) // FITTED_PIXELS, 1)
    i, j = i[::thin], j[::thin]
    x, y = truth[i, j].astype(float), values[i, j].astype(float)
    middle = np.median(x)
    a, b, *_ = robust_fit(np.concatenate([[x - middle], quadratic(i, j, values.shape)]), y, noise, True)
    return (values - b) / a + middle


def quadratic(i: np.ndarray, j: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Terms (6, n) of a quadratic at the rows ``i`` and columns ``j`` of an image."""
    v, u = (2 * k / n - 1 for k, n in zip((i, j), shape, strict=True))
    return np.stack([np.ones_like(u), u, v, u * u, u * v, v * v])


def robust_fit(terms: np.ndarray, y: np.ndarray, noise: float, adapt: bool = False) -> np.ndarray:
    """Coefficients of the terms (m, n) by least squares with Tukey's biweight, at 4.685 times the noise.

    With ``adapt`` at 4.685 times the robust scatter where that is more, as gradients make it.
    """
    weight, found = np.ones_like(y), np.zeros(len(terms))
    for _ in range(5):
        weighted = terms * weight
        found = np.linalg.solve(weighted @ terms.T, weighted @ y)
        r = y - found @ terms
        width = max(noise, 1.4826 * float(np.median(np.abs(r)))) if adapt else noise
        u = r / width / 4.685
        weight = np.where(np.abs(u) < 1, (1 - u * u) ** 2, 0)
    return found


def block_medians(residual: np.ndarray, side: int) -> np.ndarray:
    """Medians (C, h, w) of whole blocks of an image (C, H, W), NaN left out; NaN where too few pixels have values."""
    channels, height, width = residual.shape
    h, w = height // side, width // side
    cut = residual[:, : h * side, : w * side].reshape(channels, h, side, w, side).swapaxes(2, 3)
    ordered = np.sort(cut.reshape(channels, h, w, side * side), axis=-1)  # NaN last
    count = np.isfinite(ordered).sum(axis=-1)
    middle = np.maximum(count - 1, 0)[..., None]
    low, high = (np.take_along_axis(ordered, k, axis=-1)[..., 0] for k in (middle // 2, (middle + 1) // 2))
    return np.where(count >= MIN_PART * side * side, (low + high) / 2, np.nan)


def quadratic_of_blocks(blocks: np.ndarray, side: int, shape: tuple[int, int]) -> np.ndarray:
    """The quadratics (C, H, W) over a mosaic of this shape that fit its blocks (C, h, w) best."""
    rows, columns = np.indices(shape, sparse=True)
    out = np.empty((len(blocks), *shape), np.float32)
    for plane, image in zip(blocks, out, strict=True):
        i, j = np.nonzero(np.isfinite(plane))
        terms = quadratic((i + 0.5) * side, (j + 0.5) * side, shape)
        c = np.linalg.lstsq(terms.T, plane[i, j], rcond=None)[0]
        v, u = (2 * k / n - 1 for k, n in zip((rows, columns), shape, strict=True))
        image[:] = c[0] + c[1] * u + c[2] * v + c[3] * u * u + c[4] * u * v + c[5] * v * v
    return out


# ---- the judge


def judge(values: np.ndarray, truth: Truth, noise: float, by_stars: bool = False) -> Found:
    """What a mosaic (C, H, W) is like, ``noise`` being one pixel's of a tile.

    With ``by_stars`` the stars give the scale of what is judged by block, for programs that take the nebula away.
    """
    residual = np.where(truth.star_free, brought(fit_to_truth, values, truth, noise) - truth.image, np.nan) / noise
    sky = by_region(residual, truth.region)
    fitted = scaled_by_stars(values, truth) if by_stars else brought(fit_with_quadratic, values, truth, noise)
    residual = np.where(truth.star_free, fitted - truth.image, np.nan) / noise
    blocks = block_medians(residual, BLOCK)
    bend = quadratic_of_blocks(blocks, BLOCK, residual.shape[1:])
    level = block_medians(residual - bend, BLOCK)
    star = star_errors(fitted - noise * bend, noise * level, truth)
    colour = star / np.roll(star, 1, axis=1)
    return Found(
        sky,
        100 * (star - 1),
        100 * (colour - 1),
        blocks - np.nanmean(blocks, axis=(1, 2), keepdims=True),
        level,
        block_medians(residual - bend, SEAM_BLOCK),
    )


def brought(fit, values: np.ndarray, truth: Truth, noise: float) -> np.ndarray:
    """A mosaic brought to the truth, channel by channel."""
    return np.stack([fit(v, t, truth.star_free, noise) for v, t in zip(values, truth.image, strict=True)])


def by_region(residual: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Medians (R, C) of a residual (C, H, W), NaN left out, over the regions."""
    order = np.argsort(region, axis=None, kind="stable")
    numbers, first = np.unique(region.ravel()[order], return_index=True)
    flat = residual.reshape(len(residual), -1)
    groups = zip(numbers, np.split(order, first[1:]), strict=True)
    return np.array([np.nanmedian(flat[:, g], axis=1) for n, g in groups if n >= 0])


def scaled_by_stars(values: np.ndarray, truth: Truth) -> np.ndarray:
    """A mosaic brought to the truth by the flux of its stars."""
    for _ in range(3):  # the nearer to the truth, the less of the nebula is left under the stars
        sky = block_medians(np.where(truth.star_free, values - truth.image, np.nan), BLOCK)
        values = values / np.nanmedian(star_ratios(values, sky, truth), axis=0)[:, None, None]
    return values


def star_errors(fitted: np.ndarray, blocks: np.ndarray, truth: Truth) -> np.ndarray:
    """Median ratio (S, C) of the stars' fluxes to the true ones, in every region that has stars enough.

    Relative to that of all stars: a gradient that looks like the nebula tilts the scale that the nebula gives.
    """
    ratio = star_ratios(fitted, blocks, truth)
    whole = np.isfinite(ratio).all(axis=1)  # another program's mosaic may end earlier
    ratio = ratio[whole] / np.median(ratio[whole], axis=0)
    home = truth.region[tuple(truth.stars[whole].T)]
    numbers, count = np.unique(home, return_counts=True)
    regions = numbers[(numbers >= 0) & (count >= MIN_STARS)]
    return np.array([np.median(ratio[home == n], axis=0) for n in regions]).reshape(-1, len(fitted))


def star_ratios(fitted: np.ndarray, blocks: np.ndarray, truth: Truth) -> np.ndarray:
    """Flux of every star over the true one, (n, C).

    The sky's own residual about it, in ``blocks`` (C, h, w), is judged by itself and no part of a star.
    """
    area = aperture_sums(np.ones((1, *truth.region.shape)), truth.stars, truth.radius)
    under = area * near(blocks, truth.stars)
    return (aperture_sums(fitted - truth.nebula, truth.stars, truth.radius) - under) / truth.fluxes


def near(blocks: np.ndarray, stars: np.ndarray) -> np.ndarray:
    """The sky (n, C) at stars: means of the blocks (C, h, w) about them, weighted (1 2 1); of the nearest that have one.

    One block alone is so noisy that it is most of the scatter of a region's five stars.
    """
    from scipy.ndimage import convolve1d, distance_transform_edt

    known = np.isfinite(blocks)
    sums, weights = np.where(known, blocks, 0.0), known.astype(float)
    for axis in (1, 2):
        sums, weights = (convolve1d(a, [1.0, 2.0, 1.0], axis=axis, mode="constant") for a in (sums, weights))
    empty = (weights == 0).any(axis=0)
    nearest = distance_transform_edt(empty, return_distances=False, return_indices=True)
    at = nearest[:, *np.minimum(stars // BLOCK, np.array(empty.shape) - 1).T]
    return (sums[:, *at] / weights[:, *at]).T
