"""Errors-in-variables fits of one image on another: the ratio of two exposures of one sky, per channel.

Both images are means over the same coarse cells, so both axes are noisy and the noise is known. The fit is Deming's,
robust, on the structure that remains after a constant. What else may differ between two exposures is fitted along: a
displacement and the width and shape of the stars (shared by all channels, so that it cannot trade against one
channel's gain, a colour error), and a plane where the residuals ask for it. docs/photometry.md derives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

#: Relative errors of a cell's brightness that noise does not explain (flat fields, colour terms, the stars' wings):
#: what is assumed at first, and from what :func:`structure_error` chooses.
STRUCTURE_ERROR = 0.005
STRUCTURE_ERRORS = np.geomspace(0.001, 0.064, 13)
#: The same where the sky is compared: stars count for less still.
SKY_STRUCTURE_ERROR = 0.03
#: A pair whose log ratio is known worse than this has too little structure: it is no gain edge.
MAX_PAIR_SE = 0.25
#: Fewest common cells for an overlap to count.
MIN_CELLS = 12
#: Most steps of one iterative fit.
MAX_STEPS = 12
#: The same where the sky is compared.
SKY_STEPS = 10
#: Tuning constant of Tukey's biweight for 95 % efficiency on Gaussian residuals.
TUKEY = 4.685
#: Cells from which the first guess of everything is made.
FIRST_CELLS = 1000
#: Factor by which smoothing the cells with (1 2 1) / 4 along each axis lowers the variance of noise, and the number of
#: cells that it correlates with one another.
SMOOTHED_VARIANCE = (6 / 16) ** 2
CORRELATED_CELLS = 1.0 / SMOOTHED_VARIANCE
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


@dataclass(frozen=True)
class Overlap:
    """Structure of both tiles in an overlap, smoothed, and the variance (C,) of a smoothed cell.

    ``image_x`` and ``image_y`` (C, h, w) are the common rectangle, zero where a tile has no data. Of its cells, those of
    every ``step`` = (rows, columns) may enter the fit; ``used`` (h', w') marks those that do. ``x`` and ``y`` (C, n) are
    these cells.
    """

    image_x: np.ndarray
    image_y: np.ndarray
    x: np.ndarray
    y: np.ndarray
    used: np.ndarray
    step: tuple[int, int]
    vx: np.ndarray
    vy: np.ndarray


@dataclass(frozen=True)
class Model:
    """``y = ratio x + const`` after everything else; the rows are those of :func:`make_design`.

    ``ratio`` (C,) is g_b / g_a, ``theta`` (K,) the coefficients of the distortions. ``rows`` (C, 2, R) combine the
    design's rows to the residual y / ratio - x and to the best estimate of what both tiles show, both in units of the
    former's noise; ``free`` (C, V, m) is what constants (and planes) take out of the other rows. ``weight`` (n,) are the
    weights of the cells that led here, ``inverse`` (C + K, C + K) that of the information on log ratios and theta.
    """

    ratio: np.ndarray
    theta: np.ndarray
    rows: np.ndarray
    free: np.ndarray
    weight: np.ndarray
    inverse: np.ndarray


@dataclass(frozen=True)
class Fit:
    """Ratio (C,), the cells ``x`` and ``y`` (C, n) without the distortions, and the robust scatter (C,) in sigma."""

    ratio: np.ndarray
    x: np.ndarray
    y: np.ndarray
    scatter: np.ndarray


def fit_overlap(overlap: Overlap) -> tuple[Fit, np.ndarray]:
    """The fit of one tile on the other and the standard errors (C,) of the log ratios.

    A part of the cells leads near the solution, all of them end there. The errors are infinite, all of them, where the
    tiles share no structure beyond their noise.
    """
    one = np.ones(len(overlap.x))
    unknown = Fit(one, overlap.x, overlap.y, one * np.nan), one * np.inf
    ratio = initial_ratios(overlap)
    if ratio is None:
        return unknown
    design = make_design(overlap, ratio)
    some = np.ascontiguousarray(design[:, :, part(design.shape[2])])
    model = fit_ratios(overlap, some, first_model(overlap, ratio), STRUCTURE_ERROR, 0.1)
    if model is None:
        return unknown
    if np.max(np.abs(np.log(model.ratio / ratio))) > 0.05:
        design = make_design(overlap, model.ratio)
    relative = structure_error(design, model)
    model = fit_ratios(overlap, design, model, relative, 0.02)
    if model is None:
        return unknown
    planes = plane_columns(overlap.used, model.weight)
    if needs_plane(planes, design, model):
        design = np.concatenate([design, np.broadcast_to(planes, (len(design), *planes.shape))], axis=1)
        model = replace(model, rows=np.pad(model.rows, ((0, 0), (0, 0), (0, 2))))
        model = fit_ratios(overlap, design, model, relative, 0.02)
        if model is None:
            return unknown
    return final_fit(design, model), standard_errors(overlap, design, model)


def part(count: int) -> slice:
    """About :data:`FIRST_CELLS` of the cells, spread evenly."""
    return slice(None, None, max(1, count // FIRST_CELLS))


def final_fit(design: np.ndarray, model: Model) -> Fit:
    """The cells without the distortions."""
    x, y = np.swapaxes(both_axes(model.ratio, model.theta) @ design[:, : 2 + len(model.theta)], 0, 1)
    residual = (model.rows @ design)[:, 0]
    return Fit(model.ratio, x, y, np.maximum(deviation(residual), 1.0))


def initial_ratios(overlap: Overlap) -> np.ndarray | None:
    """Robust first guess of the slopes (C,) of y on x (C, n); None where they share no structure in some channel.

    The correlation of n independent pairs of pure noise has a standard deviation of 1 / sqrt(n).
    """
    count = overlap.x.shape[1]
    if count < MIN_CELLS:
        return None
    clipped = []
    for values in (overlap.x, overlap.y):
        some = values[:, part(count)]
        middle = median(some)
        high = int(0.995 * (some.shape[1] - 1))
        limit = np.partition(np.abs(some - middle), high, axis=1)[:, high, None]
        clipped.append(np.clip(values - middle, -limit, limit))
    x, y = clipped
    sxx, syy, sxy = (np.mean(product, axis=1) for product in (x * x, y * y, x * y))
    if (sxy <= 5 * np.sqrt(sxx * syy * CORRELATED_CELLS / count)).any():
        return None
    return deming_slope(sxx, syy, sxy, overlap.vy / overlap.vx)


def deming_slope(sxx: np.ndarray, syy: np.ndarray, sxy: np.ndarray, noise_ratio: np.ndarray) -> np.ndarray:
    """Maximum-likelihood slope for errors on both axes; Deming (1943), Statistical Adjustment of Data, ch. 11."""
    d = syy - noise_ratio * sxx
    return (d + np.sqrt(d * d + 4 * noise_ratio * sxy * sxy)) / (2 * sxy)


def first_model(overlap: Overlap, ratio: np.ndarray) -> Model:
    """Nothing but a ratio: the structure follows from it, no cell is doubted yet."""
    share, sigma = share_of_x(overlap, ratio), noise_of_difference(overlap, ratio)[:, 0]
    kinds = len(STENCILS)
    rows = np.zeros((len(ratio), 2, 3 + kinds))
    rows[:, 1, 0], rows[:, 1, 1] = share / sigma, (1 - share) / ratio / sigma
    middle = np.concatenate([median(t[:, part(t.shape[1])]) for t in (overlap.x, overlap.y)], axis=1)
    rows[:, 1, -1] = -np.sum(rows[:, 1, :2] * middle, axis=1)
    empty = np.zeros(0)
    return Model(ratio, np.zeros(kinds), rows, empty, empty, empty)


def make_design(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Rows (C, 2 + K + 1, n) of what the fit combines: x, y, K distortions of the common structure, a constant.

    The common structure is the inverse-variance mean of both tiles: its noise is independent of that of their
    difference.
    """
    rows, columns = np.nonzero(overlap.used)
    width = overlap.image_x.shape[2] + 2 * REACH
    corner = (rows * overlap.step[0] + REACH) * width + columns * overlap.step[1] + REACH
    near = corner + (NEAR @ [width, 1])[:, None]
    design = np.empty((len(ratio), 2 + len(STENCILS) + 1, len(rows)))
    design[:, 0], design[:, 1], design[:, -1] = overlap.x, overlap.y, 1.0
    for c, share in enumerate(share_of_x(overlap, ratio)):
        common = share * overlap.image_x[c] + ((1 - share) / ratio[c]) * overlap.image_y[c]
        np.matmul(STENCILS, np.pad(common, REACH, mode="edge").take(near), out=design[c, 2:-1])
    return design


def share_of_x(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Weight (C,) of x in the inverse-variance mean of x and y / ratio."""
    return overlap.vy / (overlap.vy + ratio**2 * overlap.vx)


def noise_of_difference(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Standard deviation (C, 1) that noise gives to y / ratio - x."""
    return np.sqrt(overlap.vx + overlap.vy / ratio**2)[:, None]


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

    All that enters are the weighted products of the design's rows.
    """
    values = 2 + len(model.theta)
    products, free = weighted_products(design, weight, values)
    axes = both_axes(model.ratio, model.theta)
    (sxx, sxy), (_, syy) = np.moveaxis(axes @ products @ np.swapaxes(axes, 1, 2), 0, -1)
    if (sxy <= 0).any():
        return None
    ratio = deming_slope(sxx, syy, sxy, overlap.vy / overlap.vx)
    rows = residual_rows(overlap, axes, ratio)
    sigma = noise_of_difference(overlap, ratio)
    inverse = inverse_information(products, rows[:, 1], sigma)
    pull = np.sum((products @ rows[:, 0, :, None])[:, 2:, 0] / sigma, axis=0) - PRIOR_INFORMATION * model.theta
    change = inverse[:, len(ratio) :] @ pull
    ratio, theta = ratio * np.exp(change[: len(ratio)]), model.theta + change[len(ratio) :]
    rows = residual_rows(overlap, both_axes(ratio, theta), ratio)
    return Model(ratio, theta, np.concatenate([rows, -rows @ free], axis=2), free, weight, inverse)


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
    own = np.diag(np.sum(structure * with_structure, axis=1))
    shared = np.sum(products[:, 2:, 2:] / sigma[:, :, None] ** 2, axis=0) + np.diag(PRIOR_INFORMATION)
    information = np.empty((channels + len(shared),) * 2)
    information[:channels, :channels], information[channels:, channels:] = own, shared
    information[:channels, channels:], information[channels:, :channels] = across, across.T
    return np.linalg.inv(information)


def shared_weights(residual: np.ndarray, structure: np.ndarray, scatter: np.ndarray, relative: float) -> np.ndarray:
    """Weight (n,) of each cell from residuals and structure (C, n) in units of the noise, and the structure's error."""
    variance = max(1.0, float(np.mean(scatter**2))) + relative**2 / len(structure) * np.sum(structure**2, axis=0)
    u2 = np.sum(residual**2, axis=0) / (len(residual) * TUKEY**2 * variance)
    return np.maximum(1 - u2, 0.0) ** 2 / variance


def median(values: np.ndarray) -> np.ndarray:
    """Median (C, 1) of each row of values (C, n)."""
    low, high = (values.shape[1] - 1) // 2, values.shape[1] // 2
    ordered = np.partition(values, (low, high) if low != high else low, axis=1)
    return 0.5 * (ordered[:, low, None] + ordered[:, high, None])


def deviation(values: np.ndarray) -> np.ndarray:
    """Robust standard deviation (C,) about 0 of each row of values (C, n)."""
    return 1.4826 * median(np.abs(values))[:, 0]


def standard_errors(overlap: Overlap, design: np.ndarray, model: Model) -> np.ndarray:
    """Standard error (C,) of each log ratio: sandwich estimate, correlated neighbours and shared terms included."""
    channels = len(model.ratio)
    residual, structure = np.swapaxes(model.rows @ design, 0, 1)
    # score of each log ratio and of each distortion, as combinations of the design's rows
    values = design.shape[1] - model.free.shape[2]
    scores = np.zeros((channels, channels, values))
    scores[:, :, 2:] = model.inverse[:channels, channels:] / noise_of_difference(overlap, model.ratio)[:, None]
    scores += model.inverse[:channels, :channels].T[:, :, None] * model.rows[:, None, 1, :values]
    scores = np.concatenate([scores, -scores @ model.free], axis=2) @ design
    influence = np.sum(scores * (residual * model.weight)[:, None], axis=0)
    leverage = star_leverage(model.weight * structure**2, overlap)
    error = clustered_deviation(influence / (1 - leverage), overlap)
    return np.where(error < MAX_PAIR_SE, error, np.inf)


def star_leverage(information: np.ndarray, overlap: Overlap) -> np.ndarray:
    """Share (C, n) of the information (C, n) that lies within two cells, at most 0.8.

    A star that decides the fit leaves no residual: residuals over 1 - leverage are those of a fit without it (the
    jackknife; MacKinnon & White 1985).
    """
    image = np.zeros((len(information), *overlap.used.shape))
    image[:, overlap.used] = information / np.maximum(information.sum(axis=1, keepdims=True), 1e-300)
    near = _along(image, [np.ones(3)[::step] for step in overlap.step])
    return np.minimum(near[:, overlap.used], 0.8)


def clustered_deviation(influence: np.ndarray, overlap: Overlap) -> np.ndarray:
    """Standard deviation (C,) of the sums of influences (C, n) whose neighbours are correlated (smoothing, debayering).

    The sum of products over all pairs of cells less than five cells apart, tapered (Newey & West 1987) so that it
    cannot be negative.
    """
    image = np.zeros((len(influence), *overlap.used.shape))
    image[:, overlap.used] = influence
    near = _along(image, [np.linspace(1.0, 0.2, 5)[::step] for step in overlap.step])
    return np.sqrt(np.maximum(np.sum(image * near, axis=(1, 2)), np.sum(influence**2, axis=1)))


def _along(image: np.ndarray, kernels: Sequence[np.ndarray]) -> np.ndarray:
    """Correlate with a symmetric kernel along each of the last two axes, zeros beyond the edge.

    A kernel is its values at the distances 0, 1, 2 ...
    """
    for axis, kernel in zip((1, 2), kernels, strict=True):
        image = np.swapaxes(image, axis, 2)
        total = kernel[0] * image
        for distance, value in enumerate(kernel[1:], 1):
            part_of_it = value * image
            total[..., distance:] += part_of_it[..., :-distance]
            total[..., :-distance] += part_of_it[..., distance:]
        image = np.swapaxes(total, axis, 2)
    return image


def sky_means(overlap: Overlap, fit: Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Robust means (C,) of x and of y over the same cells, and the standard error of the difference in units of x.

    Bright cells, where an error of the gain or of the stars' shape speaks, count for less.
    """
    sigma = noise_of_difference(overlap, fit.ratio)
    some = part(fit.x.shape[1])
    y = fit.y / fit.ratio[:, None]
    structure = (0.5 / sigma) * (fit.x + y)
    structure -= median(structure[:, some])
    difference = (y - fit.x) / sigma
    centre = median(difference[:, some])
    small = 0.02 * np.sqrt(CORRELATED_CELLS / fit.x.shape[1])
    step = 0
    while True:
        residual = difference - centre
        weight = shared_weights(residual, structure, deviation(residual[:, some]), SKY_STRUCTURE_ERROR)
        total = np.sum(weight)
        previous, centre = centre, (difference @ weight / total)[:, None]
        step += 1
        if step == SKY_STEPS or np.max(np.abs(centre - previous)) < small:
            break
    error = clustered_deviation(weight * sigma * (difference - centre), overlap) / total
    return fit.x @ weight / total, fit.y @ weight / total, np.maximum(error, 1e-3 * sigma[:, 0])


def plane_columns(used: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Two slopes (2, n) over the used cells, their weighted means zero."""
    planes = np.stack(np.nonzero(used)) / np.array(used.shape)[:, None]
    return planes - (planes @ weight / np.sum(weight))[:, None]


def needs_plane(planes: np.ndarray, design: np.ndarray, model: Model) -> bool:
    """Whether the residuals show a plane, all channels together.

    The improvement of chi square by a column of pure noise is about 1, times the cells that smoothing correlates.
    """
    residual = (model.rows @ design)[:, 0]
    weighted = planes * model.weight
    gram, pull = weighted @ planes.T, weighted @ residual.T
    gram[np.diag_indices(2)] += 1e-12 * np.trace(gram) + 1e-300
    gain = float(np.sum(pull * np.linalg.solve(gram, pull)))
    degrees = pull.size
    return gain > CORRELATED_CELLS * (degrees + 5 * np.sqrt(2 * degrees))


def in_units(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value / scale, 0 where the scale is 0."""
    return np.divide(value, scale, out=np.zeros_like(value, dtype=float), where=scale > 0)
