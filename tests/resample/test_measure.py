"""What the measurement of a tile on the coarse grid says of the tile."""

from __future__ import annotations

import numpy as np
import pytest

from zemosaic_pipeline.fits.tile import array_tile
from zemosaic_pipeline.resample.measure import coarse_window, tile_coordinates
from zemosaic_pipeline.resample.mesh import transform
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.placed import place_tiles
from zemosaic_pipeline.synthetic.panels import add_sip, tangent_wcs

SHAPE = (180, 240)
GRID = OutputGrid(tangent_wcs((400, 500), (83.8, -5.4)), (400, 500))


@pytest.mark.parametrize("cell", [4, 5])
@pytest.mark.parametrize("sip", [0.0, 3.0])
def test_coarse_cells_know_where_they_lie_on_the_tile(cell, sip):
    """To a tenth of a pixel, against astropy's transformation of the middles of the cells."""
    wcs = tangent_wcs(SHAPE, (83.82, -5.38), 5.0, rotation_deg=25.0)
    wcs = add_sip(wcs, SHAPE, sip) if sip else wcs
    (item,) = place_tiles([array_tile(np.zeros((1, *SHAPE), np.float32), wcs)], GRID)
    y0, y1, x0, x1 = coarse_window(item.rect, cell)
    place = tile_coordinates(item, (y0, x0), (y1 - y0, x1 - x0), cell)
    rows, columns = (at.ravel() for at in np.mgrid[0 : y1 - y0, 0 : x1 - x0])
    middle = (cell - 1) / 2
    x, y = transform(GRID.wcs, wcs, (x0 + columns) * cell + middle, (y0 + rows) * cell + middle)
    u, v = place.at(rows, columns)
    inside = (np.abs(x - 119.5) < 120) & (np.abs(y - 89.5) < 90)
    assert inside.any() and place.half == (0.75, 1.0)
    assert u[inside] == pytest.approx((x[inside] - 119.5) / 120, abs=0.1 / 120)
    assert v[inside] == pytest.approx((y[inside] - 89.5) / 120, abs=0.1 / 120)
