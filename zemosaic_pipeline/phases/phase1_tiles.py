"""Phase 1 for panels: they are opened; what cannot be used is set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import UsageError


def scan(run: Any, source: Path, output: Path, scratch: Path) -> list | None:
    """Phase 1 for panels: open every tile; at least one must be usable. None where the input holds raw frames."""
    from zemosaic_pipeline.fits.admission import RawFrame, scan_tiles
    from zemosaic_pipeline.phases.run import nothing_usable

    wanted = run.settings.use_existing_master_tiles
    if wanted is False:
        return None

    def count(done: int, total: int) -> None:
        run.check()
        run.reporter.stage("phase1_scan", done, total)

    try:
        tiles, aside = scan_tiles(source, scratch, output, count, raw_ends=wanted is None)
    except RawFrame:
        return None
    for item in aside:
        run.set_aside(item.name, item.reason)
    run.check()
    if not tiles and not aside:
        kinds = ".fit, .fits, .fts; also .fz and .gz"
        raise UsageError(f"There is no FITS file ({kinds}) in {source}: give the folder of the frames or panels.")
    if not tiles:
        raise UsageError(nothing_usable(aside, f" in {source}"))
    run.reporter.info("run_info_existing_master_tiles_mode", f"{len(tiles)} plate-solved tiles", num_tiles=len(tiles))
    run.kept.identify((tile.path for tile in tiles), run.jobs)
    return tiles
