"""Phase 1 for raw frames: from a folder to frames that know their stars, and where on the sky they lie.

Facts are kept of a frame (stars, WCS, noise); its pixels wait in memory for Phase 3 as far as the budget goes, and are
read, calibrated and debayered again where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_pipeline.errors import UnusableFile, UsageError
from zemosaic_pipeline.fits.admission import MASTER_TILES
from zemosaic_pipeline.fits.find import SetAside, find_fits_files
from zemosaic_pipeline.fits.headers import PRODUCT_KEYWORD
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.phases.phase1_solve import Solving
from zemosaic_pipeline.phases.run import Run, nothing_usable
from zemosaic_pipeline.raw.calibration import Calibration, load_calibration
from zemosaic_pipeline.raw.frame import Frame, open_frame
from zemosaic_pipeline.raw.solved import MeasuredFrame, SolvedFrame
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.survey import TileSurvey, survey_pixels
from zemosaic_pipeline.resume.frame_pieces import FRAME
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.stars.detection import Stars, find_stars

#: Stars kept of each frame: enough to solve, to align and to judge it.
STARS_KEPT = 400


def solved_frames(run: Run, pixels: PixelStore) -> list[SolvedFrame]:
    """Every usable frame with its stars and its WCS, in the order of their names.

    ``pixels`` keeps what is read here for Phase 3, as far as the memory goes.

    Raises
    ------
    UsageError
        There is no frame, none can be used, or the calibration frames do not fit.
    """
    reporter = run.reporter
    files, aside = find_frames(run.source, run.output, run.scratch, run.settings, run.plan)
    for item in aside:
        run.set_aside(item.name, item.reason)
    if not files and not run.aside:
        raise UsageError(f"There is no FITS file (.fit, .fits, .fts; also .fz and .gz) in {run.source}.")
    reporter.stage("phase1_scan", 0, max(len(files), 1))
    reporter.info("run_info_phase1_started_cache", f"{len(files)} files: reading, finding stars, solving")
    calibration = load_calibration(run.settings, run.scratch, lambda text: reporter.warn("", text))
    run.kept.identify([*files.values(), *calibration_files(run.settings)], run.tools.jobs)
    measured = measure_frames(run, files, calibration, pixels)
    frames = Solving(run, measured).all()
    run.tools.check()
    if not frames:
        raise UsageError(nothing_usable(run.aside, f" in {run.source}", "frame"))
    reporter.stage("phase1_scan", len(files), len(files))
    reporter.info(
        "run_info_phase1_finished", f"{len(frames)} of {len(files)} frames solved", num_valid_raws=len(frames)
    )
    return frames


def find_frames(
    source: Path, output: Path, scratch: Path, settings: Settings, plan: FramePlan | None
) -> tuple[dict[str, Path], list[SetAside]]:
    """Files that may be frames, by their name in the input folder (no outputs, no calibration frames); and what cannot
    be read or found."""
    aside: list[SetAside] = []
    masters = [Path(text).absolute() for text in (settings.dark, settings.flat, settings.bias) if text]
    output = output.absolute()
    inside = output == source.absolute() or output in source.absolute().parents
    others = [scratch.absolute(), *masters, output / MASTER_TILES if inside else output]
    found = {}
    for path in find_fits_files(source, aside):
        place = path.absolute()
        if not any(place == other or other in place.parents for other in others):
            found[path.relative_to(source).as_posix()] = path
    chosen = None if plan is None else plan.chosen()
    if chosen is not None:
        present = {path.absolute() for path in found.values()}
        reason = "was chosen in the filter window but is not in the input folder"
        aside += [SetAside(path.name, reason) for path in sorted(chosen - present)]
        found = {name: path for name, path in found.items() if path.absolute() in chosen}
    return found, aside


def calibration_files(settings: Settings) -> list[Path]:
    """The files that the settings name as masters, or that lie in the folders that they name."""
    files = []
    for text in (settings.dark, settings.flat, settings.bias):
        path = Path(text)
        if text:
            files += find_fits_files(path) if path.is_dir() else [path]
    return files


def open_raw(path: Path, name: str, calibration: Calibration, scratch: Path) -> Frame:
    """Open a file that is to be a frame.

    Raises
    ------
    UnusableFile
        It is none, or the calibration frames do not fit it: one of another camera does not end the run.
    """
    try:
        frame = open_frame(path, name, calibration, scratch)
    except UsageError as error:
        raise UnusableFile(path, f"cannot be calibrated ({str(error).rstrip('.')})") from error
    if PRODUCT_KEYWORD in frame.header:
        raise UnusableFile(path, "is a mosaic of an earlier run, which is not used as input")
    if "MT_NFRAMES" in frame.header:
        raise UnusableFile(path, "is a master tile, not a frame: give such a folder with --tiles")
    return frame


def measure_frames(
    run: Run, files: Mapping[str, Path], calibration: Calibration, pixels: PixelStore
) -> list[MeasuredFrame]:
    """Open every frame and find its stars, on all cores; what cannot be used is set aside."""
    masters = [run.kept.token(path) for path in calibration_files(run.settings)]
    done = iter(range(1, len(files) + 1))

    def one(name: str) -> MeasuredFrame | UnusableFile:
        try:
            frame = open_raw(files[name], name, calibration, run.scratch)
            fingerprint = run.kept.fingerprint("frame", run.kept.token(files[name]), masters)
            found = run.kept.cached("frame", name, fingerprint, lambda: stars_and_survey(frame, pixels), FRAME)
            # a parsed header is as large as all that is known of the frame besides
            return MeasuredFrame(replace(frame, header=fits.Header()), *found, fingerprint)
        except UnusableFile as error:
            return error
        finally:
            run.reporter.stage("phase1_scan", next(done) // 2, len(files))

    found = run_parallel(one, list(files), run.tools.jobs, run.tools.cancelled)
    misfits = [item.__cause__ for item in found if isinstance(item, UnusableFile)]
    if len(misfits) == len(found):
        for misfit in misfits:
            if isinstance(misfit, UsageError):  # the calibration frames fit none
                raise misfit
    measured = []
    for name, item in zip(files, found, strict=True):
        if isinstance(item, UnusableFile):
            run.frames[name] = {"name": name}
            run.set_frame_aside(name, item.reason)
        else:
            measured.append(item)
            run.frames[name] = {"name": name, "status": "read", **facts_of(item.frame, item.stars)}
    return same_channels(run, measured)


def stars_and_survey(frame: Frame, pixels: PixelStore) -> tuple[Stars, TileSurvey]:
    """Stars and survey of a frame, from one reading of its pixels, which are offered to the store."""
    tile = frame.tile(WCS(naxis=2))
    data = tile.read_rows(0, frame.shape[0])
    pixels.offer(tile, data)
    stars = find_stars(np.mean(data, axis=0) if len(data) > 1 else data[0], STARS_KEPT)
    return stars, survey_pixels(data, tile.ceilings)


def facts_of(frame: Frame, stars: Stars) -> dict[str, Any]:
    """What the report says of a frame."""
    known = len(stars.x) > 0
    return {
        "date": frame.date,
        "exposure_s": frame.exposure,
        "stars": len(stars.x),
        "fwhm_px": float(np.median(stars.fwhm)) if known else None,
        "elongation": float(np.median(stars.elongation)) if known else None,
        "background": stars.background,
        "noise": stars.noise,
    }


def same_channels(run: Run, measured: list[MeasuredFrame]) -> list[MeasuredFrame]:
    """Keep the frames with the commoner number of channels, colour where they are as many."""
    colour = sum(item.frame.channels == 3 for item in measured)
    wanted = 3 if 2 * colour >= len(measured) else 1
    for item in measured:
        if item.frame.channels != wanted:
            run.set_frame_aside(item.frame.name, f"is {'mono' if wanted == 3 else 'in colour'}, unlike most frames")
    return [item for item in measured if item.frame.channels == wanted]
