"""Errors-in-variables fits of one image on another: the ratio of two exposures of one sky, per channel.

Both images are means over the same coarse cells, so both axes are noisy and the noise is known. The fit is Deming's,
robust, on the structure that remains after a constant. What else may differ between two exposures is fitted along: a
displacement and the width and shape of the stars (shared by all channels, so that it cannot trade against one
channel's gain, a colour error), and a polynomial unless the residuals show none. docs/photometry.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zemosaic_pipeline.overlaps.overlap import (
    CORRELATED_CELLS,
    Model,
    Overlap,
    deviation,
    median,
    noise_of_difference,
    part,
    share_of_x,
    shared_weights,
)
from zemosaic_pipeline.overlaps.standard_errors import scatter_of_stars, standard_errors, structure_weights

#: Relative errors of a cell's brightness that noise does not explain (flat fields, colour terms, the stars' wings):
#: what is assumed at first, and from what :func:`structure_error` chooses.
STRUCTURE_ERROR = 0.005
STRUCTURE_ERRORS = np.geomspace(0.001, 0.064, 13)
#: Two tiles share structure where their cells are correlated by so many standard deviations, all channels together;
#: then one of them tells its own ratio from so many on.
MIN_EVIDENCE, SEEN_EVIDENCE = 5.0, 2.0
#: Largest change of a log ratio in one step of the fit.
LARGEST_CHANGE = 1.0
#: Least information on a log ratio: a channel without structure has none, but a matrix must have an inverse.
LEAST_INFORMATION = 1e-6
#: Fewest common cells for an overlap to count.
MIN_CELLS = 12
#: Most steps of one iterative fit.
MAX_STEPS = 12
#: Expected sizes of the distortions of :func:`distortion_stencils`, in cells to the power of their order, and the
#: diagonal of the information that they stand for.
EXPECTED_DISTORTION = np.array([0.1, 0.1, 0.2, 0.2, 0.1, 0.05])
PRIOR_INFORMATION = CORRELATED_CELLS / EXPECTED_DISTORTION**2


def distortion_stencils() -> np.ndarray:
    """What a displacement and another width of the stars do to the structure: (K, 9, 9) weights of the cells about one.

    The terms of the Taylor series of a convolution: both first derivatives, the three second ones (width, elongation)
    and the Laplacian twice (the wings), exact for polynomials of the fourth degree.
    """
    none = np.eye(9)[4]
    first = np.pad(np.array([1.0, -8.0, 0.0, 8.0, -1.0]) / 12.0, 2)
    second = np.pad(np.array([-1.0, 16.0, -30.0, 16.0, -1.0]) / 12.0, 2)
    fourth = np.convolve(second, second, "same")
    down_and_across = [(first, none), (none, first), (second, none), (none, second), (first, first)]
    wings = np.outer(fourth, none) + 2 * np.outer(second, second) + np.outer(none, fourth)
    return np.stack([*(np.outer(*pair) for pair in down_and_across), wings])


#: The cells (rows and columns from one) that the distortions are taken from, how far they reach, and their weights.
NEAR = np.argwhere(distortion_stencils().any(axis=0)) - 4
REACH = int(np.max(np.abs(NEAR)))
STENCILS = distortion_stencils()[:, NEAR[:, 0] + 4, NEAR[:, 1] + 4]
#: Correlation (K,) of a smoothed cell's noise with what the distortions make of it.
NOISE_IN_STENCILS = STENCILS @ np.prod(np.array([1, 2 / 3, 1 / 6, 0, 0])[np.abs(NEAR)], axis=1)


@dataclass(frozen=True)
class Fit:
    """What an overlap says of the ratio of two tiles, per channel.

    Attributes
    ----------
    ratio, error : ndarray
        float64 (C,), y over x, and the standard error of its logarithm, inf where it is not known.
    x, y : ndarray
        The cells (C, n) without the distortions.
    scatter : ndarray
        float64 (C,), robust scatter about the fit in units of what the pixel noise explains.
    stars, star_scatter, star_noise : ndarray
        float64 (C,), effective number of stars that decide, the rms deviation of their log ratios, and what of that
        noise explains.
    """

    ratio: np.ndarray
    error: np.ndarray
    x: np.ndarray
    y: np.ndarray
    scatter: np.ndarray
    stars: np.ndarray
    star_scatter: np.ndarray
    star_noise: np.ndarray


def fit_overlap(overlap: Overlap, order: int = 2) -> Fit:
    """The fit of one tile on the other.

    A polynomial of ``order`` (at least 1) is fitted along unless the residuals show that there is none: always to fit
    it would cost the information that a nebula holds. The errors are infinite, all of them, where the tiles share no structure
    beyond their noise.
    """
    one = np.ones(len(overlap.x))
    smooth = smooth_columns(overlap.used, max(order, 1))
    found = fitted(overlap, smooth[:0], smooth)
    if found is None:
        found = fitted(overlap, smooth)
    if found is None:
        return Fit(one, one * np.inf, overlap.x, overlap.y, one * np.nan, 0 * one, 0 * one, one)
    return final_fit(overlap, *found)


def fitted(
    overlap: Overlap, smooth: np.ndarray, missed: np.ndarray | None = None
) -> tuple[np.ndarray, Model, float] | None:
    """Design and model of the fit with some smooth columns (m, n) beside the constant; None without a slope.

    None, too, as soon as the residuals show that they lack the smooth columns ``missed``. A part of the cells leads
    near the solution, all of them end there.
    """
    ratio = initial_ratios(overlap, smooth)
    if ratio is None:
        return None
    design = make_design(overlap, ratio, smooth)
    few = part(design.shape[2])
    some = np.ascontiguousarray(design[:, :, few])
    model = fit_ratios(overlap, some, first_model(overlap, ratio, len(smooth)), STRUCTURE_ERROR, 0.1)
    if model is None or (missed is not None and needs_gradient(missed[:, few], some, model)):
        return None
    if np.max(np.abs(np.log(model.ratio / ratio))) > 0.05:
        design = make_design(overlap, model.ratio, smooth)
    relative = structure_error(design, model)
    model = fit_ratios(overlap, design, model, relative, 0.02)
    if model is None or (missed is not None and needs_gradient(missed, design, model)):
        return None
    return design, model, relative


def final_fit(overlap: Overlap, design: np.ndarray, model: Model, relative: float) -> Fit:
    """The model with its errors, and the cells without the distortions."""
    x, y = np.swapaxes(both_axes(model.ratio, model.theta) @ design[:, : 2 + len(model.theta)], 0, 1)
    residual, structure = np.swapaxes(model.rows @ design, 0, 1)
    plain = structure_weights(structure, relative)
    stars = scatter_of_stars(overlap, plain * structure**2, plain * structure * residual)
    error = standard_errors(overlap, design, model)
    return Fit(model.ratio, error, x, y, np.maximum(deviation(residual), 1.0), *stars)


def initial_ratios(overlap: Overlap, smooth: np.ndarray) -> np.ndarray | None:
    """Robust first guess of the slopes (C,) of y on x (C, n); None where they share no structure.

    What the smooth columns (m, n) explain is taken out of both first. The correlation of n independent pairs of pure
    noise has a standard deviation of 1 / sqrt(n). Evidence is pooled over the channels: one that shows little by itself
    takes the slope of all.
    """
    count = overlap.x.shape[1]
    if count < MIN_CELLS:
        return None
    x, y = clipped(overlap.x), clipped(overlap.y)
    if len(smooth):
        x, y = (clipped(values - trend(values, smooth)) for values in (x, y))
    sxx, syy, sxy = (np.mean(product, axis=1) for product in (x * x, y * y, x * y))
    noise = np.sqrt(np.maximum(sxx * syy, 1e-300) * CORRELATED_CELLS / count)
    if np.sum(sxy / noise) <= MIN_EVIDENCE * np.sqrt(len(sxy)):
        return None
    noise_ratio = overlap.vy / overlap.vx
    together = [np.sum(s / overlap.vx, keepdims=True) for s in (sxx, syy, sxy)]
    if not together[2] > 0:
        return None
    common = deming_slope(together[0], together[1], together[2], np.mean(noise_ratio, keepdims=True))
    strong = sxy > MIN_EVIDENCE * noise
    return np.where(strong, deming_slope(sxx, syy, np.where(strong, sxy, 1.0), noise_ratio), common)


def clipped(values: np.ndarray) -> np.ndarray:
    """Values (C, n) less their median, no further from it than 99.5 % of them."""
    some = values[:, part(values.shape[1])]
    middle = median(some)
    high = int(0.995 * (some.shape[1] - 1))
    limit = np.partition(np.abs(some - middle), high, axis=1)[:, high, None]
    return np.clip(values - middle, -limit, limit)


def trend(values: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """Least squares of values (C, n) by a constant and the smooth columns (m, n)."""
    columns = np.concatenate([np.ones((1, smooth.shape[1])), smooth])
    gram = columns @ columns.T
    gram[np.diag_indices(len(gram))] += 1e-12 * np.trace(gram)
    return (values @ columns.T) @ np.linalg.inv(gram) @ columns


def deming_slope(sxx: np.ndarray, syy: np.ndarray, sxy: np.ndarray, noise_ratio: np.ndarray) -> np.ndarray:
    """Maximum-likelihood slope for errors on both axes; Deming (1943), Statistical Adjustment of Data, ch. 11."""
    d = syy - noise_ratio * sxx
    root = np.sqrt(d * d + 4 * noise_ratio * sxy * sxy) + np.abs(d)
    # of two equal forms the one without a difference of nearly equal numbers
    return np.where(d >= 0, root / (2 * sxy), 2 * noise_ratio * sxy / root)


def first_model(overlap: Overlap, ratio: np.ndarray, smooth: int) -> Model:
    """Nothing but a ratio: the structure follows from it, no cell is doubted yet."""
    share, sigma = share_of_x(overlap, ratio), noise_of_difference(overlap, ratio)[:, 0]
    kinds = len(STENCILS)
    rows = np.zeros((len(ratio), 2, 3 + kinds + smooth))
    rows[:, 1, 0], rows[:, 1, 1] = share / sigma, (1 - share) / ratio / sigma
    middle = np.concatenate([median(t[:, part(t.shape[1])]) for t in (overlap.x, overlap.y)], axis=1)
    rows[:, 1, 2 + kinds] = -np.sum(rows[:, 1, :2] * middle, axis=1)
    empty = np.zeros(0)
    return Model(ratio, np.zeros(kinds), rows, empty, empty, empty)


def make_design(overlap: Overlap, ratio: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """Rows (C, 2 + K + 1 + m, n) of what the fit combines: x, y, K distortions of the common structure, a constant,
    and the smooth columns (m, n).

    The common structure is the inverse-variance mean of both tiles: its noise is independent of that of their
    difference.
    """
    rows, columns = np.nonzero(overlap.used)
    width = overlap.image_x.shape[2] + 2 * REACH
    corner = (rows * overlap.step[0] + REACH) * width + columns * overlap.step[1] + REACH
    near = corner + (NEAR @ [width, 1])[:, None]
    kinds = 2 + len(STENCILS)
    design = np.empty((len(ratio), kinds + 1 + len(smooth), len(rows)))
    design[:, 0], design[:, 1], design[:, kinds], design[:, kinds + 1 :] = overlap.x, overlap.y, 1.0, smooth
    for c, share in enumerate(share_of_x(overlap, ratio)):
        common = share * overlap.image_x[c] + ((1 - share) / ratio[c]) * overlap.image_y[c]
        np.matmul(STENCILS, np.pad(common, REACH, mode="edge").take(near), out=design[c, 2:kinds])
    return design


def structure_error(design: np.ndarray, model: Model) -> float:
    """The relative error of the structure that the residuals themselves speak for.

    The likeliest of :data:`STRUCTURE_ERRORS` for residuals that follow a multivariate t distribution of 4 degrees of
    freedom, which outliers do not disturb. Cells without structure say nothing about it.
    """
    residual, structure = np.swapaxes(model.rows @ design, 0, 1)
    channels = len(residual)
    own = max(1.0, float(np.mean(deviation(residual[:, part(residual.shape[1])]) ** 2)))
    u2, s2 = np.sum(residual**2, axis=0), np.mean(structure**2, axis=0)
    speaks = s2 * STRUCTURE_ERRORS[-1] ** 2 > 0.05 * own
    variance = own + STRUCTURE_ERRORS[:, None] ** 2 * s2[speaks]
    costs = channels * np.log(variance) + (4 + channels) * np.log1p(u2[speaks] / (4 * variance))
    return float(STRUCTURE_ERRORS[int(np.argmin(np.sum(costs, axis=1)))])


def fit_ratios(overlap: Overlap, design: np.ndarray, model: Model, relative: float, tolerance: float) -> Model | None:
    """Errors-in-variables (Deming) fit with known noise ratio; None where a channel has no slope.

    Iteratively reweighted with Tukey's biweight on the residuals in units of the noise and of the structure's own
    relative error, against moved, saturated or variable sources. All channels share the weights: a star that is
    doubted in one channel is doubted in all, or the channels would be tied to different stars, a colour error.

    Ends where a step changes no log ratio by more than ``tolerance`` standard errors.
    """
    some = part(design.shape[2])
    for _ in range(MAX_STEPS):
        residual, structure = np.swapaxes(model.rows @ design, 0, 1)
        weight = shared_weights(residual, structure, deviation(residual[:, some]), relative)
        better = improved(overlap, design, weight, model)
        if better is None:
            return None
        previous, model = model, better
        error = np.sqrt(CORRELATED_CELLS * np.diag(model.inverse)[: len(model.ratio)])
        if (np.abs(np.log(model.ratio / previous.ratio)) < tolerance * error).all():
            break
    return model


def improved(overlap: Overlap, design: np.ndarray, weight: np.ndarray, model: Model) -> Model | None:
    """One step for given weights (n,): Deming's slopes, then the distortions with them; None without a slope.

    All that enters are the weighted products of the design's rows. A channel whose structure is lost in its noise keeps
    its ratio.
    """
    values = 2 + len(model.theta)
    products, free = weighted_products(design, weight, values)
    axes = both_axes(model.ratio, model.theta)
    (sxx, sxy), (_, syy) = np.moveaxis(axes @ products @ np.swapaxes(axes, 1, 2), 0, -1)
    product = np.maximum(sxx, 0.0) * np.maximum(syy, 0.0)
    seen = (sxy > SEEN_EVIDENCE * np.sqrt(product * CORRELATED_CELLS / len(weight))) & (product > 0)
    if not seen.any():
        return None
    ratio = deming_slope(sxx, syy, np.where(seen, sxy, 1.0), noise_ratio(overlap, model))
    change = np.where(seen, np.log(ratio / model.ratio), 0.0)
    ratio = model.ratio * np.exp(np.clip(change, -LARGEST_CHANGE, LARGEST_CHANGE))
    rows = residual_rows(overlap, axes, ratio)
    sigma = noise_of_difference(overlap, ratio)
    inverse = inverse_information(products, rows[:, 1], sigma)
    pull = np.sum((products @ rows[:, 0, :, None])[:, 2:, 0] / sigma, axis=0) - PRIOR_INFORMATION * model.theta
    change = inverse[:, len(ratio) :] @ pull
    change[: len(ratio)] = np.clip(change[: len(ratio)], -LARGEST_CHANGE, LARGEST_CHANGE)
    ratio, theta = ratio * np.exp(change[: len(ratio)]), model.theta + change[len(ratio) :]
    rows = residual_rows(overlap, both_axes(ratio, theta), ratio)
    return Model(ratio, theta, np.concatenate([rows, -rows @ free], axis=2), free, weight, inverse)


def noise_ratio(overlap: Overlap, model: Model) -> np.ndarray:
    """Variance (C,) of y's noise over that of x's, each with half of the distortions taken out.

    They are taken from the noise as well: it becomes narrower in one and wider in the other.
    """
    share, narrower = share_of_x(overlap, model.ratio), model.theta @ NOISE_IN_STENCILS
    ratio = (1 - (1 - share) * narrower) / (1 + share * narrower)
    return overlap.vy / overlap.vx * np.clip(ratio, 0.1, 10.0)


def weighted_products(design: np.ndarray, weight: np.ndarray, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted products (C, V, V) of the first rows of the design less their fit by the others, the basis.

    Also the coefficients (C, V, m) of that fit. The basis is what may be added to any channel of any tile.
    """
    products = (design * weight) @ np.swapaxes(design, 1, 2)
    gram, cross = products[:, values:, values:], products[:, :values, values:]
    # the ridge keeps a plane over a single row of cells solvable
    ridge = (1e-12 * np.trace(gram[0]) + 1e-300) * np.eye(gram.shape[1])
    free = cross @ np.linalg.inv(gram + ridge)
    return products[:, :values, :values] - free @ np.swapaxes(cross, 1, 2), free


def both_axes(ratio: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Rows (C, 2, V): x and y, each with half of the distortions taken out, as combinations of the design's rows."""
    rows = np.zeros((len(ratio), 2, 2 + len(theta)))
    rows[:, 0, 0] = rows[:, 1, 1] = 1.0
    rows[:, 0, 2:] = 0.5 * theta
    rows[:, 1, 2:] = -0.5 * ratio[:, None] * theta
    return rows


def residual_rows(overlap: Overlap, axes: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Rows (C, 2, V): y / ratio - x and the best estimate of what both show, in units of the former's noise."""
    difference = axes[:, 1] / ratio[:, None] - axes[:, 0]
    structure = axes[:, 0] + (1 - share_of_x(overlap, ratio))[:, None] * difference
    return np.stack([difference, structure], axis=1) / noise_of_difference(overlap, ratio)[:, None]


def inverse_information(products: np.ndarray, structure: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Inverse (C + K, C + K) of the information on each channel's log ratio and on each shared coefficient.

    ``products`` (C, V, V) are those of the design, ``structure`` (C, V) its combination, ``sigma`` (C, 1) the noise.
    The prior on the coefficients makes it positive definite.
    """
    channels = len(products)
    with_structure = (products @ structure[:, :, None])[:, :, 0]
    across = with_structure[:, 2:] / sigma
    # of a constant channel nothing is known
    own = np.diag(np.maximum(np.sum(structure * with_structure, axis=1), LEAST_INFORMATION))
    shared = np.sum(products[:, 2:, 2:] / sigma[:, :, None] ** 2, axis=0) + np.diag(PRIOR_INFORMATION)
    information = np.empty((channels + len(shared),) * 2)
    information[:channels, :channels], information[channels:, channels:] = own, shared
    information[:channels, channels:], information[channels:, :channels] = across, across.T
    return np.linalg.inv(information)


def smooth_columns(used: np.ndarray, order: int) -> np.ndarray:
    """The polynomials (2 or 5, n) of an order, without the constant, at the used cells (h, w)."""
    y, x = (2 * (at + 0.5) / size - 1 for at, size in zip(np.nonzero(used), used.shape, strict=True))
    return np.stack([y, x] if order < 2 else [y, x, y * y, x * y, x * x])


def needs_gradient(smooth: np.ndarray, design: np.ndarray, model: Model) -> bool:
    """Whether the residuals may hold what the smooth columns (m, n) would take out, all channels together.

    The improvement of chi square by a column of pure noise is about 1, times the cells that smoothing correlates, of
    which this is the upper bound. A gradient too small to be certain would still pass for the nebula's: in doubt the
    columns stay.
    """
    residual = (model.rows @ design)[:, 0]
    columns = smooth - (smooth @ model.weight / np.sum(model.weight))[:, None]
    weighted = columns * model.weight
    gram, pull = weighted @ columns.T, weighted @ residual.T
    gram[np.diag_indices(len(gram))] += 1e-12 * np.trace(gram) + 1e-300
    gain = float(np.sum(pull * np.linalg.solve(gram, pull)))
    degrees = pull.size
    return gain > CORRELATED_CELLS * (degrees - 0.75 * np.sqrt(2 * degrees))
