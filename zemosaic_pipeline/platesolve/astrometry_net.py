"""astrometry.net's ``solve-field`` as a plate solver: it gets a list of stars, never the image."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.platesolve.base import (
    Hints,
    Solution,
    SolveError,
    SolverMissing,
    StarList,
    read_cards,
    run_program,
    wcs_header,
)

_FEWEST_STARS = 6  # a match is a quad of stars, and some more to believe it
# Measured with Tycho-2 indices on fields of 0.7 x 1.3 degrees: all solve with 60 stars in 0.03 s; a field without a
# match costs 0.6 s near its pointing, 1 s anywhere; without a limit it searches for minutes.
_STARS = 60
_STARS_WIDE = 30
_SCALE_SLACK = 0.1  # of the hinted scale
_SCALES = (0.4, 30.0)  # arcsec per pixel, where nothing is known
_CONFIG_LINE = re.compile(r"^\s*(add_path|index)\s+(\S.*?)\s*$", re.MULTILINE)
_INSTALL = "install it (Debian: apt install astrometry.net) or set astrometry_local_path"
_INSTALL_DATA = (
    "install some that fit the field (Debian: apt install astrometry-data-tycho2-07 astrometry-data-tycho2-08), "
    "or set astrometry_local_path to their folder"
)


@dataclass(frozen=True)
class AstrometryNet:
    """``solve-field`` with index files.

    Attributes
    ----------
    program : Path
        The executable.
    config : Path or None
        Configuration of the engine; None: its own.
    index_folder : Path or None
        A folder of index files to use instead of a configuration.
    timeout : float
        Seconds for one frame.
    """

    program: Path
    config: Path | None
    index_folder: Path | None
    timeout: float
    name: str = "astrometry.net"

    def solve(
        self,
        image: Callable[[], np.ndarray],
        stars: StarList,
        hints: Hints,
        scratch: Path,
        cancelled: Callable[[], bool],
    ) -> Solution:
        """See `platesolve.base.Solver.solve`.

        Tried one after the other: with all hints; without the pointing; without any, on fewer stars.
        """
        count = len(stars.x)
        if count < _FEWEST_STARS:
            raise SolveError(f"Only {count} stars were found; at least {_FEWEST_STARS} are needed to solve it.")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="solve-", dir=scratch, ignore_cleanup_errors=True) as name:
            folder = Path(name).resolve()
            _write_stars(folder / "field.xyls", stars)
            base = self._command(folder, hints)
            for arguments in _attempts(hints):
                left = start + self.timeout - time.monotonic()
                if left <= 0:
                    raise SolveError(f"astrometry.net found no match within {self.timeout:g} s (solver_timeout).")
                # the processor time ends the engine's own search; should it hang, the clock does
                command = [*base, *arguments, "--cpulimit", str(max(1, round(left)))]
                output = run_program(command, folder, left, cancelled)
                if (folder / "field.wcs").is_file():
                    header = wcs_header(read_cards(folder / "field.wcs"), hints)
                    return Solution(header, self.name, time.monotonic() - start)
                _check_output(output)
        raise SolveError(f"astrometry.net found no match for its {min(count, _STARS)} brightest stars.")

    def _command(self, folder: Path, hints: Hints) -> list[str]:
        height, width = hints.shape
        command = [str(self.program), "field.xyls", "--width", str(width), "--height", str(height)]
        command += ["--x-column", "X", "--y-column", "Y", "--sort-column", "FLUX"]
        # order 1 fits the linear terms to all matched stars (0.05 pixel rms); none keeps the fit to the first quad
        # (0.18, at worst 1.2), and order 2 on thirty stars is worse than 1 (0.07, at worst 0.5)
        command += ["--tweak-order", "1"]
        # lists of stars are otherwise filtered by scripts that need Python and numpy on the system
        command += ["--no-remove-lines", "--uniformize", "0"]
        command += ["--no-plots", "--overwrite", "--dir", ".", "--temp-dir", "."]
        for output in ("new-fits", "solved", "match", "rdls", "corr", "index-xyls"):
            command += [f"--{output}", "none"]
        config = self.config
        if self.index_folder is not None:
            config = folder / "engine.cfg"
            config.write_text(f"add_path {self.index_folder}\nautoindex\n", encoding="utf-8")
        return command if config is None else [*command, "--config", str(config)]


def _write_stars(path: Path, stars: StarList) -> None:
    """Write the brightest stars as a FITS table; the first pixel's centre is at 1 there."""
    columns = {"X": np.asarray(stars.x) + 1, "Y": np.asarray(stars.y) + 1, "FLUX": np.asarray(stars.flux)}
    table = [fits.Column(key, "D", array=values[:_STARS]) for key, values in columns.items()]
    fits.BinTableHDU.from_columns(table).writeto(path)


def _attempts(hints: Hints) -> list[list[str]]:
    """Return the arguments of each attempt, the narrowest search first."""

    def search(scale: float | None, pointing: tuple[float, float] | None, stars: int) -> list[str]:
        low, high = _SCALES if scale is None else (scale * (1 - _SCALE_SLACK), scale * (1 + _SCALE_SLACK))
        result = ["--scale-units", "arcsecperpix", "--scale-low", f"{low:.6g}", "--scale-high", f"{high:.6g}"]
        if pointing is not None:
            ra, dec = pointing
            result += ["--ra", f"{ra:.6f}", "--dec", f"{dec:.6f}", "--radius", f"{hints.radius:.4f}"]
        return [*result, "--objs", str(stars)]

    attempts = [] if hints.pointing is None else [search(hints.scale, hints.pointing, _STARS)]
    if hints.scale is not None:
        attempts.append(search(hints.scale, None, _STARS))
    return [*attempts, search(None, None, _STARS_WIDE)]


def _check_output(output: str) -> None:
    """Raise `SolveError` where the engine had no index files: nothing was searched."""
    if "must list at least one index" in output:
        raise SolveError(f"astrometry.net found no index files: {_INSTALL_DATA}.")


# -------------------------------------------------------------------------------------------------- what is there


def find_astrometry_net(local_path: str, timeout: float) -> AstrometryNet:
    """Find ``solve-field`` and its index files.

    Parameters
    ----------
    local_path : str
        Setting ``astrometry_local_path``: the executable, a folder that holds it (or ``bin`` with it), a folder of
        index files, a configuration file of the engine or a folder with one; empty: the programs on PATH.
    timeout : float
        Seconds for one frame.

    Raises
    ------
    SolverMissing
        One sentence for each: no such path, no executable, no index files.
    """
    given = Path(local_path).expanduser().absolute() if local_path else None
    if given is not None and not given.exists():
        raise SolverMissing(f"astrometry_local_path = {given} does not exist.")
    program = _find_program(given)
    if program is None:
        raise SolverMissing(f"astrometry.net's solve-field was not found: {_INSTALL}.")
    if given is not None and given.is_dir() and _holds_index(given):
        return AstrometryNet(program, None, given, timeout)
    chosen = _given_config(given)
    config = chosen or _own_config(program)
    if config is None or not _config_has_index(config):
        raise SolverMissing(f"astrometry.net has no index files: {_INSTALL_DATA}.")
    return AstrometryNet(program, chosen, None, timeout)


def _find_program(given: Path | None) -> Path | None:
    if given is not None and given.is_file() and given.suffix != ".cfg":
        return given if os.access(given, os.X_OK) else None
    folders = [given, given / "bin"] if given is not None else []
    for folder in (*folders, None):
        found = shutil.which("solve-field", path=None if folder is None else str(folder))
        if found:
            return Path(found).absolute()
    return None


def _holds_index(folder: Path) -> bool:
    return any("index" in path.name for path in folder.glob("*.fits"))


def _given_config(given: Path | None) -> Path | None:
    if given is None or given.suffix == ".cfg":
        return given
    folder = given if given.is_dir() else given.parent
    places = [folder / "astrometry.cfg", folder / "etc" / "astrometry.cfg"]
    return next((path for path in places if path.is_file()), None)


def _own_config(program: Path) -> Path | None:
    """Return the configuration that the engine takes by itself, by the places where it is installed."""
    roots = [program.parent.parent, program.resolve().parent.parent, Path("/")]  # Debian's is in /etc
    places = [root / "etc" / "astrometry.cfg" for root in roots]
    return next((path for path in places if path.is_file()), None)


def _config_has_index(config: Path) -> bool:
    """Tell whether a configuration of the engine names index files, or folders with index files, that exist."""
    lines = _CONFIG_LINE.findall(config.read_text(encoding="utf-8", errors="replace"))
    folders = [config.parent / value for key, value in lines if key == "add_path"]
    names = [value for key, value in lines if key == "index"]
    return any(_holds_index(folder) for folder in folders) or any(
        (folder / f"{name}{end}").is_file()
        for name in names
        for folder in (*folders, config.parent)
        for end in ("", ".fits")
    )
