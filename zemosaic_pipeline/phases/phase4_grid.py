"""Phase 4: the output grid, and the place of every tile on it."""

from __future__ import annotations

from collections.abc import Sequence

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.tile import Tile, cropped
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.resample.output_grid import OutputGrid, choose_output_grid
from zemosaic_pipeline.resample.placed import PlacedTile, place_tiles

# --------------------------------------------------------------------------------------------------------- Phase 4


def trimmed(run: Run, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles without their borders, where ``apply_master_tile_crop`` is on."""
    if not run.settings.apply_master_tile_crop:
        return list(tiles)
    return [cropped(tile, run.settings.master_tile_crop_percent) for tile in tiles]


def lay_out(run: Run, tiles: Sequence[Tile]) -> tuple[OutputGrid, list[PlacedTile]]:
    """Output grid and place of every tile; tiles outside a given output are set aside."""
    settings, reporter = run.settings, run.reporter
    reporter.stage("phase4_grid", 0, 2)
    grid = choose_output_grid(tiles, settings)
    reporter.stage("phase4_grid", 1, 2)
    placed = []
    for tile, item in zip(tiles, place_tiles(tiles, grid), strict=True):
        if item is None:
            run.set_aside(tile.name, "lies outside the output image")
        else:
            placed.append(item)
    if not placed:
        raise UsageError("no tile touches the output image: check output_wcs_file")
    reporter.stage("phase4_grid", 2, 2)
    crval = [round(float(v), 4) for v in grid.wcs.wcs.crval]
    reporter.info(
        "run_info_phase4_finished",
        f"output grid {grid.shape[1]} x {grid.shape[0]} pixels around {crval}",
        shape=list(grid.shape),
        crval=crval,
    )
    return grid, placed
