"""Phases 1 and 2: from a folder of frames to panels of frames that know where on the sky they lie.

Facts are kept of a frame (stars, WCS, noise); its pixels wait in memory for Phase 3 as far as the budget goes, and are
read, calibrated and debayered again where it does not.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic_calibrate import Calibration, load_calibration
from zemosaic_cluster import group_frames, linking_length
from zemosaic_fingerprint import fingerprint, pack, unpack
from zemosaic_headers import PRODUCT_KEYWORD, quiet
from zemosaic_leftovers import packed_survey, unpacked_survey
from zemosaic_mosaic import Run, nothing_usable
from zemosaic_raw import Frame, open_frame
from zemosaic_reproject import run_parallel
from zemosaic_scan import MASTER_TILES, SetAside, find_fits_files
from zemosaic_settings import Settings
from zemosaic_solve import Hints, SolveError, choose_solver
from zemosaic_starmatch import pointing_disagrees, separation, transfer_wcs
from zemosaic_stars import Stars, find_stars, frame_quality
from zemosaic_tiles import TileSurvey, survey_pixels
from zemosaic_utils import UnusableFile, UsageError

#: Stars kept of each frame: enough to solve, to align and to judge it.
STARS_KEPT = 400
#: Solved frames whose stars an unsolved one is compared with.
NEIGHBOURS = 3
#: Keys under which the items of ZeMosaic's filter window may hold their file, and its groups their items.
_PATH_KEYS = ("path", "path_raw", "raw_path", "file_path", "filepath", "file", "filename", "src")
_GROUP_KEYS = ("items", "frames", "entries", "members", "files", "paths")


@dataclass(frozen=True, eq=False)
class Look:
    """A frame, its stars, and what its pixels are like: all that one look at the pixels tells.

    ``mark`` is the fingerprint of the calibrated and debayered pixels.
    """

    frame: Frame
    stars: Stars
    survey: TileSurvey
    mark: str


class OnTheSky:
    """What a ``frame`` and its ``wcs`` tell of where it lies."""

    frame: Frame
    wcs: WCS

    @property
    def name(self) -> str:
        return self.frame.name

    @property
    def centre(self) -> tuple[float, float]:
        """Right ascension and declination of the frame's middle in degrees."""
        height, width = self.frame.shape
        sky = self.wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
        return float(sky.ra.deg), float(sky.dec.deg)

    @property
    def orientation(self) -> float:
        """Position angle of the frame's rows in degrees, counted as the WCS matrix has it."""
        matrix = self.wcs.pixel_scale_matrix
        return float(np.degrees(np.arctan2(matrix[1, 0], matrix[1, 1])) % 360)


@dataclass(frozen=True, eq=False)
class SolvedFrame(Look, OnTheSky):
    """A frame with its place on the sky; ``solver`` says where the WCS comes from."""

    wcs: WCS
    solver: str


# ------------------------------------------------------------------------------------------ what the user has chosen


@dataclass(frozen=True)
class FramePlan:
    """Frames that are used and their panels, as absolute paths; None where the user left that to the worker."""

    frames: frozenset[Path] | None = None
    groups: tuple[tuple[Path, ...], ...] | None = None

    @classmethod
    def from_gui(cls, overrides: Any, items: Any) -> FramePlan:
        """Read what the filter window sends: ``filter_overrides`` and ``filtered_header_items``.

        Raises
        ------
        UsageError
            They are there, and no file can be found in them.
        """
        frames = _paths_of(items, "filtered_header_items")
        groups = overrides.get("preplan_master_groups") if isinstance(overrides, Mapping) else None
        if overrides and not isinstance(overrides, Mapping):
            raise UsageError("Setting filter_overrides (gui) cannot be used: expected a mapping.")
        planned = None
        if groups:
            if not isinstance(groups, Sequence) or isinstance(groups, str):
                raise UsageError("Setting filter_overrides (gui) cannot be used: preplan_master_groups is no list.")
            planned = tuple(tuple(_paths_of(_members(g), "filter_overrides") or ()) for g in groups)
        return cls(frozenset(frames) if frames else None, planned)

    def chosen(self) -> frozenset[Path] | None:
        """The frames to use: those that were kept, or else those of the groups."""
        if self.frames is None and self.groups is not None:
            return frozenset(path for group in self.groups for path in group)
        return self.frames


def _members(group: Any) -> Any:
    if isinstance(group, Mapping):
        return next((group[key] for key in _GROUP_KEYS if key in group), [group])
    return group


def _paths_of(items: Any, key: str) -> list[Path] | None:
    """Files that a list of the filter window's items names; None for no list."""
    if not items:
        return None
    found = []
    for item in items if isinstance(items, Iterable) and not isinstance(items, str | Mapping) else [None]:
        value = item
        if isinstance(item, Mapping):
            value = next((item[k] for k in _PATH_KEYS if isinstance(item.get(k), str | Path)), None)
        if not isinstance(value, str | Path) or not str(value):
            raise UsageError(f"Setting {key} (gui) cannot be used: expected a list of frames with their paths.")
        found.append(Path(value).absolute())
    return found


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


def set_frame_aside(run: Run, name: str, reason: str) -> None:
    """One frame less, with its warning and its line in the report."""
    run.set_aside(name, reason)
    run.frames[name] |= {"status": "set aside", "reason": reason}


class Solving:
    """The plate solutions of a night: from the headers, from a solver, and from the stars of frames nearby.

    What is tried for a frame depends on nothing but the input, so that another run, or a resumed one, finds the same.
    """

    def __init__(self, run: Run, looks: Sequence[Look], scratch: Path) -> None:
        self.run, self.scratch = run, scratch
        self.looks = {look.frame.name: look for look in looks}
        self.solved: dict[str, SolvedFrame] = {}
        self.reasons: dict[str, str] = {}
        self.solver: Any = None
        self.tried: set[str] = set()

    def all(self) -> list[SolvedFrame]:
        """Solve every frame; those without a solution are set aside."""
        force = self.run.settings.force_resolve_existing_wcs
        for name, look in self.looks.items():
            if look.frame.wcs is not None and not force:
                self.solved[name] = SolvedFrame(**vars(look), wcs=look.frame.wcs, solver="header")
        self.doubt_headers()
        self.doubt_lonely()
        self.solve_rest()
        if self.doubt_lonely():  # beside those that are solved now
            self.solve_rest()
        for name in self.looks:
            if name not in self.solved:
                set_frame_aside(self.run, name, self.reasons.get(name, "cannot be solved"))
        return [self.accepted(name) for name in self.looks if name in self.solved]

    def solve_rest(self) -> None:
        """Give what is not solved to the solver, then to the stars of what is solved; each frame once."""
        rest = [name for name in self.looks if name not in self.solved and name not in self.tried]
        if not rest:
            return
        if not self.tried:
            self.solver = choose_solver(self.run.settings, lambda text: self.run.reporter.warn("", text))
        self.tried |= set(rest)
        done, total = iter(range(1, len(rest) + 1)), len(self.looks)

        def solve(name: str) -> None:
            self.solve(name)
            self.run.reporter.stage("phase1_scan", total - (len(rest) - next(done)) // 2 - 1, total)

        run_parallel(solve, rest, self.run.jobs, self.run.cancelled)
        self.run.check()
        self.transfer([name for name in rest if name not in self.solved])

    def accepted(self, name: str) -> SolvedFrame:
        item = self.solved[name]
        self.run.frames[name] |= {
            "status": "used",
            "solved_by": item.solver,
            "wcs": item.wcs.to_header_string(relax=True),
        }
        return item

    def doubt_headers(self) -> None:
        """Take back the WCS of headers that the pointing of the mount contradicts."""
        for name, item in list(self.solved.items()):
            frame = item.frame
            reason = pointing_disagrees(item.wcs, frame.ra, frame.dec, frame.shape)
            if reason is not None:
                self.reasons[name] = reason
                del self.solved[name]

    def doubt_lonely(self) -> bool:
        """Take back the WCS of headers that put a frame where no other is, though its stars are those of others.

        Phase 3 compares the stars of a panel's frames; a frame that a lying WCS leads away has a panel to itself. It is
        compared with the frames that were taken before and after it. A frame that shares its stars with none cannot be
        judged.
        """
        items = list(self.solved.values())
        if len(items) < 2:
            return False
        near = neighbourhood(items)
        company = [k for k in range(len(items)) if len(near[k]) > 1]
        when = [item.frame.date or "" for item in items]
        order = sorted(company, key=lambda k: (when[k], items[k].name))

        def judge(k: int) -> str | None:
            place = bisect([(when[j], items[j].name) for j in order], (when[k], items[k].name))
            for j in order[max(place - NEIGHBOURS, 0) : place + NEIGHBOURS]:
                reason = contradiction(items[k], items[j])
                if reason is not None:
                    return reason
            return None

        lonely = [k for k, item in enumerate(items) if item.solver == "header" and len(near[k]) == 1 and company]
        found = run_parallel(judge, lonely, self.run.jobs, self.run.cancelled)
        self.run.check()
        for k, reason in zip(lonely, found, strict=True):
            if reason is not None:
                self.reasons[items[k].name] = reason
                del self.solved[items[k].name]
        return any(found)

    def transfer(self, names: Sequence[str]) -> None:
        """Solve frames by the stars that they share with solved frames of the same field."""
        nearby = {name: self.neighbours(name) for name in names}

        def solve(name: str) -> SolvedFrame | None:
            look = self.looks[name]
            for reference in nearby[name]:
                # astropy's WCS objects must not be shared between threads
                wcs = transfer_wcs(look.stars, reference.stars, reference.wcs.deepcopy(), look.frame.scale)
                if wcs is not None:
                    wcs.pixel_shape = look.frame.shape[::-1]
                    return SolvedFrame(**vars(look), wcs=wcs, solver=f"stars of {reference.name}")
            return None

        found = run_parallel(solve, list(names), self.run.jobs, self.run.cancelled)
        self.run.check()
        self.solved |= {name: item for name, item in zip(names, found, strict=True) if item is not None}

    def neighbours(self, name: str) -> list[SolvedFrame]:
        """Solved frames whose field a frame may share: the nearest, at most three."""
        frame = self.looks[name].frame
        items = list(self.solved.values())
        if frame.ra is None or frame.dec is None:
            return items[:NEIGHBOURS]
        distance = np.array([separation(frame.ra, frame.dec, *item.centre) for item in items])
        order = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        return [items[k] for k in order if distance[k] < 2 * field_of(frame)]

    def solve(self, name: str) -> None:
        """Give one frame to the solver."""
        frame, stars = self.looks[name].frame, self.looks[name].stars
        run = self.run
        key = fingerprint("solve", run.settings, run.kept.token(frame.path), stars.x, stars.y)
        kept = run.kept.load("solve", name, key)
        if kept is not None:
            facts = unpack(kept)
            self.accept(name, fits.Header.fromstring(facts["header"]), facts["solver"])
            return
        if self.solver is None:
            self.reasons.setdefault(name, "has no WCS, and there is no plate solver to find it")
            return
        hints = Hints(frame.shape, frame.ra, frame.dec, run.settings.astap_default_search_radius, frame.scale)
        try:
            solution = self.solver.solve(frame.luminance, stars, hints, self.scratch, run.cancelled)
        except SolveError as error:
            run.check()
            self.reasons.setdefault(name, f"cannot be solved ({str(error).rstrip('.')})")
            return
        run.kept.save("solve", name, key, pack({"header": solution.header.tostring(), "solver": solution.solver}))
        self.accept(name, solution.header, solution.solver)

    def accept(self, name: str, header: fits.Header, solver: str) -> None:
        look = self.looks[name]
        with quiet():
            wcs = WCS(header)
        wcs.pixel_shape = look.frame.shape[::-1]
        self.solved[name] = SolvedFrame(**vars(look), wcs=wcs, solver=solver)


def neighbourhood(items: Sequence[SolvedFrame]) -> list[list[int]]:
    """Of every frame those whose middle lies within a quarter of its shorter side, itself included."""
    from scipy.spatial import cKDTree

    ra, dec = np.radians([item.centre for item in items]).T
    points = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    reach = np.radians([field_of(item.frame) / 4 for item in items])
    return cKDTree(points).query_ball_point(points, reach)


def contradiction(item: SolvedFrame, other: SolvedFrame) -> str | None:
    """Why a frame's WCS cannot be true if another's is: the stars that both show lie elsewhere by more than it errs."""
    wcs = transfer_wcs(item.stars, other.stars, other.wcs.deepcopy(), item.frame.scale)
    if wcs is None:
        return None
    height, width = item.frame.shape
    there = wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
    away = separation(*item.centre, float(there.ra.deg), float(there.dec.deg))
    # what overlaps by a strip is placed by it to some pixels; a mount's own errors are smaller than a tenth of the field
    if away < field_of(item.frame) / 10:
        return None
    return f"its WCS is wrong by {away:.2f} degrees: its stars are those of {other.name}"


def field_of(frame: Frame) -> float:
    """Shorter side of a frame in degrees; half a degree where nobody knows its scale."""
    return 0.5 if frame.scale is None else min(frame.shape) * frame.scale / 3600


# ----------------------------------------------------------------------------------------------------------- Phase 2


def panels_of(run: Run, frames: Sequence[SolvedFrame], plan: FramePlan) -> list[list[SolvedFrame]]:
    """Phase 2: the frames of each panel; as the user arranged them where he did.

    Bad frames are judged beside the others of their panel and set aside.
    """
    settings, reporter = run.settings, run.reporter
    reporter.stage("phase2_cluster", 0, len(frames))
    reporter.info("run_info_phase2_started", "grouping the frames into panels")
    groups = planned_groups(frames, plan) if plan.groups is not None else grouped(settings, frames)
    panels = []
    for group in groups:
        reasons: list[str | None] = [None] * len(group)
        if settings.reject_bad_frames:
            kinds = [(item.frame.shape, item.frame.exposure) for item in group]
            reasons = frame_quality([item.stars for item in group], kinds)
        kept = []
        for item, reason in zip(group, reasons, strict=True):
            if reason is None:
                kept.append(item)
            else:
                set_frame_aside(run, item.name, reason)
        if kept:
            panels.append(kept)
    run.check()
    if not panels:
        raise UsageError(nothing_usable(run.aside, what="frame"))
    reporter.stage("phase2_cluster", len(frames), len(frames))
    reporter.info("run_info_phase2_finished", f"{len(panels)} panels", num_groups=len(panels))
    return panels


def planned_groups(frames: Sequence[SolvedFrame], plan: FramePlan) -> list[list[SolvedFrame]]:
    """The panels of the filter window; frames that it put into none are one more."""
    by_path = {item.frame.path.absolute(): item for item in frames}
    groups = [[by_path.pop(path) for path in group if path in by_path] for group in plan.groups or ()]
    return [group for group in [*groups, list(by_path.values())] if group]


def grouped(settings: Settings, frames: Sequence[SolvedFrame]) -> list[list[SolvedFrame]]:
    """The panels that the settings of Phase 2 ask for."""
    centres = np.array([item.centre for item in frames])
    found = group_frames(
        centres[:, 0],
        centres[:, 1],
        threshold_deg=linking_length(settings.cluster_panel_threshold, [field_of(item.frame) for item in frames]),
        orientation_deg=[item.orientation for item in frames],
        orientation_split_deg=settings.cluster_orientation_split_deg,
        mount=[item.frame.mount or "" for item in frames],
        target_groups=settings.cluster_target_groups,
        cap=settings.max_raw_per_master_tile,
        auto_cap=settings.auto_limit_frames_per_master_tile,
        order=[item.frame.date or item.name for item in frames],
        field_deg=float(np.median([field_of(item.frame) for item in frames])),
    )
    return [[frames[k] for k in members] for members in found]
