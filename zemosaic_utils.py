"""Errors, folders, atomic files, and the few names that the ZeMosaic GUI imports.

The lowest room of the house: it needs only the standard library and numpy; every other module may import it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: Arrays of at least so many bytes get pages of their own.
PAGED_BYTES = 4 << 20
#: Bytes of a large page of memory, on most systems.
LARGE_PAGE = 2 << 20
#: Objects made, and not freed, between two looks for unreachable cycles.
COLLECT_AFTER = 200_000

EXCLUDED_DIRS: frozenset[str] = frozenset({"unaligned_by_zemosaic"})
"""Names of folders whose content is never an input."""


class ZeMosaicError(Exception):
    """Base of every error that is told to the user in one sentence, without a traceback."""


class UsageError(ZeMosaicError):
    """The command, a setting or the input as a whole cannot be used (exit status 2)."""


class RunError(ZeMosaicError):
    """The run failed on its way: a full disk, an unwritable output (exit status 1)."""


class Cancelled(ZeMosaicError):
    """The user stopped the run (exit status 130)."""


class UnusableFile(ZeMosaicError):
    """One input file cannot be used: it is set aside, and the run goes on.

    Attributes
    ----------
    path : Path
        The file.
    reason : str
        Why, in words that follow the file's name ("is empty").
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


class UnsolvedImage(UnusableFile):
    """An image without a WCS: no panel, but perhaps a frame. ``raw`` tells that it has a Bayer pattern."""

    def __init__(self, path: Path | str, reason: str, raw: bool = False) -> None:
        super().__init__(path, reason)
        self.raw = raw


# ---------------------------------------------------------------------------------------------------- folders


def get_app_base_dir() -> Path:
    """Return the folder that holds the program (in a frozen build, the folder of its bundled files)."""
    if getattr(sys, "frozen", False):
        return Path(getattr(sys, "_MEIPASS", Path(sys.executable).parent)).resolve()
    return Path(__file__).resolve().parent


def get_user_config_dir() -> Path:
    """Return the folder of the user's configuration, ``~/ZeMosaic``; it need not exist."""
    return Path.home() / "ZeMosaic"


def ensure_user_config_dir() -> Path:
    """Return `get_user_config_dir`, made if it was missing."""
    folder = get_user_config_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def get_runtime_temp_dir() -> Path:
    """Return a folder for temporary files, the user's own, made if it was missing."""
    # on a machine with several users the system's folder is shared, and one user cannot write in another's
    owner = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"zemosaic{owner}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_path_excluded(path: Path | str, excluded_dirs: Iterable[str] | None = None) -> bool:
    """Tell whether any part of `path` bears the name of an excluded folder (in any case).

    Parameters
    ----------
    path : Path or str
        A file or a folder; it need not exist.
    excluded_dirs : iterable of str, optional
        Names of folders; default `EXCLUDED_DIRS`.
    """
    names = EXCLUDED_DIRS if excluded_dirs is None else excluded_dirs
    return not {str(name).casefold() for name in names}.isdisjoint(p.casefold() for p in Path(path).parts)


# --------------------------------------------------------------------------------------------- radial weights


def make_radial_weight_map(
    height: int,
    width: int,
    feather_fraction: float = 0.8,
    shape_power: float = 2.0,
    min_weight_floor: float = 0.05,
    progress_callback: Callable[..., object] | None = None,
) -> np.ndarray:
    """Make a map of weights that falls from the centre of an image to its corners.

    ``w = cos(pi/2 * min(r / R, 1)) ** shape_power``, where r is the distance from the image's centre and R is
    `feather_fraction` times the distance of a corner; nowhere below `min_weight_floor`.

    Parameters
    ----------
    height, width : int
        Size in pixels, at least 1.
    feather_fraction : float
        Where the fall-off ends, as a fraction of the half diagonal, above 0.
    shape_power : float
        Steepness of the fall-off, above 0.
    min_weight_floor : float
        Smallest weight, 0 to 1. With 0, pixels beyond R have weight 0, that is, no data.
    progress_callback : callable, optional
        Accepted for the callers' sake; the map is made at once and there is no progress to tell.

    Returns
    -------
    ndarray, float32, (height, width)
        Weights from 0 to 1; 1 at the centre.

    Raises
    ------
    ValueError
        A size or a parameter is out of its range.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a weight map of {height} x {width} pixels cannot be made")
    if not feather_fraction > 0 or not shape_power > 0 or not 0 <= min_weight_floor <= 1:
        raise ValueError("feather_fraction and shape_power must be above 0, min_weight_floor from 0 to 1")
    y = np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    reach = np.float32(max(feather_fraction * math.hypot(height / 2, width / 2), 1e-6))
    radius = np.minimum(np.hypot(y[:, None], x[None, :]) / reach, np.float32(1))
    weight = np.cos(radius * np.float32(np.pi / 2)) ** np.float32(shape_power)
    centre = weight.max()  # with an even size the centre lies between the pixels
    return np.clip(weight / centre, min_weight_floor, 1).astype(np.float32, copy=False)


def median_of_sorted(ordered: np.ndarray) -> np.ndarray:
    """Median along the last axis of ascending numbers, of which there is at least one."""
    count = ordered.shape[-1]
    return ordered[..., (count - 1) // 2 : count // 2 + 1].mean(axis=-1)


# ----------------------------------------------------------------------------------------------- the process


def collect_seldom() -> None:
    """Have Python look for unreachable cycles seldom, in a process that is the worker's own.

    Half a million objects come with the imports and stay; to look through them again and again took a tenth of a short
    run.
    """
    gc.set_threshold(COLLECT_AFTER)


# ---------------------------------------------------------------------------------------------- large arrays


def page_array(shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of zeros, float32, on memory pages of its own, which go back to the system when it is freed.

    The C library keeps freed arrays of some megabytes for itself and cuts them up: tiles that come and go on many threads
    would take twice their memory. Small arrays come from numpy.
    """
    count = math.prod(shape)
    if 4 * count < PAGED_BYTES:
        return np.zeros(shape, np.float32)
    # whole large pages: the system would fill a rest with hundreds of small ones, one by one
    size = -(-4 * count // LARGE_PAGE) * LARGE_PAGE
    if hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32, count).reshape(shape)


# ----------------------------------------------------------------------------------------------- atomic files


def _fsync(path: Path, mode: str) -> None:
    with path.open(mode) as stream:
        os.fsync(stream.fileno())


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable where the system can; Windows and some network folders cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_path(target: Path | str, waiting: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `target`; what was written there becomes `target` at the end, or nothing.

    The temporary file is hidden, bears the target's name and the process number, and ends in ``.part``. On
    success it is synced and renamed over the target; on any exception, Ctrl-C included, it is removed and an
    older target stays as it was.

    Parameters
    ----------
    target : Path or str
        The final file; its folder must exist.
    waiting : Path, optional
        The temporary path to use, on the same disk. What is there stays on an exception, for another run to go on
        with, unless the disk is full.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    RunError
        The target cannot be replaced (on Windows: while another program has it open).
    """
    target = Path(target)
    part = waiting or target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        _fsync(part, "r+b")
        try:
            part.replace(target)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{target} cannot be replaced ({reason}); close it in other programs.") from error
    except BaseException as error:
        cause = error.__cause__ or error
        if waiting is None or (isinstance(cause, OSError) and is_disk_full(cause)):
            with contextlib.suppress(OSError):  # the first error is the one to tell
                part.unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def not_written(path: Path | str, error: OSError) -> RunError:
    """Put into one sentence that the system did not let `path` be written, with the remedy."""
    if is_disk_full(error):
        return RunError(f"The disk is full: {path} cannot be written; make room or choose another folder.")
    return RunError(f"{path} cannot be written ({error.strerror or error}); check the folder.")


def to_jsonable(value: Any) -> Any:
    """Turn `value` into what strict JSON can hold: numpy to Python, paths to text, NaN and infinity to None.

    Raises
    ------
    TypeError
        It holds an object of another kind.
    """
    if isinstance(value, np.ndarray | np.generic):
        return to_jsonable(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(to_jsonable(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"an object of type {type(value).__name__} cannot be written as JSON")


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` (see `to_jsonable`) as indented UTF-8 JSON, complete or not at all.

    Raises
    ------
    RunError
        The file cannot be written.
    TypeError
        `obj` holds what JSON cannot.
    """
    text = json.dumps(to_jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        with atomic_path(path) as part:
            # a file name that is no UTF-8 (Linux) comes as lone surrogates: they become JSON's own escapes
            part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise not_written(path, error) from error
