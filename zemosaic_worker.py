"""ZeMosaic's worker: raw FITS frames or panels in, one photometrically exact mosaic out.

The entrances (command line, Python call) and the phases in order. What each phase does stands in the module that it
calls; docs/architecture.md draws the house.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zemosaic_pipeline.cli import main as cli
from zemosaic_pipeline.fits.find import require_folder
from zemosaic_pipeline.gui.filter_window import (
    _auto_split_groups,
    _compute_max_angular_separation_deg,
    cluster_seestar_stacks_connected,
)
from zemosaic_pipeline.gui.process import serve
from zemosaic_pipeline.host.folders import prepare_output
from zemosaic_pipeline.host.threads import collect_seldom
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.settings.settings import Settings

if TYPE_CHECKING:
    from zemosaic_pipeline.fits.tile import Tile
    from zemosaic_pipeline.phases.run import Run

__all__ = [
    "MosaicResult",
    "_auto_split_groups",
    "_compute_max_angular_separation_deg",
    "cluster_seestar_stacks_connected",
    "main",
    "run_hierarchical_mosaic",
    "run_hierarchical_mosaic_process",
]


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
        Which raw frames are used, and their panels (`phases.frame_plan.FramePlan`); default: all, as the settings say.
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
    # here and below, what is heavy is imported when it is needed: the window imports this module at its own start
    from zemosaic_pipeline.phases.run import open_run

    settings = settings or Settings()
    if overrides:
        settings, more = Settings.from_mapping({**asdict(settings), **overrides}, "Python call")
        notes = [*notes, *more]
    source = require_folder(Path(input_folder))
    output = prepare_output(Path(output_folder))
    listeners = [progress_callback] if progress_callback else []
    with open_run(
        source, output, settings, plan=plan, listeners=listeners, notes=notes, cancelled=cancelled
    ) as run:  # fmt: skip
        return make_mosaic(run)


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


def make_mosaic(run: Run) -> MosaicResult:
    """The seven phases, in order; each takes what the one before has made."""
    from zemosaic_pipeline.phases.phase1_tiles import open_panels
    from zemosaic_pipeline.phases.phase4_grid import lay_out
    from zemosaic_pipeline.phases.phase5_aesthetic import coadd_aesthetic
    from zemosaic_pipeline.phases.phase5_coadd import coadd_science
    from zemosaic_pipeline.phases.phase5_normalise import normalise
    from zemosaic_pipeline.phases.phase6_report import write_report
    from zemosaic_pipeline.phases.phase6_save import finish_outputs, outputs_of

    with run.phase("phase1_scan"):
        panels = open_panels(run)
    tiles = tiles_of_frames(run) if panels is None else panels
    pixels = run.tile_store()
    with run.phase("phase4_grid"):
        grid, surveyed = lay_out(run, tiles, pixels)
    with run.phase("phase5_intertile"):
        scene = normalise(run, grid, surveyed, pixels)
    outputs = outputs_of(run, scene)
    with run.phase("phase5_reproject"):
        science = coadd_science(run, scene, outputs)
    shown, factors = coadd_aesthetic(run, scene, science, outputs)
    with run.phase("phase6"):
        finish_outputs(run, shown.preview)
    if panels is None:
        from zemosaic_pipeline.phases.phase3_master_tiles import remove_master_tiles

        remove_master_tiles(run, tiles)
    return write_report(run, scene, factors, outputs)


def tiles_of_frames(run: Run) -> list[Tile]:
    """Phases 1 to 3 for raw frames: frames solved, frames grouped, groups stacked."""
    from zemosaic_pipeline.phases.phase1_frames import solved_frames
    from zemosaic_pipeline.phases.phase2_cluster import panels_of
    from zemosaic_pipeline.phases.phase3_master_tiles import master_tiles

    pixels = run.frame_store()
    with run.phase("phase1_scan"):
        frames = solved_frames(run, pixels)
    with run.phase("phase2_cluster"):
        panels = panels_of(run, frames)
    with run.phase("phase3_master_tiles"):
        return master_tiles(run, panels, pixels)


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
