"""Phase 4: the output grid, the place of every tile on it, and a look at every tile's pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from zemosaic_pipeline.errors import Cancelled, UnusableFile, UsageError
from zemosaic_pipeline.fits.find import SetAside
from zemosaic_pipeline.fits.tile import Tile, cropped
from zemosaic_pipeline.phases.run import Run, Tools, nothing_usable
from zemosaic_pipeline.pixels.backend_cpu import load_kernels
from zemosaic_pipeline.resample.output_grid import OutputGrid, choose_output_grid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, place_tiles
from zemosaic_pipeline.resample.survey import TileSurvey
from zemosaic_pipeline.resume.pieces import survey
from zemosaic_pipeline.settings.settings import Settings

#: A tile on the output grid, and what its pixels are like.
SurveyedTile = tuple[PlacedTile, TileSurvey]


def lay_out(run: Run, tiles: Sequence[Tile], pixels: PixelStore) -> tuple[OutputGrid, list[SurveyedTile]]:
    """Output grid, place and survey of every tile; tiles that cannot be used on it are set aside.

    Raises
    ------
    UsageError
        No tile is left.
    """
    reporter = run.reporter
    tiles = trimmed(run.settings, tiles)
    with surveying(run.tools, tiles, pixels) as surveys:
        reporter.stage("phase4_grid", 0, 2)
        grid = choose_output_grid(tiles, run.settings)
        reporter.stage("phase4_grid", 1, 2)
        placed = place_tiles(tiles, grid)
        for tile, item in zip(tiles, placed, strict=True):
            if item is None:
                run.set_aside(tile.name, "lies outside the output image")
        if not any(placed):
            raise UsageError("no tile touches the output image: check output_wcs_file")
    found = [(item, surveys[item.tile].result()) for item in placed if item is not None]
    good, aside = usable(found)
    for item in aside:
        run.set_aside(item.name, item.reason)
    if not good:
        raise UsageError(nothing_usable(run.aside))
    reporter.stage("phase4_grid", 2, 2)
    crval = [round(float(v), 4) for v in grid.wcs.wcs.crval]
    reporter.info(
        "run_info_phase4_finished",
        f"output grid {grid.shape[1]} x {grid.shape[0]} pixels around {crval}",
        shape=list(grid.shape),
        crval=crval,
    )
    return grid, good


def trimmed(settings: Settings, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles without their borders, where ``apply_master_tile_crop`` is on."""
    if not settings.apply_master_tile_crop:
        return list(tiles)
    return [cropped(tile, settings.master_tile_crop_percent) for tile in tiles]


@contextmanager
def surveying(
    tools: Tools, tiles: Sequence[Tile], pixels: PixelStore
) -> Iterator[dict[Tile, Future[TileSurvey | UnusableFile]]]:
    """Look at the pixels of every tile on all cores, while the caller computes coordinates on one.

    Gives, for each tile, the future of its survey or of the :class:`UnusableFile` that it turned out to be; all are
    done when the context ends.
    """

    def look(tile: Tile) -> TileSurvey | UnusableFile:
        if tools.cancelled():
            raise Cancelled
        try:
            return survey(tools.kept, tile, pixels)
        except UnusableFile as error:
            return error

    pool = ThreadPoolExecutor(max(tools.jobs, 1), thread_name_prefix="survey")
    try:
        surveys = {tile: pool.submit(look, tile) for tile in tiles}
        yield surveys
        load_kernels()  # which the threads do not mind
        wait(surveys.values())
        tools.check()
    finally:
        pool.shutdown(cancel_futures=True)


def usable(found: Sequence[tuple[PlacedTile, TileSurvey | UnusableFile]]) -> tuple[list[SurveyedTile], list[SetAside]]:
    """The tiles with usable pixels and their surveys; and why the others have none."""
    some_sky = any(isinstance(seen, TileSurvey) and seen.pixels and seen.spread > 0 for _, seen in found)
    good: list[SurveyedTile] = []
    aside: list[SetAside] = []
    for item, seen in found:
        if isinstance(seen, UnusableFile):
            aside.append(SetAside(item.tile.name, seen.reason))
        elif not seen.pixels:
            aside.append(SetAside(item.tile.name, "holds no valid pixel (all NaN, infinite or masked)"))
        elif seen.spread == 0 and some_sky:
            aside.append(SetAside(item.tile.name, "has the same value everywhere: it shows no sky"))
        else:
            good.append((item, seen))
    return good, aside
