"""What two tiles show in their overlap, what a fit says of it, and robust statistics of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Tuning constant of Tukey's biweight for 95 % efficiency on Gaussian residuals.
TUKEY = 4.685
#: Cells from which the first guess of everything is made.
FIRST_CELLS = 1000
#: Factor by which smoothing the cells with (1 2 1) / 4 along each axis lowers the variance of noise, and the number of
#: cells that it correlates with one another.
SMOOTHED_VARIANCE = (6 / 16) ** 2
CORRELATED_CELLS = 1.0 / SMOOTHED_VARIANCE


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


def part(count: int) -> slice:
    """About :data:`FIRST_CELLS` of the cells, spread evenly."""
    return slice(None, None, max(1, count // FIRST_CELLS))


def share_of_x(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Weight (C,) of x in the inverse-variance mean of x and y / ratio."""
    return overlap.vy / (overlap.vy + ratio**2 * overlap.vx)


def noise_of_difference(overlap: Overlap, ratio: np.ndarray) -> np.ndarray:
    """Standard deviation (C, 1) that noise gives to y / ratio - x."""
    return np.sqrt(overlap.vx + overlap.vy / ratio**2)[:, None]


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


def correlated_cells(overlap: Overlap) -> float:
    """The number of cells that enter the fit and that smoothing correlates with one another."""
    return max(CORRELATED_CELLS / (overlap.step[0] * overlap.step[1]), 1.0)


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


def in_units(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value / scale, 0 where the scale is 0."""
    return np.divide(value, scale, out=np.zeros_like(value, dtype=float), where=scale > 0)
