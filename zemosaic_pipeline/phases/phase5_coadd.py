"""Phase 5, step 3: the mosaic, block by block, onto the disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.phases.phase5_canvas import Canvas, Coverage, Product, open_canvas
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.phase6_save import Outputs, product_header, save_preview, wants_aesthetic
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.coadd import CoaddPlan, Sink, coadd
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resume.journal import BlockJournal, block_journal
from zemosaic_pipeline.resume.pieces import backend_name, exact_grid

STAGE = "phase5_reproject"


@dataclass(frozen=True)
class Mosaic:
    """What stays in memory of a mosaic that was written: its preview image, float32 (C, h, w), of squares of ``bin``
    pixels, and, where the second pass needs it, its coarse coverage."""

    preview: np.ndarray
    bin: int
    coverage: Coverage | None


def coadd_science(run: Run, scene: Scene, outputs: Outputs) -> Mosaic:
    """The science mosaic and its coverage; the picture too, where there will be no aesthetic mosaic to show."""
    run.reporter.info("run_info_phase5_started_reproject_coadd", "resampling and coadding")
    product = Product(
        "science",
        scene.solution,
        outputs.science,
        product_header(run, scene, "science"),
        (outputs.coverage, product_header(run, scene, "coverage")),
        None if wants_aesthetic(run.settings) else outputs.preview,
    )
    return coadd_to_disk(run, scene, product)


def coadd_to_disk(run: Run, scene: Scene, product: Product) -> Mosaic:
    """Step 3 of Phase 5 and the writing of Phase 6, block by block, as one step on one backend."""
    height, width = scene.grid.shape
    # both passes of a run are one stage: its count goes on
    rows_before = 0 if product.name == "science" else height
    rows_total = height * (2 if wants_aesthetic(run.settings) else 1)

    def count(rows: int) -> None:
        run.reporter.stage(STAGE, rows_before + rows, rows_total)

    def step(backend: Backend) -> Mosaic:
        journal = finished_blocks(run, scene, product, backend)
        with ExitStack() as stack:
            canvas = open_canvas(stack, product, scene, run.settings, journal)
            count(0)
            done = canvas.restore(run.tools.jobs, run.tools.cancelled, lambda: count(canvas.rows_done(width)))
            if done:
                share = f"{100 * canvas.rows_done(width) / height:.0f} %"
                run.reporter.info("", f"resume: {share} of the {product.name} mosaic is there from the stopped run")

            def sink(block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
                canvas.put(block, values, weights)
                count(canvas.rows_done(width))

            coadd_blocks(run, scene, product, backend, sink, done)
            run.tools.check()
            count(height)
            picture = finish(run, product, canvas, stack)
        return Mosaic(picture, canvas.preview.factor, canvas.coarse_coverage())

    return run.tools.switch.run(step)


def finish(run: Run, product: Product, canvas: Canvas, stack: ExitStack) -> np.ndarray:
    """Complete the files, and make the picture while the disk takes them in."""
    picture = canvas.preview.image()
    with ThreadPoolExecutor(1, thread_name_prefix="preview") as pool:
        saved = pool.submit(save_preview, run.settings, picture, product.preview) if product.preview else None
        stack.close()
    if saved:
        saved.result()
    return picture


def finished_blocks(run: Run, scene: Scene, product: Product, backend: Backend) -> BlockJournal | None:
    """The journal of the blocks that are finished; None where they cannot be used again."""
    settings, kept = run.settings, run.kept
    if settings.save_final_as_uint16 or settings.engine != "native":
        return None
    tiles = [(kept.token(item.tile.path), item.tile.shape, item.weight, item.feather) for item in scene.placed]
    found = product.solution
    photometry = [found.gain, found.pivot, found.level, found.gradient]
    fingerprint = kept.fingerprint(
        product.name,
        backend_name(backend),
        *exact_grid(scene.grid),
        product.header.tostring(),
        tiles,
        photometry,
        product.adjust and product.adjust.numbers,
    )
    return block_journal(kept, product.name, fingerprint)


def coadd_blocks(
    run: Run, scene: Scene, product: Product, backend: Backend, sink: Sink, done: Sequence[Rect]
) -> None:  # fmt: skip
    """The blocks of the mosaic, but for those that are ``done``, by the engine that the settings name."""
    settings, tools = run.settings, run.tools
    options = CoaddOptions(
        kernel=ResamplingKernel(settings.kernel),
        combine=CombineMethod(settings.combine_method),
        kappa_low=settings.kappa_low,
        kappa_high=settings.kappa_high,
        winsor_limits=settings.winsor_limits,
    )
    plan = CoaddPlan(scene.placed, product.solution, scene.grid, options, scene.pixels)
    if settings.engine == "reproject":
        from zemosaic_pipeline.reproject_compat.engine import coadd_with_reproject  # which imports reproject

        coadd_with_reproject(plan, sink, tools.cancelled)
        return
    budget = tools.block_bytes(backend.free_bytes(settings.parallel_gpu_vram_fraction))
    coadd(plan, backend, sink, budget, tools.jobs, tools.cancelled, done)
