"""Plate solving: one small interface, and the choice of the solver.

`choose_solver` gives a `Solver`; its ``solve(image, stars, hints, scratch, cancelled)`` gives a `Solution` or raises
`SolveError`. The adapters are `platesolve.astap` (ASTAP, on a temporary copy of the image) and
`platesolve.astrometry_net` (``solve-field``, on a list of stars).
"""

from __future__ import annotations

from collections.abc import Callable

from zemosaic_pipeline.platesolve.astap import find_astap
from zemosaic_pipeline.platesolve.astrometry_net import find_astrometry_net
from zemosaic_pipeline.platesolve.base import Solver, SolverMissing
from zemosaic_pipeline.settings.settings import Settings


def choose_solver(settings: Settings, warn: Callable[[str], object]) -> Solver | None:
    """Choose the plate solver: the one that ``solver_method`` names, or else one that is there.

    With "auto", ASTAP with a star database goes before ``solve-field`` with index files. A local astrometry.net
    server ("ansvr") is not supported: what is there is taken, and said.

    Parameters
    ----------
    settings : Settings
        ``solver_method``, ``solver_timeout``, ``astap_*`` and ``astrometry_local_path``.
    warn : callable
        Gets one sentence where the choice is not what was asked for.

    Returns
    -------
    Solver or None
        None where solving is turned off or no solver is there.
    """
    method = settings.solver_method or "auto"
    if method == "none":
        return None
    order = ("astrometry", "astap") if method == "astrometry" else ("astap", "astrometry")
    missing = []
    for name in order:
        try:
            solver = _find(name, settings)
        except SolverMissing as reason:
            missing.append(str(reason))
            continue
        if method == "ansvr":
            warn(f"solver_method = ansvr, a local astrometry.net server, is not supported: {solver.name} is used.")
        elif method == order[0] and missing:
            warn(f"{missing[0]} Until then {solver.name} is used.")
        return solver
    warn("No plate solver can be used, so frames without a WCS are set aside. " + " ".join(missing))
    return None


def _find(name: str, settings: Settings) -> Solver:
    """Return the adapter of that name, or raise `SolverMissing`."""
    if name == "astap":
        return find_astap(
            settings.astap_executable_path,
            settings.astap_data_directory_path,
            settings.astap_default_downsample,
            settings.astap_max_instances,
            settings.solver_timeout,
        )
    return find_astrometry_net(settings.astrometry_local_path, settings.solver_timeout)
