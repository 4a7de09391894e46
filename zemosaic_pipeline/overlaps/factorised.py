"""Symmetric positive definite systems of equations: small ones in full, large ones sparse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Most unknowns that are solved by numpy alone, and as a full matrix at all. Importing scipy costs a fifth of a second.
SMALL, FULL = 400, 1800


class Factorised:
    """Solves ``A x = b`` for right sides (N, n); ``log_determinant`` is that of A.

    A is given by rows, columns and values that are added up.

    Raises
    ------
    numpy.linalg.LinAlgError
        A is not positive definite.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, size: int) -> None:
        if size > FULL:
            self._solve, self.log_determinant = sparse(rows, columns, values, size)
            return
        matrix = np.bincount(rows * size + columns, values, size * size).reshape(size, size)
        self._solve, self.log_determinant = small(matrix) if size <= SMALL else full(matrix)

    def __call__(self, right: np.ndarray) -> np.ndarray:
        return self._solve(right) if right.size else np.zeros_like(right)


Solver = tuple[Callable[[np.ndarray], np.ndarray], float]


def small(matrix: np.ndarray) -> Solver:
    """By numpy: the inverse itself, since it is applied many times."""
    lower = np.linalg.cholesky(matrix)
    inverse = np.linalg.inv(lower)
    return lambda right: inverse.T @ (inverse @ right), 2 * float(np.sum(np.log(np.diag(lower))))


def full(matrix: np.ndarray) -> Solver:
    """By LAPACK's Cholesky decomposition."""
    from scipy.linalg import cho_factor, cho_solve

    factor = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    return (
        lambda right: cho_solve(factor, right, check_finite=False),
        2 * float(np.sum(np.log(np.diag(factor[0])))),
    )


def sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, size: int) -> Solver:
    """By SuperLU, pivots on the diagonal."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    matrix = csc_matrix((values, (rows, columns)), shape=(size, size))
    options = {"SymmetricMode": True}
    factor = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    pivots = factor.U.diagonal()
    if not (pivots > 0).all():
        raise np.linalg.LinAlgError("Matrix is not positive definite")
    return factor.solve, float(np.sum(np.log(pivots)))
