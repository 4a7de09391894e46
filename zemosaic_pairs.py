"""What the overlap of two tiles says about their gains: errors-in-variables fits of one tile on the other.

Both tiles are means over the same coarse cells (:class:`CoarseTile`), so both axes are noisy and the noise is known.
The fit is Deming's, robust, on the structure that remains after a constant. What else may differ between two
exposures of one sky is fitted along: a displacement and the width and shape of the stars (shared by all channels, so
that it cannot trade against one channel's gain, a colour error), and a plane where the residuals ask for it.
docs/photometry.md derives it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

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
#: Most cells of one pair that enter its fit.
MAX_CELLS = 3500
#: Most steps of one iterative fit.
MAX_STEPS = 12
#: Tuning constant of Tukey's biweight for 95 % efficiency on Gaussian residuals.
TUKEY = 4.685
#: Kernel that smooths the cells before a gain is fitted (binomial, along each axis), the factor by which it lowers the
#: variance of noise, and the number of cells that it correlates with one another.
BINOMIAL = np.array([1.0, 2.0, 1.0]) / 4.0
SMOOTHED_VARIANCE = float(np.sum(BINOMIAL**2)) ** 2
CORRELATED_CELLS = 1.0 / SMOOTHED_VARIANCE
#: First and second derivative along one axis, exact for polynomials of the fourth degree.
FIRST = np.array([1.0, -8.0, 0.0, 8.0, -1.0]) / 12.0
SECOND = np.array([-1.0, 16.0, -30.0, 16.0, -1.0]) / 12.0
#: Expected sizes of the distortions of :func:`distortions`, in cells to the power of their order.
EXPECTED_DISTORTION = np.array([0.1, 0.1, 0.2, 0.2, 0.1, 0.05])


@dataclass(frozen=True)
class CoarseTile:
    """One tile on the common coarse grid.

    Attributes
    ----------
    name : str
    corner : (int, int)
        Row and column of ``means[:, 0, 0]`` on the coarse grid of the mosaic.
    means : ndarray
        float32 (C, h, w), tile units; NaN where the cell was not measured.
    fraction : ndarray
        float32 (h, w) in 0..1: the part of the cell that holds data.
    noise : ndarray
        float64 (C,), standard deviation of one cell's mean, tile units.
    pixel_noise : ndarray
        float64 (C,), standard deviation of one of the tile's pixels.
    sky : ndarray
        float64 (C,), the tile's own sky level: the pivot.
    area : ndarray, optional
        float32 (h, w), the solid angle of a tile pixel in each cell relative to that in the tile's middle, up to a
        factor common to all tiles. Distortion makes it vary: flat-fielded pixels then keep the brightness of a surface,
        but not the flux of a star (see :func:`make_overlap`).
    """

    name: str
    corner: tuple[int, int]
    means: np.ndarray
    fraction: np.ndarray
    noise: np.ndarray
    pixel_noise: np.ndarray
    sky: np.ndarray
    area: np.ndarray | None = None


@dataclass(frozen=True)
class PairRelation:
    """What the overlap of tiles ``i`` and ``j`` says, per channel.

    ``log_ratio`` = ln(g_i / g_j), with its standard error (inf where the overlap has too little structure);
    ``scatter`` is the robust scatter of the cells about the fit in units of what the pixel noise explains;
    ``samples`` the number of common cells. ``mean_i`` and ``mean_j`` are means over the same cells, those without stars
    weighing most, less each tile's own sky; ``mean_se`` is the standard error of ``mean_i - mean_j`` in units of tile i.
    ``step_before`` is the difference of the sky of the tiles as they came, in units of one tile's pixel noise.
    """

    i: int
    j: int
    log_ratio: np.ndarray
    log_ratio_se: np.ndarray
    scatter: np.ndarray
    samples: int
    mean_i: np.ndarray
    mean_j: np.ndarray
    mean_se: np.ndarray
    step_before: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Structure of both tiles in an overlap, (C, h, w), smoothed, and the variance (C,) of a smoothed cell.

    ``used`` (h, w) marks the cells that enter the fit.
    """

    x: np.ndarray
    y: np.ndarray
    used: np.ndarray
    vx: np.ndarray
    vy: np.ndarray


@dataclass(frozen=True)
class Fit:
    """``y = ratio x + const`` after everything else, with units of the noise for what is marked (sigma).

    ``ratio`` (C,) is g_b / g_a, ``theta`` (K,) the coefficients of the distortions; ``x`` and ``y`` (C, n) are the cells
    with the distortions taken out, ``residual`` (sigma) that of y / ratio - x and ``structure`` (sigma) the best
    estimate of what both show; ``scatter`` (C,) (sigma) is the robust scatter, ``weight`` (n,) belongs to the cells.
    """

    ratio: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    y: np.ndarray
    residual: np.ndarray
    structure: np.ndarray
    scatter: np.ndarray
    weight: np.ndarray


# ---------------------------------------------------------------------------------------------------- common cells


def overlap_windows(a: CoarseTile, b: CoarseTile) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Slices of the common cells in ``a`` and in ``b``; None where their rectangles do not meet."""
    slices = []
    for axis in (0, 1):
        low = max(a.corner[axis], b.corner[axis])
        high = min(a.corner[axis] + a.fraction.shape[axis], b.corner[axis] + b.fraction.shape[axis])
        if low >= high:
            return None
        slices.append([slice(low - t.corner[axis], high - t.corner[axis]) for t in (a, b)])
    return (slices[0][0], slices[1][0]), (slices[0][1], slices[1][1])


def common_cells(a: CoarseTile, b: CoarseTile, fraction: float = 0.9):
    """Means of both tiles (C, h, w) over their common rectangle and the mask (h, w) of cells that both fill."""
    windows = overlap_windows(a, b)
    if windows is None:
        return None
    (ya, xa), (yb, xb) = windows
    both = (a.fraction[ya, xa] >= fraction) & (b.fraction[yb, xb] >= fraction)
    if np.count_nonzero(both) < MIN_CELLS:
        return None
    return a.means[:, ya, xa], b.means[:, yb, xb], both


def measure_pairs(tiles: Sequence[CoarseTile], excluded: np.ndarray | None = None) -> list[PairRelation]:
    """Relations of the overlapping pairs, in the order of the tiles."""
    found = (pair_relation(tiles, *pair) for pair in overlapping_pairs(tiles, excluded))
    return [relation for relation in found if relation is not None]


class PairsInPassing:
    """Measures each pair as soon as both tiles are there, on a thread of its own, while others are being measured.

    A context manager; :meth:`add` may be called from many threads, in any order. With ``hubs``, tiles of one field need
    not all be compared with one another: only pairs that hold a hub are measured.
    """

    def __init__(self, count: int, hubs: Sequence[int] = ()) -> None:
        self._tiles: list[CoarseTile | None] = [None] * count
        self._hubs = set(hubs) or set(range(count))
        self._pending: dict[tuple[int, int], Future] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pairs")

    def __enter__(self) -> PairsInPassing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, k: int, tile: CoarseTile) -> None:
        """Tile ``k`` is measured."""
        with self._lock:
            self._tiles[k] = tile
            for j, other in enumerate(self._tiles):
                if other is not None and j != k and (j in self._hubs or k in self._hubs):
                    self._measure(min(j, k), max(j, k))

    def _measure(self, i: int, j: int) -> None:
        if (i, j) not in self._pending and overlap_windows(self._tiles[i], self._tiles[j]) is not None:
            self._pending[i, j] = self._pool.submit(pair_relation, self._tiles, i, j)

    def relations(self) -> list[PairRelation]:
        """What `measure_pairs` gives for all tiles, or for the pairs that hold a hub.

        All pairs are measured where those with a hub fall apart into more groups than they form together.
        """
        if len(self._hubs) < len(self._tiles):
            everything = overlapping_pairs(self._tiles, None)
            if _groups(len(self._tiles), list(self._pending)) > _groups(len(self._tiles), everything):
                for pair in everything:
                    self._measure(*pair)
        found = (self._pending[pair].result() for pair in sorted(self._pending))
        return [relation for relation in found if relation is not None]


def overlapping_pairs(tiles: Sequence[CoarseTile], excluded: np.ndarray | None) -> list[tuple[int, int]]:
    """All pairs of tiles, without those ``excluded``, whose rectangles meet."""
    use = [k for k in range(len(tiles)) if excluded is None or not excluded[k]]
    boxes = np.array([[*t.corner, t.corner[0] + t.fraction.shape[0], t.corner[1] + t.fraction.shape[1]] for t in tiles])
    pairs: list[tuple[int, int]] = []
    for position, i in enumerate(use):
        rest = np.array(use[position + 1 :], dtype=int)
        meets = ((boxes[rest, :2] < boxes[i, 2:]) & (boxes[rest, 2:] > boxes[i, :2])).all(axis=1)
        pairs += [(i, int(j)) for j in rest[meets]]
    return pairs


def _groups(count: int, pairs: Sequence[tuple[int, int]]) -> int:
    i, j = np.array(pairs, int).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(count, count))
    return int(csgraph.connected_components(graph, directed=False)[0])


def pair_relation(tiles: Sequence[CoarseTile], i: int, j: int) -> PairRelation | None:
    """Measure the overlap of two tiles; None where they have no common cells."""
    a, b = tiles[i], tiles[j]
    common = common_cells(a, b)
    if common is None:
        return None
    means_a, means_b, both = common
    overlap = make_overlap(a, b, means_a, means_b, both)
    fit, error = fit_overlap(overlap)
    mean_i, mean_j, mean_se = sky_means(overlap, fit)
    return PairRelation(
        i,
        j,
        log_ratio=-np.log(fit.ratio),
        log_ratio_se=error,
        scatter=fit.scatter,
        samples=int(np.count_nonzero(both)),
        mean_i=mean_i,
        mean_j=mean_j,
        mean_se=mean_se,
        step_before=in_units(
            mean_i + a.sky - mean_j - b.sky, np.sqrt((np.square(a.pixel_noise) + np.square(b.pixel_noise)) / 2)
        ),
    )


def make_overlap(a: CoarseTile, b: CoarseTile, means_a: np.ndarray, means_b: np.ndarray, both: np.ndarray) -> Overlap:
    """Smooth both tiles alike, so that no star is cut by a cell's edge.

    The kernel is normalised by the common mask: at the edge of the overlap it is cut for both alike. Where the tiles
    know the solid angle of their pixels, the stars of ``b`` are scaled by its ratio, the nebula is not.
    """
    support = _along(both.astype(float), BINOMIAL)
    support[support == 0] = 1.0
    x, y = (
        _along(np.where(both, means - tile.sky[:, None, None], 0.0).astype(float), BINOMIAL) / support
        for means, tile in ((means_a, a), (means_b, b))
    )
    if a.area is not None and b.area is not None:
        (ya, xa), (yb, xb) = overlap_windows(a, b)
        y = y + (np.where(both, a.area[ya, xa] / b.area[yb, xb], 1.0) - 1.0) * small_scale(y)
    vx, vy = (np.maximum(np.asarray(t.noise, float) ** 2 * SMOOTHED_VARIANCE, 1e-30) for t in (a, b))
    return Overlap(x, y, thinned(both), vx, vy)


def thinned(used: np.ndarray) -> np.ndarray:
    """At most about :data:`MAX_CELLS` of the used cells, spread evenly."""
    thin = int(np.ceil(np.count_nonzero(used) / MAX_CELLS))
    across = int(np.sqrt(thin))
    down = -(-thin // across)
    every = np.zeros_like(used)
    every[::down, ::across] = used[::down, ::across]
    return every


def small_scale(image: np.ndarray) -> np.ndarray:
    """What stars add to an image (C, h, w) of cells: the image less its mean over 25 cells squared."""
    return image - ndimage.uniform_filter(image, (0, 25, 25), mode="nearest")


def _along(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate with a kernel along the last two axes, zeros beyond the edge."""
    for axis in (-2, -1):
        image = ndimage.correlate1d(image, kernel, axis=axis, mode="constant")
    return image


# ---------------------------------------------------------------------------------------------------------- fitting


def fit_overlap(overlap: Overlap) -> tuple[Fit, np.ndarray]:
    """The fit of one tile on the other and the standard errors (C,) of the log ratios.

    The errors are infinite, all of them, where the tiles share no structure beyond their noise.
    """
    x, y = overlap.x[:, overlap.used], overlap.y[:, overlap.used]
    unknown = np.full(len(x), np.inf)
    nothing = without_structure(x, y)
    ratio = initial_ratios(x, y, overlap.vx, overlap.vy)
    if ratio is None:
        return nothing, unknown
    basis, columns, relative = np.ones((1, x.shape[1])), np.zeros((0, *x.shape)), STRUCTURE_ERROR
    fit: Fit | None = replace(nothing, ratio=ratio)
    for step in range(3):
        fit = fit_ratios(overlap, basis, columns, fit, relative)
        if fit is None:
            return nothing, unknown
        if step == 1:
            relative = structure_error(fit)
        if step < 2:
            columns = distortions(overlap, fit.ratio)
            # the next fit may explain what this one doubted
            fit = replace(fit, weight=1 / (1 + np.mean((relative * fit.structure) ** 2, axis=0)))
    if needs_plane(overlap, fit):
        basis = np.concatenate([basis, plane_columns(overlap.used)])
        fit = fit_ratios(overlap, basis, columns, fit, relative)
        if fit is None:
            return nothing, unknown
    return fit, standard_errors(overlap, fit, without(columns, basis, fit.weight))


def without_structure(x: np.ndarray, y: np.ndarray) -> Fit:
    """What is known of an overlap that tells no ratio, and where every fit begins."""
    one = np.ones(len(x))
    return Fit(one, np.zeros(0), x, y, y - x, x, one * np.nan, np.ones(x.shape[1]))


def structure_error(fit: Fit) -> float:
    """The relative error of the structure that the residuals themselves speak for.

    The likeliest of :data:`STRUCTURE_ERRORS` for residuals that follow a multivariate t distribution of 4 degrees of
    freedom, which outliers do not disturb.
    """
    channels = len(fit.ratio)
    u2, s2 = np.sum(fit.residual**2, axis=0), np.mean(fit.structure**2, axis=0)
    own = max(1.0, float(np.mean(fit.scatter**2)))
    costs = []
    for relative in STRUCTURE_ERRORS:
        variance = own + relative**2 * s2
        costs.append(np.sum(channels * np.log(variance) + (4 + channels) * np.log1p(u2 / (4 * variance))))
    return float(STRUCTURE_ERRORS[int(np.argmin(costs))])


def initial_ratios(x: np.ndarray, y: np.ndarray, vx: np.ndarray, vy: np.ndarray) -> np.ndarray | None:
    """Robust first guess of the slopes (C,) of y on x (C, n); None where they share no structure in some channel.

    The correlation of n independent pairs of pure noise has a standard deviation of 1 / sqrt(n).
    """
    if x.shape[1] < MIN_CELLS:
        return None
    x, y = (t - np.median(t, axis=1, keepdims=True) for t in (x, y))
    limits = [np.quantile(np.abs(t), 0.995, axis=1, keepdims=True) for t in (x, y)]
    x, y = (np.clip(t, -limit, limit) for t, limit in zip((x, y), limits, strict=True))
    sxx, syy, sxy = (np.mean(product, axis=1) for product in (x * x, y * y, x * y))
    if (sxy <= 5 * np.sqrt(sxx * syy * CORRELATED_CELLS / x.shape[1])).any():
        return None
    return deming_slope(sxx, syy, sxy, vy / vx)


def deming_slope(sxx: np.ndarray, syy: np.ndarray, sxy: np.ndarray, noise_ratio: np.ndarray) -> np.ndarray:
    """Maximum-likelihood slope for errors on both axes; Deming (1943), Statistical Adjustment of Data, ch. 11."""
    d = syy - noise_ratio * sxx
    return (d + np.sqrt(d * d + 4 * noise_ratio * sxy * sxy)) / (2 * sxy)


def distortions(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """What a displacement and another width of the stars do to the common structure: columns (K, C, n).

    The terms of the Taylor series of a convolution: both first derivatives, the three second ones (width, elongation)
    and the Laplacian twice (the wings). The common structure is the inverse-variance mean of both tiles: its noise is
    independent of that of their difference.
    """
    share = share_of_x(overlap, ratio)[:, None, None]
    common = share * overlap.x + (1 - share) * overlap.y / ratio[:, None, None]
    dy, dx = derivative(common, FIRST, -2), derivative(common, FIRST, -1)
    dyy, dxx = derivative(common, SECOND, -2), derivative(common, SECOND, -1)
    dxy = derivative(dy, FIRST, -1)
    wings = derivative(dyy + dxx, SECOND, -2) + derivative(dyy + dxx, SECOND, -1)
    return np.stack([t[:, overlap.used] for t in (dy, dx, dyy, dxx, dxy, wings)])


def derivative(image: np.ndarray, stencil: np.ndarray, axis: int) -> np.ndarray:
    """Derivative along an axis, in units of cells."""
    return ndimage.correlate1d(image, stencil, axis=axis, mode="nearest")


def share_of_x(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Weight (C,) of x in the inverse-variance mean of x and y / ratio."""
    return overlap.vy / (overlap.vy + ratio**2 * overlap.vx)


def fit_ratios(overlap: Overlap, basis: np.ndarray, columns: np.ndarray, start: Fit, relative: float) -> Fit | None:
    """Errors-in-variables (Deming) fit with known noise ratio; None where a channel has no slope.

    Iteratively reweighted with Tukey's biweight on the residuals in units of the noise and of the structure's own
    relative error, against moved, saturated or variable sources. All channels share the weights: a star that is
    doubted in one channel is doubted in all, or the channels would be tied to different stars, a colour error.

    Parameters
    ----------
    basis : ndarray (m, n)
        What may be added to any channel of any tile: a constant, perhaps a plane.
    columns : ndarray (K, C, n)
        Distortions whose coefficients all channels share.
    start : Fit
        First guess of the ratios, the coefficients and the weights.
    """
    x, y = overlap.x[:, overlap.used], overlap.y[:, overlap.used]
    ratio, weight = start.ratio, start.weight
    theta = start.theta if len(start.theta) == len(columns) else np.zeros(len(columns))
    for _ in range(MAX_STEPS):
        previous = ratio
        half = 0.5 * np.tensordot(theta, columns, 1)
        same_x, same_y = x + half, y - ratio[:, None] * half
        px, py = without(same_x, basis, weight), without(same_y, basis, weight)
        sxy = (px * py) @ weight
        if (sxy <= 0).any():
            return None
        ratio = deming_slope((px * px) @ weight, (py * py) @ weight, sxy, overlap.vy / overlap.vx)
        sigma = noise_of_difference(overlap, ratio)
        residual = py / ratio[:, None] - px
        structure = (px + (1 - share_of_x(overlap, ratio))[:, None] * residual) / sigma
        residual = residual / sigma
        scatter = 1.4826 * np.median(np.abs(residual), axis=1)
        if len(theta):
            projected = without(columns, basis, weight) / sigma
            pull = projected.reshape(len(theta), -1) @ (residual * weight).ravel() - prior_information() * theta
            theta = theta + inverse_information(structure, projected, weight)[len(x) :, len(x) :] @ pull
        weight = shared_weights(residual, structure, scatter, relative)
        # without the distortions the fit is a first guess
        if np.max(np.abs(ratio / previous - 1)) < (1e-5 if len(columns) else 1e-3):
            break
    return Fit(ratio, theta, same_x, same_y, residual, structure, np.maximum(scatter, 1.0), weight)


def noise_of_difference(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Standard deviation (C, 1) that noise gives to y / ratio - x."""
    return np.sqrt(overlap.vx + overlap.vy / ratio**2)[:, None]


def prior_information() -> np.ndarray:
    """Diagonal (K,) of the information that :data:`EXPECTED_DISTORTION` stands for."""
    return CORRELATED_CELLS / EXPECTED_DISTORTION**2


def inverse_information(structure: np.ndarray, columns: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Inverse (C + K, C + K) of the information on each channel's log ratio and on each shared coefficient.

    ``structure`` (C, n) and ``columns`` (K, C, n) are in units of the noise. The prior makes it positive definite.
    """
    channels, shared = len(structure), len(columns)
    information = np.zeros((channels + shared, channels + shared))
    information[:channels, :channels] = np.diag((structure * structure) @ weight)
    if shared:
        weighted = columns * weight
        across = np.sum(weighted * structure, axis=2)
        information[channels:, :channels] = across
        information[:channels, channels:] = across.T
        flat = columns.reshape(shared, -1)
        information[channels:, channels:] = weighted.reshape(shared, -1) @ flat.T + np.diag(prior_information())
    return np.linalg.inv(information)


def without(values: np.ndarray, basis: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Values (..., n) less their weighted least-squares fit by the basis (m, n)."""
    weighted = basis * weight
    gram = weighted @ basis.T
    # the ridge keeps a plane over a single row of cells solvable
    gram[np.diag_indices_from(gram)] += 1e-12 * np.trace(gram) + 1e-300
    return values - (values @ weighted.T) @ np.linalg.inv(gram) @ basis


def shared_weights(residual: np.ndarray, structure: np.ndarray, scatter: np.ndarray, relative: float) -> np.ndarray:
    """Weight (n,) of each cell from residuals and structure (C, n) in units of the noise, and the structure's error."""
    variance = max(1.0, float(np.mean(scatter**2))) + np.mean((relative * structure) ** 2, axis=0)
    u2 = np.mean(residual**2, axis=0) / variance / TUKEY**2
    return np.where(u2 < 1, (1 - u2) ** 2, 0.0) / variance


def standard_errors(overlap: Overlap, fit: Fit, columns: np.ndarray) -> np.ndarray:
    """Standard error (C,) of each log ratio: sandwich estimate, correlated neighbours and shared terms included."""
    channels = len(fit.ratio)
    columns = columns / noise_of_difference(overlap, fit.ratio)
    inverse = inverse_information(fit.structure, columns, fit.weight)
    pull = fit.residual * fit.weight
    scores = np.concatenate([fit.structure * pull, np.sum(columns * pull, axis=1)])
    leverage = star_leverage(fit.weight * fit.structure**2, overlap.used)
    out = np.full(channels, np.inf)
    for c, influence in enumerate(inverse[:channels] @ scores):
        error = clustered_deviation(influence / (1 - leverage[c]), overlap.used)
        out[c] = error if error < MAX_PAIR_SE else np.inf
    return out


def star_leverage(information: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Share (C, n) of the information (C, n) that lies within two cells, at most 0.8.

    A star that decides the fit leaves no residual: residuals over 1 - leverage are those of a fit without it (the
    jackknife; MacKinnon & White 1985).
    """
    image = np.zeros((len(information), *used.shape))
    image[:, used] = information / np.maximum(information.sum(axis=1, keepdims=True), 1e-300)
    return np.minimum(_along(image, np.ones(5))[:, used], 0.8)


def sky_means(overlap: Overlap, fit: Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Robust means (C,) of x and of y over the same cells, and the standard error of the difference in units of x.

    Bright cells, where an error of the gain or of the stars' shape speaks, count for less.
    """
    sigma = noise_of_difference(overlap, fit.ratio)
    structure = 0.5 * (fit.x + fit.y / fit.ratio[:, None])
    structure = (structure - np.median(structure, axis=1, keepdims=True)) / sigma
    difference = (fit.y / fit.ratio[:, None] - fit.x) / sigma
    centre = np.median(difference, axis=1, keepdims=True)
    for _ in range(10):
        scatter = 1.4826 * np.median(np.abs(difference - centre), axis=1)
        weight = shared_weights(difference - centre, structure, scatter, SKY_STRUCTURE_ERROR)
        previous, centre = centre, (difference @ weight / np.sum(weight))[:, None]
        if np.max(np.abs(centre - previous)) < 1e-6:
            break
    total = np.sum(weight)
    error = [clustered_deviation(weight * row, overlap.used) for row in sigma * (difference - centre)]
    return fit.x @ weight / total, fit.y @ weight / total, np.maximum(np.array(error) / total, 1e-3 * sigma[:, 0])


def clustered_deviation(influence: np.ndarray, used: np.ndarray) -> float:
    """Standard deviation of the sum of influences (n,) whose neighbours are correlated (smoothing, debayering).

    The sum of products over all pairs of cells less than five cells apart, tapered (Newey & West 1987) so that it
    cannot be negative.
    """
    image = np.zeros(used.shape)
    image[used] = influence
    taper = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0]) / 5.0
    near = _along(image, taper)
    return float(np.sqrt(max(np.sum(image * near), np.sum(influence**2))))


def plane_columns(used: np.ndarray) -> np.ndarray:
    """Two slopes (2, n) over the used cells, zero in the middle."""
    rows, columns = np.nonzero(used)
    return np.stack([rows / used.shape[0] - 0.5, columns / used.shape[1] - 0.5])


def needs_plane(overlap: Overlap, fit: Fit) -> bool:
    """Whether the residuals show a plane, all channels together.

    The improvement of chi square by a column of pure noise is about 1, times the cells that smoothing correlates.
    """
    root = np.sqrt(fit.weight)
    columns = without(plane_columns(overlap.used), np.ones((1, len(root))), fit.weight) * root
    basis = np.linalg.qr(columns.T)[0]
    gain = float(np.sum(((fit.residual * root) @ basis) ** 2))
    degrees = basis.shape[1] * len(fit.ratio)
    return gain > CORRELATED_CELLS * (degrees + 5 * np.sqrt(2 * degrees))


def in_units(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value / scale, 0 where the scale is 0."""
    return np.divide(value, scale, out=np.zeros_like(value, dtype=float), where=scale > 0)
