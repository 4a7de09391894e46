"""Phases 4 to 6: from tiles to the mosaic on disk, on whichever backend the run has.

`zemosaic_worker` calls the functions of this module in order; each takes what the one before made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from zemosaic_backend import BackendSwitch, load_kernels
from zemosaic_canvas import Canvas, ColourAdjustment, Coverage
from zemosaic_fits import Tile, cropped
from zemosaic_grid import OutputGrid, choose_output_grid, grid_header
from zemosaic_leftovers import (
    block_journal,
    packed_solution,
    photometry_mark,
    survey,
    unpacked_solution,
)
from zemosaic_measure import measure_tile, overlap_counts
from zemosaic_pairs import PairsInPassing
from zemosaic_photometry import (
    CoarseTile,
    PairRelation,
    PhotometricSolution,
    PhotometryOptions,
    compute_photometric_gains_and_offsets,
    identity_solution,
)
from zemosaic_preview import save_png, stretch
from zemosaic_progress import Reporter
from zemosaic_reproject import CoaddOptions, Rect, coadd, run_parallel
from zemosaic_resume import Checkpoints
from zemosaic_scan import SetAside
from zemosaic_settings import Settings
from zemosaic_tiles import WEIGHT_CELL, PixelStore, PlacedTile, TileSurvey, place_tiles, weighted
from zemosaic_utils import Cancelled, UnusableFile, UsageError, make_radial_weight_map

#: Shares of the memory budget for tiles kept in memory and for the blocks under way.
STORE_SHARE, BLOCK_SHARE, COARSE_SHARE = 0.35, 0.35, 0.15
#: Share of the memory budget for frames kept in memory: the blocks of a panel are small.
FRAME_SHARE = 0.65


@dataclass
class Run:
    """What all phases of one run share.

    ``frames`` are the rows of the report on raw frames, by name; ``hubs`` is the
    number of tiles with which all others are compared (0: every overlapping pair is).
    """

    settings: Settings
    output_dir: Path
    reporter: Reporter
    switch: BackendSwitch
    jobs: int
    cancelled: Callable[[], bool] = lambda: False
    aside: list[SetAside] = field(default_factory=list)
    kept: Checkpoints = field(default_factory=Checkpoints)
    frames: dict[str, dict[str, Any]] = field(default_factory=dict)
    hubs: int = 0
    store: PixelStore | None = None

    def check(self) -> None:
        """Raise :class:`Cancelled` where the user has stopped the run."""
        if self.cancelled():
            raise Cancelled("the run was stopped by the user")

    def set_aside(self, name: str, reason: str) -> None:
        """One input less, with its named warning; ``reason`` follows the name ("is empty")."""
        self.aside.append(SetAside(name, reason))
        subject = "" if reason.startswith("its ") else "it "
        self.reporter.warn("", f"{name} is set aside: {subject}{reason}")


def nothing_usable(aside: Sequence[SetAside], where: str = "", what: str = "tile") -> str:
    """The sentence that refuses an input without a usable tile (or frame)."""
    more = f", and {len(aside) - 1} more (see the warnings)" if len(aside) > 1 else ""
    return f"There is no usable {what}{where}: {aside[0].name} {aside[0].reason}{more}."


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


# --------------------------------------------------------------------------------------------------------- Phase 4


def trimmed(run: Run, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles without their borders, where ``apply_master_tile_crop`` is on."""
    if not run.settings.apply_master_tile_crop:
        return list(tiles)
    return [cropped(tile, run.settings.master_tile_crop_percent) for tile in tiles]


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
    return weighted(item, facts, weight, feather, radial)


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

    def step(backend: Any) -> tuple[str, PhotometricSolution, bool]:
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


@dataclass(frozen=True)
class CoaddResult:
    """What stays in memory of a mosaic that was written: its preview image (C, h, w) and, where the second pass needs
    it, its coarse coverage."""

    preview: np.ndarray
    coverage: Coverage | None


def coadd_to_disk(
    run: Run,
    scene: Scene,
    solution: PhotometricSolution,
    image: Path,
    header: fits.Header,
    coverage: tuple[Path, fits.Header] | None,
    preview: Path | None,
    adjust: ColourAdjustment | None = None,
) -> CoaddResult:
    """Step 3 of Phase 5 and the writing of Phase 6, block by block, as one step on one backend.

    Parameters
    ----------
    image, header
        The mosaic's file and its header.
    coverage : (path, header), optional
        Where the sum of weights goes.
    preview : Path, optional
        Where the picture goes; it is made while the disk takes in the rest.
    adjust : ColourAdjustment, optional
        Applied to every finished block (colour balance of the aesthetic mosaic).
    """
    settings = run.settings
    options = CoaddOptions(
        kernel=settings.kernel,
        combine=settings.combine_method,
        kappa_low=settings.kappa_low,
        kappa_high=settings.kappa_high,
        winsor_limits=settings.winsor_limits,
    )
    shape, channels = scene.grid.shape, scene.channels
    product = "aesthetic" if coverage is None else "science"
    full_weight = min(item.weight for item in scene.placed)
    renorm = settings.two_pass_coverage_renorm and coverage is not None
    bin_px = max(1, int(settings.two_pass_cov_sigma_px / 8)) if renorm else 0
    # both passes of a run are one stage: its count goes on
    rows_before = 0 if coverage is not None else shape[0]
    rows_total = shape[0] * (2 if wants_aesthetic(settings) else 1)

    def step(backend: Any) -> CoaddResult:
        journal = block_journal(
            run.kept, settings, product, scene.grid, scene.placed, solution, header, adjust and adjust.numbers, backend
        )
        canvas = Canvas(shape, channels, settings.preview_png_max_dim, bin_px, full_weight, adjust, journal)
        limit = backend.free_bytes(settings.parallel_gpu_vram_fraction)
        budget = int(BLOCK_SHARE * settings.memory_budget)
        budget = budget if limit is None else min(limit, 4 * budget)

        def count() -> None:
            run.reporter.stage("phase5_reproject", rows_before + canvas.rows_done, rows_total)

        def sink(block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
            canvas.put(block, values, weights)
            count()

        with ExitStack() as stack:
            canvas.open(stack, image, header, coverage, settings)
            count()
            done = canvas.restore(run.jobs, run.cancelled, count)
            if done:
                share = f"{100 * canvas.rows_done / shape[0]:.0f} %"
                run.reporter.info("", f"resume: {share} of the {product} mosaic is there from the stopped run")
            if settings.engine == "reproject":
                from zemosaic_peer import coadd_with_reproject

                coadd_with_reproject(scene.placed, solution, scene.grid, options, scene.store, sink, run.cancelled)
            else:
                coadd(
                    scene.placed,
                    solution,
                    shape,
                    options,
                    scene.store,
                    backend,
                    sink,
                    budget,
                    run.jobs,
                    run.cancelled,
                    done,
                )
            run.check()
            run.reporter.stage("phase5_reproject", rows_before + shape[0], rows_total)
            picture = canvas.preview.image()
            with ThreadPoolExecutor(1, thread_name_prefix="preview") as pool:
                saved = pool.submit(save_preview, settings, picture, preview) if preview else None
                stack.close()
            if saved:
                saved.result()
        return CoaddResult(picture, canvas.coarse_coverage())

    return run.switch.run(step)


def wants_aesthetic(settings: Settings) -> bool:
    """Whether any step that changes flux for the eye's sake is on."""
    return (
        settings.two_pass_coverage_renorm
        or settings.final_mosaic_rgb_equalize_enabled
        or settings.final_mosaic_black_point_equalize_enabled
    )


# --------------------------------------------------------------------------------------------------------- Phase 6


def output_paths(folder: Path, tiles: int, frames: int, aesthetic: bool) -> dict[str, Path]:
    """Final names of all outputs of a run."""
    stem = f"zemosaic_MT{tiles}_R{frames}"
    images = ("science", "aesthetic", "coverage") if aesthetic else ("science", "coverage")
    return {
        **{name: folder / f"{stem}_{name}.fits" for name in images},
        "preview": folder / f"{stem}_preview.png",
        "report": folder / "run_report.json",
    }


def product_header(scene: Scene, product: str, history: Sequence[str], version: str) -> fits.Header:
    """Header of an output: WCS, how many tiles and frames, and HISTORY."""
    header = grid_header(scene.grid)
    header["ZMPROD"] = (product, "product of the mosaic worker")
    header["CREATOR"] = (f"zemosaic-worker {version}", "program that made this file")
    header["NTILES"] = (len(scene.placed), "number of tiles")
    header["NCOMBINE"] = (scene.frames, "number of raw frames in the tiles")
    for line in history:
        header["HISTORY"] = line
    return header


def warn_of_rounding(run: Run, image: np.ndarray) -> None:
    """Say so where whole numbers from 0 to 65535 cannot hold the mosaic."""
    if not run.settings.save_final_as_uint16 or not np.isfinite(image).any():
        return
    low, middle, high = np.nanpercentile(image, (0.1, 50, 99.9))
    if low < 0 or high > 65535 or high - middle < 64:
        run.reporter.warn(
            "",
            f"save_final_as_uint16: whole numbers from 0 to 65535 hold this mosaic badly, most of whose values lie "
            f"between {low:.4g} and {high:.4g}; leave it off to keep them all",
        )


def save_preview(settings: Settings, image: np.ndarray, path: Path) -> None:
    """Auto-stretched PNG of the mosaic."""
    picture = stretch(image, settings.preview_png_p_low, settings.preview_png_p_high, settings.preview_png_asinh_a)
    save_png(picture, path)
