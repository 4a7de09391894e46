"""Phase 1 for panels: they are opened; what cannot be used is set aside."""

from __future__ import annotations

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.admission import RawFrame, scan_tiles
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.phases.run import Run, nothing_usable


def open_panels(run: Run) -> list[Tile] | None:
    """Open every panel of the input; None where it holds raw frames.

    Raises
    ------
    UsageError
        There is no file, or none can be used.
    """
    wanted = run.settings.use_existing_master_tiles
    if wanted is False or run.plan is not None:
        return None

    def count(done: int, total: int) -> None:
        run.tools.check()
        run.reporter.stage("phase1_scan", done, total)

    try:
        tiles, aside = scan_tiles(run.source, run.scratch, run.output, count, raw_ends=wanted is None)
    except RawFrame:
        return None
    for item in aside:
        run.set_aside(item.name, item.reason)
    run.tools.check()
    if not tiles and not aside:
        kinds = ".fit, .fits, .fts; also .fz and .gz"
        raise UsageError(f"There is no FITS file ({kinds}) in {run.source}: give the folder of the frames or panels.")
    if not tiles:
        raise UsageError(nothing_usable(aside, f" in {run.source}"))
    run.reporter.info("run_info_existing_master_tiles_mode", f"{len(tiles)} plate-solved tiles", num_tiles=len(tiles))
    run.kept.identify([tile.path for tile in tiles if tile.path is not None], run.tools.jobs)
    return tiles
