"""What the adapters of the plate solvers share: hints and solution, a program run under guard, clean WCS headers."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, WcsError

from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.fits.headers import quiet
from zemosaic_pipeline.sky import pixel_scale

_POLL = 0.1  # s between two looks at `cancelled`
_OUTPUT_LIMIT = 65536  # bytes of a program's output that are kept: its last ones
_WCS_CARD = re.compile(
    r"WCSAXES|CTYPE[12]|CUNIT[12]|CRVAL[12]|CRPIX[12]|CD[12]_[12]|PC[12]_[12]|CDELT[12]|LONPOLE|LATPOLE|RADESYS"
    r"|PV[12]_\d+|(A|B|AP|BP)_(ORDER|\d_\d)"
)
_SIP_TERM = re.compile(r"(A|B|AP|BP)_\d_\d")
_SIP_CARD = re.compile(r"(A|B|AP|BP)_(ORDER|\d_\d)")


class SolveError(Exception):
    """One frame cannot be solved; the text is the reason in one sentence, without the file's name."""


class SolverMissing(Exception):
    """A solver cannot be used at all; the text is one sentence that says what to install."""


class StarList(Protocol):
    """Stars of one frame, brightest first: float arrays (N,), positions in pixels, the first pixel's centre at 0."""

    @property
    def x(self) -> np.ndarray: ...
    @property
    def y(self) -> np.ndarray: ...
    @property
    def flux(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Hints:
    """What is known of a frame before it is solved.

    Attributes
    ----------
    shape : (int, int)
        Height and width in pixels.
    ra, dec : float or None
        Pointing, degrees.
    radius : float
        How far from the pointing to search, degrees.
    scale : float or None
        Arcsec per pixel.
    """

    shape: tuple[int, int]
    ra: float | None
    dec: float | None
    radius: float
    scale: float | None

    @property
    def pointing(self) -> tuple[float, float] | None:
        """Both coordinates, or None where one is missing."""
        return None if self.ra is None or self.dec is None else (self.ra, self.dec)


@dataclass(frozen=True)
class Solution:
    """A frame's WCS: a header that holds only WCS cards, the solver's name, the seconds that it took."""

    header: fits.Header
    solver: str
    seconds: float


class Solver(Protocol):
    """A plate solver that can be used; `solve` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What it is called in messages and reports."""
        ...

    def solve(
        self,
        image: Callable[[], np.ndarray],
        stars: StarList,
        hints: Hints,
        scratch: Path,
        cancelled: Callable[[], bool],
    ) -> Solution:
        """Find the WCS of one frame.

        Parameters
        ----------
        image : callable
            Gives the frame's luminance, float32 (H, W), NaN where there is no data; called only if it is needed.
        stars : StarList
            The frame's stars, brightest first.
        hints : Hints
            What is known already.
        scratch : Path
            An existing folder for temporary files; nothing is left in it.
        cancelled : callable
            Tells whether the user has stopped the run; asked every 0.1 s.

        Raises
        ------
        SolveError
            The frame cannot be solved.
        Cancelled
            The user stopped the run.
        """
        ...


# ------------------------------------------------------------------------------------------------------- programs


def check(cancelled: Callable[[], bool]) -> None:
    """Raise `Cancelled` where the user has stopped the run."""
    if cancelled():
        raise Cancelled


def run_program(command: Sequence[str], folder: Path, timeout: float, cancelled: Callable[[], bool]) -> str:
    """Run a program in `folder` to its end, and return the last 64 KiB of what it printed.

    It runs in a process group of its own, which is killed as a whole when the time is over, when the run is
    stopped and on any error. The exit status is not looked at: solvers tell their success by files.

    Parameters
    ----------
    command : sequence of str
        Program and arguments; no shell is involved.
    folder : Path
        Where it runs.
    timeout : float
        Seconds that it may take.
    cancelled : callable
        Asked every 0.1 s.

    Raises
    ------
    SolveError
        The program cannot be started, or did not end in time.
    Cancelled
        The user stopped the run.
    """
    check(cancelled)
    windows = os.name == "nt"
    try:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            creationflags=0x08000200 if windows else 0,  # no window, new group
            start_new_session=not windows,
        )
    except OSError as error:
        raise SolveError(f"{command[0]} cannot be started ({error.strerror or error}).") from error
    assert isinstance(process.stdout, io.BufferedReader)  # a pipe
    tail: deque[bytes] = deque(maxlen=_OUTPUT_LIMIT // 4096)
    reader = threading.Thread(target=_keep_tail, args=(process.stdout, tail), daemon=True)
    reader.start()
    try:
        _wait(process, Path(command[0]).name, timeout, cancelled)
    finally:
        if process.poll() is None:
            _kill_group(process)
        reader.join(5)  # a grandchild in a group of its own could hold the pipe open
        if not reader.is_alive():
            process.stdout.close()
    return b"".join(tail).decode("utf-8", "replace")


def _keep_tail(stream: io.BufferedReader, tail: deque[bytes]) -> None:
    while piece := stream.read1(4096):
        tail.append(piece)


def _wait(process: subprocess.Popen, name: str, timeout: float, cancelled: Callable[[], bool]) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            process.wait(_POLL)
            return
        except subprocess.TimeoutExpired:
            check(cancelled)
        if time.monotonic() >= end:
            raise SolveError(f"{name} did not finish in time (solver_timeout).")


def _kill_group(process: subprocess.Popen) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
    process.wait(10)


# --------------------------------------------------------------------------------------------------------- header


def read_cards(path: Path) -> list[tuple[str, object]]:
    """Read the WCS cards of a header file, whether a FITS header, or text with one card a line and odd bytes.

    Returns
    -------
    list of (str, value)
        The cards of a WCS alone; those that cannot be read are left out.
    """
    text = path.read_bytes().decode("latin-1")
    lines = text.splitlines() if re.search(r"[\r\n]", text) else [text[k : k + 80] for k in range(0, len(text), 80)]
    cards = []
    for line in lines:
        key, equals, rest = line.partition("=")
        if equals and _WCS_CARD.fullmatch(key.strip()) and rest.isascii():
            try:
                card = fits.Card.fromstring(f"{key.strip():8}= {rest.strip()}"[:80])
                cards.append((card.keyword, card.value))
            except (fits.VerifyError, ValueError):
                continue
    return cards


def wcs_header(cards: Iterable[tuple[str, object]], hints: Hints) -> fits.Header:
    """Make a header of the WCS cards among `cards`, and prove that it is a celestial WCS.

    SIP terms are kept unless all are 0. Catalogues are ICRS: it is said, since readers would take FK5.

    Raises
    ------
    SolveError
        They make no celestial WCS, or not a finite one, or its scale is absurd.
    """
    found = {key: value for key, value in cards if _WCS_CARD.fullmatch(key)}
    if any(isinstance(found.get(key), str | None) for key in ("CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2")):
        raise SolveError("The solver's answer is not a WCS: the reference point is missing.")
    if not any(value for key, value in found.items() if _SIP_TERM.fullmatch(key)):
        found = {key: value for key, value in found.items() if not _SIP_CARD.fullmatch(key)}
        found |= {f"CTYPE{k}": str(found.get(f"CTYPE{k}", "")).removesuffix("-SIP") for k in (1, 2)}
    if "CD1_1" in found:  # ASTAP writes both; CDELT beside CD is no valid header
        found = {key: value for key, value in found.items() if not key.startswith("CDELT")}
    found.setdefault("RADESYS", "ICRS")
    header = fits.Header(list(found.items()))
    height, width = hints.shape
    try:
        with quiet():
            wcs = WCS(header)
            sky = wcs.all_pix2world([[0, 0], [width - 1, 0], [0, height - 1]], 0) if wcs.has_celestial else [math.nan]
            scale = 3600 * pixel_scale(wcs)
    except (WcsError, fits.VerifyError, ValueError, TypeError) as error:
        raise SolveError(f"The solver's answer is not a WCS ({error}).") from error
    if not np.isfinite(sky).all() or not 0.001 < scale < 3600:
        raise SolveError("The solver's answer is not a usable celestial WCS.")
    return header
