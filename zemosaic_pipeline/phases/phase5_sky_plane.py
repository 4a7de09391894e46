"""The plane that lies under the sky of a finished mosaic, channel by channel: light of the town, of the moon, of dusk.

It goes through the darkest boxes of the mosaic's small picture, since whatever is brighter may be a nebula. It is for
the eye alone: the science mosaic keeps it, for a plane may be of the sky itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Boxes along the longer side of the picture, and the least side of one in its pixels.
BOXES, LEAST_SIDE = 20, 4
#: The darkness of a box: this percentile of its pixels, which stars do not reach.
DARK_PERCENT = 25.0
#: Least part of a box that holds data.
LEAST_DATA = 0.5
#: Fewest boxes that a plane is laid through.
LEAST_BOXES = 12
#: Part of the boxes that lies below the first plane: so few that a nebula over 40 % of the field cannot tilt it.
BELOW = 0.05
#: Boxes further above the plane than so many times the scatter of those below it have no part in the last steps: a
#: wider range would follow the wings of a nebula.
FAR_ABOVE = 3.0
#: Part of the boxes that have a part in any case, so that a plane through a few does not hold itself up.
LEAST_NEAR = 0.3
#: Most pixels of a box that are looked at, along each side.
SAMPLED = 64


@dataclass(frozen=True)
class SkyPlane:
    """Planes ``constant + down * y + across * x`` over the mosaic's pixels, float64 (C,) each, in the mosaic's units.

    ``span`` (C,) is the difference of the highest and the lowest value over the boxes with data, whose mean is 0.
    """

    constant: np.ndarray
    down: np.ndarray
    across: np.ndarray
    span: np.ndarray

    def block(self, y0: float, x0: float, shape: tuple[int, ...], step: int = 1) -> np.ndarray:
        """The planes over rows and columns ``step`` apart from (y0, x0) on, float32 (C, h, w).

        The bits of a pixel do not depend on how the mosaic is cut into blocks.
        """
        rows, columns = y0 + step * np.arange(shape[0]), x0 + step * np.arange(shape[1])
        lines = self.constant[:, None] + self.down[:, None] * rows
        return (lines[:, :, None] + (self.across[:, None] * columns)[:, None, :]).astype(np.float32)

    @property
    def numbers(self) -> list[np.ndarray]:
        """What :meth:`block` depends on."""
        return [self.constant, self.down, self.across]


def sky_plane(picture: np.ndarray, factor: int) -> SkyPlane | None:
    """The plane under the sky of a picture (C, h, w), NaN for no data, of ``factor`` pixels of the mosaic in one.

    None where there are too few boxes, or where they do not tell a plane (all in one line).
    """
    side = max(-(-max(picture.shape[1:]) // BOXES), LEAST_SIDE)
    dark, rows, columns = dark_boxes(picture, side)
    if len(rows) < LEAST_BOXES or min(np.ptp(rows), np.ptp(columns)) == 0:
        return None
    # middles of the boxes, in pixels of the mosaic
    y, x = ((side * box + (side - 1) / 2) * factor + (factor - 1) / 2 for box in (rows, columns))
    centre = np.array([y.mean(), x.mean()])
    size = side * factor
    basis = np.stack([np.ones(len(y)), (y - centre[0]) / size, (x - centre[1]) / size])
    slopes = np.stack([lowest_plane(basis, values) for values in dark])[:, 1:]
    heights = slopes @ basis[1:]  # their mean is 0: the level stays
    down, across = (slopes / size).T
    return SkyPlane(-down * centre[0] - across * centre[1], down, across, np.ptp(heights, axis=1))


def dark_boxes(picture: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Darkness (C, n) of the boxes of ``side`` pixels with data enough, and their rows and columns among the boxes."""
    channels, height, width = picture.shape
    down, across = -(-height // side), -(-width // side)
    dark = np.full((channels, down, across), np.nan)
    step = -(-side // SAMPLED)
    for row in range(down):
        for column in range(across):
            box = picture[:, row * side : (row + 1) * side : step, column * side : (column + 1) * side : step]
            seen = np.isfinite(box).all(axis=0)
            if np.count_nonzero(seen) >= LEAST_DATA * (-(-side // step)) ** 2:
                dark[:, row, column] = np.percentile(box[:, seen], DARK_PERCENT, axis=1)
    rows, columns = np.nonzero(np.isfinite(dark[0]))
    return dark[:, rows, columns], rows, columns


def lowest_plane(basis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients (3,) of the plane under ``values`` (n,); ``basis`` (3, n) is 1, y and x.

    First the plane that few of the values lie below (quantile regression, Koenker & Bassett 1978, by reweighted least
    squares). Then least squares with Tukey's biweight for those above the plane, alone: they may be nebulae.
    """
    scale = 1e-3 * max(float(np.median(np.abs(values - np.median(values)))), 1e-12)
    plane = weighted_plane(basis, values, np.ones(len(values)))
    for _ in range(50):
        above = values - plane @ basis
        side = np.where(above < 0, 1 - BELOW, BELOW)
        plane = weighted_plane(basis, values, side / np.maximum(np.abs(above), scale))
    for _ in range(30):
        above = values - plane @ basis
        scatter = 1.4826 * float(np.median(-above[above < 0])) if (above < 0).any() else 0.0
        limit = max(FAR_ABOVE * scatter, float(np.quantile(above, LEAST_NEAR)), scale)
        plane = weighted_plane(basis, values, (1 - np.clip(above / limit, 0, 1) ** 2) ** 2)
    return plane


def weighted_plane(basis: np.ndarray, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients (3,) of weighted least squares, those of the least size where the boxes leave a choice."""
    root = np.sqrt(weight)
    return np.linalg.lstsq((basis * root).T, values * root, rcond=1e-9)[0]
