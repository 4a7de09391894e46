"""ZeMosaic's worker: raw FITS frames or panels in, one photometrically exact mosaic out.

The entrances (command line, Python call) and the phases in order. What each phase does stands in the module that it
calls; docs/architecture.md draws the house.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zemosaic_cluster import (
    _auto_split_groups,
    _compute_max_angular_separation_deg,
    cluster_seestar_stacks_connected,
)
from zemosaic_process import serve
from zemosaic_progress import STAGES, JsonLines, Reporter, TerminalBar
from zemosaic_resume import Checkpoints, checkpoints
from zemosaic_settings import Settings, load_config, parse_overrides
from zemosaic_surroundings import (
    log_file,
    log_start,
    prepare_output,
    program_version,
    scratch_folder,
    usable_input,
    worker_count,
)
from zemosaic_utils import Cancelled, UsageError, ZeMosaicError, collect_seldom, not_written, to_jsonable, write_json

__all__ = [
    "MosaicResult",
    "_auto_split_groups",
    "_compute_max_angular_separation_deg",
    "cluster_seestar_stacks_connected",
    "main",
    "run_hierarchical_mosaic",
    "run_hierarchical_mosaic_process",
]

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class MosaicResult:
    """What a run made.

    Attributes
    ----------
    science, coverage, preview, report_path : Path
    aesthetic : Path or None
        Only where a step of the aesthetic mosaic is on.
    report : dict
        The content of run_report.json.
    """

    science: Path
    aesthetic: Path | None
    coverage: Path
    preview: Path
    report_path: Path
    report: dict[str, Any]


# ------------------------------------------------------------------------------------------------------ the phases


def run_hierarchical_mosaic(
    input_folder: Path | str,
    output_folder: Path | str,
    *,
    progress_callback: Callable[..., Any] | None = None,
    settings: Settings | None = None,
    notes: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
    plan: Any = None,
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
        ``callback(key_or_text, progress, level, **fields)``, see `zemosaic_progress.Reporter`.
    settings : Settings, optional
    notes : sequence of str, optional
        Warnings to begin with: what `Settings.from_mapping` had to say.
    cancelled : callable, optional
        Asked often; True ends the run with :class:`Cancelled`.
    plan : FramePlan, optional
        Which raw frames are used, and their panels (`zemosaic_frames.FramePlan`); default: all, as the settings say.
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
    source = usable_input(Path(input_folder), settings)
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
    """Make the mosaic in a process of its own, as the graphical interface starts it; see `zemosaic_process`.

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
    plan: Any = None,
) -> MosaicResult:
    """The seven phases, in order."""
    from threadpoolctl import threadpool_limits

    from zemosaic_aesthetic import aesthetic_factors, aesthetic_solution, colour_adjustment
    from zemosaic_backend import BackendSwitch, open_cuda
    from zemosaic_headers import quiet
    from zemosaic_mosaic import (
        STORE_SHARE,
        Run,
        coadd_to_disk,
        lay_out,
        normalise,
        output_paths,
        product_header,
        surveying,
        trimmed,
        wants_aesthetic,
        warn_of_rounding,
    )
    from zemosaic_report import describe, history_lines
    from zemosaic_telemetry import PhaseClock, ResourceMonitor
    from zemosaic_tiles import PixelStore

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
        from zemosaic_panels import remove_master_tiles

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


def telemetry_feed(monitor: Any) -> Callable[..., None]:
    """A listener that tells the monitor where the run stands."""
    counted = {"phase1_scan": "files", "phase5_intertile": "tiles"}

    def listen(key: str, progress: Any, level: Any, **fields: Any) -> None:
        if key == "STAGE_PROGRESS":
            monitor.update(phase_index=STAGES[progress][0], phase_name=progress)
            if kind := counted.get(progress):
                monitor.update(**{f"{kind}_done": level, f"{kind}_total": fields["total"]})

    return listen


def scan(run: Any, source: Path, output: Path, scratch: Path) -> list | None:
    """Phase 1 for panels: open every tile; at least one must be usable. None where the input holds raw frames."""
    from zemosaic_mosaic import nothing_usable
    from zemosaic_scan import RawFrame, scan_tiles

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


def tiles_of_frames(run: Any, clock: Any, source: Path, scratch: Path, plan: Any) -> list:
    """Phases 1 to 3 for raw frames: solved frames, their panels, and the panels' master tiles."""
    from zemosaic_frames import FramePlan, panels_of, solved_frames
    from zemosaic_mosaic import FRAME_SHARE
    from zemosaic_panels import master_tiles
    from zemosaic_tiles import PixelStore

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


# ---------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line of DESIGN section 7."""
    parser = argparse.ArgumentParser(
        prog="zemosaic-worker",
        description="Make one photometrically exact mosaic of raw FITS frames, or of plate-solved panels.",
        epilog="Exit status: 0 done; 1 the run failed; 2 the command or the input cannot be used; 130 interrupted.",
    )
    parser.add_argument(
        "input_dir", nargs="?", type=Path, metavar="INPUT_DIR", help="folder of frames or panels, searched recursively"
    )
    parser.add_argument("output_dir", nargs="?", type=Path, metavar="OUTPUT_DIR", help="where the mosaic goes")
    parser.add_argument("--config", type=Path, metavar="FILE.json", help="settings, one JSON object")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--gpu", choices=("auto", "on", "off"), help="use a CUDA card (default: auto)")
    parser.add_argument("--tiles", action="store_true", help="the input holds plate-solved panels")
    for kind in ("dark", "flat", "bias"):
        parser.add_argument(f"--{kind}", metavar="PATH", help=f"master {kind}, or a folder of {kind} frames")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do and need, and do nothing")
    parser.add_argument("--memory-budget", metavar="SIZE", help="working memory, such as 2GB (the default)")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads (default: all cores)")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="say nothing but errors")
    loudness.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--json-progress", action="store_true", help="progress as JSON lines on standard output")
    parser.add_argument(
        "--demo", type=Path, metavar="DIR", help="make a small synthetic set of panels in DIR and run on it"
    )
    parser.add_argument(
        "--demo-raw", type=Path, metavar="DIR", help="make a small synthetic night of raw frames in DIR and run on it"
    )
    parser.add_argument("--version", action="version", version=f"zemosaic-worker {program_version()}")
    return parser


def settings_of(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Settings from ``--config``, then ``--set``, then the options of their own."""
    mapping: dict[str, Any] = load_config(options.config) if options.config else {}
    mapping.update(parse_overrides(options.set))
    named = {
        "gpu": options.gpu,
        "memory_budget": options.memory_budget,
        "num_processing_workers": options.jobs,
        "dark": options.dark,
        "flat": options.flat,
        "bias": options.bias,
        "use_existing_master_tiles": True if options.tiles else None,
    }
    mapping.update({key: value for key, value in named.items() if value is not None})
    return Settings.from_mapping(mapping)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may not exist in the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options = parser.parse_args(argv)
    listener = JsonLines() if options.json_progress else TerminalBar()
    try:
        status, sentence = attempt(parser, options, listener)
        listener.close()
        if sentence and options.json_progress:
            listener(sentence, None, "ERROR", text=sentence)
    except BrokenPipeError:
        # nobody reads on (zemosaic-worker ... | head): Python must not flush into the pipe again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, sentence = EXIT_FAILED, "stopped: nobody reads the standard output any more"
    if sentence:
        print(f"zemosaic-worker: {sentence}", file=sys.stderr)
    return status


def attempt(parser: argparse.ArgumentParser, options: argparse.Namespace, listener: Any) -> tuple[int, str]:
    """Run the command: the exit status, and what there is to say of a failure."""
    try:
        with terminate_as_interrupt():
            command(parser, options, [] if options.quiet and not options.json_progress else [listener])
            return EXIT_DONE, ""
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED, "interrupted: nothing half-written was left"
    except ZeMosaicError as error:
        if options.verbose:
            traceback.print_exc()
        kinds = {UsageError: EXIT_USAGE, Cancelled: EXIT_INTERRUPTED}
        return kinds.get(type(error), EXIT_FAILED), str(error)
    except MemoryError:
        return EXIT_FAILED, "there is not enough memory: give a smaller --memory-budget, or fewer --jobs"
    except ModuleNotFoundError as error:
        if (error.name or "zemosaic").startswith("zemosaic"):
            raise
        return EXIT_FAILED, f"the Python package {error.name} is missing: install zemosaic-worker with pip (see README)"


def command(parser: argparse.ArgumentParser, options: argparse.Namespace, listeners: list[Any]) -> None:
    """Run what the command line asks for and say where the results are."""
    settings, notes = settings_of(options)
    demo = options.demo or options.demo_raw
    if demo and (options.input_dir or (options.demo and options.demo_raw)):
        raise UsageError("--demo DIR and --demo-raw DIR make their own input and output in DIR: give nothing else")
    if demo:
        options.input_dir, options.output_dir = demo_input(demo, raw=bool(options.demo_raw))
    if options.input_dir is None or options.output_dir is None:
        parser.print_usage(sys.stderr)
        raise UsageError("INPUT_DIR and OUTPUT_DIR are needed (or --demo DIR, or --demo-raw DIR)")
    if options.dry_run:
        say_plan(options.input_dir, options.output_dir, settings)
        return
    warnings = []

    def collect(key: str, progress: Any, level: Any, **fields: Any) -> None:
        if level == "WARN":
            warnings.append(fields["text"])

    def tell(*args: Any, **fields: Any) -> None:
        for listener in (collect, *listeners):
            listener(*args, **fields)

    talkative = not options.quiet and not options.json_progress
    try:
        result = run_hierarchical_mosaic(
            options.input_dir, options.output_dir, progress_callback=tell, settings=settings, notes=notes
        )
    finally:
        if talkative:
            list_warnings(warnings)
    if talkative:
        summarise(result)


def say_plan(source: Path, output: Path, settings: Settings) -> None:
    """Print what a run would do."""
    from zemosaic_plan import plan_run

    for line in plan_run(usable_input(source, settings), output, settings).lines():
        print(line)


def demo_input(folder: Path, raw: bool) -> tuple[Path, Path]:
    """Make the demonstration's panels or raw frames; returns its input and output folder."""
    prepare_output(folder)
    try:
        if raw:
            return demo_night(folder)
        from zemosaic_demo import write_demo

        return write_demo(folder)
    except OSError as error:
        raise not_written(folder, error) from error


def demo_night(folder: Path) -> tuple[Path, Path]:
    """A small synthetic night; its frames carry a WCS only where there is no plate solver."""
    from dataclasses import replace

    from zemosaic_night import DEMO, write_night
    from zemosaic_solve import choose_solver

    solver = choose_solver(Settings(), lambda text: print(text, file=sys.stderr))
    if solver is None:
        print("The demonstration's frames get their WCS written into their headers.", file=sys.stderr)
    lights, _ = write_night(folder, replace(DEMO, with_wcs=solver is None))
    return lights, folder / "output"


def list_warnings(warnings: Sequence[str]) -> None:
    """All warnings of a run at its end, however it ended."""
    if warnings:
        print(f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}:")
        for text in warnings:
            print(f"  {text}")


def summarise(result: MosaicResult) -> None:
    """The last lines on the terminal: where the results are."""
    for name in ("science", "aesthetic", "coverage", "preview"):
        if path := getattr(result, name):
            print(f"{name:10} {path}")
    print(f"{'report':10} {result.report_path}")


@contextmanager
def terminate_as_interrupt():
    """SIGTERM ends a run as Ctrl-C does, with everything cleaned up."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line() -> None:
    """The program: :func:`main`, then the end of the process."""
    collect_seldom()
    status = main()
    # what is left is freed with the process: looking through a million objects first takes a third of a second
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    command_line()
