"""Tiles on their way through Phase 5: where they lie on the output, and what their pixels weigh.

The pixels stay on disk; `resample.pixel_store.PixelStore` reads them when a block needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.resample.mesh import CoordinateMesh, coordinate_mesh
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, TileSurvey

#: A weight map that says nothing.
NO_MAP = np.ones((1, 1), np.float32)


@dataclass(frozen=True, eq=False)
class PlacedTile:
    """A tile with its place on the output grid and its weights.

    ``weight`` multiplies all its pixels; ``feather`` is the width in tile pixels of the ramp at its edge;
    ``weight_map`` is float32 (h, w) on cells of :data:`WEIGHT_CELL` pixels, or 1 x 1 for none.
    """

    tile: Tile
    mesh: CoordinateMesh
    weight: float = 1.0
    feather: float = 0.0
    weight_map: np.ndarray = field(default_factory=lambda: NO_MAP)

    @property
    def rect(self) -> Rect:
        """Output rectangle (y0, y1, x0, x1) that the tile can touch."""
        return self.mesh.rect


def readings(item: PlacedTile, piece: Rect, rows: tuple[int, int]) -> float:
    """How often a tile is read as a whole by a pass in pieces of the output like this one, which needs those rows."""
    y0, y1, x0, x1 = item.rect
    pieces = max((y1 - y0) / (piece[1] - piece[0]), 1.0) * max((x1 - x0) / (piece[3] - piece[2]), 1.0)
    return pieces * (rows[1] - rows[0]) / item.tile.shape[0]


def place_tiles(tiles: Sequence[Tile], grid: OutputGrid) -> list[PlacedTile | None]:
    """Certified coordinate mesh of every tile; None for tiles that lie outside the output.

    Call it from one thread: astropy's WCS objects are not safe to share.
    """
    placed = []
    for tile in tiles:
        mesh = coordinate_mesh(tile, grid)
        placed.append(None if mesh is None else PlacedTile(tile, mesh))
    return placed


def with_weights(
    placed: PlacedTile,
    survey: TileSurvey | None,
    weight: float,
    feather: float,
    radial: np.ndarray | None = None,
) -> PlacedTile:
    """The tile with its weight, its feather, and a weight map where its data do not reach its edge.

    The edge of the array is feathered exactly by the pixel functions; the map does the same for an edge of the data
    within the array. Holes smaller than a cell get no feather.
    """
    weight_map = NO_MAP if radial is None else radial
    if survey is not None and feather > 0 and not survey.valid.all():
        inner = inner_feather(survey.valid, feather)
        weight_map = inner if radial is None else inner * radial
    return replace(placed, weight=weight, feather=feather, weight_map=weight_map)


def inner_feather(valid: np.ndarray, feather: float) -> np.ndarray:
    """Weights, float32 (h, w), of cells of :data:`WEIGHT_CELL` pixels that fall to 0 at those that are not ``valid``.

    The ramp is ``feather`` pixels wide.
    """
    from scipy.ndimage import distance_transform_edt

    distance: Any = distance_transform_edt(np.pad(valid, 1, constant_values=True))
    # half a cell less: the edge of the data lies somewhere within the outermost cell
    ramp = np.clip((distance[1:-1, 1:-1] * WEIGHT_CELL - WEIGHT_CELL) / feather, 0.0, 1.0).astype(np.float32)
    return np.where(valid, np.maximum(ramp, 0.02), 0.0).astype(np.float32)
