"""Step 1 of Phase 5: the tiles as means over the cells of one coarse grid, for the photometric solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.overlaps.gradients import TileCoordinates, fit_coordinates
from zemosaic_pipeline.overlaps.pairs import CoarseTile
from zemosaic_pipeline.pixels.backend_base import Backend, TileCells
from zemosaic_pipeline.resample.mesh import mesh_positions, source_rows
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, readings
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, TileSurvey
from zemosaic_pipeline.sky import pixel_scale

#: Rows of the output measured at a time.
STRIP = 2048
#: Cells along each axis from which a tile's coordinates are made.
COORDINATE_SAMPLES = 16
#: Cells beyond its own that a pixel reaches, by the smoothing with (1 2 1) of the fits; what the spline of a sample
#: carries further is little, and the survey's cells are wider than a star.
CELLS_REACHED = 1.0


def coarse_window(rect: Rect, cell_px: int) -> Rect:
    """Coarse cells (cy0, cy1, cx0, cx1) that lie wholly within an output rectangle."""
    return -(-rect[0] // cell_px), rect[1] // cell_px, -(-rect[2] // cell_px), rect[3] // cell_px


def overlap_counts(placed: Sequence[PlacedTile], shape: tuple[int, int], cell_px: int) -> np.ndarray:
    """How many tiles touch each coarse cell of the output, uint16."""
    counts = np.zeros((shape[0] // cell_px + 1, shape[1] // cell_px + 1), np.uint16)
    for item in placed:
        cy0, cy1, cx0, cx1 = coarse_window(item.rect, cell_px)
        counts[cy0:cy1, cx0:cx1] += cells_touched(item, cell_px)
    return counts


def cells_touched(item: PlacedTile, cell_px: int) -> np.ndarray:
    """Coarse cells within the tile's rectangle that it touches, uint8 (h, w)."""
    from zemosaic_pipeline.pixels.cpu_loops import cells_inside

    cy0, cy1, cx0, cx1 = coarse_window(item.rect, cell_px)
    found = np.zeros((max(cy1 - cy0, 0), max(cx1 - cx0, 0)), np.uint8)
    cells_inside(item.mesh.arguments, item.tile.shape, cell_px, (cy0, cx0), found)
    return found


def cells_to_measure(item: PlacedTile, counts: np.ndarray, cell_px: int) -> np.ndarray:
    """Coarse cells within the tile's rectangle that are worth measuring, uint8 (h, w).

    Those that another tile touches too (``counts`` > 1), and every 16th of the others for the tile's sky.
    """
    cy0, cy1, cx0, cx1 = coarse_window(item.rect, cell_px)
    wanted = cells_touched(item, cell_px)
    alone = counts[cy0:cy1, cx0:cx1] < 2
    sparse = np.zeros_like(wanted)
    sparse[::4, ::4] = 1
    wanted[alone & (sparse == 0)] = 0
    return wanted


def measure_tile(
    item: PlacedTile,
    survey: TileSurvey,
    counts: np.ndarray,
    cell_px: int,
    store: PixelStore,
    backend: Backend,
    every: int = 1,
) -> CoarseTile:
    """Means of a tile over the cells of the common coarse grid; see :func:`cells_to_measure`.

    With ``every`` = 2, a quarter of their pixels will do: the spline of a sample reaches to its neighbours.
    """
    cy0, _, cx0, cx1 = coarse_window(item.rect, cell_px)
    wanted = cells_to_measure(item, counts, cell_px)
    sums = np.zeros((item.tile.channels, *wanted.shape))
    number = np.zeros(wanted.shape, np.int32)
    strip_cells = max(STRIP // cell_px, 1)
    for top in range(0, wanted.shape[0], strip_cells):
        bottom = min(top + strip_cells, wanted.shape[0])
        rect = ((cy0 + top) * cell_px, (cy0 + bottom) * cell_px, cx0 * cell_px, cx1 * cell_px)
        rows = source_rows(item.mesh, rect, item.tile.shape) if wanted.shape[1] else None
        if rows is None:
            continue
        source = backend.upload(store.rows(item.tile, *rows, readings=readings(item, rect, rows)))
        strip = backend.zeros((item.tile.channels, bottom - top, wanted.shape[1]), "float64")
        strip_number = backend.zeros((bottom - top, wanted.shape[1]), "int32")
        cells = TileCells(
            origin=(rows[0], 0),
            shape=item.tile.shape,
            mesh=item.mesh.arguments,
            cell_px=cell_px,
            every=every,
            corner=(cy0 + top, cx0),
            wanted=np.ascontiguousarray(wanted[top:bottom]),
        )
        backend.measure(source, cells, strip, strip_number)
        sums[:, top:bottom] = backend.download(strip)
        number[top:bottom] = backend.download(strip_number)
    with np.errstate(invalid="ignore"):
        means = (sums / number).astype(np.float32)
    return coarse_tile(item, survey, (cy0, cx0), means, number * every**2, cell_px)


def tile_coordinates(item: PlacedTile, corner: tuple[int, int], size: tuple[int, int], cell_px: int) -> TileCoordinates:
    """Where the middles of the coarse cells of a window lie on the tile, from some of them."""
    spots = [np.unique(np.linspace(0, n - 1, COORDINATE_SAMPLES).astype(int)) for n in size]
    middles = [cell_px * (first + spot) + cell_px // 2 for first, spot in zip(corner, spots, strict=True)]
    x, y = mesh_positions(item.mesh, *middles)
    rows, columns = (at.ravel() for at in np.meshgrid(*spots, indexing="ij"))
    # the middle of an even number of pixels lies between two of them
    shift = (0.5 - cell_px / 2 + cell_px // 2) / cell_px
    return fit_coordinates(rows + shift, columns + shift, x.ravel(), y.ravel(), size, item.tile.shape)


def saturated_cells(
    item: PlacedTile, saturated: np.ndarray, corner: tuple[int, int], measured: np.ndarray, cell_px: int
) -> np.ndarray | None:
    """The cells, bool (h, w), that a saturated pixel reaches, of those ``measured``; None where no pixel is saturated.

    ``saturated`` is a survey's, on cells of :data:`WEIGHT_CELL` tile pixels.
    """
    if not (saturated.any() and measured.any()):
        return None
    middles = (cell_px * (first + np.arange(n)) + cell_px // 2 for first, n in zip(corner, measured.shape, strict=True))
    positions = mesh_positions(item.mesh, *middles)[:, measured].astype(np.float32) / WEIGHT_CELL
    down, across = (np.nanmedian(np.abs(np.diff(item.mesh.nodes, axis=axis)), axis=(1, 2)) for axis in (1, 2))
    reach = (0.5 + CELLS_REACHED) * cell_px * (down + across)[:, None].astype(np.float32) / item.mesh.step / WEIGHT_CELL
    count = np.pad(saturated, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    limits = np.array(saturated.shape[::-1], np.float32)[:, None]
    low, high = (np.fmin(np.fmax(positions + end, 0), limits).astype(np.int32) for end in (-reach, reach + 1))
    (left, top), (right, bottom) = low, high
    found = np.zeros(measured.shape, bool)
    found[measured] = count[bottom, right] - count[top, right] - count[bottom, left] + count[top, left] > 0
    return found


def coarse_tile(
    item: PlacedTile,
    survey: TileSurvey,
    corner: tuple[int, int],
    means: np.ndarray,
    number: np.ndarray,
    cell_px: int,
) -> CoarseTile:
    """The measured tile with its sky level and the noise of its cells.

    A cell averages as many tile pixels as it covers, whatever the interpolation in between.
    """
    step = item.mesh.step
    scale = float(np.nanmedian(np.hypot(*np.diff(item.mesh.nodes, axis=2)))) / step
    noise = survey.noise / (cell_px * max(scale, 1e-6))
    full = number >= 0.5 * cell_px * cell_px
    sky = np.zeros(len(means))
    if full.any():
        sky = np.percentile(means[:, full], 30, axis=1).astype(float)
    return CoarseTile(
        name=item.tile.name,
        corner=corner,
        means=means,
        fraction=(number / float(cell_px * cell_px)).astype(np.float32),
        noise=noise,
        pixel_noise=survey.noise,
        sky=sky,
        coordinates=tile_coordinates(item, corner, number.shape, cell_px) if number.size else None,
        scale=pixel_scale(item.tile.wcs),
        saturated=saturated_cells(item, survey.saturated, corner, number > 0, cell_px),
    )
