"""One least squares for the level and the gradient of every tile, all tiles and channels together.

Unknown are the coefficients of every tile's polynomial in the normalised system (`overlaps.gradients`). The overlaps
measure their differences; what they leave open is decided by priors of mean zero whose sizes the data find: of the
slopes, of the curvatures, and of the radial curvature that all tiles of one camera share. Without the last, a curvature
common to all tiles is taken for a fan of slopes, and the mosaic becomes a bowl (as in aerial triangulation).

The sizes have the greatest marginal likelihood; MacKay (1992), Neural Computation 4, 415: each size squared is the sum
of squares of its coefficients over the number of them that the data determine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zemosaic_pipeline.overlaps.factorised import Factorised

#: Steps with Huber's weights, before Cauchy's, and most steps of one solve.
HUBER_STEPS = 5
MOST_STEPS = 40
#: Where the sizes of slopes, curvatures and common curvatures start, in units of the noise; the greater evidence wins.
STARTS = ((1.0, 0.3, 1.0), (0.1, 0.1, 3.0))
#: Smallest and largest size, in the same unit.
LEAST_SIZE, GREATEST_SIZE = 1e-2, 1e9
#: Expected ratio of the sizes of curvatures and slopes, and the standard deviation of its logarithm: felt only where
#: the overlaps cannot tell one from the other.
CURVATURE_SHARE, SHARE_SPREAD = 0.3, 1.0
#: Change of the logarithm of a size, at most, in one step, and where the steps end.
LARGEST_CHANGE, SMALL_CHANGE = 1.5, 0.02
#: Least share of the differences' squares that may be taken for noise alone: of one overlap nothing is left.
LEAST_FREEDOM = 0.25
#: Relative change of the pairs' residuals where they end.
SMALL_RESIDUAL = 0.02
#: Share of the typical information that keeps the level of a group of tiles solvable; the gauge is set afterwards.
RIDGE = 1e-9
#: Tiles whose levels' errors are computed together.
LEVELS_AT_ONCE = 256
#: Most unknowns whose inverse is computed in full, and vectors that estimate the inverse of more.
EXACT_UNKNOWNS, PROBES = 400, 48


@dataclass(frozen=True)
class Measured:
    """The overlaps' smooth differences, of P pairs, C channels and M modes, in units of each channel's noise.

    Attributes
    ----------
    i, j : ndarray
        int (P,), the tiles.
    difference : ndarray
        (P, C, M): what the polynomial of tile i exceeds that of tile j by, in modes of the overlap.
    weight : ndarray
        (P,), one over the variance of each difference, mean over the channels.
    modes_i, modes_j : ndarray
        (P, M, M): modes of the overlap from a tile's polynomial.
    camera : ndarray
        int (K,), which tiles share a camera.
    """

    i: np.ndarray
    j: np.ndarray
    difference: np.ndarray
    weight: np.ndarray
    modes_i: np.ndarray
    modes_j: np.ndarray
    camera: np.ndarray

    @cached_property
    def unknowns(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (P, 2 M) of the coefficients that each pair's difference depends on, and how (P, M, 2 M)."""
        term = np.arange(self.terms)
        first, second = (tile[:, None] * self.terms + term for tile in (self.i, self.j))
        return np.concatenate([first, second], axis=1), np.concatenate([self.modes_i, -self.modes_j], axis=2)

    @cached_property
    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns and values (P, 2 M, 2 M) of each pair's part of the normal equations, for a weight of 1."""
        at, both = self.unknowns
        rows, columns = np.broadcast_arrays(at[:, :, None], at[:, None, :])
        return rows.ravel(), columns.ravel(), np.swapaxes(both, 1, 2) @ both

    @cached_property
    def pulls(self) -> np.ndarray:
        """Each pair's part (P, C, 2 M) of the right sides, for a weight of 1."""
        return self.difference @ self.unknowns[1]

    @property
    def terms(self) -> int:
        return self.difference.shape[2]

    @property
    def tiles(self) -> int:
        return len(self.camera)


@dataclass(frozen=True)
class Backgrounds:
    """What is found: polynomials (K, C, M) in units of each channel's noise, and how well they are known.

    ``sizes`` are those of slopes, curvatures and common curvature; ``evidence`` the logarithm of their marginal
    likelihood, up to a constant. ``system`` solves for the polynomials; its inverse is their covariance.
    """

    polynomials: np.ndarray
    sizes: np.ndarray
    evidence: float
    system: System


def solve_backgrounds(measured: Measured) -> Backgrounds:
    """The likeliest polynomials: those of the start of the sizes that leads to the greater evidence."""
    kinds = {1: 0, 3: 1, 6: 3}[measured.terms]
    weights = PairWeights(np.ones(len(measured.i)), 1.0)
    best, weights = from_start(measured, np.array(STARTS[0][:kinds]), weights, HUBER_STEPS)
    for start in STARTS[1:] if kinds else ():
        # the pairs have been weighed; only the sizes start afresh
        other, _ = from_start(measured, np.array(start[:kinds]), weights, 0)
        best = max(best, other, key=lambda found: found.evidence)
    return best


@dataclass(frozen=True)
class PairWeights:
    """The share (P,) of its weight that each pair keeps, and how much worse than they say pairs agree (a variance)."""

    robust: np.ndarray
    spread: float

    @property
    def share(self) -> np.ndarray:
        return self.robust / self.spread


def from_start(
    measured: Measured, sizes: np.ndarray, weights: PairWeights, huber_steps: int
) -> tuple[Backgrounds, PairWeights]:
    """Solve, weigh the pairs, and improve the sizes, in turn, until none of them changes."""
    residual = np.zeros(len(measured.i))
    for step in range(MOST_STEPS):
        system = System(measured, measured.weight * weights.share, sizes)
        z = system.solve(system.right)
        polynomials = system.polynomials(z)
        change = size_changes(system, z)
        before, residual = residual, pair_residuals(measured, polynomials)
        still = np.max(np.abs(residual - before) / (1.0 + residual), initial=0.0) < SMALL_RESIDUAL
        if step > huber_steps and still and np.max(np.abs(change), initial=0.0) < SMALL_CHANGE:
            break
        sizes = np.clip(sizes * np.exp(change), LEAST_SIZE, GREATEST_SIZE)
        weights = weighed(residual, system.freedom, step < huber_steps)
    found = Backgrounds(polynomials, system.sizes, evidence(system, z, residual, weights.share), system)
    return found, weights


def weighed(residual: np.ndarray, freedom: float, huber: bool) -> PairWeights:
    """Weights from the pairs' mean squares (P,): Huber's, which lead to one solution from anywhere, or Cauchy's, which
    leave a pair that the others contradict none.

    ``freedom`` is the share of the squares that the polynomials leave.
    """
    spread = max(1.0, float(np.median(residual)) / max(freedom, LEAST_FREEDOM)) if len(residual) else 1.0
    u2 = residual / (9.0 * spread)
    return PairWeights(1 / np.sqrt(np.maximum(u2, 1.0)) if huber else 1 / (1 + u2), spread)


class System:
    """The normal equations for given weights of the pairs and sizes, in coefficients over their sizes.

    The unknowns are those of the tiles (K M), then, with second-order terms, one common curvature a camera. The latter
    are few and touch every tile: they are eliminated last (Schur complement), so that the tiles' part stays sparse.
    """

    def __init__(self, measured: Measured, weight: np.ndarray, sizes: np.ndarray) -> None:
        self.measured, self.sizes = measured, sizes
        tiles, terms = measured.tiles, measured.terms
        self.scale = np.tile(np.repeat([1.0, *sizes[:2]], [1, 2, 3][: 1 + len(sizes[:2])]), tiles)
        self.common = sizes[-1] * common_columns(measured.camera) if terms > 3 else np.zeros((tiles * terms, 0))
        ridge = RIDGE * (float(np.median(weight)) if len(weight) else 1.0)
        self.prior = np.tile(np.append(ridge, np.ones(terms - 1)), tiles)
        rows, columns, pieces = measured.pieces
        values = (weight[:, None, None] * pieces).ravel()
        self.right = self._inward(normal_pull(measured, weight))
        every = np.arange(len(self.prior))
        self.solve_tiles = Factorised(
            np.append(rows, every),
            np.append(columns, every),
            np.append(values * self.scale[rows] * self.scale[columns], self.prior),
            len(every),
        )
        across = [np.bincount(rows, values * line[columns], len(every)) for line in self.common.T]
        self.across = np.reshape(across, (-1, len(every))).T
        corner = self.common.T @ self.across + np.eye(self.common.shape[1])
        self.across = self.scale[:, None] * self.across
        self.carried = self.solve_tiles(self.across)
        self.corner = corner - self.across.T @ self.carried

    def _inward(self, pull: np.ndarray) -> np.ndarray:
        """Right sides (N, n) from those (K M, n) of the plain coefficients."""
        return np.concatenate([self.scale[:, None] * pull, self.common.T @ pull])

    def solve(self, right: np.ndarray) -> np.ndarray:
        """What the equations give for right sides (N, n)."""
        count = len(self.scale)
        tiles = self.solve_tiles(right[:count])
        cameras = np.linalg.solve(self.corner, right[count:] - self.across.T @ tiles)
        return np.concatenate([tiles - self.carried @ cameras, cameras])

    def inverse_diagonal(self) -> np.ndarray:
        """Diagonal (N,) of the inverse: exact, or for many unknowns estimated (Hutchinson 1990) with fixed probes."""
        count = len(self.scale) + len(self.corner)
        if count <= EXACT_UNKNOWNS:
            return np.diag(self.solve(np.eye(count)))
        probes = np.random.default_rng(0).choice([-1.0, 1.0], (count, PROBES))
        return np.mean(probes * self.solve(probes), axis=1)

    @cached_property
    def determined(self) -> np.ndarray:
        """How many of the unknowns of each kind the overlaps determine."""
        if not len(self.sizes):
            return np.zeros(0)
        inverse = self.inverse_diagonal()
        return np.array([len(kind) - np.sum(inverse[kind]) for kind in self.kinds()])

    @property
    def freedom(self) -> float:
        """Share of the differences' squares that the polynomials leave."""
        measured = self.measured
        levels = len(np.unique([measured.i, measured.j])) - 1
        return 1.0 - (levels + np.sum(self.determined)) / max(len(measured.i) * measured.terms, 1)

    def log_determinant(self) -> float:
        return self.solve_tiles.log_determinant + float(np.linalg.slogdet(self.corner)[1])

    def polynomials(self, z: np.ndarray) -> np.ndarray:
        """Polynomials (K, C, M) from coefficients over their sizes (N, C); none for tiles that overlap no other."""
        tiles, terms = self.measured.tiles, self.measured.terms
        count = len(self.scale)
        plain = self.scale[:, None] * z[:count] + self.common @ z[count:]
        linked = np.zeros(tiles, bool)
        linked[self.measured.i] = linked[self.measured.j] = True
        return np.where(linked[:, None, None], np.swapaxes(plain.reshape(tiles, terms, -1), 1, 2), 0.0)

    def covariance(self, functionals: np.ndarray) -> np.ndarray:
        """Covariance (n, n) of linear functionals (n, K, M) of the polynomials."""
        right = self._inward(functionals.reshape(len(functionals), -1).T)
        return right.T @ self.solve(right)

    def level_errors(self, group: np.ndarray) -> np.ndarray:
        """Standard error (K,) of the level of each tile against the mean of its group, int (K,), of connected tiles.

        Infinite for a tile that overlaps no other.
        """
        tiles, terms = self.measured.tiles, self.measured.terms
        size = np.bincount(group)
        errors = np.zeros(tiles)
        for first in range(0, tiles, LEVELS_AT_ONCE):
            some = np.arange(first, min(first + LEVELS_AT_ONCE, tiles))
            levels = np.zeros((len(some), tiles, terms))
            levels[:, :, 0] = np.where(group[some, None] == group, -1.0 / size[group], 0.0)
            levels[np.arange(len(some)), some, 0] += 1.0
            errors[some] = np.sqrt(np.maximum(np.diag(self.covariance(levels)), 0.0))
        return np.where(size[group] > 1, errors, np.inf)

    def kinds(self) -> list[np.ndarray]:
        """Which unknowns are slopes, curvatures and common curvatures."""
        term = np.tile(np.arange(self.measured.terms), self.measured.tiles)
        cameras = len(term) + np.arange(len(self.corner))
        found = [np.flatnonzero((term > 0) & (term < 3)), np.flatnonzero(term > 2), cameras]
        return found[: len(self.sizes)]


def common_columns(camera: np.ndarray) -> np.ndarray:
    """Columns (6 K, cameras): the radial curvature of all tiles of each camera."""
    columns = np.zeros((len(camera), 6, int(camera.max()) + 1))
    columns[np.arange(len(camera)), 3, camera] = columns[np.arange(len(camera)), 5, camera] = 1.0
    return columns.reshape(-1, columns.shape[2])


def normal_pull(measured: Measured, weight: np.ndarray) -> np.ndarray:
    """Right sides (K M, C) of the normal equations."""
    at = measured.unknowns[0].ravel()
    pulls = weight[:, None, None] * measured.pulls
    size = measured.tiles * measured.terms
    return np.stack([np.bincount(at, pulls[:, c].ravel(), size) for c in range(pulls.shape[1])], axis=1)


def size_changes(system: System, z: np.ndarray) -> np.ndarray:
    """Changes of the logarithms of the sizes that lead towards the greatest marginal likelihood."""
    sizes = system.sizes
    squares = np.array([np.sum(z[kind] ** 2) for kind in system.kinds()])
    determined = z.shape[1] * system.determined
    if len(sizes) > 1:
        pull = excess_share(sizes) / SHARE_SPREAD**2
        squares[0] += max(pull, 0)
        determined[1] += max(pull, 0)
        squares[1] += max(-pull, 0)
        determined[0] += max(-pull, 0)
    change = 0.5 * np.log(np.maximum(squares, 1e-300) / np.maximum(determined, 1e-9))
    change = np.clip(change, -LARGEST_CHANGE, LARGEST_CHANGE)
    at_least = (sizes <= LEAST_SIZE) & (change < 0)
    return np.where(at_least, 0.0, change)


def excess_share(sizes: np.ndarray) -> float:
    """Logarithm of the ratio of curvatures and slopes over the expected one."""
    return float(np.log(sizes[1] / sizes[0] / CURVATURE_SHARE))


def pair_residuals(measured: Measured, polynomials: np.ndarray) -> np.ndarray:
    """Mean square (P,) of each pair's differences about the polynomials', in units of their own error."""
    found = np.einsum("pmn,pcn->pcm", measured.modes_i, polynomials[measured.i])
    found -= np.einsum("pmn,pcn->pcm", measured.modes_j, polynomials[measured.j])
    return measured.weight * np.mean((measured.difference - found) ** 2, axis=(1, 2))


def evidence(system: System, z: np.ndarray, residual: np.ndarray, share: np.ndarray) -> float:
    """Logarithm of the marginal likelihood of the sizes, up to what does not depend on them."""
    channels, terms = system.measured.difference.shape[1:]
    prior = np.append(system.prior, np.ones(len(system.corner)))
    misfit = channels * terms * np.sum(share * residual) + np.sum(prior[:, None] * z**2)
    value = -0.5 * (channels * system.log_determinant() + misfit)
    value += 0.5 * channels * terms * np.sum(np.log(np.maximum(share, 1e-300)))
    if len(system.sizes) > 1:
        value -= 0.5 * (excess_share(system.sizes) / SHARE_SPREAD) ** 2
    return float(value)


def sky_errors(system: System, fields: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Standard error of the mosaic's low-frequency sky, rms over some places, in units of the noise.

    ``fields`` (n, K, M) are the terms of the tiles' polynomials at each place, mean over the tiles that cover it;
    ``places`` (n, 2) its row and column. Three numbers: with only a constant taken out, after a plane, after a
    quadratic over the mosaic. NaN where no tile overlaps another.
    """
    if not len(system.measured.i):
        return np.full(3, np.nan)
    covariance = system.covariance(fields)
    y, x = ((places - places.mean(axis=0)) / np.maximum(np.ptp(places, axis=0), 1)).T
    columns = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    errors = []
    for taken in (1, 3, 6):
        basis, strength = np.linalg.svd(columns[:, :taken], full_matrices=False)[:2]
        basis = basis[:, strength > 1e-6 * strength[0]]
        left = covariance - basis @ (basis.T @ covariance)
        left = left - (left @ basis) @ basis.T
        errors.append(np.sqrt(max(np.trace(left), 0.0) / len(places)))
    return np.array(errors)
