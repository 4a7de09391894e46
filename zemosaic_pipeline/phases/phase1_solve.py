"""Phase 1: the plate solutions of a night, from headers, a solver, and the stars of frames nearby."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np
from astropy.wcs import WCS

from zemosaic_pipeline.fits.headers import quiet
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.platesolve.base import Hints, Solution, SolveError, Solver, SolverMissing
from zemosaic_pipeline.platesolve.choose import choose_solver
from zemosaic_pipeline.raw.solved import MeasuredFrame, SolvedFrame, field_of
from zemosaic_pipeline.resume.frame_pieces import PLATE_SOLUTION
from zemosaic_pipeline.sky import chord, icrs_centre, separation, unit_vectors
from zemosaic_pipeline.stars.matching import pointing_disagrees, transfer_wcs

#: Solved frames whose stars an unsolved one is compared with.
NEIGHBOURS = 3


class Solving:
    """The plate solutions of a night: from the headers, from a solver, and from the stars of frames nearby.

    What is tried for a frame depends on nothing but the input, so that another run, or a resumed one, finds the same.
    """

    def __init__(self, run: Run, measured: Sequence[MeasuredFrame]) -> None:
        self.run = run
        self.measured = {item.frame.name: item for item in measured}
        self.solved: dict[str, SolvedFrame] = {}
        self.reasons: dict[str, str] = {}
        self.solver: Solver | None = None
        self.tried: set[str] = set()

    def all(self) -> list[SolvedFrame]:
        """Solve every frame; those without a solution are set aside."""
        force = self.run.settings.force_resolve_existing_wcs
        for name, item in self.measured.items():
            if item.frame.wcs is not None and not force:
                self.solved[name] = SolvedFrame.of(item, item.frame.wcs, "header")
        self.doubt_headers()
        self.doubt_lonely()
        self.solve_rest()
        if self.doubt_lonely():  # beside those that are solved now
            self.solve_rest()
        for name in self.measured:
            if name not in self.solved:
                self.run.set_frame_aside(name, self.reasons.get(name, "cannot be solved"))
        return [self.accepted(name) for name in self.measured if name in self.solved]

    def solve_rest(self) -> None:
        """Give what is not solved to the solver, then to the stars of what is solved; each frame once."""
        rest = [name for name in self.measured if name not in self.solved and name not in self.tried]
        if not rest:
            return
        if not self.tried:
            self.solver = choose_solver(self.run.settings, lambda text: self.run.reporter.warn("", text))
        self.tried |= set(rest)
        done, total = iter(range(1, len(rest) + 1)), len(self.measured)

        def solve(name: str) -> None:
            self.solve(name)
            self.run.reporter.stage("phase1_scan", total - (len(rest) - next(done)) // 2 - 1, total)

        run_parallel(solve, rest, self.run.tools.jobs, self.run.tools.cancelled)
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
        found = run_parallel(judge, lonely, self.run.tools.jobs, self.run.tools.cancelled)
        for k, reason in zip(lonely, found, strict=True):
            if reason is not None:
                self.reasons[items[k].name] = reason
                del self.solved[items[k].name]
        return any(found)

    def transfer(self, names: Sequence[str]) -> None:
        """Solve frames by the stars that they share with solved frames of the same field."""
        nearby = {name: self.neighbours(name) for name in names}

        def solve(name: str) -> SolvedFrame | None:
            item = self.measured[name]
            for reference in nearby[name]:
                # astropy's WCS objects must not be shared between threads
                wcs = transfer_wcs(item.stars, reference.stars, reference.wcs.deepcopy(), item.frame.scale)
                if wcs is not None:
                    wcs.pixel_shape = item.frame.shape[::-1]
                    return SolvedFrame.of(item, wcs, f"stars of {reference.name}")
            return None

        found = run_parallel(solve, list(names), self.run.tools.jobs, self.run.tools.cancelled)
        self.solved |= {name: item for name, item in zip(names, found, strict=True) if item is not None}

    def neighbours(self, name: str) -> list[SolvedFrame]:
        """Solved frames whose field a frame may share: the nearest, at most three."""
        frame = self.measured[name].frame
        items = list(self.solved.values())
        if frame.ra is None or frame.dec is None:
            return items[:NEIGHBOURS]
        centres = np.array([item.centre for item in items]).reshape(-1, 2)
        distance = separation(frame.ra, frame.dec, *centres.T)
        order = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        return [items[k] for k in order if distance[k] < 2 * field_of(frame)]

    def solve(self, name: str) -> None:
        """Give one frame to the solver, or take the solution of the stopped run."""
        item, kept = self.measured[name], self.run.kept
        fingerprint = kept.fingerprint("solve", item.fingerprint, item.stars.x, item.stars.y)
        try:
            solution = kept.cached("solve", name, fingerprint, lambda: self.ask_solver(item), PLATE_SOLUTION)
        except SolverMissing:
            self.reasons.setdefault(name, "has no WCS, and there is no plate solver to find it")
        except SolveError as error:
            self.run.tools.check()
            self.reasons.setdefault(name, f"cannot be solved ({str(error).rstrip('.')})")
        else:
            with quiet():
                wcs = WCS(solution.header)
            wcs.pixel_shape = item.frame.shape[::-1]
            self.solved[name] = SolvedFrame.of(item, wcs, solution.solver)

    def ask_solver(self, item: MeasuredFrame) -> Solution:
        """What the solver finds.

        Raises
        ------
        SolverMissing
        SolveError
        """
        frame, run = item.frame, self.run
        if self.solver is None:
            raise SolverMissing("there is no plate solver")
        hints = Hints(frame.shape, frame.ra, frame.dec, run.settings.astap_default_search_radius, frame.scale)
        return self.solver.solve(frame.luminance, item.stars, hints, run.scratch, run.tools.cancelled)


def neighbourhood(items: Sequence[SolvedFrame]) -> list[list[int]]:
    """Of every frame those whose middle lies within a quarter of its shorter side, itself included."""
    from scipy.spatial import KDTree

    points = unit_vectors(*np.transpose([item.centre for item in items]))
    reach = [chord(field_of(item.frame) / 4) for item in items]
    return KDTree(points).query_ball_point(points, reach)


def contradiction(item: SolvedFrame, other: SolvedFrame) -> str | None:
    """Why a frame's WCS cannot be true if another's is: the stars that both show lie elsewhere by more than it errs."""
    wcs = transfer_wcs(item.stars, other.stars, other.wcs.deepcopy(), item.frame.scale)
    if wcs is None:
        return None
    away = separation(*item.centre, *icrs_centre(wcs, item.frame.shape))
    # what overlaps by a strip is placed by it to some pixels; a mount's own errors are smaller than a tenth of the field
    if away < field_of(item.frame) / 10:
        return None
    return f"has a WCS that is wrong by {away:.2f} degrees: its stars are those of {other.name}"
