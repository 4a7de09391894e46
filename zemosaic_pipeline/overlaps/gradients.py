"""Gradients: the polynomial of every tile, and what an overlap says about the polynomials of its two tiles.

A tile's gradient is a polynomial of order 0, 1 or 2 in its own coordinates: u along its rows and v along its columns,
from its middle, in halves of its longer side. The squares are taken less their means over the tile, so that the
constant is the tile's mean level.

In an overlap the smooth difference of both tiles is measured in *modes*: polynomials that are orthonormal over the
overlap's cells under their weights, so that noise gives every mode the same, independent error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zemosaic_pipeline.overlaps.errors_in_variables import Fit
from zemosaic_pipeline.overlaps.overlap import (
    CORRELATED_CELLS,
    Overlap,
    clustered_deviation,
    correlated_cells,
    deviation,
    median,
    noise_of_difference,
    part,
    shared_weights,
)

#: Relative error of a cell's brightness where the sky is compared: stars count for less than where ratios are fitted.
SKY_STRUCTURE_ERROR = 0.03
#: Most steps of the comparison.
SKY_STEPS = 10
#: Number of terms of a polynomial of each order.
TERMS = {0: 1, 1: 3, 2: 6}
#: A mode that the others explain but for this share of its square is none.
LEAST_MODE = 1e-10
#: Exponents of row and column in the cubic polynomials of :class:`TileCoordinates`.
CUBIC = [(i, j) for total in range(4) for i in range(total, -1, -1) for j in [total - i]]


@dataclass(frozen=True)
class TileCoordinates:
    """Where coarse cells lie on a tile: u and v as cubic polynomials of the cell's row and column.

    Attributes
    ----------
    coefficients : ndarray
        float64 (2, 10), of the monomials of the scaled row and column.
    size : (int, int)
        Rows and columns of the tile's coarse window, from whose middle rows and columns are scaled to -1..1.
    half : (float, float)
        Half the tile's height and width in the unit of u and v: the longer one is 1.
    """

    coefficients: np.ndarray
    size: tuple[int, int]
    half: tuple[float, float]

    def at(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u and v, each (n,), of cells (n,) of the tile's coarse window, whole or broken numbers."""
        u, v = self.coefficients @ cubic_terms(rows, columns, self.size)
        return u, v


def cubic_terms(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Monomials (10, n) up to the third degree of rows and columns scaled to -1..1 over ``size``."""
    y, x = (2.0 * np.asarray(at) / max(n - 1, 1) - 1.0 for at, n in zip((rows, columns), size, strict=True))
    return np.stack([y**i * x**j for i, j in CUBIC])


def fit_coordinates(
    rows: np.ndarray, columns: np.ndarray, x: np.ndarray, y: np.ndarray, size: tuple[int, int], shape: tuple[int, int]
) -> TileCoordinates:
    """Coordinates of a tile of ``shape`` (H, W) from its pixels x and y (n,) at some cells (n,) of its window."""
    half = max(shape) / 2
    uv = np.stack([x - (shape[1] - 1) / 2, y - (shape[0] - 1) / 2]) / half
    # far outside the tile a distortion may be anything
    good = (np.abs(uv) < 1.05 * np.array([[shape[1]], [shape[0]]]) / 2 / half).all(axis=0)
    if np.count_nonzero(good) < 2 * len(CUBIC):
        good = np.isfinite(uv).all(axis=0)
    uv = uv[:, good]
    found = np.linalg.lstsq(cubic_terms(rows[good], columns[good], size).T, uv.T, rcond=1e-9)[0]
    return TileCoordinates(found.T, size, (shape[0] / 2 / half, shape[1] / 2 / half))


def square_coordinates(size: tuple[int, int]) -> TileCoordinates:
    """Coordinates of a tile whose pixels are the cells themselves."""
    half = max(size) / 2
    coefficients = np.zeros((2, len(CUBIC)))
    coefficients[0, CUBIC.index((0, 1))] = (size[1] - 1) / 2 / half
    coefficients[1, CUBIC.index((1, 0))] = (size[0] - 1) / 2 / half
    return TileCoordinates(coefficients, size, (size[0] / 2 / half, size[1] / 2 / half))


def polynomial_terms(u: np.ndarray, v: np.ndarray, half: tuple[float, float], order: int) -> np.ndarray:
    """The terms (M, n) of a tile's polynomial at places (n,): 1, u, v, u^2 - mean, u v, v^2 - mean."""
    terms = [np.ones_like(u), u, v, u * u - half[1] ** 2 / 3, u * v, v * v - half[0] ** 2 / 3]
    return np.stack(terms[: TERMS[order]])


@dataclass(frozen=True)
class SmoothDifference:
    """What both tiles show of the modes of their overlap.

    ``x`` and ``y`` (C, M) are the coefficients of the modes, tile units, each tile's own sky taken off; ``error`` (C,)
    the standard error of each coefficient of x - y / ratio, in units of x. ``modes_x`` and ``modes_y`` (M, M) turn the
    coefficients of a tile's polynomial into those of the modes. The first mode is the constant: its coefficients are
    the tiles' means over the overlap. A mode that the overlap cannot show is 0 throughout.
    """

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    modes_x: np.ndarray
    modes_y: np.ndarray


def smooth_difference(overlap: Overlap, fit: Fit, terms_x: np.ndarray, terms_y: np.ndarray) -> SmoothDifference:
    """The smooth difference of two tiles from the cells of their overlap; terms (M, n) of both tiles' polynomials.

    Robust: cells are judged by the residual of a polynomial difference. Bright cells, where an error of the gain or of
    the stars' shape speaks, count for less.
    """
    sigma = noise_of_difference(overlap, fit.ratio)
    some = part(fit.x.shape[1])
    y = fit.y / fit.ratio[:, None]
    structure = (0.5 / sigma) * (fit.x + y)
    structure -= median(structure[:, some])
    difference = (y - fit.x) / sigma
    residual = difference - median(difference[:, some])
    small = 0.02 * np.sqrt(CORRELATED_CELLS / fit.x.shape[1])
    step = 0
    while True:
        weight = shared_weights(residual, structure, deviation(residual[:, some]), SKY_STRUCTURE_ERROR)
        total = np.sum(weight)
        modes = orthonormal(terms_x, weight / total)
        before, residual = residual, difference - (difference * (weight / total)) @ modes.T @ modes
        step += 1
        if step == SKY_STEPS or np.max(np.abs(residual - before)[:, some]) < small:
            break
    share = weight / total
    influence = share * sigma * residual
    # the taper of the former leaves out a part of the correlation that smoothing is known to make
    known = np.sqrt(correlated_cells(overlap) * np.sum(influence**2, axis=1))
    error = np.maximum(clustered_deviation(influence, overlap), known)
    return SmoothDifference(
        (fit.x * share) @ modes.T,
        (fit.y * share) @ modes.T,
        np.maximum(error, 1e-3 * sigma[:, 0]),
        (modes * share) @ terms_x.T,
        (modes * share) @ terms_y.T,
    )


def orthonormal(terms: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Combinations (M, n) of the first terms each (M, n) that are orthonormal under weights (n,) whose sum is 1.

    The Gram-Schmidt process on the products of the terms; a term that those before it explain gives zeros.
    """
    gram = (terms * weight) @ terms.T
    rows = np.zeros_like(gram)
    for m in range(len(gram)):
        row = np.zeros(len(gram))
        row[m] = 1.0
        for _ in range(2):  # twice is enough (Kahan, in Parlett 1980, The Symmetric Eigenvalue Problem, 6.9)
            row -= (rows @ gram @ row) @ rows
        square = row @ gram @ row
        if square > LEAST_MODE * gram[m, m]:
            rows[m] = row / np.sqrt(square)
    return rows @ terms
