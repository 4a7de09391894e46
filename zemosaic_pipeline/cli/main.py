"""The command line."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from zemosaic_pipeline.cli.listeners import JsonLines, TerminalBar, WarningTexts, to_all
from zemosaic_pipeline.errors import DONE, ExitStatus, Outcome, UsageError, outcome_of
from zemosaic_pipeline.files import not_written
from zemosaic_pipeline.fits.find import require_folder
from zemosaic_pipeline.host.folders import prepare_output, program_version
from zemosaic_pipeline.host.progress import Listener
from zemosaic_pipeline.phases.result import Engine, MosaicResult
from zemosaic_pipeline.settings.settings import Settings, load_config, parse_overrides


def build_parser() -> argparse.ArgumentParser:
    """Options and arguments; README.md and ``--help`` say the same."""
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


def main(engine: Engine, argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. ``engine`` is `zemosaic_worker.run_hierarchical_mosaic`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may not exist in the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options = parser.parse_args(argv)
    listener = JsonLines() if options.json_progress else TerminalBar()
    try:
        outcome = attempt(engine, parser, options, listener)
        listener.close()
        if outcome.sentence and options.json_progress:
            listener(outcome.sentence, None, "ERROR", text=outcome.sentence)
    except BrokenPipeError:
        # nobody reads on (zemosaic-worker ... | head): Python must not flush into the pipe again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome = Outcome(ExitStatus.FAILED, "stopped: nobody reads the standard output any more")
    if outcome.sentence:
        print(f"zemosaic-worker: {outcome.sentence}", file=sys.stderr)
    return outcome.status


def attempt(
    engine: Engine, parser: argparse.ArgumentParser, options: argparse.Namespace, listener: Listener
) -> Outcome:
    """Run the command; an error in the program is raised."""
    try:
        with terminate_as_interrupt():
            command(engine, parser, options, listener)
        return DONE
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome is None:
            raise
        if options.verbose and outcome.status != ExitStatus.INTERRUPTED:
            traceback.print_exc()
        return outcome


def command(engine: Engine, parser: argparse.ArgumentParser, options: argparse.Namespace, listener: Listener) -> None:
    """Do what the command line asks for."""
    settings, notes = settings_of(options)
    source, output = folders_of(parser, options)
    if options.dry_run:
        say_plan(source, output, settings)
        return
    warnings = WarningTexts()
    listeners = [listener] if options.json_progress or not options.quiet else []
    talkative = not options.quiet and not options.json_progress
    try:
        tell = to_all(warnings, *listeners)
        result = engine(source, output, progress_callback=tell, settings=settings, notes=notes)
    finally:
        if talkative:
            list_warnings(warnings.texts)
    if talkative:
        summarise(result)


def folders_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Path, Path]:
    """The input and the output folder; those of a demonstration are made.

    Raises
    ------
    UsageError
        They are missing, or given beside a demonstration, which has its own.
    """
    demo: Path | None = options.demo or options.demo_raw
    if demo and (options.input_dir or (options.demo and options.demo_raw)):
        raise UsageError("--demo DIR and --demo-raw DIR make their own input and output in DIR: give nothing else")
    if demo:
        return make_demo(demo, raw=demo == options.demo_raw)
    if options.input_dir is None or options.output_dir is None:
        parser.print_usage(sys.stderr)
        raise UsageError("INPUT_DIR and OUTPUT_DIR are needed (or --demo DIR, or --demo-raw DIR)")
    return options.input_dir, options.output_dir


def say_plan(source: Path, output: Path, settings: Settings) -> None:
    """Print what a run would do."""
    from zemosaic_pipeline.cli.dry_run import plan_run

    for line in plan_run(require_folder(source), output, settings).lines():
        print(line)


def make_demo(folder: Path, raw: bool) -> tuple[Path, Path]:
    """Make the demonstration's panels or raw frames; returns its input and output folder."""
    prepare_output(folder)
    try:
        if raw:
            return demo_night(folder)
        from zemosaic_pipeline.synthetic.panels import write_demo

        return write_demo(folder)
    except OSError as error:
        raise not_written(folder, error) from error


def demo_night(folder: Path) -> tuple[Path, Path]:
    """A small synthetic night; its frames carry a WCS only where there is no plate solver."""
    from dataclasses import replace

    from zemosaic_pipeline.platesolve.choose import choose_solver
    from zemosaic_pipeline.synthetic.night import DEMO, write_night

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
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, with everything cleaned up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
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
