"""The command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zemosaic_pipeline.cli.listeners import JsonLines, TerminalBar
from zemosaic_pipeline.errors import Cancelled, UsageError, ZeMosaicError
from zemosaic_pipeline.files import not_written
from zemosaic_pipeline.host.folders import prepare_output, program_version, usable_input
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.settings.settings import Settings, load_config, parse_overrides

Engine = Callable[..., MosaicResult]

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


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
        if hasattr(stream, "reconfigure"):  # a file name may not exist in the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options = parser.parse_args(argv)
    listener = JsonLines() if options.json_progress else TerminalBar()
    try:
        status, sentence = attempt(engine, parser, options, listener)
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


def attempt(
    engine: Engine, parser: argparse.ArgumentParser, options: argparse.Namespace, listener: Any
) -> tuple[int, str]:
    """Run the command: the exit status, and what there is to say of a failure."""
    try:
        with terminate_as_interrupt():
            command(engine, parser, options, [] if options.quiet and not options.json_progress else [listener])
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


def command(engine: Engine, parser: argparse.ArgumentParser, options: argparse.Namespace, listeners: list[Any]) -> None:
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
        result = engine(options.input_dir, options.output_dir, progress_callback=tell, settings=settings, notes=notes)
    finally:
        if talkative:
            list_warnings(warnings)
    if talkative:
        summarise(result)


def say_plan(source: Path, output: Path, settings: Settings) -> None:
    """Print what a run would do."""
    from zemosaic_pipeline.cli.dry_run import plan_run

    for line in plan_run(usable_input(source, settings), output, settings).lines():
        print(line)


def demo_input(folder: Path, raw: bool) -> tuple[Path, Path]:
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
