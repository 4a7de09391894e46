"""Phases 4 to 6: from tiles to the mosaic on disk, on whichever backend the run has.

`zemosaic_worker` calls the functions of this module in order; each takes what the one before made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from zemosaic_photometry import (
    PhotometricSolution,
    PhotometryOptions,
    compute_photometric_gains_and_offsets,
    identity_solution,
)
from zemosaic_pipeline.arrays import make_radial_weight_map
from zemosaic_pipeline.errors import UnusableFile, UsageError
from zemosaic_pipeline.fits.find import SetAside
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.overlaps.pairs import CoarseTile, PairRelation, PairsInPassing
from zemosaic_pipeline.phases.run import COARSE_SHARE, Run, nothing_usable
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.backend_cpu import load_kernels
from zemosaic_pipeline.resample.measure import measure_tile, overlap_counts
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, with_weights
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, TileSurvey
from zemosaic_pipeline.resume.pieces import packed_solution, photometry_mark, survey, unpacked_solution
from zemosaic_pipeline.settings.settings import Settings


@dataclass(frozen=True)
class Scene:
    """The tiles on the output grid, their photometric solution, and the pixels' store.

    ``measured`` are the names that the solution's pairs refer to, those of tiles left out included.
    """

    grid: OutputGrid
    placed: list[PlacedTile]
    surveys: list[TileSurvey]
    store: PixelStore
    solution: PhotometricSolution
    measured: list[str]

    @property
    def channels(self) -> int:
        return self.placed[0].tile.channels

    @property
    def frames(self) -> int:
        """Number of raw frames in all tiles."""
        return sum(item.tile.n_frames for item in self.placed)


@contextmanager
def surveying(run: Run, tiles: Sequence[Tile], store: PixelStore) -> Iterator[dict[Tile, Future]]:
    """Look at the pixels of every tile on all cores, while the caller computes coordinates on one.

    Gives, for each tile, the future of its :class:`TileSurvey` or of the :class:`UnusableFile` that it turned out to
    be; all are done when the context ends.
    """

    def look(tile: Tile) -> TileSurvey | UnusableFile | None:
        try:
            return None if run.cancelled() else survey(run.kept, run.settings, tile, store)
        except UnusableFile as error:
            return error

    pool = ThreadPoolExecutor(max(run.jobs, 1), thread_name_prefix="survey")
    try:
        looks = {tile: pool.submit(look, tile) for tile in tiles}
        yield looks
        load_kernels()  # which the threads do not mind
        wait(looks.values())
        run.check()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------- Phase 5


def normalise(
    run: Run, grid: OutputGrid, placed: Sequence[PlacedTile], looks: dict[Tile, Future], store: PixelStore
) -> Scene:
    """Weights, coarse measurement and photometric solution: steps 1 and 2 of Phase 5."""
    placed, surveys = usable(run, placed, [looks[item.tile].result() for item in placed])
    placed = [weigh(run.settings, item, facts) for item, facts in zip(placed, surveys, strict=True)]
    solution = solve(run, grid, placed, surveys, store)
    if run.settings.tile_weight_mode == "inverse_variance" and run.settings.enable_tile_weighting:
        placed = weigh_by_variance(placed, surveys, solution)
    keep = [k for k in range(len(placed)) if not solution.excluded[k]]
    for k in np.nonzero(solution.excluded)[0]:
        run.aside.append(SetAside(placed[k].tile.name, "bad_tile: its values do not belong to this sky"))
    for warning in solution.warnings:
        run.reporter.warn("", warning)
    names = [item.tile.name for item in placed]
    return Scene(grid, [placed[k] for k in keep], [surveys[k] for k in keep], store, solution.subset(keep), names)


def usable(
    run: Run, placed: Sequence[PlacedTile], found: Sequence[TileSurvey | UnusableFile]
) -> tuple[list[PlacedTile], list[TileSurvey]]:
    """The tiles with usable pixels and their surveys; the others are set aside."""
    seen = [f.spread > 0 for f in found if isinstance(f, TileSurvey) and f.pixels]
    good: list[tuple[PlacedTile, TileSurvey]] = []
    for item, facts in zip(placed, found, strict=True):
        if isinstance(facts, UnusableFile):
            run.set_aside(item.tile.name, facts.reason)
        elif not facts.pixels:
            run.set_aside(item.tile.name, "holds no valid pixel (all NaN, infinite or masked)")
        elif facts.spread == 0 and any(seen):
            run.set_aside(item.tile.name, "has the same value everywhere: it shows no sky")
        else:
            good.append((item, facts))
    if not good:
        raise UsageError(nothing_usable(run.aside))
    return [item for item, _ in good], [facts for _, facts in good]


def weigh(settings: Settings, item: PlacedTile, facts: TileSurvey) -> PlacedTile:
    """The tile with its weight, feather and weight map."""
    height, width = item.tile.shape
    feather = settings.feather_px
    if feather is None:
        feather = min(0.1 * min(height, width), 200.0)
    weight = 1.0
    if settings.enable_tile_weighting and settings.tile_weight_mode == "n_frames":
        weight = float(item.tile.n_frames)
    radial = None
    if settings.apply_radial_weight:
        radial = make_radial_weight_map(
            -(-height // WEIGHT_CELL),
            -(-width // WEIGHT_CELL),
            settings.radial_feather_fraction,
            settings.radial_shape_power,
            # weight 0 means "no data": a corner that no other tile covers must not become a hole
            max(settings.min_radial_weight_floor, 1e-3),
        )
    return with_weights(item, facts, weight, feather, radial)


def weigh_by_variance(
    placed: Sequence[PlacedTile], surveys: Sequence[TileSurvey], solution: PhotometricSolution
) -> list[PlacedTile]:
    """Inverse variance of the normalised noise, mean over the channels; the median tile has weight 1."""
    noise = np.stack([facts.noise for facts in surveys]) / solution.gain
    weight = np.mean(1.0 / np.maximum(noise, 1e-6 * np.median(noise) + 1e-30) ** 2, axis=1)
    weight /= np.median(weight)
    return [replace(item, weight=float(w)) for item, w in zip(placed, weight, strict=True)]


def solve(
    run: Run, grid: OutputGrid, placed: Sequence[PlacedTile], surveys: Sequence[TileSurvey], store: PixelStore
) -> PhotometricSolution:
    """Measure the tiles on the coarse grid (on the run's backend) and solve for gains and offsets (on the CPU)."""
    settings, reporter = run.settings, run.reporter
    if not (settings.intertile_photometric_match or settings.match_background_for_final):
        return identity_solution(len(placed), placed[0].tile.channels)
    cell = coarse_cell(settings, placed)
    counts = overlap_counts(placed, grid.shape, cell)
    reporter.stage("phase5_intertile", 0, len(placed))

    def step(backend: Backend) -> tuple[str, PhotometricSolution, bool]:
        mark = photometry_mark(run.kept, settings, grid, placed, cell, backend) if run.kept.enabled else ""
        found = run.kept.load("photometry", "solution", mark)
        if found is not None:
            reporter.info("", "resume: the photometric solution of the stopped run is used")
            reporter.stage("phase5_intertile", len(placed), len(placed))
            return mark, unpacked_solution(found), False
        done = iter(range(1, len(placed) + 1))

        def measure(k: int):
            coarse = measure_tile(placed[k], surveys[k], counts, cell, store, backend, 2 if run.hubs else 1)
            pairs.add(k, coarse)
            reporter.stage("phase5_intertile", next(done), len(placed))
            return coarse

        jobs = run.jobs if backend.parallel_blocks else 1
        hubs = best_tiles(surveys, run.hubs)
        with PairsInPassing(len(placed), hubs) as pairs:
            coarse = run_parallel(measure, range(len(placed)), jobs, run.cancelled)
            run.check()
            return mark, gains_and_offsets(run, coarse, pairs.relations()), True

    mark, solution, fresh = run.switch.run(step)
    run.check()
    if fresh:
        run.kept.save("photometry", "solution", mark, packed_solution(solution))
    reporter.info(
        "assemble_info_intertile_photometric_applied",
        f"photometric normalisation of {len(placed)} tiles over {len(solution.pairs)} overlaps",
        num_tiles=len(placed),
    )
    return solution


def best_tiles(surveys: Sequence[TileSurvey], count: int) -> list[int]:
    """Numbers of the ``count`` tiles with the least noise among those with the most data."""
    whole = max(facts.pixels for facts in surveys)
    order = sorted(range(len(surveys)), key=lambda k: (surveys[k].pixels < 0.9 * whole, surveys[k].noise.mean(), k))
    return order[:count]


def gains_and_offsets(run: Run, coarse: Sequence[CoarseTile], pairs: Sequence[PairRelation]) -> PhotometricSolution:
    """Step 2 of Phase 5, with the run's settings."""
    settings = run.settings
    options = PhotometryOptions(
        match_gain=settings.intertile_photometric_match,
        gain_se_limit=settings.gain_se_limit,
        reject_bad_tiles=settings.reject_bad_tiles,
    )
    return compute_photometric_gains_and_offsets(coarse, options, pairs)


def coarse_cell(settings: Settings, placed: Sequence[PlacedTile]) -> int:
    """Side of the coarse cells, doubled until the coarse tiles fit their share of the memory budget."""
    cell = settings.photometry_cell_px
    area = sum((item.rect[1] - item.rect[0]) * (item.rect[3] - item.rect[2]) for item in placed)
    bytes_per_cell = 4 * (placed[0].tile.channels + 1)
    while cell < 64 and area * bytes_per_cell / cell**2 > COARSE_SHARE * settings.memory_budget:
        cell *= 2
    return cell
