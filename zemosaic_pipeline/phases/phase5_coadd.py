"""Phase 5, step 3: the mosaic, block by block, onto the disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_photometry import PhotometricSolution
from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.phases.phase5_canvas import Canvas, ColourAdjustment, Coverage
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.phase6_save import save_preview
from zemosaic_pipeline.phases.run import BLOCK_SHARE, Run
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resume.pieces import block_journal
from zemosaic_pipeline.settings.settings import Settings


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
        kernel=ResamplingKernel(settings.kernel),
        combine=CombineMethod(settings.combine_method),
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

    def step(backend: Backend) -> CoaddResult:
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
            plan = CoaddPlan(scene.placed, solution, scene.grid, options, scene.store)
            if settings.engine == "reproject":
                from zemosaic_pipeline.reproject_compat.engine import coadd_with_reproject

                coadd_with_reproject(plan, sink, run.cancelled)
            else:
                coadd(plan, backend, sink, budget, run.jobs, run.cancelled, done)
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
