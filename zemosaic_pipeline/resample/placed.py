"""Tiles on their way through Phase 5: where they lie on the output, what their pixels are like, and their pixels.

The pixels stay on disk; :class:`PixelStore` reads them when a block needs them and keeps what the memory budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.resample.mesh import CoordinateMesh, coordinate_mesh
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, TileSurvey

# --------------------------------------------------------------------------------------------- radial weights


#: A weight map or alpha plane that says nothing.
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
    weight_map: np.ndarray = None  # type: ignore[assignment]

    @property
    def rect(self) -> tuple[int, int, int, int]:
        """Output rectangle (y0, y1, x0, x1) that the tile can touch."""
        return self.mesh.rect

    def map(self) -> np.ndarray:
        return NO_MAP if self.weight_map is None else self.weight_map


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


def weighted(
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
    weight_map = None
    if survey is not None and feather > 0 and not survey.valid.all():
        from scipy.ndimage import distance_transform_edt

        padded = np.pad(survey.valid, 1, constant_values=True)
        distance = distance_transform_edt(padded)[1:-1, 1:-1] * WEIGHT_CELL
        # half a cell less: the edge of the data lies somewhere within the outermost cell
        weight_map = np.clip((distance - WEIGHT_CELL) / feather, 0.0, 1.0).astype(np.float32)
        weight_map = np.where(survey.valid, np.maximum(weight_map, 0.02), 0.0).astype(np.float32)
    if radial is not None:
        weight_map = radial if weight_map is None else weight_map * radial
    return replace(placed, weight=weight, feather=feather, weight_map=weight_map)
