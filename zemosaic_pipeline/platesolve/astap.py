"""ASTAP as a plate solver: it gets a temporary copy of the image, and leaves its answer in files beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.platesolve.base import (
    Hints,
    Solution,
    SolveError,
    SolverMissing,
    StarList,
    check,
    read_cards,
    run_program,
    wcs_header,
)

_NAMES = ("astap_cli", "astap")  # the first needs no display
_PLACES = (
    "/opt/astap",
    "/usr/local/opt/astap",
    "/Applications/ASTAP.app/Contents/MacOS",
    r"C:\Program Files\astap",
    r"C:\Program Files (x86)\astap",
)
_DATA_PLACES = ("/usr/share/astap/data", *_PLACES)
_DATA_NAMES = ("*.1476", "*.290", "*.001")
_INSTALL = "install it (Debian: apt install astap-cli; else www.hnsky.org/astap.htm) or set astap_executable_path"
_INSTALL_DATA = "install one (such as D50, from www.hnsky.org/astap.htm) or set astap_data_directory_path to its folder"


@dataclass(frozen=True)
class Astap:
    """ASTAP's program with a star database.

    Attributes
    ----------
    program : Path
        The executable.
    data : Path or None
        Folder of the star database; None: the program's own choice.
    downsample : int
        Binning before stars are found; 0: the program's own choice.
    timeout : float
        Seconds for one frame.
    instances : threading.Semaphore
        How many programs may run at the same time.
    """

    program: Path
    data: Path | None
    downsample: int
    timeout: float
    instances: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))
    name: str = "ASTAP"

    def solve(
        self,
        image: Callable[[], np.ndarray],
        stars: StarList,
        hints: Hints,
        scratch: Path,
        cancelled: Callable[[], bool],
    ) -> Solution:
        """See `platesolve.base.Solver.solve`; the stars are not used, ASTAP finds its own."""
        with (
            self._turn(cancelled),
            tempfile.TemporaryDirectory(prefix="solve-", dir=scratch, ignore_cleanup_errors=True) as name,
        ):
            start = time.monotonic()
            folder = Path(name).resolve()
            write_image(folder / "image.fits", image())
            run_program(self._command(hints), folder, self.timeout, cancelled)
            answer = read_ini(folder / "image.ini")
            if answer.get("PLTSOLVD") != "T":
                raise SolveError(_refusal(answer))
            cards = read_cards(folder / "image.wcs") if (folder / "image.wcs").is_file() else []
            if not {"CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2"} <= dict(cards).keys():
                cards = _cards_of(answer)  # some versions write a .wcs that is no header
            return Solution(wcs_header(cards, hints), self.name, time.monotonic() - start)

    @contextmanager
    def _turn(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Wait until another program may start; the time for the frame does not run yet."""
        while not self.instances.acquire(timeout=0.1):
            check(cancelled)
        try:
            yield
        finally:
            self.instances.release()

    def _command(self, hints: Hints) -> list[str]:
        # the frame's height in degrees, as the program's help has it: -pxscale is not known to every version
        fov = 0.0 if hints.scale is None else hints.scale * hints.shape[0] / 3600
        command = [str(self.program), "-f", "image.fits", "-wcs", "-log", "-fov", f"{fov:.6g}"]
        command += ["-z", str(self.downsample), "-r", f"{180 if hints.pointing is None else hints.radius:.6g}"]
        if hints.pointing is not None:
            ra, dec = hints.pointing
            command += ["-ra", f"{ra / 15:.6f}", "-spd", f"{dec + 90:.6f}"]
        return command if self.data is None else [*command, "-d", str(self.data)]


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a mono image (H, W) as 16-bit FITS: its 0.1 to 99.99 percentiles spread over the range, no data at sky.

    Raises
    ------
    SolveError
        No pixel has data.
    """
    good = image[np.isfinite(image)]
    if not good.size:
        raise SolveError("The image holds no data.")
    low, sky, high = np.percentile(good, (0.1, 50, 99.99))
    scaled = np.where(np.isfinite(image), image, sky) - low
    scaled *= 60000 / (high - low or 1.0)  # the image may be flat
    fits.PrimaryHDU(np.clip(scaled + 1000, 0, 65535).astype(np.uint16)).writeto(path)


def read_ini(path: Path) -> dict[str, str]:
    """Read the answer: lines KEY=VALUE in any encoding; empty where there is no file."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode("latin-1").splitlines()
    pairs = [line.partition("=") for line in lines]
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _refusal(answer: dict[str, str]) -> str:
    """Put into one sentence why there is no solution."""
    if not answer:
        return "ASTAP ended without an answer."
    error = answer.get("ERROR", "").rstrip(".!")
    if "star database" in error.lower():
        return f"ASTAP has no star database that it can read ({error}): {_INSTALL_DATA}."
    told = "; ".join(text for text in (error, answer.get("WARNING", "").rstrip(".!")) if text)
    return f"ASTAP found no solution ({told})." if told else "ASTAP found no solution."


def _cards_of(answer: dict[str, str]) -> list[tuple[str, object]]:
    """Return the WCS that the .ini file holds."""
    numbers = ("CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2", "CD1_1", "CD1_2", "CD2_1", "CD2_2")
    try:
        values = [(key, float(answer[key])) for key in numbers]
    except (KeyError, ValueError) as error:
        raise SolveError(f"ASTAP's answer cannot be read ({error}).") from error
    return [("CTYPE1", "RA---TAN"), ("CTYPE2", "DEC--TAN"), ("CUNIT1", "deg"), ("CUNIT2", "deg"), *values]


# -------------------------------------------------------------------------------------------------- what is there


def find_astap(program: str, data: str, downsample: int, instances: int, timeout: float) -> Astap:
    """Find ASTAP and its star database.

    Parameters
    ----------
    program : str
        Setting ``astap_executable_path``: the executable, or the folder that holds it; empty: looked for.
    data : str
        Setting ``astap_data_directory_path``; empty: the usual places.
    downsample, instances : int
        Settings ``astap_default_downsample`` and ``astap_max_instances``.
    timeout : float
        Seconds for one frame.

    Raises
    ------
    SolverMissing
        One sentence for each: no executable, no star database.
    """
    executable = _find_program(program)
    if executable is None:
        where = f"astap_executable_path = {program} is no program" if program else "ASTAP was not found"
        raise SolverMissing(f"{where}: {_INSTALL}.")
    folders = [Path(data).expanduser().absolute()] if data else [executable.resolve().parent, *map(Path, _DATA_PLACES)]
    found = next((folder for folder in folders if any(any(folder.glob(name)) for name in _DATA_NAMES)), None)
    if found is None:
        where = f"astap_data_directory_path = {data} holds no star database" if data else "ASTAP has no star database"
        raise SolverMissing(f"{where}: {_INSTALL_DATA}.")
    return Astap(executable, found, downsample, timeout, threading.Semaphore(instances))


def _find_program(given: str) -> Path | None:
    if given:
        path = Path(given).expanduser().absolute()
        if path.is_file():
            return path if os.access(path, os.X_OK) else None
        places: tuple[str | None, ...] = (str(path),) if path.is_dir() else ()
    else:
        places = (None, *_PLACES)
    for place in places:
        for name in _NAMES:
            found = shutil.which(name, path=place)
            if found:
                return Path(found).absolute()
    return None
