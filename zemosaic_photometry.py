"""The photometric model of Phase 5: array in, array out; no files, no WCS, no logging.

Sequence of Phase 5, the same on both backends
----------------------------------------------
1. *Measure.* Every tile is resampled onto one coarse grid of cells (means over ``photometry_cell_px`` squared output
   pixels): a :class:`CoarseTile`. (`zemosaic_reproject.measure_tile`)
2. *Solve.* :func:`compute_photometric_gains_and_offsets`: pair relations in the overlaps (:func:`pair_relation`),
   then one global robust least squares for the gains and one for the offsets -> :class:`PhotometricSolution`. On the
   CPU in both modes, so that the gains are bit-identical.
3. *Coadd.* Each tile is normalised with :func:`apply_photometric_normalization` on the backend that holds its pixels,
   then resampled, weighted and combined block by block: the science mosaic. (`zemosaic_reproject.coadd_block`)
4. *Coverage renormalisation*, if asked for: :func:`coverage_scale`, :func:`coverage_gain` and
   :func:`relative_coverage_gains` on the coverage of step 3, then a second coadd.
5. *RGB balance and black point*, if asked for: :func:`rgb_balance_gains`, :func:`black_point`. Steps 4 and 5 make the
   aesthetic mosaic and never touch the science one.

Model
-----
Tile k, channel c, sky position p: ``y = g_kc S_c(p) + o_kc + noise``. The normalised tile is
``C = (y - pivot) / g + level``: the gain acts about the tile's own sky (the pivot), so that limiting a gain cannot
move the sky. The derivation and its limits stand in docs/photometry.md.

Limitations
-----------
One gain and one offset per tile and channel: gradients within a tile stay. Tiles whose overlap has no structure keep
gain 1. The absolute scale is the geometric mean of the tiles' own, the absolute background their median.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

#: Relative error of a cell's brightness that noise does not explain: sampling of stars, flat fields, colour terms.
STRUCTURE_ERROR = 0.005
#: Floor under the standard error of one pair's log ratio, for what its own scatter cannot know.
LOG_RATIO_FLOOR = 3e-4
#: Standard deviation of the prior on a tile's log gain: a factor of 20 either way, felt only where nothing else is.
LOG_GAIN_PRIOR = 3.0
#: A pair whose log ratio is known worse than this has too little structure: it is no gain edge.
MAX_PAIR_SE = 0.25
#: Gains beyond this factor from their component's mean are not believed.
SANE_GAIN = 100.0
#: Fewest common cells for an overlap to count.
MIN_CELLS = 12
#: Most cells of one pair that enter its fit.
MAX_CELLS = 8000
#: Tuning constant of Tukey's biweight for 95 % efficiency on Gaussian residuals.
TUKEY = 4.685
#: Kernel that smooths the cells before a gain is fitted (binomial, along each axis), and the number of cells that it
#: correlates with one another.
BINOMIAL = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
CORRELATED_CELLS = 1.0 / float(np.sum(BINOMIAL**2)) ** 2


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
    """

    name: str
    corner: tuple[int, int]
    means: np.ndarray
    fraction: np.ndarray
    noise: np.ndarray
    pixel_noise: np.ndarray
    sky: np.ndarray


@dataclass(frozen=True)
class PairRelation:
    """What the overlap of tiles ``i`` and ``j`` says, per channel.

    ``log_ratio`` = ln(g_i / g_j), with its standard error (inf where the overlap has too little structure);
    ``scatter`` is the robust scatter of the cells about the fit in units of what the pixel noise explains;
    ``samples`` the number of cells used. ``step_before`` is the median difference of the tiles as they came, in units
    of one tile's pixel noise.
    """

    i: int
    j: int
    log_ratio: np.ndarray
    log_ratio_se: np.ndarray
    scatter: np.ndarray
    samples: int
    step_before: np.ndarray


@dataclass(frozen=True)
class PhotometricSolution:
    """Gain, pivot and level of every tile and channel, (K, C) float64: ``C = (y - pivot) / gain + level``.

    ``gain_se`` is the standard error of ln gain (inf: undetermined), ``offset_se`` of the level in mosaic units.
    ``component`` numbers the connected groups of overlapping tiles, ``excluded`` marks tiles left out of the mosaic.
    ``step_after`` is :attr:`PairRelation.step_before` once normalised, one row a pair.
    """

    gain: np.ndarray
    pivot: np.ndarray
    level: np.ndarray
    gain_se: np.ndarray
    offset_se: np.ndarray
    component: np.ndarray
    excluded: np.ndarray
    pairs: tuple[PairRelation, ...] = ()
    step_after: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    warnings: tuple[str, ...] = ()

    @property
    def offset(self) -> np.ndarray:
        """The additive term of ``y = gain * S + offset``, (K, C), tile units."""
        return self.pivot - self.gain * self.level

    def subset(self, tiles: Sequence[int]) -> PhotometricSolution:
        """The solution of some of the tiles, for the coadd; pairs and warnings stay those of all."""
        rows = np.asarray(tiles, dtype=int)
        names = ("gain", "pivot", "level", "gain_se", "offset_se", "component", "excluded")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def identity_solution(tiles: int, channels: int) -> PhotometricSolution:
    """The solution that changes nothing."""
    shape = (tiles, channels)
    return PhotometricSolution(
        gain=np.ones(shape),
        pivot=np.zeros(shape),
        level=np.zeros(shape),
        gain_se=np.zeros(shape),
        offset_se=np.zeros(shape),
        component=np.zeros(tiles, int),
        excluded=np.zeros(tiles, bool),
    )


def apply_photometric_normalization(data, gain, pivot, level):
    """Bring tile pixels to the common photometric system: ``(data - pivot) / gain + level``.

    Parameters
    ----------
    data : array, floating, (C, ...)
        Tile pixels of any array namespace; NaN stays NaN.
    gain, pivot, level : sequence of C floats
        One row of :class:`PhotometricSolution`.

    Returns
    -------
    array
        Same namespace, dtype, shape and device as ``data``.
    """
    xp = data.__array_namespace__()
    planes = [(data[c, ...] - float(pivot[c])) * (1.0 / float(gain[c])) + float(level[c]) for c in range(data.shape[0])]
    return xp.stack(planes)


# ------------------------------------------------------------------------------------------------- pair relations


def overlap_windows(a: CoarseTile, b: CoarseTile) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Slices of the common cells in ``a`` and in ``b``; None where their rectangles do not meet."""
    slices = []
    for axis in (0, 1):
        low = max(a.corner[axis], b.corner[axis])
        high = min(
            a.corner[axis] + a.fraction.shape[axis],
            b.corner[axis] + b.fraction.shape[axis],
        )
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


def pair_relation(tiles: Sequence[CoarseTile], i: int, j: int) -> PairRelation | None:
    """Measure the overlap of two tiles; None where they have no common cells.

    The gain is first fitted with a free constant alone. What else may differ between the tiles, a plane (gradients)
    and the seeing, costs precision; it is fitted along, in all channels alike, only where the residuals ask for it.
    """
    a, b = tiles[i], tiles[j]
    common = common_cells(a, b)
    if common is None:
        return None
    means_a, means_b, both = common
    overlap = [
        Overlap.of(means_a[c] - a.sky[c], means_b[c] - b.sky[c], both, a.noise[c], b.noise[c])
        for c in range(len(means_a))
    ]
    fits = fit_ratios(overlap, ())
    extra = significant_nuisance(overlap, fits)
    if extra:
        fits = fit_ratios(overlap, extra)
    if "seeing" in extra:
        overlap = same_seeing(overlap, fits)
        fits = fit_ratios(overlap, [name for name in extra if name != "seeing"])
    difference = np.array([np.median((x - y)[both]) for x, y in zip(means_a, means_b, strict=True)])
    sigma = np.sqrt((a.pixel_noise**2 + b.pixel_noise**2) / 2)
    return PairRelation(
        i,
        j,
        log_ratio=np.array([-np.log(f.ratio) for f in fits]),
        log_ratio_se=np.array([f.error for f in fits]),
        scatter=np.array([f.scatter for f in fits]),
        samples=int(np.count_nonzero(both)),
        step_before=_ratio(difference, sigma),
    )


@dataclass(frozen=True)
class Overlap:
    """Structure of both tiles in one channel of an overlap, smoothed, and the variance of a smoothed cell."""

    x: np.ndarray
    y: np.ndarray
    valid: np.ndarray
    vx: float
    vy: float

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray, valid: np.ndarray, noise_a: float, noise_b: float) -> Overlap:
        """Smooth both with a binomial kernel, so that no star is cut by a cell's edge.

        Both are smoothed with the same mask, normalised: at the edge of the overlap the kernel is cut for both alike.
        """
        support = np.where(valid, _smooth(valid.astype(float)), 1.0)
        x, y = (_smooth(np.where(valid, t, 0.0).astype(float)) / support for t in (a, b))
        whole = valid
        thin = int(np.ceil(np.count_nonzero(valid) / MAX_CELLS))
        if thin > 1:
            whole = np.zeros_like(valid)
            whole[::thin] = valid[::thin]
        factor = float(np.sum(BINOMIAL**2)) ** 2
        return cls(x, y, whole, max(noise_a**2 * factor, 1e-30), max(noise_b**2 * factor, 1e-30))

    def nuisance(self, names: Sequence[str], ratio: float) -> np.ndarray:
        """Columns (n, cells): always a constant; ``plane``: two slopes; ``seeing``: the Laplacian of the common
        structure, to first order what a different seeing does to it (the heat equation)."""
        rows, columns = np.nonzero(self.valid)
        out = [np.ones(len(rows))]
        if "plane" in names:
            out += [rows / self.valid.shape[0] - 0.5, columns / self.valid.shape[1] - 0.5]
        if "seeing" in names:
            out.append(self.laplacian(ratio)[self.valid])
        return np.stack(out)

    def laplacian(self, ratio: float) -> np.ndarray:
        """Laplacian (h, w) of the mean structure of both tiles."""
        return ndimage.laplace(0.5 * (self.x + self.y / ratio), mode="nearest")


def _smooth(image: np.ndarray) -> np.ndarray:
    return ndimage.convolve1d(
        ndimage.convolve1d(image, BINOMIAL, axis=0, mode="constant"), BINOMIAL, axis=1, mode="constant"
    )


@dataclass(frozen=True)
class RatioFit:
    """Slope g_b / g_a of an overlap, standard error of its logarithm (inf: too little structure), robust scatter in
    units of the noise; per cell the residual in units of the noise and the weight; the coefficient of the last
    nuisance column."""

    ratio: float = 1.0
    error: float = np.inf
    scatter: float = np.nan
    residual: np.ndarray | None = None
    weight: np.ndarray | None = None
    last: float = 0.0


@dataclass(frozen=True)
class DemingFit:
    """``y = ratio x + coefficients @ nuisance``: residual of y and structure in units of x, over all cells."""

    ratio: float
    residual: np.ndarray
    structure: np.ndarray
    coefficients: np.ndarray


def fit_ratios(overlap: Sequence[Overlap], extra: Sequence[str]) -> list[RatioFit]:
    """Errors-in-variables (Deming) fit of the structure of two tiles with known noise ratio, one slope a channel.

    Iteratively reweighted with Tukey's biweight on the residuals in units of the noise and of
    :data:`STRUCTURE_ERROR`, against moved, saturated or variable sources. All channels share the weights: a star that
    is doubted in one channel is doubted in all, or the channels would be tied to different stars, a colour error.
    """
    valid = overlap[0].valid
    x, y = ([getattr(o, axis)[valid] for o in overlap] for axis in "xy")
    ratio = [initial_ratio(u, v, o.vx, o.vy) if len(u) >= MIN_CELLS else None for u, v, o in zip(x, y, overlap)]
    if None in ratio:
        return [RatioFit() for _ in overlap]
    weight = np.ones(len(x[0]))
    for _ in range(15):
        previous, fits = ratio, []
        for o, u, v, r in zip(overlap, x, y, ratio, strict=True):
            fits.append(deming(u, v, o.nuisance(extra, r), weight, o.vx, o.vy))
        if None in fits:
            return [RatioFit() for _ in overlap]
        ratio = [fit.ratio for fit in fits]
        expected = np.array([np.sqrt(o.vy + r * r * o.vx) for o, r in zip(overlap, ratio, strict=True)])
        scatter = np.array([1.4826 * np.median(np.abs(fit.residual)) for fit in fits]) / expected
        residual = np.mean([(fit.residual / e) ** 2 for fit, e in zip(fits, expected, strict=True)], axis=0)
        bright = np.mean(
            [(STRUCTURE_ERROR * f.ratio * f.structure / e) ** 2 for f, e in zip(fits, expected, strict=True)],
            axis=0,
        )
        variance = max(1.0, float(np.mean(scatter**2))) + bright
        u2 = residual / variance / TUKEY**2
        weight = np.where(u2 < 1, (1 - u2) ** 2, 0.0) / variance
        if max(abs(r / p - 1) for r, p in zip(ratio, previous, strict=True)) < 1e-6:
            break
    return [_rated(*each, weight) for each in zip(overlap, fits, expected, scatter, strict=True)]


def _rated(overlap: Overlap, fit: DemingFit, expected: float, scatter: float, weight: np.ndarray) -> RatioFit:
    """The fit with the standard error of its log ratio (sandwich estimate, correlated neighbours included)."""
    noise_part = overlap.vx * overlap.vy / expected**2
    information = float(np.sum(weight * (fit.structure**2 - noise_part)))
    if information <= 0:
        return RatioFit()
    error = clustered_deviation(weight * fit.residual * fit.structure, overlap.valid) / information / fit.ratio
    return RatioFit(
        fit.ratio,
        error if error < MAX_PAIR_SE else np.inf,
        max(1.0, float(scatter)),
        fit.residual / expected,
        weight,
        float(fit.coefficients[-1]),
    )


def same_seeing(overlap: Sequence[Overlap], fits: Sequence[RatioFit]) -> list[Overlap]:
    """Bring both tiles to the seeing between theirs, which all channels together determine.

    The difference of the squared widths is a property of the two exposures: with one value for all channels it cannot
    trade against the gain of one of them, which would be a colour error.
    """
    values, weights = [], []
    for o, fit in zip(overlap, fits, strict=True):
        if fit.residual is not None:
            laplacian = o.laplacian(fit.ratio)[o.valid]
            values.append(fit.last / fit.ratio)
            weights.append(float(np.sum(fit.weight * laplacian**2)) / (o.vx + o.vy / fit.ratio**2))
    delta = float(np.average(values, weights=weights))
    out = []
    for o, fit in zip(overlap, fits, strict=True):
        change = 0.5 * delta * o.laplacian(fit.ratio)
        out.append(replace(o, x=o.x + change, y=o.y - fit.ratio * change))
    return out


def clustered_deviation(influence: np.ndarray, valid: np.ndarray) -> float:
    """Standard deviation of the sum of influences whose neighbours are correlated (smoothing, debayering).

    The sum of products over all pairs of cells less than five cells apart, tapered (Newey & West 1987) so that it
    cannot be negative.
    """
    image = np.zeros(valid.shape)
    image[valid] = influence
    taper = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0]) / 5.0
    near = ndimage.convolve1d(image, taper, axis=0, mode="constant")
    near = ndimage.convolve1d(near, taper, axis=1, mode="constant")
    return float(np.sqrt(max(np.sum(image * near), np.sum(influence**2))))


def significant_nuisance(overlap: Sequence[Overlap], fits: Sequence[RatioFit]) -> tuple[str, ...]:
    """Which of ``plane`` and ``seeing`` the residuals of the plain fits show, all channels together.

    The improvement of chi square by a column of pure noise is about 1, times the cells that smoothing correlates.
    """
    names = []
    for name in ("plane", "seeing"):
        gain, used = 0.0, 0
        for o, fit in zip(overlap, fits, strict=True):
            if fit.residual is None:
                continue
            root = np.sqrt(fit.weight)
            columns = (o.nuisance((name,), fit.ratio) * root).T
            columns[:, 1:] -= (
                columns[:, :1] @ (columns[:, :1].T @ columns[:, 1:]) / max(float(columns[:, 0] @ columns[:, 0]), 1e-300)
            )
            basis = np.linalg.qr(columns[:, 1:])[0]
            gain += float(np.sum((basis.T @ (root * fit.residual)) ** 2))
            used += basis.shape[1]
        if used and gain > CORRELATED_CELLS * (used + 5 * np.sqrt(2 * used)):
            names.append(name)
    return tuple(names)


def initial_ratio(x: np.ndarray, y: np.ndarray, vx: float, vy: float) -> float | None:
    """Robust first guess of the slope of y on x; None where the two share no structure beyond their noise.

    The correlation of n independent pairs of pure noise has a standard deviation of 1 / sqrt(n); smoothing leaves one
    cell in seven independent.
    """
    x, y = x - np.median(x), y - np.median(y)
    x, y = (np.clip(t, -limit, limit) for t in (x, y) for limit in [float(np.quantile(np.abs(t), 0.995))])
    sxx, syy, sxy = np.mean(x * x), np.mean(y * y), np.mean(x * y)
    if sxy <= 5 * np.sqrt(sxx * syy / (len(x) / CORRELATED_CELLS)):
        return None
    return _deming_slope(sxx, syy, sxy, vy / vx)


def _deming_slope(sxx: float, syy: float, sxy: float, noise_ratio: float) -> float:
    """Maximum-likelihood slope for errors on both axes; Deming (1943), Statistical Adjustment of Data, ch. 11."""
    d = syy - noise_ratio * sxx
    return float((d + np.sqrt(d * d + 4 * noise_ratio * sxy * sxy)) / (2 * sxy))


def deming(
    x: np.ndarray, y: np.ndarray, nuisance: np.ndarray, weight: np.ndarray, vx: float, vy: float
) -> DemingFit | None:
    """One weighted Deming fit of ``y = ratio x + nuisance``; None where there is no slope."""
    root = np.sqrt(weight)
    solve = np.linalg.pinv((nuisance * root).T)
    along_x, along_y = solve @ (root * x), solve @ (root * y)
    x = x - along_x @ nuisance
    y = y - along_y @ nuisance
    sxy = float(weight @ (x * y))
    if sxy <= 0:
        return None
    ratio = _deming_slope(float(weight @ (x * x)), float(weight @ (y * y)), sxy, vy / vx)
    residual = y - ratio * x
    # best estimate of the true structure: inverse-variance mean of both tiles
    structure = x + ratio * vx / (vy + ratio**2 * vx) * residual
    return DemingFit(ratio, residual, structure, along_y - ratio * along_x)


def _ratio(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value / scale, 0 where both vanish."""
    return np.divide(value, scale, out=np.zeros_like(value, dtype=float), where=scale > 0)


# ------------------------------------------------------------------------------------------------------- solving


@dataclass(frozen=True)
class PhotometryOptions:
    """What the user can choose: match gains at all, the largest standard error of a believed ln gain, leave bad
    tiles out."""

    match_gain: bool = True
    gain_se_limit: float = 0.05
    reject_bad_tiles: bool = True


def compute_photometric_gains_and_offsets(
    tiles: Sequence[CoarseTile],
    options: PhotometryOptions | None = None,
    pairs: Sequence[PairRelation] | None = None,
) -> PhotometricSolution:
    """Gain and offset of every tile and channel from the overlaps.

    Parameters
    ----------
    tiles : sequence of CoarseTile
        All with the same number of channels C.
    options : PhotometryOptions
    pairs : sequence of PairRelation, optional
        Relations measured before; otherwise every overlapping pair is measured here.

    Returns
    -------
    PhotometricSolution

    Raises
    ------
    ValueError
        No tiles, or tiles with different numbers of channels.
    """
    options = options or PhotometryOptions()
    if not tiles or len({len(t.noise) for t in tiles}) != 1:
        raise ValueError("compute_photometric_gains_and_offsets needs tiles with the same number of channels")
    notes: list[str] = []
    excluded = absurd_levels(tiles) if options.reject_bad_tiles else np.zeros(len(tiles), bool)
    if pairs is None:
        pairs = measure_pairs(tiles, excluded)
    while True:
        solution = _solve(tiles, [p for p in pairs if not (excluded[p.i] or excluded[p.j])], excluded, options)
        worst = worst_tile(solution, tiles) if options.reject_bad_tiles else None
        if worst is None:
            break
        excluded = excluded.copy()
        excluded[worst] = True
    notes += [
        f"{tiles[k].name}: bad_tile: its values do not belong to this sky; left out of the mosaic"
        for k in np.nonzero(excluded)[0]
    ]
    return replace(solution, warnings=(*notes, *solution.warnings))


def measure_pairs(tiles: Sequence[CoarseTile], excluded: np.ndarray | None = None) -> list[PairRelation]:
    """Relations of all overlapping pairs, in the order of the tiles."""
    use = [k for k in range(len(tiles)) if excluded is None or not excluded[k]]
    boxes = np.array([[*t.corner, t.corner[0] + t.fraction.shape[0], t.corner[1] + t.fraction.shape[1]] for t in tiles])
    relations = []
    for position, i in enumerate(use):
        rest = np.array(use[position + 1 :], dtype=int)
        if not rest.size:
            break
        meets = ((boxes[rest, :2] < boxes[i, 2:]) & (boxes[rest, 2:] > boxes[i, :2])).all(axis=1)
        for j in rest[meets]:
            relation = pair_relation(tiles, i, int(j))
            if relation is not None:
                relations.append(relation)
    return relations


def absurd_levels(tiles: Sequence[CoarseTile]) -> np.ndarray:
    """Tiles whose sky lies further from the others' than a thousand times what the others are."""
    if len(tiles) < 3:
        return np.zeros(len(tiles), bool)
    sky = np.stack([t.sky for t in tiles])
    middle = np.median(sky, axis=0)
    deviation = np.abs(sky - middle)
    scale = np.maximum(np.abs(middle), np.median(deviation, axis=0))
    return (deviation > 1000 * np.maximum(scale, 1e-30)).any(axis=1)


def worst_tile(solution: PhotometricSolution, tiles: Sequence[CoarseTile]) -> int | None:
    """The tile to leave out: after the solve, none of its overlaps agrees while those of the others do."""
    if len(solution.pairs) < 3:
        return None
    # scatter in units of the expected noise, the worst channel
    scatter = np.array([np.nanmax(np.where(np.isnan(p.scatter), 0, p.scatter)) for p in solution.pairs])
    typical = max(float(np.median(scatter)), 1.0)
    best = np.full(len(tiles), np.inf)
    for pair, value in zip(solution.pairs, scatter, strict=True):
        best[[pair.i, pair.j]] = np.minimum(best[[pair.i, pair.j]], value)
    best[~np.isfinite(best)] = 0
    k = int(np.argmax(best))
    return k if best[k] > 30 * typical else None


def _solve(
    tiles: Sequence[CoarseTile],
    pairs: Sequence[PairRelation],
    excluded: np.ndarray,
    options: PhotometryOptions,
) -> PhotometricSolution:
    """Gains, then offsets, then the residuals of every pair."""
    count, channels = len(tiles), len(tiles[0].noise)
    pivot = np.stack([t.sky for t in tiles])
    component = components(count, pairs)
    gain, gain_se, notes = np.ones((count, channels)), np.full((count, channels), np.inf), []
    if options.match_gain:
        gain, gain_se, notes = solve_gains(tiles, pairs, excluded, options.gain_se_limit)
    level, offset_se, steps = solve_offsets(tiles, pairs, gain, component)
    level = set_gauge(level, pivot, component, excluded)
    return PhotometricSolution(
        gain=gain,
        pivot=pivot,
        level=level,
        gain_se=gain_se,
        offset_se=offset_se,
        component=component,
        excluded=excluded,
        pairs=tuple(pairs),
        step_after=steps(level),
        warnings=(*notes, *component_notes(tiles, component, excluded)),
    )


def components(count: int, pairs: Sequence[PairRelation]) -> np.ndarray:
    """Number of the connected group of each tile, the largest group being 0."""
    i = [p.i for p in pairs]
    j = [p.j for p in pairs]
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(count, count))
    labels = csgraph.connected_components(graph, directed=False)[1]
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[labels]


def component_notes(tiles: Sequence[CoarseTile], component: np.ndarray, excluded: np.ndarray) -> list[str]:
    """One named warning for each tile or group that overlaps nothing."""
    notes = []
    groups = [np.nonzero((component == c) & ~excluded)[0] for c in range(component.max() + 1)]
    groups = [g for g in groups if len(g)]
    if len(groups) < 2:
        return notes
    for group in groups[1:]:
        if len(group) == 1:
            notes.append(f"{tiles[group[0]].name}: no_overlap: it overlaps no other tile; matched by its sky alone")
        else:
            names = ", ".join(tiles[k].name for k in group[:5]) + (", ..." if len(group) > 5 else "")
            notes.append(
                f"{tiles[group[0]].name}: second_island: this group of {len(group)} tiles ({names}) overlaps no other; "
                "matched by its sky alone"
            )
    return notes


def solve_gains(
    tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], excluded: np.ndarray, se_limit: float
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Gains (K, C) and standard errors of ln gain; a tile without a believable gain has gain 1 in all channels.

    Undetermined tiles are taken out of the graph and the rest is solved again, until nothing changes.
    """
    count, channels = len(tiles), len(tiles[0].noise)
    edges = [p for p in pairs if np.isfinite(p.log_ratio_se).all()]
    determined = ~excluded
    notes = []
    while True:
        used = [p for p in edges if determined[p.i] and determined[p.j]]
        linked = np.zeros(count, bool)
        linked[[p.i for p in used]] = True
        linked[[p.j for p in used]] = True
        log_gain, error = np.zeros((count, channels)), np.full((count, channels), np.inf)
        group = components(count, used)
        for c in range(channels):
            log_gain[:, c], error[:, c] = solve_differences(
                count,
                [p.i for p in used],
                [p.j for p in used],
                np.array([p.log_ratio[c] for p in used]),
                np.hypot([p.log_ratio_se[c] for p in used], LOG_RATIO_FLOOR),
                group,
                prior=LOG_GAIN_PRIOR,
            )
        insane = linked & (np.abs(log_gain) > np.log(SANE_GAIN)).any(axis=1)
        vague = linked & (error > se_limit).any(axis=1)
        if not (insane | vague).any():
            break
        # the worst first: a tile may be vague only because of its neighbour
        score = np.where(insane, np.abs(log_gain).max(axis=1) + 1e6, np.where(vague, error.max(axis=1), -1))
        determined = determined.copy()
        determined[int(np.argmax(score))] = False
    undetermined = ~linked & ~excluded
    log_gain[undetermined] = 0.0
    error[undetermined] = np.inf
    if count - excluded.sum() > 1:
        notes = [
            f"{tiles[k].name}: gain_undetermined: its overlaps have too little structure (or its gain would lie outside "
            f"1/{SANE_GAIN:g} .. {SANE_GAIN:g}); gain 1 in all channels, only its background is matched"
            for k in np.nonzero(undetermined)[0]
        ]
    return np.exp(log_gain), error, notes


def solve_differences(
    count: int,
    i: Sequence[int],
    j: Sequence[int],
    difference: np.ndarray,
    sigma: np.ndarray,
    group: np.ndarray,
    prior: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Robust least squares for x from differences ``x_i - x_j``, with the mean of each group exactly 0.

    The gauge is a bordered system (one Lagrange multiplier a group), never a soft anchor row; the prior pulls x
    towards 0 with that standard deviation. Iteratively reweighted with Huber's weights, so that a wrong pair that
    others contradict loses its influence.

    Returns
    -------
    x, standard_error : ndarray (count,)
    """
    i, j = np.asarray(i, int), np.asarray(j, int)
    groups = int(group.max()) + 1
    incidence = sparse.coo_matrix(
        (
            np.concatenate([np.ones(len(i)), -np.ones(len(j))]),
            (np.tile(np.arange(len(i)), 2), np.concatenate([i, j])),
        ),
        shape=(len(i), count),
    ).tocsr()
    gauge = sparse.coo_matrix((np.ones(count), (group, np.arange(count))), shape=(groups, count)).tocsr()
    scale = float(np.median(sigma)) if len(sigma) else 1.0
    # a tiny ridge keeps tiles without any edge solvable; with edges the prior is felt in the ninth digit or not at all
    ridge = sparse.identity(count) * max((scale / prior) ** 2, 1e-12)
    weight = (scale / sigma) ** 2
    robust = np.ones(len(i))
    x = np.zeros(count)
    for _ in range(20):
        normal = incidence.T @ sparse.diags(weight * robust) @ incidence + ridge
        factor = splu(sparse.bmat([[normal, gauge.T], [gauge, None]], format="csc"))
        right = np.concatenate([incidence.T @ (weight * robust * difference), np.zeros(groups)])
        previous, x = x, factor.solve(right)[:count]
        if not len(i):
            break
        u = np.abs(difference - incidence @ x) / sigma
        # pairs agree worse than they say in real data: what counts as an outlier is relative to the typical pair
        robust = np.minimum(1.0, 3.0 * max(1.0, 1.4826 * float(np.median(u))) / np.maximum(u, 1e-12))
        if np.max(np.abs(x - previous)) < 1e-9 * max(1.0, float(np.max(np.abs(x)))):
            break
    unit = np.zeros((count + groups, count))
    unit[:count] = np.eye(count)
    variance = np.diag(factor.solve(unit)[:count])
    spread = max(1.0, 1.4826 * float(np.median(np.abs(difference - incidence @ x) / sigma))) if len(i) > count else 1.0
    return x, scale * spread * np.sqrt(np.maximum(variance, 0.0))


def solve_offsets(tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], gain: np.ndarray, component: np.ndarray):
    """Levels (K, C) that make the normalised tiles agree in their overlaps, their errors, and the residual steps.

    Returns (level, standard_error, steps); ``steps(level)`` gives the median difference of each pair after
    normalisation in units of one normalised tile's pixel noise, (P, C).
    """
    count, channels = gain.shape
    difference = np.zeros((len(pairs), channels))
    error = np.ones((len(pairs), channels))
    median = np.zeros((len(pairs), channels))
    sigma = np.ones((len(pairs), channels))
    for n, pair in enumerate(pairs):
        a, b = tiles[pair.i], tiles[pair.j]
        means_a, means_b, both = common_cells(a, b)
        for c in range(channels):
            ga, gb = gain[pair.i, c], gain[pair.j, c]
            x, y = (means_a[c][both] - a.sky[c]) / ga, (means_b[c][both] - b.sky[c]) / gb
            noise = np.hypot(a.noise[c] / ga, b.noise[c] / gb)
            difference[n, c], error[n, c] = robust_difference(x, y, noise)
            median[n, c] = np.median(x - y)
            sigma[n, c] = np.sqrt(((a.pixel_noise[c] / ga) ** 2 + (b.pixel_noise[c] / gb) ** 2) / 2)
    level, level_se = np.zeros((count, channels)), np.zeros((count, channels))
    i, j = [p.i for p in pairs], [p.j for p in pairs]
    for c in range(channels):
        # x_i + level_i = x_j + level_j, hence level_i - level_j = -(x_i - x_j)
        level[:, c], level_se[:, c] = solve_differences(count, i, j, -difference[:, c], error[:, c], component)

    def steps(final: np.ndarray) -> np.ndarray:
        return _ratio(median + final[i] - final[j], sigma) if len(pairs) else np.zeros((0, channels))

    return level, level_se, steps


def robust_difference(x: np.ndarray, y: np.ndarray, noise: float) -> tuple[float, float]:
    """Location of ``x - y`` and its standard error; bright cells, whose gain error speaks, count for less."""
    noise = max(noise, 1e-12 * max(1.0, float(np.max(np.abs(x)))), 1e-30)
    structure = 0.5 * (x + y)
    sigma = np.hypot(noise, STRUCTURE_ERROR * (structure - np.median(structure)))
    d = x - y
    centre = float(np.median(d))
    for _ in range(10):
        spread = max(1.0, 1.4826 * float(np.median(np.abs(d - centre) / sigma)))
        u = (d - centre) / (TUKEY * spread * sigma)
        weight = np.where(np.abs(u) < 1, (1 - u * u) ** 2, 0.0) / sigma**2
        previous, centre = centre, float(np.sum(weight * d) / np.sum(weight))
        if abs(centre - previous) < 1e-6 * noise:
            break
    error = float(np.sqrt(np.sum((weight * (d - centre)) ** 2)) / np.sum(weight))
    return centre, max(error, 1e-3 * noise)


def set_gauge(level: np.ndarray, pivot: np.ndarray, component: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Shift the levels so that each group of tiles has the median background that all tiles had, per channel."""
    level = level.copy()
    target = np.median(pivot[~excluded], axis=0) if (~excluded).any() else np.median(pivot, axis=0)
    for c in range(int(component.max()) + 1):
        members = (component == c) & ~excluded
        if members.any():
            level[component == c] += target - np.median(level[members], axis=0)
    return level


# ------------------------------------------------------------------- coverage renormalisation and colour (for the eye)


def coverage_scale(coverage, blur):
    """What evens out the coverage: ``clip(B / C, 0.5, 2)`` with ``B = blur(C) / blur(C > 0)``; 1 where C is 0.

    Parameters
    ----------
    coverage : array (H, W), floating
        Sum of weights; 0 where nothing was seen.
    blur : callable
        Gaussian filter of the backend that holds ``coverage``.

    Returns
    -------
    scale, smooth : array (H, W)
        The scale and B.
    """
    xp = coverage.__array_namespace__()
    seen = coverage > 0
    support = blur(xp.astype(seen, coverage.dtype))
    one = xp.ones_like(coverage)
    smooth = blur(coverage) / xp.where(support > 0, support, one)
    scale = xp.clip(smooth / xp.where(seen, coverage, one), 0.5, 2.0)
    return xp.where(seen, scale, one), smooth


def coverage_gain(
    scale: np.ndarray,
    smooth: np.ndarray,
    coverage: np.ndarray,
    footprint: np.ndarray,
    clip: tuple[float, float],
    pixels_per_cell: int = 1,
) -> float:
    """Gain of one tile: median of ``scale`` over its footprint where C > 0 and B >= 2; 1 if too few pixels qualify.

    All arrays (h, w); they may be averaged over cells of ``pixels_per_cell`` pixels.
    """
    use = footprint & (coverage > 0) & (smooth >= 2)
    if np.count_nonzero(use) * pixels_per_cell < max(64, 1e-3 * np.count_nonzero(footprint) * pixels_per_cell):
        return 1.0
    return float(np.clip(np.median(scale[use]), clip[0], clip[1]))


def relative_coverage_gains(gains: np.ndarray) -> np.ndarray:
    """Coverage gains divided by their median, so that the mosaic as a whole is not dimmed."""
    gains = np.asarray(gains, dtype=float)
    return gains / np.median(gains) if gains.size else gains


def rgb_balance_gains(sky: np.ndarray, clip: tuple[float, float]) -> np.ndarray:
    """Factors (3,) that bring the sky levels of the channels to their geometric mean, clipped all together.

    Clipping one channel alone would shift the colour that the others have found: where one factor exceeds the clip,
    all are drawn towards 1 by the same power.
    """
    sky = np.asarray(sky, dtype=float)
    if not (np.isfinite(sky).all() and (sky > 0).all()):
        return np.ones(len(sky))
    logs = np.log(np.exp(np.mean(np.log(sky))) / sky)
    limit = np.where(logs > 0, np.log(clip[1]), -np.log(clip[0]))
    power = min(1.0, float(np.min(np.where(logs != 0, limit / np.maximum(np.abs(logs), 1e-12), np.inf))))
    return np.exp(logs * power)


def black_point(samples: np.ndarray, percentile: float) -> float:
    """The brightness to subtract from all channels alike: a low percentile of all finite samples."""
    finite = samples[np.isfinite(samples)]
    return float(np.percentile(finite, percentile)) if finite.size else 0.0
