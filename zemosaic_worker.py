"""ZeMosaic's worker: raw FITS frames or panels in, one photometrically exact mosaic out.

The entrances (command line, Python call) and the phases in order. What each phase does stands in the module that it
calls; docs/architecture.md draws the house.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zemosaic_pipeline.cli import main as cli
from zemosaic_pipeline.files import to_jsonable, write_json
from zemosaic_pipeline.fits.find import require_folder
from zemosaic_pipeline.gui.filter_window import (
    _auto_split_groups,
    _compute_max_angular_separation_deg,
    cluster_seestar_stacks_connected,
)
from zemosaic_pipeline.gui.process import serve
from zemosaic_pipeline.host.folders import (
    log_file,
    log_start,
    prepare_output,
    program_version,
    scratch_folder,
)
from zemosaic_pipeline.host.progress import Reporter
from zemosaic_pipeline.host.telemetry import telemetry_feed
from zemosaic_pipeline.host.threads import collect_seldom, worker_count
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.resume.checkpoints import Checkpoints, checkpoints
from zemosaic_pipeline.settings.settings import Settings

__all__ = [
    "MosaicResult",
    "_auto_split_groups",
    "_compute_max_angular_separation_deg",
    "cluster_seestar_stacks_connected",
    "main",
    "run_hierarchical_mosaic",
    "run_hierarchical_mosaic_process",
]


# ------------------------------------------------------------------------------------------------------ the phases


def run_hierarchical_mosaic(
    input_folder: Path | str,
    output_folder: Path | str,
    *,
    progress_callback: Callable[..., Any] | None = None,
    settings: Settings | None = None,
    notes: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
    plan: FramePlan | None = None,
    **overrides: Any,
) -> MosaicResult:
    """Make the mosaic of the raw frames, or of the panels, in a folder.

    Parameters
    ----------
    input_folder : Path or str
        Searched for FITS files recursively; nothing in it is ever changed.
    output_folder : Path or str
        Made where it does not exist.
    progress_callback : callable, optional
        ``callback(key_or_text, progress, level, **fields)``, see `host.progress.Reporter`.
    settings : Settings, optional
    notes : sequence of str, optional
        Warnings to begin with: what `Settings.from_mapping` had to say.
    cancelled : callable, optional
        Asked often; True ends the run with :class:`Cancelled`.
    plan : FramePlan, optional
        Which raw frames are used, and their panels (`phases.phase1_frames.FramePlan`); default: all, as the settings say.
    **overrides
        Single settings by name, loosely typed as on the command line.

    Returns
    -------
    MosaicResult

    Raises
    ------
    UsageError
        The input, the output folder or the settings cannot be used.
    RunError
        The run failed.
    Cancelled
        ``cancelled`` said so.
    """
    started = time.monotonic()
    settings = settings or Settings()
    if overrides:
        settings, more = Settings.from_mapping({**asdict(settings), **overrides}, "Python call")
        notes = [*notes, *more]
    source = require_folder(Path(input_folder))
    output = prepare_output(Path(output_folder))
    with log_file(output / "zemosaic_worker.log", settings.logging_level) as logger:
        reporter = Reporter(logger, *([progress_callback] if progress_callback else []))
        log_start(logger, source, output, settings)
        for note in notes:
            reporter.warn("", note)
        with (
            scratch_folder(output, settings) as scratch,
            checkpoints(output, settings, lambda level, text: reporter.say(level, "", text)) as kept,
        ):
            result = run_phases(source, output, scratch, settings, reporter, cancelled, kept, plan)
            reporter.stage("phase7", 0, 1)
        reporter.stage("phase7", 1, 1)
        duration = round(time.monotonic() - started, 1)
        reporter.say("SUCCESS", "run_success_processing_completed", f"done in {duration} s", duration=duration)
        return result


def run_hierarchical_mosaic_process(
    queue: Any, *args: Any, solver_settings_dict: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """Make the mosaic in a process of its own, as the graphical interface starts it; see `gui.process`.

    Parameters
    ----------
    queue : multiprocessing.Queue
        Takes the messages, each ``(key, progress, level, fields)``.
    *args
        None.
    solver_settings_dict : dict, optional
        Settings of the plate solvers.
    **kwargs
        The interface's whole configuration; ``input_dir`` and ``output_dir`` are needed, unknown keys passed over.

    Raises
    ------
    SystemExit
        The run did not make its mosaic: 1 it failed, 2 its input or settings cannot be used, 130 it was stopped.
        (In a child process the process ends, with that status or with 0.)
    """
    if status := serve(run_hierarchical_mosaic, queue, args, kwargs, solver_settings_dict):
        sys.exit(status)


def run_phases(
    source: Path,
    output: Path,
    scratch: Path,
    settings: Settings,
    reporter: Reporter,
    cancelled: Callable[[], bool],
    kept: Checkpoints,
    plan: FramePlan | None = None,
) -> MosaicResult:
    """The seven phases, in order."""
    from threadpoolctl import threadpool_limits

    from zemosaic_pipeline.fits.headers import quiet
    from zemosaic_pipeline.host.telemetry import PhaseClock, ResourceMonitor
    from zemosaic_pipeline.phases.phase1_tiles import scan
    from zemosaic_pipeline.phases.phase4_grid import lay_out, trimmed
    from zemosaic_pipeline.phases.phase5_aesthetic import aesthetic_factors, aesthetic_solution, colour_adjustment
    from zemosaic_pipeline.phases.phase5_coadd import coadd_to_disk, wants_aesthetic
    from zemosaic_pipeline.phases.phase5_normalise import normalise, surveying
    from zemosaic_pipeline.phases.phase6_report import describe, history_lines
    from zemosaic_pipeline.phases.phase6_save import output_paths, product_header, warn_of_rounding
    from zemosaic_pipeline.phases.run import STORE_SHARE, Run
    from zemosaic_pipeline.pixels.backend_cuda import open_cuda
    from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
    from zemosaic_pipeline.resample.pixel_store import PixelStore

    started = time.monotonic()
    switch = BackendSwitch(
        settings.gpu,
        lambda: open_cuda(settings.gpu_id_phase5, settings.gpu_selector),
        lambda key, text: reporter.warn(key, text, reason=switch.reason),
    )
    run = Run(settings, output, reporter, switch, worker_count(settings), cancelled, kept=kept)
    csv = output / "resource_telemetry.csv"
    with ExitStack() as stack:
        # our own threads use the cores; the linear algebra of small systems must not compete with them
        stack.enter_context(threadpool_limits(1))
        stack.enter_context(quiet())
        monitor = None
        if settings.enable_resource_telemetry:
            monitor = stack.enter_context(
                ResourceMonitor(
                    csv if settings.resource_telemetry_log_to_csv else None,
                    interval_sec=settings.resource_telemetry_interval_sec,
                    gpu_index=settings.gpu_id_phase5,
                    warn=lambda text: reporter.warn("", text),
                )
            )
            reporter.callbacks.append(telemetry_feed(monitor))
            monitor.update(cpu_workers=run.jobs, max_chunk_bytes=settings.memory_budget)
        clock = PhaseClock(monitor)
        stack.callback(switch.close)

        with clock.phase("phase1_scan"):
            tiles = scan(run, source, output, scratch) if plan is None else None
        made: list = []
        if tiles is None:
            tiles = made = tiles_of_frames(run, clock, source, scratch, plan)
        store = PixelStore(int(STORE_SHARE * settings.memory_budget))
        with clock.phase("phase4_grid"):
            tiles = trimmed(run, tiles)
            with surveying(run, tiles, store) as looks:
                grid, placed = lay_out(run, tiles)
        with clock.phase("phase5_intertile"):
            switch.start()
            if monitor:
                on_gpu = switch.name == "gpu"
                monitor.update(use_gpu=on_gpu, use_gpu_phase5=on_gpu, gpu_backend="cuda" if on_gpu else None)
            backend = f"the GPU ({switch.reason})" if switch.name == "gpu" else "the CPU"
            reporter.info(f"phase5_using_{switch.name}", f"Phase 5 uses {backend}")
            scene = normalise(run, grid, placed, looks, store)
        paths = output_paths(output, len(scene.placed), scene.frames, wants_aesthetic(settings))
        history = history_lines(run, scene)
        version = program_version()
        pretty = wants_aesthetic(settings)
        with clock.phase("phase5_reproject"):
            reporter.info("run_info_phase5_started_reproject_coadd", "resampling and coadding")
            headers = {name: product_header(scene, name, history, version) for name in ("science", "coverage")}
            science = coadd_to_disk(
                run,
                scene,
                scene.solution,
                paths["science"],
                headers["science"],
                (paths["coverage"], headers["coverage"]),
                None if pretty else paths["preview"],
            )
        picture, factors = science, None
        if pretty:
            with clock.phase("phase5_aesthetic"):
                factors = aesthetic_factors(run, scene, science)
                picture = coadd_to_disk(
                    run,
                    scene,
                    aesthetic_solution(scene.solution, factors),
                    paths["aesthetic"],
                    product_header(scene, "aesthetic", history, version),
                    None,
                    paths["preview"],
                    colour_adjustment(factors),
                )
        with clock.phase("phase6"):
            reporter.stage("phase6", 0, 2)
            reporter.info("run_info_phase6_started", "saving")
            warn_of_rounding(run, picture.preview)
            reporter.stage("phase6", 1, 2)
    report = to_jsonable(
        {
            **describe(run, scene, factors, paths, version),
            "input": source,
            "resume": kept.report(),
            "phases": clock.report(),
            "seconds": round(time.monotonic() - started, 3),
        }
    )
    write_json(paths["report"], report)
    reporter.stage("phase6", 2, 2)
    if made and not settings.keep_master_tiles:
        from zemosaic_pipeline.phases.phase3_master_tiles import remove_master_tiles

        remove_master_tiles(made)
    reporter.say("SUCCESS", "run_success_mosaic_saved", f"saved {paths['science']}", filename=paths["science"].name)
    return MosaicResult(
        paths["science"],
        paths.get("aesthetic"),
        paths["coverage"],
        paths["preview"],
        paths["report"],
        report,
    )


def tiles_of_frames(run: Any, clock: Any, source: Path, scratch: Path, plan: FramePlan | None) -> list:
    """Phases 1 to 3 for raw frames: solved frames, their panels, and the panels' master tiles."""
    from zemosaic_pipeline.phases.phase1_frames import FramePlan, solved_frames
    from zemosaic_pipeline.phases.phase2_cluster import panels_of
    from zemosaic_pipeline.phases.phase3_master_tiles import master_tiles
    from zemosaic_pipeline.phases.run import FRAME_SHARE
    from zemosaic_pipeline.resample.pixel_store import PixelStore

    plan = plan or FramePlan()
    # pixels that Phase 1 has read wait here for Phase 3, as far as the memory goes
    run.store = PixelStore(int(FRAME_SHARE * run.settings.memory_budget))
    with clock.phase("phase1_scan"):
        frames = solved_frames(run, source, scratch, plan)
    with clock.phase("phase2_cluster"):
        panels = panels_of(run, frames, plan)
    with clock.phase("phase3_master_tiles"):
        tiles = master_tiles(run, panels, scratch)
    run.store = None
    return tiles


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.main(run_hierarchical_mosaic, argv)


def command_line() -> None:
    """The program: :func:`main`, then the end of the process."""
    collect_seldom()
    status = main()
    # what is left is freed with the process: looking through a million objects first takes a third of a second
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    command_line()
