"""The photometric model of Phase 5: array in, array out; no files, no WCS, no logging.

Sequence of Phase 5, the same on both backends
----------------------------------------------
1. *Measure.* Every tile is resampled onto one coarse grid of cells (means over ``photometry_cell_px`` squared output
   pixels): a :class:`CoarseTile`. (`resample.measure.measure_tile`)
2. *Solve.* :func:`compute_photometric_gains_and_offsets`: pair relations in the overlaps (:func:`pair_relation`),
   then one global robust least squares for the gains and one for the offsets -> :class:`PhotometricSolution`. On the
   CPU in both modes, so that the gains are bit-identical.
3. *Coadd.* Each tile is normalised with :func:`apply_photometric_normalization` as it is read, for both backends alike,
   then resampled, weighted and combined block by block: the science mosaic. (`resample.coadd.coadd_block`)
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

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from zemosaic_pipeline.arrays import connected_groups
from zemosaic_pipeline.errors import Notice
from zemosaic_pipeline.overlaps.errors_in_variables import in_units
from zemosaic_pipeline.overlaps.pairs import CoarseTile, PairRelation, measure_pairs

#: Pixels that :func:`apply_photometric_normalization` works on at a time.
NORMALISED_AT_ONCE = 1 << 17
#: Floor under the standard error of one pair's log ratio, for what its own scatter cannot know.
LOG_RATIO_FLOOR = 3e-4
#: Standard deviation of the prior on a tile's log gain: a factor of 20 either way, felt only where nothing else is.
LOG_GAIN_PRIOR = 3.0
#: Steps of the global solve with Huber's weights, before Cauchy's.
HUBER_STEPS = 5
#: Most steps of it.
MOST_STEPS = 20
#: Most tiles whose equations are solved as a full matrix.
DENSE_TILES = 150
#: Gains beyond this factor from their component's mean are not believed.
SANE_GAIN = 100.0
#: Gain, pivot and level of one tile, each a tuple of C floats.
Normalisation = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class PhotometricSolution:
    """Gain, pivot and level of every tile and channel, (K, C) float64: ``C = (y - pivot) / gain + level``.

    ``gain_se`` is the standard error of ln gain (inf: undetermined), ``offset_se`` of the level in mosaic units.
    ``component`` numbers the connected groups of overlapping tiles, ``excluded`` marks tiles left out of the mosaic.
    ``step_after`` (P, C) is :attr:`PairRelation.step_before` once normalised.
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
    warnings: tuple[Notice, ...] = ()

    @property
    def offset(self) -> np.ndarray:
        """The additive term of ``y = gain * S + offset``, (K, C), tile units."""
        return self.pivot - self.gain * self.level

    def row(self, tile: int) -> Normalisation:
        """What :func:`apply_photometric_normalization` takes for one tile."""
        gain, pivot, level = (tuple(map(float, values[tile])) for values in (self.gain, self.pivot, self.level))
        return gain, pivot, level

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


def namespace(array):
    """Array namespace of an array; numpy before 2 and cupy's arrays do not tell it themselves."""
    own = getattr(array, "__array_namespace__", None)
    return own() if own else sys.modules[type(array).__module__.partition(".")[0]]


def apply_photometric_normalization(data, gain, pivot, level, out=None):
    """Bring tile pixels to the common photometric system: ``(data - pivot) / gain + level``.

    Parameters
    ----------
    data : array, floating, (C, ...)
        Tile pixels of any array namespace; NaN stays NaN.
    gain, pivot, level : sequence of C floats
        One row of :class:`PhotometricSolution`.
    out : array like ``data``, optional
        Where to put the result.

    Returns
    -------
    array
        Same namespace, dtype, shape and device as ``data``.
    """
    xp = namespace(data)
    out = xp.empty_like(data) if out is None else out
    # pieces that stay in a processor's cache; for a GPU they are still large
    rows = data.shape[1] if data.ndim > 1 else 1
    step = max(1, NORMALISED_AT_ONCE * rows // max(data.size // data.shape[0], 1))
    for c in range(data.shape[0]):
        for row in range(0, rows, step):
            piece = (c, slice(row, min(row + step, rows)), ...) if data.ndim > 1 else (c,)
            out[piece] = data[piece] - float(pivot[c])
            out[piece] *= 1.0 / float(gain[c])
            out[piece] += float(level[c])
    return out


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
    notes = [
        _notice(tiles[k], "bad_tile", "its values do not belong to this sky; left out of the mosaic")
        for k in np.flatnonzero(excluded).tolist()
    ]
    return replace(solution, warnings=(*notes, *solution.warnings))


def absurd_levels(tiles: Sequence[CoarseTile]) -> np.ndarray:
    """Tiles whose sky lies further from the others' than a thousand times what the others are."""
    if len(tiles) < 3:
        return np.zeros(len(tiles), bool)
    sky = np.stack([t.sky for t in tiles])
    middle = np.median(sky, axis=0)
    deviation = np.abs(sky - middle)
    scale = np.maximum(np.abs(middle), np.median(deviation, axis=0))
    return np.any(deviation > 1000 * np.maximum(scale, 1e-30), axis=1)


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
    level, offset_se = solve_offsets(pairs, gain, component)
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
        step_after=overlap_steps(tiles, pairs, gain, level),
        warnings=(*notes, *component_notes(tiles, component, excluded)),
    )


def components(count: int, pairs: Sequence[PairRelation]) -> np.ndarray:
    """Number of the connected group of each tile, the largest group being 0."""
    labels = connected_groups(count, [(p.i, p.j) for p in pairs])
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[labels]


def component_notes(tiles: Sequence[CoarseTile], component: np.ndarray, excluded: np.ndarray) -> list[Notice]:
    """One named warning for each tile or group that overlaps nothing."""
    notes: list[Notice] = []
    groups = [np.nonzero((component == c) & ~excluded)[0] for c in range(component.max() + 1)]
    groups = [g for g in groups if len(g)]
    if len(groups) < 2:
        return notes
    for group in groups[1:]:
        if len(group) == 1:
            words = "it overlaps no other tile; matched by its sky alone"
            notes.append(_notice(tiles[group[0]], "no_overlap", words))
        else:
            names = ", ".join(tiles[k].name for k in group[:5]) + (", ..." if len(group) > 5 else "")
            words = f"this group of {len(group)} tiles ({names}) overlaps no other; matched by its sky alone"
            notes.append(_notice(tiles[group[0]], "second_island", words))
    return notes


def _notice(tile: CoarseTile, kind: str, words: str) -> Notice:
    """A warning about a tile, as `run_report.json` has it."""
    return Notice(f"{tile.name}: {kind}: {words}", kind, tile.name)


def solve_gains(
    tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], excluded: np.ndarray, se_limit: float
) -> tuple[np.ndarray, np.ndarray, list[Notice]]:
    """Gains (K, C) and standard errors of ln gain; a tile without a believable gain has gain 1 in all channels.

    Undetermined tiles are taken out of the graph and the rest is solved again, until nothing changes.
    """
    count, channels = len(tiles), len(tiles[0].noise)
    edges = [p for p in pairs if np.isfinite(p.log_ratio_se).all()]
    determined = ~excluded
    notes: list[Notice] = []
    while True:
        used = [p for p in edges if determined[p.i] and determined[p.j]]
        i, j = tiles_of(used)
        linked = np.zeros(count, bool)
        linked[i] = linked[j] = True
        log_gain, error = np.zeros((count, channels)), np.full((count, channels), np.inf)
        group = components(count, used)
        for c in range(channels):
            log_gain[:, c], error[:, c] = solve_differences(
                count,
                i,
                j,
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
        words = (
            f"its overlaps have too little structure (or its gain would lie outside 1/{SANE_GAIN:g} .. {SANE_GAIN:g}); "
            "gain 1 in all channels, only its background is matched"
        )
        notes = [_notice(tiles[k], "gain_undetermined", words) for k in np.flatnonzero(undetermined).tolist()]
    return np.exp(log_gain), error, notes


def tiles_of(pairs: Sequence[PairRelation]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, int (P,), of the first and of the second tile of each pair."""
    i, j = np.array([(p.i, p.j) for p in pairs], int).reshape(-1, 2).T
    return i, j


def solve_differences(
    count: int,
    i: np.ndarray,
    j: np.ndarray,
    difference: np.ndarray,
    sigma: np.ndarray,
    group: np.ndarray,
    prior: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Robust least squares for x from differences ``x_i - x_j``, with the mean of each group exactly 0.

    The gauge is a bordered system (one Lagrange multiplier a group), never a soft anchor row; the prior pulls x
    towards 0 with that standard deviation. Iteratively reweighted, so that a wrong pair that others contradict loses
    its influence: with Huber's weights at first, which lead to one solution from anywhere, then with Cauchy's, which
    leave a wrong pair none.

    Returns
    -------
    x, standard_error : ndarray (count,)
    """
    scale = float(np.median(sigma)) if len(sigma) else 1.0
    # a tiny ridge keeps tiles without any edge solvable; with edges the prior is felt in the ninth digit or not at all
    ridge = max((scale / prior) ** 2, 1e-12)
    weight = (scale / sigma) ** 2
    robust = np.ones(len(i))
    x, step = np.zeros(count), 0
    while True:
        pull = weight * robust * difference
        right = np.bincount(i, pull, count) - np.bincount(j, pull, count)
        solve = bordered_solver(i, j, weight * robust, ridge, group)
        previous, x = x, solve(right[:, None])[:, 0]
        if not len(i):
            break
        u = np.abs(difference - x[i] + x[j]) / sigma
        # pairs agree worse than they say in real data: what counts as an outlier is relative to the typical pair
        u = u / (3.0 * max(1.0, 1.4826 * float(np.median(u))))
        robust = 1 / np.maximum(u, 1.0) if step < HUBER_STEPS else 1 / (1 + u * u)
        if step > HUBER_STEPS and np.max(np.abs(x - previous)) < 1e-3 * scale / np.sqrt(count):
            break
        step += 1
        if step == MOST_STEPS:
            break
    variance = np.diag(solve(np.eye(count)))
    spread = max(1.0, 1.4826 * float(np.median(np.abs(difference - x[i] + x[j]) / sigma))) if len(i) > count else 1.0
    return x, scale * spread * np.sqrt(np.maximum(variance, 0.0))


def bordered_solver(
    i: np.ndarray, j: np.ndarray, weight: np.ndarray, ridge: float, group: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """What solves the normal equations of weighted differences for right sides (count, m), each group's sum being 0."""
    count, groups = len(group), int(group.max()) + 1
    size, every = count + groups, np.arange(count)
    rows = np.concatenate([i, j, i, j, every, every, count + group])
    columns = np.concatenate([i, j, j, i, every, count + group, every])
    values = np.concatenate([weight, weight, -weight, -weight, np.full(count, ridge), np.ones(2 * count)])
    if count <= DENSE_TILES:
        matrix = np.bincount(rows * size + columns, values, size * size).reshape(size, size)
        solver = partial(np.linalg.solve, matrix)
    else:
        from scipy.sparse import csc_matrix
        from scipy.sparse.linalg import splu

        solver = splu(csc_matrix((values, (rows, columns)), shape=(size, size))).solve
    return lambda right: solver(np.concatenate([right, np.zeros((groups, right.shape[1]))]))[:count]


def solve_offsets(
    pairs: Sequence[PairRelation], gain: np.ndarray, component: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Levels (K, C) that make the normalised tiles agree in their overlaps, and their standard errors."""
    i, j = tiles_of(pairs)
    level, level_se = np.zeros(gain.shape), np.zeros(gain.shape)
    for c in range(gain.shape[1]):
        # mean_i / g_i + level_i = mean_j / g_j + level_j
        difference = np.array([p.mean_j[c] / gain[p.j, c] - p.mean_i[c] / gain[p.i, c] for p in pairs])
        error = np.array([p.mean_se[c] / gain[p.i, c] for p in pairs])
        level[:, c], level_se[:, c] = solve_differences(len(gain), i, j, difference, error, component)
    return level, level_se


def overlap_steps(
    tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], gain: np.ndarray, level: np.ndarray
) -> np.ndarray:
    """Difference (P, C) of the sky of each pair's tiles, normalised, in units of one normalised tile's pixel noise."""
    noise = np.stack([t.pixel_noise for t in tiles]) / gain
    steps = np.zeros((len(pairs), gain.shape[1]))
    for n, p in enumerate(pairs):
        sigma = np.sqrt((noise[p.i] ** 2 + noise[p.j] ** 2) / 2)
        steps[n] = in_units(p.mean_i / gain[p.i] + level[p.i] - p.mean_j / gain[p.j] - level[p.j], sigma)
    return steps


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
        Sum of weights; 0 where no tile has data.
    blur : callable
        Gaussian filter of the backend that holds ``coverage``.

    Returns
    -------
    scale, smooth : array (H, W)
        The scale and B.
    """
    xp = namespace(coverage)
    covered = coverage > 0
    one = xp.ones_like(coverage)
    support = blur(xp.where(covered, one, xp.zeros_like(coverage)))
    smooth = blur(coverage) / xp.where(support > 0, support, one)
    scale = xp.clip(smooth / xp.where(covered, coverage, one), 0.5, 2.0)
    return xp.where(covered, scale, one), smooth


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
