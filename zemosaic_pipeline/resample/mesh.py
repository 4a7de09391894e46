"""Phase 4 and all coordinates: the output grid, and where each of its pixels falls on each tile.

Coordinates are computed here and nowhere else, on the CPU and in float64, by astropy's full transformation (every
projection, SIP, TPV, different celestial frames). A tile gets a :class:`CoordinateMesh`: exact positions at the nodes
of a coarse mesh over its footprint. Between the nodes the pixel functions interpolate with bicubic Lagrange
polynomials; the mesh certifies itself, as SWarp's does, by halving its step until the error measured at four times
the node density is below :data:`MESH_TOLERANCE`. A step of 1 is the exact transformation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.pixels.backend_base import Mesh
from zemosaic_pipeline.resample.output_grid import OutputGrid

#: Largest accepted error of an interpolated coordinate, in tile pixels. Beside a bright star 1e-3 pixel is 1e-3 of the
#: image's robust range; astropy's own inverse of a distortion is good to a few 1e-6.
MESH_TOLERANCE = 1e-5
#: Largest distance between mesh nodes, in output pixels.
MESH_STEP = 64


@dataclass(frozen=True)
class CoordinateMesh:
    """Tile pixel coordinates at the nodes of a mesh on the output grid.

    ``nodes`` is float64 (2, ny, nx), x then y; node (j, i) lies at output pixel ``(y + j * step, x + i * step)``.
    ``rect`` = (y0, y1, x0, x1) is the part of the output that the tile can touch, the mesh reaching at least one
    node beyond it. ``error`` is the largest measured interpolation error in tile pixels (0 for a step of 1).
    """

    nodes: np.ndarray
    y: int
    x: int
    step: int
    rect: Rect
    error: float

    @property
    def arguments(self) -> Mesh:
        """What the pixel functions take: (nodes, y, x, step)."""
        return self.nodes, self.y, self.x, self.step

    @cached_property
    def magnification(self) -> float:
        """Tile pixels per output pixel, with half as much again for what varies over the tile."""
        steps = [np.nanmedian(np.hypot(*np.diff(self.nodes, axis=axis))) for axis in (1, 2)]
        return 1.5 * float(max(steps)) / self.step


def coordinate_mesh(tile: Tile, grid: OutputGrid, tolerance: float = MESH_TOLERANCE) -> CoordinateMesh | None:
    """The certified mesh of a tile, or None where the tile does not touch the output.

    Parameters
    ----------
    tolerance : float
        Largest accepted error in tile pixels.
    """
    rect = footprint_rect(tile, grid)
    if rect is None:
        return None
    step = MESH_STEP
    while step > 1:
        mesh = _sampled_mesh(tile, grid, rect, step)
        if mesh.error < tolerance:
            return mesh
        step //= 2
    return exact_mesh(tile, grid, rect)


def exact_mesh(tile: Tile, grid: OutputGrid, rect: Rect) -> CoordinateMesh:
    """A mesh with a node on every output pixel of ``rect``."""
    nodes = _tile_pixels(tile, grid, np.arange(rect[0], rect[1]), np.arange(rect[2], rect[3]))
    return CoordinateMesh(nodes, rect[0], rect[2], 1, rect, 0.0)


def _sampled_mesh(tile: Tile, grid: OutputGrid, rect: Rect, step: int) -> CoordinateMesh:
    """Mesh of one step, its error measured against the exact transformation at four times the node density."""
    fine = max(step // 4, 1)
    y, x = ((rect[0] // step) - 1) * step, ((rect[2] // step) - 1) * step
    rows, columns = (rect[1] - 1 - y) // step + 3, (rect[3] - 1 - x) // step + 3
    exact = _tile_pixels(
        tile,
        grid,
        y + fine * np.arange((rows - 1) * (step // fine) + 1),
        x + fine * np.arange((columns - 1) * (step // fine) + 1),
    )
    nodes = np.ascontiguousarray(exact[:, :: step // fine, :: step // fine])
    mesh = CoordinateMesh(nodes, y, x, step, rect, 0.0)
    inner = exact[:, step // fine : -(step // fine), step // fine : -(step // fine)]
    guess = mesh_positions(
        mesh,
        y + step + fine * np.arange(inner.shape[1]),
        x + step + fine * np.arange(inner.shape[2]),
    )
    height, width = tile.shape
    matters = (inner[0] > -2) & (inner[0] < width + 1) & (inner[1] > -2) & (inner[1] < height + 1)
    if not matters.any():
        return mesh
    error = np.abs(guess - inner)[:, matters].max()
    return CoordinateMesh(nodes, y, x, step, rect, float(error) if np.isfinite(error) else np.inf)


def _linear_positions(mesh: CoordinateMesh, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """As :func:`mesh_positions`, interpolated linearly: as good as exact where a margin of pixels is added."""
    if mesh.step == 1:
        return mesh_positions(mesh, rows, columns)
    (j, fy), (i, fx) = (np.divmod((at - first) / mesh.step, 1.0) for at, first in ((rows, mesh.y), (columns, mesh.x)))
    j, i = j.astype(int), i.astype(int)
    near = mesh.nodes[:, j] * (1 - fy)[:, None] + mesh.nodes[:, j + 1] * fy[:, None]
    return near[:, :, i] * (1 - fx) + near[:, :, i + 1] * fx


def mesh_positions(mesh: CoordinateMesh, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tile pixels (2, len(rows), len(columns)), x then y, of output rows and columns, interpolated as the kernels do."""
    if mesh.step == 1:
        return mesh.nodes[:, (rows - mesh.y)[:, None], (columns - mesh.x)[None, :]]
    wy = _lagrange_matrix(rows - mesh.y, mesh.step, mesh.nodes.shape[1])
    wx = _lagrange_matrix(columns - mesh.x, mesh.step, mesh.nodes.shape[2])
    return np.stack([wy @ axis @ wx.T for axis in mesh.nodes])


def _lagrange_matrix(positions: np.ndarray, step: int, nodes: int) -> np.ndarray:
    """Dense (n, nodes) matrix of cubic Lagrange weights."""
    from zemosaic_pipeline.pixels.kernels import cubic_weights

    cell = np.minimum(positions // step, nodes - 3)
    matrix = np.zeros((len(positions), nodes))
    weights = cubic_weights((positions - cell * step) / step)
    for k, weight in enumerate(weights):
        matrix[np.arange(len(positions)), cell - 1 + k] = weight
    return matrix


def _tile_pixels(tile: Tile, grid: OutputGrid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Exact tile pixels (2, len(rows), len(columns)) of output pixels; NaN where there is no such sky position.

    The distorted inverse (SIP, TPV) is iterative and can settle on a wrong position far outside the tile; a position
    that does not lead back to its output pixel is none.
    """
    x, y = np.meshgrid(columns.astype(float), rows.astype(float))
    tx, ty = transform(grid.wcs, tile.wcs, x, y)
    if tile.wcs.has_distortion:
        height, width = tile.shape
        matters = (np.abs(tx - width / 2) < width) & (np.abs(ty - height / 2) < height)
        bx, by = transform(tile.wcs, grid.wcs, tx[matters], ty[matters])
        bad = ~(np.hypot(bx - x[matters], by - y[matters]) < 0.5)
        tx[matters] = np.where(bad, np.nan, tx[matters])
        ty[matters] = np.where(bad, np.nan, ty[matters])
    return np.stack([tx, ty])


def transform(wcs_from: WCS, wcs_to: WCS, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of ``wcs_to`` at pixels of ``wcs_from``, celestial frames included; NaN where there is none."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # a diverging SIP inverse warns and returns its best guess, which the round trip then judges
        warnings.filterwarnings("ignore", message=".*WCS.all_world2pix.*")
        warnings.filterwarnings("ignore", message=".*failed to converge.*")
        tx, ty = pixel_to_pixel(wcs_from, wcs_to, x, y)
    return np.array(tx, dtype=float), np.array(ty, dtype=float)


def footprint_rect(tile: Tile, grid: OutputGrid) -> Rect | None:
    """Bounding rectangle (y0, y1, x0, x1) of a tile on the output, two pixels wide of it; None where they are apart."""
    height, width = tile.shape
    ys = np.unique(np.append(np.arange(-0.5, height - 0.5, max(height / 24, 1.0)), height - 0.5))
    xs = np.unique(np.append(np.arange(-0.5, width - 0.5, max(width / 24, 1.0)), width - 0.5))
    x, y = transform(tile.wcs, grid.wcs, *np.meshgrid(xs, ys))
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        return None
    y0, y1 = np.floor(y[finite].min()) - 2, np.ceil(y[finite].max()) + 3
    x0, x1 = np.floor(x[finite].min()) - 2, np.ceil(x[finite].max()) + 3
    y0, x0 = max(y0, 0), max(x0, 0)
    y1, x1 = min(y1, grid.shape[0]), min(x1, grid.shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    return int(y0), int(y1), int(x0), int(x1)


def source_rows(
    mesh: CoordinateMesh, rect: Rect, tile_shape: tuple[int, int], margin: int = 4
) -> tuple[int, int] | None:
    """Tile rows (y0, y1) that the output rectangle ``rect`` needs; None where it does not touch the tile.

    The positions are sampled on the border of ``rect`` and as densely within as the mesh has nodes, between which they
    are as good as linear; ``margin`` covers what is left, and the reach of the kernel.
    """
    every = max(mesh.step, 8)
    rows = np.append(np.arange(rect[0], rect[1], every), rect[1] - 1)
    columns = np.append(np.arange(rect[2], rect[3], every), rect[3] - 1)
    x, y = _linear_positions(mesh, rows, columns)
    height, width = tile_shape
    reach = margin + every * mesh.magnification
    near = (x > -reach) & (x < width + reach) & (y > -reach) & (y < height + reach)
    if not near.any():
        return None
    y0 = max(int(np.floor(y[near].min() - margin)), 0)
    y1 = min(int(np.ceil(y[near].max() + margin)) + 1, height)
    return (y0, y1) if y0 < y1 else None
