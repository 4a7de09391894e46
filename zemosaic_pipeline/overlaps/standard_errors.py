"""How well an overlap tells the ratio of its tiles: noise, correlated cells, and stars that contradict one another."""

from __future__ import annotations

import numpy as np

from zemosaic_pipeline.overlaps.overlap import (
    Model,
    Overlap,
    _along,
    clustered_deviation,
    correlated_cells,
    noise_of_difference,
    share_of_x,
)

#: A log ratio that is known worse than this is none.
MAX_PAIR_SE = 0.25


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
    information = model.weight * structure**2
    error = clustered_deviation(influence / (1 - star_leverage(information, overlap)), overlap)
    # without structure there is no influence either: what noise alone leaves open is the least
    error = np.maximum(error, np.sqrt(np.diag(model.inverse)[:channels])) / reliability(overlap, model, information)
    return np.where(error < MAX_PAIR_SE, error, np.inf)


def reliability(overlap: Overlap, model: Model, information: np.ndarray) -> np.ndarray:
    """How much (C,) of the information (C, n) that the structure holds is not its own noise, at least 0.01.

    The sandwich takes all of it for what a change of the ratio does to the residuals.
    """
    share = share_of_x(overlap, model.ratio)
    noise = share * (1 - share) * np.sum(model.weight)
    return np.maximum(1 - noise / np.maximum(np.sum(information, axis=1), 1e-300), 0.01)


def structure_weights(structure: np.ndarray, relative: float) -> np.ndarray:
    """Weight (n,) of each cell from its structure (C, n), in units of the noise, and the structure's relative error."""
    return 1.0 / (1.0 + relative**2 / len(structure) * np.sum(structure**2, axis=0))


def scatter_of_stars(
    overlap: Overlap, information: np.ndarray, pull: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far the stars of an overlap contradict one another: the last three of :class:`Fit`.

    From each cell's information on the log ratio and its pull (C, n): their quotient is the deviation.
    A star is a hill of the information: every cell belongs to the highest of its neighbours, and with it to its peak.
    """
    image = np.full(np.add(overlap.used.shape, 2), -1.0)
    image[1:-1, 1:-1][overlap.used] = information.sum(axis=0)
    star = hills(image)[1:-1, 1:-1][overlap.used]
    count = image.size
    weight, pulled = (np.array([np.bincount(star, line, count) for line in values]) for values in (information, pull))
    squares = np.maximum(np.sum(weight**2, axis=1), 1e-300)
    total = np.maximum(np.sum(weight, axis=1), 1e-300)
    number = total**2 / squares
    limit = np.full((len(weight), 1), 1e6)
    for _ in range(5):
        kept = np.clip(pulled, -limit * weight, limit * weight)
        scatter = np.sqrt(np.sum(kept**2, axis=1) / squares)
        limit = 3.0 * scatter[:, None]
    return number, scatter, np.sqrt(correlated_cells(overlap) * number / total)


def hills(image: np.ndarray) -> np.ndarray:
    """Number of the peak, int (h, w), that each cell of an image leads to, always up to the highest neighbour.

    The image has an edge, one cell wide, that is lower than all else.
    """
    height, width = image.shape
    up = np.arange(image.size)
    best = image.ravel().copy()
    inner = up.reshape(height, width)[1:-1, 1:-1].ravel()
    for step in (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1):
        other = image.ravel()[inner + step]
        higher = other > best[inner]
        best[inner[higher]] = other[higher]
        up[inner[higher]] = inner[higher] + step
    while True:
        further = up[up]
        if np.array_equal(further, up):
            return up.reshape(height, width)
        up = further


def star_leverage(information: np.ndarray, overlap: Overlap) -> np.ndarray:
    """Share (C, n) of the information (C, n) that lies within two cells, at most 0.8.

    A star that decides the fit leaves no residual: residuals over 1 - leverage are those of a fit without it (the
    jackknife; MacKinnon & White 1985).
    """
    image = np.zeros((len(information), *overlap.used.shape))
    image[:, overlap.used] = information / np.maximum(information.sum(axis=1, keepdims=True), 1e-300)
    near = _along(image, [np.ones(3)[::step] for step in overlap.step])
    return np.minimum(near[:, overlap.used], 0.8)
