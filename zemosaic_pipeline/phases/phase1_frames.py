"""Phases 1 and 2: from a folder of frames to panels of frames that know where on the sky they lie.

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
from zemosaic_pipeline.files import pack, unpack
from zemosaic_pipeline.fits.admission import MASTER_TILES
from zemosaic_pipeline.fits.find import SetAside, find_fits_files
from zemosaic_pipeline.fits.headers import PRODUCT_KEYWORD
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.phases.phase1_solve import Solving
from zemosaic_pipeline.phases.run import Run, nothing_usable, set_frame_aside
from zemosaic_pipeline.raw.calibration import Calibration, load_calibration
from zemosaic_pipeline.raw.frame import Frame, open_frame
from zemosaic_pipeline.raw.solved import Look, SolvedFrame
from zemosaic_pipeline.resample.survey import TileSurvey, survey_pixels
from zemosaic_pipeline.resume.fingerprint import fingerprint
from zemosaic_pipeline.resume.pieces import packed_survey, unpacked_survey
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.stars.detection import Stars, find_stars

#: Stars kept of each frame: enough to solve, to align and to judge it.
STARS_KEPT = 400


# ----------------------------------------------------------------------------------------------------------- Phase 1


def find_frames(run: Run, source: Path, scratch: Path, plan: FramePlan) -> dict[str, Path]:
    """Files that may be frames, by their name in the input folder: no outputs, no calibration frames."""
    problems: list[SetAside] = []
    settings = run.settings
    masters = [Path(text).absolute() for text in (settings.dark, settings.flat, settings.bias) if text]
    output = run.output_dir.absolute()
    inside = output == source.absolute() or output in source.absolute().parents
    others = [scratch.absolute(), *masters, output / MASTER_TILES if inside else output]
    found = {}
    for path in find_fits_files(source, problems):
        place = path.absolute()
        if not any(place == other or other in place.parents for other in others):
            found[path.relative_to(source).as_posix()] = path
    for item in problems:
        run.set_aside(item.name, item.reason)
    chosen = plan.chosen()
    if chosen is not None:
        present = {path.absolute() for path in found.values()}
        for path in sorted(chosen - present):
            run.set_aside(path.name, "was chosen in the filter window but is not in the input folder")
        found = {name: path for name, path in found.items() if path.absolute() in chosen}
    return found


def solved_frames(run: Run, source: Path, scratch: Path, plan: FramePlan) -> list[SolvedFrame]:
    """Phase 1: every usable frame with its stars and its WCS, in the order of their names.

    Raises
    ------
    UsageError
        There is no frame, none can be used, or the calibration frames do not fit.
    """
    files = find_frames(run, source, scratch, plan)
    if not files and not run.aside:
        raise UsageError(f"There is no FITS file (.fit, .fits, .fts; also .fz and .gz) in {source}.")
    run.reporter.stage("phase1_scan", 0, max(len(files), 1))
    run.reporter.info("run_info_phase1_started_cache", f"{len(files)} files: reading, finding stars, solving")
    calibration = load_calibration(run.settings, scratch, lambda text: run.reporter.warn("", text))
    run.kept.identify([*files.values(), *(path for path in _calibration_files(run.settings))], run.jobs)
    looks = read_frames(run, files, calibration, scratch)
    frames = Solving(run, looks, scratch).all()
    run.check()
    if not frames:
        raise UsageError(nothing_usable(run.aside, f" in {source}", "frame"))
    run.reporter.stage("phase1_scan", len(files), len(files))
    run.reporter.info(
        "run_info_phase1_finished", f"{len(frames)} of {len(files)} frames solved", num_valid_raws=len(frames)
    )
    return frames


def _calibration_files(settings: Settings) -> list[Path]:
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


def read_frames(run: Run, files: Mapping[str, Path], calibration: Calibration, scratch: Path) -> list[Look]:
    """Open every frame and find its stars, on all cores; what cannot be used is set aside."""
    masters = [run.kept.token(path) for path in _calibration_files(run.settings)]
    done = iter(range(1, len(files) + 1))

    def look(name: str) -> Look | UnusableFile:
        try:
            frame = open_raw(files[name], name, calibration, scratch)
            key = fingerprint("frame", run.settings, run.kept.token(files[name]), masters)
            # a parsed header is as large as all that is known of the frame besides
            return Look(replace(frame, header=fits.Header()), *seen(run, frame, key), key)
        except UnusableFile as error:
            return error
        finally:
            run.reporter.stage("phase1_scan", next(done) // 2, len(files))

    found = run_parallel(look, list(files), run.jobs, run.cancelled)
    run.check()
    misfits = [item.__cause__ for item in found if isinstance(getattr(item, "__cause__", None), UsageError)]
    if misfits and not any(isinstance(item, Look) for item in found):
        raise misfits[0]
    looks = []
    for name, item in zip(files, found, strict=True):
        if isinstance(item, UnusableFile):
            run.frames[name] = {"name": name}
            set_frame_aside(run, name, item.reason)
        else:
            looks.append(item)
            run.frames[name] = {"name": name, "status": "read", **facts_of(item.frame, item.stars)}
    return same_channels(run, looks)


def seen(run: Run, frame: Frame, mark: str) -> tuple[Stars, TileSurvey]:
    """Stars and survey of a frame, from one reading of its pixels, or from a stopped run."""
    kept = run.kept.load("frame", frame.name, mark)
    if kept is not None:
        facts = unpack(kept)
        return Stars(**unpack(facts["stars"].tobytes())), unpacked_survey(facts["survey"].tobytes())
    tile = frame.tile(WCS(naxis=2))
    pixels = tile.read_rows(0, frame.shape[0])
    if run.store is not None:
        run.store.offer(tile, pixels)
    survey = survey_pixels(pixels)
    stars = find_stars(np.mean(pixels, axis=0) if len(pixels) > 1 else pixels[0], STARS_KEPT)
    if run.kept.enabled:
        pieces = {"stars": pack(vars(stars)), "survey": packed_survey(survey)}
        run.kept.save("frame", frame.name, mark, pack({k: np.frombuffer(v, np.uint8) for k, v in pieces.items()}))
    return stars, survey


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


def same_channels(run: Run, looks: list[Look]) -> list[Look]:
    """Keep the frames with the commoner number of channels, colour where they are as many."""
    colour = sum(look.frame.channels == 3 for look in looks)
    wanted = 3 if 2 * colour >= len(looks) else 1
    for look in looks:
        if look.frame.channels != wanted:
            set_frame_aside(run, look.frame.name, f"is {'mono' if wanted == 3 else 'in colour'}, unlike most frames")
    return [look for look in looks if look.frame.channels == wanted]
