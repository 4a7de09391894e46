"""ZeMosaic's worker: FITS panels in, one photometrically exact mosaic out.

The entrances (command line, Python call) and the phases in order. What each phase does stands in the module that it
calls; docs/architecture.md draws the house.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from zemosaic_progress import JsonLines, Reporter, TerminalBar
from zemosaic_settings import Settings, load_config, parse_overrides
from zemosaic_utils import Cancelled, UsageError, ZeMosaicError, not_written, write_json

__all__ = ["MosaicResult", "main", "run_hierarchical_mosaic"]

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
    cancelled: Callable[[], bool] = lambda: False,
    **overrides: Any,
) -> MosaicResult:
    """Make the mosaic of the panels in a folder.

    Parameters
    ----------
    input_folder : Path or str
        Searched for FITS files recursively; nothing in it is ever changed.
    output_folder : Path or str
        Made where it does not exist.
    progress_callback : callable, optional
        ``callback(key_or_text, progress, level, **fields)``, see `zemosaic_progress.Reporter`.
    settings : Settings, optional
    cancelled : callable, optional
        Asked often; True ends the run with :class:`Cancelled`.
    **overrides
        Single settings by name.

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
    settings = replace(settings or Settings(), **overrides)
    output = prepare_output(Path(output_folder))
    callbacks = (progress_callback,) if progress_callback else ()
    with ExitStack() as stack:
        logger = stack.enter_context(log_file(output / "zemosaic_worker.log", settings.logging_level))
        reporter = Reporter(logger, *callbacks)
        scratch = stack.enter_context(scratch_folder(output, settings))
        return run_phases(Path(input_folder), output, scratch, settings, reporter, cancelled)


def run_phases(
    source: Path,
    output: Path,
    scratch: Path,
    settings: Settings,
    reporter: Reporter,
    cancelled: Callable[[], bool],
) -> MosaicResult:
    """The seven phases, in order."""
    from zemosaic_backend import BackendSwitch, open_cuda
    from zemosaic_mosaic import (
        Run,
        aesthetic_factors,
        aesthetic_solution,
        coadd_to_disk,
        colour_adjustment,
        lay_out,
        normalise,
        output_paths,
        product_header,
        save_preview,
        wants_aesthetic,
    )
    from zemosaic_report import describe, history_lines
    from zemosaic_telemetry import PhaseClock, ResourceMonitor

    started = time.monotonic()
    switch = BackendSwitch(
        settings.gpu,
        lambda: open_cuda(settings.gpu_id_phase5, settings.gpu_selector),
        lambda key, text: reporter.warn(key, text, reason=switch.reason),
    )
    run = Run(settings, output, reporter, switch, worker_count(settings), cancelled)
    csv = output / "resource_telemetry.csv"
    with ExitStack() as stack:
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
        clock = PhaseClock(monitor)
        stack.callback(switch.close)

        with clock.phase("phase1_scan"):
            tiles = scan(run, source, output, scratch)
        with clock.phase("phase4_grid"):
            grid, placed = lay_out(run, tiles)
        with clock.phase("phase5_intertile"):
            switch.start()
            backend = f"the GPU ({switch.reason})" if switch.name == "gpu" else "the CPU"
            reporter.info(f"phase5_using_{switch.name}", f"Phase 5 uses {backend}")
            scene = normalise(run, grid, placed)
        paths = output_paths(output, len(scene.placed), scene.frames)
        history = history_lines(run, scene)
        version = program_version()
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
            )
        picture, factors = science, None
        if wants_aesthetic(settings):
            with clock.phase("phase5_aesthetic"):
                factors = aesthetic_factors(run, scene, science)
                picture = coadd_to_disk(
                    run,
                    scene,
                    aesthetic_solution(scene.solution, factors),
                    paths["aesthetic"],
                    product_header(scene, "aesthetic", history, version),
                    None,
                    colour_adjustment(factors),
                )
        with clock.phase("phase6"):
            reporter.stage("phase6", 0, 2)
            reporter.info("run_info_phase6_started", "saving")
            save_preview(run, picture.preview, paths["preview"])
            reporter.stage("phase6", 1, 2)
            report = describe(run, scene, factors, paths, version)
            reporter.stage("phase6", 2, 2)
    report["phases"] = clock.report()
    report["seconds"] = round(time.monotonic() - started, 3)
    write_json(paths["report"], report)
    reporter.say("SUCCESS", "run_success_mosaic_saved", f"saved {paths['science']}", filename=paths["science"].name)
    return MosaicResult(
        paths["science"],
        paths["aesthetic"] if factors else None,
        paths["coverage"],
        paths["preview"],
        paths["report"],
        report,
    )


def scan(run: Any, source: Path, output: Path, scratch: Path) -> list:
    """Phase 1 for panels: open every tile; at least one must be usable."""
    from zemosaic_scan import scan_tiles

    tiles, aside = scan_tiles(
        source, scratch, output, lambda done, total: run.reporter.stage("phase1_scan", done, total)
    )
    for item in aside:
        run.set_aside(item.name, item.reason)
    run.check()
    if not tiles:
        hint = f": {aside[0].name} {aside[0].reason}" if aside else ": it holds no FITS file (.fit, .fits, .fts)"
        raise UsageError(f"there is no usable tile in {source}{hint}")
    run.reporter.info("run_info_existing_master_tiles_mode", f"{len(tiles)} plate-solved tiles", num_tiles=len(tiles))
    return tiles


# ---------------------------------------------------------------------------------------------------- surroundings


def prepare_output(folder: Path) -> Path:
    """The output folder, made and proved writable.

    Raises
    ------
    UsageError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the output folder {folder} cannot be written ({reason}): choose another one") from error
    return folder


@contextmanager
def log_file(path: Path, level: str):
    """A logger that writes this run's log file, and nothing after."""
    logger = logging.getLogger(f"zemosaic_worker.{id(path)}")
    logger.setLevel(level)
    logger.propagate = False
    try:
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise not_written(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    except ZeMosaicError as error:
        logger.error("%s", error)
        logger.debug("%s", traceback.format_exc())
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def scratch_folder(output: Path, settings: Settings):
    """A folder for temporary files, removed at the end whatever happened."""
    parent = Path(settings.coadd_memmap_dir) if settings.coadd_memmap_dir else output
    try:
        folder = Path(tempfile.mkdtemp(prefix=".zemosaic_tmp_", dir=parent))
    except OSError as error:
        raise UsageError(
            f"coadd_memmap_dir {parent} cannot be written ({error.strerror}): choose another folder"
        ) from error
    try:
        yield folder
    finally:
        if settings.cleanup_temp_artifacts:
            shutil.rmtree(folder, ignore_errors=True)


def worker_count(settings: Settings) -> int:
    """Threads for the work on pixels."""
    if settings.num_processing_workers > 0:
        return settings.num_processing_workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def program_version() -> str:
    """Version of the installed program; ``source`` where its files were only copied."""
    try:
        return metadata.version("zemosaic-worker")
    except metadata.PackageNotFoundError:
        return "source"


# ---------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line of DESIGN section 7."""
    parser = argparse.ArgumentParser(
        prog="zemosaic-worker",
        description="Make one photometrically exact mosaic of plate-solved FITS panels.",
        epilog="Exit status: 0 done; 1 the run failed; 2 the command or the input cannot be used; 130 interrupted.",
    )
    parser.add_argument(
        "input_dir", nargs="?", type=Path, metavar="INPUT_DIR", help="folder of panels, searched recursively"
    )
    parser.add_argument("output_dir", nargs="?", type=Path, metavar="OUTPUT_DIR", help="where the mosaic goes")
    parser.add_argument("--config", type=Path, metavar="FILE.json", help="settings, one JSON object")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--gpu", choices=("auto", "on", "off"), help="use a CUDA card (default: auto)")
    parser.add_argument("--tiles", action="store_true", help="the input holds plate-solved panels")
    parser.add_argument("--memory-budget", metavar="SIZE", help="working memory, such as 2GB (the default)")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads (default: all cores)")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="say nothing but errors")
    loudness.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--json-progress", action="store_true", help="progress as JSON lines on standard output")
    parser.add_argument(
        "--demo", type=Path, metavar="DIR", help="make a small synthetic set of panels in DIR and run on it"
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
        "use_existing_master_tiles": True if options.tiles else None,
    }
    mapping.update({key: value for key, value in named.items() if value is not None})
    return Settings.from_mapping(mapping)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    listener = JsonLines() if options.json_progress else TerminalBar()
    try:
        with terminate_as_interrupt():
            return command(parser, options, [] if options.quiet else [listener])
    except KeyboardInterrupt:
        return complain("interrupted: nothing half-written was left", EXIT_INTERRUPTED)
    except Cancelled as error:
        return complain(str(error), EXIT_INTERRUPTED)
    except ZeMosaicError as error:
        if options.verbose:
            traceback.print_exc()
        return complain(str(error), EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    finally:
        listener.close()


def command(parser: argparse.ArgumentParser, options: argparse.Namespace, listeners: list[Any]) -> int:
    """Run what the command line asks for and say where the results are."""
    settings, notes = settings_of(options)
    if options.demo:
        from zemosaic_demo import write_demo

        options.input_dir, options.output_dir = write_demo(options.demo)
    if options.input_dir is None or options.output_dir is None:
        parser.print_usage(sys.stderr)
        raise UsageError("INPUT_DIR and OUTPUT_DIR are needed (or --demo DIR)")
    warnings = list(notes)

    def collect(key: str, progress: Any, level: Any, **fields: Any) -> None:
        if level == "WARN":
            warnings.append(fields["text"])

    def tell(*args: Any, **fields: Any) -> None:
        for listener in (collect, *listeners):
            listener(*args, **fields)

    result = run_hierarchical_mosaic(options.input_dir, options.output_dir, progress_callback=tell, settings=settings)
    if not options.quiet and not options.json_progress:
        summarise(result, warnings)
    return EXIT_DONE


def summarise(result: MosaicResult, warnings: Sequence[str]) -> None:
    """The last lines on the terminal: warnings again, then where the results are."""
    if warnings:
        print(f"{len(warnings)} warning(s):")
        for text in warnings:
            print(f"  {text}")
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


def complain(sentence: str, status: int) -> int:
    """One sentence on standard error."""
    print(f"zemosaic-worker: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
