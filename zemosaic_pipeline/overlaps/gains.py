"""The gain of every tile and channel: least squares in ln gain over the overlaps.

An overlap's evidence is that of all its channels: one whose own structure is weak beside that of the others takes
their ratio, to the accuracy to which the channels of two exposures usually agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from zemosaic_pipeline.arrays import connected_groups
from zemosaic_pipeline.overlaps.pairs import PairRelation

#: Floor under the standard error of one pair's log ratio, for what its own scatter cannot know.
LOG_RATIO_FLOOR = 3e-4
#: Expected scatter of the log ratios of single stars, and how many stars' worth of evidence that is; then how many the
#: scatter in all the run's overlaps is worth in one of them.
STAR_SCATTER, STARS_EXPECTED, STARS_POOLED = 0.03, 1.0, 30.0
#: What wings and blends make of stars that agree: scatter that does not limit the ratio.
SMALL_SCATTER = 0.005
#: Standard deviation of a channel's log ratio about that of the others.
COLOUR_SPREAD = 0.3
#: Standard deviation of the prior on a tile's log gain: felt only where nothing else is.
LOG_GAIN_PRIOR = 3.0
#: Tiles beyond this factor from their group's median gain take no part in its gauge.
GAUGE_FACTOR = 30.0
#: Largest correlation of the errors of two tiles that are taken out together.
MOST_CORRELATION = 0.1
#: Steps of the global solve with Huber's weights, before Cauchy's.
HUBER_STEPS = 5
#: Most steps of it.
MOST_STEPS = 20
#: Most tiles whose equations are solved as a full matrix.
DENSE_TILES = 150


def solve_gains(
    pairs: Sequence[PairRelation], count: int, channels: int, se_limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log gains (K, C) and their standard errors; 0 and inf, in all channels, of tiles without a measurable gain.

    A tile's gain counts as measurable where its standard error, pooled over the channels, is at most ``se_limit``.
    Tiles are taken out and the rest is solved again until all are: the worst first, since a tile may be vague only
    because of another, and with it those that this concerns little.
    """
    ratio, error = log_ratios(pairs, channels)
    edges = np.stack(tiles_of(pairs), axis=1)[np.isfinite(error).all(axis=1)]
    ratio, error = (values[np.isfinite(error).all(axis=1)] for values in (ratio, error))
    determined = np.ones(count, bool)
    while True:
        use = determined[edges].all(axis=1)
        found, found_error = gains_of_linked(edges[use], ratio[use], error[use], count)
        vague = pooled_error(found_error)
        vague[~np.isfinite(vague) | (vague <= se_limit)] = 0.0
        if not vague.any():
            return found, found_error
        worst = worst_of_neighbours(vague, edges[use])
        determined[independent(np.flatnonzero(worst), vague, edges[use], error[use])] = False


def log_ratios(pairs: Sequence[PairRelation], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Log ratio and standard error (P, C) of each pair, infinite where no channel tells.

    A channel's own ratio is drawn towards that of the others with the strength of :data:`COLOUR_SPREAD`: by nothing that
    counts where it is known to a per cent, wholly where it is not known at all.
    """
    own, error = (np.array([getattr(p, n) for p in pairs]).reshape(-1, channels) for n in ("log_ratio", "log_ratio_se"))
    error = np.sqrt(error**2 + star_errors(pairs, channels) ** 2 + LOG_RATIO_FLOOR**2)
    information = error**-2.0
    others = 1.0 - np.eye(channels)
    total = information @ others
    some = np.where(total > 0, total, 1.0)
    common = (own * information) @ others / some
    prior = np.where(total > 0, 1.0 / (COLOUR_SPREAD**2 + 1.0 / some), 0.0)
    known = information + prior > 0
    both = np.where(known, information + prior, 1.0)
    return (own * information + common * prior) / both, np.where(known, both**-0.5, np.inf)


def star_errors(pairs: Sequence[PairRelation], channels: int) -> np.ndarray:
    """What the scatter between stars leaves of the accuracy of each log ratio, (P, C), beside noise.

    The scatter over the root of the effective number of stars. Few stars cannot tell their own scatter: it is drawn
    towards that of all the run's pairs, and that towards :data:`STAR_SCATTER`, as variances of so many stars. Stars
    lost in the noise tell little of it.
    """
    names = ("stars", "star_scatter", "star_noise")
    number, scatter, noise = (np.array([getattr(p, name) for p in pairs]).reshape(-1, channels) for name in names)
    tells = (STAR_SCATTER**2 / (STAR_SCATTER**2 + noise**2)) ** 2
    # of n stars two are lost: one for the ratio, one for what the distortions take of it
    degrees = np.maximum(number - 2.0, 0.0)
    squares = tells * np.where(degrees > 0, number * scatter**2 - degrees * noise**2, 0.0)
    degrees = tells * degrees
    # the median: in a few overlaps blends and seeing pass for scatter
    total = np.sum(degrees)
    typical = weighted_median(squares / np.maximum(degrees, 1e-9), degrees) if total > 0 else 0.0
    pooled = (total * typical + STARS_EXPECTED * STAR_SCATTER**2) / (total + STARS_EXPECTED)
    variance = np.maximum((squares + STARS_POOLED * pooled) / (degrees + STARS_POOLED) - SMALL_SCATTER**2, 0.0)
    return np.sqrt(variance / np.maximum(number, 1.0))


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The value at which half of the weights is reached, in ascending order."""
    order = np.argsort(values, axis=None)
    reached = np.cumsum(weights.ravel()[order])
    return float(values.ravel()[order][np.searchsorted(reached, reached[-1] / 2)])


def pooled_error(error: np.ndarray) -> np.ndarray:
    """The standard error (K,) that the channels of a tile, (K, C), have together: of the mean information."""
    with np.errstate(divide="ignore"):
        return np.mean(error**-2.0, axis=1) ** -0.5


def worst_of_neighbours(score: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Which tiles, bool (K,), have a positive score (K,) that none of those they overlap exceeds; edges int (E, 2)."""
    highest = score.copy()
    np.maximum.at(highest, edges[:, 0], score[edges[:, 1]])
    np.maximum.at(highest, edges[:, 1], score[edges[:, 0]])
    return (score > 0) & (score == highest)


def independent(tiles: np.ndarray, score: np.ndarray, edges: np.ndarray, error: np.ndarray) -> list[int]:
    """Of vague tiles, int (n,), the worst, the next whose error does not hang together with its, and so on.

    Either side of a weak link is vague because of the other: their gains are known about the mean of both alone. To
    take tiles out on both sides, or those at the link with those far from it, loses tiles or tears the group apart.
    """
    linked, i, j, group = linked_tiles(edges)
    tiles = tiles[np.argsort(-score[tiles], kind="stable")]
    at = np.searchsorted(linked, tiles)
    solve = bordered_solver(i, j, np.mean(error**-2.0, axis=1), LOG_GAIN_PRIOR**-2.0, group)
    covariance = solve(np.eye(len(linked))[:, at])[at]
    deviation = np.sqrt(np.diag(covariance))
    correlated = np.abs(covariance) > MOST_CORRELATION * np.outer(deviation, deviation)
    taken: list[int] = []
    for k in range(len(tiles)):
        if not correlated[k, taken].any():
            taken.append(k)
    return tiles[taken].tolist()


def linked_tiles(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The tiles that some edge (E, 2) touches, both ends (E,) of each edge among them, and the group of each."""
    linked, numbers = np.unique(edges, return_inverse=True)
    i, j = numbers.reshape(-1, 2).T
    group = connected_groups(len(linked), list(zip(i.tolist(), j.tolist(), strict=True)))
    return linked, i, j, np.asarray(group)


def gains_of_linked(
    edges: np.ndarray, ratio: np.ndarray, error: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log gains (K, C) and errors of the tiles that some edge (E, 2) touches; 0 and inf of the others."""
    linked, i, j, group = linked_tiles(edges)
    log_gain, log_error = np.zeros((count, ratio.shape[1])), np.full((count, ratio.shape[1]), np.inf)
    if not len(linked):
        return log_gain, log_error
    for c in range(ratio.shape[1]):
        x, log_error[linked, c] = solve_differences(i, j, ratio[:, c], error[:, c], group, LOG_GAIN_PRIOR)
        log_gain[linked, c] = gauged(x, group)
    return log_gain, log_error


def gauged(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Log gains (K,) shifted so that those of each group have the mean 0, tiles in other units left out.

    Of as many tiles in one unit as in another those with the larger gains are not left out.
    """
    x = x.copy()
    for g in np.unique(group):
        members = np.sort(x[group == g])
        # a tile's own: between two units there is none
        middle = members[len(members) // 2]
        usual = np.abs(members - middle) <= np.log(GAUGE_FACTOR)
        x[group == g] -= members[usual].mean()
    return x


def components(count: int, pairs: Sequence[PairRelation]) -> np.ndarray:
    """Number of the connected group of each tile, the largest group being 0."""
    labels = connected_groups(count, [(p.i, p.j) for p in pairs])
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[labels]


def tiles_of(pairs: Sequence[PairRelation]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, int (P,), of the first and of the second tile of each pair."""
    i, j = np.array([(p.i, p.j) for p in pairs], int).reshape(-1, 2).T
    return i, j


def solve_differences(
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
    x, standard_error : ndarray (len(group),)
    """
    count = len(group)
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
