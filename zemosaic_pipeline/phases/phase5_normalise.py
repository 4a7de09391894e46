"""Phase 5, steps 1 and 2: weights, coarse measurement, photometric solution.

`matched` does it for any tiles, the frames of a panel included; `normalise` for those of the mosaic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zemosaic_photometry import (
    CoarseTile,
    PairRelation,
    PhotometricSolution,
    PhotometryOptions,
    compute_photometric_gains_and_offsets,
    identity_solution,
)
from zemosaic_pipeline.arrays import make_radial_weight_map
from zemosaic_pipeline.fits.find import SetAside
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.overlaps.pairs import PairsInPassing
from zemosaic_pipeline.phases.phase4_grid import SurveyedTile
from zemosaic_pipeline.phases.run import COARSE_SHARE, Run, Tools
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.resample.measure import measure_tile, overlap_counts
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, with_weights
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, TileSurvey
from zemosaic_pipeline.resume.pieces import SOLUTION, photometry_fingerprint
from zemosaic_pipeline.settings.settings import Settings

STAGE = "phase5_intertile"


@dataclass(frozen=True)
class Scene:
    """The tiles on the output grid, their photometric solution, and the store of their pixels.

    ``measured`` are the names that the solution's pairs refer to, those of the tiles ``left_out`` included.
    """

    grid: OutputGrid
    placed: list[PlacedTile]
    surveys: list[TileSurvey]
    pixels: PixelStore
    solution: PhotometricSolution
    measured: list[str]
    left_out: list[SetAside] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.placed[0].tile.channels

    @property
    def frames(self) -> int:
        """Number of raw frames in all tiles."""
        return sum(item.tile.n_frames for item in self.placed)


def normalise(run: Run, grid: OutputGrid, tiles: Sequence[SurveyedTile], pixels: PixelStore) -> Scene:
    """The mosaic's tiles matched in their overlaps; what the solution has to say is said."""
    run.choose_backend()
    area = sum((item.rect[1] - item.rect[0]) * (item.rect[3] - item.rect[2]) for item, _ in tiles)
    cell = coarse_cell(run.settings, area, tiles[0][0].tile.channels)
    scene = matched(run.tools, grid, tiles, pixels, cell)
    run.aside += scene.left_out
    for warning in scene.solution.warnings:
        run.reporter.warn("", warning.text, kind=warning.kind, subject=warning.subject)
    if wants_solution(run.settings):
        count = len(scene.measured)
        run.reporter.info(
            "assemble_info_intertile_photometric_applied",
            f"photometric normalisation of {count} tiles over {len(scene.solution.pairs)} overlaps",
            num_tiles=count,
        )
        run.reporter.logger.info("%s", gradients_in_words(scene.solution))
    return scene


def gradients_in_words(solution: PhotometricSolution) -> str:
    """What was found of gradients, and how well the mosaic's sky is known because of them."""
    if solution.has_gradients is None:
        return "no gradients were looked for"
    if not solution.has_gradients:
        return "no gradient between the tiles is larger than their noise explains"
    whole, plane, quadratic = solution.sky_error
    return (
        f"gradients taken out, as far as the overlaps tell them: the sky over the whole mosaic is known to {whole:.2g} "
        f"of a pixel's noise, to {plane:.2g} but for one plane, to {quadratic:.2g} but for one quadratic"
    )


def wants_solution(settings: Settings) -> bool:
    """Whether tiles are to be matched at all."""
    return settings.intertile_photometric_match or settings.match_background_for_final


def matched(
    tools: Tools, grid: OutputGrid, tiles: Sequence[SurveyedTile], pixels: PixelStore, cell: int
) -> Scene:  # fmt: skip
    """Weights, coarse measurement (in cells of ``cell`` pixels) and photometric solution of tiles; those that do not
    belong are left out."""
    settings = tools.settings
    surveys = [survey for _, survey in tiles]
    placed = [with_weight(settings, item, survey) for item, survey in tiles]
    if not wants_solution(settings):
        solution = identity_solution(len(placed), placed[0].tile.channels)
    else:
        solution = solve(tools, grid, list(zip(placed, surveys, strict=True)), pixels, cell)
    if settings.tile_weight_mode == "inverse_variance" and settings.enable_tile_weighting:
        placed = with_inverse_variance(placed, surveys, solution)
    keep = [k for k in range(len(placed)) if not solution.excluded[k]]
    names = [item.tile.name for item in placed]
    bad = [
        SetAside(names[k], "has values that do not belong to this sky (bad_tile)")
        for k in np.nonzero(solution.excluded)[0]
    ]
    return Scene(
        grid, [placed[k] for k in keep], [surveys[k] for k in keep], pixels, solution.subset(keep), names, bad
    )  # fmt: skip


def with_weight(settings: Settings, item: PlacedTile, survey: TileSurvey) -> PlacedTile:
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
    return with_weights(item, survey, weight, feather, radial)


def with_inverse_variance(
    placed: Sequence[PlacedTile], surveys: Sequence[TileSurvey], solution: PhotometricSolution
) -> list[PlacedTile]:
    """Inverse variance of the normalised noise, mean over the channels; the median tile has weight 1."""
    noise = np.stack([survey.noise for survey in surveys]) / solution.gain
    weight = np.mean(1.0 / np.maximum(noise, 1e-6 * np.median(noise) + 1e-30) ** 2, axis=1)
    weight /= np.median(weight)
    return [replace(item, weight=float(w)) for item, w in zip(placed, weight, strict=True)]


def solve(
    tools: Tools, grid: OutputGrid, tiles: Sequence[SurveyedTile], pixels: PixelStore, cell: int
) -> PhotometricSolution:
    """Measure the tiles on the coarse grid (on the run's backend) and solve for gains and offsets (on the CPU)."""
    count = len(tiles)
    placed, surveys = [item for item, _ in tiles], [survey for _, survey in tiles]
    overlaps = overlap_counts(placed, grid.shape, cell)
    tools.count(STAGE, 0, count)

    def measure(backend: Backend) -> PhotometricSolution:
        done = iter(range(1, count + 1))
        hubs = best_tiles(surveys, tools.hubs)

        def one(k: int) -> CoarseTile:
            coarse = measure_tile(placed[k], surveys[k], overlaps, cell, pixels, backend, 2 if tools.hubs else 1)
            pairs.add(k, coarse)
            tools.count(STAGE, next(done), count)
            return coarse

        with PairsInPassing(count, hubs, tools.settings.gradient_order) as pairs:
            jobs = tools.jobs if backend.parallel_blocks else 1
            coarse = run_parallel(one, range(count), jobs, tools.cancelled)
            return gains_and_offsets(tools.settings, coarse, pairs.relations())

    def step(backend: Backend) -> PhotometricSolution:
        fingerprint = photometry_fingerprint(tools.kept, grid, placed, cell, backend)
        title = "the photometric solution"
        return tools.kept.cached("photometry", "solution", fingerprint, lambda: measure(backend), SOLUTION, title=title)

    solution = tools.switch.run(step)
    tools.check()
    tools.count(STAGE, count, count)
    return solution


def best_tiles(surveys: Sequence[TileSurvey], count: int) -> list[int]:
    """Numbers of the ``count`` tiles with the least noise among those with the most data."""
    whole = max(survey.pixels for survey in surveys)
    order = sorted(range(len(surveys)), key=lambda k: (surveys[k].pixels < 0.9 * whole, surveys[k].noise.mean(), k))
    return order[:count]


def gains_and_offsets(
    settings: Settings, coarse: Sequence[CoarseTile], pairs: Sequence[PairRelation]
) -> PhotometricSolution:
    """Step 2 of Phase 5, with the run's settings."""
    options = PhotometryOptions(
        match_gain=settings.intertile_photometric_match,
        gain_se_limit=settings.gain_se_limit,
        reject_bad_tiles=settings.reject_bad_tiles,
        gradient_order=settings.gradient_order,
    )
    return compute_photometric_gains_and_offsets(coarse, options, pairs)


def coarse_cell(settings: Settings, area: int, channels: int) -> int:
    """Side of the coarse cells, doubled until those of tiles of ``area`` pixels together fit their share of the budget."""
    cell = settings.photometry_cell_px
    bytes_per_cell = 4 * (channels + 1)
    while cell < 64 and area * bytes_per_cell / cell**2 > COARSE_SHARE * settings.memory_budget:
        cell *= 2
    return cell
